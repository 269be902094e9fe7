"""Two-frequency feature maps. resample.py has pooling and upsampling between the frequencies.

A plain tensor means one frequency; `Octave(high, low)` means two. Layers take and give either.
Axes: N batch, C channels, T frames, H W space (no T in 2D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octvideo.octave.resample import add_upsampled as add_upsampled
from octvideo.octave.resample import average_pool as average_pool
from octvideo.octave.resample import low_size as low_size
from octvideo.octave.resample import pooling_gradient as pooling_gradient
from octvideo.octave.resample import upsample as upsample
from octvideo.octave.resample import upsampling_gradient as upsampling_gradient


class Octave(NamedTuple):
    """A feature map in two frequencies (paper, section 3.1).

    high: [N, C_high, (T,) H, W]. With alpha = 1 it has no channels but still carries the size.
    low:  [N, C_low, (T_low,) H_low, W_low], each size ceil(size / 2) where it is pooled.
    """

    high: Tensor
    low: Tensor

    def __repr__(self) -> str:
        return f"Octave(high={tuple(self.high.shape)}, low={tuple(self.low.shape)}, {self.high.dtype})"


Feature = Tensor | Octave


def split_channels(channels: int, alpha: float) -> tuple[int, int]:
    """(high, low) channel counts: low = int(alpha * channels), as in the authors' code; no rounding to 8.

    A layer carries two frequencies exactly when low > 0. An alpha that is itself a quotient of counts, low / channels,
    gives that low back.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it is the share of low-frequency channels, from 0 to 1")
    low = int(alpha * channels + 1e-6)  # (7 / 80) * 80 may fall short of 7
    return channels - low, low


def rounded_alpha(channels: int, alpha: float, round_to: int) -> float:
    """The alpha nearest to `alpha` at which low is a multiple of round_to; 1 leaves alpha as it is.

    Low has one multiple at least and high one channel, or the layer would change its kind; only where channels are round_to
    or fewer is that impossible, and alpha 0. So do alpha 0 and 1 stay.
    """
    if round_to == 1 or not 0.0 < alpha < 1.0:
        return alpha
    multiples = max(int(alpha * channels / round_to + 0.5), 1)
    return min(multiples, (channels - 1) // round_to) * round_to / channels


Parts = tuple[tuple[int, int], ...]
"""(high, low) channels of each part of a concatenation; of a feature that is none, one part."""


def channel_order(parts: Parts) -> Tensor | None:
    """Where the channels of `concatenate(...)`, all highs before all lows, stand in the vanilla concatenation.

    The vanilla network puts the parts behind one another whole, and so does the state dict, or a vanilla checkpoint
    would meet other channels in the octave network. int64 [C]; None where both orders are the same.
    """
    starts = [sum(high + low for high, low in parts[:index]) for index in range(len(parts))]
    highs = [start + c for start, (high, _) in zip(starts, parts, strict=True) for c in range(high)]
    lows = [start + high + c for start, (high, low) in zip(starts, parts, strict=True) for c in range(low)]
    order = highs + lows
    return None if order == list(range(len(order))) else torch.tensor(order)


def lift(fn: Callable[..., Tensor], *features: Feature) -> Feature:
    """Apply fn to each frequency: lift(relu, x), lift(torch.add, x, y). All features have one or all have two."""
    octaves = [f for f in features if isinstance(f, Octave)]
    if not octaves:
        return fn(*features)
    if len(octaves) != len(features):
        raise ValueError(f"one-frequency and two-frequency maps cannot be combined: {describe(*features)}")
    return Octave(fn(*(f.high for f in octaves)), fn(*(f.low for f in octaves)))


def concatenate(*features: Feature) -> Feature:
    """Channels of all features behind one another, per frequency: [highs..., lows...]; a plain one adds to high."""
    highs = [f.high if isinstance(f, Octave) else f for f in features]
    lows = [f.low for f in features if isinstance(f, Octave)]
    return Octave(torch.cat(highs, dim=1), torch.cat(lows, dim=1)) if lows else torch.cat(highs, dim=1)


def global_average_pool(x: Feature) -> Tensor:
    """[N, C, ...] or Octave -> [N, C]: the mean over space and time of each channel, high channels first."""
    if isinstance(x, Octave):
        return torch.cat([x.high.flatten(2).mean(2), x.low.flatten(2).mean(2)], dim=1)
    return x.flatten(2).mean(2)


def require_feature(x: Feature, high: int, low: int, pool: Sequence[int], layer: str) -> None:
    """Raise a ValueError that names the numbers unless x is what a layer with these channels takes.

    high, low: channel counts, low = 0 for one frequency. pool: per-dimension factor between the frequencies.
    """
    if not low:
        if isinstance(x, Octave):
            raise ValueError(f"{layer} takes one frequency of {high} channels (alpha 0), but got {describe(x)}")
        if x.dim() != len(pool) + 2 or x.shape[1] != high:
            raise ValueError(f"{layer} takes {len(pool) + 2} dimensions and {high} channels, but got {describe(x)}")
        return
    if not isinstance(x, Octave):
        raise ValueError(f"{layer} takes Octave(high, low) of {high} + {low} channels, but got {describe(x)}")
    if x.high.dim() != len(pool) + 2 or x.low.dim() != len(pool) + 2:
        raise ValueError(f"{layer} takes maps of {len(pool) + 2} dimensions, but got {describe(x)}")
    if (x.high.shape[1], x.low.shape[1]) != (high, low):
        raise ValueError(f"{layer} takes {high} high and {low} low channels, but got {describe(x)}")
    if x.high.shape[0] != x.low.shape[0]:
        raise ValueError(f"{layer} takes the same batch in high and low, but got {describe(x)}")
    expected = low_size(x.high.shape[2:], pool)
    if tuple(x.low.shape[2:]) != expected:
        raise ValueError(
            f"{layer} pools by {tuple(pool)}: a high map of size {tuple(x.high.shape[2:])} belongs to a low map "
            f"of size {expected}, but got {describe(x)}"
        )


def describe(*features: Feature) -> str:
    """Shapes for an error message."""
    return ", ".join(repr(f) if isinstance(f, Octave) else f"a tensor {tuple(f.shape)}" for f in features)
