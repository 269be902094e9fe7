"""Networks as data."""

from torch import nn

from octvideo.models.compile import compile_blocks
from octvideo.models.densenet import DenseNet
from octvideo.models.factory import from_factory
from octvideo.models.mobilenet import MobileNet
from octvideo.models.recompute import checkpoint_activations
from octvideo.models.resnet import ResNet
from octvideo.models.slowfast import SlowFast
from octvideo.models.spec import (
    ConvSpec,
    DenseNetSpec,
    MobileNetSpec,
    PoolSpec,
    ResNetSpec,
    SlowFastSpec,
    Spec,
    StageSpec,
    StemSpec,
    feature_sizes,
)
from octvideo.models.zoo import NETWORKS, with_nonlocal, with_octave, with_pool_padding


def create(spec: Spec) -> nn.Module:
    """The network of a description, with fresh weights."""
    match spec:
        case SlowFastSpec():
            return SlowFast(spec)
        case MobileNetSpec():
            return MobileNet(spec)
        case DenseNetSpec():
            return DenseNet(spec)
        case ResNetSpec():
            return ResNet(spec)
    raise TypeError(f"{type(spec).__name__} describes no network")


__all__ = [
    "NETWORKS",
    "ConvSpec",
    "DenseNet",
    "DenseNetSpec",
    "MobileNet",
    "MobileNetSpec",
    "PoolSpec",
    "ResNet",
    "ResNetSpec",
    "SlowFast",
    "SlowFastSpec",
    "Spec",
    "StageSpec",
    "StemSpec",
    "checkpoint_activations",
    "compile_blocks",
    "create",
    "feature_sizes",
    "from_factory",
    "with_nonlocal",
    "with_octave",
    "with_pool_padding",
]
