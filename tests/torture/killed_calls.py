"""Kill the process inside one of its file-system calls, before or after it, or with half of a write done."""

from __future__ import annotations

import builtins
import io
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("fsync", "replace", "rename", "unlink", "truncate", "ftruncate", "pwrite", "mkdir")


class KilledCalls:
    """Count the calls of this process that change files in `folder`, and kill it at call number `at` (0: never).

    folder: files elsewhere are left alone. draw: decides whether the call itself takes place.
    """

    def __init__(self, folder: Path, at: int, draw: random.Random) -> None:
        self.folder, self.at, self.draw, self.count = str(folder), at, draw, 0

    def install(self) -> None:
        """Replace the functions of os, io and builtins for the rest of the process."""
        for name in CALLS:
            setattr(os, name, self._wrapped(getattr(os, name)))
        original = io.open

        def open_(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **named: Any) -> Any:
            writes = any(sign in mode for sign in "wax+")
            if not writes or isinstance(file, int) or not str(file).startswith(self.folder):
                return original(file, mode, buffering, *args, **named)
            self.meet()
            raw = _KilledFile(file, mode.replace("b", "").replace("t", ""), self)
            if buffering == 0:
                return raw
            buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)  # type: ignore[arg-type]
            return buffer if "b" in mode else io.TextIOWrapper(buffer, *args, **named)

        io.open = open_  # type: ignore[assignment]
        builtins.open = open_  # type: ignore[assignment]

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            if not args or not (isinstance(args[0], int) or str(args[0]).startswith(self.folder)):
                return call(*args, **named)
            after = self.draw.random() < 0.5
            if not after:
                self.meet()
            result = call(*args, **named)
            if after:
                self.meet()
            return result

        return wrapped

    def meet(self) -> None:
        """Count a call; end the process if it is the one."""
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class _KilledFile(io.FileIO):
    def __init__(self, file: Any, mode: str, calls: KilledCalls) -> None:
        super().__init__(file, mode)
        self.calls = calls

    def write(self, data: Any) -> int:
        if self.calls.count + 1 == self.calls.at:
            super().write(memoryview(data)[: len(data) // 2])
        self.calls.meet()
        return super().write(data)
