"""What a file's weights cover of a network, and the table that says so."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octvideo.errors import RunError

SHOWN = 20
COUNTER = "num_batches_tracked"

Shape = tuple[int, ...]


class WeightsError(RunError, ValueError):
    """A file of weights that cannot be read or does not fit; the message says which, what and what to do."""


@dataclass(frozen=True)
class Coverage:
    """Which entries of a network a file gave. Norms' batch counters are not counted: few layouts have them.

    matched, missing: our names. unexpected: names of the file that nothing took.
    mismatched: (our name, the file's shape, our shape).
    parameters, own_parameters: numbers in the matched entries, and in all of ours; running statistics count.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, Shape, Shape], ...]
    parameters: int
    own_parameters: int

    @property
    def complete(self) -> bool:
        """Every entry of the network was given, and every entry of the file was taken."""
        return not (self.missing or self.unexpected or self.mismatched)

    def table(self) -> str:
        """The counts, then what is missing, unexpected and mismatched, at most SHOWN lines of each."""
        own = len(self.matched) + len(self.missing) + len(self.mismatched)
        lines = [
            f"{self.parameters:,} of {self.own_parameters:,} parameters matched, in {len(self.matched)} of {own} entries"
        ]
        lines += _listed("missing", self.missing)
        lines += _listed("unexpected", self.unexpected)
        lines += _listed(
            "shape", [f"{name}: {file} in the file, {ours} in ours" for name, file, ours in self.mismatched]
        )
        return "\n".join(lines)


def _listed(title: str, names: Sequence[str]) -> list[str]:
    rest = [f"  {'':<10}  ... and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"  {title:<10}  {name}" for name in names[:SHOWN]] + rest


def compare(
    found: Mapping[str, Tensor], own: Mapping[str, Sequence[int]], unexpected: Iterable[str]
) -> tuple[dict[str, Tensor], Coverage]:
    """Keep what fits the network: (weights, coverage).

    found: what a file gave, under our names. own: the shape of each of ours.
    Weights come as float32, counters as they are. A 1x1 convolution fits a linear layer.
    """
    weights, mismatched = {}, []
    for name, value in found.items():
        shape = tuple(own[name])
        value = _without_ones(value, len(shape))
        if tuple(value.shape) != shape:
            mismatched.append((name, tuple(value.shape), shape))
        else:
            weights[name] = value.to(torch.float32) if value.is_floating_point() else value
    counted = {name: math.prod(shape) for name, shape in own.items() if not is_counter(name)}
    matched = tuple(name for name in counted if name in weights)
    coverage = Coverage(
        matched,
        missing=tuple(name for name in counted if name not in found),
        unexpected=tuple(name for name in unexpected if not is_counter(name)),
        mismatched=tuple(mismatched),
        parameters=sum(counted[name] for name in matched),
        own_parameters=sum(counted.values()),
    )
    return weights, coverage


def is_counter(name: str) -> bool:
    return name.endswith(COUNTER)


def _without_ones(value: Tensor, dims: int) -> Tensor:
    """[K, C, 1, 1] -> [K, C] where two dimensions are wanted."""
    while value.dim() > dims and value.shape[-1] == 1:
        value = value.squeeze(-1)
    return value
