"""DenseNet (arXiv 1608.06993), vanilla or octave."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

from octvideo.models.blocks import Head, Stem, channels_of, conv, initialize, norm, split
from octvideo.models.recompute import Blocks
from octvideo.models.spec import DenseNetSpec
from octvideo.octave import Feature, Parts, average_pool, concatenate, lift


class DenseLayer(nn.Module):
    """norm, ReLU, 1x1; norm, ReLU, 3x3; the result goes behind the input, per frequency."""

    def __init__(self, spec: DenseNetSpec, parts: Parts, alpha: float) -> None:
        super().__init__()
        self.bn1 = norm(spec, parts)
        self.conv1 = conv(spec, parts, spec.width, (1, 1), (1, 1), alpha)
        self.bn2 = norm(spec, split(spec, spec.width, alpha))
        self.conv2 = conv(spec, split(spec, spec.width, alpha), spec.growth, (3, 3), (1, 1), alpha)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Feature) -> Feature:
        y = self.conv1(lift(self.relu, self.bn1(x)))
        y = self.conv2(lift(self.relu, self.bn2(y)))
        return concatenate(x, y)


class Transition(nn.Module):
    """norm, ReLU, 1x1 to half the channels, average pooling of each frequency."""

    def __init__(self, spec: DenseNetSpec, parts: Parts, alpha: float, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.bn = norm(spec, parts)
        self.conv = conv(spec, parts, channels_of(parts) // 2, (1, 1), (1, 1), alpha)
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride

    def forward(self, x: Feature) -> Feature:
        return lift(partial(average_pool, kernel=self.stride), self.conv(lift(self.relu, self.bn(x))))


class DenseNet(nn.Module):
    """[N, 3, H, W] -> logits [N, K]. The state dict does not depend on the stages' alpha.

    Features are concatenations, [highs..., lows...] in memory; the weights keep the vanilla order, part by part.
    """

    def __init__(self, spec: DenseNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stem = Stem(spec)
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        transitions: OrderedDict[str, nn.Module] = OrderedDict()
        parts = split(spec, spec.stem.channels, 0.0)
        for index, part in enumerate(spec.stages):
            if index:
                transitions[part.name] = Transition(spec, parts, part.alpha, part.stride)
                parts = split(spec, channels_of(parts) // 2, part.alpha)
            layers = Blocks()
            for _ in range(part.layers):
                layers.append(DenseLayer(spec, parts, part.alpha))
                parts += split(spec, spec.growth, part.alpha)
            stages[part.name] = layers
        self.stages = nn.ModuleDict(stages)
        self.transitions = nn.ModuleDict(transitions)
        self.tail_bn = norm(spec, parts)
        self.relu = nn.ReLU(inplace=True)
        self.head = Head(channels_of(parts), spec.num_classes, spec.dropout, parts)
        initialize(list(self.modules()))

    def forward(self, x: Tensor) -> Tensor:
        y: Feature = self.stem(x)
        for name, layers in self.stages.items():
            if name in self.transitions:
                y = self.transitions[name](y)
            y = layers(y)
        return self.head(lift(self.relu, self.tail_bn(y)))
