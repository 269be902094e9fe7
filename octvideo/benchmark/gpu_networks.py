"""Measure networks on one GPU: time, memory, launches and synchronisations of inference and training steps.

Each network is measured beside one or more networks of the same part, in alternating rounds in one process.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import octvideo
from octvideo import build
from octvideo.benchmark import peers
from octvideo.benchmark.model import PYTORCHVIDEO, Subject
from octvideo.benchmark.speed import BenchmarkError
from octvideo.engine.nonfinite import RunningStatistics
from octvideo.engine.train import train_step
from octvideo.octave import fuse, kernels

ROOT = Path(octvideo.__file__).resolve().parents[1]
I3D = "configs/kinetics400/i3d_r50_8x8_padded.yaml"  # POOL_PADDING 1: the same layers as pytorchvideo's network
SLOWFAST = "configs/kinetics400/slowfast_r50_4x16.yaml"
TOY = "configs/motion/i3d_tiny.yaml"
COMPILE = {"eager": "off", "compiled": "default", "graphs": "graphs"}
"""MODEL.COMPILE of each backend."""

Emit = Callable[[dict[str, Any]], None]
Step = Callable[[], None]


@dataclass(frozen=True)
class Size:
    """What is measured. seconds: length of a round of one network."""

    config: str
    batch: int
    rounds: int
    seconds: float
    warmup: int
    device: str = "cuda"
    dtype: str = "bfloat16"
    overrides: tuple[str, ...] = ()


I3D_SIZE = Size(I3D, batch=16, rounds=7, seconds=0.2, warmup=5)
SLOWFAST_SIZE = Size(SLOWFAST, batch=8, rounds=7, seconds=0.2, warmup=5)
TOY_SIZE = Size(
    TOY, 2, rounds=2, seconds=0.0, warmup=1, device="cpu", dtype="float32", overrides=("DATA.TRAIN_CROP", "32")
)


@dataclass(frozen=True)
class Entry:
    """One row. kind: octvideo, naive or pytorchvideo. fused: octvideo's networks are in their inference form.

    kernels: whether the Triton kernels may run (eager backend). search: cuDNN measures its algorithms in the first step.
    beside: labels of earlier entries of the same plan, which are measured again in the same rounds.
    """

    mode: str
    backend: str
    alpha: float = 0.0
    kind: str = "octvideo"
    fused: bool = False
    kernels: bool = True
    search: bool = False
    beside: tuple[str, ...] = ("vanilla",)

    @property
    def label(self) -> str:
        name = f"alpha {self.alpha:g}" if self.alpha else "vanilla"
        name = PYTORCHVIDEO if self.kind == PYTORCHVIDEO else name
        name += ", naive" if self.kind == "naive" else ""
        return name if self.kernels else f"{name}, kernels off"


def _networks(mode: str, backend: str, *, fused: bool = False, alphas: Sequence[float], others: bool) -> list[Entry]:
    """Vanilla, then octave networks in the order of `alphas`, then the naive form and pytorchvideo's network."""
    entries = [Entry(mode, backend, alpha, fused=fused) for alpha in (0.0, *alphas)]
    if others:
        entries.append(Entry(mode, backend, 0.25, "naive", fused, beside=("vanilla", "alpha 0.25")))
        entries.append(Entry(mode, backend, 0.0, PYTORCHVIDEO, fused))
    return entries


def _kernels_off(mode: str, alphas: Sequence[float], *, fused: bool = False) -> list[Entry]:
    return [
        Entry(mode, "eager", alpha, fused=fused, kernels=False, beside=("vanilla", f"alpha {alpha:g}"))
        for alpha in alphas
    ]


ALPHAS = (0.25, 0.5, 0.125)  # in the order of importance
PLANS: dict[str, list[list[Entry]]] = {
    "training_eager": [
        _networks("training", "eager", alphas=ALPHAS, others=True) + _kernels_off("training", (0.25, 0.5))
    ],
    "training_compiled": [_networks("training", "compiled", alphas=ALPHAS, others=True)],
    "inference_compiled": [
        _networks("inference", "compiled", fused=True, alphas=ALPHAS, others=True),
        _networks("inference", "compiled", alphas=(0.25,), others=False),
    ],
    "inference_eager": [
        _networks("inference", "eager", fused=True, alphas=ALPHAS, others=True)
        + _kernels_off("inference", (0.25, 0.5), fused=True),
        _networks("inference", "eager", alphas=(0.25, 0.5), others=False),
    ],
    "training_graphs": [_networks("training", "graphs", alphas=ALPHAS, others=False)],
    "inference_graphs": [_networks("inference", "graphs", fused=True, alphas=ALPHAS, others=False)],
    "training_search": [[Entry("training", "eager", alpha, search=True) for alpha in (0.0, 0.25, 0.5)]],
    "slowfast": [
        _networks("training", "eager", alphas=(0.25,), others=False),
        _networks("training", "compiled", alphas=(0.25,), others=False),
    ],
}
"""Lists of entries by part. Each list begins with vanilla, and its networks are compared with each other."""


def measure_part(name: str, emit: Emit, toy: bool) -> None:
    """Measure the entries of a plan; emit one record per entry, also for an entry that failed."""
    size = TOY_SIZE if toy else SLOWFAST_SIZE if name == "slowfast" else I3D_SIZE
    if toy:
        torch.set_num_threads(1)
    with _many_networks():
        failed = [error for entries in PLANS[name] for error in _measure_all(entries, size, emit, toy)]
    if failed:
        raise BenchmarkError(f"{len(failed)} of the networks failed: {'; '.join(failed)}")


def _measure_all(entries: Sequence[Entry], size: Size, emit: Emit, toy: bool) -> Iterator[str]:
    """Measure and emit one list of a plan; yield the errors."""
    runs: dict[str, _Run] = {}
    # One value for each process: cuDNN keeps the algorithm that it has chosen for a shape.
    torch.backends.cudnn.benchmark = entries[0].search
    for entry in entries:
        if toy and not _is_in_toy(entry):
            continue
        if entry.kind == PYTORCHVIDEO and not peers.is_installed(*peers.PYTORCHVIDEO_NEEDS):
            print(f"{entry.label}: not measured, {' and '.join(peers.PYTORCHVIDEO_NEEDS)} are not installed")
            continue
        before = _compiled_graphs()
        try:
            record = _measure(entry, size, runs)
        except Exception as error:  # noqa: BLE001 (one network's failure, such as out of memory, is its result)
            print(trace := traceback.format_exc())
            record = {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0][:300], "trace": trace[-4000:]}
            yield f"{entry.label}: {record['error']}"
        graphs = {name: count - before[name] for name, count in _compiled_graphs().items()}
        emit({"label": entry.label, **vars(entry), "batch": size.batch, **graphs, **record})
        print(_line(entry, record), flush=True)


def _is_in_toy(entry: Entry) -> bool:
    """pytorchvideo has no toy network, and CUDA graphs need a GPU. One alpha is enough to run each line of code."""
    kinds = ("octvideo", "naive") if entry.backend == "eager" else ("octvideo",)  # a CPU takes minutes to compile one
    return entry.kind in kinds and entry.backend != "graphs" and entry.alpha in (0.0, 0.25)


def _many_networks() -> contextlib.AbstractContextManager[object]:
    """Raise the number of compilations of the same Python code in one process, and make an exceeded limit an error.

    By default dynamo runs what it would have to compile a ninth time in eager mode, with a warning only.
    """
    limits = {"recompile_limit": 256, "cache_size_limit": 256, "fail_on_recompile_limit_hit": True}
    known = {name: value for name, value in limits.items() if hasattr(dynamo_config, name)}  # by torch's version
    return dynamo_config.patch(known)


def _compiled_graphs() -> dict[str, int]:
    return {
        "compiled_graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def _line(entry: Entry, record: dict[str, Any]) -> str:
    what = f"{entry.mode}, {entry.backend}{', fused' if entry.fused else ''}, {entry.label}"
    if "error" in record:
        return f"{what}: {record['error']}"
    ratios = {name: round(1 / statistics.median(values), 3) for name, values in record["time_ratios"].items()}
    ms = 1000 * statistics.median(record["seconds"])
    return f"{what}: {ms:.2f} ms, first step {record['first_step_s']:.1f} s, times as fast as {ratios}"


def _measure(entry: Entry, size: Size, runs: dict[str, _Run]) -> dict[str, Any]:
    """Build and warm up one network, then measure it in alternating rounds with those of `entry.beside`."""
    run = _Run(entry, size)
    first = run.first_step()
    runs[entry.label] = run
    others = {label: runs[label] for label in entry.beside if label in runs and label != entry.label}
    rounds: dict[str, list[tuple[float, float]]] = {label: [] for label in (*others, entry.label)}
    for _ in range(size.rounds):
        for label, each in {**others, entry.label: run}.items():
            rounds[label].append(each.round())
    seconds = [device for device, _ in rounds[entry.label]]
    ratios = {label: [own / other for own, (other, _) in zip(seconds, rounds[label], strict=True)] for label in others}
    return {
        "seconds": seconds,
        "host_seconds": [host for _, host in rounds[entry.label]],
        "clips_per_s": size.batch / statistics.median(seconds),
        "time_ratios": ratios,
        "first_step_s": first,
        "macs": build.cost(run.cfg, run.cfg.DATA.TRAIN_CROP).macs.total,
        "peak_memory": run.peak_memory(),
        **run.counts(),
        "syncs": run.syncs(),
    }


def network_config(size: Size, alpha: float, backend: str = "eager") -> CfgNode:
    """Return the configuration of a network of the suite. alpha 0 is the vanilla network."""
    octave = ["OCTAVE.ALPHA", f"{alpha:g}", "OCTAVE.ROUND_TO", "8"]
    run = ["TRAIN.DTYPE", size.dtype, "MODEL.CHANNELS_LAST", "True", "MODEL.COMPILE", COMPILE[backend]]
    return build.load_config(ROOT / size.config, [*octave, *run, *size.overrides])


class _Run:
    """A network that is ready to run steps. A step only queues work on the device; nothing is read back."""

    def __init__(self, entry: Entry, size: Size) -> None:
        self.entry, self.size, self.device = entry, size, torch.device(size.device)
        self.cfg = network_config(size, entry.alpha, entry.backend)
        self.optimizer: torch.optim.Optimizer | None = None
        model = Subject(entry.label, self.cfg, entry.kind).build()
        clips = torch.randn(size.batch, *build.clip_size(self.cfg, self.cfg.DATA.TRAIN_CROP), device=self.device)
        self.clips = clips.contiguous(memory_format=build.memory_format(self.cfg))
        self.step = self._training(model) if entry.mode == "training" else self._inference(model)
        self.steps = 1

    def _training(self, model: nn.Module) -> Step:
        cfg = self.cfg
        model = _on_device(self.entry, cfg, model, self.device).train()
        optimizer, precision = build.optimizer(cfg, model), build.precision(cfg, self.device)
        labels = torch.arange(self.size.batch, device=self.device) % cfg.MODEL.NUM_CLASSES
        self.optimizer, statistics = optimizer, RunningStatistics(model)

        def step() -> None:
            train_step(model, optimizer, self.clips, labels, 1e-4, F.cross_entropy, precision, statistics)

        return step

    def _inference(self, model: nn.Module) -> Step:
        if self.entry.fused and self.entry.kind == "octvideo":
            model = fuse(model.eval())
        network = _on_device(self.entry, self.cfg, model, self.device).eval()
        dtype = getattr(torch, self.size.dtype)

        def step() -> None:
            with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                network(self.clips)

        return step

    def first_step(self) -> float:
        """Run the first (compiling) step and the warm-up; set the steps of a round. Return the first step's seconds."""
        with self._context():
            _synchronize(self.device)
            started = time.perf_counter()
            self.step()
            _synchronize(self.device)
            first = time.perf_counter() - started
            for _ in range(self.size.warmup):
                self.step()
            _synchronize(self.device)
        seconds, _ = self.round()
        self.steps = max(1, round(self.size.seconds / seconds))
        return first

    def round(self) -> tuple[float, float]:
        """Return the seconds per step on the device's clock, and the host's seconds for queueing one step."""
        with self._context():
            return _timed(self.step, self.steps, self.device)

    def peak_memory(self) -> int | None:
        """Return a step's peak in bytes above weights and momenta. None on a CPU, and for graphs, which own a pool."""
        if self.device.type != "cuda" or self.entry.backend == "graphs":
            return None
        if self.optimizer:
            self.optimizer.zero_grad(set_to_none=True)
        _synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        with self._context():
            self.step()
        _synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def counts(self) -> dict[str, int | None]:
        """Count one step's kernels on the device, the calls that launch them, and the host's (nested) operator calls."""
        on_gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        with self._context(), profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
            self.step()
            _synchronize(self.device)
        events = [event for event in profiler.events() or [] if not getattr(event, "is_user_annotation", False)]
        names = [event.name for event in events if event.device_type == DeviceType.CPU]
        operators = sum(name.startswith("aten::") for name in names)
        if self.device.type != "cuda":
            return {"kernels_run": None, "launches": None, "operators": operators}
        on_device = [event.name for event in events if event.device_type == DeviceType.CUDA]
        return {
            "kernels_run": sum(not name.startswith(("Memcpy", "Memset")) for name in on_device),
            "launches": sum("Launch" in name and name.startswith("cu") for name in names),
            "operators": operators,
        }

    def syncs(self, steps: int = 5) -> float | None:
        """Return the calls per step that make the host wait for the device, as torch reports them. None on a CPU."""
        if self.device.type != "cuda":
            return None
        _synchronize(self.device)
        with self._context(), sync_warnings() as found:
            for _ in range(steps):
                self.step()
        _synchronize(self.device)
        return len(found) / steps

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        with kernels.enabled(self.entry.kernels):
            yield


@contextlib.contextmanager
def sync_warnings() -> Iterator[list[str]]:
    """Collect torch's warnings about synchronising calls."""
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    pattern = "called a synchronizing CUDA operation"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
            found += [str(warning.message) for warning in caught if pattern in str(warning.message)]


def _on_device(entry: Entry, cfg: CfgNode, model: nn.Module, device: torch.device) -> nn.Module:
    """Put the network on the device and compile it. pytorchvideo's and fused networks are compiled as one graph."""
    if entry.kind == PYTORCHVIDEO or (entry.fused and entry.kind == "octvideo"):
        model.to(device).to(memory_format=build.memory_format(cfg))  # type: ignore[call-overload]
        if entry.backend != "eager":
            model.compile(dynamic=False, mode="reduce-overhead" if entry.backend == "graphs" else None)
        return model
    return build.place(cfg, model, device, training=entry.mode == "training")


def _timed(step: Step, steps: int, device: torch.device) -> tuple[float, float]:
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(steps):
            step()
        seconds = (time.perf_counter() - started) / steps
        return seconds, seconds
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _synchronize(device)
    begin.record()
    started = time.perf_counter()
    step()
    host = time.perf_counter() - started  # of the first step: later ones may wait for room in the device's queue
    for _ in range(steps - 1):
        step()
    end.record()
    _synchronize(device)
    return begin.elapsed_time(end) / 1000 / steps, host


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
