"""A run's history as line charts: the lines of metrics.jsonl in, places on a drawing out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 360, 220  # of a chart, in its own units: about the width of a phone, where text keeps its size
LEFT, RIGHT, TOP, BOTTOM = 44, 350, 12, 190  # of the part that lines are drawn in
STRETCHES = 200  # that a line of more than twice as many values is thinned to, so that a long run makes no long page
DOTTED = 30  # a line of at most so many values shows each of them
LARGEST = 1e300  # a value beyond it, such as a damaged line may hold, is drawn no more than an infinite one
Place = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One key of one kind of event. points: (across, down) on the chart, of values or of their means over stretches;
    lows, highs: those of the lowest and the highest value of each stretch, empty where nothing was thinned.
    last, low and high are of all finite values."""

    name: str
    kind: str
    points: list[Place]
    lows: list[Place]
    highs: list[Place]
    last: float
    low: float
    high: float

    @property
    def path(self) -> str:
        return _path(self.points)

    @property
    def band(self) -> str:
        return _path([*self.lows, *reversed(self.highs)]) + "Z" if self.lows else ""

    @property
    def dots(self) -> list[Place]:
        return self.points if len(self.points) <= DOTTED else []


@dataclass(frozen=True)
class Chart:
    """across, down: ticks, (place, text). absent: kind and key of lines that no event has a value for. not_finite:
    values left out."""

    title: str
    unit: str
    lines: list[Line]
    across: list[tuple[float, str]]
    down: list[tuple[float, str]]
    absent: list[str]
    not_finite: int


@dataclass(frozen=True)
class Plan:
    """What a chart shows. lines: name, kind of event, key; factor: from a key's unit to `unit`."""

    title: str
    unit: str
    lines: tuple[tuple[str, str, str], ...]
    factor: float = 1.0


TRAINING, EPOCH_MEAN, VALIDATION = "training", "training, mean of an epoch", "validation"
PLANS = (
    Plan("Loss", "", ((TRAINING, "train", "loss"), (EPOCH_MEAN, "epoch", "loss"))),
    Plan(
        "Top-1 accuracy",
        "%",
        ((TRAINING, "train", "top1"), (EPOCH_MEAN, "epoch", "top1"), (VALIDATION, "val", "top1")),
    ),
    Plan("Learning rate", "", (("learning rate", "train", "lr"),)),
    Plan("Speed", "clips/s", ((TRAINING, "train", "clips_per_s"),)),
    Plan("Data wait", "% of the time", ((TRAINING, "train", "data_wait"),), factor=100),
    Plan("Time of a step", "s", ((TRAINING, "train", "step_s"),)),
    Plan("Gradient norm", "", (("before clipping", "train", "grad_norm"),)),
    Plan("Peak memory (GPU, or process on a CPU)", "GB", (("peak", "train", "memory_gb"),)),
)


def curves(events: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The charts of a history, one for each of PLANS, over epochs.

    events: the parsed lines of metrics.jsonl. A chart whose keys no event has is returned without lines, with those
    keys in `absent`; what is there besides (other kinds, keys, values that are no numbers) is not drawn.
    """
    epochs = [epoch for event in events if (epoch := _epoch(event)) is not None]
    first, last = (math.floor(min(epochs)), max(epochs)) if epochs else (0, 1)
    return [_chart(plan, events, (first, max(last, first + 1))) for plan in PLANS]


def _chart(plan: Plan, events: Sequence[Mapping[str, Any]], span: tuple[float, float]) -> Chart:
    found, absent, not_finite = [], [], 0
    for name, kind, key in plan.lines:
        x, y = _values(events, kind, key)
        finite = np.abs(y) < LARGEST  # NaN is not
        not_finite += int((~finite).sum())
        if finite.any():
            found.append((name, kind, x[finite], y[finite] * plan.factor))
        else:
            absent.append(f"{kind} {key}")
    # From 0, so that a small change does not look like a large one.
    low = min((y.min() for *_, y in found), default=0)
    high = max((y.max() for *_, y in found), default=1)
    across, down = ticks(*span), ticks(min(low, 0), max(high, 0))
    return Chart(
        plan.title,
        plan.unit,
        [_line(name, kind, x, y, span, (down[0], down[-1])) for name, kind, x, y in found],
        [(_scaled(tick, span, LEFT, RIGHT), f"{tick:.10g}") for tick in across if span[0] <= tick <= span[1]],
        [(_scaled(tick, (down[0], down[-1]), BOTTOM, TOP), f"{tick:.10g}") for tick in down],
        absent,
        not_finite,
    )


def _line(
    name: str,
    kind: str,
    x: NDArray[Any],
    y: NDArray[Any],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> Line:
    x_mean, *levels = thin(x, y)
    across = _scaled(x_mean, x_range, LEFT, RIGHT).tolist()
    points, lows, highs = (
        list(zip(across, _scaled(level, y_range, BOTTOM, TOP).tolist(), strict=True)) for level in levels
    )
    ends = float(y[-1]), float(y.min()), float(y.max())
    return Line(name, kind, points, *((lows, highs) if len(points) < len(y) else ([], [])), *ends)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < LARGEST)


def _epoch(event: Mapping[str, Any]) -> float | None:
    """Where the event stands, in epochs done; what was averaged over an epoch stands in its middle, or it would seem to
    lag behind the values that it is the mean of."""
    epoch: Any = event.get("epoch")
    if not _is_number(epoch) or not abs(epoch) < LARGEST:
        return None
    return epoch - 0.5 if event.get("event") == "epoch" else epoch


def _values(events: Sequence[Mapping[str, Any]], kind: str, key: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Epochs and values of the events that have both; values may be NaN or infinite."""
    pairs = [
        (epoch, event[key])
        for event in events
        if event.get("event") == kind and (epoch := _epoch(event)) is not None and _is_number(event.get(key))
    ]
    x, y = np.array(pairs, dtype=float).reshape(-1, 2).T
    return x, y


def thin(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Means of x and y, and the lowest and highest y, over STRETCHES stretches; few values stay as they are.

    Lowest and highest, because a mean alone would hide the peak that one looks for.
    """
    if len(y) <= 2 * STRETCHES:
        return x, y, y, y
    parts = np.array_split(y, STRETCHES)
    x_mean = np.array([part.mean() for part in np.array_split(x, STRETCHES)])
    mean, low, high = (np.array([of(part) for part in parts]) for of in (np.mean, np.min, np.max))
    return x_mean, mean, low, high


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers, in steps of 1, 2 or 5 times a power of ten, from low or below to high or above."""
    if high - low < 1 / LARGEST:
        high = low + 1
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _scaled(value: Any, span: tuple[float, float], start: float, end: float) -> Any:
    return start + (value - span[0]) / (span[1] - span[0]) * (end - start)


def _path(places: Sequence[Place]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in places)
