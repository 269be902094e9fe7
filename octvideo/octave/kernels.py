"""Pool, upsample and add in one pass over the large map: Triton kernels for GPUs, with derivatives of any order.

In eager mode, average pooling over time and space is two passes of torch's operators. The sum with an upsampled map is
three: upsample, add, and one each for a shortcut and a ReLU. These functions need one. The values are the same: in
float32 bit for bit, where sums have the same order and the GPU does not contract a product and a sum; half precision is
summed in float32 and rounded once.

The kernels are torch operators (kernels_library.py), so dispatch modes such as FlopCounterMode see them. Their derivatives
are `torch.autograd.Function`s with `setup_context`, `vmap` and `jvp`, torch's only public way to backward and forward mode
and to the transforms of torch.func. Pooling and upsampling are each other's transpose, so the same operators compute
derivatives of any order. A call that nobody differentiates skips the Function, which costs more than the operator.

resample.py chooses between these functions and torch's operators. OCTVIDEO_KERNELS=0 and `enabled(False)` turn the kernels
off, for tests and benchmarks that compare.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from octvideo.octave.kernels_library import is_channels_last, window_between

DEVICES: tuple[str, ...] = ("cuda",)
"""Kinds of device that run the kernels. Tests add "cpu", on which Triton's interpreter runs them, slowly."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Sums are float32, so float64 is left to torch."""

_enabled = os.environ.get("OCTVIDEO_KERNELS", "1") != "0"


@contextlib.contextmanager
def enabled(on: bool) -> Iterator[None]:
    """Use the kernels wherever they work (True) or nowhere (False) inside this context. Applies to all threads."""
    global _enabled
    before, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = before


def usable(*maps: Tensor) -> bool:
    """Return True if the kernels may read these maps: plain tensors of one supported dtype on one GPU, in eager mode."""
    # The compiler must be asked first: torch.compile does not understand what follows.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if not _enabled or not all(type(x) in (Tensor, nn.Parameter) for x in maps):
        return False  # fx proxies, fake tensors and other subclasses
    device, dtype = maps[0].device, maps[0].dtype
    if device.type not in DEVICES or dtype not in DTYPES or any((x.device, x.dtype) != (device, dtype) for x in maps):
        return False
    return _works(device)


@functools.cache
def _works(device: torch.device) -> bool:
    """Try the kernels once per device. If Triton, its C compiler or a driver is missing, the run is slower and continues."""
    if importlib.util.find_spec("triton") is None:
        return False
    errors: list[Exception] = []
    # A new thread has none of this thread's dispatch modes, transforms and gradient settings.
    thread = threading.Thread(target=_try, args=(device, errors))
    thread.start()
    thread.join()
    for error in errors:
        warnings.warn(
            f"Triton kernels are not used on {device}, torch's operators are, with the same results: the first try "
            f"failed with {type(error).__name__}: {error}. OCTVIDEO_KERNELS=0 turns off kernels and this message.",
            RuntimeWarning,
            stacklevel=2,
        )
    return not errors


def _try(device: torch.device, errors: list[Exception]) -> None:
    try:
        with torch.no_grad():
            x = torch.arange(150.0, device=device).reshape(2, 3, 5, 5)
            low = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
            torch.testing.assert_close(average_pool(x, (2, 2)), low)
            expected = torch.relu(2 * x - F.interpolate(4 * low, size=(5, 5)))
            torch.testing.assert_close(add_upsampled(x, -4 * low, shortcut=x, relu=True), expected)
    except Exception as error:  # noqa: BLE001 (whatever Triton, a compiler or a driver raise)
        errors.append(error)


def average_pool(x: Tensor, window: Sequence[int], total: bool = False) -> Tensor:
    """`resample.average_pool` for windows of 1 or 2 per dimension, in one pass; differentiable.

    x: [N, C, H, W] or [N, C, T, H, W] with any strides. A channels-last map stays channels last; every other map becomes
    contiguous. total: return sums instead of means, the gradient of upsampling. Raises ValueError for other windows.
    """
    if all(k == 1 for k in window) and len(window) == x.dim() - 2:
        return x
    return _pool(x, window, not total, is_channels_last(x))


def add_upsampled_(
    y: Tensor, low: Tensor, *, shortcut: Tensor | None = None, relu: bool = False, mean: bool = False
) -> Tensor:
    """Compute y = relu(y + upsample(low) + shortcut) in place, in one pass; shortcut and ReLU are optional.

    y, shortcut: [N, C, (T,) H, W] with any strides. low: [N, C, (T_low,) H_low, W_low]; each size is that of y or its half,
    rounded up. mean: divide each value of low by the number of values in its window. Differentiable; where a derivative is
    followed, the sum is computed first and copied to y. Raises ValueError for sizes that do not belong together.
    """
    if torch.compiler.is_compiling() or _differentiated(y, low, shortcut):
        return y.copy_(add_upsampled(y, low, shortcut=shortcut, relu=relu, mean=mean))
    torch.ops.octvideo.upsample_add_(y, low, shortcut, relu, mean)
    return y


def add_upsampled(
    y: Tensor, low: Tensor, *, shortcut: Tensor | None = None, relu: bool = False, mean: bool = False
) -> Tensor:
    """Return the sum of `add_upsampled_` as a new map, dense in y's memory format."""
    return _call(_UpsampleAdd, (y, low, shortcut), relu, mean)


def upsample_shares(low: Tensor, size: Sequence[int], window: Sequence[int]) -> Tensor:
    """Upsample low / (number of values in its window) to `size`. This is the gradient of average pooling."""
    return _upsample(low, size, window, True, is_channels_last(low))


# Derivatives --------------------------------------------------------------------------------------------------------


def _differentiated(*maps: Tensor | None) -> bool:
    """Return True if autograd, forward-mode AD or a transform of torch.func follows one of the maps.

    torch.func.debug_unwrap is torch's public test for the tensors of a transform; its result is compared, not used.
    """
    grad = torch.is_grad_enabled()
    return any(
        x is not None
        and ((grad and x.requires_grad) or torch.func.debug_unwrap(x) is not x or unpack_dual(x).tangent is not None)
        for x in maps
    )


class _Operator(torch.autograd.Function):
    """An operator with its derivatives. forward calls the operator; the other methods call `_pool` and `_upsample`."""

    with_jvp: ClassVar[type[torch.autograd.Function]]
    """The same class with `pushforward` as `jvp`: torch.compile refuses a Function that has a jvp."""

    @classmethod
    def __init_subclass__(cls) -> None:
        if "pushforward" in cls.__dict__:
            # Function.apply asks for the signature at each call: if it is there, a call takes a third less time.
            cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
            cls.with_jvp = type(f"{cls.__name__}WithJvp", (cls,), {"jvp": cls.__dict__["pushforward"]})


def _call(operator: type[_Operator], maps: tuple[Tensor | None, ...], *settings: Any) -> Tensor:
    if torch.compiler.is_compiling():
        return operator.apply(*maps, *settings)
    if _differentiated(*maps):
        return operator.with_jvp.apply(*maps, *settings)
    return operator.forward(*maps, *settings)


def _pool(x: Tensor, window: Sequence[int], mean: bool, channels_last: bool) -> Tensor:
    return _call(_Pool, (x,), window, mean, channels_last)


def _upsample(low: Tensor, size: Sequence[int], window: Sequence[int], mean: bool, channels_last: bool) -> Tensor:
    return _call(_Upsample, (low,), size, window, mean, channels_last)


class _Pool(_Operator):
    """High map -> low map: means, or sums, over windows."""

    @staticmethod
    def forward(x: Tensor, window: Sequence[int], mean: bool, channels_last: bool) -> Tensor:
        return torch.ops.octvideo.pool(x, window, mean, channels_last)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *ctx.settings = inputs
        ctx.size, ctx.channels_last = tuple(x.shape[2:]), is_channels_last(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        window, mean, _ = ctx.settings
        return _upsample(grad, ctx.size, window, mean, ctx.channels_last), None, None, None

    @staticmethod
    def pushforward(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _pool(tangent, *ctx.settings)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *settings: Any) -> tuple[Tensor, int]:
        return _unfold(info, _pool(_fold(info, x, in_dims[0]), *settings))


class _Upsample(_Operator):
    """Low map -> high map: each value, or its share, at all positions of its window."""

    @staticmethod
    def forward(low: Tensor, size: Sequence[int], window: Sequence[int], mean: bool, channels_last: bool) -> Tensor:
        return torch.ops.octvideo.upsample(low, size, window, mean, channels_last)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        low, *ctx.settings = inputs
        ctx.channels_last = is_channels_last(low)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, window, mean, _ = ctx.settings
        return _pool(grad, window, mean, ctx.channels_last), None, None, None, None

    @staticmethod
    def pushforward(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _upsample(tangent, *ctx.settings)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], low: Tensor, *settings: Any) -> tuple[Tensor, int]:
        return _unfold(info, _upsample(_fold(info, low, in_dims[0]), *settings))


class _UpsampleAdd(_Operator):
    """relu(y + upsample(low) + shortcut)."""

    @staticmethod
    def forward(y: Tensor, low: Tensor, shortcut: Tensor | None, relu: bool, mean: bool) -> Tensor:
        return torch.ops.octvideo.upsample_add(y, low, shortcut, relu, mean)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, low, shortcut, ctx.relu, ctx.mean = inputs
        ctx.window, ctx.channels_last = window_between(y, low), is_channels_last(low)
        ctx.has_shortcut = shortcut is not None
        if ctx.relu:
            ctx.save_for_backward(output)
            ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = _where_positive(ctx, grad)
        to_low = _pool(grad, ctx.window, ctx.mean, ctx.channels_last) if ctx.needs_input_grad[1] else None
        return grad, to_low, grad if ctx.has_shortcut else None, None, None

    @staticmethod
    def pushforward(ctx: Any, y: Tensor, low: Tensor, shortcut: Tensor | None, *_: Any) -> Tensor:
        return _where_positive(ctx, add_upsampled(y, low, shortcut=shortcut, mean=ctx.mean))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        maps = [_fold(info, x, dim) for x, dim in zip(args[:3], in_dims[:3], strict=True)]
        return _unfold(info, _call(_UpsampleAdd, tuple(maps), *args[3:]))


def _where_positive(ctx: Any, grad: Tensor) -> Tensor:
    """Apply the derivative of the ReLU, which like torch's lets through what belongs to NaN."""
    return grad.masked_fill(ctx.saved_tensors[0] <= 0, 0.0) if ctx.relu else grad


def _fold(info: Any, x: Tensor | None, dim: int | None) -> Any:
    """vmap's dimension joins the batch: [B, N, C, ...] -> [B * N, C, ...]. A map without it is repeated."""
    if x is None:
        return None
    x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _unfold(info: Any, y: Tensor) -> tuple[Tensor, int]:
    """[B * N, C, ...] -> [B, N, C, ...] and the dimension of B, as vmap expects them."""
    return y.unflatten(0, (info.batch_size, y.shape[0] // info.batch_size)), 0
