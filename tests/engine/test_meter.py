import pytest
import torch

from octvideo.engine.distributed import World
from octvideo.engine.meter import Meter

CPU = torch.device("cpu")


def add(meter: Meter, loss: float, correct: int, clips: int) -> None:
    meter.add(torch.tensor(loss), torch.tensor(correct), clips, grad_norm=1.0)


def test_means_are_over_clips() -> None:
    meter = Meter(CPU, World())
    add(meter, 2.0, 1, 4)
    add(meter, 1.0, 2, 2)
    numbers = meter.since_last()
    assert numbers["loss"] == pytest.approx((2.0 * 4 + 1.0 * 2) / 6) and numbers["top1"] == pytest.approx(50.0)
    add(meter, 4.0, 0, 2)
    assert meter.since_last()["loss"] == 4.0
    assert meter.epoch()["loss"] == pytest.approx((8.0 + 2.0 + 8.0) / 8)
    assert meter.loss.count == 8


def test_an_interval_without_a_step_that_was_taken() -> None:
    numbers = Meter(CPU, World()).since_last()
    assert (numbers["loss"], numbers["top1"], numbers["grad_norm"], numbers["clips_per_s"]) == (None, None, None, 0.0)
    numbers = Meter(CPU, World()).epoch()
    assert (numbers["loss"], numbers["top1"]) == (None, None)


def test_the_bar_shows_what_the_log_read() -> None:
    meter = Meter(CPU, World())
    add(meter, 2.0, 1, 4)
    assert "loss" not in meter.line() and "clips/s" in meter.line()
    meter.since_last()
    assert meter.line().startswith("loss 2.000, top-1 25.0 %, ")


def test_its_sums_resume_by_the_names_of_earlier_checkpoints() -> None:
    meter, other = Meter(CPU, World()), Meter(CPU, World())
    add(meter, 2.0, 1, 4)
    meter.since_last()
    add(meter, 1.0, 4, 4)
    state = meter.state_dict()
    assert state.keys() == {"loss", "correct", "part_loss", "part_correct", "grad_norm"}
    other.load_state_dict(state)
    numbers = other.since_last()
    assert (numbers["loss"], numbers["grad_norm"]) == (1.0, 1.0)
    assert other.epoch()["loss"] == 1.5
