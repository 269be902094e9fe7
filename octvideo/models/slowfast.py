"""SlowFast: two pathways over one clip, the fast one feeding the slow one (Feichtenhofer et al., arXiv 1812.03982)."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.fx
from torch import Tensor, nn

from octvideo.models.blocks import Head, Stem, initialize, norm, split, stage
from octvideo.models.spec import ResNetSpec, SlowFastSpec
from octvideo.octave import Feature, OctConv3d, Parts, concatenate, lift, rounded_alpha


def strided_frames(num_frames: int, ratio: int) -> list[int]:
    """32 frames, ratio 8 -> [0, 8, 16, 24]"""
    return list(range(0, num_frames, ratio))


def pyslowfast_frames(num_frames: int, ratio: int) -> list[int]:
    """32 frames, ratio 8 -> [0, 10, 20, 31]: spread from the first frame to the last, rounded down."""
    count = num_frames // ratio
    return torch.linspace(0, num_frames - 1, count).long().tolist()


SLOW_FRAMES = {"strided": strided_frames, "pyslowfast": pyslowfast_frames}


@torch.fx.wrap  # one step to those who follow the network without a clip, since it asks for the number of frames
def slow_clip(clip: Tensor, slow_frames: str, ratio: int) -> Tensor:
    """[N, 3, T, H, W] -> [N, 3, T / ratio, H, W]"""
    return clip[:, :, SLOW_FRAMES[slow_frames](clip.shape[2], ratio)]


class Pathway(nn.Module):
    """A ResNet's stem and stages, each stage taking the lateral channels that were put behind its input."""

    def __init__(self, spec: ResNetSpec, lateral: dict[str, Parts]) -> None:
        """lateral: behind the stem or a stage, by name, the channels that are added there."""
        super().__init__()
        self.stem = Stem(spec)
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        name, parts = "stem", split(spec, spec.stem.channels, 0.0)
        for part in spec.stages:
            stages[part.name] = stage(spec, part, parts + lateral.get(name, ()))
            name, parts = part.name, split(spec, part.channels, part.alpha)
        self.stages = nn.ModuleDict(stages)


class Lateral(nn.Module):
    """Fast -> slow: a convolution over time with the frame ratio as its stride, norm, ReLU; on both frequencies.

    The stride is the convolution's own in octave networks too: it picks frames, it does not halve a resolution.
    """

    def __init__(self, spec: SlowFastSpec, channels: int, alpha: float) -> None:
        super().__init__()
        out = channels * spec.lateral_ratio
        kernel, stride, padding = (
            (spec.lateral_kernel, 1, 1),
            (spec.frame_ratio, 1, 1),
            (spec.lateral_kernel // 2, 0, 0),
        )
        self.conv: nn.Conv3d
        if spec.fast.octave_pool is None:
            self.conv = nn.Conv3d(channels, out, kernel, stride, padding, bias=False)
        else:
            self.conv = OctConv3d(
                channels,
                out,
                kernel,
                stride,
                padding,
                bias=False,
                alpha_in=rounded_alpha(channels, alpha, spec.fast.round_to),
                alpha_out=rounded_alpha(out, alpha, spec.fast.round_to),
                pool=spec.fast.octave_pool,
                pool_stride=False,
            )
        self.bn = norm(spec.fast, split(spec.fast, out, alpha))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Feature) -> Feature:
        return lift(self.relu, self.bn(self.conv(x)))


class SlowFast(nn.Module):
    """ONE clip [N, 3, T, H, W] -> logits [N, K]; the slow pathway's frames are taken from it here.

    T must be a multiple of spec.frame_ratio (`spec.feature_sizes` says so at build time).
    """

    def __init__(self, spec: SlowFastSpec) -> None:
        super().__init__()
        if spec.slow_frames not in SLOW_FRAMES:
            raise ValueError(f"slow_frames is {spec.slow_frames!r}; allowed: {', '.join(SLOW_FRAMES)}")
        self.spec = spec
        sources = {"stem": (spec.fast.stem.channels, 0.0)}
        sources.update({part.name: (part.channels, part.alpha) for part in spec.fast.stages[:-1]})
        self.laterals = nn.ModuleDict({name: Lateral(spec, *source) for name, source in sources.items()})
        added = {
            name: split(spec.fast, channels * spec.lateral_ratio, alpha) for name, (channels, alpha) in sources.items()
        }
        self.slow = Pathway(spec.slow, added)
        self.fast = Pathway(spec.fast, {})
        channels = spec.slow.stages[-1].channels + spec.fast.stages[-1].channels
        self.head = Head(channels, spec.num_classes, spec.slow.dropout)
        initialize(list(self.modules()))

    def forward(self, x: Tensor) -> Tensor:
        slow: Feature = self.slow.stem(slow_clip(x, self.spec.slow_frames, self.spec.frame_ratio))
        fast: Feature = self.fast.stem(x)
        slow = concatenate(slow, self.laterals["stem"](fast))
        for name, slow_stage in self.slow.stages.items():
            slow, fast = slow_stage(slow), self.fast.stages[name](fast)
            if name in self.laterals:
                slow = concatenate(slow, self.laterals[name](fast))
        return self.head(slow, fast)
