"""The parts of a ResNet: stem, bottleneck, stage, head. Each takes one frequency or two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from octvideo.models.spec import NetSpec, Size, StageSpec
from octvideo.octave import (
    Feature,
    NonLocal,
    OctBatchNorm2d,
    OctBatchNorm3d,
    OctConv2d,
    OctConv3d,
    OctMaxPool2d,
    OctMaxPool3d,
    global_average_pool,
    lift,
)


def conv(
    spec: NetSpec,
    in_channels: int,
    out_channels: int,
    kernel: Size,
    stride: Size,
    alpha_in: float = 0.0,
    alpha_out: float = 0.0,
) -> nn.Module:
    """A size-preserving convolution without bias: vanilla, or octave in every layer of an octave network."""
    padding = tuple(k // 2 for k in kernel)
    if spec.octave_pool is None:
        plain = nn.Conv3d if spec.dims == 3 else nn.Conv2d
        return plain(in_channels, out_channels, kernel, stride, padding, bias=False)  # type: ignore[arg-type]
    octave = OctConv3d if spec.dims == 3 else OctConv2d
    return octave(
        in_channels,
        out_channels,
        kernel,  # type: ignore[arg-type]
        stride,  # type: ignore[arg-type]
        padding,  # type: ignore[arg-type]
        bias=False,
        alpha_in=alpha_in,
        alpha_out=alpha_out,
        pool=spec.octave_pool,
    )


def norm(spec: NetSpec, channels: int, alpha: float = 0.0) -> nn.Module:
    batch_norm = OctBatchNorm3d if spec.dims == 3 else OctBatchNorm2d
    return batch_norm(channels, spec.norm_eps, spec.norm_momentum, alpha=alpha)


def max_pool(spec: NetSpec, kernel: Size, stride: Size, padding: Size | None = None) -> nn.Module:
    pool = OctMaxPool3d if spec.dims == 3 else OctMaxPool2d
    return pool(kernel, stride, padding, pool=spec.octave_pool or (1,) * spec.dims)


class Stem(nn.Module):
    """[N, 3, (T,) H, W] -> conv, norm, ReLU, max-pool; vanilla in octave networks too (paper, section 4.1)."""

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        stem = spec.stem
        padding = tuple(k // 2 for k in stem.kernel)
        plain = nn.Conv3d if spec.dims == 3 else nn.Conv2d
        self.conv = plain(spec.in_channels, stem.channels, stem.kernel, stem.stride, padding, bias=False)  # type: ignore[arg-type]
        self.bn = norm(spec, stem.channels)
        self.relu = nn.ReLU(inplace=True)
        self.pool = max_pool(spec, stem.pool_kernel, stem.pool_stride, stem.pool_padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.bn(self.conv(x))))


class Bottleneck(nn.Module):
    """Post-activation bottleneck: (t,1,1) -> (1,3,3) with the stride -> (1,1,1), plus shortcut, then ReLU.

    alpha_in is that of the incoming map. The first block of a stage has a projection; that is where the frequencies
    split (conv1 and projection, 0 -> alpha) and merge (alpha -> 0) in an octave network (paper, section 3.3).
    """

    def __init__(
        self,
        spec: NetSpec,
        stage: StageSpec,
        in_channels: int,
        alpha_in: float,
        stride: Size,
        temporal_kernel: int,
        project: bool,
    ) -> None:
        super().__init__()
        alpha, one = stage.alpha, (1,) * spec.dims
        conv1_kernel = (temporal_kernel, 1, 1)[-spec.dims :] if spec.dims == 3 else one
        conv2_kernel = (1, 3, 3)[-spec.dims :]
        self.conv1 = conv(spec, in_channels, stage.width, conv1_kernel, one, alpha_in, alpha)
        self.bn1 = norm(spec, stage.width, alpha)
        self.conv2 = conv(spec, stage.width, stage.width, conv2_kernel, stride, alpha, alpha)
        self.bn2 = norm(spec, stage.width, alpha)
        self.conv3 = conv(spec, stage.width, stage.channels, one, one, alpha, alpha)
        self.bn3 = norm(spec, stage.channels, alpha)
        self.projection: nn.Module | None = None
        self.projection_bn: nn.Module | None = None
        if project:
            self.projection = conv(spec, in_channels, stage.channels, one, stride, alpha_in, alpha)
            self.projection_bn = norm(spec, stage.channels, alpha)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Feature) -> Feature:
        shortcut = x
        if self.projection is not None and self.projection_bn is not None:
            shortcut = self.projection_bn(self.projection(x))
        y = lift(self.relu, self.bn1(self.conv1(x)))
        y = lift(self.relu, self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return lift(self.relu, lift(torch.add, y, shortcut))


def stage(spec: NetSpec, stage: StageSpec, in_channels: int, alpha_in: float) -> nn.Sequential:
    """The blocks of a stage under their numbers, "0", "1", "nonlocal1", ..., then "pool" where the stage has one."""
    blocks = nn.Sequential()
    one = (1,) * spec.dims
    for index, temporal_kernel in enumerate(stage.temporal_kernels):
        first = index == 0
        blocks.add_module(
            str(index),
            Bottleneck(
                spec,
                stage,
                in_channels if first else stage.channels,
                alpha_in if first else stage.alpha,
                stage.stride if first else one,
                temporal_kernel,
                project=first,
            ),
        )
        if index in stage.nonlocal_after:
            blocks.add_module(f"nonlocal{index}", nonlocal_block(spec, stage))
    if stage.pool_after:
        blocks.add_module("pool", max_pool(spec, stage.pool_after, stage.pool_after))
    return blocks


def nonlocal_block(spec: NetSpec, stage: StageSpec) -> NonLocal:
    return NonLocal(
        stage.channels,
        stage.channels // 2,
        form=spec.nonlocal_form,
        eps=spec.norm_eps,
        momentum=spec.norm_momentum,
        alpha=stage.alpha,
        pool=spec.octave_pool or (1, 2, 2),
    )


class Head(nn.Module):
    """Mean over whatever space and time is left -> dropout -> linear; features [N, C, ...] or Octave -> [N, K].

    Several features (pathways) are pooled apart and their channels put behind one another. A network whose last
    stage is octave pools each frequency; the channel order is the vanilla one.
    """

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, *features: Feature) -> Tensor:
        pooled = torch.cat([global_average_pool(x) for x in features], dim=1)
        return self.fc(self.dropout(pooled))


def initialize(modules: Sequence[nn.Module]) -> None:
    """Kaiming normal (fan out) convolutions, normal(0, 0.01) classifier, unit norms, zero gamma at each branch's end.

    Source: the Kinetics recipe of Goyal et al. (arXiv 1706.02677) as PySlowFast uses it. An octave kernel is drawn as
    the vanilla kernel that it is, so one seed gives the same weights at every alpha.
    """
    for module in modules:
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, Bottleneck):
            nn.init.zeros_(cast(nn.BatchNorm3d, module.bn3).weight)
        elif isinstance(module, Head):
            nn.init.normal_(module.fc.weight, std=0.01)
            nn.init.zeros_(module.fc.bias)
