"""The octave operator: two-frequency features and the layers over them. Imports torch only; on GPUs Triton too."""

from octvideo.octave.attention import GlobalReasoning, NonLocal
from octvideo.octave.conv import OctConv2d, OctConv3d
from octvideo.octave.convert import ConversionError, OctaveNetwork, octavize
from octvideo.octave.feature import (
    Feature,
    Octave,
    Parts,
    average_pool,
    channel_order,
    concatenate,
    global_average_pool,
    lift,
    rounded_alpha,
    split_channels,
    upsample,
)
from octvideo.octave.fuse import fuse
from octvideo.octave.layers import (
    OctBatchNorm2d,
    OctBatchNorm3d,
    OctMaxPool2d,
    OctMaxPool3d,
    SqueezeExcite,
    synchronize_norms,
)
from octvideo.octave.onednn import use_onednn
from octvideo.octave.paths import shared_pooling

__all__ = [
    "ConversionError",
    "Feature",
    "GlobalReasoning",
    "NonLocal",
    "OctBatchNorm2d",
    "OctBatchNorm3d",
    "OctConv2d",
    "OctConv3d",
    "OctMaxPool2d",
    "OctMaxPool3d",
    "Octave",
    "OctaveNetwork",
    "Parts",
    "SqueezeExcite",
    "average_pool",
    "channel_order",
    "concatenate",
    "fuse",
    "global_average_pool",
    "lift",
    "octavize",
    "rounded_alpha",
    "shared_pooling",
    "split_channels",
    "synchronize_norms",
    "upsample",
    "use_onednn",
]
