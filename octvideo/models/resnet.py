"""ResNet for video and images from one description."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from octvideo.models.blocks import Head, Stem, initialize, norm, split, stage
from octvideo.models.spec import ResNetSpec
from octvideo.octave import lift


class ResNet(nn.Module):
    """A bottleneck ResNet: [N, 3, T, H, W] (video) or [N, 3, H, W] (images) -> logits [N, K].

    Any size that `spec.feature_sizes` admits. The state dict does not depend on the stages' alpha.
    """

    def __init__(self, spec: ResNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stem = Stem(spec)
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        parts = split(spec, spec.stem.channels, 0.0)
        for part in spec.stages:
            stages[part.name] = stage(spec, part, parts)
            parts = split(spec, part.channels, part.alpha)
        self.stages = nn.Sequential(stages)
        self.tail_bn = norm(spec, parts) if spec.preactivation else None
        self.relu = nn.ReLU(inplace=True)
        self.head = Head(spec.stages[-1].channels, spec.num_classes, spec.dropout)
        initialize(list(self.modules()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stages(self.stem(x))
        if self.tail_bn is not None:
            y = lift(self.relu, self.tail_bn(y))
        return self.head(y)
