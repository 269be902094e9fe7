import math
from typing import Any

import numpy as np
import pytest

from octvideo.analysis.curves import BOTTOM, LEFT, PLANS, RIGHT, STRETCHES, TOP, Chart, curves, thin, ticks


def train(epoch: Any, **values: Any) -> dict[str, Any]:
    return {"event": "train", "step": 1, "time": 0.0, "epoch": epoch, **values}


def chart(events: list[dict[str, Any]], title: str) -> Chart:
    return next(chart for chart in curves(events) if chart.title == title)


def test_values_stand_where_they_belong() -> None:
    events = [
        train(0.5, loss=4.0),
        train(1.0, loss=3.0),
        train(2.0, loss=1.0),
        {"event": "epoch", "epoch": 2, "loss": 2},
    ]
    drawn = chart(events, "Loss")
    training, mean = drawn.lines
    at = [(LEFT + e / 2 * (RIGHT - LEFT), BOTTOM - v / 4 * (BOTTOM - TOP)) for e, v in ((0.5, 4), (1, 3), (2, 1))]
    np.testing.assert_allclose(training.points, at)  # epochs 0 to 2, losses 0 to 4
    np.testing.assert_allclose(mean.points, [(LEFT + 0.75 * (RIGHT - LEFT), (BOTTOM + TOP) / 2)])  # 1.5, the middle
    assert (training.last, training.low, training.high, training.lows, training.band) == (1.0, 1.0, 4.0, [], "")
    assert [text for _, text in drawn.across] == ["0", "0.5", "1", "1.5", "2"]
    assert [text for _, text in drawn.down] == ["0", "1", "2", "3", "4"]
    assert (drawn.down[0][0], drawn.down[-1][0], drawn.across[-1][0]) == (BOTTOM, TOP, RIGHT)
    assert drawn.absent == [] and drawn.not_finite == 0


def test_data_wait_is_in_percent() -> None:
    assert chart([train(1, data_wait=0.25)], "Data wait").lines[0].last == 25.0


def test_what_is_absent_is_named() -> None:
    charts = curves([train(1.0, top1=50.0)])
    assert [drawn.title for drawn in charts] == [plan.title for plan in PLANS]
    assert [drawn.title for drawn in charts if drawn.lines] == ["Top-1 accuracy"]
    assert chart([train(1.0, top1=50.0)], "Top-1 accuracy").absent == ["epoch top1", "val top1"]
    assert chart([], "Peak memory (GPU, or process on a CPU)").absent == ["train memory_gb"]
    assert not any(drawn.lines for drawn in curves([{"event": "run", "params": 3}, {"event": "test", "top1": 3.0}, {}]))


def test_values_that_are_no_numbers_are_not_drawn_and_those_not_finite_are_counted() -> None:
    loss = [math.nan, 2.0, math.inf, "3", None, True]
    drawn = chart([train(number / 10, loss=value) for number, value in enumerate(loss)], "Loss")
    assert (len(drawn.lines[0].points), drawn.not_finite, drawn.lines[0].last) == (1, 2, 2.0)
    drawn = chart([train(epoch, loss=1.0) for epoch in (math.nan, "1", None, True, 3)], "Loss")
    assert len(drawn.lines[0].points) == 1
    drawn = chart([train(number, loss=value) for number, value in enumerate((1e308, 10**400, -1e308, 4))], "Loss")
    assert (len(drawn.lines[0].points), drawn.not_finite) == (1, 2)
    assert not chart([train(10**400, loss=1.0)], "Loss").lines
    only = chart([train(1, loss=math.nan)], "Loss")
    assert (only.lines, only.not_finite, only.absent) == ([], 1, ["train loss", "epoch loss"])


@pytest.mark.parametrize("value", [0.0, -2.0, 1e-9, 1e12, 5e-324, 9e299])
def test_a_single_value_of_any_size_lies_on_the_chart(value: float) -> None:
    (x, y), *_ = chart([train(0, lr=value)], "Learning rate").lines[0].points
    assert x == LEFT and TOP <= y <= BOTTOM


def test_a_long_history_is_means_in_a_band_that_keeps_every_peak() -> None:
    generator = np.random.default_rng(0)
    x, y = np.arange(20_001) / 100, generator.normal(size=20_001)
    y[7777] = 50.0
    across, mean, low, high = thin(x, y)
    parts = np.array_split(y, STRETCHES)
    assert len(across) == len(parts) == STRETCHES and high.max() == 50.0 and low.min() == y.min()
    np.testing.assert_array_equal(mean, [part.mean() for part in parts])
    events = [train(float(e), grad_norm=float(v)) for e, v in zip(x, y, strict=True)]
    line = chart(events, "Gradient norm").lines[0]
    assert (line.high, line.last) == (50.0, y[-1])
    assert line.band.count(",") == 2 * STRETCHES and line.path.count(",") == STRETCHES
    short = thin(x[: 2 * STRETCHES], y[: 2 * STRETCHES])
    np.testing.assert_array_equal(short[1], y[: 2 * STRETCHES])


@pytest.mark.parametrize(
    "low,high,expected",
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0, 2.3, [0, 0.5, 1, 1.5, 2, 2.5]),
        (-3, 4, [-4, -2, 0, 2, 4]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    np.testing.assert_allclose(ticks(low, high), expected, atol=1e-12)


def test_ticks_enclose_any_range_with_a_few() -> None:
    generator = np.random.default_rng(0)
    for low, size in zip(generator.uniform(-100, 100, 500), 10.0 ** generator.uniform(-6, 8, 500), strict=True):
        found = ticks(low, low + size)
        assert 4 <= len(found) <= 8 and found[0] <= low + 1e-6 * size and found[-1] >= low + size * (1 - 1e-6)
