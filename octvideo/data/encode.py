"""Frames in, an mp4 out, one frame at a time."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import IO

import av
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from octvideo.errors import RunError


class EncodeError(RunError, RuntimeError):
    """Frames that FFmpeg does not encode. The text names their size and what FFmpeg says."""


def write_mp4(file: IO[bytes], frames: Iterable[NDArray[np.uint8]], fps: float) -> None:
    """RGB uint8 [H, W, 3], all of one size, as h264 (yuv420p) into an open file.

    An odd height or width gets its last row or column twice, since yuv420p halves the resolution of colour.
    Holds one frame and what the encoder looks ahead. Errors: EncodeError; ValueError without a frame.
    """
    count = 0
    with av.open(file, "w", format="mp4") as container:
        # 29.97002997 as 30000/1001: mp4 counts time in fractions.
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "18"})
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            picture = np.ascontiguousarray(np.pad(frame, [(0, n % 2) for n in frame.shape[:2]] + [(0, 0)], "edge"))
            if not count:
                first = frame.shape[:2]
                stream.height, stream.width = picture.shape[:2]
            if frame.shape[:2] != first:  # the encoder would scale it
                sizes = f"{frame.shape[1]}x{frame.shape[0]}, the first one {first[1]}x{first[0]}"
                raise EncodeError(f"frame {count} is {sizes}")
            try:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            except FFmpegError as error:
                size = f"{picture.shape[1]}x{picture.shape[0]}"
                raise EncodeError(f"frame {count} of {size} cannot be encoded ({error.strerror})") from error
            count += 1
        if not count:
            raise ValueError("no frame was given")
        container.mux(stream.encode(None))
