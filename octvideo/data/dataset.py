"""The way from a line of a list to a clip: sample, decode, transform."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from octvideo.data.augment import check_rand_augment, rand_augment
from octvideo.data.decode import (
    BACKENDS,
    MAX_PIXELS,
    DecodeError,
    Video,
    frames_at_a_time,
    open_video,
    out_of_memory,
)
from octvideo.data.lists import VideoList
from octvideo.data.sampling import POLICIES, SHORT, eval_indices, seeded_generator, train_indices
from octvideo.data.transforms import (
    random_crop,
    random_flip,
    random_short_side,
    scale_short_side,
    to_clip,
    uniform_crops,
)

MAX_ASPECT = 16  # longer side per shorter side of a video: scaled by its short side, a strip grows without limit


class Failure(NamedTuple):
    """Why a file could not be decoded."""

    video: int  # index into the list
    reason: str  # LIST:LINE: PATH: reason; remedy
    trace: str  # the traceback, for the log


class Sample(NamedTuple):
    """What a dataset gives for one video."""

    clips: Tensor  # uint8 [V, C, (T,) H, W], contiguous, owning exactly its bytes; [0] when decoding failed
    label: int
    video: int  # index into the list
    error: str = ""  # "" when fine, else LIST:LINE: PATH: reason; remedy
    trace: str = ""  # of the error
    replaced: tuple[Failure, ...] = ()  # videos that this one stands for


class Batch(NamedTuple):
    """Samples put together. Failed ones are not in the first three; what to do about them is for the caller."""

    clips: Tensor  # uint8 [N, V, C, (T,) H, W]
    labels: Tensor  # int64 [N]
    videos: Tensor  # int64 [N], indices into the list
    errors: list[str]  # [M]
    failed_videos: Tensor  # int64 [M]
    replaced: list[Failure]  # videos that others stand for

    def __repr__(self) -> str:
        clips = f"{str(self.clips.dtype).removeprefix('torch.')} {list(self.clips.shape)}"
        labels, videos = self.labels.tolist(), self.videos.tolist()
        return f"Batch(clips={clips}, labels={labels}, videos={videos}, failed_videos={self.failed_videos.tolist()})"


def collate(samples: Sequence[Sample]) -> Batch:
    """N samples without and M with an error -> Batch; N may be 0."""
    good = [sample for sample in samples if not sample.error]
    failed = [sample for sample in samples if sample.error]
    return Batch(
        torch.stack([sample.clips for sample in good]) if good else torch.empty((0,) * 6, dtype=torch.uint8),
        torch.tensor([sample.label for sample in good], dtype=torch.int64),
        torch.tensor([sample.video for sample in good], dtype=torch.int64),
        [sample.error for sample in failed],
        torch.tensor([sample.video for sample in failed], dtype=torch.int64),
        [failure for sample in samples for failure in sample.replaced],
    )


@dataclass(eq=False)
class TrainDataset(Dataset[Sample]):
    """One random clip of a video: `dataset[(epoch, index)]`, V = 1.

    Random in time, scale (short side uniform in `short_side` = (low, high)), place (`crop` x `crop`) and, with
    `flip`, direction; then `augment_ops` operations of RandAugment at `augment_magnitude` and `augment_std` (see
    augment.rand_augment). All of it follows from (seed, epoch, index) alone: not from workers, order or other samples.
    `num_frames`, `sampling_rate`, `target_fps`, `policy`, `short`: see sampling.train_indices.
    """

    videos: VideoList
    _: KW_ONLY
    num_frames: int
    sampling_rate: int
    target_fps: float
    policy: str = "strided"
    short: str | None = None
    short_side: tuple[int, int]
    crop: int
    flip: bool
    augment_ops: int = 0
    augment_magnitude: float = 0.0
    augment_std: float = 0.0
    decoder: str = "auto"
    max_pixels: int = MAX_PIXELS
    seed: int

    def __post_init__(self) -> None:
        _check(self, self.short_side)
        check_rand_augment(self.augment_ops, self.augment_magnitude, self.augment_std)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        generator = seeded_generator("clip", self.seed, epoch, index)
        try:
            with open_video(self.videos.path(index), self.decoder, max_pixels=self.max_pixels) as video:
                indices = train_indices(
                    video.num_frames,
                    video.fps,
                    num_frames=self.num_frames,
                    sampling_rate=self.sampling_rate,
                    target_fps=self.target_fps,
                    policy=self.policy,
                    generator=generator,
                    short=self.short,
                )
                frames, order = _scaled_frames(video, indices, random_short_side(*self.short_side, generator))
        except DecodeError as error:
            return failed_sample(self.videos, index, error)
        frames = random_crop(frames, self.crop, generator)
        if self.flip:
            frames = random_flip(frames, generator)
        if self.augment_ops:  # here it has the fewest pixels to work on
            frames = rand_augment(
                frames,
                num_ops=self.augment_ops,
                magnitude=self.augment_magnitude,
                std=self.augment_std,
                generator=generator,
            )
        return Sample(to_clip(frames).index_select(1, order)[None], self.videos.label(index), index)


@dataclass(eq=False)
class EvalDataset(Dataset[Sample]):
    """The test views of a video: `dataset[index]`, V = num_clips * num_crops, the crops of a clip side by side.

    The short side is scaled to `short_side`; 3 crops of `crop` x `crop` cover the longer side, 1 is the centre.
    `num_frames`, `sampling_rate`, `target_fps`, `policy`, `num_clips`, `short`: see sampling.eval_indices.
    """

    videos: VideoList
    _: KW_ONLY
    num_frames: int
    sampling_rate: int
    target_fps: float
    policy: str = "strided"
    short: str | None = None
    num_clips: int
    num_crops: int
    short_side: int
    crop: int
    decoder: str = "auto"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        _check(self, (self.short_side, self.short_side))
        if self.num_clips < 1:
            raise ValueError(f"num_clips is {self.num_clips}; it must be at least 1")
        if self.num_crops not in (1, 3):
            raise ValueError(f"num_crops is {self.num_crops}; it must be 1 (centre) or 3 (along the longer side)")

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Sample:
        try:
            with open_video(self.videos.path(index), self.decoder, max_pixels=self.max_pixels) as video:
                frames, order = _scaled_frames(video, self.indices(video), self.short_side)
        except DecodeError as error:
            return failed_sample(self.videos, index, error)
        clips = torch.empty(self.num_clips, self.num_crops, 3, self.num_frames, self.crop, self.crop, dtype=torch.uint8)
        for place, crop in enumerate(uniform_crops(frames, self.crop, self.num_crops)):
            planes = to_clip(crop)  # [C, U, H, W], U different frames
            for clip in range(self.num_clips):
                clips[clip, place] = planes.index_select(1, order[clip])
        return Sample(clips.flatten(0, 1), self.videos.label(index), index)

    def indices(self, video: Video) -> Tensor:
        """int64 [num_clips, T]: the frames of each clip."""
        return eval_indices(
            video.num_frames,
            video.fps,
            num_frames=self.num_frames,
            sampling_rate=self.sampling_rate,
            target_fps=self.target_fps,
            policy=self.policy,
            num_clips=self.num_clips,
            short=self.short,
        )


def _scaled_frames(video: Video, indices: Tensor, short_side: int) -> tuple[Tensor, Tensor]:
    """int64 [...] -> uint8 [U, H, W, C], every wanted frame once, and int64 [...], where each index is among them."""
    numbers, order = indices.unique(return_inverse=True)
    parts: list[Tensor] = []
    size: torch.Size | None = None
    try:
        for part in numbers.split(frames_at_a_time(video)):
            frames = video.frames(part.tolist())
            size = size or frames.shape[1:3]
            _check_size(video.path, size, frames.shape[1:3])
            parts.append(scale_short_side(frames, short_side))
            del frames  # before the next ones are read
    except MemoryError:
        raise out_of_memory(video.path) from None
    return (torch.cat(parts) if len(parts) > 1 else parts[0]), order


def _check_size(path: str, first: torch.Size, size: torch.Size) -> None:
    """Raise DecodeError for frames of another size than the first ones, and of a shape that scaling would make vast."""
    text = f"{size[1]}x{size[0]}"
    if size != first:
        raise DecodeError(f"{path}: some frames are {text}, others {first[1]}x{first[0]}; re-encode it to one size")
    if max(size) > MAX_ASPECT * min(size):
        text = f"its frames are {text}; one side may be {MAX_ASPECT} times the other"
        raise DecodeError(f"{path}: {text}; cut it to a usual shape")


def failed_sample(videos: VideoList, index: int, error: DecodeError) -> Sample:
    """What a dataset gives for a file that cannot be decoded."""
    text, trace = f"{videos.place(index)}: {error}", "".join(traceback.format_exception(error))
    return Sample(torch.empty(0, dtype=torch.uint8), videos.label(index), index, text, trace)


@dataclass(frozen=True)
class Replacing(Dataset[Sample]):
    """A training dataset in which another video stands for one that cannot be decoded: drawn from (seed, epoch, index).

    The sample tells whom it stands for. After `tries` failures in a row it is a failed one.
    """

    samples: Dataset[Sample]
    seed: int
    tries: int = 10

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        generator = seeded_generator("replacement", self.seed, epoch, index)
        failures: list[Failure] = []
        sample = self.samples[key]
        while sample.error and len(failures) < self.tries:
            failures.append(Failure(sample.video, sample.error, sample.trace))
            other = int(torch.randint(len(self), (), generator=generator))
            sample = self.samples[epoch, other]
        return sample._replace(replaced=tuple(failures))


def _check(dataset: TrainDataset | EvalDataset, short_side: tuple[int, int]) -> None:
    """What is wrong with the arguments is said before the first sample, not in a worker."""
    choices: dict[str, list[str | None]] = {
        "policy": [*POLICIES],
        "short": [None, *SHORT],
        "decoder": ["auto", *BACKENDS],
    }
    for name, legal in choices.items():
        value = getattr(dataset, name)
        if value not in legal:
            raise ValueError(f"{name} is {value!r}; choose one of: {', '.join(map(str, legal))}")
    if dataset.decoder != "auto":  # is it installed? what it says of no video at all does not matter
        with contextlib.suppress(DecodeError):
            open_video(os.devnull, dataset.decoder)
    for name in ("num_frames", "sampling_rate", "crop", "max_pixels"):
        if getattr(dataset, name) < 1:
            raise ValueError(f"{name} is {getattr(dataset, name)}; it must be at least 1")
    if dataset.target_fps < 0:
        raise ValueError(f"target_fps is {dataset.target_fps}; it must be 0 (the file's own rate) or positive")
    low, high = short_side
    if low > high:
        raise ValueError(f"short_side is {short_side}; give (low, high) with low <= high")
    if dataset.crop > low:
        raise ValueError(f"crop {dataset.crop} does not fit into short_side {low}; lower it or raise the short side")
