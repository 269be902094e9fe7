"""What all command lines share: errors are messages, and a lost terminal or a closed pipe does not end the work."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from octvideo import streams
from octvideo.errors import Interrupted, RunError, UserError
from octvideo.files import write_atomic

Main = Callable[..., int]


def run(main: Main, *, keyboard_interrupt: bool = True) -> int:
    """Call main() as a program and return its exit status.

    Standard output and standard error never raise (octvideo.streams). keyboard_interrupt: ctrl-C raises KeyboardInterrupt;
    False: it ends the program quietly until main installs a handler, for a main that imports much before it does.
    """
    streams.guard()
    if keyboard_interrupt and signal.getsignal(signal.SIGINT) is end_quietly:
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
    128 + N: stopped by signal N (Interrupted).
    """

    @functools.wraps(main)
    def guarded(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments)
        except (UserError, RunError) as error:
            print(f"error: {error}", file=sys.stderr)
            return error.status
        except Interrupted as stop:
            print(stop, file=sys.stderr)
            return stop.status
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
