"""What all command lines share: errors are messages, and a lost terminal or a closed pipe does not end the work."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from octvideo.errors import RunError, UserError
from octvideo.files import write_atomic

Main = Callable[..., int]

lost: dict[str, str] = {}
"""Streams of this process that can no longer be written, "standard output" or "standard error" -> why."""


def run(main: Main) -> int:
    """Call main() as a program and return its exit status.

    Standard output and standard error escape characters that their encoding lacks. If one of them cannot be written (a pipe
    was closed, a terminal went away, a disk is full), its text is dropped from then on and the program continues; `lost`
    has the reason.
    """
    sys.stdout = _guarded(sys.stdout, "standard output", 1)
    sys.stderr = _guarded(sys.stderr, "standard error", 2)
    if signal.getsignal(signal.SIGINT) is end_quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main()
    finally:  # also at the SystemExit of --help
        for stream in (sys.stdout, sys.stderr):
            stream.flush()


def end_quietly(number: int, frame: Any) -> None:
    """Handle SIGINT while a program imports its modules, of which some turn KeyboardInterrupt into other errors."""
    os._exit(128 + number)


class OutputError(UserError, ValueError):
    """An output that would replace a file of another kind."""


def check_output(path: Path, kind: bytes) -> None:
    """Raise OutputError if `path` is there and does not begin with `kind`, so that it is no earlier output of the tool.

    To be called before the work, and so that a wrong name replaces no configuration, list or checkpoint.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file")
    if path.exists():
        with path.open("rb") as file:
            head = file.read(len(kind))
        if head.lower() not in (b"", kind.lower()):
            raise OutputError(
                f"{path} is there, and not an earlier output of this tool; give another name, or remove it"
            )


def write_output(path: Path, content: bytes | Callable[[IO[bytes]], None]) -> None:
    """Write a file that a command line names, and print that it replaced one. Its folder is made. Raises WriteError."""
    existed = path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)
    if existed:
        print(f"replaced {path}")


def reports_errors(main: Main) -> Main:
    """Decorate main: an expected error becomes one message on standard error, and its exit status is returned.

    Status 2: the request is wrong (UserError). 1: the work failed (RunError, OSError, MemoryError). 130: ctrl-C.
    """

    @functools.wraps(main)
    def guarded(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments)
        except (UserError, RunError) as error:
            print(f"error: {error}", file=sys.stderr)
            return error.status
        except MemoryError as error:
            print(f"error: not enough memory ({str(error) or 'no details'})", file=sys.stderr)
            return 1
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return guarded


class _Guarded:
    """A text stream whose writes never raise OSError."""

    def __init__(self, stream: Any, name: str, descriptor: int) -> None:
        self._stream, self._name, self._descriptor = stream, name, descriptor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self._drop(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        """Let the descriptor lead nowhere, so that what the stream still holds, and native code writes, is dropped too."""
        lost.setdefault(self._name, str(error) or type(error).__name__)
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._descriptor)
            os.close(nowhere)
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def _guarded(stream: Any, name: str, descriptor: int) -> Any:
    if stream is None:  # closed before the program started
        lost.setdefault(name, "closed")
        return _nowhere(descriptor)
    with contextlib.suppress(AttributeError, ValueError, OSError):
        stream.reconfigure(errors="backslashreplace")
    return _Guarded(stream, name, descriptor)


def _nowhere(descriptor: int) -> Any:
    """Return a stream whose text is dropped. It occupies a closed `descriptor`, or the next file that is opened would, and
    would receive what native code prints."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.fstat(descriptor)
    except OSError:
        os.dup2(nowhere, descriptor)
    if nowhere != descriptor:
        os.close(nowhere)
    return open(os.devnull, "w", errors="backslashreplace")  # noqa: PTH123  # for the rest of the program
