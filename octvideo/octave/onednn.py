"""Convolutions of one spatial position on one thread: by oneDNN, as on several threads and over large batches.

On one thread torch gives a float32 convolution of size 1 in height and width to another kernel of its own, unless the batch
is large, the stride is above 1 or the convolution is dilated; over clips that kernel first writes out every value for each
place of the window. On networks of video half of the convolutions are such ones: 1x1x1 and 3x1x1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from octvideo.octave.conv import OctConv2d, OctConv3d

FEWEST = 2048  # weights of a 1x1 kernel below which oneDNN's call costs more than its faster arithmetic saves


def use_onednn(model: nn.Module) -> None:
    """Have the convolutions of one spatial position, octave or not, dilated there, in place.

    Names, weights and what is computed stay. Outputs are those of several threads, which differ by rounding.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            step = layer._step if isinstance(layer, OctConv2d | OctConv3d) else layer.stride
            layer.dilation = dilation_for_onednn(layer.weight.shape, step, layer.dilation)


def dilation_for_onednn(shape: Sequence[int], stride: Sequence[int], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """A dilation with which torch gives a convolution to oneDNN: a window of one value has nothing to dilate.

    shape: of the weight, [C_out, C_in / groups, *kernel]. dilation: of the layer, returned where torch does so anyway, or
    where its own kernel is faster.
    """
    kernel = shape[2:]
    if tuple(kernel[-2:]) != (1, 1) or {*stride, *dilation} != {1}:
        return dilation
    over_time = kernel[0] > 1
    if not over_time and math.prod(shape) < FEWEST:
        return dilation
    return tuple(2 if size == 1 else 1 for size in kernel)
