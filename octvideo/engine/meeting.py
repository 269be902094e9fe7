"""Notes that ranks leave in a store, so that a rank that hangs or has died is named by its number and host.

The store is kept by rank 0, under torchrun by its agent on rank 0's machine.
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from octvideo.errors import RunError
from octvideo.files import HOST, first_line

Result = TypeVar("Result")
ANSWER_S = 5.0
"""How long ranks are given to answer before they count as dead."""
GRACE_S = 15.0
"""How much longer than rank 0 the other ranks wait, since it may have begun to wait later."""
_WAITS = "waits for other ranks"
# Where a thread of Python is while it waits for other ranks.
_COLLECTIVES = ("torch/autograd/", "torch/distributed/", "torch/nn/parallel/distributed", "octvideo/engine/meeting")


class DistributedError(RunError, RuntimeError):
    """The environment of the processes contradicts itself, or some of them did not join."""


class Meeting:
    """What a rank writes to the store and reads there.

    answering: a second connection to the store, for a thread that answers other ranks. A connection serves one request at
    a time.
    """

    def __init__(self, store: dist.Store, answering: dist.Store, *, rank: int, size: int) -> None:
        self.store, self.rank, self.size, self.number = store, rank, size, 0
        self.hosts: list[str] = []
        self._answering, self._ended = answering, threading.Event()

    def open(self, timeout: timedelta) -> None:
        """Wait for all ranks, exchange hosts, and answer other ranks from now on. Raises DistributedError."""
        self.store.set(f"host/{self.rank}", HOST)
        self.wait("start", timeout)
        if self.rank == 0:
            hosts = [host.decode() for host in self.store.multi_get([f"host/{rank}" for rank in range(self.size)])]
            self.store.set("hosts", json.dumps(hosts))
        self.hosts = json.loads(self.store.get("hosts"))
        threading.Thread(target=self._answer, name="answer other ranks", daemon=True).start()

    def close(self) -> None:
        self._ended.set()

    def wait(self, what: str, timeout: timedelta) -> None:
        """Wait for every rank. Raises DistributedError, on all that wait, naming those that do not join in time."""
        self.number += 1
        try:
            missing = _within(timeout.total_seconds() + GRACE_S + ANSWER_S, lambda: self._missing(timeout))
        except (RuntimeError, TimeoutError) as error:  # RuntimeError: the base of torch's errors of stores and sockets
            raise DistributedError(
                f"{what}: {self.name(0)} is gone, or has not joined within {seconds(timeout)}; check its log"
            ) from error
        if missing:
            raise DistributedError(
                f"{what}: {self.names(missing)} did not join within {seconds(timeout)} ({self.size} ranks in total); check "
                "the log there, and the network connection to rank 0"
            )

    def _missing(self, timeout: timedelta) -> list[int]:
        """Note that this rank has joined; return those that have not when the time is over."""
        open_, joined = f"{self.number}/open", f"{self.number}/{self.rank}"
        self.store.set(joined, "")
        if self.rank == 0:
            missing = self._not_joined(timeout)
            self.store.set(open_, json.dumps(missing))
            if missing:
                time.sleep(1)  # the other ranks read it from this process, which is about to end
            self.store.delete_key(f"{self.number - 1}/open")  # all have read it, or they had not joined here
        else:
            self.store.wait([open_], timeout + timedelta(seconds=GRACE_S))
            missing = json.loads(self.store.get(open_))
        self.store.delete_key(joined)
        return missing

    def _not_joined(self, timeout: timedelta) -> list[int]:
        end = time.monotonic() + timeout.total_seconds()
        missing = []
        for rank in range(self.size):
            key = f"{self.number}/{rank}"
            try:
                self.store.wait([key], timedelta(seconds=max(end - time.monotonic(), 0.001)))
            except RuntimeError:
                if not self.store.check([key]):
                    missing.append(rank)
        return missing

    def explain(self, error: BaseException) -> DistributedError:
        """Return the error that names the ranks which are the cause of `error`, an error of torch in a collective.

        Takes some seconds: one rank asks all others, which also get its result.
        """
        try:
            verdict = _within(2 * ANSWER_S, self._verdict)
        except (RuntimeError, TimeoutError):
            verdict = f"no answer from {self.name(0)}: its process ended or is stopped, or the machine is lost"
        return DistributedError(f"{verdict} ({_reason(error)})")

    def _verdict(self) -> str:
        self._note(_WAITS)
        if self.store.add("investigators", 1) > 1:
            self.store.wait(["verdict"], timedelta(seconds=1.5 * ANSWER_S))
            return self.store.get("verdict").decode()
        self.store.set("question", "")
        end = time.monotonic() + ANSWER_S
        while time.monotonic() < end and self.store.add("notes", 0) < self.size:
            time.sleep(0.1)
        verdict = self._judge(self._found("note"), self._found("answer"))
        self.store.set("verdict", verdict)
        if self.rank == 0:
            time.sleep(1)  # the other ranks read it from this process, which is about to end
        return verdict

    def report(self, error: BaseException) -> None:
        """Note that this rank fails, and why, for the ranks that will wait for it."""
        with contextlib.suppress(RuntimeError, TimeoutError):  # nobody is left to read it
            _within(ANSWER_S, lambda: self._note(f"failed: {type(error).__name__}: {first_line(error)}"))

    def _note(self, text: str) -> None:
        self.store.set(f"note/{self.rank}", text)
        self.store.add("notes", 1)

    def _found(self, kind: str) -> dict[int, str]:
        keys = {rank: f"{kind}/{rank}" for rank in range(self.size)}
        return {rank: self.store.get(key).decode() for rank, key in keys.items() if self.store.check([key])}

    def _judge(self, notes: dict[int, str], answers: dict[int, str]) -> str:
        """Return what is known of the ranks that others wait for. notes: of main threads; answers: where they are."""
        failed = {rank: note for rank, note in notes.items() if note != _WAITS}
        if failed:
            return "; ".join(f"{self.name(rank)} {note}" for rank, note in list(failed.items())[:3])
        silent = [rank for rank in range(self.size) if rank not in notes and rank not in answers]
        if silent:
            return f"no answer from {self.names(silent)}: its process ended or is stopped, or the machine is lost"
        absent = {rank: place for rank, place in answers.items() if rank not in notes and place != _WAITS}
        if absent:
            return f"did not join the other ranks: {self.names(list(absent))} (at {next(iter(absent.values()))})"
        return "all ranks answer, but they cannot exchange data: check the network between their machines"

    def _answer(self) -> None:
        """Answer the question of another rank, once, from a separate thread: with the place of the main thread."""
        with contextlib.suppress(RuntimeError):  # the store is gone, and so is the run
            while not self._ended.wait(ANSWER_S / 5):
                if self._answering.check(["question"]):
                    self._answering.set(f"answer/{self.rank}", _place(threading.main_thread()))
                    return

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}" if self.hosts else f"rank {rank}"

    def names(self, ranks: Sequence[int]) -> str:
        shown = ", ".join(map(self.name, ranks[:20]))
        return shown + (f" and {len(ranks) - 20} more" if len(ranks) > 20 else "")


def is_of_ranks(error: BaseException) -> bool:
    """True for torch's errors in a collective that other ranks may be the cause of."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def seconds(timeout: timedelta) -> str:
    return f"{timeout.total_seconds():g} s"


def _reason(error: BaseException) -> str:
    """Return the first sentence of torch's text, without the file of gloo that it is from."""
    return re.sub(r"^\[[^]]*\] ", "", first_line(error)).split(". ")[0]


def _place(thread: threading.Thread) -> str:
    """Return file, line and function where a thread is, or that it waits for other ranks."""
    frames = [
        frame for frame, _ in traceback.walk_stack(sys._current_frames().get(thread.ident or 0))
    ]  # innermost first
    if any(part in frame.f_code.co_filename for frame in frames for part in _COLLECTIVES):
        return _WAITS
    frame = next((frame for frame in frames if "octvideo" in frame.f_code.co_filename), frames[0])
    return f"{frame.f_code.co_filename}:{frame.f_lineno}, {frame.f_code.co_name}"


def _within(limit_s: float, call: Callable[[], Result]) -> Result:
    """Return what call() returns. Raises TimeoutError if that takes too long.

    A store does not keep to its time limits if the process that keeps it is stopped.
    """
    answers: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except Exception as error:  # noqa: BLE001  # raised again in the caller's thread
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = answers.get(timeout=limit_s)
    except queue.Empty:
        raise TimeoutError from None
    if error:
        raise error
    return result
