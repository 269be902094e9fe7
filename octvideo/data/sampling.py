"""Which frames of a video make a clip: index arithmetic and nothing else. A Generator in, indices out.

A video of N = 12 frames, clips of T = 3 frames at stride 2 (policy `strided`), V = 3 test clips:

    frame     0  1  2  3  4  5  6  7  8  9 10 11
    clip 0    x     x     x                           starts at 0
    clip 1             x     x     x                  starts at 7 // 2
    clip 2                         x     x     x      starts at 7: the last clip ends at the last frame

A clip longer than the video runs over its end; `short` says what then. N = 4, T = 3, stride 2, start 0:

    wanted 0 2 4       loop 0 2 0       clamp 0 2 3
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Generator, Tensor


def train_indices(
    num_video_frames: int,
    fps: float,
    *,
    num_frames: int,
    sampling_rate: int,
    target_fps: float,
    policy: str,
    generator: Generator,
    short: str | None = None,
) -> Tensor:
    """int64 [T], a clip at a random place; every index is in 0..num_video_frames - 1.

    `sampling_rate` is the stride in frames of a video of `target_fps`; files of another rate (`fps`) are sampled at
    the same distance in time. `target_fps` 0: the file's own rate. `short`, "loop" or "clamp", is for clips longer
    than the video; None is the policy's own way.
    """
    stride = sampling_rate * fps / target_fps if target_fps else float(sampling_rate)
    wanted = POLICIES[policy].indices(num_video_frames, num_frames, stride, 1, generator)
    return SHORT[short or POLICIES[policy].short](wanted, num_video_frames)[0]


def eval_indices(
    num_video_frames: int,
    fps: float,
    *,
    num_frames: int,
    sampling_rate: int,
    target_fps: float,
    policy: str,
    num_clips: int,
    short: str | None = None,
) -> Tensor:
    """int64 [V, T]: `num_clips` clips spread over the video; the other arguments as in `train_indices`."""
    stride = sampling_rate * fps / target_fps if target_fps else float(sampling_rate)
    wanted = POLICIES[policy].indices(num_video_frames, num_frames, stride, num_clips, None)
    return SHORT[short or POLICIES[policy].short](wanted, num_video_frames)


def strided(
    num_video_frames: int, num_frames: int, stride: float, num_clips: int, generator: Generator | None
) -> Tensor:
    """int64 [V, T]: start + i * step, the step being the stride rounded to whole frames.

    Test clips start evenly from 0 to where the last one ends at the last frame; a single one lies in the middle.
    (mmaction2 and pytorchvideo take a clip for T * step frames long, so they stop step - 1 frames earlier.)
    """
    step = max(math.floor(stride + 0.5), 1)
    last_start = max(num_video_frames - 1 - (num_frames - 1) * step, 0)
    if generator is not None:
        starts = torch.randint(last_start + 1, (num_clips,), generator=generator)
    elif num_clips == 1:
        starts = torch.tensor([last_start // 2])
    else:
        starts = torch.arange(num_clips) * last_start // (num_clips - 1)
    return starts[:, None] + step * torch.arange(num_frames)


def pyslowfast(
    num_video_frames: int, num_frames: int, stride: float, num_clips: int, generator: Generator | None
) -> Tensor:
    """int64 [V, T]: the indices of PySlowFast (datasets/decoder.py, get_start_end_idx and temporal_sampling).

    Its clip is spread over T * stride frames with both ends taken, so frames are (T * stride - 1) / (T - 1) apart:
    9 for 8x8. Test clip i of V starts at i / V, so the end of the video is never seen and a single clip starts at 0.
    """
    span = stride * num_frames
    last_start = max(num_video_frames - span, 0.0)
    if generator is not None:
        starts = (torch.rand(num_clips, generator=generator, dtype=torch.float64) * last_start).tolist()
    else:
        starts = [last_start * clip / num_clips for clip in range(num_clips)]
    return torch.stack([torch.linspace(start, start + span - 1, num_frames) for start in starts]).long()


def loop(wanted: Tensor, num_video_frames: int) -> Tensor:
    return wanted % num_video_frames


def clamp(wanted: Tensor, num_video_frames: int) -> Tensor:
    return wanted.clamp(max=num_video_frames - 1)


def strided_places(num_clips: int) -> list[Fraction]:
    return [Fraction(clip, num_clips - 1) for clip in range(num_clips)] if num_clips > 1 else [Fraction(1, 2)]


def pyslowfast_places(num_clips: int) -> list[Fraction]:
    return [Fraction(clip, num_clips) for clip in range(num_clips)]


class Policy(NamedTuple):
    """indices, short: see above. places: V -> where each test clip starts, as a share of the last possible start."""

    indices: Callable[[int, int, float, int, Generator | None], Tensor]
    short: str
    places: Callable[[int], list[Fraction]]


# `strided` loops: a clip that stands still on the last frame, for most of its length at worst, shows no motion.
# PySlowFast clamps.
POLICIES = {
    "strided": Policy(strided, "loop", strided_places),
    "pyslowfast": Policy(pyslowfast, "clamp", pyslowfast_places),
}
SHORT: dict[str, Callable[[Tensor, int], Tensor]] = {"loop": loop, "clamp": clamp}


def contained(num_clips: int, saved: int, policy: str) -> list[int] | None:
    """Which of `saved` test clips are the `num_clips` that the policy itself would take, in a video of any length.

    None where it would take others. `strided`, of 10: 2, 4 and 10 (V - 1 divides 9); a single one only of an odd number.
    """
    places = POLICIES[policy].places
    there = {place: clip for clip, place in enumerate(places(saved))}
    wanted = [there.get(place) for place in places(num_clips)]
    return [clip for clip in wanted if clip is not None] if None not in wanted else None


def seeded_generator(*key: int | str) -> Generator:
    """A Generator that depends on `key` alone, for example ("clip", seed, epoch, index).

    Through a hash, so that neighbouring keys give unrelated numbers and (1, 23) is not (12, 3).
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
