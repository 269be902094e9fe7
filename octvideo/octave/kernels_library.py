"""Define the operators of the Triton kernels in torch's library: schemas, launches, fake kernels and FLOP formulas.

    octvideo::pool           means or sums over windows of 1 or 2 values per dimension
    octvideo::upsample       every value, or its share, at all positions of its window: the transpose of pool
    octvideo::upsample_add   relu((y + upsample(low)) + shortcut), shortcut and ReLU optional
    octvideo::upsample_add_  the same, written into y

kernels.py calls them and holds their derivatives. The operators are defined by `torch.library.Library.define` and `impl`,
for three reasons. `custom_op` takes twice as long on the host (15 instead of 7 us a call without gradient, torch 2.13).
`triton_op` needs `wrap_triton`, which refuses the functions of Triton's interpreter; it exists for Inductor, but under
torch.compile plain operators are faster (resample.py). `register_autograd` has no forward mode: torch.func.jvp of such an
operator is silently zero, and torch.func.grad raises (torch 2.13).
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

TILE = 1024
"""Values that a program instance writes. With 4 warps a thread writes 8 values: 16 bytes in half precision, the widest
store. The kernels are limited by memory, so an autotuner would gain little and measure each size of each network."""

LARGE = 2**30
"""Number of elements, including the gaps of strides, from which offsets are int64. An int32 holds twice as many, so the
masked end of the last tile fits too."""

_library = torch.library.Library("octvideo", "DEF")
for _schema in (
    "pool(Tensor x, int[] window, bool mean, bool channels_last) -> Tensor",
    "upsample(Tensor low, SymInt[] size, int[] window, bool mean, bool channels_last) -> Tensor",
    "upsample_add(Tensor y, Tensor low, Tensor? shortcut, bool relu, bool mean) -> Tensor",
    "upsample_add_(Tensor(a!) y, Tensor low, Tensor? shortcut, bool relu, bool mean) -> ()",
):
    _library.define(_schema, tags=torch.Tag.pt2_compliant_tag)


@functools.cache
def _programs() -> Any:
    return importlib.import_module("octvideo.octave.kernels_triton")


# Operators ----------------------------------------------------------------------------------------------------------


def _pool(x: Tensor, window: Sequence[int], mean: bool, channels_last: bool) -> Tensor:
    y = _empty_pooled(x, window, mean, channels_last)
    _launch_pool(x, y, window, mean, channels_last)
    return y


def _empty_pooled(x: Tensor, window: Sequence[int], mean: bool, channels_last: bool) -> Tensor:
    if len(window) != x.dim() - 2 or any(k not in (1, 2) for k in window):
        raise ValueError(f"window is {tuple(window)}; it must have 1 or 2 for each of {x.dim() - 2} dimensions")
    return _empty(x, low_size(x.shape[2:], window), channels_last)


def _upsample(low: Tensor, size: Sequence[int], window: Sequence[int], mean: bool, channels_last: bool) -> Tensor:
    out = _empty_upsampled(low, size, window, mean, channels_last)
    _launch_upsample_add(out, None, low, window, channels_last, mean=mean)
    return out


def _empty_upsampled(
    low: Tensor, size: Sequence[int], window: Sequence[int], mean: bool, channels_last: bool
) -> Tensor:
    if len(size) != low.dim() - 2 or low_size(size, window) != tuple(low.shape[2:]):
        raise ValueError(f"a map {tuple(low.shape)} does not upsample to {tuple(size)} by {tuple(window)}")
    return _empty(low, size, channels_last)


def _upsample_add(y: Tensor, low: Tensor, shortcut: Tensor | None, relu: bool, mean: bool) -> Tensor:
    window, last = window_between(y, low, shortcut), is_channels_last(y)
    out = _empty(y, y.shape[2:], last)
    _launch_upsample_add(out, y, low, window, last, shortcut=shortcut, relu=relu, mean=mean)
    return out


def _empty_sum(y: Tensor, low: Tensor, shortcut: Tensor | None, relu: bool, mean: bool) -> Tensor:
    window_between(y, low, shortcut)
    return _empty(y, y.shape[2:], is_channels_last(y))


def _upsample_add_(y: Tensor, low: Tensor, shortcut: Tensor | None, relu: bool, mean: bool) -> None:
    if any(stride == 0 and size > 1 for stride, size in zip(y.stride(), y.shape, strict=True)):
        raise RuntimeError("upsample_add_: several elements of y share one memory location (expand); clone() it first")
    window = window_between(y, low, shortcut)
    _launch_upsample_add(y, y, low, window, is_channels_last(y), shortcut=shortcut, relu=relu, mean=mean)
    if not y.is_inference():
        torch.autograd.graph.increment_version(y)  # otherwise autograd would not notice that a saved y has changed


def _check_sum(y: Tensor, low: Tensor, shortcut: Tensor | None, relu: bool, mean: bool) -> None:
    window_between(y, low, shortcut)


for _name, _kernel, _fake in (
    ("pool", _pool, _empty_pooled),
    ("upsample", _upsample, _empty_upsampled),
    ("upsample_add", _upsample_add, _empty_sum),
    ("upsample_add_", _upsample_add_, _check_sum),
):
    _library.impl(_name, _kernel, "CUDA")
    _library.impl(_name, _kernel, "CPU")  # by Triton's interpreter
    torch.library.register_fake(f"octvideo::{_name}", _fake, lib=_library)


@register_flop_formula(torch.ops.octvideo.pool)
def _pool_flops(x: Sequence[int], window: Sequence[int], mean: bool, *_: Any, **__: Any) -> int:
    """Count a multiply-add per value of a window as for avg_pool2d over space, then time; sums of no means are free."""
    n, c, t, h, w = _five(x, 1)
    kt, kh, kw = _five((1, 1, *window), 1)[2:]
    space = n * c * t * math.prod(low_size((h, w), (kh, kw)))
    time = space // t * -(-t // kt) if t else 0
    return 2 * mean * (space * kh * kw * (kh * kw > 1) + time * kt * (kt > 1))


# Sizes --------------------------------------------------------------------------------------------------------------


def low_size(size: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    """Return the size of the low map that belongs to a high map: ceil(size / window) in each dimension."""
    return tuple(-(-s // k) for s, k in zip(size, window, strict=True))


def window_between(y: Tensor, low: Tensor, shortcut: Tensor | None = None) -> tuple[int, ...]:
    """Return 1 or 2 for each dimension in which low has y's size or half of it. Raises ValueError for other sizes."""
    high_size, small_size = tuple(y.shape[2:]), tuple(low.shape[2:])
    window = tuple(1 if small == size else 2 for size, small in zip(high_size, small_size, strict=False))
    if y.shape[:2] != low.shape[:2] or y.dim() != low.dim() or low_size(high_size, window) != small_size:
        raise ValueError(
            f"a map {tuple(low.shape)} does not upsample to {tuple(y.shape)}: batch and channels must be equal, and each "
            f"size equal or half, rounded up"
        )
    if shortcut is not None and shortcut.shape != y.shape:
        raise ValueError(f"cannot add a shortcut {tuple(shortcut.shape)} to {tuple(y.shape)}: shapes must be equal")
    return window


def is_channels_last(x: Tensor) -> bool:
    """Return True if channels are neighbors in memory; False for a map that is contiguous as well."""
    return x.stride(1) == 1 and not x.is_contiguous()


def _memory_format(x: Tensor, channels_last: bool) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return formats[x.dim()] if channels_last else torch.contiguous_format


def _is_dense(x: Tensor | None, channels_last: bool) -> bool:
    return x is not None and x.is_contiguous(memory_format=_memory_format(x, channels_last))


def _empty(x: Tensor, size: Sequence[int], channels_last: bool) -> Tensor:
    """Return an uninitialized map with x's batch, channels, dtype and device, dense in the memory format."""
    memory_format = _memory_format(x, channels_last)
    return torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=memory_format)


def _five(values: Sequence[int], time: int) -> tuple[int, ...]:
    """Return values of [N, C, T, H, W]; those of [N, C, H, W] get `time` for T."""
    return (*values[:2], time, *values[2:]) if len(values) == 4 else tuple(values)


# Launches -----------------------------------------------------------------------------------------------------------


def _launch_pool(x: Tensor, y: Tensor, window: Sequence[int], mean: bool, channels_last: bool) -> None:
    if not y.numel():
        return
    grid, tile = _tiles(y, channels_last, x, y)
    _, channels, *size = _five(x.shape, 1)
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be the tensors' device
        _programs().pool[grid](
            x, y, *tile[:2], channels, *size, *_five(x.stride(), 0), *_five((1, 1, *window), 1)[2:], mean, channels_last,
            *tile[2:],
        )  # fmt: skip


def _launch_upsample_add(
    out: Tensor,
    y: Tensor | None,
    low: Tensor,
    window: Sequence[int],
    channels_last: bool,
    *,
    shortcut: Tensor | None = None,
    relu: bool = False,
    mean: bool = False,
) -> None:
    if not out.numel():
        return
    grid, tile = _tiles(out, channels_last, out, y, low, shortcut)
    _, channels, *size = _five(out.shape, 1)
    strides = [s for x in (y, low, shortcut) for s in ((0,) * 5 if x is None else _five(x.stride(), 0))]
    with torch.cuda.device_of(out):
        _programs().upsample_add[grid](
            out, y, low, shortcut, *tile[:2], channels, *size, *strides, *_five((1, 1, *window), 1)[2:], mean, relu,
            out is y, _is_dense(y, channels_last), _is_dense(shortcut, channels_last), channels_last, *tile[2:],
        )  # fmt: skip


def _tiles(
    written: Tensor, channels_last: bool, *maps: Tensor | None
) -> tuple[tuple[int], tuple[int, int, bool, int, int]]:
    """Return the grid and (rows, columns, LARGE, ROWS, COLUMNS) for a map that is written: see kernels_triton.py."""
    n, c, t, h, w = _five(written.shape, 1)
    rows, columns = (n * t * h, w * c) if channels_last else (n * c * t, h * w)
    across = min(1 << (columns - 1).bit_length(), TILE)  # Triton needs a power of two
    down = TILE // across
    large = max(_extent(x) for x in maps if x is not None) >= LARGE
    return (-(-rows // down) * -(-columns // across),), (rows, columns, large, down, across)


def _extent(x: Tensor) -> int:
    return 1 + sum((size - 1) * abs(stride) for size, stride in zip(x.shape, x.stride(), strict=True))
