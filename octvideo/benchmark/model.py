"""A network's speed and memory beside its vanilla twin's, or another's, in turn in one process."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from tabulate import tabulate
from torch import Tensor, nn

from octvideo import build, command, deploy
from octvideo.analysis.naive import naive
from octvideo.analysis.paper import TABLE_2
from octvideo.benchmark import peers
from octvideo.benchmark.speed import BenchmarkError, Timed, in_turn, peak_memory, saved_bytes, spread, time_ratios
from octvideo.engine.distributed import World, device_of
from octvideo.engine.train import train_step
from octvideo.octave import fuse

MODES = ("inference", "training")
TRAINING_BACKENDS = ("eager", "compile")
DTYPES = ("float32", "bfloat16", "float16")
PYTORCHVIDEO = "pytorchvideo"


@dataclass(frozen=True)
class Subject:
    """A network of the table. kind: `octvideo`, its `naive` twin, or `pytorchvideo`, whose code it runs."""

    name: str
    cfg: CfgNode
    kind: str = "octvideo"

    def build(self) -> nn.Module:
        if self.kind == PYTORCHVIDEO:
            return peers.network(self.cfg)
        model = build.network(self.cfg)
        return naive(model) if self.kind == "naive" else model


@dataclass(frozen=True)
class Way:
    """How all networks of a table are run."""

    mode: str
    backend: str
    fused: bool
    dtype: str
    batch: int
    threads: int
    device: torch.device

    @property
    def processor_time(self) -> bool:
        """Whether time is this process's own on the processor, from which other processes take nothing."""
        return self.device.type == "cpu" and self.threads == 1

    def __str__(self) -> str:
        clock = "this process's processor time" if self.processor_time else "time on the wall"
        return f"{self.mode}{', fused' if self.fused else ''}, {self.backend}, {self.dtype}; {clock}"


@dataclass(frozen=True)
class Row:
    """What was measured of a network. seconds: of a batch. time_ratios: over the first network's, round by round.

    activations: values that the layers put out for one clip. peak_memory, saved_activations: bytes of a step.
    """

    name: str
    kind: str
    alpha: float
    macs: int
    macs_ratio: float
    activations: int
    seconds: list[float]
    clips_per_s: list[float]
    time_ratios: list[float]
    peak_memory: int | None
    saved_activations: int | None

    @property
    def ms(self) -> float:
        return 1000 * statistics.median(self.seconds)

    @property
    def time_ratio(self) -> float:
        return statistics.median(self.time_ratios)

    @property
    def efficiency(self) -> float:
        """1 is a time that follows the multiply-adds."""
        return self.macs_ratio / self.time_ratio

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ms": self.ms, "time_ratio": self.time_ratio, "efficiency": self.efficiency}


def benchmark_model(options: argparse.Namespace) -> None:
    modes, cfg = _modes(options), build.load_config(options.cfg, options.overrides)
    _check(options, build.network_name(cfg))
    device, dtype = device_of(cfg.DEVICE, World()), options.dtype or cfg.TRAIN.DTYPE
    torch.set_num_threads(options.threads)
    ways = [Way(m, options.backend, options.fuse, dtype, options.batch, options.threads, device) for m in modes]
    subjects = [_subjects(options, way) for way in ways]
    print(
        f"{build.network_name(cfg)}: {' x '.join(map(str, build.clip_size(cfg, cfg.DATA.TRAIN_CROP)[1:]))}, batch "
        f"{options.batch}, {options.rounds} rounds in turn, {device.type}, {options.threads} thread(s), "
        f"torch {torch.__version__}"
    )
    tables = []
    for way, networks in zip(ways, subjects, strict=True):
        rows = _measure(networks, way, options.rounds)
        tables.append({**asdict(way), "device": device.type, "rows": [row.as_dict() for row in rows]})
        print(f"\n{way}\n{_speeds(rows, way, 'images/s' if build.takes_images(cfg) else 'clips/s')}")
        if way.mode == "training":
            print(f"\n{_saved(rows)}")
        elif options.table2:
            print(f"\n{_beside_the_paper(rows)}")
    print(f"\n{_legend(options, modes, rows)}")
    if options.json:
        content = {"config": str(options.cfg), "overrides": options.overrides, "torch": torch.__version__}
        command.write_output(options.json, (json.dumps({**content, "tables": tables}, indent=1) + "\n").encode())


def _check(options: argparse.Namespace, network: str) -> None:
    if options.json and not options.json.parent.is_dir():
        raise BenchmarkError(f"{options.json}: no folder {options.json.parent} to write to; make it or give another")
    if options.json:
        command.check_output(options.json, b"{")
    if options.table2 and network not in TABLE_2_NETWORKS:
        raise BenchmarkError(
            f"--table2 is of ResNet-50: give a config of {' or '.join(TABLE_2_NETWORKS)}, not {network}"
        )
    if options.table2 and (options.against or any(alpha not in TABLE_2 for alpha in options.alphas or [])):
        allowed = ", ".join(f"{alpha:g}" for alpha in TABLE_2)
        raise BenchmarkError(f"--table2 is against the vanilla network, with alphas of {allowed}; leave --against out")


def _legend(options: argparse.Namespace, modes: Sequence[str], rows: Sequence[Row]) -> str:
    lines = [SPEEDS]
    if "training" in modes:
        lines.append(SAVED)
    if options.naive:
        lines.append(NAIVE)
    if options.against == PYTORCHVIDEO and options.fuse:
        lines.append(f"{PYTORCHVIDEO}: as that package builds it; never fused.")
    if any(row.peak_memory is None for row in rows):
        lines.append("MiB is -: a CPU process's peak is read from Linux's /proc, which is not here.")
    return "\n".join(lines)


SPEEDS = """ms: of a batch, median of the rounds. MiB: what a step takes above what was there before it, at its peak.
time ratio: over the first line's, round by round, median and range. efficiency: ratio of multiply-adds over time ratio."""
NAIVE = "naive: four convolutions and their poolings, as an octave convolution is usually written first; never fused."
SAVED = """saved activations: what autograd keeps for the backward pass. law: ratio of the values that layers put out,
which is 1 - 3/4 alpha where low is a quarter of high."""


def _modes(options: argparse.Namespace) -> tuple[str, ...]:
    inference_alone = options.fuse or options.backend not in TRAINING_BACKENDS
    if options.mode is None:
        return MODES[:1] if inference_alone or options.backend == "compile" else MODES
    if options.mode != "inference" and inference_alone:
        what = "--fuse" if options.fuse else f"--backend {options.backend}"
        raise BenchmarkError(f"{what} is for inference alone; leave --mode {options.mode} out")
    return MODES if options.mode == "both" else (options.mode,)


def _subjects(options: argparse.Namespace, way: Way) -> list[Subject]:
    """The network to measure against, then the config's own or one for each alpha, each with its naive twin."""
    compiled = way.mode == "training" and way.backend == "compile"  # for inference deploy.runner does it
    fixed = ["TRAIN.DTYPE", way.dtype, "MODEL.COMPILE", "default" if compiled else "off"]

    def load(path: str, alpha: float | None = None) -> CfgNode:
        own = [] if alpha is None else ["OCTAVE.ALPHA", f"{alpha:g}", "OCTAVE.RATIOS", "[]"]
        return build.load_config(path, [*options.overrides, *fixed, *own])

    if options.against and options.against != PYTORCHVIDEO:
        base = load(options.against)
    else:
        base = load(options.cfg, 0.0)
    cfgs = [load(options.cfg, alpha) for alpha in options.alphas or (TABLE_2_ALPHAS if options.table2 else [None])]
    one_network = len({build.network_name(cfg) for cfg in (base, *cfgs)}) == 1
    subjects = [Subject(_name(base, one_network), base)]
    if options.against == PYTORCHVIDEO:
        subjects = [Subject(PYTORCHVIDEO, base, PYTORCHVIDEO)]
        subjects[0].build()  # refused before anything is measured
    for cfg in cfgs:
        name = _name(cfg, one_network)
        subjects.append(Subject(name, cfg))
        if options.naive and _is_octave(cfg):
            subjects.append(Subject(f"{name}, naive", cfg, "naive"))
    if options.naive and all(subject.kind != "naive" for subject in subjects):
        raise BenchmarkError("--naive is another form of an octave network; give --alphas or OCTAVE.ALPHA above 0")
    return subjects


def _is_octave(cfg: CfgNode) -> bool:
    return bool(cfg.OCTAVE.ALPHA or any(cfg.OCTAVE.RATIOS))


def _name(cfg: CfgNode, one_network: bool) -> str:
    alphas = cfg.OCTAVE.RATIOS or [cfg.OCTAVE.ALPHA]
    name = f"alpha {'/'.join(f'{alpha:g}' for alpha in alphas)}" if _is_octave(cfg) else "vanilla"
    return name if one_network else f"{build.network_name(cfg)} {name}"


def _measure(subjects: Sequence[Subject], way: Way, rounds: int) -> list[Row]:
    steps = [STEPS[way.mode](subject, way) for subject in subjects]
    clock = time.process_time if way.processor_time else time.perf_counter
    entries = [Timed(subject.name, step, clock) for subject, step in zip(subjects, steps, strict=True)]
    in_turn(entries, rounds)
    costs = [build.cost(subject.cfg, subject.cfg.DATA.TRAIN_CROP) for subject in subjects]
    rows = []
    for subject, step, entry, cost in zip(subjects, steps, entries, costs, strict=True):
        rows.append(
            Row(
                name=subject.name,
                kind=subject.kind,
                alpha=subject.cfg.OCTAVE.ALPHA,
                macs=cost.macs.total,
                macs_ratio=cost.macs.total / costs[0].macs.total,
                activations=cost.activations,
                seconds=entry.seconds,
                clips_per_s=entry.clips_per_s,
                time_ratios=time_ratios(entry, entries[0]),
                peak_memory=peak_memory(partial(_ready, subject, way), way.device),
                saved_activations=step.saved() if isinstance(step, TrainingStep) else None,
            )
        )
    return rows


def _in_memory_format(subject: Subject, way: Way) -> nn.Module:
    return subject.build().to(way.device).to(memory_format=build.memory_format(subject.cfg))  # type: ignore[call-overload]


class InferenceStep:
    """Logits of a batch."""

    def __init__(self, subject: Subject, way: Way) -> None:
        self.way, self.clips = way, _clips(subject.cfg, way)
        model = _in_memory_format(subject, way).eval()
        if way.fused and subject.kind == "octvideo":
            model = fuse(model)
        if way.device.type == "cuda":
            self.logits = _on_gpu(model, way)
        else:
            dtype = getattr(torch, way.dtype)
            self.logits = deploy.runner(model, self.clips, way.backend, threads=way.threads, dtype=dtype)

    def __call__(self) -> int:
        self.logits(self.clips)
        _synchronize(self.way)
        return self.way.batch

    def forget(self) -> None:
        """Nothing is kept from a step."""


def _on_gpu(model: nn.Module, way: Way) -> Callable[[Tensor], Tensor]:
    if way.backend not in TRAINING_BACKENDS:
        raise BenchmarkError(f"--backend {way.backend} is measured on CPUs; give DEVICE cpu")
    network = torch.compile(model, dynamic=False) if way.backend == "compile" else model

    def logits(clips: Tensor) -> Tensor:
        dtype = getattr(torch, way.dtype)
        with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            return network(clips)

    return logits


def _synchronize(way: Way) -> None:
    if way.device.type == "cuda":
        torch.cuda.synchronize(way.device)


class TrainingStep:
    """Forward, backward, and the step of the optimizer."""

    def __init__(self, subject: Subject, way: Way) -> None:
        cfg, self.way, self.clips = subject.cfg, way, _clips(subject.cfg, way)
        if subject.kind == PYTORCHVIDEO:  # as its users run it
            self.model = _in_memory_format(subject, way).train()
            if way.backend == "compile":
                self.model.compile()
        else:
            self.model = build.place(cfg, subject.build(), way.device).train()
        self.optimizer = build.optimizer(cfg, self.model)
        self.labels = torch.arange(way.batch, device=way.device) % cfg.MODEL.NUM_CLASSES
        self.precision = build.precision(cfg, way.device)

    def __call__(self) -> int:
        loss = F.cross_entropy
        train_step(self.model, self.optimizer, self.clips, self.labels, 1e-4, loss, self.precision)
        _synchronize(self.way)
        return self.way.batch

    def forget(self) -> None:
        """Gradients and momenta go, so that the next step makes them again, as the first did."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()

    def saved(self) -> int:
        dtype = self.precision.dtype

        def forward() -> Tensor:
            with torch.autocast(self.way.device.type, dtype, enabled=dtype != torch.float32):
                logits = self.model(self.clips)
            return F.cross_entropy(logits.float(), self.labels)

        return saved_bytes(forward, self.model)


STEPS: dict[str, Any] = {"inference": InferenceStep, "training": TrainingStep}


def _clips(cfg: CfgNode, way: Way) -> Tensor:
    clips = torch.randn(way.batch, *build.clip_size(cfg, cfg.DATA.TRAIN_CROP), device=way.device)
    return clips.contiguous(memory_format=build.memory_format(cfg))


def _ready(subject: Subject, way: Way) -> InferenceStep | TrainingStep:
    """A step whose memory is the network's: what torch compiles it has compiled, in a step of which nothing is left.

    Other back ends have compiled before their first step, and would keep that step's memory for the next one.
    """
    torch.set_num_threads(way.threads)
    step = STEPS[way.mode](subject, way)
    if way.backend in TRAINING_BACKENDS:
        step()
        step.forget()
    return step


def _speeds(rows: Sequence[Row], way: Way, unit: str) -> str:
    cells = [
        [
            row.name,
            f"{row.macs / 1e9:.3f}",
            f"{row.macs_ratio:.2f}",
            f"{row.ms:.1f}",
            spread([1000 * seconds for seconds in row.seconds], 1),
            f"{statistics.median(row.clips_per_s):.2f}",
            "-" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f}",
            f"{row.time_ratio:.2f} ({spread(row.time_ratios)})",
            f"{row.efficiency:.2f}",
        ]
        for row in rows
    ]
    first = "inference" if way.mode == "inference" else "training step"
    return _table(cells, [first, "G macs", "ratio", "ms", "min-max", unit, "MiB", "time ratio", "efficiency"])


def _saved(rows: Sequence[Row]) -> str:
    """Beside the law: activations are 1 - alpha + alpha / 4 of the vanilla ones in a layer that pools by 2 x 2."""
    first = rows[0]
    assert first.saved_activations is not None
    cells = []
    for row in rows:
        assert row.saved_activations is not None
        ratio, law = row.saved_activations / first.saved_activations, row.activations / first.activations
        cells.append([row.name, f"{row.saved_activations / 2**20:.1f}", f"{ratio:.2f}", f"{law:.2f}"])
    return _table(cells, ["training step", "saved activations (MiB)", "ratio", "law"])


TABLE_2_NETWORKS = ("resnet50", "resnet50_v1b")
TABLE_2_ALPHAS = tuple(alpha for alpha in TABLE_2 if alpha)


def _beside_the_paper(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        if row.kind == "naive":
            continue
        paper = TABLE_2[row.alpha]
        ratios = [f"{paper / TABLE_2[0.0]:.2f}", f"{row.time_ratio:.2f}"]
        cells.append([row.name, f"{paper}", f"{row.ms:.1f}", *ratios])
    return _table(cells, ["Table 2", "paper's ms", "ms here", "paper's time ratio", "here"])


def _table(cells: list[list[str]], header: list[str]) -> str:
    return tabulate(cells, header, tablefmt="github", disable_numparse=True)
