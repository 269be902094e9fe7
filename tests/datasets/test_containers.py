"""datasets/containers.py: the lengths that containers state, against files that are cut at every kind of place."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import av
import pytest

from datasets import containers
from tests.datasets.conftest import STATING, patched, write_noise

# If the cut is at the border of two elements (fragments, chunks, tags, packets), nothing states more.
BORDERS = {
    *("mp4, fragments", "matroska, pipe", "webm, pipe", "avi, pipe", "flash", "flash, pipe", "program stream"),
    *("transport stream", "transport stream of discs"),
}
TRANSPORT = {"transport stream": 188, "transport stream of discs": 192}  # bytes of a packet


def names_of(path: Path) -> set[str]:
    with av.open(str(path)) as container:
        return set(container.format.name.split(","))


@pytest.mark.parametrize("name", STATING)
def test_a_cut_file_states_more_than_it_has(name: str, stating: Callable[[str], Path], tmp_path: Path) -> None:
    path = stating(name)
    names, data = names_of(path), path.read_bytes()
    assert containers.read(str(path), names).size == len(data)
    rng = random.Random(0)
    cut = tmp_path / path.name
    missed = []
    for size in [len(data) - lost for lost in (1, 2, 5)] + [
        rng.randrange(len(data) // 20, len(data)) for _ in range(60)
    ]:
        cut.write_bytes(data[:size])
        if containers.read(str(cut), names).size <= size:
            missed.append(size)
    assert len(missed) <= (2 if name in BORDERS else 0), missed
    assert not any(size % TRANSPORT.get(name, 1) for size in missed)


# Packets of a transport stream have one length: a tail is an incomplete packet.
@pytest.mark.parametrize("name", [name for name in STATING if name not in TRANSPORT])
@pytest.mark.parametrize("tail", [bytes(5), bytes(4096), b"\r\n<!-- end of page -->\n", b"TAG" + bytes(125)])
def test_what_follows_the_end_is_no_truncation(
    name: str, tail: bytes, stating: Callable[[str], Path], tmp_path: Path
) -> None:
    path = stating(name)
    longer = tmp_path / path.name
    longer.write_bytes(path.read_bytes() + tail)
    assert containers.read(str(longer), names_of(path)).size <= longer.stat().st_size


def test_containers_without_lengths(tmp_path: Path) -> None:
    path = write_noise(tmp_path / "a.h264", "libx264")
    path.write_bytes(path.read_bytes()[:-100])
    assert containers.read(str(path), {"h264"}) == (path.stat().st_size, None)


def test_a_box_with_a_long_length(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(struct.pack(">I4sQ", 1, b"mdat", 5_000_000_000) + bytes(100))
    assert containers.read(str(path), {"mp4"}).size == 5_000_000_000
    path.write_bytes(struct.pack(">I4s", 0, b"mdat") + bytes(100))
    assert containers.read(str(path), {"mp4"}).size == 108  # 0: to the end of the file


@pytest.mark.parametrize("version", [0, 1])
def test_segments_that_are_missing_altogether(version: int, tmp_path: Path) -> None:
    """A DASH file that ends after a complete segment: its sidx box still lists the others."""
    times = struct.pack(">QQ" if version else ">II", 0, 0)
    references = b"".join(struct.pack(">III", size, 24, 0) for size in (1000, 2000, 3000))
    content = struct.pack(">B3xII", version, 1, 24) + times + struct.pack(">HH", 0, 3) + references
    box = struct.pack(">I4s", 8 + len(content), b"sidx") + content
    segment = struct.pack(">I4s", 1000, b"mdat") + bytes(992)
    path = tmp_path / "a.mp4"
    path.write_bytes(box + segment)
    assert containers.read(str(path), {"mp4"}).size == len(box) + 6000


def test_an_ogg_stream_without_its_last_page(stating: Callable[[str], Path], tmp_path: Path) -> None:
    """Pages are complete, but the one that is marked as the last of its stream is missing."""
    data = stating("ogg").read_bytes()
    last = data.rindex(b"OggS")
    cut = tmp_path / "a.ogv"
    cut.write_bytes(data[:last])
    assert containers.read(str(cut), {"ogg"}).size > last


# ---- the index of an mp4 file


def test_the_duration_of_a_movie(stating: Callable[[str], Path], tmp_path: Path) -> None:
    def movie(path: Path) -> containers.Movie | None:
        return containers.read(str(path), {"mov", "mp4"}).movie

    assert movie(stating("mp4, index first")) == (1.0, [])
    assert movie(stating("mov")) == (1.0, [])
    assert movie(stating("mp4, fragments")) == (None, [])  # nobody knew it when the header was written
    assert movie(patched(stating("mov"), tmp_path / "a.mov", b"mvhd", 20, 0xFFFFFFFF)) == (None, [])
    assert movie(patched(stating("mov"), tmp_path / "b.mov", b"moov", 0, 0)) is None


@pytest.mark.parametrize(
    ("box", "place", "value", "conflict"),
    [
        (b"stts", 12, 23, "the time table has 23 frames, the size table 24"),
        (b"stts", 12, 2**31 - 1, "the time table has 2147483647 frames, the size table 24"),
        (b"stts", 8, 0, "the time table has 0 frames, the size table 24"),
        (b"stts", 16, 1, "the time table lasts 0.00 s, its track 1.00 s"),
        (b"stts", 16, 1_000_000, "s, its track 1.00 s"),
        (b"stsz", 12, 25, "the time table has 24 frames, the size table 25"),
        (b"mdhd", 20, 5, "the time table lasts 1.00 s, its track 0.00 s"),
    ],
)
def test_tables_that_contradict_each_other(
    box: bytes, place: int, value: int, conflict: str, stating: Callable[[str], Path], tmp_path: Path
) -> None:
    path = patched(stating("mp4, index first"), tmp_path / "a.mp4", box, place, value)
    movie = containers.read(str(path), {"mp4"}).movie
    assert movie is not None
    assert len(movie.conflicts) == 1
    assert conflict in movie.conflicts[0]


def test_damaged_indexes_are_no_traceback(stating: Callable[[str], Path], tmp_path: Path) -> None:
    """Random bytes at random places of the header."""
    rng = random.Random(0)
    for name in STATING:
        source = stating(name)
        names, data = names_of(source), source.read_bytes()
        for _ in range(30):
            damaged = bytearray(data)
            for _ in range(8):
                damaged[rng.randrange(min(len(data), 1500))] = rng.randrange(256)
            path = tmp_path / source.name
            path.write_bytes(damaged)
            assert containers.read(str(path), names).size >= 0
