"""Steps whose gradient is not finite: skipped on the device, reported, and after some of them the end of the run."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from octvideo.engine.distributed import gather_objects
from octvideo.engine.log import Log
from octvideo.errors import RunError
from octvideo.files import write_atomic


class NonFiniteError(RunError, RuntimeError):
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


class NonFinite:
    """Report skipped steps, at most `allowed` in the run. Each leaves nonfinite_STEP.json in `folder`.

    path_of: a video's index in the list -> its path.
    """

    def __init__(self, allowed: int, folder: Path, path_of: Callable[[int], str], log: Log) -> None:
        self.allowed, self.folder, self.path_of, self.log = allowed, folder, path_of, log
        self.skipped = 0

    def resume(self, step: int, skipped: int) -> None:
        """Continue after `step`, with `skipped` steps so far; remove the reports of later steps, which will be repeated."""
        self.skipped = skipped
        if self.log.main:
            for file in self.folder.glob("nonfinite_*.json"):
                if (number := file.stem.removeprefix("nonfinite_")).isdecimal() and int(number) > step:
                    file.unlink(missing_ok=True)

    def report(self, step: int, *, lr: float, loss: float, grad_norm: float, videos: list[int], scale: float) -> None:
        """Called by all ranks for the same skipped step. Raises NonFiniteError on all of them for one step too many.

        loss and videos: of this rank. scale: what the loss was multiplied with. If that is above 1 and the losses are
        finite, the overflow is how a scaler finds its scale: logged and not counted.
        """
        parts = gather_objects((loss, [self.path_of(video) for video in videos]))
        losses, paths = [loss for loss, _ in parts], [path for _, part in parts for path in part]
        if scale > 1 and all(map(math.isfinite, losses)):
            self.log.note("overflow", step, {"scale": scale})
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
        self.log.note("nonfinite", step, {"lr": lr, "scale": scale, "skipped": self.skipped})
        if self.skipped > self.allowed:
            raise NonFiniteError(
                f"{report}\n{self.skipped} step(s) of this run were not finite, and TRAIN.MAX_NONFINITE allows "
                f"{self.allowed}; lower SOLVER.BASE_LR, lengthen the warm-up, or set SOLVER.CLIP_NORM"
            )


def _plain(values: list[float]) -> list[float | str]:
    """Replace nan and inf, which JSON does not have, by text."""
    return [value if math.isfinite(value) else str(value) for value in values]
