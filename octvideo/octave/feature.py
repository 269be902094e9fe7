"""Two-frequency feature maps and the laws of pooling and upsampling between the frequencies.

A plain tensor means one frequency; `Octave(high, low)` means two. Layers take and give either.
Axes: N batch, C channels, T frames, H W space (no T in 2D).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octvideo.octave import kernels


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


def low_size(size: Sequence[int], pool: Sequence[int]) -> tuple[int, ...]:
    """Size of the low map that belongs to a high map: ceil(size / pool) in each dimension."""
    return tuple(math.ceil(s / p) for s, p in zip(size, pool, strict=True))


def average_pool(x: Tensor, kernel: Sequence[int], *, total: bool = False) -> Tensor:
    """Average pooling with stride = kernel, ceil_mode, over the values that exist: size -> ceil(size / kernel).

    x: [N, C, H, W] with kernel (kh, kw) or [N, C, T, H, W] with kernel (kt, kh, kw). An odd size keeps its last
    row as it is, and a size of 1 stays 1. total: return sums instead of means.
    """
    if all(k == 1 for k in kernel):
        return x
    if x.shape[1] == 0:
        return x.new_empty(*x.shape[:2], *low_size(x.shape[2:], kernel))
    if not total and max(kernel) <= 2 and kernels.usable(x):
        return kernels.average_pool(x, kernel)
    if not total and _slices_are_faster(x, kernel):
        return _average_slices(x, kernel)
    if x.dim() == 4:
        return _average_pool2d(x, tuple(kernel), total)
    time, height, width = kernel
    # Space and time are pooled apart, both by avg_pool2d: averages over boxes separate, and avg_pool3d has neither
    # a half-precision kernel on CPUs nor a channels_last_3d one.
    if (height, width) != (1, 1):
        x = _pool_space(x, (height, width), total)
    if time != 1:
        # [N, C, T, H, W] -> [N, C, T, H*W], a view in both memory formats
        x = _average_pool2d(x.flatten(3), (time, 1), total).unflatten(3, x.shape[3:])
    return x


def _pool_space(x: Tensor, kernel: tuple[int, int], total: bool) -> Tensor:
    n, c, t = x.shape[:3]
    if x.stride(1) == 1:
        # [N, C, T, H, W] -> [N*T, C, H, W] is a view of this layout, and its pooled map goes back as one
        pooled = _average_pool2d(x.transpose(1, 2).flatten(0, 1), kernel, total)
        return pooled.unflatten(0, (n, t)).transpose(1, 2)
    # [N, C, T, H, W] -> [N, C*T, H, W]
    return _average_pool2d(x.flatten(1, 2), kernel, total).unflatten(1, (c, t))


def _average_pool2d(x: Tensor, kernel: tuple[int, ...], total: bool) -> Tensor:
    divisor = 1 if total else None
    return F.avg_pool2d(x, kernel, kernel, ceil_mode=True, count_include_pad=False, divisor_override=divisor)


def _slices_are_faster(x: Tensor, kernel: Sequence[int]) -> bool:
    """Of a contiguous map on a CPU avg_pool2d takes 7 times as long; with a gradient to follow slices would cost more."""
    plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.stride(1) != 1
    whole = all(k == 1 or (k == 2 and size % 2 == 0) for size, k in zip(x.shape[2:], kernel, strict=True))
    return plain and whole and not _watched()


def _watched() -> bool:
    """Does autograd, a compiler or a tracer follow each operator? Then a few plain ones are best."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()


def _average_slices(x: Tensor, kernel: Sequence[int]) -> Tensor:
    """Space, then time, and each sum in the order of avg_pool2d: the same numbers bit for bit."""
    doubled = [axis for axis, k in enumerate(kernel, start=2) if k == 2]
    space = x.dim() - 2
    for axes in ([a for a in doubled if a >= space], [a for a in doubled if a < space]):
        corners = [x]
        for axis in axes:
            corners = [every(corner, axis, 2, place) for corner in corners for place in (0, 1)]
        if axes:
            x = corners[0] + corners[1]
            for corner in corners[2:]:
                x += corner
            x *= 1 / len(corners)
    return x


def every(x: Tensor, axis: int, step: int, first: int) -> Tensor:
    """One value in each window of `step` along the axis, the one at `first`: a view."""
    return x if step == 1 else x[(slice(None),) * axis + (slice(first, None, step),)]


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest upsampling of a low map to the high map's size: y[i] = x[i // 2], odd sizes cropped.

    F.interpolate computes floor(i * ceil(s / 2) / s) for the index in float32, which is i // 2 up to a size of 4188.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="nearest")


def add_upsampled(y: Tensor, low: Tensor, share: float = 1.0) -> Tensor:
    """Return y + share * upsample(low, y's size). Unless autograd records operators, the sum replaces the values of y."""
    if _watched():
        return y + upsample(share * low, y.shape[2:])
    if share == 1.0 and kernels.usable(y, low):
        return kernels.add_upsampled_(y, low)
    doubled = [size != small for size, small in zip(y.shape[2:], low.shape[2:], strict=True)]
    uneven = any(double and size % 2 for size, double in zip(y.shape[2:], doubled, strict=True))
    if y.device.type != "cpu":
        return y.add_(upsample(low, y.shape[2:]), alpha=share) if uneven else _add_to_windows(y, low, doubled, share)
    if y.stride(1) == 1 and not uneven:
        return _add_to_windows(y, low, doubled, share)
    # Add to one corner of all windows after another. At an odd border, later corners have fewer values.
    for corner in itertools.product(*((0, 1) if double else (None,) for double in doubled)):
        part = y
        for axis, place in enumerate(corner, start=2):
            part = part if place is None else every(part, axis, 2, place)
        size = part.shape[2:]
        part.add_(low[tuple(map(slice, (None, None, *size)))], alpha=share)
    return y


def _add_to_windows(y: Tensor, low: Tensor, doubled: Sequence[bool], share: float) -> Tensor:
    """Add in one call, without an upsampled map: [N, C, H, W] is viewed as [N, C, H / 2, 2, W / 2, 2]."""
    windows = y
    for axis in range(len(doubled) + 1, 1, -1):
        if doubled[axis - 2]:
            windows, low = windows.unflatten(axis, (-1, 2)), low.unsqueeze(axis + 1)
    windows.add_(low, alpha=share)
    return y


def pooling_gradient(grad: Tensor, size: Sequence[int], kernel: Sequence[int], added_to: Tensor | None) -> Tensor:
    """Return the gradient of `average_pool` of a map of this size, plus `added_to`, whose memory the sum may use.

    grad: gradient of the pooled map.
    """
    share = 1 / math.prod(kernel)
    if any(s % k for s, k in zip(size, kernel, strict=True)):
        grad, share = _share_of_each_value(grad, size, kernel), 1.0
    return upsample(share * grad, size) if added_to is None else add_upsampled(added_to, grad, share)


def upsampling_gradient(grad: Tensor, kernel: Sequence[int]) -> Tensor:
    """Return the gradient of `upsample` by kernel, the sum over each window. grad: gradient of the upsampled map."""
    return average_pool(grad, kernel, total=True)


def _share_of_each_value(grad: Tensor, size: Sequence[int], kernel: Sequence[int]) -> Tensor:
    """Divide by the number of values in each window of a map of this size. The last window of an odd size has fewer."""
    grad = grad / math.prod(kernel)
    for axis, (s, k) in enumerate(zip(size, kernel, strict=True), start=2):
        if s % k:
            grad.narrow(axis, -1, 1).mul_(float(k))
    return grad


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
