"""MobileNetV1 (arXiv 1704.04861) and V2 (arXiv 1801.04381) from one description, vanilla or octave."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from octvideo.models.blocks import Convolutions, Head, Stem, channels_of, conv, initialize, norm, split
from octvideo.models.recompute import Blocks
from octvideo.models.spec import ConvSpec, MobileNetSpec, Size
from octvideo.octave import Feature, Parts, lift


class Separable(nn.Module):
    """Depthwise 3x3 -> pointwise 1x1, each with norm and activation. A depthwise layer never mixes the frequencies."""

    def __init__(self, spec: MobileNetSpec, parts: Parts, channels: int, alpha_out: float, stride: Size) -> None:
        super().__init__()
        inner, alpha_in = channels_of(parts), parts[0][1] / channels_of(parts)
        self.conv1 = conv(spec, parts, inner, (3, 3), stride, alpha_in, groups=inner)
        self.bn1 = norm(spec, parts)
        self.conv2 = conv(spec, parts, channels, (1, 1), (1, 1), alpha_out)
        self.bn2 = norm(spec, split(spec, channels, alpha_out))
        self.relu = activation(spec)

    def forward(self, x: Feature) -> Feature:
        y = lift(self.relu, self.bn1(self.conv1(x)))
        return lift(self.relu, self.bn2(self.conv2(y)))


class InvertedResidual(nn.Module):
    """Expand 1x1 -> depthwise 3x3 -> project 1x1, with a shortcut where the shapes agree.

    Only the expanded channels are octave (the authors' code): one frequency comes in and goes out.
    """

    def __init__(
        self, spec: MobileNetSpec, in_channels: int, channels: int, expansion: int, alpha: float, stride: Size
    ) -> None:
        super().__init__()
        inner, one = in_channels * expansion, (1, 1)
        inside, outside = split(spec, inner, alpha), split(spec, channels, 0.0)
        self.conv1 = conv(spec, split(spec, in_channels, 0.0), inner, one, one, alpha)
        self.bn1 = norm(spec, inside)
        self.conv2 = conv(spec, inside, inner, (3, 3), stride, alpha, groups=inner)
        self.bn2 = norm(spec, inside)
        self.conv3 = conv(spec, inside, channels, one, one)
        self.bn3 = norm(spec, outside)
        self.relu = activation(spec)
        self.shortcut = stride == one and in_channels == channels

    def forward(self, x: Feature) -> Feature:
        y = lift(self.relu, self.bn1(self.conv1(x)))
        y = lift(self.relu, self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return lift(torch.add, x, y) if self.shortcut else y


def activation(spec: MobileNetSpec) -> nn.Module:
    return nn.ReLU6(inplace=True) if spec.relu6 else nn.ReLU(inplace=True)


class MobileNet(nn.Module):
    """[N, 3, H, W] -> logits [N, K]. The state dict does not depend on the stages' alpha."""

    def __init__(self, spec: MobileNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stem = Stem(spec, activation(spec))
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        parts = split(spec, spec.stem.channels, 0.0)
        following = iter([*[part.alpha for part in spec.stages for _ in part.channels][1:], 0.0])
        for part in spec.stages:
            blocks = Blocks()
            for index, channels in enumerate(part.channels):
                stride, alpha_next = part.stride if index == 0 else (1, 1), next(following)
                if part.expansion:
                    blocks.append(
                        InvertedResidual(spec, channels_of(parts), channels, part.expansion, part.alpha, stride)
                    )
                    parts = split(spec, channels, 0.0)
                else:
                    # It gives what the next block takes: the last one of the octave stages merges.
                    blocks.append(Separable(spec, parts, channels, alpha_next, stride))
                    parts = split(spec, channels, alpha_next)
            stages[part.name] = blocks
        self.stages = nn.Sequential(stages)
        channels = channels_of(parts)
        self.tail: nn.Module = nn.Identity()
        if spec.tail_channels:
            tail = ConvSpec(spec.tail_channels, (1, 1), (1, 1))
            self.tail = Convolutions(spec, channels, [tail], activation(spec))
            channels = spec.tail_channels
        self.head = Head(channels, spec.num_classes, spec.dropout)
        initialize(list(self.modules()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.stages(self.stem(x))))
