"""The configuration: every key with its unit, range and effect; reading YAML; one list of all that is wrong.

A file holds what differs from its `_BASE_` (octvideo.yaml_file). `read` merges base, file and KEY VALUE overrides; `check`
looks at the values and changes none; `unused` names those that nothing reads.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from octvideo import yaml_file
from octvideo.config_values import coerced, value_of
from octvideo.errors import UserError, plain, shown
from octvideo.files import PathError, expanded
from octvideo.yaml_file import YamlError, flatten


class ConfigError(UserError, ValueError):
    """One message that lists every problem of a configuration."""

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n  ".join([f"{where}: {len(self.problems)} problem(s)", *self.problems]))


COMPILE_MODES = ("off", "default", "graphs")


def defaults() -> CfgNode:
    """A new configuration with every key at its default."""
    cfg = CfgNode()
    cfg.OUTPUT_DIR = ""  # folder for checkpoints, metrics.jsonl, TensorBoard and test.json; must be given
    cfg.SEED = 0  # integer >= 0; seeds weights, data order, augmentation and dropout
    cfg.DEVICE = "auto"  # auto (a GPU where there is one), cpu or cuda
    cfg.NUM_THREADS = 0  # of torch in each process on a CPU; 0: the cores that processes and their decoding leave

    cfg.MODEL = CfgNode()
    cfg.MODEL.NAME = "i3d_r50"  # a name in octvideo.models.zoo.NETWORKS
    # In place of NAME: package.module:function, which gives any network for num_classes=NUM_CLASSES (docs/octavize.md). It
    # is imported and called: name only code that you trust. DROPOUT, POOL_PADDING and NONLOCAL_FORM are not its.
    cfg.MODEL.FACTORY = ""
    cfg.MODEL.NUM_CLASSES = 400  # labels are 0 .. NUM_CLASSES - 1
    cfg.MODEL.DROPOUT = 0.5  # before the classifier, 0 to below 1
    cfg.MODEL.POOL_PADDING = 1  # of the stem's max-pool: 1 (PySlowFast, pytorchvideo) or 0 (the paper's counts)

    # channels_last memory: faster for small networks on CPUs and in half precision on GPUs
    cfg.MODEL.CHANNELS_LAST = False
    # torch.compile each block of the network: off, default, or graphs (default with CUDA graphs, for training on a GPU).
    # Takes up to minutes in the first step; dropout uses a different random stream. True means default, False off.
    cfg.MODEL.COMPILE = "off"
    cfg.MODEL.NONLOCAL_FORM = "softmax"  # softmax or dot_product, in networks with non-local blocks

    cfg.OCTAVE = CfgNode()
    cfg.OCTAVE.ALPHA = 0.0  # share of low-frequency channels, 0 to 1; 0 is the vanilla network
    cfg.OCTAVE.POOL = [1, 2, 2]  # factor between the frequencies in T, H, W: [1, 2, 2] or [2, 2, 2]; images have no T
    cfg.OCTAVE.RATIOS = []  # alpha of each stage; [] is [ALPHA, ..., ALPHA, 0], the paper's
    cfg.OCTAVE.ROUND_TO = (
        1  # low channels of a layer: nearest multiple of this, >= 1; 8 for tensor cores, 1 the paper's
    )

    # Image networks read images; what counts frames, and the short side and decoder of videos, is not theirs.
    cfg.DATA = CfgNode()
    cfg.DATA.TRAIN_LIST = ""  # file of lines `path label`; for images also a folder with one folder per class
    cfg.DATA.VAL_LIST = ""  # the same, for validation after epochs
    cfg.DATA.TEST_LIST = ""  # the same, for the final test; empty: VAL_LIST
    cfg.DATA.PREFIX = ""  # put before every relative path of the lists
    cfg.DATA.CLASS_NAMES = (
        ""  # file of class names, one a line in label order; empty: labels.txt beside the list, if any
    )
    cfg.DATA.SEPARATOR = " "  # between path and label; the label follows the last one, so paths may hold spaces
    cfg.DATA.DECODER = "auto"  # a name in octvideo.data.decode.BACKENDS, or auto
    cfg.DATA.MAX_PIXELS = 64_000_000  # of a frame or an image that is decoded; larger ones are refused (8K: 33 million)
    cfg.DATA.NUM_FRAMES = 8  # frames of a clip, >= 1
    cfg.DATA.SAMPLING_RATE = 8  # frames of the video per frame of the clip, >= 1
    cfg.DATA.TARGET_FPS = 30.0  # SAMPLING_RATE counts frames at this rate; 0: at the file's own
    cfg.DATA.POLICY = "strided"  # a name in octvideo.data.sampling.POLICIES; SlowFast's slow frames follow it too
    cfg.DATA.SHORT = ""  # a name in octvideo.data.sampling.SHORT, for clips longer than the video; empty: POLICY's own
    cfg.DATA.TRAIN_SHORT_SIDE = [256, 320]  # pixels, [lowest, highest]; drawn for each training clip
    cfg.DATA.TRAIN_CROP = 224  # pixels, square
    cfg.DATA.TRAIN_AREA = [0.08, 1.0]  # images: share of the image that a training crop covers, [lowest, highest]
    cfg.DATA.INTERPOLATION = "bilinear"  # images: bilinear or bicubic
    cfg.DATA.FLIP = True  # mirror half of the training clips; off where left and right are classes
    cfg.DATA.RANDAUGMENT_OPS = 0  # operations of RandAugment on each training clip, the same in all frames; 0: none
    cfg.DATA.RANDAUGMENT_MAGNITUDE = 9.0  # their strength, 0 to 10; has no effect without operations
    cfg.DATA.RANDAUGMENT_STD = 0.0  # deviation of the strength, drawn for each operation, 0 (none) to 10
    cfg.DATA.TEST_SHORT_SIDE = 256  # pixels, validation and test
    cfg.DATA.TEST_CROP = 256  # pixels, square, at most TEST_SHORT_SIDE
    cfg.DATA.MEAN = [0.45, 0.45, 0.45]  # RGB, of pixels in 0 to 1
    cfg.DATA.STD = [0.225, 0.225, 0.225]  # RGB, of pixels in 0 to 1
    cfg.DATA.NUM_WORKERS = 2  # decoding processes per training process; 0 decodes in the process itself
    cfg.DATA.TIMEOUT_S = 120  # seconds until a silent worker ends the run, naming the file it reads; 0: never
    cfg.DATA.MAX_FAILED_FRACTION = (
        0.0  # share of an epoch's training clips that may be replaced when they cannot be decoded
    )

    cfg.TRAIN = CfgNode()
    cfg.TRAIN.ENABLE = True  # train before testing
    cfg.TRAIN.BATCH_SIZE = 64  # clips per step over ALL processes; divisible by their number
    cfg.TRAIN.EPOCHS = 196  # passes over the training list; with SOLVER.SCHEDULE iterations, that says how long
    cfg.TRAIN.VAL_PERIOD = 1  # epochs between validations; 0: none. The last epoch is always validated otherwise
    cfg.TRAIN.CHECKPOINT_PERIOD = 1  # epochs between checkpoints; the last epoch always leaves one
    cfg.TRAIN.CHECKPOINT_STEPS = 0  # steps between checkpoints within an epoch as well; 0: none
    cfg.TRAIN.KEEP_CHECKPOINTS = 3  # newest ones kept, >= 1
    cfg.TRAIN.RESUME = "none"  # none (refuses a folder with checkpoints), auto (newest whole one, else start) or a file
    # With RESUME, if the list or SEED changed within an epoch: begin that epoch again; False: such a change is an error
    cfg.TRAIN.RESTART_EPOCH = False
    cfg.TRAIN.INIT = (
        ""  # checkpoint of octvideo to take weights from (of others: tools/inflate.py); its alpha may differ
    )
    cfg.TRAIN.NEW_HEAD = False  # with INIT: the classifier starts anew (fine-tuning on other classes)
    cfg.TRAIN.LABEL_SMOOTHING = 0.0  # share of the target spread over all classes, 0 to below 1
    cfg.TRAIN.MIXUP = 0.0  # alpha of the Beta distribution that mixes pairs of clips and labels; 0: none
    cfg.TRAIN.CUTMIX = 0.0  # alpha of the Beta distribution for the size of a box out of another clip; 0: none
    # With both MIXUP and CUTMIX each process draws one of them at each step, both equally likely.
    cfg.TRAIN.EMA_DECAY = 0.0  # of a moving average of the weights, which validation and test then use; 0: none
    cfg.TRAIN.FREEZE_NORM_STATS = False  # norms use, and keep, the statistics that they have (of TRAIN.INIT)
    cfg.TRAIN.PRECISE_NORM_BATCHES = (
        0  # of training, that norms' statistics are taken of before validation; 0: running ones
    )
    cfg.TRAIN.SYNC_NORM = False  # norms' statistics over all processes' batches; False: each process's own batch
    cfg.TRAIN.CHECKPOINT_ACTIVATIONS = False  # recompute blocks in backward: less memory, up to half more time
    cfg.TRAIN.ACCUMULATE = 1  # parts that each process takes its batch in, for less memory; norms see the parts apart
    cfg.TRAIN.DTYPE = (
        "float32"  # of convolutions in training: float32, float16 (with a loss scaler) or, on GPUs, bfloat16
    )
    cfg.TRAIN.MAX_NONFINITE = 0  # steps of the run that may be skipped because loss or gradient are not finite
    cfg.TRAIN.PROFILE_STEPS = 0  # steps whose trace is left in OUTPUT_DIR/profile, the first 5 of the process excepted
    cfg.TRAIN.LOG_PERIOD = 10  # steps between training lines in metrics.jsonl

    cfg.TEST = CfgNode()
    cfg.TEST.ENABLE = True  # test after training, or alone with TRAIN.ENABLE False
    cfg.TEST.CHECKPOINT = ""  # weights to test; empty: the newest checkpoint in OUTPUT_DIR
    cfg.TEST.CLIPS = 10  # clips in time per video; images: 1
    cfg.TEST.CROPS = 3  # crops in space per clip: 1 (centre) or 3 (along the longer side); images: 1
    cfg.TEST.BATCH_SIZE = 32  # clips per forward pass and process, in validation too

    cfg.SOLVER = CfgNode()
    cfg.SOLVER.BASE_LR = 0.1  # peak learning rate at BASE_BATCH; scaled linearly to TRAIN.BATCH_SIZE
    cfg.SOLVER.BASE_BATCH = 64  # clips per step that BASE_LR, WARMUP_LR and ITERATIONS belong to
    cfg.SOLVER.SCHEDULE = (
        "cosine"  # cosine (half of one, with warm-up), steps (a tenth at each milestone) or iterations
    )
    cfg.SOLVER.MILESTONES = []  # steps: epochs at which the learning rate falls to a tenth, ascending
    cfg.SOLVER.ITERATIONS = []  # iterations: steps of BASE_BATCH at BASE_LR, at a tenth of it, at a hundredth ...; no more
    cfg.SOLVER.WARMUP_EPOCHS = 34.0  # linear from WARMUP_LR to the schedule's rate at this epoch; 0: none
    cfg.SOLVER.WARMUP_LR = 0.01  # learning rate at step 0, at BASE_BATCH
    cfg.SOLVER.CLIP_NORM = 0.0  # most that the gradient's norm may be; 0: no limit
    cfg.SOLVER.MOMENTUM = 0.9  # 0 to below 1
    cfg.SOLVER.NESTEROV = True  # needs momentum
    cfg.SOLVER.WEIGHT_DECAY = 1e-4  # on convolutions and linear layers
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0  # on norms and biases
    return cfg


def key_names() -> list[str]:
    """The name of every key, as overrides give it."""
    return [key for key, _ in flatten(defaults())]


def read(path: str | Path, overrides: Sequence[str] = ()) -> tuple[CfgNode, list[str]]:
    """Lay a YAML file with its `_BASE_`, then KEY VALUE overrides, over the defaults.

    Returns the frozen configuration and every problem met: unknown keys (with the nearest one), values of a wrong type,
    overrides without a value. Raises ConfigError for a file that cannot be read at all.
    """
    problems: list[str] = []
    cfg = defaults()
    try:
        values = yaml_file.read(expanded(path))
    except (YamlError, PathError) as error:
        raise ConfigError(plain(str(path)), getattr(error, "problems", [str(error)])) from None
    for key, value in values.items():
        _assign(cfg, key, value, problems)
    if len(overrides) % 2:
        problems.append(f"override {overrides[-1]!r} has no value; overrides are pairs: KEY VALUE KEY VALUE ...")
    for key, text in zip(overrides[0::2], overrides[1::2], strict=False):
        try:
            _assign(cfg, key, _parse(text, cfg, key), problems)
        except YamlError as error:
            problems += [f"{plain(key)} is {shown(text)}: {problem}" for problem in error.problems]
    cfg.freeze()
    return cfg, problems


def changes(saved: str, cfg: CfgNode, keys: Sequence[str] = ("",)) -> list[str]:
    """What an earlier configuration, as text of CfgNode.dump, has otherwise: lines "KEY value (here value)".

    keys: beginnings of those that are looked at. A key that it lacks, being older, has its default there. It may come from
    anyone. Raises ConfigError where it is no configuration.
    """
    try:
        tree = yaml_file.parse(saved)
    except YamlError as error:
        raise ConfigError("a saved configuration", error.problems) from None
    if not isinstance(tree, dict):
        raise ConfigError("a saved configuration", ["not a mapping of sections (MODEL:, DATA:, ...)"])
    lines = []
    here, default = dict(flatten(cfg)), defaults()
    for key in here:
        if not key.startswith(tuple(keys)):
            continue
        try:
            there = _get(tree, key)
        except (KeyError, TypeError):  # no such key, or no section where one should be
            there = _get(default, key)
        with contextlib.suppress(ValueError):
            there = coerced(key, there, here[key])
        if _shown(there) != _shown(here[key]):
            lines.append(f"{key} {_shown(there)} (here {_shown(here[key])})")
    return lines


def _shown(value: Any) -> str:
    """On one line, whatever somebody's file holds."""
    if isinstance(value, list | tuple):
        simple = len(value) <= 32 and all(isinstance(v, bool | int | float | str) for v in value)
        return f"[{', '.join(map(_shown, value))}]" if simple else "something else"
    if isinstance(value, bool | int | float):
        return str(value)
    text = value if isinstance(value, str) else type(value).__name__
    return ascii(text if len(text) <= 200 else f"{text[:200]}...")


def check(
    cfg: CfgNode,
    *,
    networks: Iterable[str],
    image_networks: Iterable[str],
    decoders: Iterable[str],
    policies: Iterable[str],
    shorts: Iterable[str],
) -> list[str]:
    """Every problem among the values, each with the value and the legal ones. Changes nothing.

    image_networks: those of `networks` that take images; MODEL.FACTORY itself where its network does.
    """
    problems: list[str] = []
    name = cfg.MODEL.FACTORY or cfg.MODEL.NAME
    images = name in image_networks

    def require(good: bool, key: str, allowed: str) -> None:
        if not good:
            problems.append(f"{key} is {shown(_get(cfg, key), 200)}; allowed: {allowed}")

    def at_least(lowest: float, *keys: str) -> None:
        for key in keys:
            require(lowest <= _get(cfg, key) < math.inf, key, f"{lowest} or more")

    def one_of(key: str, names: Iterable[str]) -> None:
        names, value = list(names), _get(cfg, key)
        close = difflib.get_close_matches(value, names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        require(value in names, key, f"{', '.join(names)}{hint}")

    one_of("DEVICE", ["auto", "cpu", "cuda"])
    one_of("MODEL.NAME", networks)
    named = re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", cfg.MODEL.FACTORY)
    require(not cfg.MODEL.FACTORY or bool(named), "MODEL.FACTORY", "package.module:function")
    if cfg.MODEL.FACTORY:
        why = "with MODEL.FACTORY, whose network has none of the blocks that are computed again"
        require(not cfg.TRAIN.CHECKPOINT_ACTIVATIONS, "TRAIN.CHECKPOINT_ACTIVATIONS", f"False {why}")
        own = cfg.OCTAVE.ALPHA or any(cfg.OCTAVE.RATIOS)
        require(
            not cfg.TRAIN.SYNC_NORM or own,
            "TRAIN.SYNC_NORM",
            "False with MODEL.FACTORY unless OCTAVE.ALPHA makes its norms ours",
        )
    one_of("MODEL.COMPILE", COMPILE_MODES)
    if cfg.MODEL.COMPILE == "graphs":
        why = "with MODEL.COMPILE graphs, which replays each block at one place in memory"
        require(not cfg.TRAIN.CHECKPOINT_ACTIVATIONS, "TRAIN.CHECKPOINT_ACTIVATIONS", f"False {why}")
        require(cfg.TRAIN.ACCUMULATE == 1, "TRAIN.ACCUMULATE", f"1 {why}, gradients too")
        require(not cfg.TRAIN.SYNC_NORM, "TRAIN.SYNC_NORM", "False with MODEL.COMPILE graphs, which hold no exchange")
    one_of("MODEL.NONLOCAL_FORM", ["softmax", "dot_product"])
    one_of("SOLVER.SCHEDULE", ["cosine", "steps", "iterations"])
    one_of("TRAIN.DTYPE", ["float32", "float16", "bfloat16"])
    one_of("DATA.INTERPOLATION", ["bilinear", "bicubic"])
    one_of("DATA.DECODER", ["auto", *decoders])
    one_of("DATA.POLICY", policies)
    one_of("DATA.SHORT", ["", *shorts])
    require(bool(cfg.OUTPUT_DIR), "OUTPUT_DIR", "a folder, e.g. OUTPUT_DIR runs/first")
    at_least(0, "NUM_THREADS", "SEED", "DATA.TARGET_FPS", "DATA.NUM_WORKERS", "DATA.TIMEOUT_S", "TRAIN.VAL_PERIOD")
    at_least(0, "SOLVER.BASE_LR", "SOLVER.WARMUP_LR", "SOLVER.WARMUP_EPOCHS", "SOLVER.WEIGHT_DECAY")
    at_least(0, "SOLVER.WEIGHT_DECAY_NORM", "TRAIN.MIXUP", "TRAIN.CUTMIX", "TRAIN.CHECKPOINT_STEPS")
    at_least(0, "TRAIN.MAX_NONFINITE", "TRAIN.PRECISE_NORM_BATCHES", "TRAIN.PROFILE_STEPS")
    at_least(0, "SOLVER.CLIP_NORM", "DATA.RANDAUGMENT_OPS")
    at_least(1, "MODEL.NUM_CLASSES", "DATA.NUM_FRAMES", "DATA.SAMPLING_RATE", "DATA.TRAIN_CROP", "DATA.TEST_CROP")
    at_least(1, "DATA.MAX_PIXELS")
    at_least(1, "OCTAVE.ROUND_TO")
    at_least(1, "TRAIN.BATCH_SIZE", "TRAIN.EPOCHS", "TRAIN.CHECKPOINT_PERIOD", "TRAIN.KEEP_CHECKPOINTS")
    at_least(1, "TRAIN.ACCUMULATE", "TRAIN.LOG_PERIOD", "TEST.CLIPS", "TEST.BATCH_SIZE", "SOLVER.BASE_BATCH")
    require(0 <= cfg.MODEL.DROPOUT < 1, "MODEL.DROPOUT", "0 to below 1")
    require(cfg.MODEL.POOL_PADDING in (0, 1), "MODEL.POOL_PADDING", "0, 1")
    require(0 <= cfg.OCTAVE.ALPHA <= 1, "OCTAVE.ALPHA", "0 to 1")
    factors = list(map(repr, cfg.OCTAVE.POOL))  # 2.0 is equal to 2, but not a factor
    require(factors in (["1", "2", "2"], ["2", "2", "2"]), "OCTAVE.POOL", "[1, 2, 2], [2, 2, 2]")
    ratios_fit = all(isinstance(a, int | float) and 0 <= a <= 1 for a in cfg.OCTAVE.RATIOS)
    require(ratios_fit, "OCTAVE.RATIOS", "[] or one number from 0 to 1 per stage")
    require(0 <= cfg.DATA.MAX_FAILED_FRACTION < 1, "DATA.MAX_FAILED_FRACTION", "0 to below 1")
    require(bool(cfg.DATA.SEPARATOR), "DATA.SEPARATOR", "one character or more")
    for key in ("DATA.MEAN", "DATA.STD"):
        numbers = all(isinstance(v, int | float) for v in _get(cfg, key))
        require(numbers and len(_get(cfg, key)) == 3, key, "three numbers")
    require(all(isinstance(v, int | float) and v > 0 for v in cfg.DATA.STD), "DATA.STD", "numbers above 0")
    for key in ("DATA.RANDAUGMENT_MAGNITUDE", "DATA.RANDAUGMENT_STD"):
        require(0 <= _get(cfg, key) <= 10, key, "0 to 10")
    area = list(cfg.DATA.TRAIN_AREA)
    shares = len(area) == 2 and all(isinstance(a, int | float) for a in area) and 0 < area[0] <= area[1] <= 1
    require(shares, "DATA.TRAIN_AREA", "[lowest, highest], above 0 to 1")
    short_side = list(cfg.DATA.TRAIN_SHORT_SIDE)
    ordered = len(short_side) == 2 and all(isinstance(s, int) for s in short_side) and short_side[0] <= short_side[1]
    require(ordered, "DATA.TRAIN_SHORT_SIDE", "[lowest, highest] in pixels")
    if ordered and not images:
        require(short_side[0] >= cfg.DATA.TRAIN_CROP, "DATA.TRAIN_CROP", f"at most TRAIN_SHORT_SIDE's {short_side[0]}")
    require(
        cfg.DATA.TEST_CROP <= cfg.DATA.TEST_SHORT_SIDE,
        "DATA.TEST_CROP",
        f"at most TEST_SHORT_SIDE's {cfg.DATA.TEST_SHORT_SIDE}",
    )
    require(cfg.TEST.CROPS in (1, 3), "TEST.CROPS", "1, 3")
    if images:
        for key in ("TEST.CLIPS", "TEST.CROPS"):
            require(_get(cfg, key) == 1, key, f"1 for images, which {name} takes")
        require(list(cfg.OCTAVE.POOL) == [1, 2, 2], "OCTAVE.POOL", f"[1, 2, 2] for images, which {name} takes")
    require(0 <= cfg.TRAIN.EMA_DECAY < 1, "TRAIN.EMA_DECAY", "0 to below 1")
    for key, none in (("TRAIN.SYNC_NORM", False), ("TRAIN.PRECISE_NORM_BATCHES", 0)):
        fits = not (_get(cfg, key) and cfg.TRAIN.FREEZE_NORM_STATS)
        require(fits, key, f"{none} with TRAIN.FREEZE_NORM_STATS, whose norms read no batch")
    require(0 <= cfg.TRAIN.LABEL_SMOOTHING < 1, "TRAIN.LABEL_SMOOTHING", "0 to below 1")
    require(0 <= cfg.SOLVER.MOMENTUM < 1, "SOLVER.MOMENTUM", "0 to below 1")
    require(not cfg.SOLVER.NESTEROV or cfg.SOLVER.MOMENTUM > 0, "SOLVER.NESTEROV", "False where MOMENTUM is 0")
    milestones, counts = cfg.SOLVER.MILESTONES, cfg.SOLVER.ITERATIONS
    ascending = all(isinstance(m, int | float) for m in milestones) and sorted(milestones) == list(milestones)
    require(ascending, "SOLVER.MILESTONES", "ascending numbers of epochs, or []")
    positive = all(isinstance(count, int) and count > 0 for count in counts)
    asked = cfg.SOLVER.SCHEDULE == "iterations"
    require(
        positive and bool(counts) == asked, "SOLVER.ITERATIONS", "counts of steps where SCHEDULE is iterations, else []"
    )
    require(
        cfg.SOLVER.WARMUP_EPOCHS < cfg.TRAIN.EPOCHS or not cfg.TRAIN.ENABLE or cfg.SOLVER.SCHEDULE == "iterations",
        "SOLVER.WARMUP_EPOCHS",
        f"below TRAIN.EPOCHS, which is {cfg.TRAIN.EPOCHS}",
    )
    require(not cfg.TRAIN.NEW_HEAD or bool(cfg.TRAIN.INIT), "TRAIN.NEW_HEAD", "False unless TRAIN.INIT names a file")
    if cfg.TRAIN.ENABLE:
        require(bool(cfg.DATA.TRAIN_LIST), "DATA.TRAIN_LIST", "a file of lines `path label`")
        needs_val = cfg.TRAIN.VAL_PERIOD > 0
        require(bool(cfg.DATA.VAL_LIST) or not needs_val, "DATA.VAL_LIST", "a list file, or TRAIN.VAL_PERIOD 0")
    if cfg.TEST.ENABLE:
        listed = cfg.DATA.TEST_LIST or cfg.DATA.VAL_LIST
        require(bool(listed), "DATA.TEST_LIST", "a list file (or DATA.VAL_LIST), or TEST.ENABLE False")
    if not cfg.TRAIN.ENABLE and not cfg.TEST.ENABLE:
        problems.append("TRAIN.ENABLE and TEST.ENABLE are both False: there is nothing to do")
    return problems


def _parse(text: str, cfg: CfgNode, key: str) -> Any:
    """The value of an override: as YAML, but as it stands for a key that holds text (a path, a separator)."""
    return text if isinstance(dict(flatten(cfg)).get(key), str) else yaml_file.parse(text)


def _assign(cfg: CfgNode, key: str, value: Any, problems: list[str]) -> None:
    known = dict(flatten(cfg))
    if key not in known:
        sections = {name.rsplit(".", 1)[0] for name in known if "." in name}
        if key in sections:
            problems.append(
                f"{key} is a section, not a key; it holds e.g. {next(k for k in known if k.startswith(key))}"
            )
            return
        close = difflib.get_close_matches(key.upper(), known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else f"; sections are {', '.join(sorted(sections))}"
        problems.append(f"unknown key {plain(key)}{hint}")
        return
    new, problem = value_of(key, value, known[key])
    if problem:
        problems.append(f"{key} {problem}")
        return
    section, name = _parent(cfg, key)
    section[name] = new


def _parent(cfg: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    *sections, name = key.split(".")
    for section in sections:
        cfg = cfg[section]
    return cfg, name


def _get(cfg: dict[str, Any], key: str) -> Any:
    section, name = _parent(cfg, key)
    return section[name]
