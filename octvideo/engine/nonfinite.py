"""Steps whose loss or gradient is not finite: skipped, reported, and after some of them the end of the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from octvideo.engine.checkpoint import write_atomic
from octvideo.engine.distributed import gather_objects
from octvideo.engine.log import Log


class NonFiniteError(RuntimeError):
    """Too many steps, or what a norm reads, were not finite; the message is the last report, or names the norm."""


class NonFinite:
    """At most `allowed` skipped steps in the run. Each leaves nonfinite_STEP.json in `folder`.

    path_of: a video's number in the list -> its path.
    """

    def __init__(self, allowed: int, folder: Path, path_of: Callable[[int], str], log: Log) -> None:
        self.allowed, self.folder, self.path_of, self.log = allowed, folder, path_of, log
        self.skipped = 0

    def report(self, step: int, lr: float, loss: Tensor, grad_norm: float, videos: list[int], scale: float) -> None:
        """Called on all ranks for the same step, which was skipped. Raises NonFiniteError on all where it was one too many.

        loss and videos: this rank's. scale: what the loss was multiplied with. Where that is above 1 and the losses are
        finite, a gradient that overflows is how a scaler finds its scale: noted as an event, not counted.
        """
        parts = gather_objects((float(loss), [self.path_of(video) for video in videos]))
        losses, paths = [loss for loss, _ in parts], [path for _, part in parts for path in part]
        if scale > 1 and all(map(math.isfinite, losses)):
            self.log.event("overflow", step, {"scale": scale})
            return
        self.skipped += 1
        numbers = {"loss": _plain(losses), "grad_norm": _plain([grad_norm])[0]}
        record = {"step": step, "lr": lr, "scale": scale, **numbers, "paths": paths}
        file = self.folder / f"nonfinite_{step:08d}.json"
        if self.log.main:
            write_atomic(file, (json.dumps(record, indent=1) + "\n").encode())
        said = (
            f"step {step} was skipped: loss {losses}, gradient norm {grad_norm:g}, learning rate {lr:.4g}; see {file}"
        )
        self.log.say(said)
        self.log.event("nonfinite", step, {"lr": lr, "scale": scale, "skipped": self.skipped})
        if self.skipped > self.allowed:
            raise NonFiniteError(
                f"{said}\n{self.skipped} step(s) of this run were not finite, and TRAIN.MAX_NONFINITE allows "
                f"{self.allowed}; lower SOLVER.BASE_LR, lengthen the warm-up, or set SOLVER.CLIP_NORM"
            )


def _plain(values: list[float]) -> list[float | str]:
    """JSON has no nan and inf."""
    return [value if math.isfinite(value) else str(value) for value in values]
