#!/usr/bin/env python
"""Speed, measured in turn in one process: medians with their spread.

python tools/benchmark.py data  --cfg CONFIG [--decoders pyav decord] [KEY VALUE ...]
    clips/s of the training loader for each decoder
python tools/benchmark.py model --cfg CONFIG [--against CONFIG] [KEY VALUE ...]
    inference and training steps of a network against its vanilla twin (or another config): clips/s, peak memory,
    multiply-adds
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from tabulate import tabulate

from octvideo import build
from octvideo.config import ConfigError
from octvideo.data.dataset import ListError
from octvideo.data.decode import BACKENDS
from octvideo.engine.distributed import DistributedError, World, device_of
from octvideo.engine.train import train_step


class BenchmarkError(RuntimeError):
    """A measurement that cannot be taken."""


@dataclass
class Timed:
    """Something to run again and again; clips: how many one run handles."""

    name: str
    run: Callable[[], int]
    clips_per_s: list[float] = field(default_factory=list)

    def once(self) -> None:
        started = time.perf_counter()
        clips = self.run()
        self.clips_per_s.append(clips / (time.perf_counter() - started))

    def cells(self) -> list[str]:
        return [
            f"{statistics.median(self.clips_per_s):.2f}",
            f"{min(self.clips_per_s):.2f}-{max(self.clips_per_s):.2f}",
        ]


def in_turn(entries: Sequence[Timed], rounds: int) -> None:
    """A B A B ...: a machine that gets slower or faster does so for all. One run each before counts nothing."""
    for entry in entries:
        entry.run()
    for _ in range(rounds):
        for entry in entries:
            entry.once()


def benchmark_data(options: argparse.Namespace) -> None:
    cfg = build.load_config(options.cfg, options.overrides)
    if build.takes_images(cfg):
        raise BenchmarkError(f"{cfg.MODEL.NAME} takes images, which have no decoders to compare; name a video network")
    videos = build.video_list(cfg, cfg.DATA.TRAIN_LIST, training=False)
    if len(videos) < cfg.TRAIN.BATCH_SIZE:
        raise BenchmarkError(f"{len(videos)} videos are fewer than TRAIN.BATCH_SIZE, {cfg.TRAIN.BATCH_SIZE}")
    entries = []
    for decoder in options.decoders:
        own = build.load_config(options.cfg, [*options.overrides, "DATA.DECODER", decoder])
        entries.append(Timed(decoder, _epochs(build.train_loader(own, videos, World(), torch.device("cpu")))))
    in_turn(entries, options.rounds)
    base = statistics.median(entries[0].clips_per_s)
    rows = [[e.name, *e.cells(), f"{statistics.median(e.clips_per_s) / base:.2f}"] for e in entries]
    print(
        f"training loader of {options.cfg}: {cfg.DATA.NUM_FRAMES} frames at rate {cfg.DATA.SAMPLING_RATE}, crop "
        f"{cfg.DATA.TRAIN_CROP}, {cfg.DATA.NUM_WORKERS} worker(s), {options.rounds} rounds of an epoch"
    )
    print(tabulate(rows, ["decoder", "clips/s", "min-max", "relative"], tablefmt="github", disable_numparse=True))


def _epochs(loader: Any) -> Callable[[], int]:
    def epoch() -> int:
        loader.batch_sampler.set_epoch(0)
        clips = 0
        for batch in loader:
            if batch.errors:
                raise BenchmarkError(batch.errors[0])
            clips += len(batch.labels)
        return clips

    return epoch


def benchmark_model(options: argparse.Namespace) -> None:
    cfg = build.load_config(options.cfg, options.overrides)
    if options.against:
        other = build.load_config(options.against, options.overrides)
    else:
        other = build.load_config(options.cfg, [*options.overrides, "OCTAVE.ALPHA", "0", "OCTAVE.RATIOS", "[]"])
    names = [_name(other), _name(cfg)]
    device = device_of(cfg.DEVICE, World())
    torch.set_num_threads(options.threads)
    print(
        f"{' x '.join(map(str, build.clip_size(cfg, cfg.DATA.TRAIN_CROP)[1:]))}, batch {options.batch}, "
        f"{options.rounds} rounds in turn, {device.type}, {options.threads} thread(s), torch {torch.__version__}"
    )
    macs = [build.cost(c, c.DATA.TRAIN_CROP).macs.total for c in (other, cfg)]
    for mode in ("inference", "training step"):
        pair = [Timed(n, _steps(c, options.batch, mode, device)) for n, c in zip(names, (other, cfg), strict=True)]
        in_turn(pair, options.rounds)
        ratios = [b / a for a, b in zip(pair[0].clips_per_s, pair[1].clips_per_s, strict=True)]
        memory = [_peak_memory(c, options.batch, mode, device) for c in (other, cfg)]
        rows = [
            [entry.name, f"{m / 1e9:.3f}", f"{m / macs[0]:.2f}", *entry.cells(), f"{peak / 2**20:.0f}"]
            for entry, m, peak in zip(pair, macs, memory, strict=True)
        ]
        header = [mode, "multiply-adds (G)", "ratio", "clips/s", "min-max", "peak memory (MiB)"]
        print("\n" + tabulate(rows, header, tablefmt="github", disable_numparse=True))
        print(
            f"time ratio {1 / statistics.median(ratios):.2f} (pair by pair, "
            f"{1 / max(ratios):.2f}-{1 / min(ratios):.2f}) for {macs[1] / macs[0]:.2f} of the multiply-adds"
        )


def _name(cfg: CfgNode) -> str:
    return f"{cfg.MODEL.NAME} alpha {cfg.OCTAVE.ALPHA:g}" if cfg.OCTAVE.ALPHA else f"{cfg.MODEL.NAME} vanilla"


def _steps(cfg: CfgNode, batch: int, mode: str, device: torch.device) -> Callable[[], int]:
    model = build.place(cfg, build.network(cfg), device).train(mode == "training step")
    optimizer = build.optimizer(cfg, model)
    clips = torch.randn(batch, *build.clip_size(cfg, cfg.DATA.TRAIN_CROP), device=device)
    clips = clips.contiguous(memory_format=build.memory_format(cfg))
    labels = torch.arange(batch, device=device) % cfg.MODEL.NUM_CLASSES

    def step() -> int:
        if mode == "training step":
            train_step(model, optimizer, clips, labels, lr=1e-4, loss=F.cross_entropy)
        else:
            with torch.inference_mode():
                model(clips)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return batch

    return step


def _peak_memory(cfg: CfgNode, batch: int, mode: str, device: torch.device) -> int:
    """Bytes that a step takes above what was there before it: allocated on a GPU, resident in a fresh CPU process."""
    if device.type == "cuda":
        step = _steps(cfg, batch, mode, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR_REFS.exists():
        raise BenchmarkError("peak memory on a CPU is read from Linux's /proc, which is not here")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_resident_growth, (cfg.dump(), batch, mode))


CLEAR_REFS = Path("/proc/self/clear_refs")


def _resident_growth(text: str, batch: int, mode: str) -> int:
    torch.set_num_threads(1)
    step = _steps(CfgNode.load_cfg(text), batch, mode, torch.device("cpu"))
    before = _status("VmRSS")
    CLEAR_REFS.write_text("5")  # sets the peak, VmHWM, to what is resident now
    step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="clips/s of the training loader")
    data.add_argument("--decoders", nargs="+", choices=list(BACKENDS), default=list(BACKENDS))
    model = commands.add_parser("model", help="a network against its vanilla twin")
    model.add_argument("--against", metavar="CONFIG", help="another config (default: the same at alpha 0)")
    model.add_argument("--batch", type=int, default=4, help="clips per step (default 4)")
    model.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    for command, run in ((data, benchmark_data), (model, benchmark_model)):
        command.add_argument("--cfg", required=True, metavar="CONFIG")
        command.add_argument("--rounds", type=int, default=5, help="counted runs of each (default 5)")
        command.add_argument("overrides", nargs="*", metavar="KEY VALUE")
        command.set_defaults(run=run)
    options = parser.parse_args(arguments)
    try:
        if min(options.rounds, getattr(options, "batch", 1), getattr(options, "threads", 1)) < 1:
            raise BenchmarkError("--rounds, --batch and --threads are 1 or more")
        options.run(options)
    except (ConfigError, ListError, BenchmarkError, DistributedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
