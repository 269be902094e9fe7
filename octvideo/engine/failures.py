"""Clips that training could not decode and replaced: each file is logged once, all are counted against a budget."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from octvideo.engine.distributed import gather_objects
from octvideo.engine.log import Log
from octvideo.errors import RunError
from octvideo.files import append, write_atomic

WORST = 5  # files that the last message names


class BudgetError(RunError, RuntimeError):
    """More clips failed than may; the message names the files that failed most often."""


class Failure(Protocol):
    """video: its number in the list. reason: "LIST:LINE: PATH: what; remedy". trace: the traceback."""

    video: int
    reason: str
    trace: str


class FailureBudget:
    """At most `allowed` replaced clips an epoch, over all ranks.

    The first failure of each file goes to the log, and its traceback to `file`.
    """

    def __init__(self, allowed: int, log: Log, file: Path) -> None:
        self.allowed, self.log, self.file = allowed, log, file
        self.reasons: dict[int, str] = {}
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.counts: Counter[int] = Counter()  # by video, over all ranks
        self.unshared: list[tuple[int, Failure]] = []  # (step, failure) of this rank since the last `share`

    def state_dict(self) -> dict[str, Any]:
        """Return the counts within the epoch and the files that were logged, after `share`."""
        return {"counts": dict(self.counts), "reasons": dict(self.reasons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; `file` then has what was logged until it."""
        self.counts, self.reasons = Counter(state["counts"]), dict(state["reasons"])
        if self.log.main and self.file.exists():
            write_atomic(self.file, _entries(self.file, self.reasons.values()).encode("utf-8", "backslashreplace"))

    def start(self) -> None:
        """Start from scratch; remove the file of an earlier start, which left no checkpoint."""
        if self.log.main:
            self.file.unlink(missing_ok=True)

    def add(self, failures: Sequence[Failure], step: int) -> None:
        """Count a batch's failures. step: the one that the batch is for. Raises BudgetError if this rank alone has spent the
        budget."""
        self.unshared += [(step, failure) for failure in failures]
        if len(self.unshared) > self.allowed:
            self._count(self.unshared, step)

    def share(self, step: int) -> None:
        """Exchange the failures with the other ranks; called by all at the same steps. Raises BudgetError on all of them."""
        parts = gather_objects(self.unshared)
        self.unshared = []
        self._count(sorted((failure for part in parts for failure in part), key=lambda failure: failure[0]), step)

    def _count(self, failures: Sequence[tuple[int, Failure]], step: int) -> None:
        for at, failure in failures:
            self.counts[failure.video] += 1
            if failure.video not in self.reasons:
                self.reasons[failure.video] = failure.reason
                self._report(failure, at)
        if self.counts.total() > self.allowed:
            worst = [f"{self.reasons[video]} ({times} x)" for video, times in self.counts.most_common(WORST)]
            lines = "\n  ".join(worst)
            raise BudgetError(
                f"{self.counts.total()} clips of this epoch could not be decoded, by step {step}; "
                f"DATA.MAX_FAILED_FRACTION allows {self.allowed}. Most often:\n  {lines}\n"
                "remove them from the list (python datasets/kinetics.py check finds them all) or allow more"
            )

    def _report(self, failure: Failure, step: int) -> None:
        self.log.say(f"replaced a clip that cannot be decoded: {failure.reason}")
        self.log.note("failed", step, {"video": failure.video, "reason": failure.reason})
        if self.log.main:
            trace = "".join(f"  {line}\n" for line in failure.trace.rstrip().splitlines())
            append(self.file, f"{_one_line(failure.reason)}\n{trace}")


def _one_line(reason: str) -> str:
    return reason.replace("\n", " ")


def _entries(file: Path, reasons: Iterable[str]) -> str:
    """Return the first entry of each reason in `file`, with its traceback, whose lines are indented."""
    entries: dict[str, str] = {}
    for entry in re.split(r"\n(?! )", file.read_text(encoding="utf-8", errors="replace")):
        entries.setdefault(entry.partition("\n")[0], entry)
    known = [_one_line(reason) for reason in reasons]
    return "".join(f"{entries.get(reason, reason).rstrip()}\n" for reason in known)
