"""Read the lengths that a container states about itself, without a demuxer.

A file that was cut short often opens, and the demuxer then reports what is left. The lengths of the container's elements
(boxes, chunks, pages, tags, packets) still give the size of the complete file, or at least of its last element.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

MP4_BOXES = set(b"ftyp styp moov moof mdat free skip wide uuid sidx ssix mfra udta meta pdin prft emsg".split())
MATROSKA_IDS = {
    bytes.fromhex(text)
    for text in (
        *("1A45DFA3", "18538067", "114D9B74", "1549A966", "1654AE6B", "1F43B675", "1C53BB6B", "1941A469", "1043A770"),
        *("1254C367", "EC", "BF", "E7", "A3", "A0", "A7", "AB"),  # of these, the last five are inside a cluster
    )
}
ASF_OBJECTS = {
    bytes.fromhex(text)
    for text in (
        *("3026B2758E66CF11A6D900AA0062CE6C", "3626B2758E66CF11A6D900AA0062CE6C", "90080033B1E5CF1189F400A0C90349CB"),
        *("D329E2D6DA35D111903400A0C90349BE", "F803B1FEAD12644C840F2A1D2F7AD48C"),
    )
}
TRANSPORT_PACKETS = ((188, 0), (192, 4), (204, 0))  # bytes of a packet, and the place of its synchronization byte
UNKNOWN = 2**32 - 1

Data = mmap.mmap | bytes


class Movie(NamedTuple):
    """The statements of an mp4 index. seconds: duration of the movie, None if not stated."""

    seconds: float | None
    conflicts: list[str]  # between the tables of a video track


class Statements(NamedTuple):
    """The statements of a container. size: bytes of the complete file, at least."""

    size: int
    movie: Movie | None


def read(path: str, names: set[str]) -> Statements:
    """Return the statements of a file. names: FFmpeg's names of its container, such as {"matroska", "webm"}."""
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        measure = next((SIZES[name] for name in sorted(names) if name in SIZES), len)
        return Statements(measure(data), _movie(data) if "mp4" in names else None)


# ---- bytes


def _walk(step: Callable[[Data, int], int | None], data: Data) -> int:
    """Return the end of the last element. step: offset of an element -> offset of the next, None if it is unknown."""
    at = 0
    while at < len(data):
        try:
            end = step(data, at)
        except (struct.error, IndexError):  # the header of the element is incomplete
            end = len(data) + 1 if any(data[at:]) else None
        if end is None or end <= at:
            break
        at = end
    return at


def _mp4(data: Data) -> int:
    """Return the end of the last box, or of the segments that an index (sidx) lists, whichever is later."""
    indexed = 0

    def step(data: Data, at: int) -> int | None:
        nonlocal indexed
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind not in MP4_BOXES:
            return None
        if size == 1:
            (size,) = struct.unpack_from(">8xQ", data, at)
        if kind == b"sidx" and at + size <= len(data):
            indexed = max(indexed, _end_of_segments(data, at, at + size))
        return at + size if size else len(data)  # 0: to the end of the file

    return max(_walk(step, data), indexed)


def _end_of_segments(data: Data, at: int, end: int) -> int:
    """Return the end of the last segment of an sidx box from `at` to `end` (ISO/IEC 14496-12, 8.16.3)."""
    first, count_at = struct.unpack_from(">24xI", data, at)[0], at + 30
    if data[at + 8]:  # version 1: 64-bit times
        first, count_at = struct.unpack_from(">28xQ", data, at)[0], at + 38
    (count,) = struct.unpack_from(">H", data, count_at)
    if count_at + 2 + 12 * count > end:
        return 0  # damaged
    sizes = np.frombuffer(data[count_at + 2 : count_at + 2 + 12 * count], ">u4")[::3] & 0x7FFFFFFF
    return end + int(first) + int(sizes.sum(dtype=np.uint64))


def _matroska_element(data: Data, at: int) -> int | None:
    """Step over an element, or into one of unknown length, which writers to a pipe leave (RFC 8794)."""
    id_length, size_at = 9 - data[at].bit_length(), at + 9 - data[at].bit_length()
    if data[at : min(size_at, at + 4)] not in MATROSKA_IDS:
        return at + 5 if len(data) - at < id_length <= 4 else None
    size_length = 9 - data[size_at].bit_length()
    end = size_at + size_length
    if size_length > 8 or end > len(data):
        return end if size_length <= 8 else None
    unknown = (1 << 7 * size_length) - 1
    size = int.from_bytes(data[size_at:end], "big") & unknown
    return end if size == unknown else end + size


def _riff_chunk(data: Data, at: int) -> int | None:
    """Step over a RIFF, or into one of unknown length, which writers to a pipe leave."""
    kind, size = struct.unpack_from("<4sI", data, at)
    if kind in (b"RIFF", b"LIST") and size in (0, UNKNOWN):
        return at + 12
    if kind == b"RIFF":
        return at + 8 + size
    in_open_riff = data[4:8] in (bytes(4), b"\xff" * 4)
    return at + 8 + size + size % 2 if in_open_riff and kind.isalnum() else None


def _ogg(data: Data) -> int:
    """Return the end of the last page. A stream without a last page needs one more (RFC 3533, 6)."""
    open_streams: set[int] = set()

    def step(data: Data, at: int) -> int | None:
        if not b"OggS".startswith(data[at : at + 4]):
            return None
        flags, stream, segments = struct.unpack_from("<5xB8xI8xB", data, at)
        (open_streams.discard if flags & 4 else open_streams.add)(stream)
        return at + 27 + segments + sum(data[at + 27 : at + 27 + segments])

    end = _walk(step, data)
    return end + 27 if end == len(data) and open_streams else end


def _flv_tag(data: Data, at: int) -> int | None:
    """Step over the header or a tag, and over the length that follows each."""
    if at == 0:
        return struct.unpack_from(">5xI", data)[0] + 4
    kind, high, low = struct.unpack_from(">BBH7x", data, at)
    return at + 11 + (high << 16 | low) + 4 if kind & 0x1F in (8, 9, 18) else None


def _asf_object(data: Data, at: int) -> int | None:
    """Step over an object of the top level. The length of the data object is 0 if it was written to a pipe."""
    if not any(kind.startswith(data[at : at + 16]) for kind in ASF_OBJECTS):
        return None
    return at + struct.unpack_from("<16xQ", data, at)[0]


def _program_packet(data: Data, at: int) -> int | None:
    """Step over a pack header or a packet of a program stream (ISO/IEC 13818-1, 2.5.3)."""
    prefix, kind, size = struct.unpack_from(">3sBH", data, at)
    if prefix != b"\0\0\1" or kind < 0xB9:
        return None
    if kind == 0xB9:  # the end code
        return at + 4
    if kind == 0xBA:
        return at + (14 + (data[at + 13] & 7) if data[at + 4] >> 6 == 1 else 12)
    return at + 6 + size


def _transport_stream(data: Data) -> int:
    """Return the end of the last packet, complete or not; 0 if no packet begins at the start of the file."""
    for size, place in TRANSPORT_PACKETS:
        marks = data[place : 5 * size : size]
        if marks and marks == b"G" * len(marks):
            return -(-len(data) // size) * size
    return 0


SIZES: dict[str, Callable[[Data], int]] = {
    "mp4": _mp4,
    "matroska": partial(_walk, _matroska_element),
    "avi": partial(_walk, _riff_chunk),
    "ogg": _ogg,
    "flv": partial(_walk, _flv_tag),
    "asf": partial(_walk, _asf_object),
    "mpeg": partial(_walk, _program_packet),
    "mpegts": _transport_stream,
}
"""FFmpeg's name of a container -> the bytes that its elements take."""


# ---- the index of an mp4 file (ISO/IEC 14496-12)


def _boxes(data: Data, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, begin of the content and end of each box from `begin` to `end`, up to the first that does not fit."""
    while begin + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, begin)
        content = begin + 8
        if size == 1 and begin + 16 <= end:
            (size,) = struct.unpack_from(">8xQ", data, begin)
            content += 8
        if not content - begin <= size <= end - begin:
            return
        yield kind, content, begin + size
        begin += size


def _box(data: Data, kinds: bytes, begin: int, end: int) -> bytes:
    """Return the content of the first box of a path such as b"mdia minf stbl stts"; b"" if there is none."""
    first, _, rest = kinds.partition(b" ")
    for kind, content, after in _boxes(data, begin, end):
        if kind == first:
            return _box(data, rest, content, after) if rest else data[content:after]
    return b""


def _movie(data: Data) -> Movie | None:
    """Return the statements of the moov box, None if there is no intact one."""
    found = [(begin, end) for kind, begin, end in _boxes(data, 0, len(data)) if kind == b"moov"]
    if not found:
        return None
    begin, end = found[0]
    duration, timescale = _duration(_box(data, b"mvhd", begin, end))
    fragmented = _box(data, b"mvex", begin, end) != b""
    total = _box(data, b"mvex mehd", begin, end)
    if fragmented:  # the header's duration leaves the fragments out
        duration = int.from_bytes(total[4:], "big")
    conflicts: list[str] = []
    for kind, first, last in _boxes(data, begin, end):
        if kind == b"trak" and _box(data, b"mdia hdlr", first, last)[8:12] == b"vide" and not fragmented:
            conflicts += _conflicts(data, first, last)
    return Movie(duration / timescale if duration and timescale else None, conflicts)


def _duration(header: bytes) -> tuple[int, int]:
    """Return duration and ticks per second of an mvhd or mdhd box; 0 if unknown."""
    layout = ">20xIQ" if header[:1] == b"\1" else ">12xII"
    if len(header) < struct.calcsize(layout):
        return 0, 0
    timescale, duration = struct.unpack_from(layout, header)
    return (0 if duration in (UNKNOWN, 2**64 - 1) else duration), timescale


def _conflicts(data: Data, begin: int, end: int) -> list[str]:
    """Compare the tables of a track: the number of samples in each, and the sum of their durations with the header's."""
    stbl = b"mdia minf stbl "
    sizes = _box(data, stbl + b"stsz", begin, end)[8:12] or _box(data, stbl + b"stz2", begin, end)[8:12]
    samples = int.from_bytes(sizes, "big")
    times, offsets = (_entries(_box(data, stbl + kind, begin, end)) for kind in (b"stts", b"ctts"))
    conflicts = [
        f"the {name} table has {table[:, 0].sum()} frames, the size table {samples}"
        for name, table, needed in (("time", times, True), ("display time", offsets, False))
        if table[:, 0].sum() != samples and (needed or len(table))
    ]
    stated, timescale = _duration(_box(data, b"mdia mdhd", begin, end))
    lasts = int((times[:, 0] * times[:, 1]).sum())
    # Writers differ about the last frame of a variable frame rate.
    tolerance = max(stated // 10, 2 * stated // max(samples, 1))
    if not conflicts and stated and timescale and abs(lasts - stated) > tolerance:
        conflicts.append(f"the time table lasts {lasts / timescale:.2f} s, its track {stated / timescale:.2f} s")
    return conflicts


def _entries(table: bytes) -> np.ndarray:
    """Return the (count, value) pairs of an stts or ctts box, int64 [entries, 2]."""
    count = int.from_bytes(table[4:8], "big")
    pairs = table[8 : 8 + 8 * count]
    return np.frombuffer(pairs[: len(pairs) // 8 * 8], ">u4").astype(np.int64).reshape(-1, 2)
