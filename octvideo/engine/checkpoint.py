"""Checkpoints that are whole or not there: temporary file, fsync, rename; the last k kept; broken ones stepped over."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octvideo.errors import RunError
from octvideo.files import first_line, remove_unfinished, write_atomic

FORMAT = 3  # 2: position within an epoch, in steps; 3: in clips, and digests of the lists
READABLE = (2, 3)
_NAME = re.compile(r"checkpoint_(\d{8})\.pt")


class CheckpointError(RunError, RuntimeError):
    """A checkpoint that cannot be written, read or used; the message says which and what to do."""


def path_of(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of `step`."""
    return folder / f"checkpoint_{step:08d}.pt"


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as the checkpoint of `step`; then remove all earlier ones but the newest `keep` - 1.

    Only complete files count as kept, and neither corrupt ones nor those of later steps are removed here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, step)
    write_atomic(path, lambda file: torch.save({"format": FORMAT, "step": step, **state}, file))
    earlier = [old for old in found(folder) if step_of(old) < step and zipfile.is_zipfile(old)]
    for old in earlier[: len(earlier) - (keep - 1)]:
        old.unlink(missing_ok=True)
    remove_unfinished(folder)
    return path


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints of steps after `step`, which a run that resumes there did not use; return their new names."""
    moved = []
    for path in found(folder):
        if step_of(path) > step:
            moved.append(path.rename(path.with_name(f"{path.name}.corrupt")))
    return moved


def save_weights(path: Path, weights: dict[str, torch.Tensor], **notes: Any) -> None:
    """Write weights as a checkpoint at step 0, to start from (TRAIN.INIT) or to test; notes: plain values beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"format": FORMAT, "step": 0, "epoch": 0, "model": weights, **notes}
    write_atomic(path, lambda file: torch.save(state, file))


def found(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("checkpoint_*.pt") if _NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("checkpoint_"))


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint, tensors and plain values only. Raises CheckpointError for anything else."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself compares no checksums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged} does not agree")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint ({first_line(error)})") from error
    except Exception as error:  # pickle's errors have no common base but Exception
        if type(error).__module__ not in ("_pickle", "pickle"):
            raise
        raise CheckpointError(f"{path}: not a checkpoint of tensors and plain values ({first_line(error)})") from error
    if not isinstance(state, dict) or state.get("format") not in READABLE or "model" not in state:
        raise CheckpointError(f"{path}: not a checkpoint of octvideo (formats {', '.join(map(str, READABLE))})")
    return state


def latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a folder that is whole, with its state; each broken newer one is warned about by name.

    None where the folder has no checkpoint at all. Raises CheckpointError where it has some and all are broken.
    """
    paths = found(folder)
    for path in reversed(paths):
        try:
            return path, load(path)
        except CheckpointError as error:
            warnings.warn(f"skipped a broken checkpoint: {error}", stacklevel=2)
    if paths:
        raise CheckpointError(f"{folder}: all {len(paths)} checkpoints are broken; remove them to start anew")
    return None


def averaged(state: dict[str, Any]) -> dict[str, Any]:
    """The state dict to predict with of what a checkpoint holds: the moving average where there is one."""
    weights: dict[str, Any] = state.get("ema", state["model"])
    return weights


def load_weights(model: nn.Module, weights: dict[str, Any], source: Path, new_head: bool = False) -> None:
    """Put a state dict into the model. alpha may differ: octave and vanilla twins have the same names and shapes.

    new_head: leave `head.*` as initialized. Otherwise every name and shape must agree; raises CheckpointError with a
    table of what does not.
    """
    own = model.state_dict()
    needed = own
    if new_head:
        needed, weights = (
            {k: v for k, v in entries.items() if not k.startswith("head.")} for entries in (own, weights)
        )
    problems = [f"missing     {k} {tuple(v.shape)}" for k, v in needed.items() if k not in weights]
    problems += [f"unexpected  {k} {tuple(v.shape)}" for k, v in weights.items() if k not in own]
    problems += [
        f"shape       {k}: {tuple(v.shape)} in the file, {tuple(own[k].shape)} in the network"
        for k, v in weights.items()
        if k in own and v.shape != own[k].shape
    ]
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        hint = "\n  Only the classifier differs: TRAIN.NEW_HEAD True starts it anew" if _only_head(problems) else ""
        lines = "\n  ".join(shown)
        raise CheckpointError(f"{source}: {len(problems)} of {len(own)} entries do not fit\n  {lines}{hint}")
    model.load_state_dict(weights, strict=not new_head)


def _only_head(problems: list[str]) -> bool:
    return all(line.split()[1].startswith("head.") for line in problems)
