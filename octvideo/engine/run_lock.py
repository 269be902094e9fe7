"""One run, one folder: a lock with the host, process and start of the process that writes there.

The lock is a POSIX record lock on FOLDER/run.lock: the system releases it when the process ends, however it ends, and
worker processes do not inherit it. On a network file system it holds between hosts if the file system's locks do. Where
they do not (locks local to a host, or none at all), the modification time of run.lock shows that its process is alive: the
process sets it every BEAT_S seconds, and a start on another host waits for TAKEOVER_S seconds whether it changes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from octvideo.errors import RunError
from octvideo.files import HOST, process_exists, remove_unfinished, write_error

NAME = "run.lock"
BEAT_S = 5.0
TAKEOVER_S = 3.5 * BEAT_S
UNLOCKED_S = 0.2  # without locks: time in which two starts at the same moment notice each other
SAME_JOB_S = 120.0  # how long a restarted SLURM job waits for the process of its earlier start


_held: set[Path] = set()  # lock files of this process


class FolderInUseError(RunError):
    """Another process writes to the folder; the message has its host, process, start and job."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock. began: start of the process in clock ticks since boot, as the system counts it."""

    host: str
    pid: int
    since: str
    began: int = 0
    job: str = ""

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host} (since {self.since}{job})"


class FolderLock:
    """Hold FOLDER/run.lock inside the context. note: a line for the log on what was unusual, "" if nothing.

    Raises FolderInUseError if another living process holds it, WriteError if the folder cannot be written. The temporary
    files of the process that held it before are removed.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.note = folder / NAME, ""
        self._locked = self._made = False
        self._descriptor = -1
        self._released = threading.Event()

    def __enter__(self) -> FolderLock:
        folder = self.path.parent
        try:
            self._made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.resolve() in _held:  # the system grants a process its own lock again
                raise self._in_use(_this_process())
            before = self._open()
            self._write_owner()
        except OSError as error:
            self._close()
            raise write_error(self.path, error, "nothing was started") from error
        except BaseException:
            self._close()
            raise
        _held.add(self.path.resolve())
        remove_unfinished(folder, gone=(before.host, before.pid) if before else None)
        threading.Thread(target=self._beat, daemon=True, name=NAME).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._released.set()
        _held.discard(self.path.resolve())
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            if list(self.path.parent.iterdir()) == [self.path]:  # the run left nothing, for example after a wrong list
                self.path.unlink()
                if self._made:
                    self.path.parent.rmdir()
        self._close()

    def _open(self) -> Owner | None:
        """Open and lock the file that the path names: another process may remove it between the two."""
        while True:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            before = self._acquire()
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._descriptor), self.path.stat()):
                    return before
            self._close()
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def _acquire(self) -> Owner | None:
        """Take the lock; return the process that held it before and did not release it, if any."""
        supported, patience = self._lock(), time.monotonic() + SAME_JOB_S
        while supported is False:
            owner = self._owner()
            if not (owner and owner.job and owner.job == _job()) or time.monotonic() > patience:
                raise self._in_use(owner)
            time.sleep(1)
            supported = self._lock()
        owner = self._owner()
        if owner is None:
            return None
        if owner.host == HOST:
            if supported is None and _is_alive(owner):
                raise self._in_use(owner)
        elif not (owner.job and owner.job == _job()) and self._changes_within(TAKEOVER_S):
            raise self._in_use(owner)
        self.note = (
            self.note or f"{self.path.parent}: {owner} ended without releasing the folder; this run takes it over"
        )
        return owner

    def _write_owner(self) -> None:
        """Write this process into the file. Without locks another process may do the same: the last one has the folder."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, (json.dumps(asdict(_this_process())) + "\n").encode(), 0)
        if not self._locked:
            time.sleep(UNLOCKED_S)
            owner = self._owner()
            if owner is None or (owner.host, owner.pid) != (HOST, os.getpid()):
                raise self._in_use(owner)

    def _lock(self) -> bool | None:
        """True: locked. False: another process has it. None: the file system has no locks."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            self.note = (
                f"{self.path.parent}: its file system has no locks ({error.strerror}); a second run in this folder is "
                f"noticed by the time stamp of {NAME} alone, within {TAKEOVER_S:g} s"
            )
            return None
        self._locked = True
        return True

    def _changes_within(self, seconds: float) -> bool:
        """True if the owner's process sets the time stamp meanwhile."""
        end, first = time.monotonic() + seconds, self._stamp()
        while time.monotonic() < end:
            time.sleep(min(0.5, seconds / 10))
            if self._stamp() != first:
                return True
        return False

    def _stamp(self) -> tuple[int, bytes]:
        return self.path.stat().st_mtime_ns, os.pread(self._descriptor, 4096, 0)

    def _owner(self) -> Owner | None:
        try:
            found: dict[str, Any] = json.loads(os.pread(self._descriptor, 4096, 0))
            return Owner(
                str(found["host"]), int(found["pid"]), str(found["since"]), int(found["began"]), str(found["job"])
            )
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None

    def _in_use(self, owner: Owner | None) -> FolderInUseError:
        return FolderInUseError(
            f"{self.path.parent} is in use by {owner or 'another process'}, which writes there; wait for its end, stop it, "
            "or give another OUTPUT_DIR"
        )

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)  # which releases the lock
            self._descriptor = -1


def _this_process() -> Owner:
    return Owner(HOST, os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"), _began(os.getpid()), _job())


def _job() -> str:
    """The SLURM job of this process, with the task of an array; the same after a requeue."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")


def _began(pid: int) -> int:
    """The start of a process in clock ticks, 0 if the system does not show it: process numbers are used again."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _is_alive(owner: Owner) -> bool:
    return process_exists(owner.pid) and (not owner.began or owner.began == _began(owner.pid))
