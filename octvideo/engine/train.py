"""The training loop: `fit` is the loop, `train_step` is the step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from octvideo.engine.distributed import World, all_reduce
from octvideo.engine.failures import FailureBudget
from octvideo.engine.log import Log, bar, duration
from octvideo.engine.metrics import Mean, topk_correct
from octvideo.engine.optim import set_lr


class TrainingError(RuntimeError):
    """The run cannot go on; the message says at which step and why."""


Loss = Callable[[Tensor, Tensor], Tensor]


class ClipBatch(Protocol):
    """What the loop reads of a batch: clips [N, V, C, (T,) H, W] uint8, labels [N], errors of clips left out, and
    failures of clips that others stand for."""

    clips: Tensor
    labels: Tensor
    errors: list[str]
    replaced: list[Any]


class EpochLoader(Protocol):
    """A loader of ClipBatch whose batch sampler takes the epoch."""

    batch_sampler: Any

    def __iter__(self) -> Any: ...


@dataclass
class Progress:
    """Epochs and steps done."""

    epoch: int = 0
    step: int = 0


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, clips: Tensor, targets: Tensor, lr: float, loss: Loss
) -> tuple[Tensor, Tensor]:
    """One SGD step on normalized clips [N, C, (T,) H, W] and targets, labels [N] or shares [N, K] -> loss, logits."""
    set_lr(optimizer, lr)
    logits = model(clips)
    value = loss(logits, targets)
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    optimizer.step()
    return value.detach(), logits.detach()


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: EpochLoader,
    *,
    progress: Progress,
    epochs: int,
    lr_at: Callable[[float], float],
    prepare: Callable[[Tensor], Tensor],
    mix: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
    loss: Loss,
    failures: FailureBudget,
    device: torch.device,
    world: World,
    log: Log,
    log_period: int,
    after_epoch: Callable[[dict[str, float]], None],
) -> None:
    """Train from `progress` to `epochs`, updating `progress`.

    lr_at: epochs done, with fractions -> learning rate. prepare: uint8 clips on the device -> network input.
    mix: network input, labels and step -> input and targets of the step. loss: logits and targets -> mean loss.
    after_epoch: called with the epoch's numbers when progress has moved on (validation, checkpoint).
    failures: takes those of clips that were replaced. Raises BudgetError where there are too many, TrainingError for a
    clip that could not even be replaced or a loss that is not finite.
    """
    first = progress.epoch
    started = time.perf_counter()
    for epoch in range(first, epochs):
        loader.batch_sampler.set_epoch(epoch)
        failures.begin_epoch()
        model.train()
        meter = _Meter(device, world)
        steps = len(loader.batch_sampler) if isinstance(loader.batch_sampler, Sized) else 0
        with bar(steps, f"epoch {epoch + 1}/{epochs}", unit="step", main=world.main) as shown:
            for index, batch in enumerate(meter.timed(loader)):
                if batch.errors:
                    raise TrainingError(batch.errors[0])
                failures.add(batch.replaced, progress.step)
                clips = prepare(batch.clips.flatten(0, 1).to(device, non_blocking=True))
                labels = batch.labels.to(device, non_blocking=True)
                lr = lr_at(epoch + index / steps)
                clips, targets = mix(clips, labels, progress.step)
                value, logits = train_step(model, optimizer, clips, targets, lr, loss)
                progress.step += 1
                meter.add(value, topk_correct(logits, labels, 1).sum(), len(labels))
                if progress.step % log_period == 0 or index + 1 == steps:
                    failures.share(progress.step)
                    values = {"epoch": epoch + (index + 1) / steps, "lr": lr, **meter.since_last()}
                    _require_finite(values["loss"], progress.step)
                    log.event("train", progress.step, values)
                done = epoch - first + (index + 1) / steps
                eta = (time.perf_counter() - started) / done * (epochs - first - done)
                shown.set_postfix_str(f"{meter.line()}, whole run {duration(eta)} left", refresh=False)
                shown.update()
        progress.epoch = epoch + 1
        after_epoch({"lr": lr_at(epoch), **meter.epoch()})


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingError(f"the loss is {loss} near step {step}; lower SOLVER.BASE_LR or lengthen the warm-up")


class _Meter:
    """Loss, accuracy, speed and data wait of an epoch, and of the part since the last line."""

    def __init__(self, device: torch.device, world: World) -> None:
        self.device, self.world = device, world
        self.wait = 0.0
        self.started = time.perf_counter()
        self.loss, self.correct = Mean(), Mean()
        self.part = (Mean(), Mean(), self.started, 0.0)
        self.shown = ("", 0.0)

    def timed(self, loader: EpochLoader) -> Any:
        """The batches of the loader; the time spent waiting for them adds up in `wait`."""
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.wait += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def add(self, loss: Tensor, correct: Tensor, count: int) -> None:
        for mean, total in ((self.loss, loss * count), (self.correct, correct)):
            mean.add(total, count)
        self.part[0].add(loss * count, count)
        self.part[1].add(correct, count)

    def since_last(self) -> dict[str, float]:
        """Numbers over all ranks since the last call."""
        loss, correct, started, waited = self.part
        values = self._numbers(loss, correct, time.perf_counter() - started, self.wait - waited)
        self.part = (Mean(), Mean(), time.perf_counter(), self.wait)
        return values

    def epoch(self) -> dict[str, float]:
        """Numbers over all ranks since the epoch began."""
        return self._numbers(self.loss, self.correct, time.perf_counter() - self.started, self.wait)

    def _numbers(self, loss: Mean, correct: Mean, seconds: float, wait: float) -> dict[str, float]:
        sums = all_reduce(torch.stack([loss.pair(self.device), correct.pair(self.device)]))
        count = float(sums[0, 1])
        return {
            "loss": float(sums[0, 0]) / count,
            "top1": 100.0 * float(sums[1, 0]) / count,
            "clips_per_s": count / seconds,
            "data_wait": wait / seconds,
        }

    def line(self) -> str:
        """This rank's numbers for the bar; read from the device twice a second at most."""
        now = time.perf_counter()
        text, read = self.shown
        if now - read > 0.5:
            seconds = now - self.started
            speed = self.loss.count * self.world.size / seconds
            text = (
                f"loss {self.loss.value():.3f}, top-1 {100 * self.correct.value():.1f} %, {speed:.1f} clips/s, "
                f"data wait {100 * self.wait / seconds:.0f} %"
            )
            self.shown = (text, now)
        return text
