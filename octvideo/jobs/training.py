"""Training: the state of a run, what its checkpoints hold, and what happens after each step and epoch."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from octvideo import build
from octvideo.data.lists import VideoList
from octvideo.data.loader import Loader, TrainBatches
from octvideo.engine import checkpoint
from octvideo.engine.classes import check_class_order
from octvideo.engine.distributed import World, barrier, broadcast_buffers, gather_objects
from octvideo.engine.ema import Ema
from octvideo.engine.evaluate import Evaluation, evaluate
from octvideo.engine.failures import FailureBudget
from octvideo.engine.log import Log, losses
from octvideo.engine.meter import Meter
from octvideo.engine.nonfinite import NonFinite
from octvideo.engine.optim import SGD, load_momenta
from octvideo.engine.precise_bn import precise_statistics
from octvideo.engine.profile import StepProfiler
from octvideo.engine.stop import Stopped, StopRequest
from octvideo.engine.train import Precision, Progress, TrainingError, fit
from octvideo.engine.unread import UnreadSteps
from octvideo.files import write_atomic
from octvideo.jobs.announcement import announce
from octvideo.jobs.provenance import list_digest, versions
from octvideo.jobs.resume import Start, find_start
from octvideo.models import checkpoint_activations
from octvideo.octave import synchronize_norms


@dataclass
class _Run:
    """State of a training run: everything that a checkpoint saves, the log, and what the run is made of.

    lists: "train" and "val" -> digest and number of videos.
    """

    cfg: CfgNode
    epochs: float
    classes: list[str]
    lists: dict[str, dict[str, Any]]
    world: World
    device: torch.device
    log: Log
    model: nn.Module
    sgd: SGD
    precision: Precision
    progress: Progress
    meter: Meter
    failures: FailureBudget
    nonfinite: NonFinite
    unread: UnreadSteps
    ema: Ema | None
    stop: StopRequest
    clips: Loader
    validate: Callable[..., Evaluation] | None
    compiling: bool

    def restore(self, start: Start) -> None:
        """Continue from a checkpoint: its state; all settings are those of the configuration."""
        state = start.state
        assert state is not None
        load_momenta(self.sgd, state["optimizer"])
        if self.precision.scaler and state["scaler"]:
            self.precision.scaler.load_state_dict(state["scaler"])
        self.progress.epoch, self.progress.step, self.progress.clips_in_epoch = (
            state["epoch"],
            state["step"],
            start.clips,
        )
        if not start.list_changed:
            self.failures.load_state_dict(state["failures"])
        self.nonfinite.resume(state["step"], state["nonfinite_steps"])
        if self.ema and "ema" in state:
            self.ema.load_state_dict(state["ema"])
        _restore_rank(state["ranks"], self.meter, self.world, random=not start.new_seed)

    def save(self) -> Path:
        """Write a checkpoint of the completed steps; called by all ranks, which wait until it is on the disk."""
        self.unread.read()
        self.failures.share(self.progress.step)
        ranks = gather_objects({"random": _random_state(self.device), "meter": self.meter.state_dict()})
        cfg, step = self.cfg, self.progress.step
        folder = Path(cfg.OUTPUT_DIR)
        if self.world.main:
            self.log.flush()  # a resumed run continues after this step and does not repeat its events
            checkpoint.save(folder, step, self.state(ranks), keep=cfg.TRAIN.KEEP_CHECKPOINTS)
        barrier(f"checkpoint of step {step}")
        return checkpoint.path_of(folder, step)

    def state(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what a checkpoint holds. ranks: random state and sums of each."""
        return {
            **asdict(self.progress),
            "model": self.model.state_dict(),
            **({"ema": self.ema.state_dict()} if self.ema else {}),
            "optimizer": self.sgd.state_dict(),
            "scaler": self.precision.scaler.state_dict() if self.precision.scaler else {},
            "classes": self.classes,
            "lists": self.lists,
            "failures": self.failures.state_dict(),
            "nonfinite_steps": self.nonfinite.skipped,
            "ranks": ranks,
            "config": self.cfg.dump(),
            "versions": versions(),
        }

    def after_step(self, profiler: StepProfiler | None) -> None:
        cfg = self.cfg
        if profiler:
            profiler.step()
        if self.compiling:
            self.compiling = False
            self.log_compilation()
        if self.ema:
            self.ema.update(self.progress.step)
        self.check_stop()
        if cfg.TRAIN.CHECKPOINT_STEPS and self.progress.step % cfg.TRAIN.CHECKPOINT_STEPS == 0:
            self.save()

    def log_compilation(self) -> None:
        """Log the time of the first step, which compiles."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self.meter.started - self.meter.wait
        self.log.say(f"first step, with compilation (MODEL.COMPILE {self.cfg.MODEL.COMPILE}): {seconds:.1f} s")

    def check_stop(self) -> None:
        self.stop.check(self.progress.step)

    def after_epoch(self, values: dict[str, Any]) -> None:
        cfg, epoch, epochs = self.cfg, self.progress.epoch, math.ceil(self.epochs)
        last = epoch == epochs
        line = (
            f"epoch {epoch}/{epochs}  {losses(values, 3)}  "
            f"lr {values['lr']:.4g}  {values['clips_per_s']:.1f} clips/s  data wait {100 * values['data_wait']:.0f} %"
        )
        self.log.event("epoch", self.progress.step, {"epoch": epoch, **values})
        if last or (self.validate and epoch % cfg.TRAIN.VAL_PERIOD == 0):
            broadcast_buffers(self.model)
            with build.evaluated(cfg), self.ema.applied() if self.ema else contextlib.nullcontext():
                if cfg.TRAIN.PRECISE_NORM_BATCHES:
                    precise_statistics(self.model, self.norm_inputs())
                result = self.validate(self.model, poll=self.check_stop) if self.validate else None
            if result:
                line += f"  |  val top-1 {result.top(1):.1f} %"
                self.log.event("val", self.progress.step, {"epoch": epoch, **_accuracy(result)})
        self.log.say(line)
        if last or epoch % cfg.TRAIN.CHECKPOINT_PERIOD == 0:
            self.save()

    def norm_inputs(self) -> Iterator[Tensor]:
        """Yield the network inputs for precise BN statistics: the same each time, the last batches of epoch 0's order."""
        batches, prepare = self.clips.batch_sampler, build.prepare_clips(self.cfg)
        assert isinstance(batches, TrainBatches)
        batches.set_epoch(0)
        skipped = max(0, len(batches) - self.cfg.TRAIN.PRECISE_NORM_BATCHES)
        batches.set_epoch(0, skipped * batches.global_batch)
        for batch in self.clips:
            self.check_stop()
            if batch.errors:
                raise TrainingError(batch.errors[0])
            yield prepare(batch.clips.flatten(0, 1).to(self.device, non_blocking=True))


def train(cfg: CfgNode, world: World, device: torch.device, stop: StopRequest) -> None:
    """Train to TRAIN.EPOCHS; leave checkpoints, metrics and config.yaml in OUTPUT_DIR.

    Called by all ranks inside `session`, which gives `stop`. Raises Stopped, after a checkpoint, if a signal came.
    """
    build.check_device(cfg, device, training=True)
    videos = build.video_list(cfg, cfg.DATA.TRAIN_LIST, training=True)
    stop.poll()
    run, start = _prepare(cfg, world, device, stop, videos)
    steps_per_epoch = len(videos) // cfg.TRAIN.BATCH_SIZE
    announce(cfg, start, run.progress, run.log, world, device, videos=videos, epochs=run.epochs)
    if world.main:
        write_atomic(Path(cfg.OUTPUT_DIR) / "config.yaml", cfg.dump().encode())
    with run.log, _profiler(run) as profiler:
        try:
            fit(
                _parallel(cfg, run.model, world, device),
                run.sgd,
                run.clips,
                progress=run.progress,
                meter=run.meter,
                epochs=run.epochs,
                lr_at=build.learning_rate(cfg, steps_per_epoch),
                prepare=build.prepare_clips(cfg),
                mix=build.mix(cfg, world),
                loss=partial(F.cross_entropy, label_smoothing=cfg.TRAIN.LABEL_SMOOTHING),
                precision=run.precision,
                freeze_norm_stats=cfg.TRAIN.FREEZE_NORM_STATS,
                failures=run.failures,
                unread=run.unread,
                device=device,
                world=world,
                log=run.log,
                log_period=cfg.TRAIN.LOG_PERIOD,
                after_step=partial(run.after_step, profiler),
                after_epoch=run.after_epoch,
            )
        except Stopped as stopped:
            if not run.progress.step:
                raise
            raise Stopped(
                stopped.signal_number, run.progress.step, f"saved {run.save()}; TRAIN.RESUME auto resumes there"
            ) from None


def _prepare(
    cfg: CfgNode, world: World, device: torch.device, stop: StopRequest, videos: VideoList
) -> tuple[_Run, Start]:
    """Build everything that a run needs, and restore the checkpoint that it resumes from."""
    folder = Path(cfg.OUTPUT_DIR)
    classes = build.class_names(cfg, cfg.DATA.TRAIN_LIST)
    clips = build.train_loader(cfg, videos, world, device)
    clips.poll = stop.poll
    steps_per_epoch = len(clips)
    validated = build.video_list(cfg, cfg.DATA.VAL_LIST, training=False) if cfg.TRAIN.VAL_PERIOD else None
    lists = {kind: _contents(each) for kind, each in (("train", videos), ("val", validated)) if each is not None}
    _check_test(cfg, classes, videos.source)
    model = build.network(cfg)
    start = find_start(cfg, model, lists, classes, world)
    build.place(cfg, model, device, training=True)
    torch.manual_seed(cfg.SEED + 1 + world.rank)  # dropout differs between ranks; weights do not
    log = _log(cfg, folder, start, world)
    allowed = int(cfg.DATA.MAX_FAILED_FRACTION * steps_per_epoch * cfg.TRAIN.BATCH_SIZE)
    meter, nonfinite = Meter(device, world), NonFinite(cfg.TRAIN.MAX_NONFINITE, folder, videos.path, log)
    run = _Run(
        cfg=cfg,
        epochs=build.epochs_in_all(cfg, steps_per_epoch),
        classes=classes,
        lists=lists,
        world=world,
        device=device,
        log=log,
        model=model,
        sgd=build.optimizer(cfg, model),
        precision=build.precision(cfg, device),
        progress=Progress(),
        meter=meter,
        failures=FailureBudget(allowed, log, folder / "failed.txt"),
        nonfinite=nonfinite,
        unread=UnreadSteps(meter, nonfinite),
        ema=Ema(model, cfg.TRAIN.EMA_DECAY) if cfg.TRAIN.EMA_DECAY else None,
        stop=stop,
        clips=clips,
        validate=_validation(cfg, validated, world, device, stop) if validated else None,
        compiling=cfg.MODEL.COMPILE != "off",
    )
    if start.state:
        run.restore(start)
    else:
        run.failures.start()
        run.nonfinite.resume(step=0, skipped=0)
    return run, start


def _contents(videos: VideoList) -> dict[str, Any]:
    return {"digest": list_digest(videos), "videos": len(videos)}


def _check_test(cfg: CfgNode, classes: list[str], train_list: str) -> None:
    """Find errors of the test's list before the training, not after it."""
    if cfg.TEST.ENABLE:
        tested = build.test_list(cfg).source
        check_class_order(classes, build.class_names(cfg, tested), tested, whose=(train_list, tested))


def _log(cfg: CfgNode, folder: Path, start: Start, world: World) -> Log:
    """Open the log at the step of the checkpoint. Events that will be repeated are removed: the end of an epoch that the
    checkpoint is within, and the test."""
    if start.state is None:
        return Log(folder, main=world.main, step=0)
    again = {"test"} if cfg.TEST.ENABLE else set()
    return Log(
        folder, main=world.main, step=start.state["step"], again=again | ({"epoch", "val"} if start.within else set())
    )


def _accuracy(result: Evaluation) -> dict[str, Any]:
    return {
        "top1": result.top(1),
        "top5": result.top(5),
        "videos_scored": int(result.scored.sum()),
        "videos_listed": len(result.labels),
    }


def _validation(
    cfg: CfgNode, videos: VideoList, world: World, device: torch.device, stop: StopRequest
) -> Callable[..., Evaluation]:
    """Return the evaluation of one centred clip and crop of each video of VAL_LIST."""
    clips = build.eval_loader(cfg, videos, world, device, num_clips=1, num_crops=1)
    clips.poll = stop.poll
    return partial(
        evaluate,
        loader=clips,
        labels=torch.from_numpy(videos.labels),
        num_classes=cfg.MODEL.NUM_CLASSES,
        num_clips=1,
        num_crops=1,
        prepare=build.prepare_clips(cfg),
        clips_per_forward=cfg.TEST.BATCH_SIZE,
        device=device,
        world=world,
        title="validation",
    )


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_rank(ranks: list[dict[str, Any]], meter: Meter, world: World, *, random: bool) -> None:
    """Restore this rank's sums and, if `random`, its random states; with another number of ranks the sums of all."""
    if len(ranks) != world.size:
        if world.main:
            meter.load_state_dict(_summed([rank["meter"] for rank in ranks]))
        return
    meter.load_state_dict(ranks[world.rank]["meter"])
    if random:
        states = ranks[world.rank]["random"]
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])


def _summed(meters: list[dict[str, Any]]) -> dict[str, Any]:
    """Add the sums of ranks. The gradient norm is the same on all of them."""
    sums = {name: value for name, value in meters[0].items() if isinstance(value, dict)}
    total = {name: {key: sum(meter[name][key] for meter in meters) for key in value} for name, value in sums.items()}
    return {**meters[0], **total}


def _parallel(cfg: CfgNode, model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """The model as the loop takes it. For a single process TRAIN.SYNC_NORM changes nothing."""
    if cfg.TRAIN.CHECKPOINT_ACTIVATIONS:
        checkpoint_activations(model)
    if cfg.TRAIN.SYNC_NORM:
        synchronize_norms(model)
    if world.size == 1:
        return model
    # Rank 0's buffers are the run's: they are broadcast before an evaluation and saved. In training no layer of ours reads
    # them, so a broadcast in each step, DDP's default, is for networks of others.
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=bool(cfg.MODEL.FACTORY),
    )


def _profiler(run: _Run) -> contextlib.AbstractContextManager[StepProfiler | None]:
    cfg = run.cfg
    if not cfg.TRAIN.PROFILE_STEPS:
        return contextlib.nullcontext()
    folder = Path(cfg.OUTPUT_DIR) / "profile"
    return StepProfiler(cfg.TRAIN.PROFILE_STEPS, folder, run.world.rank, run.device, run.log)
