"""Stopped by a signal or killed, started again with other process counts: what test_torture.py does not do."""

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
