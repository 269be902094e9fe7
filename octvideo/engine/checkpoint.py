"""Checkpoints that are whole or not there: temporary file, fsync, rename; the last k kept; broken ones stepped over."""

from __future__ import annotations

import re
import warnings
import zipfile
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octvideo import torch_file
from octvideo.engine.structure import (
    count,
    dict_of,
    either,
    flag,
    leaf,
    list_of,
    number,
    positive,
    problem_of,
    record,
    tensor,
    text,
)
from octvideo.errors import RunError
from octvideo.files import first_line, remove_unfinished, write_atomic
from octvideo.torch_file import TorchFileError

FORMAT = 3  # 2: position within an epoch, in steps; 3: in clips, and digests of the lists
READABLE = (2, 3)
_NAME = re.compile(r"checkpoint_(\d{8})\.pt")


class CheckpointError(RunError, RuntimeError):
    """A checkpoint that cannot be written, read or used; the message says which and what to do."""


class DamagedError(CheckpointError):
    """A checkpoint that is not intact, or whose entries are not those of a checkpoint, so an earlier one is to be used."""


def _is_random_state(value: Any) -> bool:
    """True if a generator of the CPU takes it."""
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError):
        return False
    return True


def _is_empty_dict(value: Any) -> bool:
    return isinstance(value, dict) and not value


_WEIGHTS = dict_of(str, tensor)
_SUMS = record({"total": number, "count": count})
_OR_NONE = leaf("a number or None", lambda value: value is None)
_METER = record(
    dict.fromkeys(("loss", "correct", "part_loss", "part_correct"), _SUMS),
    {"grad_norm": either(number, _OR_NONE)},
)
_LIST = record({"digest": text, "videos": count})
_BYTES = leaf("a tensor of bytes", lambda v: isinstance(v, Tensor) and v.dtype == torch.uint8 and v.dim() == 1)
_RANDOM = record({"cpu": leaf("the state of a torch.Generator", _is_random_state)}, {"cuda": _BYTES})
_GROUP = record(
    {
        "params": list_of(count),
        **dict.fromkeys(("lr", "momentum", "dampening", "weight_decay"), number),
        **dict.fromkeys(("nesterov", "maximize"), flag),
    }
)
_MOMENTUM = record({}, {"momentum_buffer": either(tensor, leaf("a tensor or None", lambda value: value is None))})
_SCALER = record(
    {
        **dict.fromkeys(("scale", "growth_factor", "backoff_factor"), positive),
        **dict.fromkeys(("growth_interval", "_growth_tracker"), count),
    }
)

# What the entries of a checkpoint must be. Entries that no table names are allowed.
ENTRIES = {"step": count, "epoch": count, "model": _WEIGHTS}
OPTIONAL_ENTRIES = {
    **{"ema": _WEIGHTS, "config": text, "classes": list_of(text), "lists": record({}, {"train": _LIST, "val": _LIST})},
    **{"clips_in_epoch": count, "step_in_epoch": count},  # one of these two in a run: see FORMAT
}
# Those that a run needs besides, to be resumed.
RUN_ENTRIES = {
    "optimizer": record({"state": dict_of(int, _MOMENTUM), "param_groups": list_of(_GROUP)}),
    "scaler": either(
        _SCALER, leaf("an empty dict, or the state of a torch.amp.GradScaler", lambda v: isinstance(v, dict) and not v)
    ),
    "failures": record({"counts": dict_of(int, count), "reasons": dict_of(int, text)}),
    "nonfinite_steps": count,
    "ranks": list_of(record({"random": _RANDOM, "meter": _METER}), shortest=1),
    "config": text,
    "versions": record({"octvideo": text, "torch": text}),
}


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


def load(path: Path, *, run: bool = False) -> dict[str, Any]:
    """Read one checkpoint, tensors and plain values only, each entry of the kind that ENTRIES names.

    run: it must hold a run to resume, with all RUN_ENTRIES. Raises CheckpointError; DamagedError if the file is to blame.
    """
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: no such checkpoint")
        if not path.is_file():
            raise DamagedError(f"{path}: a folder or a device, not a checkpoint")
        state = torch_file.read(path)
    except TorchFileError as error:
        raise DamagedError(f"{path}: not an intact checkpoint of tensors and plain values ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: not enough memory to read it ({error})") from error
    version = state.get("format") if isinstance(state, dict) else None
    if not isinstance(version, int) or version not in READABLE or "model" not in state:
        raise DamagedError(f"{path}: not a checkpoint of octvideo (formats {', '.join(map(str, READABLE))})")
    if problem := problem_of(state, ENTRIES, OPTIONAL_ENTRIES | RUN_ENTRIES):
        raise DamagedError(f"{path}: {problem}")
    if run:
        _require_run(state, path)
    return state


def _require_run(state: dict[str, Any], path: Path) -> None:
    position = "clips_in_epoch" if state["format"] == FORMAT else "step_in_epoch"
    if missing := [name for name in (position, *RUN_ENTRIES) if name not in state]:
        some = ", ".join(missing[:3])
        raise DamagedError(
            f"{path}: holds weights, not a run to resume; start from them with TRAIN.INIT {path} (it has no {some})"
        )
    shapes, averages = ({k: tuple(v.shape) for k, v in state.get(key, {}).items()} for key in ("model", "ema"))
    if "ema" in state and averages != shapes:
        differ = sorted(name for name in {*shapes, *averages} if shapes.get(name) != averages.get(name))
        raise DamagedError(f"{path}: {len(differ)} entries of ema are not those of model, such as {differ[0]!a:.80}")


def latest(folder: Path, *, run: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint of a folder, with its state; each damaged newer one is warned about by name.

    None where the folder has no checkpoint at all. run: see `load`. Raises CheckpointError where it has some and all are
    damaged, and where the system cannot read one: an older one in its place would lose work.
    """
    paths, damaged = found(folder), list[str]()
    for path in reversed(paths):
        try:
            state = load(path, run=run)
        except DamagedError as error:
            damaged.append(str(error))
            continue
        for problem in damaged:
            warnings.warn(f"skipped a broken checkpoint: {problem}", stacklevel=2)
        return path, state
    if paths:
        lines = "\n  ".join(damaged)
        raise CheckpointError(
            f"{folder}: all {len(paths)} checkpoints are broken; remove them to start from scratch\n  {lines}"
        )
    return None


def averaged(state: dict[str, Any]) -> dict[str, Any]:
    """The state dict to predict with of what a checkpoint holds: the moving average where there is one."""
    weights: dict[str, Any] = state.get("ema", state["model"])
    return weights


def require_fit(saved: dict[str, Any], optimizer: torch.optim.Optimizer, source: Path) -> None:
    """Raise CheckpointError unless an optimizer's saved state, of the file `source`, is one of these weights.

    saved: has the structure that RUN_ENTRIES names. Momenta must have the shapes of their weights and be finite.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    numbers = [group["params"] for group in saved["param_groups"]]
    sizes, saved_sizes = [len(group) for group in groups], [len(group) for group in numbers]
    if sizes != saved_sizes:
        raise CheckpointError(f"{source}: optimizer has groups of {saved_sizes} weights; this run has {sizes}")
    for index, weight in zip(chain(*numbers), chain(*groups), strict=True):
        momentum = saved["state"].get(index, {}).get("momentum_buffer")
        if momentum is None:
            continue
        place = f"{source}: optimizer.state[{index}].momentum_buffer is"
        if momentum.shape != weight.shape:
            raise CheckpointError(f"{place} {tuple(momentum.shape)}; its weight is {tuple(weight.shape)}")
        if not momentum.isfinite().all():
            raise CheckpointError(f"{place} not finite; resume from an earlier checkpoint")


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
    try:
        model.load_state_dict(weights, strict=not new_head)
    except Exception as error:  # whatever the hooks of somebody else's network raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{source}: the network does not take these weights ({reason})") from error


def _only_head(problems: list[str]) -> bool:
    return all(line.split()[1].startswith("head.") for line in problems)
