"""Names the keys of a configuration that have no effect in it, since another key decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fvcore.common.config import CfgNode

from octvideo.config import defaults
from octvideo.errors import shown
from octvideo.yaml_file import flatten

Row = tuple[bool, Sequence[str], str]  # does this hold? then these keys have no effect, and why

FRAMES = ("DATA.NUM_FRAMES", "DATA.SAMPLING_RATE", "DATA.TARGET_FPS", "DATA.POLICY", "DATA.SHORT")
EVALUATION = ("DATA.VAL_LIST", "DATA.TEST_SHORT_SIDE", "TEST.BATCH_SIZE")
STRENGTH = ("DATA.RANDAUGMENT_MAGNITUDE", "DATA.RANDAUGMENT_STD")
TRAINING = (
    *("DATA.TRAIN_LIST", "DATA.MAX_FAILED_FRACTION", "DATA.TRAIN_SHORT_SIDE", "DATA.TRAIN_AREA", "DATA.FLIP"),
    *("DATA.RANDAUGMENT_OPS", *STRENGTH),
)


def unused(cfg: CfgNode, *, images: bool, absent: Mapping[str, str]) -> list[str]:
    """Return lines "KEY VALUE has no effect: why", one for each reason, of keys that differ from their default.

    images: the network takes images. absent: key -> why the network does not read it.
    """
    values, default = dict(flatten(cfg)), dict(flatten(defaults()))
    rows = [*_of_the_mode(cfg, images), *_of_the_network(cfg, images), *_of_the_solver(cfg)]
    rows += [(True, [key], why) for key, why in absent.items()]
    left = {key for key in values if values[key] != default[key]}
    lines = []
    for holds, keys, why in rows:
        named = [key for key in keys if key in left] if holds else []
        left -= set(named)
        if named:
            texts = ", ".join(f"{key} {shown(values[key], 200)}" for key in named)
            lines.append(f"{texts} {'has' if len(named) == 1 else 'have'} no effect: {why}")
    return lines


def _of_the_mode(cfg: CfgNode, images: bool) -> Iterator[Row]:
    train, test = cfg.TRAIN, cfg.TEST
    validates = train.ENABLE and train.VAL_PERIOD > 0
    sections = [key for key in dict(flatten(cfg)) if key.startswith(("TRAIN.", "SOLVER.")) and key != "TRAIN.ENABLE"]
    yield not train.ENABLE, [*sections, *TRAINING], "TRAIN.ENABLE is False"
    # an image network admits no other views than its base sets
    views = () if images else ("TEST.CLIPS", "TEST.CROPS")
    yield not test.ENABLE, ("DATA.TEST_LIST", "TEST.CHECKPOINT", *views), "TEST.ENABLE is False"
    yield not validates and not test.ENABLE, EVALUATION, "TRAIN.VAL_PERIOD is 0 and TEST.ENABLE is False"
    yield not validates and bool(cfg.DATA.TEST_LIST), ("DATA.VAL_LIST",), "only DATA.TEST_LIST is evaluated"
    resumes_file = train.RESUME not in ("none", "auto")
    yield resumes_file, ("TRAIN.INIT", "TRAIN.NEW_HEAD"), "the weights are those of TRAIN.RESUME"
    yield not cfg.DATA.RANDAUGMENT_OPS, STRENGTH, "DATA.RANDAUGMENT_OPS is 0"
    yield not cfg.DATA.NUM_WORKERS, ("DATA.TIMEOUT_S",), "DATA.NUM_WORKERS is 0"
    yield cfg.DEVICE == "cuda", ("NUM_THREADS",), "DEVICE is cuda"


def _of_the_network(cfg: CfgNode, images: bool) -> Iterator[Row]:
    octave, name = cfg.OCTAVE, cfg.MODEL.FACTORY or cfg.MODEL.NAME
    yield images, (*FRAMES, "DATA.TRAIN_SHORT_SIDE", "DATA.DECODER"), f"{name} takes images"
    yield not images, ("DATA.TRAIN_AREA", "DATA.INTERPOLATION"), f"{name} takes videos"
    built = ("MODEL.NAME", "MODEL.DROPOUT", "MODEL.POOL_PADDING", "MODEL.NONLOCAL_FORM")
    yield bool(cfg.MODEL.FACTORY), built, "MODEL.FACTORY builds the network"
    vanilla = not any(octave.RATIOS or [octave.ALPHA])
    yield bool(octave.RATIOS), ("OCTAVE.ALPHA",), "OCTAVE.RATIOS has the alpha of each stage"
    yield vanilla, ("OCTAVE.POOL", "OCTAVE.ROUND_TO"), "no stage has low-frequency channels"


def _of_the_solver(cfg: CfgNode) -> Iterator[Row]:
    schedule = cfg.SOLVER.SCHEDULE
    yield schedule != "steps", ("SOLVER.MILESTONES",), f"SOLVER.SCHEDULE is {schedule}"
    yield schedule == "iterations", ("TRAIN.EPOCHS",), "SOLVER.ITERATIONS has the length of the run"
    yield not cfg.SOLVER.WARMUP_EPOCHS, ("SOLVER.WARMUP_LR",), "SOLVER.WARMUP_EPOCHS is 0"
