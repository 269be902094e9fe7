"""Two processes and one folder: the second is refused, a lock of an ended process is taken over."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from octvideo.engine import run_lock
from octvideo.engine.run_lock import FolderInUseError, FolderLock, Owner
from octvideo.files import HOST, WriteError

HOLD = """
import os, sys, time
from pathlib import Path
from octvideo.engine.run_lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    child = os.fork()  # a worker, which must not keep the lock
    if child == 0:
        time.sleep(30)
        os._exit(0)
    print(child, flush=True)
    time.sleep(30)
"""


def hold(folder: Path) -> tuple[subprocess.Popen, int]:
    """A process that holds the lock, and its child."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_the_second_is_refused_with_the_first_and_a_killed_one_is_taken_over(tmp_path: Path) -> None:
    process, child = hold(tmp_path / "run")
    try:
        with pytest.raises(FolderInUseError) as caught, FolderLock(tmp_path / "run"):
            pass
        message = str(caught.value)
        assert f"{tmp_path / 'run'} is in use by process {process.pid} on {HOST} (since 20" in message
        assert "OUTPUT_DIR" in message
        (tmp_path / "run" / f".checkpoint_00000001.pt.{HOST}-{process.pid}.tmp").touch()
        process.kill()
        process.wait()
        with FolderLock(tmp_path / "run") as lock:
            assert f"process {process.pid} on {HOST}" in lock.note
            assert not list((tmp_path / "run").glob(".*.tmp"))
            owner = json.loads((tmp_path / "run" / "run.lock").read_text())
            assert (owner["host"], owner["pid"]) == (HOST, os.getpid())
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)
    (tmp_path / "run" / "result").touch()
    with FolderLock(tmp_path / "run") as lock:
        assert lock.note == ""
    assert (tmp_path / "run" / "run.lock").read_bytes() == b""


def test_a_run_that_leaves_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run" / "run.lock").exists()
    assert list((tmp_path / "a").iterdir()) == []
    with FolderLock(tmp_path / "a"):  # it was there before
        pass
    assert list((tmp_path / "a").iterdir()) == []


def test_a_lock_file_that_is_removed_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acquire, calls = FolderLock._acquire, []

    def removed_once(lock: FolderLock) -> Owner | None:
        calls.append(lock.path.exists())
        if len(calls) == 1:
            lock.path.unlink()
        return acquire(lock)

    monkeypatch.setattr(FolderLock, "_acquire", removed_once)
    with FolderLock(tmp_path):
        assert (tmp_path / "run.lock").read_bytes()
    assert calls == [True, True]


def test_a_process_cannot_hold_a_folder_twice(tmp_path: Path) -> None:
    with FolderLock(tmp_path), pytest.raises(FolderInUseError, match=str(os.getpid())), FolderLock(tmp_path):
        pass
    with FolderLock(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b'{"host": 1}', b"[" * 4000, b'{"pid": 1e999}'])
def test_a_damaged_lock_file_does_not_block(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.lock").write_bytes(content)
    with FolderLock(tmp_path) as lock:
        assert lock.note == ""


def write_owner(folder: Path, **values: object) -> None:
    owner = Owner(**{"host": "node7", "pid": 12, "since": "2026-01-01 00:00:00", **values})  # type: ignore[arg-type]
    (folder / "run.lock").write_text(json.dumps(asdict(owner)))


def test_another_host_is_taken_over_once_its_time_stamp_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "TAKEOVER_S", 0.4)
    write_owner(tmp_path)
    with FolderLock(tmp_path) as lock:
        assert "process 12 on node7" in lock.note
    write_owner(tmp_path)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(tmp_path / "run.lock")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(FolderInUseError, match="process 12 on node7"), FolderLock(tmp_path):
            pass
    finally:
        ended.set()
        thread.join()


def test_a_restart_of_the_same_slurm_job_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    write_owner(tmp_path, job="77")
    started = time.monotonic()
    with FolderLock(tmp_path) as lock:
        assert "SLURM job 77" in lock.note
    assert time.monotonic() - started < 1


def test_the_time_stamp_moves_while_the_lock_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    with FolderLock(tmp_path):
        os.utime(tmp_path / "run.lock", (1, 1))
        time.sleep(0.3)
        assert (tmp_path / "run.lock").stat().st_mtime > 1e9


def test_without_locks_of_the_file_system_the_owner_s_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with FolderLock(tmp_path) as lock:
        assert "no locks (No locks available)" in lock.note
    write_owner(tmp_path, host=HOST, pid=os.getppid())
    with pytest.raises(FolderInUseError, match=f"process {os.getppid()} on {HOST}"), FolderLock(tmp_path):
        pass
    write_owner(tmp_path, host=HOST, pid=os.getppid(), began=1)  # the number is used again, by a later process
    with FolderLock(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file/run\.lock: cannot be written"), FolderLock(tmp_path / "file"):
        pass
