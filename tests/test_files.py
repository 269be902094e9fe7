"""Atomic writes, appended lines, and the temporary files that killed processes leave."""

import argparse
import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

from octvideo import files
from octvideo.files import HOST, WriteError, append, process_exists, remove_unfinished, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def content(file: object) -> None:
        assert path.read_bytes() == b"old"
        file.write(b"new")  # type: ignore[attr-defined]

    write_atomic(path, content)
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_a_failed_write_is_one_message_and_changes_nothing(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def content(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise error

    with pytest.raises(WriteError) as caught:
        write_atomic(path, content)
    assert str(path) in str(caught.value)
    assert "MB are free" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.txt"]


def test_an_error_of_the_writer_leaves_no_temporary_file(tmp_path: Path) -> None:
    """For example a video that proves to be damaged while it is written, or ctrl-C."""
    (tmp_path / "a.mp4").write_bytes(b"before")
    for error in (ValueError("damaged"), KeyboardInterrupt()):

        def write(file: IO[bytes], error: BaseException = error) -> None:
            file.write(b"half")
            raise error

        with pytest.raises(type(error)):
            write_atomic(tmp_path / "a.mp4", write)
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.mp4", b"before")]


def test_a_folder_that_is_gone_or_read_only_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WriteError, match=r"gone/a\.txt"):
        write_atomic(tmp_path / "gone" / "a.txt", b"")

    def read_only(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "replace", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)  # the clean-up fails as well
    with pytest.raises(WriteError, match="Read-only"):
        write_atomic(tmp_path / "a.txt", b"new")


def test_an_append_is_complete_or_leaves_the_file_as_long_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    append(path, "1\n")
    append(path, "\udcff\n")  # a name that is not UTF-8
    assert path.read_text() == "1\n\\udcff\n"
    # a limit on the size of files simulates a full disk: the kernel writes a part of the line
    code = (
        "import resource, signal, sys; from pathlib import Path; from octvideo.files import append, WriteError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "try: append(Path(sys.argv[1]), 'x' * 30)\n"
        "except WriteError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert str(path) in done.stdout
    assert path.read_text() == "1\n\\udcff\n"


def test_temporary_files_of_ended_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    alive = os.getppid()
    gone = [f".a.pt.{HOST}-{ended.pid}.tmp", f".b.npz.{ended.pid}.tmp", ".c.json.node7-12.tmp", ".d.x.node9-1.tmp"]
    kept = [f".a.pt.{HOST}-{alive}.tmp", f".e.pt.{HOST}-{os.getpid()}.tmp", ".f.pt.node9-2.tmp", ".swp.tmp", "a.pt"]
    for name in gone + kept:
        (tmp_path / name).touch()
    old = time.time() - files.STALE_S - 1
    os.utime(tmp_path / ".d.x.node9-1.tmp", (old, old))
    remove_unfinished(tmp_path, gone=("node7", 12))
    assert names(tmp_path) == sorted(kept)


def test_process_exists() -> None:
    assert process_exists(os.getpid())
    assert process_exists(1)
    assert not process_exists(2**31 - 1)
    assert not process_exists(10**30)


def test_home_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir(tmp_path)
    assert files.expanded("~/x") == "/home/somebody/x" and files.expanded(Path("~")) == "/home/somebody"
    assert files.path_argument("~/x/") == Path("/home/somebody/x")
    for path in ("a/~", "/~", "a~", ""):
        assert files.expanded(path) == path
    assert files.expanded("./~") == f"{tmp_path}/~"
    with pytest.raises(files.PathError, match="'~nobody-here/x' begins with '~nobody-here', which has no home folder"):
        files.expanded("~nobody-here/x")


def test_a_flag_that_names_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=files.path_argument)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--out", "a\nb"])
    assert r"argument --out: 'a\nb' contains the control character '\n'; rename it" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["größe/動画　1.mp4", "a\u00a0b", "👩\u200d💻", "a\u200eb", "a'b\"c #%$", ""])
def test_printable_names(text: str) -> None:
    assert files.unprintable(text) == ""


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, error in (
        (tmp_path, IsADirectoryError),
        (tmp_path / "fifo", OSError),
        (tmp_path / "none", FileNotFoundError),
    ):
        with pytest.raises(error):
            files.open_regular(path)
    (tmp_path / "file").write_text("x")
    with files.open_regular(tmp_path / "file") as file:
        assert file.read() == b"x"
