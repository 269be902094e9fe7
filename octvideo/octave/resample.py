"""Pool a map, upsample it, and add an upsampled map: each operation has several forms, and this file chooses.

All forms of an operation return the same values, up to the order in which a sum is rounded. `_pooling_form` and `_sum_form`
choose the form, and at the end of this file the gradients do; nothing else in the package does:

    where                                  average pooling             y + upsample(low)
    eager, GPU with Triton                 one kernel                  one kernel, in place without autograd
    eager, CPU, contiguous, autograd off   sums of slices, or as next  slices of y, in place
    eager, other maps, autograd off        avg_pool2d, space and time  one broadcast sum, or interpolate, in place
    autograd on, or torch.jit.trace        avg_pool2d, space and time  interpolate and add
    compiled                               mean over windows           one broadcast sum
    exported, or windows cut at a border   avg_pool2d, space and time  interpolate and add
    inference form (fuse.py), eager        sums of slices              one broadcast sum
    inference form, compiled               sums of slices              one broadcast sum
    inference form, exported               avg_pool3d                  interpolate and add

Under torch.compile the kernels are not used: Inductor fuses plain operators, also with what comes before and after. In the
code that torch 2.13 generates for a CPU, y + upsample(low) with a shortcut and a ReLU is one loop. Pooling by (2, 2, 2) is
one loop as sums of slices, and two loops as avg_pool2d over space and time.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from octvideo.octave import kernels
from octvideo.octave.kernels_library import low_size as low_size

PoolingForm = Callable[..., Tensor]
SumForm = Callable[..., Tensor]

_frames_as_channels = False


@contextlib.contextmanager
def frames_as_channels() -> Iterator[None]:
    """Export networks such that they pool and upsample [N, C, T, H, W] as images [N, C*T, H, W].

    For backends that have fast kernels of this kind for images only (ONNX Runtime: 20 times as fast).
    """
    global _frames_as_channels
    before, _frames_as_channels = _frames_as_channels, True
    try:
        yield
    finally:
        _frames_as_channels = before


def every(x: Tensor, axis: int, step: int, first: int) -> Tensor:
    """Return a view of one value in each window of `step` values along the axis: the value at `first`."""
    return x if step == 1 else x[(slice(None),) * axis + (slice(first, None, step),)]


def _is_recorded() -> bool:
    """Return True if autograd, a compiler or a tracer records operators; then use few, out-of-place ones."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()


# Average pooling ----------------------------------------------------------------------------------------------------


def average_pool(x: Tensor, kernel: Sequence[int], *, fused: bool = False) -> Tensor:
    """Average pooling with stride = kernel, ceil_mode, over the values that exist: size -> ceil(size / kernel).

    x: [N, C, H, W] with kernel (kh, kw) or [N, C, T, H, W] with kernel (kt, kh, kw). The last row of an odd size is copied,
    and a size of 1 stays 1. fused: the caller is the inference form of a network.
    """
    return _pool(x, kernel, fused=fused)


def _pool(x: Tensor, kernel: Sequence[int], *, fused: bool = False, total: bool = False) -> Tensor:
    """total: return sums instead of means, which the fused forms cannot."""
    if all(k == 1 for k in kernel):
        return x
    if x.shape[1] == 0:
        return x.new_empty(*x.shape[:2], *low_size(x.shape[2:], kernel))
    form = _pooling_form(x, kernel, fused)
    return form(x, kernel, total=True) if total else form(x, kernel)


def _pooling_form(x: Tensor, kernel: Sequence[int], fused: bool) -> PoolingForm:
    exporting = torch.compiler.is_exporting()
    if fused and exporting and x.dim() == 5 and not _frames_as_channels:
        return _pool_by_avg_pool3d
    if max(kernel) <= 2 and kernels.usable(x):
        return kernels.average_pool
    if not fused and torch.compiler.is_compiling() and not exporting and _divides(kernel, x):
        return _pool_by_windows
    if fused and not exporting:
        return _pool_by_sum_of_slices if torch.compiler.is_compiling() or _divides(kernel, x) else _pool_by_avg_pool2d
    if x.device.type == "cpu" and not _is_recorded() and max(kernel) <= 2:
        # Slices are 7 times as fast as avg_pool2d on a contiguous map. With autograd, which records each, they are slower.
        contiguous = x.dtype in (torch.float32, torch.float64) and x.stride(1) != 1
        if contiguous and _divides(kernel, x):
            return _pool_by_slices
    return _pool_by_avg_pool2d


def _divides(kernel: Sequence[int], x: Tensor) -> bool:
    return all(size % k == 0 for size, k in zip(x.shape[2:], kernel, strict=True))


def _pool_by_windows(x: Tensor, kernel: Sequence[int]) -> Tensor:
    """Return the mean over windows of full size, [..., H / 2, 2, ...]. A compiler fuses it and its gradient with others."""
    axes: list[int] = []
    for axis in range(x.dim() - 1, 1, -1):
        if kernel[axis - 2] > 1:
            x = x.unflatten(axis, (-1, kernel[axis - 2]))
            axes = [axis + 1, *(a + 1 for a in axes)]
    return x.mean(axes)


def _pool_by_avg_pool3d(x: Tensor, kernel: Sequence[int]) -> Tensor:
    """Pool in one step, for which other backends have fast kernels; they execute slices one by one."""
    kernel = tuple(map(min, kernel, x.shape[2:]))  # torch refuses a window that is larger than the map
    return F.avg_pool3d(x, kernel, kernel, ceil_mode=True, count_include_pad=False)


def _pool_by_sum_of_slices(x: Tensor, kernel: Sequence[int]) -> Tensor:
    """One sum over all values of a window, which a compiler makes one loop; of any layout, slices of channels too."""
    missing = [-size % k for size, k in zip(x.shape[2:], kernel, strict=True)]
    if any(missing):
        # the mean over values that exist: the last one counts twice
        x = F.pad(x, [side for gap in reversed(missing) for side in (0, gap)], mode="replicate")
    corners = _corners(x, kernel, range(2, x.dim()))
    return functools.reduce(torch.add, corners) * (1 / len(corners))


def _pool_by_slices(x: Tensor, kernel: Sequence[int], total: bool = False) -> Tensor:
    """Space, then time, and each sum in the order of avg_pool2d: the same values bit for bit."""
    space = x.dim() - 2
    for axes in (range(space, x.dim()), range(2, space)):
        corners = _corners(x, kernel, axes)
        if len(corners) > 1:
            x = corners[0] + corners[1]
            for corner in corners[2:]:
                x += corner
            if not total:
                x *= 1 / len(corners)
    return x


def _corners(x: Tensor, kernel: Sequence[int], axes: Sequence[int]) -> list[Tensor]:
    """[N, C, H, W] -> the upper left, upper right, lower left and lower right value of each window, as views."""
    corners = [x]
    for axis in axes:
        k = kernel[axis - 2]
        corners = [every(corner, axis, k, first) for corner in corners for first in range(k)]
    return corners


def _pool_by_avg_pool2d(x: Tensor, kernel: Sequence[int], total: bool = False) -> Tensor:
    """Pool space and time separately: avg_pool3d has no half-precision kernel on CPUs and no channels_last_3d kernel."""
    if x.dim() == 4:
        return _avg_pool2d(x, tuple(kernel), total)
    time, height, width = kernel
    if (height, width) != (1, 1):
        x = _pool_space(x, (height, width), total)
    if time != 1:
        # [N, C, T, H, W] -> [N, C, T, H*W], a view in both memory formats
        x = _avg_pool2d(x.flatten(3), (time, 1), total).unflatten(3, x.shape[3:])
    return x


def _pool_space(x: Tensor, kernel: tuple[int, int], total: bool) -> Tensor:
    n, c, t = x.shape[:3]
    if x.stride(1) == 1:
        # [N, C, T, H, W] -> [N*T, C, H, W] is a view of this layout, and so is the way back
        pooled = _avg_pool2d(x.transpose(1, 2).flatten(0, 1), kernel, total)
        return pooled.unflatten(0, (n, t)).transpose(1, 2)
    # [N, C, T, H, W] -> [N, C*T, H, W]
    return _avg_pool2d(x.flatten(1, 2), kernel, total).unflatten(1, (c, t))


def _avg_pool2d(x: Tensor, kernel: tuple[int, ...], total: bool) -> Tensor:
    divisor = 1 if total else None
    return F.avg_pool2d(x, kernel, kernel, ceil_mode=True, count_include_pad=False, divisor_override=divisor)


# Upsampling ---------------------------------------------------------------------------------------------------------


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest upsampling of a low map to the high map's size: y[i] = x[i // 2], odd sizes cropped.

    F.interpolate computes floor(i * ceil(s / 2) / s) for the index in float32, which is i // 2 up to a size of 4188.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    if x.dim() == 5 and _frames_as_channels and torch.compiler.is_exporting() and x.shape[2] == size[0]:
        # [N, C, T, H, W] -> [N, C*T, H, W]
        return upsample(x.flatten(1, 2), size[1:]).unflatten(1, x.shape[1:3])
    return F.interpolate(x, size=tuple(size), mode="nearest")


def add_upsampled(y: Tensor, low: Tensor, *, fused: bool = False) -> Tensor:
    """Return y + upsample(low, y's size), in the memory of y unless autograd is on. fused: always in new memory."""
    return _sum_form(y, low, fused)(y, low)


def sum_in_one_pass(y: Tensor, low: Tensor, shortcut: Tensor | None) -> bool:
    """Return True if `kernels.add_upsampled` may add a shortcut and a ReLU as well; it does not broadcast the shortcut."""
    if shortcut is None:
        return kernels.usable(y, low)
    return shortcut.shape == y.shape and kernels.usable(y, low, shortcut)


def _sum_form(y: Tensor, low: Tensor, fused: bool) -> SumForm:
    if kernels.usable(y, low):
        return kernels.add_upsampled if fused or torch.is_grad_enabled() else kernels.add_upsampled_
    if fused:
        return _add_by_broadcast if _is_doubled(y, low) and not torch.compiler.is_exporting() else _add_by_interpolate
    if _is_recorded():
        # The gradient of interpolation is a scatter by index in compiled code; that of a broadcast is a sum.
        fusing = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        return _add_by_broadcast if fusing and _is_doubled(y, low) else _add_by_interpolate
    if (y.device.type != "cpu" or y.stride(1) == 1) and _is_doubled(y, low):
        return _add_by_broadcast_
    return _add_by_slices_ if y.device.type == "cpu" else _add_by_interpolate_


def _is_doubled(y: Tensor, low: Tensor) -> bool:
    """Return True if each size of y is that of low or twice it, so that no window is cut at the border."""
    return all(size in (small, 2 * small) for size, small in zip(y.shape[2:], low.shape[2:], strict=True))


def _add_by_interpolate(y: Tensor, low: Tensor, share: float = 1.0) -> Tensor:
    """Return y + share * upsample(low); the other forms with a share do the same."""
    return y + upsample(low if share == 1.0 else share * low, y.shape[2:])


def _add_by_interpolate_(y: Tensor, low: Tensor, share: float = 1.0) -> Tensor:
    return y.add_(upsample(low, y.shape[2:]), alpha=share)


def _add_by_slices_(y: Tensor, low: Tensor, share: float = 1.0) -> Tensor:
    """Add low to one corner of all windows after the other; at an odd border there are fewer of the later corners."""
    doubled = [size != small for size, small in zip(y.shape[2:], low.shape[2:], strict=True)]
    for corner in itertools.product(*((0, 1) if double else (None,) for double in doubled)):
        part = y
        for axis, first in enumerate(corner, start=2):
            part = part if first is None else every(part, axis, 2, first)
        size = part.shape[2:]
        part.add_(low[tuple(map(slice, (None, None, *size)))], alpha=share)
    return y


def _add_by_broadcast(y: Tensor, low: Tensor) -> Tensor:
    """Add each value of low to 2 (4, 8) values of y without writing the upsampled map."""
    windows, low = _windows(y, low)
    total = windows + low
    for axis in range(2, y.dim()):
        if total.shape[axis] != y.shape[axis]:
            total = total.flatten(axis, axis + 1)
    return total


def _add_by_broadcast_(y: Tensor, low: Tensor, share: float = 1.0) -> Tensor:
    windows, low = _windows(y, low)
    windows.add_(low, alpha=share)
    return y


def _windows(y: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of y, [..., H, ...] -> [..., H / 2, 2, ...], and of low, [..., H / 2, 1, ...], in doubled dimensions."""
    for axis in range(y.dim() - 1, 1, -1):
        if y.shape[axis] != low.shape[axis]:
            y, low = y.unflatten(axis, (low.shape[axis], 2)), low.unsqueeze(axis + 1)
    return y, low


# Gradients that an autograd Function computes itself ------------------------------------------------------------------


def pooling_gradient(grad: Tensor, size: Sequence[int], kernel: Sequence[int], added_to: Tensor | None) -> Tensor:
    """Return the gradient of `average_pool` for an input of `size`, plus `added_to`, which may be modified in place.

    grad: gradient of the pooled map.
    """
    if max(kernel) <= 2 and added_to is None and kernels.usable(grad):
        return kernels.upsample_shares(grad, size, kernel)
    if max(kernel) <= 2 and added_to is not None and kernels.usable(grad, added_to):
        add = kernels.add_upsampled if torch.is_grad_enabled() else kernels.add_upsampled_
        return add(added_to, grad, mean=True)
    share = 1 / math.prod(kernel)
    if any(s % k for s, k in zip(size, kernel, strict=True)):
        grad, share = _shares(grad, size, kernel), 1.0
    if added_to is not None:
        return _sum_form(added_to, grad, fused=False)(added_to, grad, share)
    return upsample(grad if share == 1.0 else share * grad, size)


def upsampling_gradient(grad: Tensor, kernel: Sequence[int]) -> Tensor:
    """Return the gradient of `upsample` by kernel: the sum over each window. grad: gradient of the upsampled map."""
    return _pool(grad, kernel, total=True)


def _shares(grad: Tensor, size: Sequence[int], kernel: Sequence[int]) -> Tensor:
    """Divide by the number of values in each window of a map of this size; the last window of an odd size has fewer."""
    grad = grad * (1 / math.prod(kernel))
    for axis, (s, k) in enumerate(zip(size, kernel, strict=True), start=2):
        if s % k:
            grad.narrow(axis, -1, 1).mul_(float(k))
    return grad
