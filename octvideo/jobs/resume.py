"""Which checkpoint a run resumes from, and what it takes from there (docs/training.md, "Resume a run").

The checkpoint holds state: weights, their average, momenta, loss scale, random states, sums, and the position in the data.
The configuration decides everything else. A key that differs from the checkpoint is applied from the next step on, or the
run is refused; both are recorded in the event "run".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from octvideo import build
from octvideo.config import ConfigError, changes
from octvideo.engine import checkpoint
from octvideo.engine.checkpoint import CheckpointError
from octvideo.engine.classes import check_class_order
from octvideo.engine.distributed import DistributedError, World, gather_objects
from octvideo.jobs.provenance import versions

RESTART_KEYS = (
    "OUTPUT_DIR",
    "TRAIN.RESUME",
    "TRAIN.RESTART_EPOCH",
    "TRAIN.INIT",
    "TRAIN.NEW_HEAD",
    "TRAIN.ENABLE",
    "TEST.",
)
"""Keys that may differ between starts of one run without changing what it trains."""

NETWORK_KEYS = (
    *("MODEL.NAME", "MODEL.FACTORY", "MODEL.NUM_CLASSES", "MODEL.POOL_PADDING", "MODEL.NONLOCAL_FORM"),
    "OCTAVE.",
)
"""Keys that make another network, perhaps with the same state dict. A run keeps its network."""

TRAINED_KEYS = (
    *NETWORK_KEYS,
    *("DATA.MEAN", "DATA.STD", "DATA.NUM_FRAMES", "DATA.SAMPLING_RATE", "DATA.TARGET_FPS"),
)
"""Keys that change what a network computes without changing its state dict: weights made with others load silently."""


@dataclass
class Start:
    """Where a run begins. state: of the checkpoint, None at a start from scratch. changed: differences to it, a line each.

    within: the checkpoint is within an epoch, or at its end before the validation. clips: the position there to continue
    from, over all ranks. list_changed: its entries have other numbers now. new_seed: random
    states follow from SEED, not from the checkpoint. remarks: lines to print.
    """

    state: dict[str, Any] | None = None
    path: Path | None = None
    changed: list[str] = field(default_factory=list)
    within: bool = False
    clips: int = 0
    list_changed: bool = False
    new_seed: bool = False
    remarks: list[str] = field(default_factory=list)


def find_start(
    cfg: CfgNode, model: nn.Module, lists: dict[str, dict[str, Any]], classes: Sequence[str], world: World
) -> Start:
    """Load the weights to start from into the model; called by all ranks.

    1. TRAIN.RESUME FILE: that file.
    2. TRAIN.RESUME auto: the newest intact checkpoint in OUTPUT_DIR; if there is none, as below.
    3. TRAIN.INIT FILE: its weights, at epoch 0.
    4. Weights initialized from SEED.
    TRAIN.RESUME none in a folder with checkpoints is refused, since it would mix two runs.

    lists: "train" and "val" -> digest and number of videos. Raises CheckpointError and ConfigError.
    """
    folder = Path(cfg.OUTPUT_DIR)
    found = _checkpoint_to_resume(cfg, folder)
    _check_agreement(found, world)
    if found is None:
        return _initialized(cfg, model)
    path, state = found
    start = _compared(cfg, path, state, lists)
    check_class_order(state.get("classes") or [], classes, str(path), whose=("the checkpoint", "the training list"))
    checkpoint.load_weights(model, state["model"], path)
    checkpoint.require_fit(state["optimizer"], build.optimizer(cfg, model), path)
    if world.main:
        start.remarks += [
            f"{moved}: not used, since it is corrupt or of a later step; renamed"
            for moved in checkpoint.set_aside(folder, state["step"])
        ]
    return start


def _checkpoint_to_resume(cfg: CfgNode, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    resume = cfg.TRAIN.RESUME
    if resume == "auto":
        return checkpoint.latest(folder, run=True)
    if resume == "none":
        if checkpoint.found(folder):
            raise CheckpointError(
                f"{folder}: holds checkpoints of an earlier run; resume it with TRAIN.RESUME auto, or give another "
                "OUTPUT_DIR"
            )
        return None
    path = Path(resume)
    state = checkpoint.load(path, run=True)
    later = [p.name for p in checkpoint.found(folder) if checkpoint.step_of(p) > state["step"]]
    if later:
        raise CheckpointError(
            f"{folder}: holds {', '.join(later)}, later than {path} (step {state['step']}); going back would mix two runs: "
            "give another OUTPUT_DIR"
        )
    return path, state


def _check_agreement(found: tuple[Path, dict[str, Any]] | None, world: World) -> None:
    """Ranks read the folder each for itself, perhaps on machines that see different versions of it."""
    steps = gather_objects(found[1]["step"] if found else None)
    if len(set(steps)) > 1:
        shown = ", ".join(f"rank {rank}: {'none' if step is None else step}" for rank, step in enumerate(steps))
        raise DistributedError(
            f"ranks see different newest checkpoints (steps: {shown}); is OUTPUT_DIR shared by all hosts?"
        )


def _initialized(cfg: CfgNode, model: nn.Module) -> Start:
    if not cfg.TRAIN.INIT:
        return Start()
    path = Path(cfg.TRAIN.INIT)
    state = checkpoint.load(path)
    checkpoint.load_weights(model, state["model"], path, new_head=cfg.TRAIN.NEW_HEAD)
    remark = trained_otherwise(cfg, state, path)
    return Start(remarks=[remark] if remark else [])


def _compared(cfg: CfgNode, path: Path, state: dict[str, Any], lists: dict[str, dict[str, Any]]) -> Start:
    """Compare configuration, lists and versions with those of the checkpoint. Raises ConfigError for what is refused."""
    lines = [line for line in config_changes(cfg, state) if not line.startswith(RESTART_KEYS)]
    of_network = [line for line in lines if line.startswith(NETWORK_KEYS)]
    if of_network:
        hint = (
            f"a run keeps its network; start another one from these weights: TRAIN.INIT {path} and another OUTPUT_DIR"
        )
        raise ConfigError(f"{path}: cannot be resumed", [f"{line}: {hint}" for line in of_network])
    of_lists = _list_changes(lists, state.get("lists", {}))
    of_seed = [line for line in lines if line.startswith("SEED ")]
    clips, of_order = clips_in_epoch(cfg, state), of_seed + of_lists.get("train", [])
    remarks = []
    if clips and of_order and not cfg.TRAIN.RESTART_EPOCH:
        hint = (
            f"the checkpoint is within epoch {state['epoch'] + 1}, after {clips} clips; some would be repeated or skipped: "
            "use the earlier list and SEED, resume from the end of an epoch (TRAIN.RESUME FILE), or begin this "
            "epoch again with TRAIN.RESTART_EPOCH True"
        )
        raise ConfigError(f"{path}: cannot be resumed", [f"{line}: {hint}" for line in of_order])
    within = clips > 0
    if clips and of_order:
        remarks.append(
            f"TRAIN.RESTART_EPOCH: epoch {state['epoch'] + 1} begins again; {clips} clips of it are repeated"
        )
        clips = 0
    there, here = state.get("versions", {}), versions()
    of_versions = [f"{name} {there.get(name)!a} (here {here[name]})" for name in here if there.get(name) != here[name]]
    return Start(
        state,
        path,
        [*lines, *(line for kind in of_lists.values() for line in kind), *of_versions],
        within,
        clips,
        list_changed="train" in of_lists,
        new_seed=bool(of_seed),
        remarks=remarks,
    )


def _list_changes(lists: dict[str, dict[str, Any]], saved: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Return "train" and "val" -> a line, for the lists whose contents differ from those of the checkpoint."""
    return {
        kind: [f"DATA.{kind.upper()}_LIST has other contents: {saved[kind]['videos']} entries (here {here['videos']})"]
        for kind, here in lists.items()
        if kind in saved and saved[kind]["digest"] != here["digest"]
    }


def clips_in_epoch(cfg: CfgNode, state: dict[str, Any]) -> int:
    """Return the clips of the current epoch that the checkpoint's run has used, over all ranks."""
    if "clips_in_epoch" in state:
        return int(state["clips_in_epoch"])
    changed = changes(str(state["config"]), cfg, ("TRAIN.BATCH_SIZE",))  # format 2 counts steps
    return int(state["step_in_epoch"]) * (int(changed[0].split()[1]) if changed else cfg.TRAIN.BATCH_SIZE)


def trained_otherwise(cfg: CfgNode, state: dict[str, Any], path: Path) -> str:
    """Return a line on the settings that the weights of a checkpoint were made with and that differ here, "" if none do.

    An octave network has the state dict of its vanilla counterpart: weights of another alpha load without an error.
    """
    changed = config_changes(cfg, state, TRAINED_KEYS)
    return f"{path}: its weights were made with {'; '.join(changed)}" if changed else ""


def config_changes(cfg: CfgNode, state: dict[str, Any], keys: Sequence[str] = ("",)) -> list[str]:
    """Return lines "KEY value (here value)" on differences to the configuration of a checkpoint. keys: their beginnings."""
    saved = state.get("config")
    if saved is None:  # weights of another package
        return []
    try:
        return changes(str(saved), cfg, keys)
    except ConfigError as error:
        return [f"a configuration that cannot be read ({error.problems[0]})"]
