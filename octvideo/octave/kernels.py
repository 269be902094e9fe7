"""Average pooling, and the sum with an upsampled map, in one pass each over the large map: Triton kernels for GPUs.

In eager mode, pooling over time and space is two passes (feature.py says why); the sum with an upsampled map first writes
that map, and a shortcut and a ReLU behind it are a pass each. Where `usable` says so, feature.py and fuse.py come here;
everywhere else they run torch's operations. The numbers are the same: in float32 bit for bit where sums are made in the
same order and the GPU does not contract a product and a sum; half precision is summed in float32 and rounded once.

Under torch.compile the kernels step aside, since Inductor fuses these operations. In what torch 2.13 generates for a CPU,
y + upsample(low) with scale, shift, shortcut and ReLU is one loop, and so is pooling by (1, 2, 2), or by (2, 2, 2) as the
sum of slices that fuse.py writes; only `feature.average_pool` by (2, 2, 2) is two, one for space and one for time.

OCTVIDEO_KERNELS=0 turns the kernels off, and so does `enabled(False)`, for tests and benchmarks that compare.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

DEVICES: tuple[str, ...] = ("cuda",)
"""Kinds of device that run the kernels. Triton's interpreter runs them on "cpu", slowly: tests add it."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Sums are float32, so float64 is left to torch."""

TILE = 1024
"""Values that a program instance writes, fixed: with 4 warps 8 per thread, 16 bytes in half precision, which is the
widest load. These kernels wait for memory, and an autotuner would time them anew for each size of each network."""

LARGE = 2**30
"""From this many elements on, gaps between them included, offsets are int64: an int32 holds twice as many, so the masked
end of the last tile fits too."""

_enabled = os.environ.get("OCTVIDEO_KERNELS", "1") != "0"


@contextlib.contextmanager
def enabled(on: bool) -> Iterator[None]:
    """Within it the kernels are used where they can be, or not at all. Holds for all threads."""
    global _enabled
    before, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = before


def usable(*maps: Tensor) -> bool:
    """May the kernels take these maps? Only plain tensors of one supported dtype on one GPU, and only in eager mode."""
    # First of all, and alone: what follows need not be understood by torch.compile.
    if torch.compiler.is_compiling():
        return False
    if not _enabled or not all(type(x) in (Tensor, nn.Parameter) for x in maps):
        return False  # fx proxies, fake tensors and other subclasses
    device, dtype = maps[0].device, maps[0].dtype
    if device.type not in DEVICES or dtype not in DTYPES or any((x.device, x.dtype) != (device, dtype) for x in maps):
        return False
    return not _watched() and _works(device)


def _watched() -> bool:
    """Does somebody follow torch's operations, such as a tracer, a counter of FLOPs, vmap or a forward derivative?"""
    return (
        torch.jit.is_tracing()
        or _get_current_dispatch_mode() is not None
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )


@functools.cache
def _works(device: torch.device) -> bool:
    """Tried once per device: what is missing there, such as Triton or its C compiler, costs time and not the run."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        with torch.no_grad():
            x = torch.arange(150.0, device=device).reshape(2, 3, 5, 5)
            low = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
            torch.testing.assert_close(average_pool(x, (2, 2)), low)
            expected = torch.relu(2 * x - F.interpolate(4 * low, size=(5, 5)))
            torch.testing.assert_close(add_upsampled(x, -4 * low, shortcut=x, relu=True), expected)
    except Exception as error:  # noqa: BLE001 (whatever Triton, a compiler or a driver raise)
        warnings.warn(
            f"Triton kernels are not used on {device}, torch's operations are, with the same numbers: the first try "
            f"failed with {type(error).__name__}: {error}. OCTVIDEO_KERNELS=0 turns kernels and this message off.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def _programs() -> Any:
    return importlib.import_module("octvideo.octave.kernels_triton")


def average_pool(x: Tensor, kernel: Sequence[int]) -> Tensor:
    """`feature.average_pool` for windows of 1 or 2 per dimension, in one pass; differentiable.

    x: [N, C, H, W] or [N, C, T, H, W] with any strides; channels last stays so, everything else becomes contiguous.
    """
    kernel = tuple(kernel)
    if len(kernel) != x.dim() - 2 or any(k not in (1, 2) for k in kernel):
        raise ValueError(f"kernel is {kernel}; it gives 1 or 2 for each of {x.dim() - 2} dimensions")
    if all(k == 1 for k in kernel):
        return x
    result: Tensor = _Pool.apply(x, kernel, True, _channels_last(x))
    return result


def add_upsampled_(
    y: Tensor,
    low: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    shortcut: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """y = relu((y + upsample(low)) * scale + shift + shortcut) in place, in one pass; what is not given is left out.

    y, shortcut: [N, C, (T,) H, W] with any strides. low: [N, C, (T_low,) H_low, W_low], each size that of y or its half,
    rounded up. scale, shift: [C]. Differentiable by y and low as long as nothing else is given.
    Raises ValueError for sizes that do not belong together, RuntimeError for a gradient that there is not.
    """
    if any(stride == 0 and size > 1 for stride, size in zip(y.stride(), y.shape, strict=True)):
        raise RuntimeError("add_upsampled_: several elements of y share one place in memory (expand); clone() it first")
    return _add_upsampled(y, low, scale, shift, shortcut, relu, in_place=True)


def add_upsampled(
    y: Tensor,
    low: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    shortcut: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`add_upsampled_` into a new map, dense in y's memory format: for a y that is a slice of channels, or still needed."""
    return _add_upsampled(y, low, scale, shift, shortcut, relu, in_place=False)


def _add_upsampled(
    y: Tensor,
    low: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    shortcut: Tensor | None,
    relu: bool,
    in_place: bool,
) -> Tensor:
    kernel = _kernel_between(y, low)
    if shortcut is not None and shortcut.shape != y.shape:
        raise ValueError(
            f"a shortcut {tuple(shortcut.shape)} cannot be added to {tuple(y.shape)}; shapes must be equal"
        )
    vectors = [v for v in (scale, shift) if v is not None]
    if any(v.shape != y.shape[1:2] for v in vectors):
        raise ValueError(f"scale and shift have {y.shape[1]} values each, not {[tuple(v.shape) for v in vectors]}")
    given = [y, low, *vectors, *([] if shortcut is None else [shortcut])]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        if len(given) > 2 or relu:
            raise RuntimeError("the sum with an upsampled map has no gradient beyond y and low; use torch.no_grad()")
        result: Tensor = _AddUpsampled.apply(y, low, kernel, in_place)
        return result
    last = _channels_last(y)
    out = y if in_place else _empty(y, y.shape[2:], last)
    _launch_spread(out, y, low, kernel, last, shortcut=shortcut, scale=scale, shift=shift, relu=relu)
    if in_place and not y.is_inference():
        torch.autograd.graph.increment_version(y)  # or autograd would not notice a saved y that is no longer the same
    return out


def _kernel_between(y: Tensor, low: Tensor) -> tuple[int, ...]:
    """1 or 2 for each dimension in which low has y's size or half of it."""
    high_size, small_size = tuple(y.shape[2:]), tuple(low.shape[2:])
    kernel = tuple(1 if small == size else 2 for size, small in zip(high_size, small_size, strict=False))
    if y.shape[:2] != low.shape[:2] or y.dim() != low.dim() or _low_size(high_size, kernel) != small_size:
        raise ValueError(
            f"a map {tuple(low.shape)} does not upsample to {tuple(y.shape)}: batch and channels must be equal, and each "
            f"size equal or half, rounded up"
        )
    return kernel


# Gradients: each of two linear maps is the other's transpose, so they have derivatives of any order --------------------


class _Pool(torch.autograd.Function):
    """High map -> low map: means, or sums, over windows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: tuple[int, ...], mean: bool, last: bool) -> Tensor:
        ctx.kernel, ctx.mean, ctx.last, ctx.size = kernel, mean, _channels_last(x), tuple(x.shape[2:])
        y = _empty(x, _low_size(x.shape[2:], kernel), last)
        _launch_pool(x, y, kernel, mean, last)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Spread.apply(grads[0], ctx.size, ctx.kernel, ctx.mean, ctx.last), None, None, None


class _Spread(torch.autograd.Function):
    """Low map -> high map: each value, or its share, in every place of its window."""

    @staticmethod
    def forward(
        ctx: Any, low: Tensor, size: tuple[int, ...], kernel: tuple[int, ...], mean: bool, last: bool
    ) -> Tensor:
        ctx.kernel, ctx.mean, ctx.last = kernel, mean, _channels_last(low)
        out = _empty(low, size, last)
        _launch_spread(out, None, low, kernel, last, mean=mean)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Pool.apply(grads[0], ctx.kernel, ctx.mean, ctx.last), None, None, None, None


class _AddUpsampled(torch.autograd.Function):
    """y + upsample(low): in place costs no memory, and no convolution needs its own output for its gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, low: Tensor, kernel: tuple[int, ...], in_place: bool) -> Tensor:
        ctx.kernel, ctx.last = kernel, _channels_last(low)
        if in_place:
            ctx.mark_dirty(y)
        last = _channels_last(y)
        out = y if in_place else _empty(y, y.shape[2:], last)
        _launch_spread(out, y, low, kernel, last)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        to_low = _Pool.apply(grads[0], ctx.kernel, False, ctx.last) if ctx.needs_input_grad[1] else None
        return grads[0], to_low, None, None


# Launches -----------------------------------------------------------------------------------------------------------


def _channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and not x.is_contiguous()


def _memory_format(x: Tensor, last: bool) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return formats[x.dim()] if last else torch.contiguous_format


def _dense(x: Tensor | None, last: bool) -> bool:
    return x is not None and x.is_contiguous(memory_format=_memory_format(x, last))


def _low_size(size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-s // k) for s, k in zip(size, kernel, strict=True))


def _empty(x: Tensor, size: Sequence[int], last: bool) -> Tensor:
    """A map of x's batch, channels and kind, dense in the memory format."""
    shape = (*x.shape[:2], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x, last))


def _launch_pool(x: Tensor, y: Tensor, kernel: tuple[int, ...], mean: bool, last: bool) -> None:
    if not y.numel():
        return
    grid, tile = _tiles(y, last, x, y)
    _, channels, *size = _five(x.shape, 1)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever that of the tensors
        _programs().pool[grid](
            x, y, *tile[:2], channels, *size, *_five(x.stride(), 0), *_window(kernel), mean, last, *tile[2:]
        )  # fmt: skip


def _launch_spread(
    out: Tensor,
    y: Tensor | None,
    low: Tensor,
    kernel: tuple[int, ...],
    last: bool,
    *,
    mean: bool = False,
    shortcut: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
) -> None:
    if not out.numel():
        return
    grid, tile = _tiles(out, last, out, y, low, shortcut)
    _, channels, *size = _five(out.shape, 1)
    strides = [s for x in (y, low, shortcut) for s in ((0,) * 5 if x is None else _five(x.stride(), 0))]
    scale, shift = (None if v is None else v.contiguous() for v in (scale, shift))
    with torch.cuda.device_of(out):
        _programs().spread[grid](
            out, y, low, shortcut, scale, shift, *tile[:2], channels, *size, *strides, *_window(kernel), mean, relu,
            out is y, _dense(y, last), _dense(shortcut, last), last, *tile[2:],
        )  # fmt: skip


def _five(values: Sequence[int], time: int) -> tuple[int, ...]:
    """Of [N, C, T, H, W], or of [N, C, H, W] with `time` for T."""
    return (*values[:2], time, *values[2:]) if len(values) == 4 else tuple(values)


def _window(kernel: tuple[int, ...]) -> tuple[int, ...]:
    return (1, *kernel) if len(kernel) == 2 else kernel


def _tiles(written: Tensor, last: bool, *maps: Tensor | None) -> tuple[tuple[int], tuple[int, int, bool, int, int]]:
    """The grid and (rows, columns, LARGE, ROWS, COLUMNS) for a map that is written: see kernels_triton.py."""
    n, c, t, h, w = _five(written.shape, 1)
    rows, columns = (n * t * h, w * c) if last else (n * c * t, h * w)
    across = min(1 << (columns - 1).bit_length(), TILE)  # a power of two, as Triton wants it
    down = TILE // across
    large = max(_extent(x) for x in maps if x is not None) >= LARGE
    return (-(-rows // down) * -(-columns // across),), (rows, columns, large, down, across)


def _extent(x: Tensor) -> int:
    return 1 + sum((size - 1) * abs(stride) for size, stride in zip(x.shape, x.stride(), strict=True))
