"""The octave convolution as it is usually written first, to measure what `octave/conv.py` and `octave/fuse.py` gain.

Four convolutions with a weight each, a pooling in front of every one that wants it, F.interpolate, two sums, and a norm
per frequency. The outputs are those of the network it is made from; only time and memory differ.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from octvideo.octave import GlobalReasoning, NonLocal, Octave, average_pool, upsample
from octvideo.octave.conv import _OctConv
from octvideo.octave.feature import Feature
from octvideo.octave.layers import _OctBatchNorm


def naive(model: nn.Module) -> nn.Module:
    """A copy of `model` with the same outputs, in evaluation and training, but other parameters.

    Octave convolutions become NaiveOctConv, norms over two frequencies NaiveNorm; what stands within an attention unit
    stays, and so does every layer of one frequency.
    """
    return _written_naively(copy.deepcopy(model))


def _written_naively(module: nn.Module) -> nn.Module:
    """`module` itself, changed in place, or what takes its place."""
    if isinstance(module, _OctConv) and (module.in_low or module.out_low):
        return NaiveOctConv(module).train(module.training)
    if isinstance(module, _OctBatchNorm) and module.low:
        return NaiveNorm(module).train(module.training)
    if not isinstance(module, NonLocal | GlobalReasoning):
        for name, child in module.named_children():
            setattr(module, name, _written_naively(child))
    return module


class NaiveOctConv(nn.Module):
    """Y_H = f(X_H; W_HH) + upsample(f(X_L; W_LH)), Y_L = f(X_L; W_LL) + f(pool(X_H); W_HL), path by path.

    A path is None where one of its sides has no channels, and between the frequencies of a depthwise layer.
    """

    def __init__(self, conv: _OctConv) -> None:
        super().__init__()
        self.pool, self.stride, self.pooled = conv.pool, conv.stride, conv._pooled
        self.pooled_to_high = conv._low_pooled
        weight = conv.weight if conv.in_order is None else conv.weight[:, conv.in_order]
        bias, in_high, in_low = conv.bias, conv.in_high, conv.in_low
        rows = {"high": slice(0, conv.out_high), "low": slice(conv.out_high, None)}
        columns = {"high": slice(0, in_high // conv.groups), "low": slice(in_high // conv.groups, None)}
        if conv.depthwise:
            columns = dict.fromkeys(columns, slice(None))  # one for every channel, whatever its frequency

        def path(source: str, target: str) -> nn.Module | None:
            if conv.depthwise and source != target:
                return None
            own = weight[rows[target], columns[source]]
            first = source == "high" or not in_high or conv.depthwise  # the path that carries the target's bias
            own_bias = bias[rows[target]] if bias is not None and first else None
            return _convolution(conv, own, own_bias, in_high if source == "high" else in_low)

        self.high_to_high, self.high_to_low = path("high", "high"), path("high", "low")
        self.low_to_high, self.low_to_low = path("low", "high"), path("low", "low")

    def forward(self, x: Feature) -> Feature:
        """As that of OctConv2d and OctConv3d."""
        high, low = x if isinstance(x, Octave) else (x, x)  # of one frequency: no path reads low
        y_high = y_low = None
        if self.high_to_high is not None:
            y_high = self.high_to_high(average_pool(high, self.pooled))
        if self.high_to_low is not None:
            y_low = self.high_to_low(average_pool(average_pool(high, self.pooled), self.pool))
        if self.low_to_high is not None:
            y = self.low_to_high(average_pool(low, self.pooled_to_high))
            y = upsample(y, self._high_size(high, y))
            y_high = y if y_high is None else y_high + y
        if self.low_to_low is not None:
            y = self.low_to_low(average_pool(low, self.pooled))
            y_low = y if y_low is None else y_low + y
        if y_low is None:
            assert y_high is not None
            return y_high
        if y_high is None:
            y_high = y_low.new_empty(y_low.shape[0], 0, *self._high_size(high, y_low))
        return Octave(y_high, y_low)

    def _high_size(self, high: Tensor, y: Tensor) -> tuple[int, ...]:
        """y: an output at low's resolution, which is high's where it is not pooled."""
        axes = zip(high.shape[2:], y.shape[2:], self.stride, self.pool, strict=True)
        return tuple(-(-size // s) if p > 1 else own for size, own, s, p in axes)


def _convolution(conv: _OctConv, weight: Tensor, bias: Tensor | None, in_channels: int) -> nn.Module | None:
    """torch's own, with copies of these values; None where there is nothing to convolve."""
    if not weight.numel() or not in_channels:
        return None
    kind: Any = nn.Conv3d if isinstance(conv, nn.Conv3d) else nn.Conv2d
    own = kind(
        in_channels,
        weight.shape[0],
        conv.kernel_size,
        conv._step,
        conv.padding,
        conv.dilation,
        in_channels if conv.depthwise else conv.groups,
        bias is not None,
        conv.padding_mode,
        device="meta",
    )
    own.weight = nn.Parameter(weight.detach().clone())
    own.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return own


class NaiveNorm(nn.Module):
    """A batch norm for each frequency."""

    def __init__(self, norm: _OctBatchNorm) -> None:
        super().__init__()
        highs: slice | Tensor = slice(0, norm.high)
        lows: slice | Tensor = slice(norm.high, None)
        if norm.order is not None:
            highs, lows = norm.order[highs], norm.order[lows]
        self.high = _batch_norm(norm, highs, norm.high) if norm.high else nn.Identity()
        self.low = _batch_norm(norm, lows, norm.low)

    def forward(self, x: Octave) -> Octave:
        return Octave(self.high(x.high), self.low(x.low))


def _batch_norm(norm: _OctBatchNorm, part: slice | Tensor, channels: int) -> nn.Module:
    kind = nn.BatchNorm3d if isinstance(norm, nn.BatchNorm3d) else nn.BatchNorm2d
    own = kind(channels, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    state = {name: value[part] if value.dim() else value for name, value in norm.state_dict().items()}
    own.load_state_dict(state)
    return own.to(norm.weight.device if norm.affine else None)
