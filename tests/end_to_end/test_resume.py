"""Killed at any moment and started again, a run ends with the weights and the history of one that was not."""

import random
import signal
from pathlib import Path

import pytest

from datasets import motion
from octvideo.engine import checkpoint

from .runs import STEPS, Run, check_same


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("motion") / "data"
    motion.make(folder, motion.Settings(train=2, val=1, size=48), workers=1)
    return folder


@pytest.fixture(scope="module")
def unharmed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unharmed") / "run"
    Run(data, out).finish()
    return out


def kill_and_go_on(data: Path, out: Path, processes: int, seed: int, kills: int) -> None:
    draw = random.Random(seed)
    run = Run(data, out, processes)
    for kill in range(kills):
        at = draw.randrange(2, STEPS - 4) if kill == 0 else run.steps() + draw.randrange(0, 8)
        run.signalled(signal.SIGKILL, min(at, STEPS - 2), draw.uniform(0, 0.05))
    said = run.finish()
    assert "resuming " in said


def test_killed_twice_in_mid_epoch(data: Path, unharmed: Path, tmp_path: Path) -> None:
    kill_and_go_on(data, tmp_path / "run", processes=1, seed=0, kills=2)
    check_same(unharmed, tmp_path / "run")


def test_killed_in_mid_save(data: Path, unharmed: Path, tmp_path: Path) -> None:
    run = Run(data, tmp_path / "run")
    assert any(run.killed_in_mid_save() for _ in range(4)), "no kill met a save"
    run.finish()
    check_same(unharmed, tmp_path / "run")
    assert not list((tmp_path / "run").glob(".checkpoint_*"))  # what the kill left is gone


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 7))
def test_killed_at_many_moments(data: Path, unharmed: Path, tmp_path: Path, seed: int) -> None:
    kill_and_go_on(data, tmp_path / "run", processes=1, seed=seed, kills=4)
    check_same(unharmed, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_two_processes_killed(data: Path, tmp_path: Path, seed: int) -> None:
    Run(data, tmp_path / "unharmed", 2).finish()
    kill_and_go_on(data, tmp_path / "run", processes=2, seed=seed, kills=2)
    check_same(tmp_path / "unharmed", tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_saves_and_stops_within_seconds(data: Path, unharmed: Path, tmp_path: Path, number: int) -> None:
    run = Run(data, tmp_path / "run", 1, "TRAIN.CHECKPOINT_STEPS", "0")
    status, said, seconds = run.signalled(number, at=6)
    assert status == 128 + number, said
    assert f"stopped by {signal.Signals(number).name} at step" in said and "TRAIN.RESUME auto resumes there" in said
    assert seconds < 10
    state = checkpoint.latest(tmp_path / "run")[1]
    assert state["step"] >= 6 and 4 * state["step"] == 16 * state["epoch"] + state["clips_in_epoch"]
    assert Run(data, tmp_path / "run").finish().count("resuming ") == 1
    check_same(unharmed, tmp_path / "run")


def test_another_number_of_processes_goes_on_and_says_what_changes(data: Path, tmp_path: Path) -> None:
    run = Run(data, tmp_path / "run")
    run.signalled(signal.SIGKILL, at=12)
    said = Run(data, tmp_path / "run", 2).finish()
    assert "1 process(es) (here 2); clips, their order and the learning rate stay the same" in said
    assert checkpoint.latest(tmp_path / "run")[1]["step"] == STEPS
