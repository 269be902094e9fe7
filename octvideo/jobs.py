"""The two jobs of a configuration: train, with all that is saved and said on the way, and test."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import octvideo
from octvideo import build
from octvideo.config import ConfigError, changes
from octvideo.data.dataset import VideoList
from octvideo.data.loader import Loader, TrainBatches
from octvideo.engine import checkpoint
from octvideo.engine.checkpoint import CheckpointError
from octvideo.engine.classes import check_class_order
from octvideo.engine.distributed import World, barrier, broadcast_buffers, gather_objects
from octvideo.engine.ema import Ema
from octvideo.engine.evaluate import Evaluation, evaluate
from octvideo.engine.failures import FailureBudget
from octvideo.engine.log import Log
from octvideo.engine.meter import Meter
from octvideo.engine.nonfinite import NonFinite
from octvideo.engine.optim import SGD
from octvideo.engine.precise_bn import precise_statistics
from octvideo.engine.profile import StepProfiler
from octvideo.engine.results import Results, results_of, view_facts
from octvideo.engine.scores import Averaged
from octvideo.engine.stop import Stopped, StopRequest
from octvideo.engine.train import Precision, Progress, TrainingError, fit
from octvideo.engine.unread import UnreadSteps
from octvideo.files import write_atomic
from octvideo.models import checkpoint_activations
from octvideo.octave import synchronize_norms


@dataclass
class _Run:
    """A training run: what a checkpoint holds of it, and what its folder is told."""

    cfg: CfgNode
    epochs: float
    classes: list[str]
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

    def restore(self, state: dict[str, Any]) -> None:
        self.sgd.load_state_dict(state["optimizer"])
        if self.precision.scaler and state["scaler"]:
            self.precision.scaler.load_state_dict(state["scaler"])
        for name in ("epoch", "step", "step_in_epoch"):
            setattr(self.progress, name, state[name])
        self.failures.load_state_dict(state["failures"])
        self.nonfinite.skipped = state["nonfinite_steps"]
        if self.ema and "ema" in state:
            self.ema.load_state_dict(state["ema"])
        _restore_rank(state["ranks"], self.meter, self.world, self.log)

    def save(self) -> None:
        self.unread.read()
        self.failures.share(self.progress.step)
        ranks = gather_objects({"random": _random_state(self.device), "meter": self.meter.state_dict()})
        if self.world.main:
            self._write(ranks)
        barrier(f"checkpoint of step {self.progress.step}")  # no rank leaves before it is on the disk

    def _write(self, ranks: list[dict[str, Any]]) -> None:
        cfg = self.cfg
        self.log.flush()  # what a later start does not say again, since it goes on behind it
        state = {
            **asdict(self.progress),
            "model": self.model.state_dict(),
            **({"ema": self.ema.state_dict()} if self.ema else {}),
            "optimizer": self.sgd.state_dict(),
            "scaler": self.precision.scaler.state_dict() if self.precision.scaler else {},
            "classes": self.classes,
            "failures": self.failures.state_dict(),
            "nonfinite_steps": self.nonfinite.skipped,
            "ranks": ranks,
            "config": cfg.dump(),
            "versions": _versions(),
        }
        checkpoint.save(Path(cfg.OUTPUT_DIR), self.progress.step, state, keep=cfg.TRAIN.KEEP_CHECKPOINTS)

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
        self.log.event("compile", self.progress.step, {"seconds": round(seconds, 3)})

    def check_stop(self) -> None:
        self.stop.check(self.progress.step)

    def after_epoch(self, values: dict[str, float]) -> None:
        cfg, epoch, epochs = self.cfg, self.progress.epoch, math.ceil(self.epochs)
        last = epoch == epochs
        line = (
            f"epoch {epoch}/{epochs}  loss {values['loss']:.3f}  top-1 {values['top1']:.1f} %  "
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
        """Network inputs that norms' statistics are taken of: the same each time, the last batches of epoch 0's order."""
        batches, prepare = self.clips.batch_sampler, build.prepare_clips(self.cfg)
        assert isinstance(batches, TrainBatches)
        batches.set_epoch(0)
        batches.set_epoch(0, max(0, len(batches) - self.cfg.TRAIN.PRECISE_NORM_BATCHES))
        for batch in self.clips:
            self.check_stop()
            if batch.errors:
                raise TrainingError(batch.errors[0])
            yield prepare(batch.clips.flatten(0, 1).to(self.device, non_blocking=True))


def train(cfg: CfgNode, world: World, device: torch.device) -> None:
    """Train to TRAIN.EPOCHS, leaving checkpoints and metrics in OUTPUT_DIR."""
    folder = Path(cfg.OUTPUT_DIR)
    build.check_device(cfg, device, training=True)
    classes = build.class_names(cfg, cfg.DATA.TRAIN_LIST)
    videos = build.video_list(cfg, cfg.DATA.TRAIN_LIST, training=True)
    clips = build.train_loader(cfg, videos, world, device)
    validate = _validation(cfg, world, device) if cfg.TRAIN.VAL_PERIOD else None
    if cfg.TEST.ENABLE:
        tested = build.test_list(cfg).source  # what is wrong with it should show before the training, not after
        check_class_order(classes, build.class_names(cfg, tested), tested, whose=(videos.source, tested))
    model = build.network(cfg)
    start, remark = _starting_point(cfg, folder, model)
    build.place(cfg, model, device, training=True)
    torch.manual_seed(cfg.SEED + 1 + world.rank)  # dropout differs between ranks; weights did not
    step, in_epoch = (start["step"], start["step_in_epoch"] > 0) if start else (0, False)
    log = Log(folder, main=world.main, step=step, in_epoch=in_epoch)
    steps_per_epoch = len(clips)
    allowed = int(cfg.DATA.MAX_FAILED_FRACTION * steps_per_epoch * cfg.TRAIN.BATCH_SIZE)
    meter, nonfinite = Meter(device, world), NonFinite(cfg.TRAIN.MAX_NONFINITE, folder, videos.path, log)
    run = _Run(
        cfg,
        build.epochs_in_all(cfg, steps_per_epoch),
        classes,
        world,
        device,
        log,
        model,
        build.optimizer(cfg, model),
        build.precision(cfg, device),
        Progress(),
        meter,
        FailureBudget(allowed, log, folder / "failed.txt"),
        nonfinite,
        UnreadSteps(meter, nonfinite),
        Ema(model, cfg.TRAIN.EMA_DECAY) if cfg.TRAIN.EMA_DECAY else None,
        StopRequest(),
        clips,
        validate,
        cfg.MODEL.COMPILE != "off",
    )
    if start:
        run.restore(start)
    _announce(run, len(videos), steps_per_epoch)
    if remark:
        log.say(remark)
    if world.main:
        write_atomic(folder / "config.yaml", cfg.dump().encode())
    with run.stop, _profiler(run) as profiler:
        try:
            fit(
                _parallel(cfg, model, world, device),
                run.sgd,
                clips,
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
                log=log,
                log_period=cfg.TRAIN.LOG_PERIOD,
                after_step=partial(run.after_step, profiler),
                after_epoch=run.after_epoch,
            )
        except Stopped:
            run.save()
            raise
    log.close()


def test(cfg: CfgNode, world: World, device: torch.device, *, average: str = "softmax") -> Results | None:
    """Score TEST_LIST with TEST.CLIPS x TEST.CROPS views; leave test.json, its tables and scores.npz in OUTPUT_DIR.

    A checkpoint with a moving average is tested by that. average: see engine.scores.aggregate. The main rank returns what
    it wrote, the others None.
    """
    folder = Path(cfg.OUTPUT_DIR)
    path, state = weights_to_test(cfg, folder)
    videos = build.test_list(cfg)
    classes = _classes_of(state, path, cfg.MODEL.NUM_CLASSES)
    of_data = build.class_names(cfg, videos.source)
    check_class_order(classes, of_data, str(path))
    model = build.network(cfg)
    load_trained(cfg, model, state, path, say=world.main)
    result = evaluate(
        build.place(cfg, model, device),
        build.eval_loader(cfg, videos, world, device, num_clips=cfg.TEST.CLIPS, num_crops=cfg.TEST.CROPS),
        torch.from_numpy(videos.labels),
        num_classes=cfg.MODEL.NUM_CLASSES,
        num_clips=cfg.TEST.CLIPS,
        num_crops=cfg.TEST.CROPS,
        prepare=build.prepare_clips(cfg),
        clips_per_forward=cfg.TEST.BATCH_SIZE,
        device=device,
        world=world,
        title="test",
        average=average,
    )
    if result.views is None:
        return None
    names = [videos.name(index) for index in range(len(videos))]
    views = replace(
        result.views, names=names, classes=classes or of_data, facts=_facts(cfg, path, state, result, videos)
    )
    averaged = Averaged(result.scores, result.scored, complete=result.scored)
    found = results_of(views, averaged, {**view_facts(cfg.TEST.CLIPS, cfg.TEST.CROPS, average), **views.facts})
    folder.mkdir(parents=True, exist_ok=True)
    views.save(folder / "scores.npz")
    found.write(folder)
    log = Log(folder, main=True)
    log.event("test", state["step"], found.metrics)
    log.say(
        f"test of {path.name}: top-1 {found.metrics['top1']:.2f} %, top-5 {found.metrics['top5']:.2f} %, "
        f"{found.metrics['videos_scored']} of {len(videos)} {'images' if build.takes_images(cfg) else 'videos'} scored with "
        f"{found.facts['views']} view(s) each, "
        f"{found.facts['macs'] / 1e9:.3f} G multiply-adds, {found.facts['params'] / 1e6:.3f} M parameters"
    )
    for video, reason in found.failed:
        log.say(f"  counted as wrong: {found.paths[video]}: {reason}")
    log.close()
    return found


def _facts(cfg: CfgNode, path: Path, state: dict[str, Any], result: Evaluation, videos: VideoList) -> dict[str, Any]:
    """Where scores are from, kept with them."""
    clip = build.cost(cfg, cfg.DATA.TEST_CROP)
    return {
        "macs": clip.macs.total,
        "params": clip.params,
        "input": list(clip.input),
        "clips_per_s": round(result.clips_per_s, 2),
        "model": build.network_name(cfg),
        "alpha": cfg.OCTAVE.ALPHA,
        "checkpoint": str(path),
        "epoch": state["epoch"],
        "policy": cfg.DATA.POLICY,
        "prefix": videos.prefix,
    }


def _classes_of(state: dict[str, Any], path: Path, num_classes: int) -> list[str]:
    """The names of a checkpoint's classes, in the order of its labels; none where it has none."""
    classes = state.get("classes") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) and name.isprintable() for name in classes):
        raise CheckpointError(f"{path}: its classes are no list of names")
    if len(classes) not in (0, num_classes):
        raise CheckpointError(f"{path}: names of {len(classes)} classes, but MODEL.NUM_CLASSES is {num_classes}")
    return classes


def _accuracy(result: Evaluation) -> dict[str, Any]:
    return {
        "top1": result.top(1),
        "top5": result.top(5),
        "videos_scored": int(result.scored.sum()),
        "videos_listed": len(result.labels),
    }


def _validation(cfg: CfgNode, world: World, device: torch.device) -> Callable[..., Evaluation]:
    """One centred clip and crop of each video of VAL_LIST."""
    videos = build.video_list(cfg, cfg.DATA.VAL_LIST, training=False)
    clips = build.eval_loader(cfg, videos, world, device, num_clips=1, num_crops=1)
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


def _starting_point(cfg: CfgNode, folder: Path, model: nn.Module) -> tuple[dict[str, Any] | None, str]:
    """Put the weights to start from into the model; the checkpoint to go on with, or None at a start, and what to say of it.

    1. TRAIN.RESUME FILE: that file.
    2. TRAIN.RESUME auto: the newest whole checkpoint in OUTPUT_DIR; where there is none, as below.
    3. TRAIN.INIT FILE: its weights, at epoch 0.
    4. Weights drawn from SEED.
    TRAIN.RESUME none in a folder with checkpoints is refused, since it would mix two runs.
    """
    resume = cfg.TRAIN.RESUME
    if resume not in ("none", "auto"):
        path = Path(resume)
        state = checkpoint.load(path, run=True)
        checkpoint.load_weights(model, state["model"], path)
        checkpoint.require_fit(state["optimizer"], build.optimizer(cfg, model), path)
        later = [p.name for p in checkpoint.found(folder) if checkpoint.step_of(p) > state["step"]]
        if later:
            raise CheckpointError(
                f"{folder}: holds {', '.join(later)}, later than {path} (step {state['step']}); going back would mix two "
                "runs: give another OUTPUT_DIR"
            )
        return state, _changed_since(cfg, state, path)
    if resume == "auto" and (newest := checkpoint.latest(folder, run=True)):
        path, state = newest
        checkpoint.load_weights(model, state["model"], path)
        checkpoint.require_fit(state["optimizer"], build.optimizer(cfg, model), path)
        return state, _changed_since(cfg, state, path)
    if resume == "none" and checkpoint.found(folder):
        raise CheckpointError(
            f"{folder}: holds checkpoints of an earlier run; go on with TRAIN.RESUME auto or give another OUTPUT_DIR"
        )
    if cfg.TRAIN.INIT:
        path = Path(cfg.TRAIN.INIT)
        state = checkpoint.load(path)
        checkpoint.load_weights(model, state["model"], path, new_head=cfg.TRAIN.NEW_HEAD)
        return None, _trained_otherwise(cfg, state, path)
    return None, ""


def _versions() -> dict[str, str]:
    return {"octvideo": octvideo.__version__, "torch": str(torch.__version__)}


# What a run may change at every start without being another one.
_OF_ONE_START = ("OUTPUT_DIR", "TRAIN.RESUME", "TRAIN.INIT", "TRAIN.NEW_HEAD", "TEST.")


def _changed_since(cfg: CfgNode, state: dict[str, Any], path: Path) -> str:
    changed = [line for line in _changes(cfg, state, ("",)) if not line.startswith(_OF_ONE_START)]
    saved = state["versions"]
    changed += [f"{name} {saved[name]!a} (here {here})" for name, here in _versions().items() if saved[name] != here]
    return f"{path.name} was left by a run with {'; '.join(changed)}" if changed else ""


# Weights of equal names and shapes, and yet another network, or one that was shown something else.
_OF_THE_WEIGHTS = (
    *("MODEL.NAME", "MODEL.FACTORY", "MODEL.POOL_PADDING", "MODEL.NONLOCAL_FORM", "OCTAVE."),
    *("DATA.MEAN", "DATA.STD", "DATA.NUM_FRAMES", "DATA.SAMPLING_RATE", "DATA.TARGET_FPS"),
)


def load_trained(cfg: CfgNode, model: nn.Module, state: dict[str, Any], path: Path, *, say: bool = True) -> None:
    """Put the weights to predict with, of the checkpoint `state` from `path`, into the model.

    say: a line on standard error where they were made with other settings.
    """
    checkpoint.load_weights(model, checkpoint.averaged(state), path)
    if say and (remark := _trained_otherwise(cfg, state, path)):
        print(remark, file=sys.stderr)


def _trained_otherwise(cfg: CfgNode, state: dict[str, Any], path: Path) -> str:
    """A line on what the weights of a checkpoint were trained with and this configuration has otherwise; "" for nothing.

    An octave network has the state dict of its vanilla twin: a wrong alpha loads like the right one.
    """
    changed = _changes(cfg, state, _OF_THE_WEIGHTS)
    return f"{path}: its weights were made with {'; '.join(changed)}" if changed else ""


def _changes(cfg: CfgNode, state: dict[str, Any], keys: Sequence[str]) -> list[str]:
    saved = state.get("config")
    if saved is None:  # weights of another package
        return []
    try:
        return changes(str(saved), cfg, keys)
    except ConfigError as error:
        return [f"a configuration that cannot be read ({error.problems[0]})"]


def weights_to_test(cfg: CfgNode, folder: Path) -> tuple[Path, dict[str, Any]]:
    """TEST.CHECKPOINT, or else the newest whole checkpoint in the folder, with what it holds."""
    if cfg.TEST.CHECKPOINT:
        return Path(cfg.TEST.CHECKPOINT), checkpoint.load(Path(cfg.TEST.CHECKPOINT))
    newest = checkpoint.latest(folder)
    if newest is None:
        raise CheckpointError(f"{folder}: no checkpoint to test; train first or give TEST.CHECKPOINT FILE")
    return newest


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_rank(ranks: list[dict[str, Any]], meter: Meter, world: World, log: Log) -> None:
    """Each rank's own random state and sums; with another number of ranks a word on what differs."""
    if len(ranks) != world.size:
        log.say(
            f"the checkpoint is of {len(ranks)} process(es), this run has {world.size}: clips, order and learning rate "
            "stay the same; dropout, mixup and cutmix draw otherwise, and norms see other shares of a batch"
        )
        if world.main:
            meter.load_state_dict(_summed([rank["meter"] for rank in ranks]))
        return
    meter.load_state_dict(ranks[world.rank]["meter"])
    random = ranks[world.rank]["random"]
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])


def _summed(meters: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        name: {value: sum(meter[name][value] for meter in meters) for value in sums} for name, sums in meters[0].items()
    }


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


def _announce(run: _Run, videos: int, steps: int) -> None:
    """Print the derived numbers where they are derived. steps: of an epoch."""
    cfg, log, world, device, progress = run.cfg, run.log, run.world, run.device, run.progress
    batch, lr = cfg.TRAIN.BATCH_SIZE, build.learning_rate(cfg, steps)
    clip = build.cost(cfg, cfg.DATA.TRAIN_CROP)
    octave = f"octave alpha {cfg.OCTAVE.ALPHA:g}, pool {build.octave_pool(cfg)}" if cfg.OCTAVE.ALPHA else "vanilla"
    octave += f", low channels in {cfg.OCTAVE.ROUND_TO}s" if cfg.OCTAVE.ALPHA and cfg.OCTAVE.ROUND_TO > 1 else ""
    kind, unit = ("images", "images") if build.takes_images(cfg) else ("videos", "clips")
    log.say(
        f"{build.network_name(cfg)} ({octave}): {clip.params / 1e6:.3f} M parameters, "
        f"{clip.macs.total / 1e9:.3f} G multiply-adds"
    )
    log.say(
        f"{videos} {kind} in batches of {batch} {unit} ({batch // world.size} on each of {world.size} process(es), "
        f"{device.type}), {' x '.join(map(str, clip.input[1:]))}: {steps} steps an epoch, "
        f"{round(steps * run.epochs)} in all"
    )
    log.say(
        f"learning rate {cfg.SOLVER.BASE_LR:g} at {cfg.SOLVER.BASE_BATCH} clips -> "
        f"{cfg.SOLVER.BASE_LR * batch / cfg.SOLVER.BASE_BATCH:.4g} at {batch}; "
        f"{cfg.SOLVER.SCHEDULE}, starting at {lr(0):.4g}"
    )
    if cfg.SOLVER.ITERATIONS:
        held = " + ".join(str(round(count)) for count in build.iterations(cfg))
        log.say(f"steps at each rate {cfg.SOLVER.ITERATIONS} of {cfg.SOLVER.BASE_BATCH} clips -> {held} of {batch}")
    if cfg.MODEL.COMPILE == "graphs":
        log.say(
            "MODEL.COMPILE graphs: training steps replay CUDA graphs; validation runs eagerly, as its shapes differ"
        )
    if progress.step:
        part = f" and {progress.step_in_epoch} steps of the next" if progress.step_in_epoch else ""
        log.say(f"going on after epoch {progress.epoch}{part} (step {progress.step})")
    facts = {"params": clip.params, "macs": clip.macs.total, "world_size": world.size, "videos": videos, "steps": steps}
    log.event("run", progress.step, facts)
