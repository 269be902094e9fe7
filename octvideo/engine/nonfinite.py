"""Steps whose gradient is not finite: skipped on the device, reported late, and after some of them the end of the run."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from octvideo.engine.checkpoint import write_atomic
from octvideo.engine.distributed import gather_objects
from octvideo.engine.log import Log


class NonFiniteError(RuntimeError):
    """Too many steps, or what a norm reads, were not finite; the message is the last report, or names the norm."""


class RunningStatistics:
    """The persistent buffers of a model, which a forward pass changes: the running statistics of its norms.

    Saved before a step and restored after it if the step is skipped, by a few large operators and without a read from
    the device.
    """

    def __init__(self, model: nn.Module) -> None:
        persistent = model.state_dict().keys()
        self._groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for name, buffer in model.named_buffers():
            if name in persistent and buffer.numel():
                self._groups[buffer.device, buffer.dtype].append(buffer)
        self._saved: list[Tensor] = []

    @torch.no_grad()
    def save(self) -> None:
        self._saved = [_flat(buffers) for buffers in self._groups.values()]

    @torch.no_grad()
    def restore_unless(self, finite: Tensor) -> None:
        """finite: bool [] on the device; False puts back the values of the last `save`."""
        for buffers, saved in zip(self._groups.values(), self._saved, strict=True):
            kept = torch.where(finite, _flat(buffers), saved)
            parts = kept.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(parts, buffers, strict=True)])


def _flat(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.reshape(-1) for buffer in buffers])


class StepMeter(Protocol):
    """Sums of an epoch, which counted every step as one that was taken."""

    def leave_out(self, clips: int) -> None: ...

    grad_norm: float


@dataclass(frozen=True)
class _Unread:
    """A step whose numbers are still on the device. scale: what its loss was multiplied with; None without a scaler."""

    step: int
    lr: float
    videos: Tensor
    loss: Tensor
    grad_norm: Tensor
    scale: Tensor | None


class NonFinite:
    """Report steps that were skipped, at most `allowed` in the run. Each leaves nonfinite_STEP.json in `folder`.

    A step is added with its numbers on the device, and read at the next line of the log or the next checkpoint, because
    a read waits for the device. path_of: a video's index in the list -> its path.
    """

    def __init__(self, allowed: int, folder: Path, path_of: Callable[[int], str], log: Log) -> None:
        self.allowed, self.folder, self.path_of, self.log = allowed, folder, path_of, log
        self.skipped = 0
        self._unread: list[_Unread] = []

    def add(
        self, step: int, *, lr: float, videos: Tensor, loss: Tensor, grad_norm: Tensor, scale: Tensor | None = None
    ) -> None:
        """videos [N], loss []: of this rank. grad_norm []: over all ranks. scale []: of the loss."""
        self._unread.append(_Unread(step, lr, videos, loss, grad_norm, scale))

    def read(self, meter: StepMeter) -> None:
        """Read the steps added since the last call: report those that were skipped and take them out of the meter's counts.

        Called by all ranks at the same step. Raises NonFiniteError on all of them where one step too many was skipped.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return
        for taken, grad_norm in zip(unread, torch.stack([step.grad_norm for step in unread]).tolist(), strict=True):
            if math.isfinite(grad_norm):
                meter.grad_norm = grad_norm
            else:
                meter.leave_out(len(taken.videos))
                self._report(taken, grad_norm)

    def _report(self, skipped: _Unread, grad_norm: float) -> None:
        """If the losses are finite and were scaled, the overflow is how a scaler finds its scale: logged and not counted."""
        step, lr, scale = skipped.step, skipped.lr, 1.0 if skipped.scale is None else float(skipped.scale)
        parts = gather_objects((float(skipped.loss), [self.path_of(video) for video in skipped.videos.tolist()]))
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
        report = (
            f"step {step} was skipped: loss {losses}, gradient norm {grad_norm:g}, learning rate {lr:.4g}; see {file}"
        )
        self.log.say(report)
        self.log.event("nonfinite", step, {"lr": lr, "scale": scale, "skipped": self.skipped})
        if self.skipped > self.allowed:
            raise NonFiniteError(
                f"{report}\n{self.skipped} step(s) of this run were not finite, and TRAIN.MAX_NONFINITE allows "
                f"{self.allowed}; lower SOLVER.BASE_LR, lengthen the warm-up, or set SOLVER.CLIP_NORM"
            )


def _plain(values: list[float]) -> list[float | str]:
    """Replace nan and inf, which JSON does not have, by text."""
    return [value if math.isfinite(value) else str(value) for value in values]
