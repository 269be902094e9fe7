"""Layer norms and linear layers over channels-last maps (ConvNeXt): found in a graph, and made octave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from octvideo.octave.feature import Feature, Octave, Parts, average_pool, channel_order, split_channels, upsample


class OctLinear(nn.Linear):
    """nn.Linear at each position of a map [N, C, ...] over two frequencies: a 1 x 1 octave convolution; same state dict."""

    in_order: Tensor | None

    def _split(self, alpha_out: float, in_parts: Parts, pool: Sequence[int]) -> None:
        self.in_high = sum(high for high, _ in in_parts)
        self.out_high, self.out_low = split_channels(self.out_features, alpha_out)
        self.pool = tuple(pool)
        self.register_buffer("in_order", channel_order(in_parts), persistent=False)

    def forward(self, x: Feature) -> Feature:  # type: ignore[override]
        """x: [N, C_in, ...] or Octave -> the same with C_out channels, split by alpha_out."""
        high, low = x if isinstance(x, Octave) else (x, None)
        weight = self.weight if self.in_order is None else self.weight[:, self.in_order]
        split = (self.out_high, self.out_low)
        to_high, to_low = weight[:, : self.in_high].split(split)
        bias_high, bias_low = (None, None) if self.bias is None else self.bias.split(split)
        y_high, y_low = _at_each(high, to_high, bias_high), None
        if self.out_low:
            y_low = _at_each(average_pool(high, self.pool), to_low, bias_low)
        if low is not None:
            from_low = _at_each(low, weight[:, self.in_high :], None)
            if self.out_high:
                y_high = y_high + upsample(from_low[:, : self.out_high], high.shape[2:])
            y_low = y_low if y_low is None else y_low + from_low[:, self.out_high :]
        return y_high if y_low is None else Octave(y_high, y_low)

    def macs(self, positions_high: int, positions_low: int) -> int:
        """Multiply-adds of one sample."""
        in_low, outs = self.in_features - self.in_high, self.out_high + self.out_low
        low = self.in_high * self.out_low + in_low * outs
        return positions_high * self.in_high * self.out_high + positions_low * low


def _at_each(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[N, C_in, ...] -> [N, C_out, ...]"""
    return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


def mark(graph: fx.Graph, root: nn.Module, linear: str, layer_norm: str, relayout: str, elementwise: Any) -> None:
    """Note in each node between a permutation to channels-last and the one back what it is (meta kind) and that its map is
    channels-last (meta last); its value gets the channels-first shape, as all other maps have.

    linear, layer_norm, relayout: the kinds' names. elementwise: says whether a node is.
    A part in which anything else happens stays as it is.
    """

    def kind(node: fx.Node, inside: fx.Node) -> str | None:
        module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        maps = [n for n in node.all_input_nodes if isinstance(n.meta["value"], Tensor) and n.meta["value"].dim() > 1]
        if maps != [inside] or node.meta["opaque"]:
            return None
        if type(module) is nn.Linear:
            return linear
        if type(module) is nn.LayerNorm:
            return layer_norm if len(module.normalized_shape) == 1 else None
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "layer_norm":
            return layer_norm if node.args[0] is inside and len(node.args[1]) == 1 else None  # type: ignore[arg-type]
        return "" if elementwise(node) else None

    for start in graph.nodes:
        dims = permuted(start)
        if dims is None or dims != to_last(len(dims)) or start.meta.get("last"):
            continue
        found, walk = {start: relayout}, [start]
        while walk:
            node = walk.pop()
            for user in node.users:
                what = relayout if permuted(user) == to_first(len(dims)) else kind(user, node)
                if what is None:
                    found, walk = {}, []
                    break
                if what != relayout and user not in found:
                    walk.append(user)
                found[user] = what
        for node, what in found.items():
            if what:
                node.meta["kind"] = what
            if permuted(node) != to_first(len(dims)):
                node.meta["last"] = True
                node.meta["value"] = node.meta["value"].permute(to_first(len(dims)))


def permuted(node: fx.Node) -> tuple[int, ...] | None:
    """The permutation that a node makes."""
    if node.op not in ("call_function", "call_method") or "permute" not in str(
        getattr(node.target, "__name__", node.target)
    ):
        return None
    dims = node.args[1:] if len(node.args) > 1 else (node.kwargs.get("dims"),)
    flat = dims[0] if len(dims) == 1 else dims
    if not isinstance(flat, list | tuple) or not all(isinstance(d, int) for d in flat):
        return None
    return tuple(d % len(flat) for d in flat)


def to_last(dims: int) -> tuple[int, ...]:
    return (0, *range(2, dims), 1)


def to_first(dims: int) -> tuple[int, ...]:
    return (0, dims - 1, *range(1, dims - 1))
