"""Layers over two frequencies that keep state or change size; stateless ones (ReLU, dropout) go through `lift`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from octvideo.octave.feature import (
    Feature,
    Octave,
    Parts,
    channel_order,
    global_average_pool,
    low_size,
    require_feature,
    split_channels,
)
from octvideo.octave.sync import normalize, several_processes, shared_statistics


class _OctBatchNorm(_BatchNorm):
    """One vector per statistic, as in the vanilla norm; its first part normalizes high, the rest low.

    parts: in place of alpha for a concatenation, (high, low) channels of each part; the vectors stay in the vanilla
    order, part by part. order: where the channels of the maps, high before low, stand in the vectors; None: likewise.
    synchronized: in training, statistics are those of all processes' batches (`synchronize_norms`).
    """

    order: Tensor | None
    synchronized = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float = 0.0,
        parts: Parts | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._split(alpha, parts)

    def _split(self, alpha: float, parts: Parts | None) -> None:
        self.high, self.low = split_channels(self.num_features, alpha)
        if parts is not None:
            self.high, self.low = sum(high for high, _ in parts), sum(low for _, low in parts)
            if self.high + self.low != self.num_features:
                raise ValueError(f"{type(self).__name__}: parts {parts} do not add up to {self.num_features} channels")
        self.alpha = self.low / self.num_features if parts else float(alpha)
        self.register_buffer("order", channel_order(parts or ((self.high, self.low),)), persistent=False)

    def forward(self, x: Feature, *, high_only: bool = False) -> Feature:  # type: ignore[override]
        """x: [N, C, ...] when alpha gives no low channels, else Octave of C_high + C_low channels.

        high_only: x is [N, C_high, ...] and low is left alone.
        """
        if high_only:
            assert isinstance(x, Tensor)
            return self._normalize_maps((x,), (slice(0, self.high),))[0]
        if not isinstance(x, Octave) and not self.low:
            if self._shares() or (self.momentum is None and torch.compiler.is_compiling()):
                self._check_input_dim(x)
                return self._normalize_maps((x,), (slice(None),))[0]
            return super().forward(x)
        if not isinstance(x, Octave) or (x.high.shape[1], x.low.shape[1]) != (self.high, self.low):
            require_feature(x, self.high, self.low, (1,) * (_first(x).dim() - 2), type(self).__name__)
        assert isinstance(x, Octave)
        self._check_input_dim(x.high)
        self._check_input_dim(x.low)
        highs: slice | Tensor = slice(0, self.high)
        lows: slice | Tensor = slice(self.high, None)
        if self.order is not None:
            highs, lows = self.order[highs], self.order[lows]
        if not self.high:
            return Octave(x.high, *self._normalize_maps((x.low,), (lows,)))
        return Octave(*self._normalize_maps((x.high, x.low), (highs, lows)))

    def normalize_high(self, x: Tensor) -> Tensor:
        """[N, C_high, ...] -> the same, where only the high frequency is at hand (the output of a non-local block)."""
        return self(x, high_only=True)  # a call, so that hooks see it

    def _shares(self) -> bool:
        """Do other processes' batches count in this call?"""
        return self.synchronized and self.training and several_processes()

    def _normalize_maps(self, maps: tuple[Tensor, ...], parts: tuple[slice | Tensor, ...]) -> tuple[Tensor, ...]:
        """parts: where the vectors hold each map's channels."""
        momentum = self._step_momentum()
        if self._shares():
            return self._normalize_together(maps, parts, momentum)
        vectors = (self._per_map(self.weight, parts), self._per_map(self.bias, parts))
        return tuple(self._normalize(*arguments, momentum) for arguments in zip(maps, parts, *vectors, strict=True))

    def _per_map(self, vector: Tensor | None, parts: tuple[slice | Tensor, ...]) -> Sequence[Tensor | None]:
        """Return the values of `vector` for each map, as one split: the gradient of each slice would fill one with zeros."""
        if vector is None:
            return (None,) * len(parts)
        if len(parts) == 2 and self.order is None:
            return vector.split((self.high, self.low))
        return [vector[part] for part in parts]

    def _step_momentum(self) -> float | Tensor:
        """The momentum of this call; momentum None means a cumulative average, as in the parent.

        That is a tensor: to read the number of batches would wait for the device, and break a compiler's graph.
        """
        if not (self.training and self.track_running_stats):
            return self.momentum or 0.0
        assert self.num_batches_tracked is not None and self.running_mean is not None
        self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            return self.momentum
        return self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()

    def _normalize(
        self, x: Tensor, part: slice | Tensor, weight: Tensor | None, bias: Tensor | None, momentum: float | Tensor
    ) -> Tensor:
        # As the parent: running statistics are updated if tracked, and used in evaluation wherever there are any.
        mean, var = self.running_mean, self.running_var
        known = mean is not None and var is not None
        given = known and (not self.training or self.track_running_stats)
        own_mean, own_var = (mean[part], var[part]) if given else (None, None)  # type: ignore[index]
        seen_mean, seen_var, factor = own_mean, own_var, momentum
        if isinstance(momentum, Tensor):  # which batch_norm does not take: it gives the batch's statistics as they are
            seen_mean, seen_var, factor = own_mean.clone(), own_var.clone(), 1.0  # type: ignore[union-attr]
        y = F.batch_norm(
            x,
            seen_mean,
            seen_var,
            weight,
            bias,
            self.training or not known,
            factor,  # type: ignore[arg-type]
            self.eps,
        )
        if isinstance(momentum, Tensor):
            own_mean.lerp_(seen_mean, momentum)  # type: ignore[union-attr, arg-type]
            own_var.lerp_(seen_var, momentum)  # type: ignore[union-attr, arg-type]
        if isinstance(part, Tensor) and self.training and given:
            mean[part], var[part] = own_mean, own_var  # type: ignore[index, assignment]  # an index copies, a slice does not
        return y

    def _normalize_together(
        self, maps: tuple[Tensor, ...], parts: tuple[slice | Tensor, ...], momentum: float | Tensor
    ) -> tuple[Tensor, ...]:
        mean, var, count = shared_statistics(maps)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            unbiased = var * count / (count - 1).clamp(min=1.0)
            for running, seen in ((self.running_mean, mean), (self.running_var, unbiased)):
                for part, own in zip(parts, seen.split([x.shape[1] for x in maps]), strict=True):
                    running[part] = running[part].lerp(own.to(running.dtype), momentum)
        weight, bias = (
            torch.cat([p[part] for part in parts]) if self.affine else None for p in (self.weight, self.bias)
        )
        return normalize(maps, mean, var, count, weight, bias, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}"


def _first(x: Feature) -> Tensor:
    return x.high if isinstance(x, Octave) else x


class OctBatchNorm2d(_OctBatchNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d over two frequencies; same state dict. alpha: share of low channels."""


class OctBatchNorm3d(_OctBatchNorm, nn.BatchNorm3d):
    """nn.BatchNorm3d over two frequencies; same state dict. alpha: share of low channels."""


def synchronize_norms(model: nn.Module) -> None:
    """In training, from now on, norms of `model` use the statistics of all processes' batches, each frequency its own.

    Running statistics are then the same on all ranks. Alone, or in evaluation, nothing changes. Every rank must call
    the same norms in the same order; batches may differ in size.
    Raises TypeError for a norm that would go on by itself.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, _OctBatchNorm):
            raise TypeError(f"{name} is a {type(module).__name__}; only OctBatchNorm2d and OctBatchNorm3d synchronize")
        if isinstance(module, _OctBatchNorm):
            module.synchronized = True


class SqueezeExcite(nn.Module):
    """x * sigmoid(fc2(relu(fc1(mean of x)))) per channel (Hu et al., arXiv 1709.01507).

    Two frequencies are squeezed together, each channel by its own mean, and excited apart: the linear layers are the
    vanilla ones. x: [N, C, ...] or Octave of C channels -> the same. mid: width of the squeeze.
    """

    def __init__(self, channels: int, mid: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, mid)
        self.fc2 = nn.Linear(mid, channels)

    def forward(self, x: Feature) -> Feature:
        gate = self.fc2(self.fc1(global_average_pool(x)).relu()).sigmoid()  # [N, C]
        if not isinstance(x, Octave):
            return x * gate[(...,) + (None,) * (x.dim() - 2)]
        gate = gate[(...,) + (None,) * (x.high.dim() - 2)]
        high, low = gate.split((x.high.shape[1], x.low.shape[1]), dim=1)
        return Octave(x.high * high, x.low * low)


def max_pool(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], *, ceil_mode: bool = False
) -> Tensor:
    """Max-pool [N, C, (T,) H, W] as torch does; windows over space or over time alone by the pooling of images.

    That keeps channels last on GPUs, and its gradient is deterministic there in every version of torch.
    """
    if len(kernel) == 2:
        return F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)
    if (kernel[1:], stride[1:], padding[1:]) == ((1, 1), (1, 1), (0, 0)):
        # [N, C, T, H, W] -> [N, C, T, H*W], a view in both memory formats
        time = ((values[0], own) for values, own in zip((kernel, stride, padding), (1, 1, 0), strict=True))
        return max_pool(x.flatten(3), *time, ceil_mode=ceil_mode).unflatten(3, x.shape[3:])
    if (kernel[0], stride[0], padding[0]) != (1, 1, 0):
        return F.max_pool3d(x, kernel, stride, padding, ceil_mode=ceil_mode)
    space = (kernel[1:], stride[1:], padding[1:])
    if x.stride(1) == 1:
        # [N, C, T, H, W] -> [N*T, C, H, W] is a view of this layout, and so is the way back
        pooled = max_pool(x.transpose(1, 2).flatten(0, 1), *space, ceil_mode=ceil_mode)
        return pooled.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    # [N, C, T, H, W] -> [N, C*T, H, W]
    return max_pool(x.flatten(1, 2), *space, ceil_mode=ceil_mode).unflatten(1, x.shape[1:3])


class _OctMaxPool(nn.Module):
    """Max pooling of each frequency. The low map is cropped to the size that belongs to the pooled high map."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def __init__(
        self,
        kernel_size: Sequence[int],
        stride: Sequence[int] | None = None,
        padding: Sequence[int] | None = None,
        *,
        pool: Sequence[int],
    ) -> None:
        super().__init__()
        self.kernel_size = tuple(kernel_size)
        self.stride = tuple(stride or kernel_size)
        self.padding = tuple(padding or (0,) * len(self.kernel_size))
        self.pool = tuple(pool)

    def forward(self, x: Feature) -> Feature:
        if not isinstance(x, Octave):
            return self._max_pool(x, ceil_mode=False)
        name = type(self).__name__
        require_feature(x, x.high.shape[1], x.low.shape[1], self.pool, name)
        high = self._max_pool(x.high, ceil_mode=False)
        # A short low map still has a window to give in ceil_mode where floor would leave none (T_high = 2).
        low = self._max_pool(x.low, ceil_mode=True)
        for axis, size in enumerate(low_size(high.shape[2:], self.pool), start=2):
            if low.shape[axis] < size:
                raise ValueError(
                    f"{name} with kernel {self.kernel_size}, stride {self.stride} and padding {self.padding} leaves "
                    f"{tuple(high.shape[2:])} of high and {tuple(low.shape[2:])} of low, which do not belong together"
                )
            low = low.narrow(axis, 0, size)
        return Octave(high, low)

    def _max_pool(self, x: Tensor, ceil_mode: bool) -> Tensor:
        geometry = self.kernel_size, self.stride, self.padding
        if x.shape[1] == 0:
            sizes = zip(x.shape[2:], *geometry, strict=True)
            return x.new_empty(*x.shape[:2], *((size + 2 * p - k) // s + 1 for size, k, s, p in sizes))
        return max_pool(x, *geometry, ceil_mode=ceil_mode)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, pool={self.pool}"


class OctMaxPool2d(_OctMaxPool):
    """Max pooling over (H, W) of one or two frequencies; pool: factor between them."""


class OctMaxPool3d(_OctMaxPool):
    """Max pooling over (T, H, W) of one or two frequencies; pool: factor between them."""
