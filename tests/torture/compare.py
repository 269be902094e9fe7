"""What two runs of one configuration must have in common, whatever interrupted one of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from octvideo.engine import checkpoint

logging.getLogger("tensorboard").setLevel(
    logging.ERROR
)  # it warns of every purge, which is what a resumed run asks for

MEASURED = {"time", "clips_per_s", "data_wait", "step_s", "memory_gb", "seconds"}
"""Fields of events that depend on the machine and the moment."""
STARTS = {"run"}
"""Events that every start leaves."""
FROM_WHERE = {"tested", "checkpoint", "host", "device", "git", "clips_per_s", "checkpoint_sha256", "list", "prefix"}
"""Fields of test.json about the place and time of a test."""


def differences(one: Path, other: Path) -> list[str]:
    """Return what differs between the output folders of two finished runs, a line each; [] for none."""
    return [
        *_of_checkpoints(one, other),
        *_of_history(one, other),
        *_of_board(one, other),
        *_of_test(one, other),
        *_of_lists(one, other),
    ]


def history(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run without what is measured, and without those of its starts."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines if line["event"] not in STARTS]


def _of_checkpoints(one: Path, other: Path) -> Iterator[str]:
    a, b = (checkpoint.latest(folder) for folder in (one, other))
    if a is None or b is None:
        yield "no checkpoint"
        return
    state, there = ({k: v for k, v in s.items() if k not in ("config", "versions")} for _, s in (a, b))
    for name in sorted(state.keys() | there.keys()):
        if not _equal(state.get(name), there.get(name)):
            yield f"checkpoint: {name}"


def _equal(a: Any, b: Any) -> bool:
    """Compare nested values; tensors bit by bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and a == b


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def _of_history(one: Path, other: Path) -> Iterator[str]:
    a, b = history(one), history(other)
    for number, (event, there) in enumerate(zip(a, b, strict=False)):
        if event != there:
            yield f"history, event {number}: {event} != {there}"
            return
    if len(a) != len(b):
        more = (a if len(a) > len(b) else b)[min(len(a), len(b))]
        yield f"history: {len(a)} events != {len(b)}; the first of the others: {more}"


def _of_board(one: Path, other: Path) -> Iterator[str]:
    a, b = (_scalars(folder) for folder in (one, other))
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            yield f"TensorBoard, {name}: {a.get(name)} != {b.get(name)}"


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    names = [name for name in board.Tags()["scalars"] if name.rpartition("/")[2] not in MEASURED]
    return {
        name: [(s.step, s.value) for s in board.Scalars(name)] for name in names if name.split("/")[0] not in STARTS
    }


def _of_test(one: Path, other: Path) -> Iterator[str]:
    tested = [(folder / "test.json").exists() for folder in (one, other)]
    if tested == [False, False]:  # TEST.ENABLE False
        return
    if tested != [True, True]:
        yield "test.json: only one has it"
        return
    reports = [
        {k: v for k, v in json.loads((folder / "test.json").read_text()).items() if k not in FROM_WHERE}
        for folder in (one, other)
    ]
    if reports[0] != reports[1]:
        yield "test.json: " + ", ".join(sorted(k for k in reports[0] if reports[0].get(k) != reports[1].get(k)))
    scores = [np.load(folder / "scores.npz") for folder in (one, other)]
    for name in scores[0].files:
        if name != "facts" and not np.array_equal(scores[0][name], scores[1][name]):
            yield f"scores.npz: {name}"


def _of_lists(one: Path, other: Path) -> Iterator[str]:
    for name in ("failed.txt", "test_failed.txt", "classes.csv", "confusion.csv"):
        texts = [(folder / name).read_text() if (folder / name).exists() else "" for folder in (one, other)]
        if texts[0] != texts[1]:
            yield name
    files = [sorted(path.name for path in folder.glob("nonfinite_*.json")) for folder in (one, other)]
    if files[0] != files[1]:
        yield f"nonfinite_*.json: {files[0]} != {files[1]}"
