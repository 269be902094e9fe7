"""A traced network rewritten for two frequencies: each value becomes one node (plain) or two (high, low).

Elementwise operations and concatenations are done per frequency, convolutions and norms become octave ones in place.
Whatever else reads a two-frequency map gets it merged, in the vanilla channel order, and the rewriter notes why.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from octvideo.octave import channels_last
from octvideo.octave.conv import OctConv2d, OctConv3d
from octvideo.octave.feature import Octave, Parts, low_size, split_channels
from octvideo.octave.layers import OctBatchNorm2d, OctBatchNorm3d, _OctBatchNorm, _OctMaxPool
from octvideo.octave.operations import (
    ACTIVATIONS,
    CAT,
    CONV,
    DEPTH,
    DROPOUTS,
    ELEMENTWISE,
    EXCITE,
    GLOBAL,
    LAYER_NORM,
    LINEAR,
    NORM,
    OTHER,
    POOL,
    RELAYOUT,
    SHAPE,
    WINDOW_ARGUMENTS,
    WINDOW_MODULES,
    is_depthwise,
    is_map,
    kind_of,
    merge,
    name_of,
    ones_per_sample,
    pool_windows,
    restore_order,
    split,
    split_vector,
    vanilla_size,
)
from octvideo.octave.trace import norm_with_activation

OCTAVE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: OctConv2d,
    nn.Conv3d: OctConv3d,
    nn.BatchNorm2d: OctBatchNorm2d,
    nn.BatchNorm3d: OctBatchNorm3d,
    nn.Linear: channels_last.OctLinear,
}


@dataclass(frozen=True)
class Two:
    """A two-frequency value in the new graph. pool: the factor between the frequencies."""

    high: fx.Node
    low: fx.Node
    parts: Parts
    pool: tuple[int, ...]


@dataclass(frozen=True)
class Note:
    """A merge, a split or a convolution that stays vanilla: of what, where in the source, and why."""

    what: str
    name: str
    line: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.name}: {self.why} ({self.line})"


@dataclass(frozen=True)
class Row:
    """A convolution: alpha and multiply-adds per sample. size: (T,) H, W of its vanilla output."""

    name: str
    size: tuple[int, ...]
    alpha_in: float
    alpha_out: float
    macs_before: int
    macs_after: int
    strides_by_pooling: bool


class Rewriter:
    """Rewrites `graph` node by node. root's layers are made octave in place: hooks, names and weights stay."""

    def __init__(
        self, graph: fx.Graph, root: nn.Module, alphas: Mapping[fx.Node, float], pool: Sequence[int], pool_stride: bool
    ) -> None:
        self.graph, self.root, self.alphas, self.pool, self.pool_stride = graph, root, alphas, tuple(pool), pool_stride
        self.new = fx.Graph()
        self.new._codegen = graph._codegen  # knows a structured input
        self.env: dict[fx.Node, fx.Node | Two] = {}
        self.behind: set[fx.Node] = set()  # nodes behind the first octave layer
        self.calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        self.rows: list[Row] = []
        self.notes: list[Note] = []

    def run(self) -> fx.Graph:
        steps: dict[str, Callable[[fx.Node], fx.Node | Two]] = {
            CONV: self.convolution,
            NORM: self.norm,
            ELEMENTWISE: self.elementwise,
            DEPTH: self.stochastic_depth,
            EXCITE: self.squeeze_excitation,
            POOL: self.windows,
            GLOBAL: self.global_pool,
            CAT: self.concatenation,
            SHAPE: self.shape,
            LINEAR: self.linear,
            LAYER_NORM: self.layer_norm,
            RELAYOUT: self.relayout,
        }
        for node in self.graph.nodes:
            kind = kind_of(node, self.root)
            if kind == OTHER and name_of(node) in ("conv2d", "conv3d"):
                self.note("vanilla", node, "its weight is computed in forward")
            lifted = kind in (CONV, NORM, LINEAR) or any(isinstance(self.env[n], Two) for n in node.all_input_nodes)
            self.env[node] = steps[kind](node) if lifted and kind in steps else self.plain(node)
            if isinstance(self.env[node], Two) or any(n in self.behind for n in node.all_input_nodes):
                self.behind.add(node)
        for node in self.new.nodes:
            node.type, node.meta = None, {}  # annotations of the source may be mere text; meta has served
        self.new.lint()
        return self.new

    # --- plain nodes, and the ways from one frequency to two and back ---

    def plain(self, node: fx.Node, why: str = "it cannot carry two frequencies") -> fx.Node:
        return self.new.node_copy(node, lambda n: self.one(n, node, why))

    def one(self, n: fx.Node, reader: fx.Node, why: str) -> fx.Node:
        """n as one frequency, merged if need be."""
        x = self.env[n]
        if not isinstance(x, Two):
            return x
        self.note("merge", reader, why)
        # Not kept for the next reader: an operation in place may come between the two.
        merged = self.new.call_function(merge, (x.high, x.low, x.parts))
        return self._permuted(merged, channels_last.to_last(len(x.pool) + 2)) if n.meta.get("last") else merged

    def _permuted(self, x: fx.Node, dims: tuple[int, ...]) -> fx.Node:
        return self.new.call_function(torch.permute, (x, dims))

    def two(self, n: fx.Node, like: Two, reader: fx.Node) -> Two:
        """n as two frequencies of `like`'s parts."""
        x = self.env[n]
        if isinstance(x, Two):
            return x
        self.note("split", reader, "one operand has one frequency, the other has two")
        return self._pair(self.new.call_function(split, (x, like.parts, like.pool)), like.parts, like.pool)

    def _pair(self, octave: fx.Node, parts: Parts, pool: tuple[int, ...]) -> Two:
        high, low = (self.new.call_function(operator.getitem, (octave, i)) for i in (0, 1))
        return Two(high, low, parts, pool)

    def _octave(self, x: Two) -> fx.Node:
        return self.new.call_function(Octave, (x.high, x.low))

    def _call(self, node: fx.Node, x: fx.Node) -> fx.Node:
        return self.new.call_module(str(node.target), (x,))

    def note(self, what: str, node: fx.Node, why: str) -> None:
        name = str(node.target) if node.op == "call_module" else name_of(node)
        inside = node.meta.get("module")
        name = f"{name} in {inside}" if inside and node.op != "call_module" else name
        note = Note(what, name, node.meta.get("line", ""), why)
        if note not in self.notes:
            self.notes.append(note)

    # --- layers with weights ---

    def convolution(self, node: fx.Node) -> fx.Node | Two:
        layer, source = self.root.get_submodule(str(node.target)), node.all_input_nodes[0]
        assert isinstance(layer, _ConvNd)
        x, value = self.env[source], source.meta["value"]
        parts = x.parts if isinstance(x, Two) else ((layer.in_channels, 0),)
        alpha_in = sum(low for _, low in parts) / layer.in_channels
        alpha_out = alpha_in if is_depthwise(layer) else self.alphas.get(node, 0.0)
        out = split_channels(layer.out_channels, alpha_out)
        strides = any(s > 1 for s in layer.stride) and self.pool_stride and source in self.behind
        if not isinstance(x, Two) and not out[1] and not strides:
            self._row(node, layer, 0.0, 0.0, None, False)
            return self.plain(node)
        pool = x.pool if isinstance(x, Two) else self._pool(value)
        try:
            settings, macs = self._fit(node, layer, parts, alpha_out, pool)
        except ValueError as error:
            self._row(node, layer, 0.0, 0.0, None, False)
            if isinstance(x, Two) or out[1]:
                self.note("vanilla", node, str(error))
            return self.plain(node, str(error))
        _become_octave(layer, **settings)
        by_pooling = settings["pool_stride"] and any(s > 1 for s in layer.stride)
        self._row(node, layer, alpha_in, out[1] / layer.out_channels, macs, by_pooling)
        y = self._call(node, self._octave(x) if isinstance(x, Two) else x)
        return self._pair(y, (out,), pool) if out[1] else y

    def _pool(self, value: Tensor) -> tuple[int, ...]:
        return self.pool[2 - value.dim() :]

    def _fit(
        self, node: fx.Node, layer: _ConvNd, parts: Parts, alpha_out: float, pool: tuple[int, ...]
    ) -> tuple[dict[str, Any], int]:
        """The settings with which the octave layer gives a map of the vanilla size, and its multiply-adds.

        Raises ValueError, with the reason, where there are none.
        """
        if self.calls[node.target] > 1:
            raise ValueError(f"it is called {self.calls[node.target]} times")
        if _base(layer) not in OCTAVE or "weight" not in layer._parameters:
            raise ValueError(f"{type(layer).__name__} is no nn.Conv2d or nn.Conv3d with a weight of its own")
        pooling = self.pool_stride and all(s in (1, 2) for s in layer.stride)
        reason: ValueError | None = None
        for pool_stride in (True, False) if pooling else (False,):
            settings = {
                "alpha_in": 0.0, "alpha_out": alpha_out, "in_parts": parts, "pool": pool, "pool_stride": pool_stride
            }  # fmt: skip
            try:
                return settings, _tried(layer, settings, node)
            except (ValueError, RuntimeError) as error:  # ours; torch's, say of reflected padding wider than a low map
                reason = reason or ValueError(str(error).splitlines()[0])
        assert reason is not None
        raise reason

    def _row(
        self, node: fx.Node, layer: _ConvNd, alpha_in: float, alpha_out: float, macs: int | None, by_pooling: bool
    ) -> None:
        value = node.meta["value"]
        before = value[0].numel() * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        after = before if macs is None else macs
        self.rows.append(Row(str(node.target), tuple(value.shape[2:]), alpha_in, alpha_out, before, after, by_pooling))

    def norm(self, node: fx.Node) -> fx.Node | Two:
        norm: Any = self.root.get_submodule(str(node.target))
        x = self.env[node.all_input_nodes[0]]
        why = self._norm_stays(node, norm)
        if not isinstance(x, Two):
            if why is None and type(norm) in OCTAVE:  # the same numbers, and octvideo's way to synchronize
                _become_octave(norm, alpha=0.0, parts=None)
            return self.plain(node)
        if why is not None:
            return self.plain(node, why)
        behind = [name for name in ("drop", "act") if norm_with_activation(norm)]
        _become_octave(norm, alpha=0.0, parts=x.parts)
        y = self._pair(self._call(node, self._octave(x)), x.parts, x.pool)
        for child in behind:
            if not isinstance(getattr(norm, child), nn.Identity):
                high, low = (self.new.call_module(f"{node.target}.{child}", (half,)) for half in (y.high, y.low))
                y = Two(high, low, x.parts, x.pool)
        return y

    def _norm_stays(self, node: fx.Node, norm: Any) -> str | None:
        """Why a norm cannot become an octave one, if it cannot."""
        if self.calls[node.target] > 1:
            return f"it is called {self.calls[node.target]} times"
        name = type(norm).__name__
        if norm_with_activation(norm):
            allowed = (nn.Identity, *ACTIVATIONS, *DROPOUTS)
            others = [type(m).__name__ for m in (norm.drop, norm.act) if not isinstance(m, allowed)]
            return f"{name} with {others[0]} cannot carry two frequencies" if others else None
        known = isinstance(norm, _OctBatchNorm) or type(norm) in OCTAVE
        return None if known else f"{name} cannot carry two frequencies"

    def linear(self, node: fx.Node) -> fx.Node | Two:
        """A linear layer over channels-last maps, which two frequencies pass channels-first."""
        layer: Any = self.root.get_submodule(str(node.target))
        source, value = node.all_input_nodes[0], node.meta["value"]
        x, dims = self.env[source], value.dim()
        parts = x.parts if isinstance(x, Two) else ((layer.in_features, 0),)
        out = split_channels(layer.out_features, self.alphas.get(node, 0.0))
        positions = math.prod(value.shape[2:])
        before = positions * layer.in_features * layer.out_features
        size = tuple(value.shape[2:])
        if (not isinstance(x, Two) and not out[1]) or self.calls[node.target] > 1:
            self.rows.append(Row(str(node.target), size, 0.0, 0.0, before, before, False))
            return self.plain(node, f"it is called {self.calls[node.target]} times")
        pool = x.pool if isinstance(x, Two) else self._pool(value)
        _become_octave(layer, alpha_out=out[1] / layer.out_features, in_parts=parts, pool=pool)
        after = layer.macs(positions, math.prod(low_size(size, pool)))
        alpha_in = sum(low for _, low in parts) / layer.in_features
        self.rows.append(Row(str(node.target), size, alpha_in, out[1] / layer.out_features, before, after, False))
        y = self._call(node, self._octave(x) if isinstance(x, Two) else self._permuted(x, channels_last.to_first(dims)))
        return self._pair(y, (out,), pool) if out[1] else self._permuted(y, channels_last.to_last(dims))

    def layer_norm(self, node: fx.Node) -> Two:
        """Over all channels of a position: the merged map is normalized, and split again."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        x, dims = self.env[source], source.meta["value"].dim()
        assert isinstance(x, Two)
        y = self.plain(node, "a layer norm reads all channels of a position; its output is split again")
        y = self._permuted(y, channels_last.to_first(dims))
        return self._pair(self.new.call_function(split, (y, x.parts, x.pool)), x.parts, x.pool)

    # --- layers without ---

    def relayout(self, node: fx.Node) -> Two:
        """Two frequencies stay channels-first."""
        x = self.env[node.all_input_nodes[0]]
        assert isinstance(x, Two)
        return x

    def elementwise(self, node: fx.Node) -> fx.Node | Two:
        twos = [x for n in node.all_input_nodes if isinstance(x := self.env[n], Two)]
        first = twos[0]
        if any(x.parts != first.parts or x.pool != first.pool for x in twos):
            return self.plain(node, f"it joins different splits: {' and '.join(str(x.parts) for x in twos)}")
        halves: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        for n in node.all_input_nodes:
            both = self._operand(n, first, node)
            if both is None:
                return self.plain(node, f"an operand of shape {tuple(n.meta['value'].shape)} differs between positions")
            halves[n] = both
        high, low = (self.new.node_copy(node, {n: both[i] for n, both in halves.items()}.__getitem__) for i in (0, 1))
        return Two(high, low, first.parts, first.pool)

    def _operand(self, n: fx.Node, like: Two, reader: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """n for the high map and for the low one; None where it cannot be had for both."""
        x, value = self.env[n], n.meta["value"]
        if isinstance(x, Two):
            return x.high, x.low
        if not isinstance(value, Tensor) or value.dim() == 0:
            return x, x
        dims, channels = len(like.pool) + 2, sum(map(sum, like.parts))
        shape = (1,) * (dims - value.dim()) + tuple(value.shape)
        if math.prod(shape[2:]) == 1:
            if shape[1] == 1:
                return x, x  # a number per sample
            if shape[1] == channels:  # one per channel: a squeeze-excitation's gate, a layer's scale
                if value.dim() < dims:
                    x = self.new.call_function(torch.reshape, (x, shape))
                gate = self._pair(self.new.call_function(split_vector, (x, like.parts)), like.parts, like.pool)
                return gate.high, gate.low
        if shape[1] == channels and is_map(n):
            pair = self.two(n, like, reader)
            return pair.high, pair.low
        return None

    def stochastic_depth(self, node: fx.Node) -> Two:
        x = self.env[node.all_input_nodes[0]]
        assert isinstance(x, Two)
        mask = self._call(node, self.new.call_function(ones_per_sample, (x.high,)))
        high, low = (self.new.call_function(torch.mul, (half, mask)) for half in (x.high, x.low))
        return Two(high, low, x.parts, x.pool)

    def squeeze_excitation(self, node: fx.Node) -> fx.Node | Two:
        """octvideo's own layer, whose linear layers know one order of channels."""
        x = self.env[node.all_input_nodes[0]]
        assert isinstance(x, Two)
        if len(x.parts) > 1:
            return self.plain(node, "it reads a concatenation")
        return self._pair(self._call(node, self._octave(x)), x.parts, x.pool)

    def windows(self, node: fx.Node) -> fx.Node | Two:
        source = node.all_input_nodes[0]
        x = self.env[source]
        assert isinstance(x, Two)
        module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is not None and not isinstance(module, _OctMaxPool):
            name = WINDOW_MODULES[type(module)]
            options = {key: getattr(module, key) for key in WINDOW_ARGUMENTS[name[:3]] if hasattr(module, key)}
        elif module is None:
            name = name_of(node)
            options = {**dict(zip(WINDOW_ARGUMENTS[name[:3]], node.args[1:], strict=False)), **node.kwargs}
            options.pop("input", None)
        else:
            name = f"max_pool{len(module.kernel_size)}d"
            options = {key: getattr(module, key) for key in ("kernel_size", "stride", "padding")}
        if options.pop("return_indices", False):
            return self.plain(node, "its indices belong to one map")
        try:
            pool_windows(*_halves(source.meta["value"], x), name, x.pool, options)
        except (ValueError, RuntimeError) as error:  # torch's own: a window larger than the low map
            return self.plain(node, str(error).splitlines()[0])
        return self._pair(self.new.call_function(pool_windows, (x.high, x.low, name, x.pool, options)), x.parts, x.pool)

    def global_pool(self, node: fx.Node) -> fx.Node:
        """The mean (or largest value) of each channel: one vector in the vanilla order, which needs no merge."""
        source = node.all_input_nodes[0]
        x = self.env[source]
        assert isinstance(x, Two)
        high, low = (self.new.node_copy(node, {source: half}.__getitem__) for half in (x.high, x.low))
        return self.new.call_function(restore_order, (high, low, x.parts))

    def concatenation(self, node: fx.Node) -> fx.Node | Two:
        tensors = node.args[0] if node.args else node.kwargs["tensors"]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        value = node.meta["value"]
        if not isinstance(tensors, list | tuple) or dim not in (1, 1 - value.dim()):
            return self.plain(node, f"it concatenates along dimension {dim}, not along the channels")
        sources = [self.env[n] for n in tensors]
        pools = {x.pool for x in sources if isinstance(x, Two)}
        if len(pools) > 1:
            return self.plain(node, f"it joins maps pooled by {sorted(pools)}")
        highs = [x.high if isinstance(x, Two) else x for x in sources]
        lows = [x.low for x in sources if isinstance(x, Two)]
        parts: Parts = ()
        for n, x in zip(tensors, sources, strict=True):
            parts += x.parts if isinstance(x, Two) else ((n.meta["value"].shape[1], 0),)
        high, low = (self.new.call_function(torch.cat, (halves, 1)) for halves in (highs, lows))
        return Two(high, low, parts, pools.pop())

    def shape(self, node: fx.Node) -> fx.Node:
        x = self.env[node.all_input_nodes[0]]
        assert isinstance(x, Two)
        asked = node.args[1] if name_of(node) == "getattr" else name_of(node)
        if asked not in ("shape", "size"):
            return self.new.node_copy(node, lambda n: x.high)
        size = self.new.call_function(vanilla_size, (x.high, x.low))
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if asked == "size" and dim is not None:
            return self.new.call_function(operator.getitem, (size, dim))
        return size


def _base(layer: nn.Module) -> Any:
    """nn.Conv2d of a subclass that computes what nn.Conv2d does."""
    return next((base for base in OCTAVE if isinstance(layer, base)), type(layer))


def _become_octave(layer: Any, **split: Any) -> None:
    """In place, so that names, weights, hooks and flags stay. split: what the octave class adds to the vanilla one."""
    if not isinstance(layer, tuple(OCTAVE.values())):
        layer.__class__ = OCTAVE[_base(layer)]
    layer._split(**split)
    device = next((t.device for t in (layer.weight, getattr(layer, "running_mean", None)) if t is not None), None)
    for name, order in layer.named_buffers(recurse=False):
        if name in ("order", "in_order"):
            setattr(layer, name, order.to(device))


def _halves(value: Tensor, x: Two) -> tuple[Tensor, Tensor]:
    """Meta tensors of x's frequencies."""
    n, size = value.shape[0], value.shape[2:]
    high, low = sum(h for h, _ in x.parts), sum(c for _, c in x.parts)
    return value.new_empty(n, high, *size), value.new_empty(n, low, *low_size(size, x.pool))


def _tried(layer: _ConvNd, settings: Mapping[str, Any], node: fx.Node) -> int:
    """Run the octave layer on the meta device -> multiply-adds per sample; ValueError where sizes do not come out."""
    options = {
        name: getattr(layer, name)
        for name in (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        )
    }
    twin = OCTAVE[_base(layer)](**options, bias=False, device="meta", **settings)
    value, parts, pool = node.all_input_nodes[0].meta["value"], settings["in_parts"], settings["pool"]
    high, low = _halves(value.float(), Two(node, node, parts, pool))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = twin(Octave(high, low) if low.shape[1] else high)
    y_high, expected = y.high if isinstance(y, Octave) else y, tuple(node.meta["value"].shape[2:])
    if tuple(y_high.shape[2:]) != expected:
        raise ValueError(f"by pooling, its map would be {tuple(y_high.shape[2:])}, not {expected}")
    if isinstance(y, Octave) and tuple(y.low.shape[2:]) != low_size(expected, pool):
        raise ValueError(f"its low map would be {tuple(y.low.shape[2:])}, which does not belong to {expected}")
    return counter.get_total_flops() // 2 // value.shape[0]
