"""Any convolutional network as an octave network with the same state dict: the paper's "plug and play" (section 3.3).

`octavize` traces the network (trace.py), says how many channels of each convolution's output are low (`_Plan`), rewrites the
graph for two frequencies (rewrite.py) and reports what became of each layer.
"""

from __future__ import annotations

import copy
import difflib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from octvideo.octave.feature import rounded_alpha
from octvideo.octave.operations import (
    CAT,
    CONV,
    DEPTH,
    ELEMENTWISE,
    EXCITE,
    GLOBAL,
    LAYER_NORM,
    LINEAR,
    NORM,
    POOL,
    RELAYOUT,
    is_depthwise,
    is_map,
    kind_of,
    mark_channels_last,
)
from octvideo.octave.rewrite import Note, Rewriter, Row
from octvideo.octave.trace import ConversionError, kept, trace

__all__ = ["ConversionError", "ConversionReport", "Convolution", "OctaveNetwork", "octavize"]

Size = tuple[int, int]


@dataclass(frozen=True)
class Convolution:
    """What a function `alpha` is asked about. size: (H, W) of the stage that the output belongs to."""

    name: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    size: Size


@dataclass(frozen=True)
class ConversionReport:
    """rows: every convolution, and linear layers over maps. notes: where frequencies merge or split without one, and layers
    that stay vanilla.

    stages: (H, W) of the resolutions at which convolutions were asked to carry two frequencies, the largest first.
    """

    rows: tuple[Row, ...]
    notes: tuple[Note, ...]
    stages: tuple[Size, ...]

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-adds of all convolutions for one sample, before and after."""
        return sum(row.macs_before for row in self.rows), sum(row.macs_after for row in self.rows)

    def __str__(self) -> str:
        lines = [["layer", "output", "alpha in", "alpha out", "multiply-adds before", "after", ""]]
        for row in self.rows:
            size, stride = " x ".join(map(str, row.size)), "strides by pooling" if row.strides_by_pooling else ""
            alphas = [f"{alpha:.4g}" for alpha in (row.alpha_in, row.alpha_out)]
            lines.append([row.name, size, *alphas, f"{row.macs_before:,}", f"{row.macs_after:,}", stride])
        before, after = self.macs
        lines.append(["total", "", "", "", f"{before:,}", f"{after:,}", f"{after / before:.1%}" if before else ""])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*table, *map(str, self.notes)])


class OctaveNetwork(fx.GraphModule):
    """What `octavize` returns: the network's modules under their names, and a forward over two frequencies.

    `report` says what became of each layer. Modules that only call others (a ResNet's layer1) keep their names and
    children, but the forward is this network's own: calling them alone gives the vanilla steps.
    """

    report: ConversionReport

    def __init__(self, root: nn.Module, graph: fx.Graph, report: ConversionReport) -> None:
        super().__init__(root, graph, class_name="OctaveNetwork")
        # All of the network, also what its forward never used, in its own order: so the state dict is the same.
        for store in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[store] = root.__dict__[store]
        self.training = root.training
        self.report = report

    def _parts(self) -> tuple[nn.Module, fx.Graph, ConversionReport]:
        root = nn.Module()
        root.__dict__.update({name: self.__dict__[name] for name in root.__dict__})
        return root, self.graph, self.report

    def __deepcopy__(self, memo: dict[int, Any]) -> OctaveNetwork:
        twin = memo[id(self)] = OctaveNetwork(*copy.deepcopy(self._parts(), memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        root, graph, report = self._parts()
        return OctaveNetwork, (root, copy.deepcopy(graph), report)  # a copy has no owner to lead back here


def octavize(
    model: nn.Module,
    alpha: float | Sequence[float] | Callable[[Convolution], float],
    example_input: Any,
    *,
    pool: Sequence[int] | None = None,
    keep: Sequence[str] = (),
    min_size: int = 10,
    pool_stride: bool = True,
    share: bool = False,
    round_to: int = 1,
) -> OctaveNetwork:
    """The octave twin of any convolutional network: same module names, same state dict. `model` is left as it is.

    alpha: share of low channels, 0 to 1. A number holds in every convolution whose map is at least min_size high and
    wide, and behind which another convolution comes; so the first convolution stays on one frequency, and the last ones
    merge. A sequence gives one number per stage, that is per resolution (the largest first), a function one per convolution;
    both have the last word, whatever the size. A map that only strided layers read belongs to the stage behind them.
    example_input: what forward takes, [N, 3, H, W], [N, 3, T, H, W], or a list or tuple of such as its one argument. The
    network works for other sizes as far as its forward does, but which maps are low is settled by the example's.
    pool: factor between the frequencies, (2, 2) for images, (1, 2, 2) (default) or (2, 2, 2) for video.
    keep: names of modules (shell patterns) that stay as they are. A two-frequency map comes to them merged.
    pool_stride: behind the first octave layer, stride by average pooling (the paper's form), else by the convolution's step.
    share: the two networks share their weights and running statistics; else the twin has copies.
    round_to: low channels of each output are the multiple of it that is nearest to alpha (`octave.rounded_alpha`).

    Convolutions (depthwise, grouped, dilated too), batch norms, activations, pools, dropout, stochastic depth, sums,
    concatenations and products with a gate per channel carry two frequencies. Whatever else reads a two-frequency map gets
    it merged: low upsampled, in the vanilla order of channels. `.report` of the result says what, where and why.
    Grouped convolutions (not depthwise ones) join other channels than in the vanilla network, see OctConv2d.
    Raises ConversionError for a network that cannot be traced or in which nothing converts, ValueError for an argument that
    cannot be.
    """
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    _check_keep(model, keep)
    dims = max((leaf.dim() for leaf in pytree.tree_leaves(example_input) if isinstance(leaf, Tensor)), default=0) - 2
    if dims not in (2, 3):
        raise ValueError(
            "example_input holds no [N, C, H, W] or [N, C, T, H, W]; give what the network's forward takes"
        )
    pool = tuple(pool or (1, 2, 2)[-dims:])
    if len(pool) != dims or any(p not in (1, 2) for p in pool) or 2 not in pool:
        raise ValueError(f"pool is {pool}; it gives 1 or 2 for each of {dims} dimensions, with at least one 2")
    graph = trace(model, example_input, keep)
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(t): t for t in tensors} if share else {})
    mark_channels_last(graph, twin)
    plan = _Plan(graph, twin)
    alphas = {node: rounded_alpha(plan.channels(node), a, round_to) for node, a in plan.alphas(alpha, min_size).items()}
    rewriter = Rewriter(graph, twin, alphas, pool, pool_stride)
    rewritten = rewriter.run()
    report = ConversionReport(tuple(rewriter.rows), tuple(rewriter.notes), tuple(plan.stages))
    if any(alphas.values()) or (isinstance(alpha, float | int) and alpha > 0):
        _require_octave(report, min_size)
    return OctaveNetwork(twin, rewritten, report)


def _require_octave(report: ConversionReport, min_size: int) -> None:
    """A network in which nothing became octave should not pass for one."""
    if any(row.alpha_in or row.alpha_out for row in report.rows):
        return
    reasons = [str(note) for note in report.notes[:3]]
    if len(report.notes) > 3:
        reasons.append(f"and {len(report.notes) - 3} more")
    if not reasons:
        sizes = ", ".join(f"{h} x {w}" for h, w in report.stages) or "none"
        reasons = [
            f"maps behind the first convolution that others read are of size {sizes}, min_size is {min_size}: "
            "give a larger example_input, a smaller min_size, or alpha per stage"
        ]
    raise ConversionError("\n  ".join(["no convolution of this network can carry two frequencies", *reasons]))


def _check_keep(model: nn.Module, keep: Sequence[str]) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for pattern in keep:
        if not any(kept(name, (pattern,)) for name in names):
            near = difflib.get_close_matches(pattern, names) or names[:3]
            raise ValueError(f"keep names {pattern!r}, which the network has not; did you mean {', '.join(near)}?")


class _Plan:
    """Which convolutions put out two frequencies: maps that are summed form a group, which lives at one stage."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph, self.root = graph, root
        self.kinds = {node: kind_of(node, root) for node in graph.nodes}
        self.parent: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if self.kinds[node] in (NORM, ELEMENTWISE, DEPTH, EXCITE, LAYER_NORM, RELAYOUT) and is_map(node):
                for n in node.all_input_nodes:
                    if is_map(n) and n.meta["value"].shape == node.meta["value"].shape:
                        self.parent[self.group(n)] = self.group(node)
        self.members: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            self.members[self.group(node)].append(node)
        self.found: dict[fx.Node, Size] = {}
        self.convolutions = self._candidates()
        self.sizes = {node: self.stage(node) for node in self.convolutions}
        self.stages = sorted(set(self.sizes.values()), key=_area, reverse=True)

    def group(self, node: fx.Node) -> fx.Node:
        while node in self.parent and self.parent[node] is not node:
            node = self.parent[node]
        return node

    def _candidates(self) -> list[fx.Node]:
        """Convolutions with maps that may be split: not the first on any way from the input, not depthwise ones."""
        behind: set[fx.Node] = set()
        candidates = []
        for node in self.graph.nodes:
            later = any(n in behind for n in node.all_input_nodes)
            if self.kinds[node] in (CONV, LINEAR) and is_map(node):
                layer = self.layer(node)
                if later and not (isinstance(layer, _ConvNd) and is_depthwise(layer)):
                    candidates.append(node)
                behind.add(node)
            elif later:
                behind.add(node)
        return candidates

    def layer(self, node: fx.Node) -> _ConvNd | nn.Linear:
        layer = self.root.get_submodule(str(node.target))
        assert isinstance(layer, _ConvNd | nn.Linear)
        return layer

    def stage(self, node: fx.Node) -> Size:
        """The largest resolution at which anything reads the group: where only strided layers do, it is theirs."""
        group = self.group(node)
        if group not in self.found:
            self.found[group] = self._stage(node)
        return self.found[group]

    def _stage(self, node: fx.Node) -> Size:
        read: list[Size] = []
        for member in self.members[self.group(node)]:
            for user in member.users:
                if self.group(user) is self.group(node) or self.kinds[user] == GLOBAL:
                    continue
                if self.kinds[user] == CAT:
                    read.append(self.stage(user))
                elif self.kinds[user] in (CONV, LINEAR, POOL) and is_map(user):
                    read.append(_size(user))
                elif is_map(user):
                    read.append(_size(node))
        return max(read, key=_area) if read else _size(node)

    def heads(self) -> set[fx.Node]:
        """Groups that the output reads with no convolution of a map in between."""
        found: set[fx.Node] = set()
        walk, seen = list(self.graph.nodes)[-1:], set()
        while walk:
            node = walk.pop()
            if node in seen:
                continue
            seen.add(node)
            if is_map(node):
                found.add(self.group(node))
            if self.kinds[node] not in (CONV, LINEAR) or not is_map(node):
                walk += node.all_input_nodes
        return found

    def alphas(
        self, alpha: float | Sequence[float] | Callable[[Convolution], float], min_size: int
    ) -> dict[fx.Node, float]:
        if callable(alpha):
            chosen = {node: alpha(self._describe(node)) for node in self.convolutions}
        elif isinstance(alpha, Sequence):
            if len(alpha) != len(self.stages):
                sizes = ", ".join(f"{h} x {w}" for h, w in self.stages)
                raise ValueError(f"{len(alpha)} alphas for {len(self.stages)} stages ({sizes}); give one per stage")
            chosen = {node: alpha[self.stages.index(self.sizes[node])] for node in self.convolutions}
        else:
            _check_alpha(alpha, "")
            heads = self.heads()
            chosen = {
                node: alpha
                for node in self.convolutions
                if min(self.sizes[node]) >= min_size and self.group(node) not in heads
            }
        for node, value in chosen.items():
            _check_alpha(value, f" for {node.target}")
        return chosen

    def channels(self, node: fx.Node) -> int:
        """Of the output."""
        layer = self.layer(node)
        return layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features

    def _describe(self, node: fx.Node) -> Convolution:
        layer, name, size = self.layer(node), str(node.target), self.sizes[node]
        if isinstance(layer, nn.Linear):
            one = (1,) * (node.meta["value"].dim() - 2)
            return Convolution(name, layer.in_features, layer.out_features, one, size)
        return Convolution(name, layer.in_channels, layer.out_channels, tuple(layer.kernel_size), size)


def _check_alpha(alpha: float, where: str) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha{where} is {alpha}; it is the share of low-frequency channels, from 0 to 1")


def _size(node: fx.Node) -> Size:
    height, width = node.meta["value"].shape[-2:]
    return int(height), int(width)


def _area(size: Size) -> int:
    return size[0] * size[1]
