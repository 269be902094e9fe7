"""The comparison notices every part of a run that differs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from octvideo.engine import checkpoint
from octvideo.engine.log import Log

from .compare import differences

SUMS = {key: {"total": 1.0, "count": 4} for key in ("loss", "correct", "part_loss", "part_correct")}
GROUP = {"params": [0], "lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0}
SCALER = {"scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9, "_growth_tracker": 0}
STATE = {
    **{"model": {"w": torch.ones(3)}, "ema": {"w": torch.ones(3)}, "epoch": 1, "clips_in_epoch": 0, "scaler": SCALER},
    "optimizer": {
        "state": {0: {"momentum_buffer": torch.zeros(3)}},
        "param_groups": [{**GROUP, "nesterov": False, "maximize": False}],
    },
    "ranks": [{"random": {"cpu": torch.get_rng_state()}, "meter": {**SUMS, "grad_norm": None}}],
    **{"config": "", "versions": {"octvideo": "", "torch": ""}, "failures": {"counts": {}, "reasons": {}}},
}


def finished(folder: Path) -> Path:
    """A run of two steps."""
    log = Log(folder, main=True, step=0)
    log.event("run", 0, {"host": folder.name})
    for step in (1, 2):
        log.event("train", step, {"loss": 1.0 / step, "step_s": 0.1})
    log.event("test", 2, {"top1": 50.0})
    log.close()
    checkpoint.save(folder, 2, STATE, keep=1)
    (folder / "test.json").write_text(json.dumps({"top1": 50.0, "host": folder.name}))
    np.savez(folder / "scores.npz", logits=np.ones(3), facts=np.array(folder.name))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return finished(tmp_path / "a"), finished(tmp_path / "b")


def test_two_runs_on_different_hosts_are_the_same(runs: tuple[Path, Path]) -> None:
    assert differences(*runs) == []


def in_state(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def altered(folder: Path) -> None:
        path, state = checkpoint.latest(folder)
        change(state)
        torch.save(state, path)

    return altered


def in_history(change: Callable[[list[dict]], object]) -> Callable[[Path], None]:
    def altered(folder: Path) -> None:
        path = folder / "metrics.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()]
        change(events)
        path.write_text("".join(json.dumps(event) + "\n" for event in events))

    return altered


def in_board(folder: Path) -> None:
    shutil.rmtree(folder / "tensorboard")
    lines = (folder / "metrics.jsonl").read_bytes()
    log = Log(folder, main=True, step=0)
    log.event("train", 1, {"loss": 1.0})
    log.close()
    (folder / "metrics.jsonl").write_bytes(lines)


CHANGES = {
    "checkpoint: model": in_state(lambda s: s["model"]["w"].view(torch.int32)[0].add_(1)),  # one bit
    "checkpoint: ema": in_state(lambda s: s["ema"]["w"].mul_(2)),
    "checkpoint: optimizer": in_state(
        lambda s: s["optimizer"]["state"][0]["momentum_buffer"].neg_()
    ),  # -0.0 is not 0.0
    "checkpoint: ranks": in_state(lambda s: s["ranks"][0]["random"]["cpu"][-1].add_(1)),
    "checkpoint: scaler": in_state(lambda s: s["scaler"].update(scale=1.0)),
    "checkpoint: failures": in_state(lambda s: s["failures"]["counts"].update({3: 1})),
    "history, event 1": in_history(lambda events: events[2].update(loss=0.7)),
    "history: 3 events != 4": in_history(lambda events: events.append(events[-1])),
    "history: 3 events != 2": in_history(lambda events: events.pop()),
    "TensorBoard, train/loss": in_board,
    "test.json: top1": lambda folder: (folder / "test.json").write_text('{"top1": 51.0}') and None,
    "scores.npz: logits": lambda folder: np.savez(folder / "scores.npz", logits=np.zeros(3), facts=np.array("")),
    "failed.txt": lambda folder: (folder / "failed.txt").write_text("a") and None,
    "nonfinite_*.json": lambda folder: (folder / "nonfinite_00000001.json").touch(),
}


@pytest.mark.parametrize("expected", CHANGES)
def test_every_part_is_compared(runs: tuple[Path, Path], expected: str) -> None:
    CHANGES[expected](runs[1])
    found = differences(*runs)
    assert any(line.startswith(expected) for line in found), found
