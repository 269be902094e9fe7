"""Paths from users, files that are opened to read, and files that are written completely or not at all."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import shutil
import socket
import stat
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import IO

from octvideo.errors import RunError, UserError, shown

HOST = socket.gethostname().split(".")[0] or "localhost"
STALE_S = 3600  # a temporary file that nobody has written to for so long belongs to no living process
_TEMPORARY = re.compile(r"\..+\.(?:(?P<host>[^.]+)-)?(?P<pid>\d+)\.tmp")


_NOT_IN_PATHS = {"Cc": "control", "Cs": "undecodable", "Zl": "line-break", "Zp": "line-break"}
# They reorder a line of a terminal, or are the rest of a byte order mark.
_INVISIBLE = frozenset("\ufeff\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class PathError(UserError, argparse.ArgumentTypeError):
    """A path that is not accepted, for a reason. argparse prints it with the flag if `path_argument` is the flag's type."""

    def __init__(self, path: str, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{shown(path)} {reason}")


def unprintable(text: str) -> str:
    """Return why a text cannot be a path: its first control, line-break, undecodable or direction character; "" if none."""
    if text.isprintable():
        return ""
    for character in text:
        kind = _NOT_IN_PATHS.get(unicodedata.category(character), "invisible" if character in _INVISIBLE else "")
        if kind:
            return f"contains the {kind} character {character!a}"
    return ""


def expanded(path: str | Path) -> str:
    """Return a path with a leading ~ or ~USER replaced by the home folder.

    Raises PathError for an unprintable character and for a USER without a home folder.
    """
    text = os.fspath(path)
    if problem := unprintable(text):
        raise PathError(text, f"{problem}; rename it")
    if not text.startswith("~"):
        # "./~" is a folder called ~ in the current one, which Path would shorten to ~
        return str(Path(text).absolute()) if str(Path(text)).startswith("~") else text
    home = os.path.expanduser(text)  # noqa: PTH111  # Path would normalize the rest
    if home == text:
        user = text.split("/")[0]
        raise PathError(text, f"begins with {shown(user)}, which has no home folder; ./{user} is a folder of that name")
    return home


def path_argument(text: str) -> Path:
    """Return `expanded` as a Path: the type of a command line's flag that names a file or folder."""
    return Path(expanded(text))


def tried(path: str | Path) -> str:
    """Return, for a message, the absolute path of a relative one, and the current folder; "" for others."""
    if Path(path).is_absolute():
        return ""
    return f" (tried {shown(str(Path(path).absolute()), 300)} from the current folder)"


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a file to read its bytes. Raises OSError for a folder, FIFO, socket or device too, and waits for none."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "Not a regular file", str(path))


class WriteError(RunError):
    """A file that cannot be written (disk full, no permission); the message names it, the reason and the free space."""


def write_atomic(path: Path, content: bytes | Callable[[IO[bytes]], None]) -> None:
    """Write `content`, bytes or a function that writes them, to a temporary file, flush it to the disk, and rename it.

    A reader sees the old file or the new one, never a part. Raises WriteError, and leaves the old file unchanged.
    """
    temporary = path.with_name(f".{path.name}.{HOST}-{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as RuntimeError
        _remove(temporary)
        raise write_error(path, error, "the file that was there before is unchanged") from error
    except BaseException:  # from the function that writes, or ctrl-C
        _remove(temporary)
        raise


def append(path: Path, text: str) -> None:
    """Append `text` completely or not at all. Raises WriteError, and leaves the file as long as it was."""
    try:
        with path.open("ab", buffering=0) as file:
            before, data = file.tell(), text.encode("utf-8", "backslashreplace")
            try:
                written = file.write(data)
                while written < len(data):
                    written += file.write(data[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(before)
                raise
    except OSError as error:
        raise write_error(path, error, "its earlier lines are unchanged") from error


def write_error(path: Path, error: BaseException, effect: str) -> WriteError:
    """Return the error of a write to `path` that failed. effect: on what was there before."""
    try:
        free = f"{shutil.disk_usage(path.parent).free / 1e6:.0f} MB are free there"
    except OSError:
        free = "its folder cannot be read"
    return WriteError(f"{path}: cannot be written ({first_line(error)}; {free}); {effect}")


def remove_unfinished(folder: Path, gone: tuple[str, int] | None = None) -> None:
    """Remove the temporary files in `folder` whose process no longer exists.

    gone: host and process number of a process that is known to have ended. Of other hosts' processes nothing is known:
    their files are removed if they have not been written to for STALE_S seconds.
    """
    for path in folder.glob(".*.tmp"):
        if (found := _TEMPORARY.fullmatch(path.name)) is None:
            continue
        host, pid = found["host"] or HOST, int(found["pid"])
        if pid == os.getpid() and host == HOST:
            continue
        with contextlib.suppress(OSError):
            stale = time.time() - path.stat().st_mtime > STALE_S
            if stale or (host, pid) == gone or (host == HOST and not process_exists(pid)):
                path.unlink()


def process_exists(pid: int) -> bool:
    """True if this machine has a process `pid` that has not ended."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, for a message, or its type if it has no text."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Some network file systems do not allow it for folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # on a disk that became read-only
        path.unlink()
