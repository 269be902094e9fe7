"""How fast something runs, and the memory it takes: runs in turn, medians with their spread, peaks.

Peaks of a CPU process are read from Linux's /proc.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from octvideo.errors import UserError


class BenchmarkError(UserError, RuntimeError):
    """A measurement that cannot be taken."""


@dataclass
class Timed:
    """Something to run again and again. run: returns how many clips one run handles. seconds: of each counted run."""

    name: str
    run: Callable[[], int]
    clock: Callable[[], float] = time.perf_counter
    seconds: list[float] = field(default_factory=list)
    clips_per_s: list[float] = field(default_factory=list)

    def once(self) -> None:
        started = self.clock()
        clips = self.run()
        self.seconds.append(self.clock() - started)
        self.clips_per_s.append(clips / self.seconds[-1])

    def cells(self) -> list[str]:
        return [f"{statistics.median(self.clips_per_s):.2f}", spread(self.clips_per_s)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """'min-max'"""
    return f"{min(values):.{digits}f}-{max(values):.{digits}f}"


def in_turn(entries: Sequence[Timed], rounds: int) -> None:
    """A B A B ...: a machine that gets slower or faster does so for all. One run each before counts nothing."""
    for entry in entries:
        entry.run()
    for _ in range(rounds):
        for entry in entries:
            entry.once()


def time_ratios(entry: Timed, base: Timed) -> list[float]:
    """Time over `base`'s, round by round: what slows the machine down for a while slows both."""
    return [own / other for own, other in zip(entry.seconds, base.seconds, strict=True)]


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps of `forward()` for its backward pass: each storage once, `model`'s own left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}  # by address: what is saved lives until the backward pass, so none is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad
    return sum(kept.values())


Step = Callable[[], object]
CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_memory(prepare: Callable[[], Step], device: torch.device) -> int | None:
    """Bytes that the step which `prepare()` returns takes above what was there before it.

    Allocated on a GPU; on a CPU resident in a fresh process, for which `prepare` is pickled. None where that cannot be
    read (no Linux). Raises BenchmarkError where the process is killed, and what `prepare` and the step raise.
    """
    if device.type == "cuda":
        step = prepare()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    if not CLEAR_REFS.exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        try:
            return fresh.submit(_resident_growth, prepare).result()
        except BrokenProcessPool:
            raise BenchmarkError("the process that measures memory was killed: is there too little of it?") from None


def _resident_growth(prepare: Callable[[], Step]) -> int:
    step = prepare()
    gc.collect()
    _give_back_freed()
    before = _status("VmRSS")
    CLEAR_REFS.write_text("5")  # sets the peak, VmHWM, to what is resident now
    step()
    return max(_status("VmHWM") - before, 0)


def _give_back_freed() -> None:
    """What the C library keeps of a compiler's memory would be used again, and the step would seem to take less."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
