"""The training loop: `fit` is the loop, `train_step` is the step."""

from __future__ import annotations

import contextlib
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from octvideo.engine.distributed import World, all_reduce, all_reduce_max
from octvideo.engine.failures import FailureBudget
from octvideo.engine.log import Log, bar, duration
from octvideo.engine.metrics import Mean, topk_correct
from octvideo.engine.nonfinite import NonFinite
from octvideo.engine.optim import set_lr


class TrainingError(RuntimeError):
    """The run cannot go on; the message says at which step and why."""


Loss = Callable[[Tensor, Tensor], Tensor]


class ClipBatch(Protocol):
    """What the loop reads of a batch: clips [N, V, C, (T,) H, W] uint8, labels [N], numbers of the videos
    [N], errors of clips left out, and failures of clips that others stand for."""

    clips: Tensor
    labels: Tensor
    videos: Tensor
    errors: list[str]
    replaced: list[Any]


class EpochLoader(Protocol):
    """A loader of ClipBatch. Its batch sampler takes the epoch and the step to begin at; its length is the steps left."""

    batch_sampler: Any

    def __iter__(self) -> Any: ...


@dataclass
class Progress:
    """Epochs and steps done, and the steps done of the epoch that is not."""

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0


class Stopped(Exception):
    """The run was asked to stop by a signal."""

    def __init__(self, signal_number: int, step: int) -> None:
        self.signal_number = signal_number
        super().__init__(f"stopped by {signal.Signals(signal_number).name} at step {step}")


class StopRequest:
    """Notes a signal, so that the run can end between two batches. A second one of the same kind ends the process."""

    def __init__(self, signals: Sequence[int] = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)) -> None:
        self.signals, self.received = signals, 0

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in getattr(self, "before", {}).items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    def check(self, device: torch.device, step: int) -> None:
        """Raises Stopped on all ranks where any has received a signal; called by all of them, equally often."""
        received = int(all_reduce_max(torch.tensor(self.received, device=device)))
        if received:
            raise Stopped(received, step)


@dataclass(frozen=True)
class Precision:
    """How a step computes. accumulate: parts that a rank's batch is taken in, one after the other, for less memory; their
    gradients add up to the whole batch's. clip_norm: most that the gradient's norm may be, 0 for no limit. dtype: of
    convolutions and products; weights, norms' statistics and the loss stay float32. scaler: float16 needs one, or small
    gradients vanish; it changes the scale of the loss from step to step."""

    accumulate: int = 1
    clip_norm: float = 0.0
    dtype: torch.dtype = torch.float32
    scaler: torch.amp.GradScaler | None = None

    @property
    def scale(self) -> float:
        """What the loss of the next step is multiplied with."""
        return self.scaler.get_scale() if self.scaler else 1.0


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    clips: Tensor,
    targets: Tensor,
    lr: float,
    loss: Loss,
    precision: Precision = Precision(),
) -> tuple[Tensor, Tensor, float]:
    """One SGD step on normalized clips [N, C, (T,) H, W] and targets, labels [N] or shares [N, K].

    Returns mean loss, logits and the gradient's norm before clipping. Where that is not finite weights and norms'
    statistics stay as they were; gradients are summed over ranks, so all ranks see the same.
    """
    set_lr(optimizer, lr)
    optimizer.zero_grad(set_to_none=True)
    # A batch that is not finite would stay in norms' statistics.
    buffers = [buffer.clone() for buffer in model.buffers()]
    values, parts = [], list(zip(clips.chunk(precision.accumulate), targets.chunk(precision.accumulate), strict=True))
    outputs = []
    for number, (some, wanted) in enumerate(parts, 1):
        alone = isinstance(model, DistributedDataParallel) and number < len(parts)
        with model.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]  # ranks meet at the last
            with torch.autocast(clips.device.type, precision.dtype, enabled=precision.dtype != torch.float32):
                logits = model(some)
            value = loss(logits.float(), wanted) * (len(some) / len(clips))
            (precision.scaler.scale(value) if precision.scaler else value).backward()
        values.append(value.detach())
        outputs.append(logits.detach().float())
    if precision.scaler:
        precision.scaler.unscale_(optimizer)
    limit = precision.clip_norm or math.inf
    grad_norm = float(nn.utils.clip_grad_norm_(model.parameters(), limit))
    if precision.scaler:
        precision.scaler.update()
    if math.isfinite(grad_norm):
        optimizer.step()
    else:
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    return torch.stack(values).sum(), torch.cat(outputs), grad_norm


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
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
    nonfinite: NonFinite,
    device: torch.device,
    world: World,
    log: Log,
    log_period: int,
    after_step: Callable[[], None],
    after_epoch: Callable[[dict[str, float]], None],
) -> None:
    """Train from `progress` to `epochs`, updating `progress`, `meter` and `failures`: what a checkpoint in mid-epoch holds.

    epochs: passes over the data; of a last one that is not whole, 0.25 say, the first quarter of the steps is taken.
    lr_at: epochs done, with fractions -> learning rate. prepare: uint8 clips on the device -> network input.
    mix: network input, labels and step -> input and targets of the step. loss: logits and targets -> mean loss.
    freeze_norm_stats: norms use their running statistics and leave them as they are.
    after_step: called when progress has moved on (checkpoint, stop). after_epoch: with the epoch's numbers (validation,
    checkpoint); where it raises Stopped, progress is put back to the epoch's last step, to go on from. failures: takes those
    of clips that were replaced; nonfinite: steps that were skipped. Both raise where there are too many, and TrainingError
    is raised for a clip that could not even be replaced.
    """
    first = progress.epoch + progress.step_in_epoch / max(1, _steps(loader, progress.epoch, 0))
    started = time.perf_counter()
    for epoch in range(progress.epoch, math.ceil(epochs)):
        steps = _steps(loader, epoch, 0)
        last_step = min(steps, round((epochs - epoch) * steps))
        loader.batch_sampler.set_epoch(epoch, progress.step_in_epoch)
        if not progress.step_in_epoch:
            failures.begin_epoch()
            meter.begin_epoch()
        meter.start_clock()
        model.train()
        if freeze_norm_stats:
            for norm in (module for module in model.modules() if isinstance(module, _BatchNorm)):
                norm.eval()
        with bar(last_step, f"epoch {epoch + 1}/{math.ceil(epochs)}", unit="step", main=world.main) as shown:
            shown.update(progress.step_in_epoch)
            for batch in meter.timed(loader, last_step - progress.step_in_epoch):
                if batch.errors:
                    raise TrainingError(batch.errors[0])
                failures.add(batch.replaced, progress.step)
                clips = prepare(batch.clips.flatten(0, 1).to(device, non_blocking=True))
                labels = batch.labels.to(device, non_blocking=True)
                lr = lr_at(epoch + progress.step_in_epoch / steps)
                clips, targets = mix(clips, labels, progress.step)
                scale = precision.scale
                value, logits, grad_norm = train_step(model, optimizer, clips, targets, lr, loss, precision)
                progress.step += 1
                progress.step_in_epoch += 1
                done = epoch + progress.step_in_epoch / steps
                if math.isfinite(grad_norm):
                    meter.add(value, topk_correct(logits, labels, 1).sum(), len(labels), grad_norm)
                else:
                    nonfinite.report(progress.step, lr, value, grad_norm, batch.videos.tolist(), scale)
                if progress.step % log_period == 0 or progress.step_in_epoch == last_step:
                    failures.share(progress.step)
                    values = {"epoch": done, "lr": lr, **meter.since_last()}
                    log.event("train", progress.step, {**values, **({"scale": scale} if precision.scaler else {})})
                    log.step_line(progress.step, values)
                eta = (time.perf_counter() - started) / (done - first) * (epochs - done)
                shown.set_postfix_str(f"{meter.line()}, whole run {duration(eta)} left", refresh=False)
                shown.update()
                after_step()
        progress.epoch, progress.step_in_epoch = epoch + 1, 0
        try:
            after_epoch({"lr": lr_at(epoch), **meter.epoch()})
        except Stopped:
            progress.epoch, progress.step_in_epoch = epoch, last_step
            raise


def _steps(loader: EpochLoader, epoch: int, start_step: int) -> int:
    """Steps of an epoch from start_step on."""
    loader.batch_sampler.set_epoch(epoch, start_step)
    return len(loader.batch_sampler)


class Meter:
    """Loss, accuracy, speed and data wait of an epoch, and of the part since the last line."""

    def __init__(self, device: torch.device, world: World) -> None:
        self.device, self.world = device, world
        self.begin_epoch()
        self.start_clock()

    def begin_epoch(self) -> None:
        self.loss, self.correct = Mean(), Mean()
        self.part_loss, self.part_correct = Mean(), Mean()
        self.grad_norm = 0.0

    def start_clock(self) -> None:
        """Times are of this process: what an earlier one took is not known to it."""
        self.wait = self.part_waited = 0.0
        self.started = self.part_started = time.perf_counter()
        self.steps = self.part_steps = 0
        self.before = self.loss.count
        self.part_before = self.part_loss.count
        self.shown = ("", 0.0)

    def state_dict(self) -> dict[str, Any]:
        """The sums of this rank."""
        return {name: getattr(self, name).state_dict() for name in self._SUMS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self._SUMS:
            getattr(self, name).load_state_dict(state[name])

    _SUMS = ("loss", "correct", "part_loss", "part_correct")

    def timed(self, loader: EpochLoader, steps: int) -> Any:
        """The first `steps` batches of the loader; the time spent waiting for them adds up in `wait`."""
        batches = iter(loader)
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            self.wait += time.perf_counter() - asked
            self.steps += 1
            yield batch

    def add(self, loss: Tensor, correct: Tensor, count: int, grad_norm: float) -> None:
        self.grad_norm = grad_norm
        for losses, right in ((self.loss, self.correct), (self.part_loss, self.part_correct)):
            losses.add(loss * count, count)
            right.add(correct, count)

    def since_last(self) -> dict[str, float]:
        """Numbers over all ranks since the last call."""
        now, clips = time.perf_counter(), self.part_loss.count - self.part_before
        values = self._numbers(
            self.part_loss, self.part_correct, clips, now - self.part_started, self.wait - self.part_waited
        )
        step_s = (now - self.part_started) / max(1, self.steps - self.part_steps)
        self.part_loss, self.part_correct = Mean(), Mean()
        self.part_started, self.part_waited, self.part_before = now, self.wait, 0
        self.part_steps = self.steps
        return {**values, "step_s": step_s, "memory_gb": peak_memory_gb(self.device), "grad_norm": self.grad_norm}

    def epoch(self) -> dict[str, float]:
        """Numbers over all ranks since the epoch began."""
        seconds = time.perf_counter() - self.started
        return self._numbers(self.loss, self.correct, self.loss.count - self.before, seconds, self.wait)

    def _numbers(self, loss: Mean, correct: Mean, clips: int, seconds: float, wait: float) -> dict[str, float]:
        """clips: those of this process, in these seconds."""
        sums = all_reduce(torch.stack([loss.pair(self.device), correct.pair(self.device)]))
        count = max(float(sums[0, 1]), 1.0)  # 0 where every step was skipped
        return {
            "loss": float(sums[0, 0]) / count,
            "top1": 100.0 * float(sums[1, 0]) / count,
            "clips_per_s": clips * self.world.size / seconds,
            "data_wait": wait / seconds,
        }

    def line(self) -> str:
        """This rank's numbers for the bar; read from the device twice a second at most."""
        now = time.perf_counter()
        text, read = self.shown
        if now - read > 0.5:
            seconds = now - self.started
            speed = (self.loss.count - self.before) * self.world.size / seconds
            text = (
                f"loss {self.loss.value():.3f}, top-1 {100 * self.correct.value():.1f} %, {speed:.1f} clips/s, "
                f"data wait {100 * self.wait / seconds:.0f} %"
            )
            self.shown = (text, now)
        return text


def peak_memory_gb(device: torch.device) -> float:
    """The most that this process has had so far, in 10**9 bytes: on a GPU what torch reserved there, else its resident
    memory, without that of its workers."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
