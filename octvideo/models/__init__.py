"""Networks as data."""

from octvideo.models.resnet import ResNet
from octvideo.models.spec import NetSpec, StageSpec, StemSpec, feature_sizes
from octvideo.models.zoo import NETWORKS, with_octave

__all__ = ["NETWORKS", "NetSpec", "ResNet", "StageSpec", "StemSpec", "feature_sizes", "with_octave"]
