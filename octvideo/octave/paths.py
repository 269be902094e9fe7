"""The paths of an octave convolution: forward, and in training backward too, as one step of autograd.

Without this step, autograd would keep a pooled copy of the high map in each layer. It would also fill a tensor of the full
size with zeros for each block of the weight and each part of a map that a path reads. `_Paths` keeps the layer's inputs
only, pools them again in the backward pass, and writes gradients to their places.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from octvideo.octave.feature import add_upsampled, average_pool, pooling_gradient, upsample, upsampling_gradient

if TYPE_CHECKING:
    from octvideo.octave.conv import _OctConv

Kernel = tuple[int, ...]
Place = tuple[str, tuple[Kernel, ...]]
"""A map: "high" or "low", and the kernels by which it was pooled, one after the other."""


class Path(NamedTuple):
    """A convolution of the map at `place` with a block of the weight, rows x columns.

    high: how many of its outputs, the first ones, are high. grow: factor that brings these to high's size.
    biased: each output gets its bias by one path.
    """

    place: Place
    rows: slice
    columns: slice
    high: int
    grow: Kernel
    biased: bool

    def block(self, weight: Tensor) -> Tensor:
        return weight[self.rows, self.columns]


def paths_of(layer: _OctConv) -> list[Path]:
    """H->H, H->L, then L->H and L->L; these as one convolution where both read low at the same resolution."""
    stride, pool, one = layer._pooled, layer.pool, (1,) * len(layer.pool)
    both, highs, lows = slice(None), slice(0, layer.out_high), slice(layer.out_high, None)
    middle = layer.in_high // layer.groups
    high_columns, low_columns = (both, both) if layer.depthwise else (slice(0, middle), slice(middle, None))
    to_high = layer._low_pooled
    grow = tuple(p * t // s for p, t, s in zip(pool, to_high, stride, strict=True))
    biased = not layer.in_high or layer.depthwise  # the bias rides with what reads the high map

    def place(name: str, *kernels: Kernel) -> Place:
        return name, tuple(kernel for kernel in kernels if kernel != one)

    paths = []
    if layer.in_high:
        if layer.out_high:
            paths.append(Path(place("high", stride), highs, high_columns, layer.out_high, one, True))
        if layer.out_low and not layer.depthwise:
            paths.append(Path(place("high", stride, pool), lows, high_columns, 0, one, True))
    if layer.in_low:
        if to_high == stride and layer.groups == 1:
            paths.append(Path(place("low", stride), both, low_columns, layer.out_high, grow, biased))
        else:
            if layer.out_high and not layer.depthwise:
                paths.append(Path(place("low", to_high), highs, low_columns, layer.out_high, grow, biased))
            if layer.out_low:
                paths.append(Path(place("low", stride), lows, low_columns, 0, one, biased))
    return paths


def follow_paths(
    layer: _OctConv, high: Tensor, low: Tensor | None, weight: Tensor, bias: Tensor | None, size: Sequence[int]
) -> tuple[Tensor | None, Tensor | None]:
    """Return (y_high, y_low) of `layer`, None for a map that it does not have.

    weight: columns high before low. size: of y_high.
    """
    followed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (high, low, weight, bias))
    # A compiler takes the gradients of plain operators apart by itself, and fuses them.
    compiled = torch.compiler.is_compiling()
    if compiled or torch.jit.is_tracing() or not layer._even_zeros or not followed:
        trained = compiled and layer.training and torch.is_grad_enabled()
        pool = _pooled_again if trained else average_pool
        return _forward(layer, size, high, low, _blocks(layer, weight, weight.dtype), bias, pool)
    device, dtype = high.device.type, weight.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # the meta device has none
        high, low, bias = _cast(high), _cast(low), _cast(bias)
        dtype = dtype if dtype == torch.float64 else torch.get_autocast_dtype(device)
    return _Paths.apply(layer, size, dtype, high, low, weight, bias)


class _Shared(threading.local):
    maps: dict[tuple[Any, ...], tuple[Tensor, Tensor]] | None = None


_shared = _Shared()


@contextlib.contextmanager
def shared_pooling() -> Iterator[None]:
    """Layers that train in here and read the same map pool it once: the first convolution of a block and its projection.

    The pooled map lives as long as this lasts, so that it is not there when gradients need the memory.
    """
    before, _shared.maps = _shared.maps, {}
    try:
        yield
    finally:
        _shared.maps = before


def _pool_once(x: Tensor, kernel: Kernel) -> Tensor:
    if _shared.maps is None:
        return average_pool(x, kernel)
    key = (id(x), x._version, kernel)
    if key not in _shared.maps:
        _shared.maps[key] = (x, average_pool(x, kernel))  # x stays, or another map could get its id
    return _shared.maps[key][1]


def _cast(x: Any) -> Any:
    """Cast an input of a convolution as autocast does."""
    return x if x is None or x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))


def _pooled_again(x: Tensor, kernel: Kernel) -> Tensor:
    """`average_pool` for a compiler, which would keep the pooled map."""
    return checkpoint(average_pool, x, kernel, use_reentrant=False, preserve_rng_state=False)


def _blocks(layer: _OctConv, weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the block of each path: a view, or in another dtype a dense copy, which a convolution needs not copy again."""
    return [path.block(weight).to(dtype) for path in layer._paths]


def _forward(
    layer: _OctConv,
    size: Sequence[int],
    high: Tensor,
    low: Tensor | None,
    blocks: Sequence[Tensor],
    bias: Tensor | None,
    pool: Callable[..., Tensor] = average_pool,
) -> tuple[Tensor | None, Tensor | None]:
    maps: dict[Place, Any] = {("high", ()): high, ("low", ()): low}
    y_high = y_low = None
    for path, block in zip(layer._paths, blocks, strict=True):
        path_bias = bias[path.rows] if bias is not None and path.biased else None
        y = layer._convolve(_pooled(maps, path.place, pool), block, path_bias)
        # Slices, because the views of `split` refuse an operation in place after this layer.
        if path.high:
            part = y[:, : path.high] if path.high < y.shape[1] else y
            y_high = upsample(part, size) if y_high is None else add_upsampled(y_high, part)
        if path.high < y.shape[1]:
            part = y[:, path.high :] if path.high else y
            y_low = part if y_low is None else _sum(y_low, part)
    return y_high, y_low


def _sum(y: Tensor, other: Tensor) -> Tensor:
    """Return y + other, in the memory of y unless autograd records operators."""
    return y + other if torch.is_grad_enabled() else y.add_(other)


def _pooled(maps: dict[Place, Any], place: Place, pool: Callable[..., Tensor]) -> Tensor:
    """The map at `place`, computed once."""
    name, kernels = place
    if place not in maps:
        maps[place] = pool(_pooled(maps, (name, kernels[:-1]), pool), kernels[-1])
    return maps[place]


class _Paths(torch.autograd.Function):
    """`_forward`. Its backward pass is made of operators that have gradients, so that second ones exist as well.

    dtype: of the computation. Under autocast the weight has another one; then its blocks are cast one by one and kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layer: _OctConv,
        size: Sequence[int],
        dtype: torch.dtype,
        high: Tensor,
        low: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        blocks = _blocks(layer, weight, dtype)
        ctx.layer, ctx.dtype = layer, dtype
        ctx.save_for_backward(high, low, weight, *(blocks if dtype != weight.dtype else ()))
        outputs = _forward(layer, size, high, low, blocks, bias, _pool_once)
        # A step of autograd must not return views either: operations in place on them raise.
        return tuple(y.clone() if y is not None and y._is_view() else y for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        layer: _OctConv = ctx.layer
        high, low, weight, *blocks = ctx.saved_tensors
        if not blocks or torch.is_grad_enabled():  # second derivatives must lead to the weight
            blocks = _blocks(layer, weight, ctx.dtype)
        _, _, _, *maps_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad
        wanted = dict(zip(("high", "low"), maps_wanted, strict=True))
        maps: dict[Place, Any] = {("high", ()): high, ("low", ()): low}
        grad_maps: dict[Place, Tensor] = {}
        grad_weight = torch.empty_like(weight) if weight_wanted else None
        grad_bias = high.new_empty(layer.out_channels) if bias_wanted else None
        for path, block in zip(layer._paths, blocks, strict=True):
            needs = [wanted[path.place[0]], weight_wanted, bias_wanted and path.biased]
            if not any(needs):
                continue
            x = _pooled(maps, path.place, average_pool)
            grad = _gradient_of_output(path, len(block), *grads)
            grad_x, grad_block, path_bias = layer._convolution_gradients(grad, x, block, needs)
            if grad_block is not None and grad_weight is not None:
                path.block(grad_weight).copy_(grad_block)
            if path_bias is not None and grad_bias is not None:
                grad_bias[path.rows] = path_bias
            if grad_x is not None:
                before = grad_maps.get(path.place)
                grad_maps[path.place] = grad_x if before is None else before.add_(grad_x)
        return None, None, None, *_gradients_of_inputs(maps, grad_maps), grad_weight, grad_bias


def _gradient_of_output(path: Path, outputs: int, grad_high: Any, grad_low: Any) -> Tensor:
    if not path.high:
        return grad_low
    grad_high = upsampling_gradient(grad_high, path.grow)
    return grad_high if path.high == outputs else torch.cat([grad_high, grad_low], dim=1)


def _gradients_of_inputs(maps: dict[Place, Any], grads: dict[Place, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """From those of the maps that the paths read, the most pooled first."""
    for depth in (2, 1):
        for name, kernels in [place for place in grads if len(place[1]) == depth]:
            before = (name, kernels[:-1])
            own, size = grads.pop((name, kernels)), maps[before].shape[2:]
            grads[before] = pooling_gradient(own, size, kernels[-1], grads.get(before))
    return grads.get(("high", ())), grads.get(("low", ()))
