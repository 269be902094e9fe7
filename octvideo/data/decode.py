"""Frames of a video file by their number, exactly.

Frame i is the i-th picture in presentation order. `open_video` returns a `Video` of one of the `BACKENDS`. On intact files
each of them returns exactly the requested frame or raises `DecodeError`; on damaged files only PyAV does, and the other
modules describe their limits. Damage inside a picture that still parses is visible to no decoder.

A path may also name a video inside a tar archive, as it lies there: TAR:OFFSET:SIZE:NAME, in bytes.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from octvideo.errors import RunError, UserError
from octvideo.files import open_regular

# Pixels of the largest frame that is decoded, and of the largest image: 8K has 33 million.
MAX_PIXELS = 64_000_000
# Frames held at full size at a time: 32, or fewer that have this many bytes together (32 of 1080p have 199 million).
CHUNK, CHUNK_BYTES = 32, 200_000_000


class DecodeError(RunError, ValueError):
    """A file or a frame that cannot be read. The text is "PATH: reason; remedy"."""


class MachineError(RunError):
    """A file that the machine cannot read now, whatever is in it. The text is "PATH: reason; remedy".

    No video may be counted as wrong, or be replaced, for it: the next one would fail as well.
    """


class MissingDecoderError(UserError, ModuleNotFoundError):
    """A decoder that was asked for is not installed. The text is "what; what to install or to choose instead"."""


class Video(Protocol):
    """An open video. It belongs to the process that opened it: never hand one to a worker.

    pixels: of a frame, as the container states them.
    """

    path: str
    num_frames: int
    fps: float
    pixels: int

    def frames(self, indices: Sequence[int]) -> Tensor:
        """RGB uint8 [T, H, W, 3], upright, in the order asked; repeats are allowed.

        Errors: IndexError for an index outside 0..num_frames - 1, DecodeError for a frame that does not decode.
        """

    def close(self) -> None: ...

    def __enter__(self) -> Video: ...

    def __exit__(self, *exc_info: object) -> None: ...


def frames_at_a_time(video: Video) -> int:
    """Return how many frames of the video may be held at full size, at least 1."""
    return max(1, min(CHUNK, CHUNK_BYTES // (3 * video.pixels)))


def open_video(path: str, backend: str = "auto", *, max_pixels: int = MAX_PIXELS) -> Video:
    """Open a video file, or one inside a tar archive (see member_of). Frames of more than `max_pixels` are not decoded.

    `auto` is PyAV: right on every kind of file that was tried, where decord and torchcodec have to refuse some and do
    not see pictures that were painted over; the fastest per core; and it needs nothing but its wheel.
    Errors: DecodeError for a file that is not a readable video, MachineError where the machine cannot read it, ValueError
    for an unknown backend, MissingDecoderError for one that is not installed.
    """
    return BACKENDS[chosen_backend(backend)](path, max_pixels)


def chosen_backend(backend: str) -> str:
    """Return the name of the decoder that a value of DATA.DECODER selects. Errors: ValueError for an unknown one."""
    name = "pyav" if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"unknown decoder {backend!r}; choose one of: {', '.join(['auto', *BACKENDS])}")
    return name


def _pyav(path: str, max_pixels: int) -> Video:
    from octvideo.data.decode_pyav import PyAVVideo

    return PyAVVideo(path, max_pixels=max_pixels)


def _decord(path: str, max_pixels: int) -> Video:
    from octvideo.data.decode_decord import DecordVideo

    return DecordVideo(path, max_pixels=max_pixels)


def _torchcodec(path: str, max_pixels: int) -> Video:
    from octvideo.data.decode_torchcodec import TorchcodecVideo

    return TorchcodecVideo(path, max_pixels=max_pixels)


# Imported when used: a decoder that is not asked for need not be installed.
BACKENDS: dict[str, Callable[[str, int], Video]] = {"pyav": _pyav, "decord": _decord, "torchcodec": _torchcodec}


class Member(NamedTuple):
    """A video inside a tar archive."""

    tar: str
    offset: int  # of its first byte
    size: int  # in bytes
    name: str


def member_of(path: str) -> Member | None:
    """Return what a path of the form TAR:OFFSET:SIZE:NAME names, None for other paths. TAR ends in .tar; no file is touched.

    OFFSET and SIZE have up to 40 digits.
    """
    if ".tar:" not in path:  # a search of a long path takes as long as a look at its file
        return None
    found = re.fullmatch(r"(.+?\.tar):([0-9]{1,40}):([0-9]{1,40}):(.+)", path, re.DOTALL)
    return Member(found[1], int(found[2]), int(found[3]), found[4]) if found else None


def url_of(path: str) -> str:
    """What FFmpeg opens a path by. Errors: DecodeError for a member that is not in its archive, or not there."""
    member = member_of(path)
    if member is None:
        # "file:" because a relative "take 1: run.mp4" would else be read as a protocol.
        return f"file:{path}"
    _check_member(path, member)
    # What follows ",,:" is a URL as it stands, whatever commas and colons are in it. The end is exclusive.
    return f"subfile,,start,{member.offset},end,{member.offset + member.size},,:file:{member.tar}"


def _check_member(path: str, member: Member) -> None:
    """The list may be older than the archive, and its bytes then those of other videos: ask the member's header."""
    last = member.offset + member.size
    header = b""
    try:
        with open_regular(member.tar) as file:
            end = file.seek(0, 2)
            if tarfile.BLOCKSIZE <= member.offset < last <= end:
                file.seek(member.offset - tarfile.BLOCKSIZE)
                header = file.read(tarfile.BLOCKSIZE)
    except FileNotFoundError as error:
        raise DecodeError(f"{path}: no such archive {member.tar!r}; check the list and its prefix") from error
    except OSError as error:
        raise unreadable(path, error, "the archive cannot be read", "check the list") from error
    if last > end:
        reason = f"bytes {member.offset} to {last} are no part of the archive, which has {end} bytes"
        raise DecodeError(f"{path}: {reason}; fetch the archive again, or make a new list of it")
    try:
        size = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
    except tarfile.HeaderError:
        size = -1
    if size != member.size:
        reason = f"at byte {member.offset} of the archive no file of {member.size} bytes begins"
        raise DecodeError(f"{path}: {reason}; make a new list of it")


_MEMORY = "not a fault of the file: lower DATA.NUM_WORKERS, or use a machine with more memory"
_DISK = "not a fault of the file: check the disk or the network file system"
_FAULTS = {
    errno.EMFILE: "not a fault of the file: raise the limit of open files (ulimit -n) or lower DATA.NUM_WORKERS",
    errno.ENFILE: "not a fault of the file: the system's limit of open files is reached (sysctl fs.file-max)",
    **dict.fromkeys((errno.ENOMEM, errno.ENOBUFS), _MEMORY),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO), _DISK),
    **dict.fromkeys((errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN), _DISK),
}
# Decoders give these for damaged files as well: data that end early, a table of an absurd size.
_AMBIGUOUS = {errno.EIO, errno.ENOMEM, None}
_SPARE = 1 << 28  # bytes that can be allocated where decoding does not lack memory


def unreadable(path: str, error: Any, what: str, remedy: str) -> DecodeError | MachineError:
    """Return the error for a file that cannot be opened or read. error: with errno and strerror, of Python or FFmpeg.

    remedy: where the file is to blame.
    """
    text = f"{path}: {what} ({error.strerror or error})"
    if error.errno in _FAULTS:
        return MachineError(f"{text}; {_FAULTS[error.errno]}")
    if error.errno in (errno.EACCES, errno.EPERM):
        remedy = "allow this user to read it (permissions of the file and of its folders)"
    return DecodeError(f"{text}; {remedy}")


def out_of_memory(path: str) -> MachineError:
    return MachineError(f"{path}: there is not enough memory to decode it; {_MEMORY}")


def check_machine(path: str, error: Exception) -> None:
    """Raise MachineError if a decoder's error is a fault of the machine.

    An error that damaged files cause as well is the machine's if a plain read of the file, or an allocation, fails too.
    """
    code = getattr(error, "errno", None)
    if code in _AMBIGUOUS:
        try:
            _read_plainly(path)
            if code == errno.ENOMEM:
                bytearray(_SPARE)
        except MemoryError:
            raise out_of_memory(path) from None
        except OSError as fault:
            code = fault.errno
        else:
            return
    if code in _FAULTS:
        raise MachineError(f"{path}: cannot be read ({os.strerror(code)}); {_FAULTS[code]}")


def _read_plainly(path: str) -> None:
    member = member_of(path)
    file, begin, left = (member.tar, member.offset, member.size) if member else (path, 0, sys.maxsize)
    if Path(file).is_file():
        with Path(file).open("rb", buffering=0) as stream:
            stream.seek(begin)
            while data := stream.read(min(1 << 20, left)):
                left -= len(data)


def first_line(error: Exception) -> str:
    """What another library's error says, for messages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def checked_indices(path: str, indices: Sequence[int], num_frames: int) -> list[int]:
    """The indices as a list, all of them in 0..num_frames - 1. Errors: IndexError naming the first that is not."""
    numbers = [int(index) for index in indices]
    if not numbers:
        raise IndexError(f"{path}: no frame index was given")
    for number in numbers:
        if not 0 <= number < num_frames:
            raise IndexError(f"{path}: frame index {number} is outside 0..{num_frames - 1} ({num_frames} frames)")
    return numbers
