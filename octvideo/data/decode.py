"""Frames of a video file by their number, exactly.

Frame i is the i-th picture in presentation order. `open_video` gives a `Video`; `BACKENDS` are the decoders behind
it. A frame that is handed out is the right one, and what stands in the way of that is a `DecodeError`; what no
decoder can see is damage inside a picture that still parses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor


class DecodeError(ValueError):
    """A file or a frame that cannot be read. The text is "PATH: reason; remedy"."""


class Video(Protocol):
    """An open video. It belongs to the process that opened it: never hand one to a worker."""

    num_frames: int
    fps: float

    def frames(self, indices: Sequence[int]) -> Tensor:
        """RGB uint8 [T, H, W, 3], upright, in the order asked; repeats are allowed.

        Errors: IndexError for an index outside 0..num_frames - 1, DecodeError for a frame that does not decode.
        """

    def close(self) -> None: ...

    def __enter__(self) -> Video: ...

    def __exit__(self, *exc_info: object) -> None: ...


def open_video(path: str, backend: str = "auto") -> Video:
    """Open a video file. `auto` is PyAV: exact on all that was tried, and the fastest per core.

    Errors: DecodeError for a file that is not a readable video, ValueError for an unknown backend.
    """
    name = "pyav" if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"unknown decoder {backend!r}; choose one of: {', '.join(['auto', *BACKENDS])}")
    return BACKENDS[name](path)


def _pyav(path: str) -> Video:
    from octvideo.data.decode_pyav import PyAVVideo

    return PyAVVideo(path)


def _decord(path: str) -> Video:
    from octvideo.data.decode_decord import DecordVideo

    return DecordVideo(path)


# Imported when used: a decoder that is not asked for need not be installed.
BACKENDS: dict[str, Callable[[str], Video]] = {"pyav": _pyav, "decord": _decord}


def checked_indices(path: str, indices: Sequence[int], num_frames: int) -> list[int]:
    """The indices as a list, all of them in 0..num_frames - 1. Errors: IndexError naming the first that is not."""
    numbers = [int(index) for index in indices]
    if not numbers:
        raise IndexError(f"{path}: no frame index was given")
    for number in numbers:
        if not 0 <= number < num_frames:
            raise IndexError(f"{path}: frame index {number} is outside 0..{num_frames - 1} ({num_frames} frames)")
    return numbers
