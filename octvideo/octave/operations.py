"""What the steps of a traced network are to two frequencies, and the functions that a rewritten graph calls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from octvideo.octave import channels_last
from octvideo.octave.feature import Octave, Parts, average_pool, low_size, upsample
from octvideo.octave.layers import SqueezeExcite, _OctMaxPool
from octvideo.octave.trace import STOCHASTIC_DEPTH

# What a node does to a map. All that is not listed is OTHER.
CONV, NORM, POOL, GLOBAL, CAT = "convolution", "norm", "pooling", "global pooling", "concatenation"
LINEAR, LAYER_NORM, RELAYOUT = "linear", "layer norm", "channels-last"
ELEMENTWISE, DEPTH, EXCITE, SHAPE, OTHER = "elementwise", "stochastic depth", "squeeze-excitation", "shape", "other"
WINDOWS = ("max_pool2d", "max_pool3d", "avg_pool2d", "avg_pool3d")
WINDOW_MODULES: dict[type[nn.Module], str] = {
    nn.MaxPool2d: "max_pool2d",
    nn.MaxPool3d: "max_pool3d",
    nn.AvgPool2d: "avg_pool2d",
    nn.AvgPool3d: "avg_pool3d",
}
WINDOW_ARGUMENTS = {
    "max": ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    "avg": ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
}
ADAPTIVE = ("adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d")
ADAPTIVE_MODULES = (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.RReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)
DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
# Functions, operators and methods by name; a trailing underscore (in place) counts as none.
ELEMENTWISE_NAMES = {
    *("relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu", "selu", "celu"),
    *("softplus", "softsign", "mish", "sigmoid", "logsigmoid", "tanh", "abs", "neg", "exp", "log", "sqrt", "rsqrt"),
    *("square", "pow", "clamp", "clip", "dropout", "dropout2d", "dropout3d", "alpha_dropout"),
    *("add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv", "div", "multiply", "subtract", "divide"),
    *("maximum", "minimum", "contiguous", "clone", "detach", "float", "half", "bfloat16", "double"),
}
SHAPE_NAMES = {"shape", "size", "ndim", "dim", "dtype", "device", "is_cuda", "requires_grad"}


def mark_channels_last(graph: fx.Graph, root: nn.Module) -> None:
    """To be done before any other question is asked of the graph."""
    channels_last.mark(graph, root, LINEAR, LAYER_NORM, RELAYOUT, lambda node: kind_of(node, root) == ELEMENTWISE)


def kind_of(node: fx.Node, root: nn.Module) -> str:
    if "kind" in node.meta:
        return node.meta["kind"]
    if node.op in ("call_function", "call_method"):
        return _kind_of_function(node)
    if node.op != "call_module" or node.meta["opaque"]:
        return OTHER
    module = root.get_submodule(str(node.target))
    if isinstance(module, _ConvNd):
        return CONV
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return NORM
    if isinstance(module, (*ACTIVATIONS, *DROPOUTS)) or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
        return ELEMENTWISE
    if type(module).__name__ in STOCHASTIC_DEPTH:
        return DEPTH
    if isinstance(module, SqueezeExcite):
        return EXCITE
    if isinstance(module, _OctMaxPool) or type(module) in WINDOW_MODULES:
        return POOL
    if isinstance(module, ADAPTIVE_MODULES) and _all_one(node):
        return GLOBAL
    return OTHER


def _kind_of_function(node: fx.Node) -> str:
    name = name_of(node)
    if name in ELEMENTWISE_NAMES:
        return ELEMENTWISE
    if name in ("cat", "concat"):
        return CAT
    if name in WINDOWS:
        return POOL
    pooled = name in ("mean", "amax", *ADAPTIVE) and is_map(next(iter(node.all_input_nodes), None))
    if pooled and _all_one(node):
        return GLOBAL
    if name in SHAPE_NAMES or (name == "getattr" and node.args[1] in SHAPE_NAMES):
        return SHAPE
    return OTHER


def name_of(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.rstrip("_") if node.op != "call_module" else str(name)


def _all_one(node: fx.Node) -> bool:
    """Is all of space and time pooled and no more: [N, C, ...] -> [N, C] or [N, C, 1, ...]?"""
    value, x = node.meta["value"], node.all_input_nodes[0].meta["value"]
    if not isinstance(value, Tensor) or tuple(value.shape[:2]) != tuple(x.shape[:2]):
        return False
    return value.dim() == 2 or (value.dim() == x.dim() and math.prod(value.shape[2:]) == 1)


def is_map(node: Any) -> bool:
    """A feature map: [N, C, H, W] or [N, C, T, H, W] of more than one position in space."""
    value = node.meta.get("value") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() in (4, 5) and math.prod(value.shape[-2:]) > 1


def is_depthwise(layer: _ConvNd) -> bool:
    return layer.groups == layer.in_channels > 1


# --- What the rewritten graph calls; all take and give channels in the order of `parts`, see feature.channel_order. ---


def merge(high: Tensor, low: Tensor, parts: Parts) -> Tensor:
    """Two frequencies -> one map [N, C, ...] in the vanilla channel order, low upsampled."""
    return restore_order(high, upsample(low, high.shape[2:]), parts)


def split(x: Tensor, parts: Parts, pool: Sequence[int]) -> Octave:
    """One map [N, C, ...] -> two frequencies: of each part the last channels, pooled, become low. The dual of `merge`."""
    high, low = split_vector(x, parts)
    return Octave(high, average_pool(low, pool))


def restore_order(high: Tensor, low: Tensor, parts: Parts) -> Tensor:
    """[N, C_high, ...], [N, C_low, ...] -> [N, C, ...], part by part; sizes agree."""
    if len(parts) == 1:
        return torch.cat([high, low], dim=1)
    highs, lows = high.split([h for h, _ in parts], dim=1), low.split([c for _, c in parts], dim=1)
    return torch.cat([x for pair in zip(highs, lows, strict=True) for x in pair], dim=1)


def split_vector(x: Tensor, parts: Parts) -> Octave:
    """[N, C, ...] in the vanilla order -> [N, C_high, ...] and [N, C_low, ...] of the same size (a gate, a mask)."""
    if len(parts) == 1:
        ((high, low),) = parts
        return Octave(x.narrow(1, 0, high), x.narrow(1, high, low))  # split's views refuse operations in place
    pieces = x.split([channels for part in parts for channels in part], dim=1)
    return Octave(torch.cat(pieces[::2], dim=1), torch.cat(pieces[1::2], dim=1))


def pool_windows(high: Tensor, low: Tensor, name: str, pool: Sequence[int], options: Mapping[str, Any]) -> Octave:
    """torch.nn.functional's max_pool2d, ... of each frequency; low is cropped to the size that belongs to high's."""

    def pooled(x: Tensor, **more: Any) -> Tensor:
        if x.shape[1]:
            return getattr(F, name)(x, **{**options, **more})
        return pooled(x.new_zeros(x.shape[0], 1, *x.shape[2:]), **more)[:, :0]  # torch pools no map without channels

    y_high = pooled(high)
    # As in OctMaxPool: in ceil_mode a short low map still has a window to give where floor would leave none.
    y_low = pooled(low, ceil_mode=True)
    size = low_size(y_high.shape[2:], pool)
    if any(have < need for have, need in zip(y_low.shape[2:], size, strict=True)):
        raise ValueError(
            f"{name} with {dict(options)} leaves {tuple(y_high.shape[2:])} of high and {tuple(y_low.shape[2:])} of low, "
            "which do not belong together"
        )
    for axis, length in enumerate(size, start=2):
        y_low = y_low.narrow(axis, 0, length)
    return Octave(y_high, y_low)


def ones_per_sample(x: Tensor) -> Tensor:
    """[N, 1, ..., 1], for stochastic depth to keep or drop both frequencies of a sample together."""
    return x.new_ones(x.shape[0], *(1,) * (x.dim() - 1))


def vanilla_size(high: Tensor, low: Tensor) -> torch.Size:
    """The size that the map has in the vanilla network."""
    return torch.Size((high.shape[0], high.shape[1] + low.shape[1], *high.shape[2:]))
