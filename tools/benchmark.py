#!/usr/bin/env python
"""Speed, measured in turn in one process: medians with their spread.

python tools/benchmark.py sources --out FOLDER
    16 h264 clips of 340 x 256 pixels and 10 s to measure decoding on: short.txt (a keyframe every 12 frames) and
    long.txt (every 250)
python tools/benchmark.py data  --cfg CONFIG [--decoders pyav,decord] [--workers 1,2,4] [KEY VALUE ...]
    training clips for each core and decoder, beside decord's and pytorchvideo's readers as they are usually called and
    beside decoding alone; then the loader with several numbers of workers
python tools/benchmark.py model --cfg CONFIG [--against CONFIG] [--fuse] [--backend eager|compile] [KEY VALUE ...]
    inference and training steps of a network against its vanilla twin (or another config): clips/s, peak memory,
    multiply-adds. Of both networks' inference forms with --fuse; with --backend compile by torch.compile with Inductor's
    freezing. Either leaves the training step out; times are then of the processor
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from fvcore.common.config import CfgNode
from tabulate import tabulate
from torch import Tensor
from torch._inductor import config as inductor_config

from octvideo import build
from octvideo.config import ConfigError
from octvideo.data import transforms
from octvideo.data.dataset import ListError, VideoList
from octvideo.data.decode import BACKENDS, MissingDecoderError
from octvideo.data.decode_pyav import PyAVVideo
from octvideo.engine.checkpoint import write_atomic
from octvideo.engine.distributed import DistributedError, World, device_of
from octvideo.engine.train import train_step
from octvideo.octave import fuse

Reader = Callable[[int, int], object]  # a video's number in the list and the turn -> a clip
PathReader = Callable[[str, int, CfgNode], object]


class BenchmarkError(RuntimeError):
    """A measurement that cannot be taken."""


@dataclass
class Timed:
    """Something to run again and again; clips: how many one run handles."""

    name: str
    run: Callable[[], int]
    clock: Callable[[], float] = time.perf_counter
    clips_per_s: list[float] = field(default_factory=list)

    def once(self) -> None:
        started = self.clock()
        clips = self.run()
        self.clips_per_s.append(clips / (self.clock() - started))

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
    print(
        f"training clips of {options.cfg}: {cfg.DATA.NUM_FRAMES} frames at rate {cfg.DATA.SAMPLING_RATE}, crop "
        f"{cfg.DATA.TRAIN_CROP}, {len(videos)} videos of {cfg.DATA.TRAIN_LIST}\n"
    )
    _per_core(options, cfg, videos)
    print()
    _ways(options, cfg, videos)
    print()
    _per_workers(options, cfg, videos)


def _per_core(options: argparse.Namespace, cfg: CfgNode, videos: VideoList) -> None:
    """Clips per second of one core's time: what other processes take from it does not count."""
    torch.set_num_threads(1)
    span = cfg.DATA.NUM_FRAMES * cfg.DATA.SAMPLING_RATE
    readers: dict[str, Reader] = {}
    for decoder in options.decoders:
        own = build.load_config(options.cfg, [*options.overrides, "DATA.DECODER", decoder])
        readers[f"octvideo, {decoder}"] = partial(_sample, build.train_samples(own, videos))
    others = {"decoding alone, pyav": _decode, **peers()}
    readers |= {name: partial(_read, read, videos, cfg) for name, read in others.items()}
    entries = [Timed(name, _clips(reader, len(videos)), time.process_time) for name, reader in readers.items()]
    in_turn(entries, options.rounds)
    speed = {entry.name: statistics.median(entry.clips_per_s) for entry in entries}
    ceiling, usual = speed["decoding alone, pyav"], speed.get("decord, get_batch")
    rows = [
        [e.name, *e.cells(), f"{speed[e.name] / ceiling:.2f}", f"{speed[e.name] / usual:.2f}" if usual else "-"]
        for e in entries
    ]
    header = [f"{span} frames' span", "clips/s per core", "min-max", "of decoding alone", "of decord, get_batch"]
    print(tabulate(rows, header, tablefmt="github", disable_numparse=True))


def _ways(options: argparse.Namespace, cfg: CfgNode, videos: VideoList) -> None:
    """What decoded frames of one clip cost on the way to the network, by several ways."""
    path, rate = videos.path(0), cfg.DATA.SAMPLING_RATE
    with PyAVVideo(path) as video:
        span = [frame for _, frame in video.read(list(range(min(cfg.DATA.NUM_FRAMES * rate, video.num_frames))))]
    sampled, crop = span[::rate][: cfg.DATA.NUM_FRAMES], cfg.DATA.TRAIN_CROP
    side = sum(cfg.DATA.TRAIN_SHORT_SIDE) // 2
    height, width = transforms.scaled_size(span[0].height, span[0].width, side)
    inner = [round(crop * size / scaled) for size, scaled in ((span[0].height, height), (span[0].width, width))]

    def cut(frames: Tensor, high: int, wide: int) -> Tensor:
        return frames[:, :high, :wide]

    ways: dict[str, Callable[[], object]] = {
        "every frame of the span to RGB": lambda: _to_rgb(span),
        "sampled frames to RGB": lambda: _to_rgb(sampled),
        "sampled frames to RGB, scaled": lambda: transforms.scale_short_side(_to_rgb(sampled), side),
        "sampled frames scaled and to RGB by FFmpeg": lambda: _to_rgb(sampled, width, height),
        "sampled frames to RGB, scaled, cropped, copied out": lambda: transforms.to_clip(
            cut(transforms.scale_short_side(_to_rgb(sampled), side), crop, crop)
        ),
        "sampled frames to RGB, cropped, scaled, copied out": lambda: transforms.to_clip(
            transforms.scale_short_side(cut(_to_rgb(sampled), *inner), crop)
        ),
    }
    entries = [Timed(name, partial(_ten_times, way), time.process_time) for name, way in ways.items()]
    in_turn(entries, options.rounds)
    rows = [
        [entry.name, f"{1000 / statistics.median(entry.clips_per_s):.2f}", f"{1000 / max(entry.clips_per_s):.2f}-"]
        for entry in entries
    ]
    for row, entry in zip(rows, entries, strict=True):
        row[-1] += f"{1000 / min(entry.clips_per_s):.2f}"
    header = [f"{len(sampled)} decoded frames of {span[0].width} x {span[0].height}", "ms", "min-max"]
    print(tabulate(rows, header, tablefmt="github", disable_numparse=True))


def _ten_times(way: Callable[[], object]) -> int:
    for _ in range(10):
        way()
    return 10


_REFORMATTER = VideoReformatter()


def _to_rgb(frames: Sequence[av.VideoFrame], width: int | None = None, height: int | None = None) -> Tensor:
    """uint8 [T, H, W, 3]; of another size if one is given, by FFmpeg's bilinear scaling."""
    images = []
    for frame in frames:
        rgb = _REFORMATTER.reformat(frame, width, height, "rgb24", interpolation="BILINEAR", threads=1)
        rows = np.frombuffer(rgb.planes[0], np.uint8).reshape(rgb.height, rgb.planes[0].line_size)  # type: ignore[call-overload]
        images.append(rows[:, : 3 * rgb.width])
    return torch.from_numpy(np.stack(images)).unflatten(2, (-1, 3))


def _clips(reader: Reader, videos: int) -> Callable[[], int]:
    """One clip of each video, other ones in each turn."""
    turns = itertools.count()

    def run() -> int:
        turn = next(turns)
        for index in range(videos):
            reader(index, turn)
        return videos

    return run


def _sample(samples: Any, index: int, turn: int) -> None:
    if error := samples[turn, index].error:
        raise BenchmarkError(error)


def _read(read: PathReader, videos: VideoList, cfg: CfgNode, index: int, turn: int) -> None:
    read(videos.path(index), turn, cfg)


def _start(num_frames: int, cfg: CfgNode, turn: int, path: str) -> int:
    span = (cfg.DATA.NUM_FRAMES - 1) * cfg.DATA.SAMPLING_RATE + 1
    return random.Random(f"{path} {turn}").randrange(max(num_frames - span, 0) + 1)


def _indices(num_frames: int, cfg: CfgNode, turn: int, path: str) -> list[int]:
    start, rate = _start(num_frames, cfg, turn, path), cfg.DATA.SAMPLING_RATE
    return [min(start + i * rate, num_frames - 1) for i in range(cfg.DATA.NUM_FRAMES)]


def _decode(path: str, turn: int, cfg: CfgNode) -> None:
    """Open, find the frames, decode them and what they lean on; convert and keep nothing."""
    with PyAVVideo(path) as video:
        for _ in video.read(sorted(set(_indices(video.num_frames, cfg, turn, path)))):
            pass


def _scale_and_crop(clip: Tensor, cfg: CfgNode, turn: int) -> Tensor:
    """float [C, T, H, W]: a random short side by bilinear interpolation, then a random crop, as the field does it."""
    rng = random.Random(turn)
    side, crop = rng.randint(*cfg.DATA.TRAIN_SHORT_SIDE), cfg.DATA.TRAIN_CROP
    height, width = clip.shape[2:]
    scale = side / min(height, width)
    clip = F.interpolate(clip, size=(round(height * scale), round(width * scale)), mode="bilinear")
    top, left = (rng.randrange(size - crop + 1) for size in clip.shape[2:])
    return clip[:, :, top : top + crop, left : left + crop].contiguous()


def peers() -> dict[str, PathReader]:
    """Other people's readers, called as their users call them; those that are installed."""
    found: dict[str, PathReader] = {}
    if importlib.util.find_spec("decord"):
        found["decord, get_batch"] = _decord_get_batch
    if importlib.util.find_spec("pytorchvideo") and importlib.util.find_spec("torchvision"):
        found["pytorchvideo, EncodedVideo"] = _encoded_video
    return found


def _decord_get_batch(path: str, turn: int, cfg: CfgNode) -> Tensor:
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    frames = torch.from_numpy(reader.get_batch(_indices(len(reader), cfg, turn, path)).asnumpy())
    return _scale_and_crop(frames.permute(3, 0, 1, 2).float(), cfg, turn)


def _encoded_video(path: str, turn: int, cfg: CfgNode) -> Tensor:
    """A clip by its time: every frame of the span is decoded and kept, then a few are taken."""
    for schema in ("nms(Tensor dets, Tensor scores, float t) -> Tensor", "qnms(Tensor d, Tensor s, float t) -> Tensor"):
        # torchvision's operators do not come with every build of torch; declared, its Python part imports
        with contextlib.suppress(RuntimeError):
            TORCHVISION.define(schema)
    from pytorchvideo.data.encoded_video import EncodedVideo

    video = EncodedVideo.from_path(path, decode_audio=False, decoder="pyav")
    span = cfg.DATA.NUM_FRAMES * cfg.DATA.SAMPLING_RATE / (cfg.DATA.TARGET_FPS or 30.0)
    start = random.Random(f"{path} {turn}").uniform(0, max(float(video.duration) - span, 0))
    clip = video.get_clip(start, start + span)["video"]
    chosen = torch.linspace(0, clip.shape[1] - 1, cfg.DATA.NUM_FRAMES).long()
    return _scale_and_crop(clip[:, chosen], cfg, turn)


TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")


def _per_workers(options: argparse.Namespace, cfg: CfgNode, videos: VideoList) -> None:
    """The whole loader by the clock on the wall. Small batches, because each is one worker's."""
    entries = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: the question here
        for workers in options.workers:
            own = build.load_config(options.cfg, [*options.overrides, "DATA.NUM_WORKERS", str(workers)])
            loader = build.train_loader(own, videos, World(), torch.device("cpu"))
            entries.append(Timed(f"{workers}", _epochs(loader)))
        in_turn(entries, options.rounds)
    rows = [[entry.name, *entry.cells()] for entry in entries]
    print(
        f"the loader with {cfg.DATA.DECODER}, {len(os.sched_getaffinity(0))} cores, {options.rounds} rounds of an epoch"
    )
    print(tabulate(rows, ["workers", "clips/s", "min-max"], tablefmt="github", disable_numparse=True))


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


def write_sources(options: argparse.Namespace) -> None:
    """Textures that move, with grain: 0.5 to 0.7 Mbit/s, which is what Kinetics clips of this size have."""
    options.out.mkdir(parents=True, exist_ok=True)
    for name, gop in (("short", 12), ("long", 250)):
        files = [options.out / f"{name}_{index}.mp4" for index in range(8)]
        for index, path in enumerate(files):
            if not path.exists():
                _write_source(path, index, gop)
        lines = "".join(f"{path.name} {label}\n" for label, path in enumerate(files))
        write_atomic(options.out / f"{name}.txt", lines.encode())
        megabits = sum(path.stat().st_size for path in files) * 8 / len(files) / 10 / 1e6
        print(f"{options.out}/{name}.txt: {len(files)} clips, a keyframe every {gop} frames, {megabits:.2f} Mbit/s")


def _write_source(path: Path, seed: int, gop: int) -> None:
    rng = np.random.default_rng(seed)
    ground = np.kron(rng.integers(0, 255, (24, 28, 3)), np.ones((16, 16, 1)))  # [384, 448, 3]
    grain = rng.normal(0, 6, (8, 256, 340, 1))
    unfinished = path.with_name(f".{path.name}.part")
    with av.open(str(unfinished), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "23", "g": str(gop)})
        stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
        stream.codec_context.thread_count = 1
        for t in range(300):
            y, x = int(60 + 60 * np.sin(t / 20)), int(50 + 50 * np.sin(t / 31))
            frame = np.clip(0.7 * ground[y : y + 256, x : x + 340] + 40 + grain[t % 8], 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    unfinished.replace(path)


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
    form = Form(options.fuse, options.backend)
    macs = [build.cost(c, c.DATA.TRAIN_CROP).macs.total for c in (other, cfg)]
    for mode in ("inference", "training step")[: 1 if form.for_inference_alone else 2]:
        steps = [_steps(c, options.batch, mode, device, form) for c in (other, cfg)]
        clock = time.process_time if form.for_inference_alone and device.type == "cpu" else time.perf_counter
        pair = [Timed(n, step, clock) for n, step in zip(names, steps, strict=True)]
        # Weights become constants in the layout that the convolutions want, without gradients. (As an option of
        # torch.compile it would come too late: they would be inputs already.)
        with inductor_config.patch(freezing=options.backend == "compile"):
            in_turn(pair, options.rounds)
        ratios = [b / a for a, b in zip(pair[0].clips_per_s, pair[1].clips_per_s, strict=True)]
        rows = [
            [entry.name, f"{m / 1e9:.3f}", f"{m / macs[0]:.2f}", *entry.cells()]
            for entry, m in zip(pair, macs, strict=True)
        ]
        header = [f"{mode}{form}", "multiply-adds (G)", "ratio", "clips/s", "min-max"]
        if options.backend == "eager":  # the compiler's own memory would hide the network's
            header.append("peak memory (MiB)")
            for row, c in zip(rows, (other, cfg), strict=True):
                row.append(f"{_peak_memory(c, options.batch, mode, device, form) / 2**20:.0f}")
        print("\n" + tabulate(rows, header, tablefmt="github", disable_numparse=True))
        time_ratio, mac_ratio = 1 / statistics.median(ratios), macs[1] / macs[0]
        print(
            f"time ratio {time_ratio:.2f} (pair by pair, {1 / max(ratios):.2f}-{1 / min(ratios):.2f}) "
            f"for {mac_ratio:.2f} of the multiply-adds: efficiency {mac_ratio / time_ratio:.2f}"
        )


@dataclass(frozen=True)
class Form:
    """In which form a network is measured."""

    fused: bool = False
    backend: str = "eager"

    @property
    def for_inference_alone(self) -> bool:
        return self.fused or self.backend == "compile"

    def __str__(self) -> str:
        return (", fused" if self.fused else "") + (", compiled" if self.backend == "compile" else "")

    def of(self, model: torch.nn.Module) -> torch.nn.Module:
        model = fuse(model) if self.fused else model
        if self.backend == "compile":
            model = torch.compile(model)  # type: ignore[assignment]
        return model


def _name(cfg: CfgNode) -> str:
    name = build.network_name(cfg)
    return f"{name} alpha {cfg.OCTAVE.ALPHA:g}" if cfg.OCTAVE.ALPHA else f"{name} vanilla"


def _steps(cfg: CfgNode, batch: int, mode: str, device: torch.device, form: Form) -> Callable[[], int]:
    model = build.place(cfg, build.network(cfg), device).train(mode == "training step")
    optimizer = build.optimizer(cfg, model)
    model = form.of(model)
    clips = torch.randn(batch, *build.clip_size(cfg, cfg.DATA.TRAIN_CROP), device=device)
    clips = clips.contiguous(memory_format=build.memory_format(cfg))
    labels = torch.arange(batch, device=device) % cfg.MODEL.NUM_CLASSES
    precision = build.precision(cfg, device)

    def step() -> int:
        if mode == "training step":
            train_step(model, optimizer, clips, labels, lr=1e-4, loss=F.cross_entropy, precision=precision)
        else:
            with torch.no_grad():
                model(clips)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return batch

    return step


def _peak_memory(cfg: CfgNode, batch: int, mode: str, device: torch.device, form: Form) -> int:
    """Bytes that a step takes above what was there before it: allocated on a GPU, resident in a fresh CPU process."""
    if device.type == "cuda":
        step = _steps(cfg, batch, mode, device, form)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR_REFS.exists():
        raise BenchmarkError("peak memory on a CPU is read from Linux's /proc, which is not here")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_resident_growth, (cfg.dump(), batch, mode, form))


CLEAR_REFS = Path("/proc/self/clear_refs")


def _resident_growth(text: str, batch: int, mode: str, form: Form) -> int:
    torch.set_num_threads(1)
    step = _steps(CfgNode.load_cfg(text), batch, mode, torch.device("cpu"), form)
    before = _status("VmRSS")
    CLEAR_REFS.write_text("5")  # sets the peak, VmHWM, to what is resident now
    step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="clips/s of the training loader")
    # lists with commas: with spaces they would swallow the overrides behind them
    data.add_argument("--decoders", type=_decoders, default="pyav,decord", metavar="A,B", help=", ".join(BACKENDS))
    data.add_argument("--workers", type=_numbers, default="1,2,4", metavar="N,M")
    sources = commands.add_parser("sources", help="clips to measure decoding on")
    sources.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    sources.set_defaults(run=write_sources)
    model = commands.add_parser("model", help="a network against its vanilla twin")
    model.add_argument("--against", metavar="CONFIG", help="another config (default: the same at alpha 0)")
    model.add_argument("--batch", type=int, default=4, help="clips per step (default 4)")
    model.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    model.add_argument(
        "--fuse", action="store_true", help="both networks in their inference form (octvideo.octave.fuse)"
    )
    model.add_argument("--backend", choices=("eager", "compile"), default="eager", help="default eager")
    for command, run in ((data, benchmark_data), (model, benchmark_model)):
        command.add_argument("--cfg", required=True, metavar="CONFIG")
        command.add_argument("--rounds", type=int, default=5, help="counted runs of each (default 5)")
        command.add_argument("overrides", nargs="*", metavar="KEY VALUE")
        command.set_defaults(run=run)
    options = parser.parse_args(arguments)
    try:
        if (
            min(
                getattr(options, "rounds", 1),
                *getattr(options, "workers", [1]),
                getattr(options, "batch", 1),
                getattr(options, "threads", 1),
            )
            < 1
        ):
            raise BenchmarkError("--rounds, --workers, --batch and --threads are 1 or more")
        options.run(options)
    except (ConfigError, ListError, MissingDecoderError, BenchmarkError, DistributedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
