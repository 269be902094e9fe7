"""The training loader's speed: clips for each core and decoder, ways of decoded frames, numbers of workers."""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from fvcore.common.config import CfgNode
from tabulate import tabulate
from torch import Tensor

from octvideo import build, command
from octvideo.benchmark import peers
from octvideo.benchmark.speed import BenchmarkError, Timed, in_turn
from octvideo.data import transforms
from octvideo.data.decode_pyav import PyAVVideo
from octvideo.data.lists import VideoList
from octvideo.engine.distributed import World

Reader = Callable[[int, int], object]  # a video's number in the list and the turn -> a clip


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
    others = {"decoding alone, pyav": _decode, **peers.readers()}
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


def _read(read: peers.PathReader, videos: VideoList, cfg: CfgNode, index: int, turn: int) -> None:
    read(videos.path(index), turn, cfg)


def _decode(path: str, turn: int, cfg: CfgNode) -> None:
    """Open, find the frames, decode them and what they lean on; convert and keep nothing."""
    with PyAVVideo(path) as video:
        for _ in video.read(sorted(set(peers.indices(video.num_frames, cfg, turn, path)))):
            pass


def _per_workers(options: argparse.Namespace, cfg: CfgNode, videos: VideoList) -> None:
    """The whole loader by the clock on the wall. Small batches, because each is one worker's."""
    entries = []
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
        command.write_output(options.out / f"{name}.txt", lines.encode())
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
