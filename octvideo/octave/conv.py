"""OctConv2d and OctConv3d: convolutions over two frequencies with ONE weight of the vanilla shape.

    Y_H = f(X_H; W_HH) + upsample(f(X_L; W_LH))
    Y_L = f(X_L; W_LL) + f(pool(X_H); W_HL)                         (paper, equation 4)

The four kernels are blocks of `weight` [C_out, C_in / groups, *kernel], high channels before low in both:

                 C_in_high   C_in_low
    C_out_high     W_HH        W_LH
    C_out_low      W_HL        W_LL

Each path of a grouped layer has all its groups (the authors' code). So a grouped weight, though of the vanilla shape,
joins other channels than the vanilla layer's: of all layers, it alone does not carry over from one alpha to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.common_types import _size_2_t, _size_3_t
from torch.nn.modules.conv import _ConvNd

from octvideo.octave.feature import (
    Feature,
    Octave,
    Parts,
    average_pool,
    channel_order,
    require_feature,
    split_channels,
)
from octvideo.octave.paths import Path, follow_paths, paths_of

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class _OctConv(_ConvNd):
    """What OctConv2d and OctConv3d share; mixed in before nn.Conv2d / nn.Conv3d."""

    alpha_in: float
    alpha_out: float
    pool: tuple[int, ...]
    pool_stride: bool
    in_order: Tensor | None
    _paths: list[Path]

    def _split(
        self, alpha_in: float, alpha_out: float, in_parts: Parts | None, pool: Sequence[int], pool_stride: bool
    ) -> None:
        name = type(self).__name__
        parts = in_parts or (split_channels(self.in_channels, alpha_in),)
        if sum(map(sum, parts)) != self.in_channels:
            raise ValueError(f"{name}: in_parts {parts} do not add up to {self.in_channels} channels")
        self.in_high, self.in_low = sum(high for high, _ in parts), sum(low for _, low in parts)
        self.alpha_in = self.in_low / self.in_channels if in_parts else float(alpha_in)
        self.alpha_out = float(alpha_out)
        self.register_buffer("in_order", channel_order(parts), persistent=False)
        if self.in_order is not None and self.groups > 1:
            raise ValueError(f"{name}: {self.groups} groups over a concatenation {parts}; give 1 group or one part")
        self.pool = _checked_pool(pool, dims=len(self.kernel_size))
        self.out_high, self.out_low = split_channels(self.out_channels, self.alpha_out)
        self.depthwise = self.groups == self.in_channels > 1
        # What a stride does: pooling before the convolution, or the convolution's own step.
        self.pool_stride, one = pool_stride, (1,) * len(self.stride)
        self._pooled, self._step = (self.stride, one) if pool_stride else (one, self.stride)
        # How low is pooled for L->H: where the stride makes low's resolution the high output's, it is read as it is.
        self._low_pooled = tuple(max(s // p, 1) for s, p in zip(self._pooled, self.pool, strict=True))
        self._pads = self._resolve_padding()
        self._reach = [d * (k - 1) for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        # Are maps padded by `_pads` zeros on either side, as `_convolution_gradients` takes it?
        even = self.padding != "same" or [2 * pad for pad in self._pads] == self._reach
        self._even_zeros = even and self.padding_mode == "zeros"
        self._paths = paths_of(self)
        self._check()

    def _resolve_padding(self) -> tuple[int, ...]:
        if isinstance(self.padding, str):
            same = (d * (k - 1) // 2 for k, d in zip(self.kernel_size, self.dilation, strict=True))
            return tuple(same) if self.padding == "same" else (0,) * len(self.kernel_size)
        return tuple(self.padding)

    def _check(self) -> None:
        name = type(self).__name__
        if any(s not in (1, 2) for s in self._pooled):
            raise ValueError(
                f"{name}: stride {self.stride}; an octave layer strides by pooling, by 1 or 2 per dimension "
                f"(pool_stride=False keeps the convolution's own stride)"
            )
        if not self.in_low and not self.out_low:
            return
        for axis, factor in enumerate(self.pool):
            if factor > 1 and 2 * self._pads[axis] != self._reach[axis]:
                raise ValueError(
                    f"{name}: kernel {self.kernel_size} with padding {self._pads} and dilation {self.dilation} "
                    f"changes the size in dimension {axis}, where low is half of high: the halves would not "
                    f"fit; padding there must be dilation * (kernel - 1) / 2 = {self._reach[axis] / 2:g}"
                )
        splits = (self.in_high, self.in_low, self.out_high, self.out_low)
        if self.depthwise:
            multiplier = self.out_channels // self.in_channels
            if (self.out_high, self.out_low) != (multiplier * self.in_high, multiplier * self.in_low):
                raise ValueError(
                    f"{name}: a depthwise layer has no paths between frequencies, so its output splits as its "
                    f"input does; in {self.in_high} + {self.in_low} channels (alpha_in {self.alpha_in}), "
                    f"out {self.out_high} + {self.out_low} (alpha_out {self.alpha_out})"
                )
        elif any(channels % self.groups for channels in splits):
            raise ValueError(
                f"{name}: {self.groups} groups do not divide the split of in {self.in_high} + {self.in_low} and "
                f"out {self.out_high} + {self.out_low} channels (high + low; alpha_in {self.alpha_in}, "
                f"alpha_out {self.alpha_out})"
            )

    def forward(self, x: Feature) -> Feature:
        """x: [N, C_in, ...] when alpha_in gives no low channels, else Octave; returns likewise for alpha_out.

        Stride 2 is a 2-wide average pooling before a convolution of stride 1 (the authors' code), in every octave
        layer, also at alpha 0, unless pool_stride is False.
        """
        one_frequency = not self.in_low and not self.out_low
        if one_frequency and all(s == 1 for s in self._pooled) and isinstance(x, Tensor):
            return self._conv_forward(x, self.weight, self.bias)  # the parent, bit for bit
        require_feature(x, self.in_high, self.in_low, self.pool, type(self).__name__)
        if one_frequency:
            assert isinstance(x, Tensor)
            return self._convolve(average_pool(x, self._pooled), self.weight, self.bias)
        high, low = x if isinstance(x, Octave) else (x, None)
        size = self._output_size(high)
        weight = self.weight if self.in_order is None else self.weight[:, self.in_order]
        y_high, y_low = follow_paths(self, high, low, weight, self.bias, size)
        if not self.out_low:
            assert y_high is not None
            return y_high
        assert y_low is not None
        if y_high is None:
            y_high = y_low.new_empty(y_low.shape[0], 0, *size)
        return Octave(y_high, y_low)

    def _output_size(self, high: Tensor) -> tuple[int, ...]:
        if self.padding == "same":
            return tuple(high.shape[2:])
        geometry = zip(high.shape[2:], self.stride, self._pads, self.kernel_size, self.dilation, strict=True)
        # Pooling and the convolution's step both round up: ceil(size / stride) where the kernel keeps the size.
        if self.pool_stride:
            return tuple(-(-size // s) + 2 * p - d * (k - 1) for size, s, p, k, d in geometry)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, s, p, k, d in geometry)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = F.conv3d if len(self.kernel_size) == 3 else F.conv2d
        # In a depthwise layer every path has one group per channel of its own.
        groups = x.shape[1] if self.depthwise else self.groups
        # "same" goes on by name: an even kernel pads one side more than the other
        padding: str | tuple[int, ...] = "same" if self.padding == "same" else self._pads
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self._pads)
        return convolve(x, weight, bias, self._step, padding, self.dilation, groups)

    def _convolution_gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those that are wanted of `_convolve`'s x, weight and bias. grad: of its output."""
        groups, zeros = x.shape[1] if self.depthwise else self.groups, (0,) * len(self._pads)
        geometry = (self._step, self._pads, self.dilation, False, zeros, groups)
        return torch.ops.aten.convolution_backward(grad, x, weight, [weight.shape[0]], *geometry, wanted)

    def extra_repr(self) -> str:
        stride = "" if self.pool_stride else ", pool_stride=False"
        return f"{super().extra_repr()}, alpha_in={self.alpha_in}, alpha_out={self.alpha_out}, pool={self.pool}{stride}"


def _checked_pool(pool: Sequence[int], dims: int) -> tuple[int, ...]:
    pool = tuple(pool)
    if len(pool) != dims or any(p not in (1, 2) for p in pool) or 2 not in pool:
        raise ValueError(f"pool is {pool}; it gives 1 or 2 for each of {dims} dimensions, with at least one 2")
    return pool


class OctConv2d(_OctConv, nn.Conv2d):  # type: ignore[misc]
    """nn.Conv2d over two frequencies; same parameters, same state dict.

    Args beyond nn.Conv2d's: alpha_in, alpha_out: share of low channels, 0 to 1 (0: a plain tensor on that side).
    in_parts: in place of alpha_in where the input is a concatenation, (high, low) channels of each part; the weight's
    columns stay in the vanilla order, part by part.
    pool: factor between the frequencies in (H, W). pool_stride: stride by average pooling (the paper's form, 1 or 2 per
    dimension) or, if False, by the convolutions' own stride.
    Raises ValueError for what cannot work: a split that groups do not divide, stride above 2, padding that changes
    a pooled dimension, alpha out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha_in: float = 0.0,
        alpha_out: float = 0.0,
        in_parts: Parts | None = None,
        pool: Sequence[int] = (2, 2),
        pool_stride: bool = True,
    ) -> None:
        nn.Conv2d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._split(alpha_in, alpha_out, in_parts, pool, pool_stride)


class OctConv3d(_OctConv, nn.Conv3d):  # type: ignore[misc]
    """nn.Conv3d over two frequencies; same parameters, same state dict.

    Args beyond nn.Conv3d's: alpha_in, alpha_out: share of low channels, 0 to 1 (0: a plain tensor on that side).
    in_parts: in place of alpha_in where the input is a concatenation, (high, low) channels of each part; the weight's
    columns stay in the vanilla order, part by part.
    pool: factor between the frequencies in (T, H, W): (1, 2, 2) is the paper's spatial octave, (2, 2, 2) the
    temporal-spatial one. pool_stride: stride by average pooling (the paper's form, 1 or 2 per dimension) or, if False,
    by the convolutions' own stride.
    Raises ValueError for what cannot work: a split that groups do not divide, stride above 2, padding that changes
    a pooled dimension, alpha out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_3_t,
        stride: _size_3_t = 1,
        padding: str | _size_3_t = 0,
        dilation: _size_3_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha_in: float = 0.0,
        alpha_out: float = 0.0,
        in_parts: Parts | None = None,
        pool: Sequence[int] = (1, 2, 2),
        pool_stride: bool = True,
    ) -> None:
        nn.Conv3d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._split(alpha_in, alpha_out, in_parts, pool, pool_stride)
