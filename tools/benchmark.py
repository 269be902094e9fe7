#!/usr/bin/env python
"""Speed, measured in turn in one process: medians with their spread.

python tools/benchmark.py sources --out FOLDER
    16 h264 clips of 340 x 256 pixels and 10 s to measure decoding on: short.txt (a keyframe every 12 frames) and
    long.txt (every 250)
python tools/benchmark.py data  --cfg CONFIG [--decoders pyav,decord] [--workers 1,2,4] [KEY VALUE ...]
    training clips for each core and decoder, beside decord's and pytorchvideo's readers as they are usually called and
    beside decoding alone; then the loader with several numbers of workers
python tools/benchmark.py model --cfg CONFIG [--against CONFIG|pytorchvideo] [--alphas .125,.25] [--naive] [--table2]
        [--mode inference|training|both] [--backend BACKEND] [--fuse] [--dtype DTYPE] [--json FILE] [KEY VALUE ...]
    inference and training steps of a network, or of several alphas, against the vanilla twin, another config or
    pytorchvideo's network: latency, clips/s, peak memory, multiply-adds, efficiency
python tools/benchmark.py gpu   [--out docs/gpu] [--budget 480] [--parts A,B] [--toy]
    on a machine with a CUDA device: the tests that need it, networks, and a training run; one report named after the card
"""

from __future__ import annotations

if __name__ == "__main__":
    import octvideo.starting  # noqa: F401  # first: importing the others takes seconds

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from octvideo import command, deploy
from octvideo.benchmark.data import benchmark_data, write_sources
from octvideo.benchmark.gpu import PARTS, benchmark_gpu
from octvideo.benchmark.model import DTYPES, benchmark_model
from octvideo.benchmark.speed import BenchmarkError
from octvideo.data.decode import BACKENDS
from octvideo.files import path_argument


def _decoders(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in BACKENDS]:
        raise argparse.ArgumentTypeError(f"unknown decoder {unknown[0]!r}; choose from {', '.join(BACKENDS)}")
    return names


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,2,4") from None


def _alphas(text: str) -> list[float]:
    try:
        alphas = [float(alpha) for alpha in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of alphas such as .125,.25") from None
    if wrong := [alpha for alpha in alphas if not 0 <= alpha <= 1]:
        raise argparse.ArgumentTypeError(f"alpha {wrong[0]:g} is not from 0 to 1")
    return alphas


def _parts(text: str) -> list[str]:
    names, known = text.split(","), [part.name for part in PARTS]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"unknown part {unknown[0]!r}; choose from {', '.join(known)}")
    return names


@command.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="clips/s of the training loader")
    # lists with commas: with spaces they would swallow the overrides behind them
    data.add_argument("--decoders", type=_decoders, default="pyav,decord", metavar="A,B", help=", ".join(BACKENDS))
    data.add_argument("--workers", type=_numbers, default="1,2,4", metavar="N,M")
    sources = commands.add_parser("sources", help="clips to measure decoding on")
    sources.add_argument("--out", type=path_argument, required=True, metavar="FOLDER")
    sources.set_defaults(run=write_sources)
    model = commands.add_parser("model", help="a network against its vanilla twin")
    model.add_argument(
        "--against",
        metavar="CONFIG",
        help="another config, or `pytorchvideo` for that package's same network (default: the same at alpha 0)",
    )
    model.add_argument("--alphas", type=_alphas, metavar="A,B", help="a network for each (default: the config's own)")
    model.add_argument(
        "--naive", action="store_true", help="beside each octave network the same of four convolutions, never fused"
    )
    model.add_argument(
        "--table2", action="store_true", help="of ResNet-50: the paper's alphas, and its latencies beside those here"
    )
    model.add_argument(
        "--mode",
        choices=("inference", "training", "both"),
        help="default both; with --fuse or another back end than eager, inference",
    )
    model.add_argument("--batch", type=int, default=4, help="clips per step (default 4)")
    model.add_argument("--threads", type=int, default=1, help="threads (default 1: times are then of the processor)")
    model.add_argument("--fuse", action="store_true", help="networks in their inference form (octvideo.octave.fuse)")
    model.add_argument("--backend", choices=deploy.BACKENDS, default="eager", help="default eager")
    model.add_argument("--dtype", choices=DTYPES, help="of convolutions and products (default TRAIN.DTYPE)")
    model.add_argument("--json", type=path_argument, metavar="FILE", help="for all numbers")
    gpu = commands.add_parser("gpu", help="the GPU suite: tests, networks and a training run on one card")
    gpu.add_argument("--out", type=path_argument, default=Path("docs/gpu"), metavar="FOLDER", help="default docs/gpu")
    gpu.add_argument("--budget", type=float, default=480.0, metavar="SECONDS", help="in all (default 480)")
    gpu.add_argument("--parts", type=_parts, default=[part.name for part in PARTS], metavar="A,B", help="default all")
    gpu.add_argument("--toy", action="store_true", help="the same program at toy sizes on the CPU")
    gpu.set_defaults(run=benchmark_gpu)
    for measured, run in ((data, benchmark_data), (model, benchmark_model)):
        measured.add_argument("--cfg", required=True, metavar="CONFIG")
        measured.add_argument("--rounds", type=int, default=5, help="counted runs of each (default 5)")
        measured.add_argument("overrides", nargs="*", metavar="KEY VALUE")
        measured.set_defaults(run=run)
    options = parser.parse_args(arguments)
    numbers = [getattr(options, name, 1) for name in ("rounds", "batch", "threads")]
    if min(*numbers, *getattr(options, "workers", [1])) < 1:
        raise BenchmarkError("--rounds, --workers, --batch and --threads are 1 or more")
    options.run(options)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
