"""Signals that ask a run to stop, and how all ranks agree on the step at which they do."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

from octvideo.engine.distributed import HostMax
from octvideo.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SAME_REQUEST_S = 0.05  # timeout(1) sends its signal twice, to the process and to its group


class Stopped(Interrupted):
    """A signal asked the run to stop. effect: what was saved, and how to resume."""

    def __init__(self, signal_number: int, step: int, effect: str = "nothing had to be saved") -> None:
        super().__init__(signal_number, step, effect)
        self.signal_number, self.step, self.effect = signal_number, step, effect
        self.status = 128 + signal_number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signal_number).name} at step {self.step}; {self.effect}"


class StopRequest:
    """Note a signal, so that the run can save and end between two batches. A second signal ends the process at once.

    A signal that the process ignored before (as nohup makes it ignore SIGHUP) stays ignored.
    """

    def __init__(self, signals: Sequence[int] = SIGNALS) -> None:
        self.signals, self.received, self.step = signals, 0, 0
        self._before: dict[int, Any] = {}
        self._agreed = HostMax()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            watched = [number for number in self.signals if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in watched}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        for each in self._before:
            signal.signal(each, signal.SIG_IGN)
        time.sleep(SAME_REQUEST_S)
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def check(self, step: int) -> None:
        """Raise Stopped on all ranks if any has received a signal; called by all of them, equally often.

        Nothing waits for the device. With several processes a signal is seen one call later (`HostMax`).
        """
        self.step = step
        received = self._agreed(self.received)
        if received:
            raise Stopped(received, step)

    def poll(self) -> None:
        """Raise Stopped if this process is the only one and has received a signal; called while it waits for a batch.

        Of several processes the others may wait for this one in a collective, so it must first complete the step.
        """
        if self.received and self._agreed.alone:
            raise Stopped(self.received, self.step)
