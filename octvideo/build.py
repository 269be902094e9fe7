"""The composition root: a configuration -> networks, loaders, optimizer, schedule, and the two jobs, train and test.

The only library file that reads a configuration.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import octvideo
from octvideo import config
from octvideo.analysis.complexity import Complexity, complexity
from octvideo.config import ConfigError
from octvideo.data import dataset, images, loader, transforms
from octvideo.data.dataset import EvalDataset, Replacing, Sample, TrainDataset, VideoList
from octvideo.data.decode import BACKENDS
from octvideo.data.images import ImageEvalDataset, ImageTrainDataset
from octvideo.data.loader import Loader
from octvideo.data.sampling import POLICIES, SHORT, seeded_generator
from octvideo.engine import checkpoint, optim
from octvideo.engine.checkpoint import CheckpointError
from octvideo.engine.classes import check_class_order
from octvideo.engine.distributed import World, barrier, broadcast_buffers, gather_objects
from octvideo.engine.ema import Ema
from octvideo.engine.evaluate import Evaluation, evaluate
from octvideo.engine.failures import FailureBudget
from octvideo.engine.log import Log
from octvideo.engine.nonfinite import NonFinite
from octvideo.engine.precise_bn import precise_statistics
from octvideo.engine.profile import StepProfiler
from octvideo.engine.results import Results, results_of, view_facts
from octvideo.engine.scores import Averaged
from octvideo.engine.train import Meter, Precision, Progress, Stopped, StopRequest, TrainingError, fit
from octvideo.models import (
    NETWORKS,
    ResNetSpec,
    SlowFastSpec,
    Spec,
    checkpoint_activations,
    create,
    factory,
    feature_sizes,
    with_octave,
    with_pool_padding,
)
from octvideo.octave import octavize, synchronize_norms, use_onednn


def _is_image_network(spec: Spec) -> bool:
    return not isinstance(spec, SlowFastSpec) and spec.dims == 2


IMAGE_NETWORKS = frozenset(name for name, describe in NETWORKS.items() if _is_image_network(describe()))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> CfgNode:
    """A file and KEY VALUE overrides -> a checked configuration. Raises ConfigError listing every problem at once."""
    cfg, problems = config.read(path, overrides)
    image_networks = IMAGE_NETWORKS
    if cfg.MODEL.FACTORY:
        try:
            image_networks = frozenset([cfg.MODEL.FACTORY] if takes_images(cfg) else [])
        except ValueError as error:
            problems.append(f"MODEL.FACTORY is {error}")
    problems += config.check(
        cfg, networks=NETWORKS, image_networks=image_networks, decoders=BACKENDS, policies=POLICIES, shorts=SHORT
    )
    if not problems and cfg.MODEL.FACTORY:
        problems += _factory_problems(cfg)
    elif not problems:
        problems += _shape_problems(cfg)
    if problems:
        raise ConfigError(str(path), problems)
    return cfg


def load_sweep(path: str | Path, overrides: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> list[CfgNode]:
    """A file, overrides, and lines (place, further overrides) -> a checked configuration for each line.

    Of several lines, one that gives no OUTPUT_DIR gets OUTPUT_DIR/0, /1, ... Raises ConfigError with every line's
    problems, and where two lines would write to one folder.
    """
    if len(lines) == 1 and not lines[0][0]:
        return [load_config(path, [*overrides, *lines[0][1]])]
    cfgs, problems = [], []
    users: dict[Path, str] = {}
    for number, (place, more) in enumerate(lines):
        try:
            cfg = load_config(path, [*overrides, *more])
            if "OUTPUT_DIR" not in more[0::2]:
                cfg = load_config(path, [*overrides, *more, "OUTPUT_DIR", str(Path(cfg.OUTPUT_DIR) / str(number))])
        except ConfigError as error:
            problems += [f"{place}: {problem}" for problem in error.problems]
            continue
        if (folder := Path(cfg.OUTPUT_DIR).resolve()) in users:
            problems.append(f"{place}: OUTPUT_DIR {cfg.OUTPUT_DIR} is that of {users[folder]} already")
        users[folder] = place
        cfgs.append(cfg)
    if problems:
        raise ConfigError(str(path), problems)
    return cfgs


def _shape_problems(cfg: CfgNode) -> list[str]:
    problems = []
    try:
        spec = network_spec(cfg)
        _structure(spec)  # some splits of channels no layer can have: a ResNeXt's groups do not divide each alpha's
    except ValueError as error:
        return [f"{cfg.MODEL.NAME}: {error}"]
    for key, crop in (("DATA.TRAIN_CROP", cfg.DATA.TRAIN_CROP), ("DATA.TEST_CROP", cfg.DATA.TEST_CROP)):
        try:
            feature_sizes(spec, clip_size(cfg, crop)[1:])
        except ValueError as error:
            frames = "" if takes_images(cfg) else f" with DATA.NUM_FRAMES {cfg.DATA.NUM_FRAMES}"
            problems.append(f"{key} is {crop}{frames}: {error}")
    return problems


def _factory_problems(cfg: CfgNode) -> list[str]:
    """Does the network convert, take the crops and give logits of the classes?"""
    try:
        with torch.random.fork_rng(devices=[]):
            structure = copy.deepcopy(_factory_network(cfg)).to("meta").eval()
    except ValueError as error:
        return [f"MODEL.FACTORY is {cfg.MODEL.FACTORY}: {error}"]
    problems = []
    for key, crop in (("DATA.TRAIN_CROP", cfg.DATA.TRAIN_CROP), ("DATA.TEST_CROP", cfg.DATA.TEST_CROP)):
        try:
            with torch.no_grad():
                logits = structure(torch.empty(1, *clip_size(cfg, crop), device="meta"))
        except (RuntimeError, ValueError) as error:
            problems.append(f"{key} is {crop}: {cfg.MODEL.FACTORY} does not take {clip_size(cfg, crop)}: {error}")
            continue
        if not isinstance(logits, Tensor) or tuple(logits.shape) != (1, cfg.MODEL.NUM_CLASSES):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            problems.append(
                f"MODEL.FACTORY is {cfg.MODEL.FACTORY}: its network gives {got} for one clip, not logits "
                f"(1, {cfg.MODEL.NUM_CLASSES})"
            )
    return problems


def takes_images(cfg: CfgNode) -> bool:
    """Does the network take images?"""
    if cfg.MODEL.FACTORY:
        return _factory_takes_images(cfg.MODEL.FACTORY, cfg.MODEL.NUM_CLASSES)
    return cfg.MODEL.NAME in IMAGE_NETWORKS


@lru_cache(maxsize=4)
def _factory_takes_images(name: str, num_classes: int) -> bool:
    with torch.random.fork_rng(devices=[]):
        return factory.takes_images(factory.from_factory(name, num_classes))


def network_name(cfg: CfgNode) -> str:
    return cfg.MODEL.FACTORY or cfg.MODEL.NAME


def network_spec(cfg: CfgNode) -> Spec:
    spec = NETWORKS[cfg.MODEL.NAME](cfg.MODEL.NUM_CLASSES, dropout=cfg.MODEL.DROPOUT)
    spec = with_pool_padding(spec, cfg.MODEL.POOL_PADDING)
    if isinstance(spec, SlowFastSpec):
        spec = replace(spec, slow_frames=cfg.DATA.POLICY)
    elif isinstance(spec, ResNetSpec):
        spec = replace(spec, nonlocal_form=cfg.MODEL.NONLOCAL_FORM)
    octave = cfg.OCTAVE
    return with_octave(spec, octave.ALPHA, pool=octave_pool(cfg), ratios=octave.RATIOS, round_to=octave.ROUND_TO)


def network(cfg: CfgNode) -> nn.Module:
    """The network with weights drawn from SEED, on the CPU (or wherever torch.device says)."""
    torch.manual_seed(cfg.SEED)
    return _factory_network(cfg) if cfg.MODEL.FACTORY else create(network_spec(cfg))


def _factory_network(cfg: CfgNode) -> nn.Module:
    model = factory.from_factory(cfg.MODEL.FACTORY, cfg.MODEL.NUM_CLASSES)
    alpha = list(cfg.OCTAVE.RATIOS) or cfg.OCTAVE.ALPHA
    if not cfg.OCTAVE.ALPHA and not any(cfg.OCTAVE.RATIOS):
        return model
    clip = torch.zeros(1, *clip_size(cfg, cfg.DATA.TRAIN_CROP))
    return octavize(model, alpha, clip, pool=octave_pool(cfg), share=True, round_to=cfg.OCTAVE.ROUND_TO)


def octave_pool(cfg: CfgNode) -> tuple[int, ...]:
    """The factor between the frequencies in the network's own dimensions."""
    return tuple(cfg.OCTAVE.POOL[1:] if takes_images(cfg) else cfg.OCTAVE.POOL)


def cost(cfg: CfgNode, crop: int) -> Complexity:
    """What the network costs for one clip of this crop."""
    if cfg.MODEL.FACTORY:
        with torch.random.fork_rng(devices=[]):
            return complexity(_factory_network(cfg), clip_size(cfg, crop))
    return complexity(_structure(network_spec(cfg)), clip_size(cfg, crop))


@lru_cache(maxsize=4)  # a deep one takes a second, and is asked for by the check, the count and the report
def _structure(spec: Spec) -> nn.Module:
    """The network without weights."""
    with torch.device("meta"):
        return create(spec)


def clip_size(cfg: CfgNode, crop: int) -> tuple[int, ...]:
    """(C, T, H, W) of a clip, (C, H, W) of an image."""
    return (3, crop, crop) if takes_images(cfg) else (3, cfg.DATA.NUM_FRAMES, crop, crop)


def memory_format(cfg: CfgNode) -> torch.memory_format:
    if not cfg.MODEL.CHANNELS_LAST:
        return torch.contiguous_format
    return torch.channels_last if takes_images(cfg) else torch.channels_last_3d


def place(cfg: CfgNode, model: nn.Module, device: torch.device) -> nn.Module:
    """The model on its device, its weights in the memory format of MODEL.CHANNELS_LAST, compiled if MODEL.COMPILE says so.

    Names of weights stay the same. Compiled at the first step, and again where the shape of a batch changes.
    """
    model.to(device).to(memory_format=memory_format(cfg))  # type: ignore[call-overload]
    if device.type == "cpu" and torch.get_num_threads() == 1:
        use_onednn(model)
    if cfg.MODEL.COMPILE:
        _check_compiler(device)
        model.compile()
    return model


def _check_compiler(device: torch.device) -> None:
    """torch.compile writes C++ for CPUs; without a compiler it fails in the first step, far from the reason."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and not shutil.which(compiler):
        remedy = "install one, name it in CXX, or set MODEL.COMPILE False"
        raise ConfigError(
            "MODEL.COMPILE", [f"a CPU needs a C++ compiler for it, and there is no {compiler!r} here; {remedy}"]
        )


def prepare_clips(cfg: CfgNode) -> Callable[[Tensor], Tensor]:
    """uint8 clips on the device -> network input."""

    def prepare(clips: Tensor) -> Tensor:
        clips = clips.contiguous(memory_format=memory_format(cfg))
        return transforms.normalize(clips, mean=cfg.DATA.MEAN, std=cfg.DATA.STD)

    return prepare


def class_names(cfg: CfgNode, path: str) -> list[str]:
    """The names of the classes in the order of their labels: of DATA.CLASS_NAMES, else of labels.txt beside the list `path`
    (every tool in datasets/ leaves one), else none. Raises ConfigError where they are not NUM_CLASSES different ones."""
    file = Path(cfg.DATA.CLASS_NAMES or Path(path).parent / "labels.txt")
    if not cfg.DATA.CLASS_NAMES and not file.is_file():
        return []
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"DATA.CLASS_NAMES {file}", [f"cannot be read ({error})"]) from None
    if len(names) != cfg.MODEL.NUM_CLASSES or len(set(names)) != len(names):
        problem = (
            f"{len(names)} names, {len(set(names))} of them different, for MODEL.NUM_CLASSES {cfg.MODEL.NUM_CLASSES}; "
            "give one name a line, in the order of the labels"
        )
        raise ConfigError(f"class names in {file}", [problem])
    return names


def use_threads(cfg: CfgNode, world: World) -> None:
    """Set torch's threads in this process. Each more than there are free cores would make all of them wait."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(cfg.NUM_THREADS or max(1, cores // world.local_size - cfg.DATA.NUM_WORKERS))


def video_list(cfg: CfgNode, path: str, *, training: bool) -> VideoList:
    """The videos, or images, of a list (or of a folder of images)."""
    read = images.read_images if takes_images(cfg) else dataset.read_list
    return read(
        path,
        prefix=cfg.DATA.PREFIX,
        separator=cfg.DATA.SEPARATOR,
        num_classes=cfg.MODEL.NUM_CLASSES,
        require_all_classes=training,
    )


def test_list(cfg: CfgNode) -> VideoList:
    return video_list(cfg, cfg.DATA.TEST_LIST or cfg.DATA.VAL_LIST, training=False)


def train_loader(cfg: CfgNode, videos: VideoList, world: World, device: torch.device) -> Loader:
    try:
        batches = loader.TrainBatches(
            len(videos), global_batch=cfg.TRAIN.BATCH_SIZE, seed=cfg.SEED, rank=world.rank, world_size=world.size
        )
    except ValueError as error:
        raise ConfigError(f"TRAIN.BATCH_SIZE {cfg.TRAIN.BATCH_SIZE}", [str(error)]) from None
    samples: Dataset[Sample] = train_samples(cfg, videos)
    if cfg.DATA.MAX_FAILED_FRACTION:
        samples = Replacing(samples, cfg.SEED)
    return _loader(cfg, samples, videos, batches, device)


def train_samples(cfg: CfgNode, videos: VideoList) -> TrainDataset | ImageTrainDataset:
    if takes_images(cfg):
        return ImageTrainDataset(
            videos,
            crop=cfg.DATA.TRAIN_CROP,
            crop_area=tuple(cfg.DATA.TRAIN_AREA),
            interpolation=cfg.DATA.INTERPOLATION,
            flip=cfg.DATA.FLIP,
            augment_ops=cfg.DATA.RANDAUGMENT_OPS,
            augment_magnitude=cfg.DATA.RANDAUGMENT_MAGNITUDE,
            augment_std=cfg.DATA.RANDAUGMENT_STD,
            seed=cfg.SEED,
        )
    return TrainDataset(
        videos,
        num_frames=cfg.DATA.NUM_FRAMES,
        sampling_rate=cfg.DATA.SAMPLING_RATE,
        target_fps=cfg.DATA.TARGET_FPS,
        policy=cfg.DATA.POLICY,
        short=cfg.DATA.SHORT or None,
        short_side=tuple(cfg.DATA.TRAIN_SHORT_SIDE),
        crop=cfg.DATA.TRAIN_CROP,
        flip=cfg.DATA.FLIP,
        augment_ops=cfg.DATA.RANDAUGMENT_OPS,
        augment_magnitude=cfg.DATA.RANDAUGMENT_MAGNITUDE,
        augment_std=cfg.DATA.RANDAUGMENT_STD,
        decoder=cfg.DATA.DECODER,
        seed=cfg.SEED,
    )


def eval_loader(
    cfg: CfgNode, videos: VideoList, world: World, device: torch.device, *, num_clips: int, num_crops: int
) -> Loader:
    videos_per_batch = max(1, cfg.TEST.BATCH_SIZE // (num_clips * num_crops))
    batches = loader.EvalBatches(len(videos), batch_size=videos_per_batch, rank=world.rank, world_size=world.size)
    return _loader(cfg, eval_samples(cfg, videos, num_clips, num_crops), videos, batches, device)


def eval_samples(cfg: CfgNode, videos: VideoList, num_clips: int, num_crops: int) -> EvalDataset | ImageEvalDataset:
    if takes_images(cfg):
        return ImageEvalDataset(
            videos,
            short_side=cfg.DATA.TEST_SHORT_SIDE,
            crop=cfg.DATA.TEST_CROP,
            interpolation=cfg.DATA.INTERPOLATION,
        )
    return EvalDataset(
        videos,
        num_frames=cfg.DATA.NUM_FRAMES,
        sampling_rate=cfg.DATA.SAMPLING_RATE,
        target_fps=cfg.DATA.TARGET_FPS,
        policy=cfg.DATA.POLICY,
        short=cfg.DATA.SHORT or None,
        num_clips=num_clips,
        num_crops=num_crops,
        short_side=cfg.DATA.TEST_SHORT_SIDE,
        crop=cfg.DATA.TEST_CROP,
        decoder=cfg.DATA.DECODER,
    )


def _loader(
    cfg: CfgNode,
    samples: Dataset[Sample],
    videos: VideoList,
    batches: loader.TrainBatches | loader.EvalBatches,
    device: torch.device,
) -> Loader:
    return Loader(
        samples,
        batches,
        path_of=videos.path,
        num_workers=cfg.DATA.NUM_WORKERS,
        timeout_s=cfg.DATA.TIMEOUT_S,
        pin_memory=device.type == "cuda",
    )


def epochs_in_all(cfg: CfgNode, steps_per_epoch: int) -> float:
    """The length of the run. SOLVER.ITERATIONS may end it within an epoch."""
    return _rates_end(cfg, steps_per_epoch)[-1] if cfg.SOLVER.SCHEDULE == "iterations" else cfg.TRAIN.EPOCHS


def _rates_end(cfg: CfgNode, steps_per_epoch: int) -> tuple[float, ...]:
    """Where each rate of SOLVER.ITERATIONS ends, in epochs."""
    return optim.milestones_of(_iterations(cfg), steps_per_epoch)


def _iterations(cfg: CfgNode) -> list[float]:
    """SOLVER.ITERATIONS as steps of TRAIN.BATCH_SIZE: as many clips, whatever the batch."""
    return [count * cfg.SOLVER.BASE_BATCH / cfg.TRAIN.BATCH_SIZE for count in cfg.SOLVER.ITERATIONS]


def learning_rate(cfg: CfgNode, steps_per_epoch: int) -> Callable[[float], float]:
    """Epochs done -> learning rate for TRAIN.BATCH_SIZE."""
    scale = cfg.TRAIN.BATCH_SIZE / cfg.SOLVER.BASE_BATCH
    if cfg.SOLVER.SCHEDULE == "steps":
        return partial(optim.steps, base_lr=cfg.SOLVER.BASE_LR * scale, milestones=tuple(cfg.SOLVER.MILESTONES))
    if cfg.SOLVER.SCHEDULE == "iterations":
        ends = _rates_end(cfg, steps_per_epoch)[:-1]
        return partial(optim.steps, base_lr=cfg.SOLVER.BASE_LR * scale, milestones=ends)
    return partial(
        optim.warmup_cosine,
        epochs=cfg.TRAIN.EPOCHS,
        base_lr=cfg.SOLVER.BASE_LR * scale,
        warmup_epochs=cfg.SOLVER.WARMUP_EPOCHS,
        warmup_lr=cfg.SOLVER.WARMUP_LR * scale,
    )


def mix(cfg: CfgNode, world: World) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """(clips, labels, step) -> (clips, targets), mixed as TRAIN.MIXUP and CUTMIX say; other draws on each rank and step."""
    both = ((transforms.mixup, cfg.TRAIN.MIXUP), (transforms.cutmix, cfg.TRAIN.CUTMIX))
    ways = [(way, alpha) for way, alpha in both if alpha]

    def mixed(clips: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        if not ways:
            return clips, labels
        generator = seeded_generator("mixup", cfg.SEED, step, world.rank)
        # A number is drawn only where there is a choice, so that one way alone draws what it always did.
        way, alpha = ways[int(torch.randint(2, (), generator=generator)) if len(ways) == 2 else 0]
        return way(clips, labels, num_classes=cfg.MODEL.NUM_CLASSES, alpha=alpha, generator=generator)

    return mixed


def precision(cfg: CfgNode, device: torch.device) -> Precision:
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[cfg.TRAIN.DTYPE]
    scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
    return Precision(cfg.TRAIN.ACCUMULATE, cfg.SOLVER.CLIP_NORM, dtype, scaler)


def optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.SGD:
    return optim.sgd(
        model,
        lr=cfg.SOLVER.BASE_LR,  # each step sets its own
        momentum=cfg.SOLVER.MOMENTUM,
        nesterov=cfg.SOLVER.NESTEROV,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
    )


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
    sgd: torch.optim.Optimizer
    precision: Precision
    progress: Progress
    meter: Meter
    failures: FailureBudget
    nonfinite: NonFinite
    ema: Ema | None
    stop: StopRequest
    clips: Loader
    validate: Callable[..., Evaluation] | None

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
            "versions": {"octvideo": octvideo.__version__, "torch": str(torch.__version__)},
        }
        checkpoint.save(Path(cfg.OUTPUT_DIR), self.progress.step, state, keep=cfg.TRAIN.KEEP_CHECKPOINTS)

    def after_step(self, profiler: StepProfiler | None) -> None:
        cfg = self.cfg
        if profiler:
            profiler.step()
        if self.ema:
            self.ema.update(self.progress.step)
        self.check_stop()
        if cfg.TRAIN.CHECKPOINT_STEPS and self.progress.step % cfg.TRAIN.CHECKPOINT_STEPS == 0:
            self.save()

    def check_stop(self) -> None:
        self.stop.check(self.device, self.progress.step)

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
            with self.ema.applied() if self.ema else contextlib.nullcontext():
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
        batches, prepare = self.clips.batch_sampler, prepare_clips(self.cfg)
        assert isinstance(batches, loader.TrainBatches)
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
    if cfg.TRAIN.DTYPE == "bfloat16" and device.type == "cpu":
        # torch 2.13 (oneDNN): the weight gradient of a kernel longer in time than the map reads memory nobody wrote
        problem = "TRAIN.DTYPE bfloat16 on a CPU gives gradients that are not numbers; use float32, float16 or a GPU"
        raise ConfigError(network_name(cfg), [problem])
    classes = class_names(cfg, cfg.DATA.TRAIN_LIST)
    videos = video_list(cfg, cfg.DATA.TRAIN_LIST, training=True)
    clips = train_loader(cfg, videos, world, device)
    validate = _validation(cfg, world, device) if cfg.TRAIN.VAL_PERIOD else None
    if cfg.TEST.ENABLE:
        tested = test_list(cfg).source  # what is wrong with it should show before the training, not after
        check_class_order(classes, class_names(cfg, tested), tested, whose=(videos.source, tested))
    model = network(cfg)
    start = _starting_point(cfg, folder, model)
    place(cfg, model, device)
    torch.manual_seed(cfg.SEED + 1 + world.rank)  # dropout differs between ranks; weights did not
    step, in_epoch = (start["step"], start["step_in_epoch"] > 0) if start else (0, False)
    log = Log(folder, main=world.main, step=step, in_epoch=in_epoch)
    steps_per_epoch = len(clips)
    allowed = int(cfg.DATA.MAX_FAILED_FRACTION * steps_per_epoch * cfg.TRAIN.BATCH_SIZE)
    run = _Run(
        cfg,
        epochs_in_all(cfg, steps_per_epoch),
        classes,
        world,
        device,
        log,
        model,
        optimizer(cfg, model),
        precision(cfg, device),
        Progress(),
        Meter(device, world),
        FailureBudget(allowed, log, folder / "failed.txt"),
        NonFinite(cfg.TRAIN.MAX_NONFINITE, folder, videos.path, log),
        Ema(model, cfg.TRAIN.EMA_DECAY) if cfg.TRAIN.EMA_DECAY else None,
        StopRequest(),
        clips,
        validate,
    )
    if start:
        run.restore(start)
    _announce(run, len(videos), steps_per_epoch)
    if world.main:
        checkpoint.write_atomic(folder / "config.yaml", cfg.dump().encode())
    with run.stop, _profiler(run) as profiler:
        try:
            fit(
                _parallel(cfg, model, world, device),
                run.sgd,
                clips,
                progress=run.progress,
                meter=run.meter,
                epochs=run.epochs,
                lr_at=learning_rate(cfg, steps_per_epoch),
                prepare=prepare_clips(cfg),
                mix=mix(cfg, world),
                loss=partial(F.cross_entropy, label_smoothing=cfg.TRAIN.LABEL_SMOOTHING),
                precision=run.precision,
                freeze_norm_stats=cfg.TRAIN.FREEZE_NORM_STATS,
                failures=run.failures,
                nonfinite=run.nonfinite,
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
    videos = test_list(cfg)
    classes = _classes_of(state, path, cfg.MODEL.NUM_CLASSES)
    of_data = class_names(cfg, videos.source)
    check_class_order(classes, of_data, str(path))
    model = network(cfg)
    checkpoint.load_weights(model, checkpoint.averaged(state), path)
    result = evaluate(
        place(cfg, model, device),
        eval_loader(cfg, videos, world, device, num_clips=cfg.TEST.CLIPS, num_crops=cfg.TEST.CROPS),
        torch.from_numpy(videos.labels),
        num_classes=cfg.MODEL.NUM_CLASSES,
        num_clips=cfg.TEST.CLIPS,
        num_crops=cfg.TEST.CROPS,
        prepare=prepare_clips(cfg),
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
        f"{found.metrics['videos_scored']} of {len(videos)} {'images' if takes_images(cfg) else 'videos'} scored with "
        f"{found.facts['views']} view(s) each, "
        f"{found.facts['macs'] / 1e9:.3f} G multiply-adds, {found.facts['params'] / 1e6:.3f} M parameters"
    )
    for video, reason in found.failed:
        log.say(f"  counted as wrong: {found.paths[video]}: {reason}")
    log.close()
    return found


def _facts(cfg: CfgNode, path: Path, state: dict[str, Any], result: Evaluation, videos: VideoList) -> dict[str, Any]:
    """Where scores are from, kept with them."""
    clip = cost(cfg, cfg.DATA.TEST_CROP)
    return {
        "macs": clip.macs.total,
        "params": clip.params,
        "input": list(clip.input),
        "clips_per_s": round(result.clips_per_s, 2),
        "model": network_name(cfg),
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
    videos = video_list(cfg, cfg.DATA.VAL_LIST, training=False)
    clips = eval_loader(cfg, videos, world, device, num_clips=1, num_crops=1)
    return partial(
        evaluate,
        loader=clips,
        labels=torch.from_numpy(videos.labels),
        num_classes=cfg.MODEL.NUM_CLASSES,
        num_clips=1,
        num_crops=1,
        prepare=prepare_clips(cfg),
        clips_per_forward=cfg.TEST.BATCH_SIZE,
        device=device,
        world=world,
        title="validation",
    )


def _starting_point(cfg: CfgNode, folder: Path, model: nn.Module) -> dict[str, Any] | None:
    """Put the weights to start from into the model; the checkpoint to go on with, or None at a start.

    1. TRAIN.RESUME FILE: that file.
    2. TRAIN.RESUME auto: the newest whole checkpoint in OUTPUT_DIR; where there is none, as below.
    3. TRAIN.INIT FILE: its weights, at epoch 0.
    4. Weights drawn from SEED.
    TRAIN.RESUME none in a folder with checkpoints is refused, since it would mix two runs.
    """
    resume = cfg.TRAIN.RESUME
    if resume not in ("none", "auto"):
        path = Path(resume)
        state = checkpoint.load(path)
        checkpoint.load_weights(model, state["model"], path)
        later = [p.name for p in checkpoint.found(folder) if checkpoint.step_of(p) > state["step"]]
        if later:
            raise CheckpointError(
                f"{folder}: holds {', '.join(later)}, later than {path} (step {state['step']}); going back would mix two "
                "runs: give another OUTPUT_DIR"
            )
        return state
    if resume == "auto" and (newest := checkpoint.latest(folder)):
        path, state = newest
        checkpoint.load_weights(model, state["model"], path)
        return state
    if resume == "none" and checkpoint.found(folder):
        raise CheckpointError(
            f"{folder}: holds checkpoints of an earlier run; go on with TRAIN.RESUME auto or give another OUTPUT_DIR"
        )
    if cfg.TRAIN.INIT:
        path = Path(cfg.TRAIN.INIT)
        checkpoint.load_weights(model, checkpoint.load(path)["model"], path, new_head=cfg.TRAIN.NEW_HEAD)
    return None


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
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def _profiler(run: _Run) -> contextlib.AbstractContextManager[StepProfiler | None]:
    cfg = run.cfg
    if not cfg.TRAIN.PROFILE_STEPS:
        return contextlib.nullcontext()
    folder = Path(cfg.OUTPUT_DIR) / "profile"
    return StepProfiler(cfg.TRAIN.PROFILE_STEPS, folder, run.world.rank, run.device, run.log)


def _announce(run: _Run, videos: int, steps: int) -> None:
    """Print the derived numbers where they are derived. steps: of an epoch."""
    cfg, log, world, device, progress = run.cfg, run.log, run.world, run.device, run.progress
    batch, lr = cfg.TRAIN.BATCH_SIZE, learning_rate(cfg, steps)
    clip = cost(cfg, cfg.DATA.TRAIN_CROP)
    octave = f"octave alpha {cfg.OCTAVE.ALPHA:g}, pool {octave_pool(cfg)}" if cfg.OCTAVE.ALPHA else "vanilla"
    octave += f", low channels in {cfg.OCTAVE.ROUND_TO}s" if cfg.OCTAVE.ALPHA and cfg.OCTAVE.ROUND_TO > 1 else ""
    kind, unit = ("images", "images") if takes_images(cfg) else ("videos", "clips")
    log.say(
        f"{network_name(cfg)} ({octave}): {clip.params / 1e6:.3f} M parameters, "
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
        held = " + ".join(str(round(count)) for count in _iterations(cfg))
        log.say(f"steps at each rate {cfg.SOLVER.ITERATIONS} of {cfg.SOLVER.BASE_BATCH} clips -> {held} of {batch}")
    if progress.step:
        part = f" and {progress.step_in_epoch} steps of the next" if progress.step_in_epoch else ""
        log.say(f"going on after epoch {progress.epoch}{part} (step {progress.step})")
    facts = {"params": clip.params, "macs": clip.macs.total, "world_size": world.size, "videos": videos, "steps": steps}
    log.event("run", progress.step, facts)
