"""ResNet for video and images from one description."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from octvideo.models.blocks import Head, Stem, initialize, stage
from octvideo.models.spec import NetSpec


class ResNet(nn.Module):
    """A bottleneck ResNet: [N, 3, T, H, W] (video) or [N, 3, H, W] (images) -> logits [N, K].

    Any size that `spec.feature_sizes` admits. The state dict does not depend on the stages' alpha.
    """

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stem = Stem(spec)
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        channels, alpha = spec.stem.channels, 0.0
        for part in spec.stages:
            stages[part.name] = stage(spec, part, channels, alpha)
            channels, alpha = part.channels, part.alpha
        self.stages = nn.Sequential(stages)
        self.head = Head(channels, spec.num_classes, spec.dropout)
        initialize(list(self.modules()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))
