"""The composition root: a configuration -> networks, loaders, optimizer, schedule.

With jobs.py, which runs what is built here, the only library file that reads a configuration.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.utils.data import Dataset

from octvideo import config
from octvideo.analysis.complexity import Complexity, complexity
from octvideo.config import ConfigError
from octvideo.data import images, lists, loader, transforms
from octvideo.data.dataset import EvalDataset, Replacing, Sample, TrainDataset
from octvideo.data.decode import BACKENDS
from octvideo.data.images import ImageEvalDataset, ImageTrainDataset
from octvideo.data.lists import ListError, VideoList
from octvideo.data.loader import Loader
from octvideo.data.sampling import POLICIES, SHORT, seeded_generator
from octvideo.engine import optim
from octvideo.engine.distributed import World
from octvideo.engine.train import Precision
from octvideo.errors import shown
from octvideo.files import first_line, unprintable
from octvideo.models import (
    NETWORKS,
    ResNetSpec,
    SlowFastSpec,
    Spec,
    compile_blocks,
    create,
    factory,
    feature_sizes,
    with_octave,
    with_pool_padding,
)
from octvideo.octave import octavize, use_onednn
from octvideo.unused import unused as unused_keys


def _is_image_network(spec: Spec) -> bool:
    return not isinstance(spec, SlowFastSpec) and spec.dims == 2


IMAGE_NETWORKS = frozenset(name for name, describe in NETWORKS.items() if _is_image_network(describe()))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> CfgNode:
    """A file and KEY VALUE overrides -> a checked configuration. Raises ConfigError listing every problem at once."""
    cfg, problems = config.read(path, overrides)
    refused = {problem.split()[0] for problem in problems}  # these keys still have their default
    image_networks = IMAGE_NETWORKS
    if cfg.MODEL.FACTORY:
        try:
            image_networks = frozenset([cfg.MODEL.FACTORY] if takes_images(cfg) else [])
        except ValueError as error:
            problems.append(f"MODEL.FACTORY is {error}")
    wrong = config.check(
        cfg, networks=NETWORKS, image_networks=image_networks, decoders=BACKENDS, policies=POLICIES, shorts=SHORT
    )
    problems += [problem for problem in wrong if problem.split()[0] not in refused]
    if not problems and cfg.MODEL.FACTORY:
        problems += _factory_problems(cfg)
    elif not problems:
        problems += _shape_problems(cfg)
    if problems:
        raise ConfigError(str(path), problems)
    return cfg


def unused(cfg: CfgNode) -> list[str]:
    """Return lines "KEY VALUE has no effect: why" on keys that differ from their default, for the start of a run."""
    absent = {}
    if not cfg.MODEL.FACTORY:
        spec = network_spec(cfg)
        pathways = [spec.slow, spec.fast] if isinstance(spec, SlowFastSpec) else [spec]
        if not any(getattr(stage, "nonlocal_after", ()) for pathway in pathways for stage in pathway.stages):
            absent["MODEL.NONLOCAL_FORM"] = f"{cfg.MODEL.NAME} has no non-local block"
    return unused_keys(cfg, images=takes_images(cfg), absent=absent)


def load_sweep(
    path: str | Path,
    overrides: Sequence[str],
    lines: Sequence[tuple[str, Sequence[str]]],
    check: Callable[[CfgNode], Sequence[str]] = lambda cfg: (),
) -> list[CfgNode]:
    """Return a checked configuration for each line (place, further overrides): the file, the overrides, then those.

    Of several lines, one without OUTPUT_DIR gets OUTPUT_DIR/0, /1, ... check: returns further problems of a configuration.
    Raises ConfigError with the problems of all lines, each problem once, also if two lines would write to one folder.
    """
    cfgs, users = [], dict[Path, str]()
    problems: dict[str, list[str]] = {}  # problem -> places
    several = len(lines) > 1 or bool(lines[0][0])
    for number, (place, more) in enumerate(lines):
        try:
            cfg = load_config(path, [*overrides, *more])
            if several and "OUTPUT_DIR" not in more[0::2]:
                cfg = load_config(path, [*overrides, *more, "OUTPUT_DIR", str(Path(cfg.OUTPUT_DIR) / str(number))])
        except ConfigError as error:
            found = error.problems
        else:
            cfgs.append(cfg)
            found = [*check(cfg)]
            folder = Path(cfg.OUTPUT_DIR).resolve()
            if folder in users:
                found.append(f"OUTPUT_DIR {cfg.OUTPUT_DIR} is that of {users[folder]} already")
            users[folder] = place
        for problem in found:
            problems.setdefault(problem, []).append(place)
    if problems:
        raise ConfigError(str(path), [f"{_places(places)}{problem}" for problem, places in problems.items()])
    return cfgs


def _places(places: Sequence[str]) -> str:
    """Return places "FILE, line N" as the beginning of a message."""
    if len(places) == 1:
        return f"{places[0]}: " if places[0] else ""
    file = places[0].rpartition(", line ")[0]
    return f"{file}, lines {', '.join(place.rpartition(', line ')[2] for place in places)}: "


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
    """Return what is wrong with another package's network: it must convert, take the crops and give logits of the classes.

    Its code may raise anything.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            structure = copy.deepcopy(_factory_network(cfg)).to("meta").eval()
    except ValueError as error:  # of from_factory and octavize, whose text is complete
        return [f"MODEL.FACTORY is {cfg.MODEL.FACTORY}: {error}"]
    except Exception as error:  # noqa: BLE001  # their code
        return [f"MODEL.FACTORY is {cfg.MODEL.FACTORY}: its network cannot be built and converted: {_raised(error)}"]
    problems = []
    for key, crop in (("DATA.TRAIN_CROP", cfg.DATA.TRAIN_CROP), ("DATA.TEST_CROP", cfg.DATA.TEST_CROP)):
        try:
            with torch.no_grad():
                logits = structure(torch.empty(1, *clip_size(cfg, crop), device="meta"))
        except Exception as error:  # noqa: BLE001  # their code
            size = clip_size(cfg, crop)
            problems.append(f"{key} is {crop}: {cfg.MODEL.FACTORY} does not take {size}: {_raised(error)}")
            continue
        if not isinstance(logits, Tensor) or tuple(logits.shape) != (1, cfg.MODEL.NUM_CLASSES):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            problems.append(
                f"MODEL.FACTORY is {cfg.MODEL.FACTORY}: its network gives {got} for one clip, not logits "
                f"(1, {cfg.MODEL.NUM_CLASSES})"
            )
    return problems


def _raised(error: Exception) -> str:
    """Return an exception's type and the first line of its text, if it has one."""
    name = type(error).__name__
    return name if (line := first_line(error)) == name else f"{name}: {line}"


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


def place(cfg: CfgNode, model: nn.Module, device: torch.device, *, training: bool = False) -> nn.Module:
    """Move the model to its device, its weights in the memory format of MODEL.CHANNELS_LAST, compiled as MODEL.COMPILE says.

    Names of weights stay the same. CUDA graphs are for training alone, where batches have one shape; a model that is only
    evaluated is compiled without them. Raises ConfigError for what the device cannot do.
    """
    check_device(cfg, device, training=training)
    model.to(device).to(memory_format=memory_format(cfg))  # type: ignore[call-overload]
    if device.type == "cpu" and torch.get_num_threads() == 1:
        use_onednn(model)
    if cfg.MODEL.COMPILE != "off":
        compile_blocks(model, cuda_graphs=training and cfg.MODEL.COMPILE == "graphs")
    return model


def check_device(cfg: CfgNode, device: torch.device, *, training: bool) -> None:
    """Raise ConfigError for what would fail in the first step on this device, or compute wrong numbers there."""
    problems = []
    compiler = os.environ.get("CXX", "g++")
    if cfg.MODEL.COMPILE != "off" and device.type == "cpu" and not shutil.which(compiler):
        problems.append(
            f"MODEL.COMPILE is {cfg.MODEL.COMPILE}: a CPU needs a C++ compiler for it, and there is no {compiler!r} here; "
            "install one, name it in CXX, or set MODEL.COMPILE off"
        )
    if training and cfg.MODEL.COMPILE == "graphs" and device.type != "cuda":
        problems.append(
            f"MODEL.COMPILE is graphs, but the device is {device.type}: CUDA graphs need a CUDA device; set MODEL.COMPILE "
            "default"
        )
    bfloat16 = training and cfg.TRAIN.DTYPE == "bfloat16"
    if bfloat16 and device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        problems.append(
            f"TRAIN.DTYPE is bfloat16, but {torch.cuda.get_device_name(device)} (compute capability "
            f"{'.'.join(map(str, capability))}) has no bfloat16, which 8.0 and later have; set TRAIN.DTYPE float16 or "
            "float32"
        )
    if bfloat16 and device.type == "cpu":
        # torch 2.13 (oneDNN): where a kernel is longer in time than the input, the weight gradient reads memory that
        # nothing has written
        problems.append(
            "TRAIN.DTYPE is bfloat16, which on a CPU gives gradients that are not numbers; set TRAIN.DTYPE float32 or "
            "float16, or use a GPU"
        )
    if problems:
        raise ConfigError(network_name(cfg), problems)


def evaluated(cfg: CfgNode) -> contextlib.AbstractContextManager[None]:
    """Return the context of an evaluation within training: with MODEL.COMPILE graphs the model runs eagerly inside.

    Graphs hold for the shape of a training batch. Validation has other crops and a smaller last batch.
    """
    eager = cfg.MODEL.COMPILE == "graphs"
    return torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext()


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
        lines = [line.strip() for _, line in lists.text_lines(file, "file of class names")]
    except ListError as error:
        raise ConfigError(f"DATA.CLASS_NAMES {file}", [str(error)]) from None
    names = [line for line in lines if line]
    if broken := [f"{shown(name)} {unprintable(name)}; rename it" for name in names if unprintable(name)]:
        raise ConfigError(f"class names in {file}", broken[:1])
    if len(names) != cfg.MODEL.NUM_CLASSES or len(set(names)) != len(names):
        problem = (
            f"{len(names)} names, {len(set(names))} of them different, for MODEL.NUM_CLASSES {cfg.MODEL.NUM_CLASSES}; "
            "give one name a line, in the order of the labels"
        )
        raise ConfigError(f"class names in {file}", [problem])
    return names


def use_threads(cfg: CfgNode, world: World) -> None:
    """Set torch's threads in this process. Each more than there are free cores would make all of them wait."""
    torch.set_num_threads(cfg.NUM_THREADS or max(1, _cores() // world.local_size - cfg.DATA.NUM_WORKERS))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def video_list(cfg: CfgNode, path: str, *, training: bool) -> VideoList:
    """The videos, or images, of a list (or of a folder of images)."""
    read = images.read_images if takes_images(cfg) else lists.read_list
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
    return _loader(cfg, samples, videos, batches, world, device)


def train_samples(cfg: CfgNode, videos: VideoList) -> TrainDataset | ImageTrainDataset:
    if takes_images(cfg):
        return ImageTrainDataset(
            videos,
            crop=cfg.DATA.TRAIN_CROP,
            crop_area=tuple(cfg.DATA.TRAIN_AREA),
            interpolation=cfg.DATA.INTERPOLATION,
            max_pixels=cfg.DATA.MAX_PIXELS,
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
        max_pixels=cfg.DATA.MAX_PIXELS,
        seed=cfg.SEED,
    )


def eval_loader(
    cfg: CfgNode, videos: VideoList, world: World, device: torch.device, *, num_clips: int, num_crops: int
) -> Loader:
    videos_per_batch = max(1, cfg.TEST.BATCH_SIZE // (num_clips * num_crops))
    batches = loader.EvalBatches(len(videos), batch_size=videos_per_batch, rank=world.rank, world_size=world.size)
    return _loader(cfg, eval_samples(cfg, videos, num_clips, num_crops), videos, batches, world, device)


def eval_samples(cfg: CfgNode, videos: VideoList, num_clips: int, num_crops: int) -> EvalDataset | ImageEvalDataset:
    if takes_images(cfg):
        return ImageEvalDataset(
            videos,
            short_side=cfg.DATA.TEST_SHORT_SIDE,
            crop=cfg.DATA.TEST_CROP,
            interpolation=cfg.DATA.INTERPOLATION,
            max_pixels=cfg.DATA.MAX_PIXELS,
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
        max_pixels=cfg.DATA.MAX_PIXELS,
    )


def _loader(
    cfg: CfgNode,
    samples: Dataset[Sample],
    videos: VideoList,
    batches: loader.TrainBatches | loader.EvalBatches,
    world: World,
    device: torch.device,
) -> Loader:
    if world.main:
        _note_cores(cfg.DATA.NUM_WORKERS)
    return Loader(
        samples,
        batches,
        path_of=videos.path,
        num_workers=cfg.DATA.NUM_WORKERS,
        timeout_s=cfg.DATA.TIMEOUT_S,
        pin_memory=device.type == "cuda",
    )


@lru_cache  # a run has several loaders
def _note_cores(num_workers: int) -> None:
    if num_workers > (cores := _cores()):
        text = (
            f"DATA.NUM_WORKERS is {num_workers}, but this process has {cores} cores: set {cores}, more only use memory"
        )
        print(text, file=sys.stderr)


def epochs_in_all(cfg: CfgNode, steps_per_epoch: int) -> float:
    """The length of the run. SOLVER.ITERATIONS may end it within an epoch."""
    return _rates_end(cfg, steps_per_epoch)[-1] if cfg.SOLVER.SCHEDULE == "iterations" else cfg.TRAIN.EPOCHS


def _rates_end(cfg: CfgNode, steps_per_epoch: int) -> tuple[float, ...]:
    """Where each rate of SOLVER.ITERATIONS ends, in epochs."""
    return optim.milestones_of(iterations(cfg), steps_per_epoch)


def iterations(cfg: CfgNode) -> list[float]:
    """SOLVER.ITERATIONS as steps of TRAIN.BATCH_SIZE: as many clips, whatever the batch."""
    return [count * cfg.SOLVER.BASE_BATCH / cfg.TRAIN.BATCH_SIZE for count in cfg.SOLVER.ITERATIONS]


def learning_rate(cfg: CfgNode, steps_per_epoch: int) -> Callable[[float], float]:
    """Completed epochs -> learning rate for TRAIN.BATCH_SIZE."""
    scale = cfg.TRAIN.BATCH_SIZE / cfg.SOLVER.BASE_BATCH
    base_lr = cfg.SOLVER.BASE_LR * scale
    schedule: Callable[[float], float]
    if cfg.SOLVER.SCHEDULE == "steps":
        schedule = partial(optim.steps, base_lr=base_lr, milestones=tuple(cfg.SOLVER.MILESTONES))
    elif cfg.SOLVER.SCHEDULE == "iterations":
        schedule = partial(optim.steps, base_lr=base_lr, milestones=_rates_end(cfg, steps_per_epoch)[:-1])
    else:
        schedule = partial(optim.cosine, epochs=cfg.TRAIN.EPOCHS, base_lr=base_lr)
    return partial(
        optim.warmed_up,
        schedule=schedule,
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


def optimizer(cfg: CfgNode, model: nn.Module) -> optim.SGD:
    return optim.sgd(
        model,
        lr=cfg.SOLVER.BASE_LR,  # each step sets its own
        momentum=cfg.SOLVER.MOMENTUM,
        nesterov=cfg.SOLVER.NESTEROV,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
    )
