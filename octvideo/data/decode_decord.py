"""Frames by decord 0.6: an alternative to PyAV that is slower, and has to be watched to be right."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from octvideo.data.decode import (
    MAX_PIXELS,
    DecodeError,
    MissingDecoderError,
    check_machine,
    checked_indices,
    first_line,
    url_of,
)
from octvideo.data.decode_pyav import PyAVVideo

try:
    import decord
except ModuleNotFoundError as error:
    reason = f"the decoder decord cannot be loaded ({error})"
    raise MissingDecoderError(f"{reason}; pip install decord==0.6.0 (x86_64 only), or use the decoder pyav") from error

# A builtin error for a file that does not open, one of its own that is no RuntimeError, and next() at the end.
FAILURES = (RuntimeError, decord.DECORDError, StopIteration)
# decord decodes some 32 frames ahead and holds them as RGB: 1 GB of frames with so many pixels (4K has 9 million).
LARGEST = 10_000_000
# Where decord finds the first frame again after it has looked through the file; in a transport stream it does not.
CONTAINERS = {"mov", "mp4", "matroska", "webm", "avi"}


class DecordVideo:
    """decord, one thread, read from the start of the file and never by seeking.

    decord's get_batch, seek and skip_frames give other frames than asked, without a word, where a keyframe is no
    clean start: open groups of pictures (the default of HEVC encoders), pictures refreshed bit by bit. In sequence
    it is right, but for files that PyAV's look at them finds and this class refuses.

    Three limits remain for damaged files. decord paints over damage inside a picture, which PyAV marks. It scales
    pictures of another size to that of the first one. It may end the process: the one known cause, a frame count for
    which it cannot allocate memory (std::bad_alloc, SIGABRT), is refused here; others cannot be caught.
    """

    def __init__(self, path: str, *, max_pixels: int = MAX_PIXELS) -> None:
        self.path = path
        with PyAVVideo(path, max_pixels=max_pixels) as reference:
            self.num_frames, self.fps, self.pixels = reference.num_frames, reference.fps, reference.pixels
            if not CONTAINERS & reference.containers:
                self._refuse(f"decord is inexact in {'/'.join(sorted(reference.containers))}")
            if reference.stated_frames > reference.num_bytes:
                count = f"{reference.stated_frames} frames in {reference.num_bytes} bytes"
                self._refuse(f"its container states {count}, for which decord allocates memory until it aborts")
            if self.pixels > LARGEST:
                self._refuse(
                    f"decord decodes 32 frames of {self.pixels} pixels ahead, for which it has no limit of memory"
                )
            if reference.num_streams > 1:
                self._refuse(f"decord mixes up its {reference.num_streams} video streams")
            if reference.mirrored:
                self._refuse("decord does not undo the mirroring that the file asks for")
            _, first = next(reference.read([0]))
            turned = reference.frames([0]) if first.rotation else None
        self._reader = self._open()
        self._next = 0  # the number of the frame that the reader gives next
        if len(self._reader) != self.num_frames:
            self._refuse(f"decord finds {len(self._reader)} frames where there are {self.num_frames}")
        if turned is not None and not _alike(turned, self.frames([0])):
            self._refuse("decord does not turn its pictures as they ask")  # they themselves, not the container

    def __enter__(self) -> DecordVideo:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader = None

    def frames(self, indices: Sequence[int]) -> Tensor:
        numbers = checked_indices(self.path, indices, self.num_frames)
        wanted = sorted(set(numbers))
        if wanted[0] < self._next:
            self._reader, self._next = self._open(), 0
        images: list[np.ndarray] = []
        try:
            while len(images) < len(wanted):
                image = self._reader.next()
                self._next += 1
                if self._next - 1 == wanted[len(images)]:
                    images.append(image.asnumpy())
        except FAILURES as error:
            self._next = self.num_frames  # of no more use: open anew next time
            check_machine(self.path, error)
            # decord decodes ahead: the damage may be a few frames on.
            where = f"frame {wanted[len(images)]} of {self.num_frames} cannot be decoded ({first_line(error)})"
            raise DecodeError(f"{self.path}: {where}; the file is damaged: fetch or encode it again") from error
        return torch.from_numpy(np.stack(images))[[bisect_left(wanted, number) for number in numbers]]

    def _open(self) -> Any:
        try:
            return decord.VideoReader(url_of(self.path), num_threads=1)
        except FAILURES as error:
            check_machine(self.path, error)
            reason = f"decord cannot open it ({first_line(error)})"
            raise DecodeError(f"{self.path}: {reason}; use the decoder pyav") from error

    def _refuse(self, reason: str) -> NoReturn:
        raise DecodeError(f"{self.path}: {reason}; use the decoder pyav")


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two decoders gave the same frames: they may differ in the rounding of colours."""
    return a.shape == b.shape and bool((a.float() - b.float()).abs().mean() < 8)
