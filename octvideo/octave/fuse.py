"""The inference form of a network: norms inside the kernels, as few passes over the large maps as the paths allow.

`fuse` follows a network at the level of its features: octave layers and torch's own are single steps, whatever module
called them, and a feature is one value whether it has one frequency or two. Norms behind a convolution then go into its
kernel and bias, the sum with a shortcut and the activation into the layer; the rest stays as it is. So any network made
of these layers can be fused, not only those that this package knows.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from octvideo.octave import kernels
from octvideo.octave.attention import GlobalReasoning, NonLocal
from octvideo.octave.conv import _OctConv
from octvideo.octave.feature import (
    Feature,
    Octave,
    concatenate,
    global_average_pool,
    lift,
)
from octvideo.octave.layers import SqueezeExcite, _OctBatchNorm, _OctMaxPool
from octvideo.octave.onednn import dilation_for_onednn
from octvideo.octave.resample import add_upsampled, average_pool, sum_in_one_pass, upsample

MACS_PER_FLOAT = 20
"""Multiply-adds in the time in which a core moves one float of a large map: 100 G/s beside 20 GB/s. An estimate, which
chooses between arrangements of the same outputs (docs/performance.md)."""


def fuse(model: nn.Module) -> FusedNetwork:
    """A copy of `model` for inference alone, with the same outputs up to rounding.

    Its parameters are copies too, of other shapes and without gradients: no checkpoint goes in or out. `model` may be
    vanilla or octave and is left untouched. The result exports and compiles as `model` does.
    Raises what torch.fx raises where a module's forward branches on its input; such a module must be one of torch's or
    of this package.
    """
    return _Builder(copy.deepcopy(model).eval()).build()


class Inference(nn.Module):
    """A layer whose norm is in its kernel already: it cannot train."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def train(self, mode: bool = True) -> Inference:
        if mode:
            raise RuntimeError(f"{type(self).__name__} is an inference form; train the network that fuse() was given")
        return super().train(False)


class FusedNetwork(fx.GraphModule):
    """What `fuse` returns."""

    def train(self, mode: bool = True) -> FusedNetwork:
        if mode:
            raise RuntimeError("a fused network cannot train: its norms are gone; train the one that fuse() was given")
        return super().train(False)


class FusedConv(Inference):
    """activation(conv(x) + shortcut) of a plain convolution, or of an octave one as it is."""

    def __init__(self, conv: _ConvNd, activation: nn.Module | None) -> None:
        super().__init__()
        self.conv, self.activation = conv.requires_grad_(False), activation
        self.pool, self.stride = (1,) * len(conv.stride), conv.stride
        one_frequency = True
        if isinstance(conv, _OctConv):
            # in octave networks the convolutions over one frequency stride by pooling, too
            self.pool, self.stride = conv._pooled, conv._step
            one_frequency = not (conv.in_low or conv.out_low)
        self.padding = conv.padding if one_frequency and conv.padding_mode == "zeros" else "its own"

    def forward(self, x: Feature, shortcut: Feature | None = None) -> Feature:
        conv, padding = self.conv, self.padding
        y: Feature
        if isinstance(padding, str):
            y = conv(x)
        else:
            assert isinstance(x, Tensor)
            x = average_pool(x, self.pool, fused=True)
            y = _convolve(x, conv.weight, conv.bias, self.stride, padding, conv.dilation, conv.groups)
        return _finish(y, shortcut, self.activation)


class FusedOctConv(Inference):
    """activation(conv(x) + shortcut) of an octave convolution in the arrangement of its paths that costs least.

    With high and low read at the strided resolutions:
    joint: m = [high, upsample(low)]; Y_H = f(m; W_HH, W_LH), Y_L = f(pool(m); W_HL, W_LL). Exact where low needs no
        upsampling, since a stride has halved high, and for kernels of size 1 in the pooled dimensions.
    apart: Y_H = f(high; W_HH) + upsample(f(low; W_LH)), Y_L = f([pool(high), low]; W_HL, W_LL). Always exact.
    late: u = f(high; W_HH, W_HL), v = f(low; W_LH, W_LL); Y_H = u_H + upsample(v_H), Y_L = pool(u_L) + v_L. Exact for
        kernels of size 1 in the pooled dimensions.
    pool_high: kernel of the one pooling of x's high map that it does, or takes from outside as `pooled`; None for none.
    """

    def __init__(self, conv: _OctConv, activation: nn.Module | None, arrangement: str) -> None:
        super().__init__()
        self.arrangement, self.activation = arrangement, activation
        self.in_low, self.splits = conv.in_low, (conv.out_high, conv.out_low)
        self.pool, self.stride, self.low_stride = conv.pool, conv._pooled, conv._low_pooled
        self.pads, self.dilation = conv._pads, conv.dilation
        self.one = (1,) * len(conv.kernel_size)
        self.pool_high = pooling(conv, arrangement)
        weight = conv.weight if conv.in_order is None else conv.weight[:, conv.in_order]
        bias = conv.bias if conv.bias is not None else weight.new_zeros(conv.out_channels)
        to_high, to_low = weight.split(self.splits)
        kernels = {
            "joint": (to_high, to_low, None),
            "apart": (to_high[:, : conv.in_high], to_low, to_high[:, conv.in_high :]),
            "late": (weight[:, : conv.in_high], None, weight[:, conv.in_high :]),
        }[arrangement]
        biases = (bias, None) if arrangement == "late" else bias.split(self.splits)
        self.high_kernel, self.low_kernel, self.up_kernel = (_constant(k) for k in kernels)
        self.high_bias, self.low_bias = (_constant(b) for b in biases)

    def forward(self, x: Feature, shortcut: Feature | None = None, pooled: Tensor | None = None) -> Feature:
        high, low = x if isinstance(x, Octave) else (x, None)
        if pooled is None and self.pool_high is not None:
            pooled = average_pool(high, self.pool_high, fused=True)
        if pooled is not None and self.pool_high == self.stride:
            high, pooled = pooled, None
        y, up = getattr(self, f"_{self.arrangement}")(high, low, pooled)
        if up is None:
            return _finish(y, shortcut, self.activation)
        return _finish_upsampled(y, up, shortcut, self.activation)

    # Each gives its output and the map that is still to be upsampled and added to the high one.

    def _joint(self, high: Tensor, low: Tensor | None, pooled: Tensor | None) -> tuple[Feature, None]:
        if low is not None:
            low = upsample(average_pool(low, self.low_stride, fused=True), high.shape[2:])
            high = _behind(high, low)
        y_high = self._conv(high, self.high_kernel, self.high_bias)
        if not self.splits[1]:
            return y_high, None
        pooled = average_pool(high, self.pool, fused=True) if pooled is None else pooled
        return Octave(y_high, self._conv(pooled, self.low_kernel, self.low_bias)), None

    def _apart(self, high: Tensor, low: Tensor, pooled: Tensor | None) -> tuple[Feature, Tensor]:
        y_high = self._conv(high, self.high_kernel, self.high_bias)
        up = self._conv(average_pool(low, self.low_stride, fused=True), self.up_kernel)
        if not self.splits[1]:
            return y_high, up
        pooled = average_pool(high, self.pool, fused=True) if pooled is None else pooled
        low = _behind(pooled, average_pool(low, self.stride, fused=True))
        return Octave(y_high, self._conv(low, self.low_kernel, self.low_bias)), up

    def _late(self, high: Tensor, low: Tensor | None, pooled: Tensor | None) -> tuple[Feature, Tensor | None]:
        y_high, y_low = self._conv(high, self.high_kernel, self.high_bias).split(self.splits, dim=1)
        y_low = average_pool(y_low, self.pool, fused=True)
        if low is None:
            return Octave(y_high.clone(), y_low), None
        from_high, from_low = self._conv(average_pool(low, self.stride, fused=True), self.up_kernel).split(
            self.splits, dim=1
        )
        return Octave(y_high, y_low + from_low), from_high

    def _conv(self, x: Tensor, kernel: Tensor | None, bias: Tensor | None = None) -> Tensor:
        assert kernel is not None
        return _convolve(x, kernel, bias, self.one, self.pads, self.dilation)

    def extra_repr(self) -> str:
        return f"{self.arrangement}, {self.splits}"


def pooling(conv: _OctConv, arrangement: str) -> tuple[int, ...] | None:
    if any(s > 1 for s in conv._pooled):
        return conv._pooled
    shares = arrangement == "apart" or (arrangement == "joint" and not conv.in_low)
    return conv.pool if shares and conv.out_low else None


def arrangements(conv: _OctConv) -> list[str]:
    """Those that are exact for this layer; none where it goes on as it is."""
    plain = conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    if not plain or not conv.in_high or not conv.out_high or any(s > 1 for s in conv._step):
        return []
    if not conv.in_low and not conv.out_low:
        return []
    axes = list(zip(conv.kernel_size, conv._pooled, conv.pool, strict=True))
    pointwise = all(k == 1 for k, _, p in axes if p > 1)
    grows = conv.in_low and any(s < p for _, s, p in axes)
    found = ["joint"] if not grows or pointwise else []
    if conv.in_low:
        found.append("apart")
    if pointwise and conv.out_low and (not conv.in_low or conv._low_pooled == conv._pooled):
        found.append("late")
    return found


def cost(conv: _OctConv, arrangement: str, pooled: bool, written: bool) -> float:
    """Time per position of the strided high map, in multiply-adds.

    pooled: its pooled high map is there already. written: its input is written by a pass over it in any case, which may
    as well write it behind another map's channels.
    """
    taps, share = math.prod(conv.kernel_size), 1 / math.prod(conv.pool)
    ih, il, oh, ol = conv.in_high, conv.in_low, conv.out_high, conv.out_low
    if arrangement == "joint":
        macs = (ih + il) * oh + share * (ih + il) * ol
        copied = 0 if written or not il else 2 * ih
        moved: float = copied + il + (ih + il if ol and not pooled else 0)
    elif arrangement == "apart":
        macs = ih * oh + share * il * oh + share * (ih + il) * ol
        moved = 2 * oh + (0 if pooled or not ol else ih) + 2 * share * (ih + il)
    else:
        macs = (ih + share * il) * (oh + ol)
        moved = 2 * oh + ol
    return taps * macs + MACS_PER_FLOAT * moved


class FusedNorm(Inference):
    """activation(x * scale + shift) per channel: a norm that stands before its convolution."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: _BatchNorm, activation: nn.Module | None) -> None:
        super().__init__()
        scale, shift = scale_and_shift(norm)
        order = norm.order if isinstance(norm, _OctBatchNorm) else None
        if order is not None:
            scale, shift = scale[order], shift[order]
        self.register_parameter("scale", _constant(scale))
        self.register_parameter("shift", _constant(shift))
        self.activation = activation

    def forward(self, x: Feature) -> Feature:
        if not isinstance(x, Octave):
            return _finish(_affine(x, self.scale, self.shift), None, self.activation)
        channels = (x.high.shape[1], x.low.shape[1])
        parts = zip(x, self.scale.split(channels), self.shift.split(channels), strict=True)
        return _finish(Octave(*(_affine(*part) for part in parts)), None, self.activation)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """[N, C, ...] * [C] + [C]"""
    beside = (...,) + (None,) * (x.dim() - 2)
    return torch.addcmul(shift[beside], x, scale[beside])


class Lifted(nn.Module):
    """A function of tensors on each frequency."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *features: Feature) -> Feature:
        return lift(self.fn, *features)


class _NoNorm(nn.Identity):
    """In the place of a norm that went into the convolution before it."""

    def normalize_high(self, x: Tensor) -> Tensor:
        return x


def pool_high(x: Feature, kernel: tuple[int, ...]) -> Tensor:
    return average_pool(x.high if isinstance(x, Octave) else x, kernel, fused=True)


def _behind(x: Tensor, y: Tensor) -> Tensor:
    """torch.cat([x, y], dim=1), but channels last stays so: of a batch of one, torch.cat may not see that it is."""
    if x.stride(1) == 1 and not torch.compiler.is_compiling():
        return torch.cat([x.movedim(1, -1), y.movedim(1, -1)], dim=-1).movedim(-1, 1)
    return torch.cat([x, y], dim=1)


def _convolve(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
) -> Tensor:
    """F.conv2d or F.conv3d, in eager mode by the paths of torch's that are fast (onednn.py; 2D where 3D is slow)."""
    eager = not torch.compiler.is_compiling()
    if eager and x.device.type == "cpu" and torch.get_num_threads() == 1:
        dilation = dilation_for_onednn(kernel.shape, stride, dilation)
    if x.dim() == 4:
        return F.conv2d(x, kernel, bias, stride, padding, dilation, groups)
    if eager and x.stride(1) == 1:  # channels last: what follows are views
        if kernel.shape[2] == 1 and stride[0] == 1 and padding[0] == 0:
            # [N, C, T, H, W] -> [N*T, C, H, W]
            frames = x.transpose(1, 2).flatten(0, 1)
            y = F.conv2d(frames, kernel.squeeze(2), bias, stride[1:], padding[1:], dilation[1:], groups)
            return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
        if kernel.shape[3:] == (1, 1) and stride[1:] == (1, 1) and padding[1:] == (0, 0):
            # [N, C, T, H, W] -> [N, C, T, H*W]
            geometry = ((stride[0], 1), (padding[0], 0), (dilation[0], 1))
            return F.conv2d(x.flatten(3), kernel.squeeze(4), bias, *geometry, groups).unflatten(3, x.shape[3:])
    return F.conv3d(x, kernel, bias, stride, padding, dilation, groups)


def _finish(y: Feature, shortcut: Feature | None, activation: nn.Module | None) -> Feature:
    """y is the layer's own: sums and activations may take its place."""
    if shortcut is not None:
        y = lift(Tensor.add_, y, shortcut)
    return y if activation is None else lift(activation, y)


def _finish_upsampled(y: Feature, up: Tensor, shortcut: Feature | None, activation: nn.Module | None) -> Feature:
    """Return activation(y + shortcut), with upsample(up) added to y's high map first."""
    high, low = y if isinstance(y, Octave) else (y, None)
    beside_high, beside_low = shortcut if isinstance(shortcut, Octave) else (shortcut, None)
    fits = shortcut is None or isinstance(shortcut, Octave) == isinstance(y, Octave)
    if not fits or not sum_in_one_pass(high, up, beside_high):
        high = add_upsampled(high, up, fused=True)
        return _finish(high if low is None else Octave(high, low), shortcut, activation)
    relu = type(activation) is nn.ReLU
    high = kernels.add_upsampled(high, up, shortcut=beside_high, relu=relu)
    if activation is not None and not relu:
        high = activation(high)
    if low is None:
        return high
    low = low if beside_low is None else low.add_(beside_low)
    return Octave(high, low if activation is None else activation(low))


def _constant(values: Tensor | None) -> nn.Parameter | None:
    return nn.Parameter(values.detach().clone(), requires_grad=False) if values is not None and values.numel() else None


def scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """What a norm does in evaluation: x * scale + shift, [C] each, in the order of its vectors."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            f"{type(norm).__name__} has no running statistics, so it depends on its input in evaluation too"
        )
    scale = (norm.running_var + norm.eps).rsqrt()
    shift = -norm.running_mean * scale
    if norm.affine:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    return scale, shift


@torch.no_grad()
def fold(conv: _ConvNd, norm: _BatchNorm) -> _ConvNd:
    """The convolution that does both: kernels scaled, the shift in the bias."""
    folded = copy.deepcopy(conv)
    scale, shift = scale_and_shift(norm)
    folded.weight = nn.Parameter(conv.weight * scale[(...,) + (None,) * (conv.weight.dim() - 1)])
    folded.bias = nn.Parameter(shift if conv.bias is None else conv.bias * scale + shift)
    return folded


# Following a network ----------------------------------------------------------------------------------------------

CONVS = (nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)
ACTIVATIONS = (nn.ReLU, nn.ReLU6)
SUMS = (torch.add, operator.add)


class _Tracer(fx.Tracer):
    """Octave layers are single steps, and so is what `lift` does: features go through as one value."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=(lift, concatenate, average_pool, global_average_pool))

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        own = (_OctConv, _OctBatchNorm, _OctMaxPool, SqueezeExcite, NonLocal, GlobalReasoning)
        return isinstance(module, own) or super().is_leaf_module(module, name)

    def create_arg(self, a: Any) -> Any:
        return a if callable(a) and not isinstance(a, fx.Proxy | nn.Module | Tensor) else super().create_arg(a)


class _Group:
    """Steps that become one: a convolution or a norm with what follows it."""

    def __init__(self, module: _ConvNd | _BatchNorm, node: fx.Node) -> None:
        assert isinstance(node.args[0], fx.Node)
        self.module, self.tail, self.source = module, node, node.args[0]
        self.name = str(node.target)
        self.shortcut: fx.Node | None = None
        self.activation: nn.Module | None = None

    def open_to(self, node: fx.Node) -> bool:
        """Does nothing but `node` read what the group gives so far?"""
        return list(self.tail.users) == [node] and self.activation is None

    def is_conv(self) -> bool:
        return isinstance(self.module, CONVS) and self.shortcut is None

    def take(self, node: fx.Node) -> _Group:
        self.tail = node
        return self


def _groups(graph: fx.Graph, model: nn.Module) -> dict[fx.Node, _Group]:
    """The group of each step that belongs to one."""
    groups: dict[fx.Node, _Group] = {}
    order = {node: index for index, node in enumerate(graph.nodes)}

    def before(node: fx.Node, source: Any) -> _Group | None:
        group = groups.get(source) if isinstance(source, fx.Node) else None
        return group if group and group.tail is source and group.open_to(node) else None

    for node in graph.nodes:
        module = _module(node, model)
        operands = _sum(node)
        if isinstance(module, CONVS):
            groups[node] = _Group(module, node)
        elif isinstance(module, NORMS):
            group = before(node, node.args[0])
            if group and isinstance(group.module, _ConvNd) and group.shortcut is None:
                group.module = fold(group.module, module)
                groups[node] = group.take(node)
            else:
                groups[node] = _Group(module, node)
        elif isinstance(module, ACTIVATIONS):
            if group := before(node, node.args[-1]):
                group.activation = module
                groups[node] = group.take(node)
        elif operands is not None and operands[0] is not operands[1]:
            able = [n for n in operands if (group := before(node, n)) and group.is_conv()]
            if able:
                own = max(able, key=order.__getitem__)  # the other operand is there when it runs
                groups[own].shortcut = operands[1] if own is operands[0] else operands[0]
                groups[node] = groups[own].take(node)
    return groups


def _module(node: fx.Node, model: nn.Module) -> nn.Module | None:
    """The module that a step calls, or lifts."""
    if node.op == "call_module":
        return model.get_submodule(str(node.target))
    if node.op == "call_function" and node.target is lift and isinstance(node.args[0], fx.Node):
        return model.get_submodule(str(node.args[0].target))
    return None


def _sum(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    args = node.args
    if node.op == "call_function" and node.target is lift and args[0] in SUMS:
        args = args[1:]
    elif node.op != "call_function" or node.target not in SUMS:
        return None
    return args if len(args) == 2 and all(isinstance(a, fx.Node) for a in args) else None  # type: ignore[return-value]


class _Builder:
    """Writes the fused network, step by step behind the traced one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.traced = _Tracer().trace(model)
        self.groups = _groups(self.traced, model)
        self.graph = fx.Graph()
        self.parts: dict[str, Any] = {}  # modules and constants by name
        self.new: dict[fx.Node, fx.Node] = {}  # what stands for each traced step
        self.written: set[fx.Node] = set()  # new steps that end in a pass over the high map
        self.pools: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}

    @torch.no_grad()
    def build(self) -> FusedNetwork:
        for node in self.traced.nodes:
            group = self.groups.get(node)
            if group is not None:
                if node is group.tail:
                    self.new[node] = self._layer(group)
            elif node.op == "call_function" and node.target is lift:
                fn: Any = _module(node, self.model) or node.args[0]
                self.new[node] = self._call(f"lifted.{node.name}", Lifted(fn), *(self.new[a] for a in node.args[1:]))
            elif node.op == "call_module":
                module = self.model.get_submodule(str(node.target))
                if isinstance(module, nn.Dropout | nn.Identity):
                    self.new[node] = self.new[node.args[0]]
                    continue
                if isinstance(module, NonLocal | GlobalReasoning) and isinstance(module.bn, _BatchNorm):
                    setattr(module, "out", fold(module.out, module.bn))  # noqa: B010 (of the same type)
                    setattr(module, "bn", _NoNorm())  # noqa: B010
                self.parts[str(node.target)] = module.requires_grad_(False)
                self.new[node] = self.graph.node_copy(node, self.new.__getitem__)
            elif node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(self.model)
                if isinstance(value, Tensor):
                    self.parts[str(node.target)] = value.detach()
                    self.new[node] = self.graph.get_attr(str(node.target))
            else:
                self.new[node] = self.graph.node_copy(node, self.new.__getitem__)
        return FusedNetwork(self.parts, self.graph).train(False)

    def _call(self, name: str, module: nn.Module, *args: fx.Node | None) -> fx.Node:
        while name in self.parts:  # called before
            name += "_"
        self.parts[name] = module.requires_grad_(False)
        return self.graph.create_node("call_module", name, args)

    def _layer(self, group: _Group) -> fx.Node:
        x, module = self.new[group.source], group.module
        shortcut = group.shortcut and self.new[group.shortcut]
        if isinstance(module, _BatchNorm):
            layer = self._call(group.name, FusedNorm(module, group.activation), x)
            self.written.add(layer)
            return layer
        arrangement = self._arrangement(module, x) if isinstance(module, _OctConv) else None
        if arrangement is None or not isinstance(module, _OctConv):
            return self._call(group.name, FusedConv(module, group.activation), x, shortcut)
        fused = FusedOctConv(module, group.activation, arrangement)
        layer = self._call(group.name, fused, x, shortcut, self._pooled(x, fused.pool_high))
        if arrangement != "joint":
            self.written.add(layer)
        return layer

    def _arrangement(self, conv: _OctConv, x: fx.Node) -> str | None:
        """The cheapest."""

        def cost_here(arrangement: str) -> float:
            return cost(conv, arrangement, (x, pooling(conv, arrangement)) in self.pools, x in self.written)

        return min(arrangements(conv), key=cost_here, default=None)

    def _pooled(self, x: fx.Node, kernel: tuple[int, ...] | None) -> fx.Node | None:
        """One pooling for all that read it."""
        if kernel is None:
            return None
        if (x, kernel) not in self.pools:
            self.pools[x, kernel] = self.graph.call_function(pool_high, (x, kernel))
        return self.pools[x, kernel]
