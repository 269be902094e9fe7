"""Frames of a video file by their number, exactly.

Frame i is the i-th picture in presentation order. `open_video` returns a `Video` of one of the `BACKENDS`. On intact files
each of them returns exactly the requested frame or raises `DecodeError`; on damaged files only PyAV does, and the other
modules describe their limits. Damage inside a picture that still parses is visible to no decoder.

A path may also name a video inside a tar archive, as it lies there: TAR:OFFSET:SIZE:NAME, in bytes.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from octvideo.errors import RunError, UserError
from octvideo.files import open_regular


class DecodeError(RunError, ValueError):
    """A file or a frame that cannot be read. The text is "PATH: reason; remedy"."""


class MissingDecoderError(UserError, ModuleNotFoundError):
    """A decoder that was asked for is not installed. The text is "what; what to install or to choose instead"."""


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
    """Open a video file, or one inside a tar archive (see member_of).

    `auto` is PyAV: right on every kind of file that was tried, where decord and torchcodec have to refuse some and do
    not see pictures that were painted over; the fastest per core; and it needs nothing but its wheel.
    Errors: DecodeError for a file that is not a readable video, ValueError for an unknown backend,
    MissingDecoderError for one that is not installed.
    """
    return BACKENDS[chosen_backend(backend)](path)


def chosen_backend(backend: str) -> str:
    """Return the name of the decoder that a value of DATA.DECODER selects. Errors: ValueError for an unknown one."""
    name = "pyav" if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"unknown decoder {backend!r}; choose one of: {', '.join(['auto', *BACKENDS])}")
    return name


def _pyav(path: str) -> Video:
    from octvideo.data.decode_pyav import PyAVVideo

    return PyAVVideo(path)


def _decord(path: str) -> Video:
    from octvideo.data.decode_decord import DecordVideo

    return DecordVideo(path)


def _torchcodec(path: str) -> Video:
    from octvideo.data.decode_torchcodec import TorchcodecVideo

    return TorchcodecVideo(path)


# Imported when used: a decoder that is not asked for need not be installed.
BACKENDS: dict[str, Callable[[str], Video]] = {"pyav": _pyav, "decord": _decord, "torchcodec": _torchcodec}


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
        raise DecodeError(f"{path}: the archive cannot be read ({error.strerror}); check the list") from error
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
