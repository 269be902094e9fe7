"""Frames by PyAV: exact by packet index, and as little decoded and converted as that allows."""

from __future__ import annotations

import gc
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from octvideo.data.decode import (
    CHUNK_BYTES,
    MAX_PIXELS,
    DecodeError,
    check_machine,
    checked_indices,
    out_of_memory,
    unreadable,
    url_of,
)

# Frames that may be decoded in passing: a seek costs a flush and fills the decoder's delay again.
SEEK_AHEAD = 4
# No codec holds back more pictures than this: a frame that is overdue by more does not come any more.
MAX_REORDER = 16
# A start for decoding besides the keyframes (0, 1, ...): the file opened anew.
REOPEN = -1


class PacketIndex(NamedTuple):
    """Where the pictures of a stream are, read from its packets without decoding any.

    Drawn for an open group of pictures (I4 is a keyframe, B2 and B3 lean on both P1 and I4):

        packets in file order          I0  P1  I4  B2  B3  P5
        frame number = rank of pts      0   1   4   2   3   5
        start for frame 3: the last keyframe SHOWN at or before it, I0; after a seek to I4 it would be garbage
    """

    pts: list[int]  # of frame i, ascending; empty when timestamps are no use and frames must be counted
    key_pts: list[int]  # of the keyframes, ascending


class PyAVVideo:
    """Exact by packet index: seek to the keyframe at or before, decode on, convert only what is wanted.

    Files whose timestamps are no use are read from their start, frames being counted. Pictures of more than `max_pixels`
    are not decoded, wherever in the stream they come.
    """

    def __init__(self, path: str, *, max_pixels: int = MAX_PIXELS) -> None:
        self.path, self.max_pixels = path, max_pixels
        # One for all frames: frame.reformat() would set the conversion up anew each time.
        self._reformatter = VideoReformatter()
        self._decoder: Iterator[tuple[int, VideoFrame]] = iter(())
        self._next = 0  # the number of the frame that the decoder gives next, if it gives one
        self._keep_pts: set[int] = set()  # of the frames wanted now, and the last of them
        self._last_pts = 0
        self._turned = False  # a display matrix was read
        self._container, self._stream = _open_stream(path, max_pixels)
        self.pixels = self._stream.width * self._stream.height or max_pixels
        try:
            self._index = _read_index(path, self._container, self._stream)
            self._number_of = {pts: number for number, pts in enumerate(self._index.pts)}
            self._key_numbers = [bisect_left(self._index.pts, pts) for pts in self._index.key_pts]
            self.num_frames = len(self._index.pts) or self._count()
            self.fps = _frame_rate(path, self._stream)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PyAVVideo:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._decoder = iter(())
        self._container.close()
        if self._turned:
            gc.collect(1)  # see _display_matrix

    @property
    def containers(self) -> set[str]:
        """FFmpeg's names of the container: {"mov", "mp4", ...}."""
        return set(self._container.format.name.split(","))

    @property
    def num_streams(self) -> int:
        """Video streams, of which one is read."""
        return len(self._container.streams.video)

    @property
    def stream_index(self) -> int:
        """Of the stream that is read, in the container."""
        return self._stream.index

    @property
    def stated_frames(self) -> int:
        """The number of frames that the container states; 0 if it states none."""
        return self._stream.frames

    @property
    def num_bytes(self) -> int:
        """Size of the file, or of the member of an archive."""
        return self._container.size

    @property
    def times(self) -> list[Fraction]:
        """Seconds at which each frame is shown; empty for a file whose timestamps are no use."""
        base = self._stream.time_base
        return [pts * base for pts in self._index.pts] if base else []

    @property
    def mirrored(self) -> bool:
        """Whether the first frame is to be shown with left and right exchanged."""
        a, b, c, d = next(self._display_matrix(frame) for _, frame in self.read([0])) or (1, 0, 0, 1)
        return a * d < b * c

    def frames(self, indices: Sequence[int]) -> Tensor:
        numbers = checked_indices(self.path, indices, self.num_frames)
        places: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            places.setdefault(number, []).append(place)
        out: np.ndarray | None = None
        matrix = None
        for number, frame in self.read(sorted(places)):
            image = self._rgb(frame, number)
            if out is None:
                out = self._clip(len(numbers), image)
                matrix = self._display_matrix(frame)
            elif image.shape != out.shape[1:]:
                reason = f"frame {number} is {frame.width}x{frame.height}, the first one read is of another size"
                raise DecodeError(f"{self.path}: {reason}; re-encode it to one size")
            for place in places[number]:
                out[place] = image
        assert out is not None  # read gives every number or raises
        clip = torch.from_numpy(out).unflatten(2, (-1, 3))  # [T, H, W * 3] -> [T, H, W, 3]
        return clip if matrix is None else _upright(self.path, clip, *matrix)

    def _clip(self, count: int, image: np.ndarray) -> np.ndarray:
        """Return memory for `count` images. The caller chose the number by `pixels`."""
        if image.size > 3 * self.pixels and count * image.nbytes > 2 * CHUNK_BYTES:
            reason = f"its frames have {image.size // 3} pixels, its container states {self.pixels}"
            raise DecodeError(f"{self.path}: {reason}; encode it again")
        try:
            return np.empty((count, *image.shape), np.uint8)
        except MemoryError:
            raise out_of_memory(self.path) from None

    def read(self, wanted: list[int]) -> Iterator[tuple[int, VideoFrame]]:
        """Every wanted frame (numbers ascending) once. What lies between two of them is decoded once."""
        todo = set(wanted)
        if self._index.pts:
            self._keep_pts = {self._index.pts[number] for number in wanted}
            self._last_pts = self._index.pts[wanted[-1]]
        for target in wanted:
            reason = "the decoder leaves it out"
            for start in self._starts(target):
                if target not in todo:
                    break
                try:
                    if start is not None:
                        self._restart(start)
                    for number, frame in self._decoder:
                        if frame.is_corrupt:
                            # What comes next leans on it and looks right to the decoder: start anew or give up.
                            self._decoder = iter(())
                            reason = f"frame {number} is damaged"
                            break
                        if frame.width * frame.height > self.max_pixels:
                            raise DecodeError(f"{self.path}: frame {number} has {_too_many(frame, self.max_pixels)}")
                        if number in todo:
                            todo.remove(number)
                            yield number, frame
                        if target not in todo or number > target + MAX_REORDER:
                            break
                except FFmpegError as error:
                    reason = self._reason(error)
            if target in todo:
                where = f"frame {target} of {self.num_frames} cannot be decoded ({reason})"
                raise DecodeError(f"{self.path}: {where}; the file is damaged: fetch or encode it again")

    def _reason(self, error: FFmpegError) -> str:
        """Return why a picture does not decode. Raises MachineError if the machine is to blame."""
        check_machine(self.path, error)
        codec = self._stream.codec_context
        if codec.width * codec.height > self.max_pixels:
            return f"it has {codec.width}x{codec.height} pixels; DATA.MAX_PIXELS is {self.max_pixels}"
        if not codec.width:  # FFmpeg forgets a size that it refuses
            return f"its size is unknown, or above DATA.MAX_PIXELS {self.max_pixels}"
        return str(error.strerror)

    def _starts(self, target: int) -> Iterator[int | None]:
        """Where to decode from, cheapest first: None is on from here, else a keyframe, ever earlier, or REOPEN.

        The keyframe before must do. Some do not (pictures that refresh bit by bit, a demuxer that seeks beside
        its mark): then the target does not come out, and an earlier start is right.
        """
        key = bisect_right(self._key_numbers, target) - 1
        if self._next <= target and (key < 0 or self._key_numbers[key] <= self._next + SEEK_AHEAD):
            yield None
        step = 1
        while key >= 0:
            yield key
            key, step = key - step, 2 * step
        yield REOPEN

    def _restart(self, start: int) -> None:
        if start == REOPEN:
            self.close()
            self._container, self._stream = _open_stream(self.path, self.max_pixels)
        else:
            self._container.seek(self._index.key_pts[start], stream=self._stream)
        self._decoder = self._numbered() if self._index.pts else self._counted()

    def _numbered(self) -> Iterator[tuple[int, VideoFrame]]:
        """Frames from the next keyframe on, numbered by timestamp."""
        codec = self._stream.codec_context
        # dav1d takes skip_frame when it is opened, and then for good: open it before a picture is skipped.
        codec.open(strict=False)
        start_pts: int | None = None
        for packet in _packets(self._container, self._stream):
            if start_pts is None:
                if not packet.is_keyframe:
                    continue
                start_pts = packet.pts
            # A picture that no other leans on, and nobody wants, need not be decoded. Those behind the last wanted
            # one are decoded all the same: the next call may want them.
            idle = packet.pts is not None and packet.pts not in self._keep_pts and packet.pts < self._last_pts
            codec.skip_frame = "NONREF" if idle else "DEFAULT"
            for frame in packet.decode():
                number = self._number_of.get(frame.pts)
                if number is None or frame.pts < start_pts:
                    continue  # shown before the keyframe: what it leans on was never read
                self._next = number + 1
                yield number, frame

    def _counted(self) -> Iterator[tuple[int, VideoFrame]]:
        number = 0
        for packet in _packets(self._container, self._stream):
            for frame in packet.decode():
                self._next = number + 1
                yield number, frame
                number += 1

    def _count(self) -> int:
        """The number of frames, by decoding them all: for files whose timestamps are no use."""
        self._restart(REOPEN)
        number = -1
        try:
            for number, _ in self._decoder:  # noqa: B007
                pass
        except FFmpegError as error:
            where = f"frame {number + 1} cannot be decoded ({self._reason(error)})"
            raise DecodeError(f"{self.path}: {where}; the file is damaged: fetch or encode it again") from error
        if number < 0:
            raise DecodeError(f"{self.path}: not one frame can be decoded; fetch or encode it again")
        return number + 1

    def _rgb(self, frame: VideoFrame, number: int) -> np.ndarray:
        """uint8 [H, W * 3], a view of the frame's memory."""
        try:
            rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)
        except FFmpegError as error:
            reason = f"frame {number} ({frame.format.name}) cannot be converted to RGB ({error.strerror})"
            raise DecodeError(f"{self.path}: {reason}; encode it as yuv420p") from error
        plane: Any = rgb.planes[0]
        return np.frombuffer(plane, np.uint8).reshape(rgb.height, plane.line_size)[:, : 3 * rgb.width]

    def _display_matrix(self, frame: VideoFrame) -> tuple[int, int, int, int] | None:
        """(a, b, c, d) of x' = a x + c y, y' = b x + d y with y down: how a picture that lies turned is to be shown.

        FFmpeg's angle alone would do for plain rotations; of a mirrored picture it says 180 degrees. It comes first,
        though, because side data is dear: PyAV (17, 18) ties a frame that was asked for it to itself, and as the
        garbage collector counts objects, not bytes, hundreds of frames pile up before its turn. So a picture that
        is only upside down, angle 0, is not noticed.
        """
        if not frame.rotation:
            return None
        self._turned = True
        data: Any = frame.side_data.get("DISPLAYMATRIX")
        a, b, _, c, d = (value / 65536 for value in struct.unpack("=9i", bytes(data))[:5])
        matrix = round(a), round(b), round(c), round(d)
        if any(abs(exact - whole) > 0.01 for exact, whole in zip((a, b, c, d), matrix, strict=True)):
            reason = f"it is to be turned by {frame.rotation}, which is no multiple of 90 degrees"
            raise DecodeError(f"{self.path}: {reason}; encode it again")
        return matrix


def _open_stream(path: str, max_pixels: int) -> tuple[InputContainer, VideoStream]:
    """The container and its best video stream, set to one decoding thread and to pictures of at most `max_pixels`."""
    # FFmpeg stops above this before it allocates, also when it opens the file and at each change of size within the stream.
    # It compares widths that it rounds up.
    limit = {"max_pixels": str(2 * max_pixels)}
    try:
        # Tags in an old encoding are no reason to refuse a video.
        container = av.open(url_of(path), metadata_errors="ignore", options=limit)
    except av.error.FileNotFoundError as error:
        raise DecodeError(f"{path}: no such file; check the list and its prefix") from error
    except FFmpegError as error:
        check_machine(path, error)
        raise unreadable(path, error, "cannot be opened", "fetch or encode it again") from error
    pictures = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    stream = next((s for s in pictures if s is best), pictures[0] if pictures else None)
    if stream is None or stream.codec_context is None:
        container.close()
        reason = "it has no video stream" if stream is None else "no decoder for its video stream is built in"
        raise DecodeError(f"{path}: {reason}; take it off the list or encode it again")
    codec = stream.codec_context
    if codec.width * codec.height > max_pixels:
        container.close()
        raise DecodeError(f"{path}: its frames have {_too_many(codec, max_pixels)}")
    codec.thread_count = 1
    codec.options = limit
    return container, stream


def _too_many(picture: Any, max_pixels: int) -> str:
    size = f"{picture.width}x{picture.height} = {picture.width * picture.height} pixels"
    return f"{size}; at most {max_pixels} are decoded; scale it down, or raise DATA.MAX_PIXELS"


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Any]:
    for packet in container.demux(stream):
        # An AVI may hold empty packets ("show the last one again"); sent to a decoder they would end the stream.
        # The last packet of all is empty too, has no time, and flushes the decoder.
        if packet.size or packet.dts is None:
            yield packet


def _read_index(path: str, container: InputContainer, stream: VideoStream) -> PacketIndex:
    codec = stream.codec_context
    vp8 = codec.name in ("vp8", "libvpx")
    marks: list[tuple[Any, bool, bool]] = []  # time, keyframe, shown: in file order
    try:
        for packet in _packets(container, stream):
            if packet.is_corrupt:
                raise DecodeError(f"{path}: cut short or damaged at frame {len(marks)}; fetch or encode it again")
            # VP8 puts pictures that are never shown in packets of their own: bit 4 of the first byte (RFC 6386, 9.1).
            if packet.size and not (vp8 and not memoryview(packet)[0] & 0x10):
                marks.append((packet.pts, packet.is_keyframe, not packet.is_discard))
    except FFmpegError as error:
        check_machine(path, error)
        reason = f"cannot be read behind frame {len(marks)} ({error.strerror})"
        raise DecodeError(f"{path}: {reason}; fetch or encode it again") from error
    pts = [time for time, _, shown in marks if shown]
    if not pts:
        raise DecodeError(f"{path}: its video stream holds no frames; fetch or encode it again")
    times = [time for time, _, _ in marks]
    # The first packet must be where decoding can start and the first to be shown: of a stream that was cut out of
    # another, pictures before that are in the file but do not decode.
    trusted = None not in times and len(set(times)) == len(times) and marks[0][1] and times[0] == min(times)
    if "avi" in container.format.name:
        # AVI stores no presentation times: with reordered pictures they are guesses.
        trusted = trusted and not codec.has_b_frames and times == sorted(times)
    if not trusted:
        return PacketIndex([], [])
    return PacketIndex(sorted(pts), sorted(time for time, keyframe, _ in marks if keyframe))


def _frame_rate(path: str, stream: VideoStream) -> float:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise DecodeError(f"{path}: the file does not say its frame rate; encode it again")
    return float(rate)


def _upright(path: str, clip: Tensor, a: int, b: int, c: int, d: int) -> Tensor:
    """Apply a display matrix to [T, H, W, 3]."""
    if (a, d) == (0, 0):
        clip, right, down = clip.transpose(1, 2), c, b
    elif (b, c) == (0, 0):
        right, down = a, d
    else:
        right = down = 0
    if abs(right) != 1 or abs(down) != 1:
        raise DecodeError(f"{path}: display matrix {(a, b, c, d)} is no multiple of 90 degrees; encode it again")
    return clip.flip([dim for dim, sign in ((1, down), (2, right)) if sign < 0]).contiguous()
