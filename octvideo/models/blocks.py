"""The parts that networks share: convolution, norm, stem, bottleneck, stage, head. Each takes one frequency or two.

`Parts`, the (high, low) channels of a feature, says what a layer takes; a concatenation has several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from octvideo.models.recompute import Blocks
from octvideo.models.spec import ConvSpec, NetSpec, ResNetSpec, Size, StageSpec
from octvideo.octave import (
    Feature,
    GlobalReasoning,
    NonLocal,
    OctBatchNorm2d,
    OctBatchNorm3d,
    OctConv2d,
    OctConv3d,
    OctMaxPool2d,
    OctMaxPool3d,
    Parts,
    SqueezeExcite,
    channel_order,
    global_average_pool,
    lift,
    rounded_alpha,
    shared_pooling,
    split_channels,
)


def split(spec: NetSpec, channels: int, alpha: float) -> Parts:
    """A feature that is no concatenation."""
    return (split_channels(channels, rounded_alpha(channels, alpha, spec.round_to)),)


def channels_of(parts: Parts) -> int:
    return sum(map(sum, parts))


def conv(
    spec: NetSpec, parts: Parts, out_channels: int, kernel: Size, stride: Size, alpha_out: float = 0.0, groups: int = 1
) -> nn.Module:
    """A size-preserving convolution without bias: vanilla, or octave in every layer of an octave network."""
    in_channels, padding = channels_of(parts), tuple(k // 2 for k in kernel)
    if spec.octave_pool is None:
        plain = nn.Conv3d if spec.dims == 3 else nn.Conv2d
        return plain(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)  # type: ignore[arg-type]
    octave = OctConv3d if spec.dims == 3 else OctConv2d
    return octave(
        in_channels,
        out_channels,
        kernel,  # type: ignore[arg-type]
        stride,  # type: ignore[arg-type]
        padding,  # type: ignore[arg-type]
        groups=groups,
        bias=False,
        in_parts=parts,
        alpha_out=rounded_alpha(out_channels, alpha_out, spec.round_to),
        pool=spec.octave_pool,
    )


def norm(spec: NetSpec, parts: Parts, affine: bool = True) -> nn.Module:
    batch_norm = OctBatchNorm3d if spec.dims == 3 else OctBatchNorm2d
    return batch_norm(channels_of(parts), spec.norm_eps, spec.norm_momentum, affine, parts=parts)


def max_pool(spec: NetSpec, kernel: Size, stride: Size, padding: Size | None = None) -> nn.Module:
    pool = OctMaxPool3d if spec.dims == 3 else OctMaxPool2d
    return pool(kernel, stride, padding, pool=spec.octave_pool or (1,) * spec.dims)


class Convolutions(nn.Module):
    """conv, bn, ReLU, conv2, bn2, ReLU, ... on one frequency, never octave."""

    def __init__(self, spec: NetSpec, in_channels: int, convs: Sequence[ConvSpec], relu: nn.Module) -> None:
        super().__init__()
        vanilla = replace(spec, octave_pool=None)
        self.suffixes = ["", *(str(number) for number in range(2, len(convs) + 1))]
        for suffix, part in zip(self.suffixes, convs, strict=True):
            layer = conv(vanilla, split(spec, in_channels, 0.0), part.channels, part.kernel, part.stride)
            self.add_module(f"conv{suffix}", layer)
            self.add_module(f"bn{suffix}", norm(spec, split(spec, part.channels, 0.0)))
            in_channels = part.channels
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        for suffix in self.suffixes:
            convolution, batch_norm = getattr(self, f"conv{suffix}"), getattr(self, f"bn{suffix}")
            x = self.relu(batch_norm(convolution(x)))
        return x


class Stem(Convolutions):
    """[N, 3, (T,) H, W] -> convolutions, max-pool, bottleneck; vanilla in octave networks (paper, section 4.1)."""

    def __init__(self, spec: NetSpec, relu: nn.Module | None = None) -> None:
        stem = spec.stem
        super().__init__(spec, spec.in_channels, stem.convs, relu or nn.ReLU(inplace=True))
        self.pool = max_pool(spec, stem.pool.kernel, stem.pool.stride, stem.pool.padding) if stem.pool else None
        self.bottleneck: nn.Module | None = None
        if stem.bottleneck:
            assert isinstance(spec, ResNetSpec)
            vanilla = replace(spec, octave_pool=None, preactivation=False)
            self.bottleneck = Bottleneck(
                vanilla, stem.bottleneck, split(spec, stem.convs[-1].channels, 0.0), first=True
            )

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        x = x if self.pool is None else self.pool(x)
        return x if self.bottleneck is None else self.bottleneck(x)


class Bottleneck(nn.Module):
    """(t,1,1) -> (1,3,3) -> (1,1,1), plus shortcut.

    Post-activation: each convolution, then norm and ReLU, the last ReLU behind the sum. Pre-activation: norm and ReLU,
    then the convolution, in the projection too. parts: the incoming map. The first block of a stage strides and has a
    projection; that is where the frequencies split (conv1 and projection, 0 -> alpha) and merge (alpha -> 0) in an
    octave network (paper, section 3.3).
    """

    def __init__(
        self, spec: ResNetSpec, stage: StageSpec, parts: Parts, *, first: bool, temporal_kernel: int = 1
    ) -> None:
        super().__init__()
        alpha, one = stage.alpha, (1,) * spec.dims
        width, out = split(spec, stage.width, alpha), split(spec, stage.channels, alpha)
        strides = [stage.stride if first and stage.stride_on == number else one for number in (1, 2, 3)]
        before, behind = (parts, width, width), (width, width, out)
        normed = before if spec.preactivation else behind
        self.preactivation = spec.preactivation
        self.input_bn = norm(spec, parts, affine=False) if stage.input_norm else None
        self.conv1 = conv(spec, parts, stage.width, (temporal_kernel, 1, 1)[-spec.dims :], strides[0], alpha)
        self.bn1 = norm(spec, normed[0])
        self.conv2 = conv(spec, width, stage.width, (1, 3, 3)[-spec.dims :], strides[1], alpha, stage.groups)
        self.bn2 = norm(spec, normed[1])
        self.conv3 = conv(spec, width, stage.channels, one, strides[2], alpha)
        self.bn3 = norm(spec, normed[2])
        self.se = SqueezeExcite(stage.channels, stage.squeeze) if stage.squeeze else None
        self.projection_input_bn = norm(spec, parts, affine=False) if stage.input_norm and first else None
        self.projection: nn.Module | None = None
        self.projection_bn: nn.Module | None = None
        if first:
            self.projection = conv(spec, parts, stage.channels, one, stage.stride, alpha)
            self.projection_bn = norm(spec, parts if spec.preactivation else out)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Feature) -> Feature:
        apply = self._norm_first if self.preactivation else self._norm_last
        if self.projection is None or torch.compiler.is_compiling():  # a compiler sees by itself what is shared
            shortcut, y = self._read(x)
        else:
            with shared_pooling():
                shortcut, y = self._read(x)
        y = apply(self.conv2, self.bn2, y)
        y = apply(self.conv3, self.bn3, y, relu=self.preactivation)
        if self.se is not None:
            y = self.se(y)
        y = lift(torch.add, y, shortcut)
        return y if self.preactivation else lift(self.relu, y)

    def _read(self, x: Feature) -> tuple[Feature, Feature]:
        """The shortcut, and the first convolution: in the first block of a stage both are octave layers that read x."""
        apply = self._norm_first if self.preactivation else self._norm_last
        shortcut = x
        if self.projection is not None and self.projection_bn is not None:
            read = x if self.projection_input_bn is None else self.projection_input_bn(x)
            shortcut = apply(self.projection, self.projection_bn, read, relu=self.preactivation)
        y = x if self.input_bn is None else self.input_bn(x)
        return shortcut, apply(self.conv1, self.bn1, y)

    def _norm_last(self, convolution: nn.Module, batch_norm: nn.Module, x: Feature, relu: bool = True) -> Feature:
        y = batch_norm(convolution(x))
        return lift(self.relu, y) if relu else y

    def _norm_first(self, convolution: nn.Module, batch_norm: nn.Module, x: Feature, relu: bool = True) -> Feature:
        return convolution(lift(self.relu, batch_norm(x)))


def stage(spec: ResNetSpec, stage: StageSpec, parts: Parts) -> Blocks:
    """The blocks of a stage under their numbers, "0", "1", "nonlocal1", ..., then "pool" where the stage has one."""
    blocks = Blocks()
    for index, temporal_kernel in enumerate(stage.temporal_kernels):
        block = Bottleneck(spec, stage, parts, first=index == 0, temporal_kernel=temporal_kernel)
        blocks.add_module(str(index), block)
        if index in stage.nonlocal_after:
            blocks.add_module(f"nonlocal{index}", nonlocal_block(spec, stage))
        if index in stage.glore_after:
            blocks.add_module(f"glore{index}", glore_unit(spec, stage))
        parts = split(spec, stage.channels, stage.alpha)
    if stage.pool_after:
        blocks.add_module("pool", max_pool(spec, stage.pool_after, stage.pool_after))
    return blocks


def nonlocal_block(spec: ResNetSpec, stage: StageSpec) -> NonLocal:
    return NonLocal(
        stage.channels,
        stage.channels // 2,
        form=spec.nonlocal_form,
        eps=spec.norm_eps,
        momentum=spec.norm_momentum,
        alpha=stage.alpha,
        round_to=spec.round_to,
        pool=spec.octave_pool or (1, 2, 2),
    )


def glore_unit(spec: ResNetSpec, stage: StageSpec) -> GlobalReasoning:
    return GlobalReasoning(
        stage.channels,
        stage.channels // 4,
        eps=spec.norm_eps,
        momentum=spec.norm_momentum,
        alpha=rounded_alpha(stage.channels, stage.alpha, spec.round_to),
        pool=spec.octave_pool or (2, 2),
    )


class Head(nn.Module):
    """Mean over whatever space and time is left -> dropout -> linear; features [N, C, ...] or Octave -> [N, K].

    Several features (pathways) are pooled apart and their channels put behind one another. A network whose last
    stage is octave pools each frequency; the channel order is the vanilla one. parts: of a feature that is a
    concatenation.
    """

    places: Tensor | None

    def __init__(self, channels: int, num_classes: int, dropout: float, parts: Parts | None = None) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        order = channel_order(parts) if parts else None
        self.register_buffer("places", None if order is None else order.argsort(), persistent=False)

    def forward(self, *features: Feature) -> Tensor:
        pooled = torch.cat([global_average_pool(x) for x in features], dim=1)
        if self.places is not None:
            pooled = pooled[:, self.places]
        return self.fc(self.dropout(pooled))


def initialize(modules: Sequence[nn.Module]) -> None:
    """Kaiming normal (fan out) convolutions, normal(0, 0.01) classifier, unit norms, zero gamma at each branch's end.

    Source: the Kinetics recipe of Goyal et al. (arXiv 1706.02677) as PySlowFast uses it. An octave kernel is drawn as
    the vanilla kernel that it is, so one seed gives the same weights at every alpha. A pre-activation branch ends in a
    convolution, and has no such gamma.
    """
    for module in modules:
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            continue  # a structure without values, built to be counted; torch draws them in Python there, slowly
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, Bottleneck) and not module.preactivation:
            nn.init.zeros_(cast(nn.BatchNorm3d, module.bn3).weight)
        elif isinstance(module, Head):
            nn.init.normal_(module.fc.weight, std=0.01)
            nn.init.zeros_(module.fc.bias)
