"""Clips that training could not decode and replaced by others: each file said once, all counted against a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from octvideo.engine.distributed import gather_objects
from octvideo.engine.log import Log
from octvideo.errors import RunError

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

    The first failure of each file goes to the log with its traceback, and to `file`, one reason a line.
    """

    def __init__(self, allowed: int, log: Log, file: Path) -> None:
        self.allowed, self.log, self.file = allowed, log, file
        self.reasons: dict[int, str] = {}
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.counts: Counter[int] = Counter()  # by video, over all ranks
        self.own: list[Failure] = []  # of this rank, not yet told to the others

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint in mid-epoch, after `share`."""
        return {"counts": dict(self.counts), "reasons": dict(self.reasons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts, self.reasons = Counter(state["counts"]), dict(state["reasons"])

    def add(self, failures: Sequence[Failure], step: int) -> None:
        """Take a batch's failures. Raises BudgetError where this rank alone has spent the budget."""
        self.own += failures
        if len(self.own) > self.allowed:
            self._take(self.own, step)

    def share(self, step: int) -> None:
        """Tell the other ranks; called by all at the same steps. Raises BudgetError on all of them together."""
        failures = [failure for part in gather_objects(self.own) for failure in part]
        self.own = []
        self._take(failures, step)

    def _take(self, failures: Sequence[Failure], step: int) -> None:
        for failure in failures:
            self.counts[failure.video] += 1
            if failure.video not in self.reasons:
                self.reasons[failure.video] = failure.reason
                self._tell(failure, step)
        if self.counts.total() > self.allowed:
            worst = [f"{self.reasons[video]} ({times} x)" for video, times in self.counts.most_common(WORST)]
            lines = "\n  ".join(worst)
            raise BudgetError(
                f"{self.counts.total()} clips of this epoch could not be decoded, by step {step}; "
                f"DATA.MAX_FAILED_FRACTION allows {self.allowed}. Most often:\n  {lines}\n"
                "take them off the list (python datasets/kinetics.py check finds them all) or allow more"
            )

    def _tell(self, failure: Failure, step: int) -> None:
        self.log.say(f"replaced a clip that cannot be decoded: {failure.reason}\n{failure.trace.rstrip()}")
        self.log.event("failed", step, {"video": failure.video, "reason": failure.reason})
        if self.log.main:
            with self.file.open("a") as file:
                file.write(failure.reason.replace("\n", " ") + "\n")
