"""Two processes train as one does with the same global batch."""

import json
from pathlib import Path

import pytest
import torch

from datasets import motion
from octvideo.engine import checkpoint

from .runs import Run

# What differs between processes by design is off: statistics of a process's own share, dropout.
SAME = [
    "TRAIN.PRECISE_NORM_BATCHES",
    "0",
    "TRAIN.FREEZE_NORM_STATS",
    "True",
    "MODEL.DROPOUT",
    "0.0",
    "TRAIN.MIXUP",
    "0.0",
    "TRAIN.LOG_PERIOD",
    "1",
]
SHORT = ["TRAIN.EPOCHS", "3", "SOLVER.BASE_LR", "0.02"]


def losses(out: Path) -> list[float]:
    events = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [event["loss"] for event in events if event["event"] == "train"]


def test_losses_and_weights_are_those_of_one_process(tmp_path: Path) -> None:
    data = tmp_path / "data"
    motion.make(data, motion.Settings(train=2, val=1, size=48), workers=1)
    runs = {n: Run(data, tmp_path / f"run{n}", n, *SAME, *SHORT) for n in (1, 2)}
    for run in runs.values():
        run.finish()
    one, two = (losses(run.out) for run in runs.values())
    assert len(one) == 12 and one[0] != one[-1]
    assert two == pytest.approx(one, rel=1e-5)
    a, b = (checkpoint.latest(run.out)[1]["model"] for run in runs.values())
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-6, msg=name)
    fresh = [value for name, value in a.items() if name.endswith("running_var")]
    assert all((value == 1).all() for value in fresh)  # frozen: as they were drawn


@pytest.mark.slow
def test_norms_that_share_statistics_train_as_in_one_process(tmp_path: Path) -> None:
    data = tmp_path / "data"
    motion.make(data, motion.Settings(train=2, val=1, size=48), workers=1)
    shared = [*SAME, "TRAIN.FREEZE_NORM_STATS", "False", "TRAIN.SYNC_NORM", "True", *SHORT]
    runs = {n: Run(data, tmp_path / f"run{n}", n, *shared) for n in (1, 2)}
    for run in runs.values():
        run.finish()
    one, two = (losses(run.out) for run in runs.values())
    assert len(one) == 12 and one[0] != one[-1]
    assert two == pytest.approx(one, rel=1e-5)
