"""Reads of a bounded file, and archives that claim more than they hold."""

import random
import struct
import zipfile
from pathlib import Path

import pytest

from octvideo.claims import CONTENTS, BoundedFile, ClaimError, StoredZip

from .memory import peak_memory

MB = 1 << 20


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def test_a_read_is_for_what_is_left(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abcdef")
    with BoundedFile(tmp_path / "a") as file, peak_memory() as peak:
        assert (file.size, file.read(2), file.read(1 << 40), file.read(1), file.read()) == (6, b"ab", b"cdef", b"", b"")
    assert peak[0] < MB
    with BoundedFile(tmp_path / "a", limit=3) as file:
        assert file.read(3) == b"abc"
        file.seek(1)
        with pytest.raises(ClaimError, match="a part of 5 bytes where at most 3"):
            file.read(5)


def test_members_are_read(tmp_path: Path) -> None:
    members = {"a": b"", "b/c": bytes(range(256)) * 9000}  # more than a block
    with StoredZip(archive(tmp_path / "a.zip", members)) as file:
        assert file.sizes == {"a": 0, "b/c": 2_304_000}
        assert {name: file.read(name) for name in members} == members


def test_a_flipped_bit_in_a_member(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"a": b"1234567890" * 10})
    path.write_bytes(path.read_bytes().replace(b"1234567890" * 10, b"1234567890" * 9 + b"1234567891"))
    with StoredZip(path) as file, pytest.raises(ClaimError, match="the checksum of a does not agree"):
        file.read("a")


def test_two_entries_that_use_the_same_bytes(tmp_path: Path) -> None:
    """Each of 50 entries of a table of contents claims the one member."""
    path = archive(tmp_path / "a.zip", {"a000": bytes(MB)})
    content = path.read_bytes()
    table, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    entries = [content[table:end].replace(b"a000", f"a{number:03}".encode()) for number in range(50)]
    tail = bytearray(content[end:])
    tail[8:16] = struct.pack("<HHI", 50, 50, len(b"".join(entries)))
    path.write_bytes(content[:table] + b"".join(entries) + tail)
    with pytest.raises(ClaimError, match=rf"members of {50 * MB} bytes in a file of"):
        StoredZip(path)


def test_one_name_twice(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a", b"1")
        file.writestr("a", b"2")
    with pytest.raises(ClaimError, match="two members have the same name"):
        StoredZip(tmp_path / "a.zip")


def test_a_size_that_is_not_the_stored_one(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"a": b"1234"})
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 1 << 30)  # without compression both sizes are one
    path.write_bytes(content)
    with pytest.raises(ClaimError, match="stored unchanged"):
        StoredZip(path)


def test_a_long_table_of_contents(tmp_path: Path) -> None:
    """100,000 empty members take the reader some ten times as much as their entries."""
    entry = b"PK\x01\x02" + bytes(24) + struct.pack("<H", 6) + bytes(16)
    table = b"".join(entry + f"{number:06}".encode() for number in range(100_000))
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 50_000, 50_000, len(table), 0, 0)
    (tmp_path / "a.zip").write_bytes(table + end)
    with peak_memory() as peak, pytest.raises(ClaimError, match=f"a part of {len(table)} bytes .* {CONTENTS}"):
        StoredZip(tmp_path / "a.zip")
    assert peak[0] < 20 * MB


def test_damage_anywhere(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"x/a": b"12345" * 20, "x/b": b"67890" * 20})
    whole, draw, errors = path.read_bytes(), random.Random(0), 0
    for trial in range(300):
        content = bytearray(whole[: draw.randrange(len(whole))] if trial % 3 == 0 else whole)
        for _ in range(trial % 3 * 2):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            with StoredZip(path) as file:
                assert all(len(file.read(name)) == size for name, size in file.sizes.items())
        except ClaimError:
            errors += 1
    assert errors > 200
