"""Batch norm by the statistics of all processes' batches together, on any device (torch's SyncBatchNorm refuses CPUs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def several_processes() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def shared_statistics(maps: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values of each channel over all ranks.

    maps: [N, C_i, ...], those of one norm -> three float64 [C], C the sum of the C_i; bit for bit the same on all ranks.
    All maps travel together, in one gathering, which every rank takes part in, also with an empty batch. Counts may
    differ between ranks: means and sums of squares about them are combined (Chan et al., 1979), not sums of squares.
    """
    own = torch.cat([_own_statistics(x) for x in maps], dim=1)  # [3, C]
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    counts, means, squares = torch.stack(gathered, dim=1)  # [R, C] each, R ranks
    count = counts.sum(0).clamp(min=1.0)
    mean = (counts * means).sum(0) / count
    return mean, (squares + counts * (means - mean).square()).sum(0) / count, count


def _own_statistics(x: Tensor) -> Tensor:
    """Count, mean and sum of squares about the mean of each channel of this rank: [N, C, ...] -> float64 [3, C]."""
    if not x.numel():
        return x.new_zeros(3, x.shape[1], dtype=torch.float64)
    count = x.numel() // x.shape[1]
    var, mean = torch.var_mean(x.to(_wide(x)), [0, *range(2, x.dim())], correction=0)
    return torch.stack([torch.full_like(mean, count).double(), mean.double(), count * var.double()])


def _wide(x: Tensor) -> torch.dtype:
    """Of statistics and products: float32 for half precision too."""
    return torch.promote_types(x.dtype, torch.float32)


def normalize(
    maps: tuple[Tensor, ...],
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """(x - mean) / sqrt(var + eps) * weight + bias of each map, statistics as `shared_statistics` gives them.

    The gradient knows that mean and var came from all ranks' maps. Those of weight and bias are this rank's share, as
    any other layer's: DistributedDataParallel averages them.
    """
    wide = _wide(maps[0])
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    return _Normalize.apply(mean.to(wide), var.to(wide), count.to(wide), weight, bias, eps, *maps)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        *maps: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(mean, var, count, weight, *maps)
        ctx.eps = eps
        sizes = [x.shape[1] for x in maps]
        parts = zip(maps, *(_split(vector, sizes) for vector in (mean, var, weight, bias)), strict=True)
        return tuple(_affine(eps, *part) for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, count, weight, *maps = ctx.saved_tensors
        sizes = [x.shape[1] for x in maps]
        # Of each channel: the sums of dy and of dy * (x - mean) / std, which are the gradients of bias and weight.
        parts = zip(grads, maps, _split(mean, sizes), _split(var, sizes), strict=True)
        own = torch.cat([_gradient_sums(ctx.eps, *part) for part in parts], dim=1)
        grad_bias, grad_weight = (None, None) if weight is None else own
        grad_maps: list[Tensor | None] = [None] * len(maps)
        if any(ctx.needs_input_grad[6:]):
            sums = own.to(torch.float64, copy=True)  # own goes out as it is
            dist.all_reduce(sums)
            scale = (var + ctx.eps).rsqrt() * (1.0 if weight is None else weight)
            # dx = scale * dy - scale / count * (sums[0] + sums[1] * (x - mean) / std)
            shift, slope = (-scale * sums.to(scale.dtype) / count).unbind()
            vectors = (_split(vector, sizes) for vector in (mean, var, slope, shift, scale))
            grad_maps = [_gradient(ctx.eps, *part) for part in zip(grads, maps, *vectors, strict=True)]
        return None, None, None, grad_weight, grad_bias, None, *grad_maps


def _split(vector: Tensor | None, sizes: list[int]) -> Sequence[Any]:
    """The part of each map."""
    return (None,) * len(sizes) if vector is None else vector.split(sizes)


def _affine(eps: float, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if not x.numel():
        return torch.empty_like(x)
    return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)


def _gradient_sums(eps: float, grad: Tensor, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """-> [2, C]; in one pass and without a map's worth of memory, as the backward pass of a frozen norm."""
    if not x.numel():
        return mean.new_zeros(2, x.shape[1])
    _, weight, bias = torch.ops.aten.native_batch_norm_backward(
        grad, x, torch.ones_like(mean), mean, var, None, None, False, eps, [False, True, True]
    )
    return torch.stack([bias, weight])


def _gradient(
    eps: float, grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, slope: Tensor, shift: Tensor, scale: Tensor
) -> Tensor:
    if not x.numel():
        return torch.empty_like(x)
    scale = scale.to(x.dtype)[(...,) + (None,) * (x.dim() - 2)]
    return _affine(eps, x, mean, var, slope, shift).addcmul_(grad, scale)
