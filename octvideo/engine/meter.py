"""Loss, accuracy, speed and waiting time of a training run."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any, ClassVar

import torch
from torch import Tensor

from octvideo.engine.distributed import World, all_reduce
from octvideo.engine.metrics import Mean


class Meter:
    """Numbers of an epoch, and of the interval since the last line of the log."""

    def __init__(self, device: torch.device, world: World) -> None:
        self.device, self.world = device, world
        self.begin_epoch()
        self.start_clock()

    def begin_epoch(self) -> None:
        self.loss, self.correct = Mean(), Mean()
        self.interval_loss, self.interval_correct = Mean(), Mean()
        self.grad_norm: float | None = None

    def start_clock(self) -> None:
        """Start the times. They are of this process: those of an earlier one are not known."""
        self.wait = self.interval_waited = 0.0
        self.started = self.interval_started = time.perf_counter()
        self.steps = self.interval_steps = self.clips = 0
        self.before = self.loss.count
        self.interval_before = self.interval_loss.count
        self.shown = ""

    # names in a checkpoint -> attributes
    _SUMS: ClassVar = {
        "loss": "loss",
        "correct": "correct",
        "part_loss": "interval_loss",
        "part_correct": "interval_correct",
    }

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of this rank, and the gradient norm of the last step that was taken."""
        sums = {name: getattr(self, attribute).state_dict() for name, attribute in self._SUMS.items()}
        return {**sums, "grad_norm": self.grad_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, attribute in self._SUMS.items():
            getattr(self, attribute).load_state_dict(state[name])
        self.grad_norm = state.get("grad_norm")

    def timed(self, loader: Any, steps: int) -> Any:
        """Yield the first `steps` batches of the loader; the time spent waiting for them adds up in `wait`."""
        batches = iter(loader)
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            self.wait += time.perf_counter() - asked
            self.steps += 1
            self.clips += len(batch.labels)
            yield batch

    def add(self, loss: Tensor, correct: Tensor, clips: int, grad_norm: float) -> None:
        """Count a step that was taken: mean loss [] and number of right answers [] of this rank's clips."""
        self.grad_norm = grad_norm
        for losses, right in ((self.loss, self.correct), (self.interval_loss, self.interval_correct)):
            losses.add(loss * clips, clips)
            right.add(correct, clips)

    def since_last(self) -> dict[str, Any]:
        """Return numbers over all ranks since the last call; loss, top1 and grad_norm are None if no step was taken."""
        now, clips = time.perf_counter(), self.interval_loss.count - self.interval_before
        seconds, waited = now - self.interval_started, self.wait - self.interval_waited
        values = self._numbers(self.interval_loss, self.interval_correct, clips, seconds, waited)
        step_s = seconds / max(1, self.steps - self.interval_steps)
        grad_norm, self.grad_norm = self.grad_norm, None
        self.interval_loss, self.interval_correct = Mean(), Mean()
        self.interval_started, self.interval_waited, self.interval_before = now, self.wait, 0
        self.interval_steps = self.steps
        if self.loss.count:
            self.shown = f"loss {self.loss.value():.3f}, top-1 {100 * self.correct.value():.1f} %, "
        return {**values, "step_s": step_s, "memory_gb": peak_memory_gb(self.device), "grad_norm": grad_norm}

    def epoch(self) -> dict[str, Any]:
        """Return numbers over all ranks since the epoch began; loss and top1 are None if no step was taken."""
        seconds = time.perf_counter() - self.started
        return self._numbers(self.loss, self.correct, self.loss.count - self.before, seconds, self.wait)

    def _numbers(self, loss: Mean, correct: Mean, clips: int, seconds: float, wait: float) -> dict[str, Any]:
        """clips: those of this process, in these seconds."""
        sums = all_reduce(torch.stack([loss.pair(self.device), correct.pair(self.device)])).tolist()
        (loss_sum, count), (right, _) = sums
        return {
            "loss": loss_sum / count if count else None,
            "top1": 100.0 * right / count if count else None,
            "clips_per_s": clips * self.world.size / seconds,
            "data_wait": wait / seconds,
        }

    def line(self) -> str:
        """Return this rank's numbers for the bar: loss and accuracy of the epoch as of the last line of the log."""
        seconds = time.perf_counter() - self.started
        speed = self.clips * self.world.size / seconds
        return f"{self.shown}{speed:.1f} clips/s, data wait {100 * self.wait / seconds:.0f} %"


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory of this process, in 10**9 bytes: on a GPU what torch reserved there, else its resident
    memory, without that of its workers."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # of getrusage
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
