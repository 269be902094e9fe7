"""Signals that ask a run to stop, and how all ranks agree on the step at which they do."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from typing import Any

from octvideo.engine.distributed import HostMax


class Stopped(Exception):
    """The run was asked to stop by a signal."""

    def __init__(self, signal_number: int, step: int) -> None:
        self.signal_number = signal_number
        super().__init__(f"stopped by {signal.Signals(signal_number).name} at step {step}")


class StopRequest:
    """Note a signal, so that the run can end between two batches. A second one of the same kind ends the process."""

    def __init__(self, signals: Sequence[int] = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)) -> None:
        self.signals, self.received = signals, 0
        self._agreed = HostMax()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in getattr(self, "before", {}).items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    def check(self, step: int) -> None:
        """Raise Stopped on all ranks if any has received a signal; called by all of them, equally often.

        Nothing waits for the device. With several processes a signal is seen one call later (`HostMax`).
        """
        received = self._agreed(self.received)
        if received:
            raise Stopped(received, step)
