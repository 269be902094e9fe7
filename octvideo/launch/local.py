"""Ranks as processes of this machine (--local): each receives the launcher's signals once, and ends when it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octvideo.launch.request import Job

TREE = Path(__file__).resolve().parents[2]
WITH_PARENT = Path(__file__).with_name("with_parent.py")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Exit status of a rank that a signal asked to stop and that has saved
STOPPED = tuple(128 + number for number in STOP_SIGNALS)
POLL_S = 0.05


def run_local(count: int, script: Path, job: Job) -> int:
    """Run `count` ranks of the tool `script` and return their exit status. The first rank that fails ends the others.

    Status: 0, 128 + N if signal N asked the ranks to stop, or that of the rank that failed.
    """
    with tempfile.TemporaryDirectory(prefix="octvideo-") as folder, _Ranks() as ranks:
        config = Path(folder) / "config.yaml"
        config.write_text(job.config)
        command = [sys.executable, str(script), "--cfg", str(config), *job.arguments]
        shared = _environment(count)
        for rank in range(count):
            ranks.start(command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        return ranks.wait()


def _environment(count: int) -> dict[str, str]:
    """Return the environment variables that all ranks share."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(filter(None, [str(TREE), os.environ.get("PYTHONPATH")]))
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return {**os.environ, **sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": path}


class _Ranks:
    """Processes, each in a separate session, so that a ctrl-C in a terminal reaches the launcher alone.

    A signal is noted when it arrives and forwarded from the waiting loop: exactly once to every rank, also if it arrives
    while some ranks have not started. Signals that the launcher was started to ignore (nohup) are not forwarded.
    """

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen] = []
        self._received: deque[int] = deque()
        self._forwarded: set[int] = set()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Ranks:
        for number in (*STOP_SIGNALS, signal.SIGTSTP, signal.SIGCONT):
            if (handler := signal.getsignal(number)) is not signal.SIG_IGN:
                self._before[number] = handler or signal.SIG_DFL
                signal.signal(number, lambda number, frame: self._received.append(number))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._kill([process for process in self.processes if process.returncode is None])
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(self, command: Sequence[str], environment: dict[str, str]) -> None:
        linked = [sys.executable, "-I", "-S", str(WITH_PARENT), str(os.getpid()), *command]
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True}
        self.processes.append(subprocess.Popen(linked, env=environment, **options))

    def wait(self) -> int:
        """Return the exit status of the ranks. There is no limit on the time that they take to save after a signal."""
        statuses: dict[int, int] = {}
        while len(statuses) < len(self.processes):
            while self._received:
                self._forward(self._received.popleft())
            for rank, process in enumerate(self.processes):
                if rank not in statuses and (status := process.poll()) is not None:
                    if status not in (0, *STOPPED):
                        return self._failed(rank, status)
                    statuses[rank] = status
            time.sleep(POLL_S)
        return max(statuses.values())

    def _forward(self, number: int) -> None:
        if number == signal.SIGTSTP:  # ctrl-Z; the kernel does not apply SIGTSTP itself to a session without a terminal
            self._send_to_groups(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
        elif number == signal.SIGCONT:
            self._send_to_groups(signal.SIGCONT)
        else:
            self._forwarded.add(number)
            for process in self.processes:
                process.send_signal(number)

    def _send_to_groups(self, number: int) -> None:
        """Send a signal to the ranks that have not ended and to their decoding workers."""
        for process in self.processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    def _failed(self, rank: int, status: int) -> int:
        """End all ranks: those that are left would wait for this one in the next exchange, and could not save."""
        self._kill(
            [process for process in self.processes if process.returncode is None or process.returncode == status]
        )
        reason = f"ended with status {status}"
        if status < 0:
            reason = f"was ended by {signal.Signals(-status).name}"
            if -status in self._forwarded:
                reason += " before it could save"
            elif -status == signal.SIGKILL:
                reason += ", perhaps because the machine ran out of memory"
        others = "; the others were ended" if len(self.processes) > 1 else ""
        if status < 0 or others:
            print(f"rank {rank} of {len(self.processes)} {reason}{others}", file=sys.stderr)
        return status if status > 0 else 128 - status

    def _kill(self, processes: Sequence[subprocess.Popen]) -> None:
        """End processes at once, with their decoding workers."""
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in processes:
            process.wait()
