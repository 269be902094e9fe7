"""Numbers of steps that stay on the device until a line of the log needs them, because every read waits for the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octvideo.engine.meter import Meter
from octvideo.engine.nonfinite import NonFinite


@dataclass(frozen=True)
class UnreadStep:
    """A step that was taken or, if its gradient is not finite, skipped.

    videos: list indices [N], on the CPU. On the device: loss [], mean over this rank's clips; correct [], right answers
    among them; grad_norm [] over all ranks; scale [], what the loss was multiplied with, None without a scaler.
    """

    step: int
    lr: float
    videos: Tensor
    loss: Tensor
    correct: Tensor
    grad_norm: Tensor
    scale: Tensor | None


class UnreadSteps:
    """Collect steps, and read all of them at once into a meter and the report of skipped steps."""

    def __init__(self, meter: Meter, nonfinite: NonFinite) -> None:
        self.meter, self.nonfinite = meter, nonfinite
        self._steps: list[UnreadStep] = []

    def add(self, step: UnreadStep) -> None:
        self._steps.append(step)

    def read(self) -> None:
        """Read the steps since the last call; called by all ranks at the same step. Raises NonFiniteError."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        numbers = torch.stack([torch.stack([step.loss, step.correct, step.grad_norm]) for step in steps]).cpu()
        for step, (loss, correct, norm) in zip(steps, numbers, strict=True):
            grad_norm = float(norm)
            if math.isfinite(grad_norm):
                self.meter.add(loss, correct, len(step.videos), grad_norm)
            else:
                scale = 1.0 if step.scale is None else float(step.scale)
                self.nonfinite.report(
                    step.step,
                    lr=step.lr,
                    loss=float(loss),
                    grad_norm=grad_norm,
                    videos=step.videos.tolist(),
                    scale=scale,
                )
