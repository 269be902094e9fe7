"""Networks as data."""

from torch import nn

from octvideo.models.resnet import ResNet
from octvideo.models.slowfast import SlowFast
from octvideo.models.spec import NetSpec, SlowFastSpec, Spec, StageSpec, StemSpec, feature_sizes
from octvideo.models.zoo import NETWORKS, with_nonlocal, with_octave


def create(spec: Spec) -> nn.Module:
    """The network of a description, with fresh weights."""
    return SlowFast(spec) if isinstance(spec, SlowFastSpec) else ResNet(spec)


__all__ = [
    "NETWORKS",
    "NetSpec",
    "ResNet",
    "SlowFast",
    "SlowFastSpec",
    "Spec",
    "StageSpec",
    "StemSpec",
    "create",
    "feature_sizes",
    "with_nonlocal",
    "with_octave",
]
