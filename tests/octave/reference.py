"""A slow NumPy evaluation of octave convolution, written from the paper's four equations and not from the code.

    Y_H = f(X_H; W_HH) + upsample(f(X_L; W_LH), 2)
    Y_L = f(X_L; W_LL) + f(pool(X_H, 2); W_HL)                      (Chen et al., ICCV 2019, equation 4)

Arrays are [N, C, *size] in float64, size (H, W) or (T, H, W). The rules for strides follow the authors' code:
stride 2 pools first and convolves with stride 1, and L->H then reads the un-pooled low map.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np

Array = np.ndarray

_NUMPY_PADDING = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def split(channels: int, alpha: float) -> tuple[int, int]:
    """(high, low) channel counts: low = int(alpha * C)."""
    low = int(alpha * channels)
    return channels - low, low


def ceil_size(size: Sequence[int], factor: Sequence[int]) -> tuple[int, ...]:
    """ceil(size / factor) in each dimension."""
    return tuple((s + f - 1) // f for s, f in zip(size, factor, strict=True))


def average_pool(x: Array, factor: Sequence[int]) -> Array:
    """Mean over windows of width and stride `factor`; a window over the edge averages the values that exist."""
    out = np.zeros(x.shape[:2] + ceil_size(x.shape[2:], factor))
    for place in np.ndindex(*out.shape[2:]):
        window = tuple(slice(i * f, (i + 1) * f) for i, f in zip(place, factor, strict=True))
        values = x[(slice(None), slice(None), *window)]
        out[(slice(None), slice(None), *place)] = values.mean(axis=tuple(range(2, x.ndim)))
    return out


def upsample(x: Array, factor: Sequence[int], size: Sequence[int]) -> Array:
    """Each value repeated `factor` times in each dimension, then cropped to `size`."""
    for axis, (f, s) in enumerate(zip(factor, size, strict=True), start=2):
        x = np.repeat(x, f, axis=axis).take(range(s), axis=axis)
    return x


def max_pool(
    x: Array, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], out: Sequence[int]
) -> Array:
    """Maximum over the values that exist in each of the first `out` windows."""
    y = np.full(x.shape[:2] + tuple(out), np.nan)
    for place in np.ndindex(*out):
        starts = [i * s - p for i, s, p in zip(place, stride, padding, strict=True)]
        window = tuple(slice(max(a, 0), a + k) for a, k in zip(starts, kernel, strict=True))
        y[(slice(None), slice(None), *place)] = x[(slice(None), slice(None), *window)].max(axis=tuple(range(2, x.ndim)))
    return y


def convolve(
    x: Array, weight: Array, padding: Sequence[int], dilation: Sequence[int], groups: int, padding_mode: str = "zeros"
) -> Array:
    """Cross-correlation of stride 1. weight: [C_out, C_in / groups, *kernel]."""
    pads = [(0, 0), (0, 0)] + [(p, p) for p in padding]
    x = np.pad(x, pads, mode=_NUMPY_PADDING[padding_mode])
    kernel = weight.shape[2:]
    size = [s - d * (k - 1) for s, d, k in zip(x.shape[2:], dilation, kernel, strict=True)]
    y = np.zeros((x.shape[0], weight.shape[0], *size))
    c_in, c_out = x.shape[1] // groups, weight.shape[0] // groups
    assert (c_in, groups * c_in, groups * c_out) == (weight.shape[1], x.shape[1], weight.shape[0])
    for group in range(groups):
        rows, columns = slice(group * c_out, (group + 1) * c_out), slice(group * c_in, (group + 1) * c_in)
        for tap in product(*map(range, kernel)):
            window = tuple(slice(t * d, t * d + s) for t, d, s in zip(tap, dilation, size, strict=True))
            seen = x[(slice(None), columns, *window)]
            y[:, rows] += np.einsum("oc,nc...->no...", weight[(rows, slice(None), *tap)], seen)
    return y


def octave_conv(
    high: Array,
    low: Array | None,
    weight: Array,
    bias: Array | None,
    c_out_low: int,
    pool: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    padding_mode: str = "zeros",
    pool_stride: bool = True,
) -> tuple[Array, Array | None]:
    """(Y_H, Y_L) of one octave convolution; Y_L is None when c_out_low is 0.

    high: [N, C_in_high, *size], with C_in_high = 0 when all channels are low. low: [N, C_in_low, *low size] or None.
    weight: [C_out, C_in / groups, *kernel], high channels before low in rows and columns. stride, pool: 1 or 2
    per dimension. pool_stride False: f has the stride itself, nothing else is strided.
    """
    step = tuple(slice(None, None, 1 if pool_stride else s) for s in stride)
    stride = stride if pool_stride else (1,) * len(stride)
    c_in_high, c_in_low = high.shape[1], 0 if low is None else low.shape[1]
    c_out_high = weight.shape[0] - c_out_low
    depthwise = groups > 1 and groups == c_in_high + c_in_low
    both = [2 if s == 2 and p == 1 else 1 for s, p in zip(stride, pool, strict=True)]
    grow = [2 if s == 1 and p == 2 else 1 for s, p in zip(stride, pool, strict=True)]

    def f(x: Array, kernel: Array) -> Array:
        path_groups = x.shape[1] if depthwise else groups
        return convolve(x, kernel, padding, dilation, path_groups, padding_mode)[(slice(None), slice(None), *step)]

    if depthwise:
        w_hh, w_ll, w_lh, w_hl = weight[:c_out_high], weight[c_out_high:], None, None
    else:
        column = c_in_high // groups
        w_hh, w_lh = weight[:c_out_high, :column], weight[:c_out_high, column:]
        w_hl, w_ll = weight[c_out_high:, :column], weight[c_out_high:, column:]

    taps = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    size_high = [s + 2 * p - t for s, p, t in zip(ceil_size(high.shape[2:], stride), padding, taps, strict=True)]
    size_high = [len(range(s)[part]) for s, part in zip(size_high, step, strict=True)]
    y_high = np.zeros((high.shape[0], c_out_high, *size_high))
    y_low = np.zeros((high.shape[0], c_out_low, *ceil_size(size_high, pool)))

    strided = average_pool(high, stride)
    if c_in_high and c_out_high:
        y_high += f(strided, w_hh)
    if c_in_high and c_out_low and w_hl is not None:
        y_low += f(average_pool(strided, pool), w_hl)
    if low is not None and c_out_low:
        y_low += f(average_pool(low, stride), w_ll)
    if low is not None and c_out_high and w_lh is not None:
        y_high += upsample(f(average_pool(low, both), w_lh), grow, size_high)
    if bias is not None:
        column_shape = (1, -1) + (1,) * len(pool)
        y_high += bias[:c_out_high].reshape(column_shape)
        y_low += bias[c_out_high:].reshape(column_shape)
    return y_high, y_low if c_out_low else None
