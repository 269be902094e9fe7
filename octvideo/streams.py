"""Standard output and standard error that never raise: a closed pipe, a lost terminal or a full disk drops their text."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from typing import Any

lost: dict[str, str] = {}
"""Streams of this process that can no longer be written, "standard output" or "standard error" -> why."""


def guard() -> None:
    """Replace sys.stdout and sys.stderr by streams whose writes never raise OSError.

    Characters that their encoding lacks are escaped. After a failed write the text of that stream is dropped, and `lost`
    has the reason.
    """
    sys.stdout = _guarded(sys.stdout, "standard output", 1)
    sys.stderr = _guarded(sys.stderr, "standard error", 2)


class _Guarded:
    """A text stream whose writes never raise OSError."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name

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
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def _guarded(stream: Any, name: str, descriptor: int) -> Any:
    if isinstance(stream, _Guarded):
        return stream
    if stream is None:  # closed before the program started
        lost.setdefault(name, "closed")
        return _nowhere(descriptor)
    with contextlib.suppress(AttributeError, ValueError, OSError):
        stream.reconfigure(errors="backslashreplace")
    return _Guarded(stream, name)


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
