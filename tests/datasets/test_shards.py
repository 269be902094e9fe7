"""datasets/shards.py: bytes at the offsets that the list gives, the same whenever and wherever they are written."""

from __future__ import annotations

import errno
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from datasets import kinetics, shards
from octvideo.data.decode import open_video
from octvideo.data.lists import read_list
from tests.data.conftest import write_clip

LONG = "x" * 120 + "/" + "y" * 120 + ".mp4"  # does not fit into a plain header
NAMES = ("b/a.mp4", "a/ä ü.mp4", LONG, "a/empty.mp4", "a: b:1:2.mp4", "c/large.mp4", "c/z.mp4")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of random bytes, the largest more than a shard, and their list."""
    rng = np.random.default_rng(0)
    sizes = (400_000, 700_001, 512, 0, 1, 3_000_000, 300_000)
    for name, size in zip(NAMES, sizes, strict=True):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.bytes(size))
    (tmp_path / "train.txt").write_text("".join(f"{name} {10 + i}\n" for i, name in enumerate(NAMES)), encoding="utf-8")
    return tmp_path


def run(folder: Path, out: Path, *more: object) -> list[str]:
    given = ["--list", folder / "train.txt", "--prefix", folder / "videos", "--out", out, "--shard-mb", 1, *more]
    assert kinetics.main([*map(str, ("shards", *given))]) == 0
    return (out / "train.txt").read_text(encoding="utf-8").splitlines()


def failing(capsys: pytest.CaptureFixture[str], folder: Path, *more: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(folder, folder / "out", *more)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_the_list_says_where_the_bytes_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(folder, folder / "out")
    assert len(lines) == len(NAMES)
    used = []
    for line, name, label in zip(lines, NAMES, range(10, 17), strict=True):
        where, _, told = line.rpartition(" ")
        tar, offset, size, member = where.split(":", 3)
        assert (member, int(told)) == (name, label)
        data = (folder / "out" / tar).read_bytes()[int(offset) : int(offset) + int(size)]
        assert data == (folder / "videos" / name).read_bytes()
        used.append(tar)
    assert used == [f"train-{number:05d}.tar" for number in (0, 1, 1, 1, 1, 2, 3)]
    assert "| 7 | 4 | 4 |" in " ".join(capsys.readouterr().out.split())


def test_any_tar_reads_them(folder: Path) -> None:
    run(folder, folder / "out")
    found = {}
    names = []
    for path in sorted((folder / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                names.append(member.name)
                found[member.name] = tar.extractfile(member).read()
                facts = (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode)
                assert facts == (0, 0, 0, "", "", 0o644)
        assert path.stat().st_size % 10240 == 0
    assert tuple(names) == NAMES
    assert found == {name: (folder / "videos" / name).read_bytes() for name in NAMES}


def test_the_same_bytes_for_the_same_input(folder: Path) -> None:
    first = run(folder, folder / "one", "--workers", 1)
    other = folder / "elsewhere"
    shutil.copytree(folder / "videos", other / "videos")
    for path in (other / "videos").rglob("*.mp4"):
        os.utime(path, (1, 1))
        path.chmod(0o400)
    shutil.copy(folder / "train.txt", other)
    assert run(other, folder / "two", "--workers", 2) == first
    for path in (folder / "one").glob("*.tar"):
        assert path.read_bytes() == (folder / "two" / path.name).read_bytes()


def test_whole_shards_are_not_written_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    lines = run(folder, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    content = (out / "train-00001.tar").read_bytes()
    (out / "train-00001.tar").unlink()
    (out / ".train-00001.tar.part").write_bytes(b"half")
    (out / "train.txt").unlink()
    assert run(folder, out) == lines
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert {name for name in before if before[name] != after[name]} == {"train-00001.tar"}
    assert (out / "train-00001.tar").read_bytes() == content
    assert not list(out.glob(".*"))
    (out / "train-00002.tar").write_bytes(b"x" * 10240)
    assert "train-00002.tar has 10240 bytes, not" in failing(capsys, folder)


def test_what_the_shards_are_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another list, other sizes of files or shards: not in this folder."""
    run(folder, folder / "out")
    assert "was made with shard_mb 1, not 2" in failing(capsys, folder, "--shard-mb", 2)
    run(folder, folder / "out", "--name", "train")
    given = ("--list", folder / "train.txt", "--prefix", folder / "videos", "--out", folder / "out", "--name", "val")
    assert kinetics.main([*map(str, ("shards", *given))]) == 0  # both splits in one folder
    assert (folder / "out" / "val.txt").read_text().startswith("val-00000.tar:512:400000:b/a.mp4 10\n")
    (folder / "videos" / "c" / "z.mp4").write_bytes(b"other")
    assert "was made with list and sizes" in failing(capsys, folder)
    (folder / "out" / "train.json").unlink()
    assert "train-00003.tar, train.txt but no train.json, so another tool made it" in failing(capsys, folder)


def test_missing_files_are_named_before_anything_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "videos" / "b" / "a.mp4").unlink()
    (folder / "videos" / "c" / "z.mp4").unlink()
    (folder / "videos" / "c" / "z.mp4").mkdir()
    told = failing(capsys, folder)
    assert f"{folder / 'train.txt'}:1: {folder / 'videos/b/a.mp4'}: No such file or directory; check the path" in told
    assert f"{folder / 'train.txt'}:7: {folder / 'videos/c/z.mp4'} is no file" in told
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("../train.txt 0\n", "train.txt:1: '../train.txt' leads out of the prefix"),
        ("/etc/passwd 0\n", "train.txt:1: '/etc/passwd' leads out of the prefix"),
        ("b/a.mp4 0\nb//a.mp4 0\n", "train.txt:2: 'b//a.mp4' is the file 'b/a.mp4' of line 1"),
        ("b/a.mp4 zero\n", "label 'zero' of 'b/a.mp4' is not an integer"),
        ("", "the list is empty"),
    ],
)
def test_lists_that_cannot_be_packed(folder: Path, capsys: pytest.CaptureFixture[str], lines: str, told: str) -> None:
    (folder / "train.txt").write_text(lines)
    assert told in failing(capsys, folder)
    assert not (folder / "out").exists()


def test_settings_that_make_no_shards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "shard-mb is 0: give 1 or more" in failing(capsys, folder, "--shard-mb", 0)
    for name in ("", "../x", "a/b", "-".join("a:b"), ".x"):
        assert f"name is {name!r}: give letters" in failing(capsys, folder, f"--name={name}")


@pytest.mark.parametrize(("change", "told"), [(-5, "unexpected end of data"), (5, "grew while it was read")])
def test_a_file_that_changes_while_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: int, told: str
) -> None:
    """Found out when the shard is written: the shard is not there, and neither is the list."""
    path = folder / "videos" / "b" / "a.mp4"
    write, data = shards.write, path.read_bytes()

    def after_the_change(*given: object) -> int:
        path.write_bytes(data[:change] if change < 0 else data + bytes(change))
        return write(*given)

    monkeypatch.setattr(shards, "write", after_the_change)
    said = failing(capsys, folder, "--workers", 1)
    assert f"{folder / 'train.txt'}:1: {path}" in said
    assert told in said
    assert not list((folder / "out").glob("*.t*"))


def test_a_full_disk_is_no_fault_of_the_video(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: tarfile.TarFile, *arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    error = failing(capsys, folder, "--workers", 1)
    assert f"{folder}/out/train-00000.tar: cannot be written (No space left on device)" in error
    assert [path.name for path in (folder / "out").iterdir()] == ["train.json"]


def test_videos_are_read_in_place(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    names = ["a.mp4", "b c.mkv"]
    for name in names:
        write_clip(tmp_path / "videos" / name, 20)
    (tmp_path / "train.txt").write_text("".join(f"{name} 0\n" for name in names))
    out = tmp_path / "out"
    run(tmp_path, out)
    videos = read_list(str(out / "train.txt"), num_classes=1, prefix=str(out), check_files=False)
    for index, name in enumerate(names):
        with open_video(videos.path(index)) as packed, open_video(str(tmp_path / "videos" / name)) as plain:
            assert packed.frames(range(20)).equal(plain.frames(range(20)))
