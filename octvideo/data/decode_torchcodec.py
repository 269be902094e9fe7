"""Frames by torchcodec 0.13, where it and FFmpeg's libraries are installed: an alternative to PyAV, watched by it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NoReturn

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
    from torchcodec.decoders import VideoDecoder
except (ModuleNotFoundError, RuntimeError) as error:  # the second where FFmpeg is missing, or torch is another
    cause = first_line(error).removesuffix(". Likely causes:")
    reason = f"the decoder torchcodec cannot be loaded ({cause})"
    remedy = "pip install torchcodec==0.13.0, and FFmpeg's libraries by apt-get install ffmpeg, or use the decoder pyav"
    raise MissingDecoderError(f"{reason}; {remedy}") from error

FAILURES = (RuntimeError, ValueError, IndexError)
# Where a seek leads to a keyframe; in transport and program streams it leads anywhere.
CONTAINERS = {"mov", "mp4", "matroska", "webm", "avi"}


class TorchcodecVideo:
    """torchcodec, one thread, seeking to the keyframe at or before.

    It takes the first picture that comes with at least the time it looks for. That is another one where a seek is no
    clean start (pictures refreshed bit by bit) and where the keyframe before is not itself shown (a file cut out of
    another): so the time of each frame is compared with the one that PyAV read.

    One limit remains for damaged files: FFmpeg marks a picture whose damage it painted over, torchcodec ignores the mark
    and returns the picture. If the size of the pictures changes, torchcodec raises an error.
    """

    def __init__(self, path: str, *, max_pixels: int = MAX_PIXELS) -> None:
        self.path = path
        with PyAVVideo(path, max_pixels=max_pixels) as reference:
            self.num_frames, self.fps, self.pixels = reference.num_frames, reference.fps, reference.pixels
            self._stream, self._times = reference.stream_index, [float(time) for time in reference.times]
            if not CONTAINERS & reference.containers:
                self._refuse(f"torchcodec is inexact in {'/'.join(sorted(reference.containers))}")
            if not self._times:
                self._refuse("torchcodec goes by the timestamps, and those of this file are no use")
            self._decoder: VideoDecoder | None = self._open()
            if len(self._decoder) != self.num_frames:
                self._refuse(f"torchcodec finds {len(self._decoder)} frames where there are {self.num_frames}")
            self._check_upright(reference, round(self._decoder.metadata.rotation or 0))

    def __enter__(self) -> TorchcodecVideo:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._decoder = None

    def frames(self, indices: Sequence[int]) -> Tensor:
        numbers = checked_indices(self.path, indices, self.num_frames)
        # After an error it would go on, with times that are right and pictures that are not: then open anew.
        decoder = self._open() if self._decoder is None else self._decoder
        self._decoder = None
        try:
            batch = decoder.get_frames_at(numbers)
        except FAILURES as error:
            check_machine(self.path, error)
            where = f"one of the frames {min(numbers)} to {max(numbers)} of {self.num_frames} cannot be decoded"
            remedy = "the file is damaged: fetch or encode it again"
            raise DecodeError(f"{self.path}: {where} ({_reason(error)}); {remedy}") from error
        for number, seconds in zip(numbers, batch.pts_seconds.tolist(), strict=True):
            if abs(seconds - self._times[number]) > 1e-6:
                self._refuse(f"torchcodec gives another frame for frame {number} of {self.num_frames}")
        self._decoder = decoder
        return batch.data

    def _open(self) -> VideoDecoder:
        try:
            return VideoDecoder(
                url_of(self.path),
                stream_index=self._stream,
                dimension_order="NHWC",
                num_ffmpeg_threads=1,
                device="cpu",
                seek_mode="exact",
            )
        except FAILURES as error:
            check_machine(self.path, error)
            reason = f"torchcodec cannot open it ({_reason(error)})"
            raise DecodeError(f"{self.path}: {reason}; use the decoder pyav") from error

    def _check_upright(self, reference: PyAVVideo, turned: int) -> None:
        """torchcodec turns by the container's word only, not by the pictures', and rounds to 90 degrees."""
        _, first = next(reference.read([0]))
        if (turned - first.rotation) % 360 or turned % 90:
            self._refuse(f"torchcodec turns it by {turned} degrees, where it asks for {first.rotation}")
        if turned and reference.mirrored:
            self._refuse("torchcodec does not undo the mirroring that the file asks for")

    def _refuse(self, reason: str) -> NoReturn:
        raise DecodeError(f"{self.path}: {reason}; use the decoder pyav")


def _reason(error: Exception) -> str:
    """Without the place in torchcodec's source that its errors begin with: "function, FILE:LINE, reason"."""
    return re.sub(r"^\w+, \S+:\d+, ", "", first_line(error))
