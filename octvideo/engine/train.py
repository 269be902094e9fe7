"""The training loop: `fit` is the loop, `train_step` is the step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from octvideo.engine.distributed import World
from octvideo.engine.failures import FailureBudget
from octvideo.engine.log import Log, bar, duration
from octvideo.engine.meter import Meter
from octvideo.engine.metrics import topk_correct
from octvideo.engine.nonfinite import RunningStatistics
from octvideo.engine.optim import SGD, set_lr
from octvideo.engine.prefetch import on_device
from octvideo.engine.stop import Stopped
from octvideo.engine.unread import UnreadStep, UnreadSteps
from octvideo.errors import RunError


class TrainingError(RunError, RuntimeError):
    """The run cannot go on; the message says at which step and why."""


Loss = Callable[[Tensor, Tensor], Tensor]


class ClipBatch(Protocol):
    """What the loop reads of a batch.

    clips: uint8 [N, V, C, (T,) H, W]. labels: int64 [N]. videos: list indices [N]. errors: one per dropped clip.
    replaced: failures of clips that were replaced.
    """

    clips: Tensor
    labels: Tensor
    videos: Tensor
    errors: list[str]
    replaced: list[Any]


class EpochLoader(Protocol):
    """A loader of ClipBatch. Its batch sampler takes the epoch and the number of clips of it that were used (set_epoch);
    its length is the steps left, and global_batch the clips of a step."""

    batch_sampler: Any

    def __iter__(self) -> Any: ...


@dataclass
class Progress:
    """Completed epochs, completed steps, and clips of the current epoch that completed steps have used.

    Clips of all ranks are counted, not steps: the batch size may change within an epoch.
    """

    epoch: int = 0
    step: int = 0
    clips_in_epoch: int = 0


@dataclass(frozen=True)
class EpochPlan:
    """The steps that this process takes of an epoch: `steps` of `batch` clips each, after `start` clips.

    total: clips of the complete epoch; an incomplete last batch is left out.
    """

    start: int
    batch: int
    steps: int
    total: int

    @property
    def end(self) -> int:
        """Return the clips used when the steps are completed."""
        return self.start + self.steps * self.batch

    def progress(self, clips: int) -> float:
        """Return the share of the epoch that `clips` are."""
        return clips / self.total if self.total else 1.0


def plan_epoch(batches: Any, progress: Progress, epochs: float) -> EpochPlan:
    """Choose the current epoch and position in the batch sampler; return the steps to take until `epochs` or its end."""
    batches.set_epoch(progress.epoch, progress.clips_in_epoch)
    batch, start, left = batches.global_batch, progress.clips_in_epoch, len(batches)
    total = start + left * batch
    end = round((epochs - progress.epoch) * (total / batch)) * batch  # of a last epoch that is not complete
    return EpochPlan(start, batch, max(0, min(left, math.ceil((end - start) / batch))), total)


@dataclass(frozen=True)
class Precision:
    """How a step computes.

    accumulate: parts that a rank's batch is split into, one forward and backward pass each, for less memory; their
    gradients add up to those of the complete batch. clip_norm: largest norm of the gradient, 0 for no limit. dtype: of
    convolutions and products; weights, statistics of norms and the loss stay float32. scaler: multiplies the loss, which
    float16 needs, or small gradients become 0.
    """

    accumulate: int = 1
    clip_norm: float = 0.0
    dtype: torch.dtype = torch.float32
    scaler: torch.amp.GradScaler | None = None

    def scale(self, device: torch.device) -> Tensor | None:
        """Return the factor of the next step's loss, float32 [] on the device, None without a scaler. Reads nothing back."""
        return self.scaler.scale(torch.ones((), device=device)) if self.scaler else None


class Step(NamedTuple):
    """What a step computed, on the device; a read of it waits for the step.

    loss: [] mean over the batch. logits: float32 [N, K]. grad_norm: [] before clipping. finite: bool [], False if the
    gradient's norm is not finite and the step was skipped.
    """

    loss: Tensor
    logits: Tensor
    grad_norm: Tensor
    finite: Tensor


def train_step(
    model: nn.Module,
    optimizer: SGD,
    clips: Tensor,
    targets: Tensor,
    lr: float,
    loss: Loss,
    precision: Precision = Precision(),
    statistics: RunningStatistics | None = None,
) -> Step:
    """Take one SGD step on normalized clips [N, C, (T,) H, W] and targets, labels [N] or probabilities [N, K].

    If the gradient's norm is not finite, the device leaves weights, momentum and running statistics unchanged. Gradients are
    summed over the ranks, so all ranks skip the same steps. The host reads nothing back. statistics: of `model`; a loop
    creates them once.
    """
    statistics = statistics or RunningStatistics(model)
    set_lr(optimizer, lr)
    optimizer.zero_grad(set_to_none=True)
    statistics.save()
    value, logits = _forward_backward(model, clips, targets, loss, precision)
    if precision.scaler:
        precision.scaler.unscale_(optimizer)
    weights = [weight for weight in model.parameters() if weight.grad is not None]
    grad_norm = nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None], foreach=True)
    if precision.clip_norm:
        nn.utils.clip_grads_with_norm_(weights, precision.clip_norm, grad_norm, foreach=True)
    finite = grad_norm.isfinite()
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    statistics.restore_unless(finite)
    if precision.scaler:
        precision.scaler.update()
    return Step(value, logits, grad_norm, finite)


def _forward_backward(
    model: nn.Module, clips: Tensor, targets: Tensor, loss: Loss, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Add the gradients of the batch to the weights, part by part; return the mean loss [] and logits [N, K]."""
    parts = list(zip(clips.chunk(precision.accumulate), targets.chunk(precision.accumulate), strict=True))
    values, outputs = [], []
    for number, (inputs, wanted) in enumerate(parts, 1):
        alone = isinstance(model, DistributedDataParallel) and number < len(parts)
        with model.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]  # gradients meet at the last
            with torch.autocast(clips.device.type, precision.dtype, enabled=precision.dtype != torch.float32):
                logits = model(inputs)
            value = loss(logits.float(), wanted) * (len(inputs) / len(clips))
            (precision.scaler.scale(value) if precision.scaler else value).backward()
        values.append(value.detach())
        outputs.append(logits.detach().to(torch.float32, copy=True))  # a CUDA graph overwrites its outputs
    return torch.stack(values).sum(), torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def fit(
    model: nn.Module,
    optimizer: SGD,
    loader: EpochLoader,
    *,
    progress: Progress,
    meter: Meter,
    epochs: float,
    lr_at: Callable[[float], float],
    prepare: Callable[[Tensor], Tensor],
    mix: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
    loss: Loss,
    precision: Precision,
    freeze_norm_stats: bool,
    failures: FailureBudget,
    unread: UnreadSteps,
    device: torch.device,
    world: World,
    log: Log,
    log_period: int,
    after_step: Callable[[], None],
    after_epoch: Callable[[dict[str, float]], None],
) -> None:
    """Train from `progress` to `epochs`; update `progress`, `meter` and `failures`, which a checkpoint holds.

    Between two lines of the log no step reads anything back from the device.

    epochs: passes over the data; 0.25 of a last one means the first quarter of its steps.
    lr_at: completed epochs, with fractions -> learning rate. prepare: uint8 clips on the device -> network input.
    mix: network input, labels and step -> input and targets of the step. loss: logits and targets -> mean loss.
    freeze_norm_stats: norms use their running statistics and leave them unchanged.
    after_step: called when progress has been updated (checkpoint, stop). after_epoch: called with the epoch's numbers
    (validation, checkpoint); if it raises Stopped, progress returns to the epoch's last step, so that a resumed run ends the
    epoch again. failures: collects replaced clips. unread: collects the steps' numbers for `meter`. Both raise if
    there are too many failures or skipped steps. Raises TrainingError for a clip that could not be replaced.
    """
    statistics = RunningStatistics(model)
    started, first = time.perf_counter(), None
    for epoch in range(progress.epoch, math.ceil(epochs)):
        plan = plan_epoch(loader.batch_sampler, progress, epochs)
        first = epoch + plan.progress(plan.start) if first is None else first
        if not plan.start:
            failures.begin_epoch()
            meter.begin_epoch()
        meter.start_clock()
        model.train()
        if freeze_norm_stats:
            for norm in (module for module in model.modules() if isinstance(module, _BatchNorm)):
                norm.eval()
        title = f"epoch {epoch + 1}/{math.ceil(epochs)}"
        with bar(plan.end // plan.batch, title, unit="step", main=world.main) as shown:
            shown.update(plan.start // plan.batch)
            for batch, clips, labels in on_device(_intact(meter.timed(loader, plan.steps)), device):
                failures.add(batch.replaced, progress.step + 1)
                lr = lr_at(epoch + plan.progress(progress.clips_in_epoch))
                clips, targets = mix(prepare(clips.flatten(0, 1)), labels, progress.step)
                scale = precision.scale(device)
                step = train_step(model, optimizer, clips, targets, lr, loss, precision, statistics)
                progress.step += 1
                progress.clips_in_epoch += plan.batch
                done = epoch + plan.progress(progress.clips_in_epoch)
                correct = topk_correct(step.logits, labels, 1).sum()
                unread.add(UnreadStep(progress.step, lr, batch.videos, step.loss, correct, step.grad_norm, scale))
                ends = progress.clips_in_epoch == plan.end
                if ends or progress.step % log_period == 0:
                    unread.read()
                    failures.share(progress.step)
                    values = {"epoch": done, "lr": lr, **meter.since_last()}
                    log.event("train", progress.step, values if scale is None else {**values, "scale": float(scale)})
                    if not ends:  # then the epoch's line follows
                        log.step_line(progress.step, values)
                eta = (time.perf_counter() - started) / (done - first) * (epochs - done)
                shown.set_postfix_str(f"{meter.line()}, {duration(eta)} left of the run", refresh=False)
                shown.update()
                after_step()
        progress.epoch, progress.clips_in_epoch = epoch + 1, 0
        try:
            last_lr = lr_at(epoch + plan.progress(max(plan.end - plan.batch, 0)))
            after_epoch({"lr": last_lr, **meter.epoch()})
        except Stopped:
            progress.epoch, progress.clips_in_epoch = epoch, plan.end
            raise


def _intact(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches; raise TrainingError for one with a clip that could be neither read nor replaced."""
    for batch in batches:
        if batch.errors:
            raise TrainingError(batch.errors[0])
        yield batch
