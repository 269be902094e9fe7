"""Norms' statistics over many batches at the weights of now, in place of moving averages over weights of the past."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from octvideo.engine.distributed import all_reduce
from octvideo.engine.nonfinite import NonFiniteError


@torch.no_grad()
def precise_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set running_mean and running_var of every norm to mean and (unbiased) variance of all that it reads in `batches`.

    Per channel, so per frequency in an octave norm, over the batches of all ranks; each rank gives its own `batches`
    (network inputs on the device), and all as many. As in training, each batch is normalized by its own statistics.
    The variance is that of all values together, E[var of a batch] + Var[mean of a batch] (law of total variance): the
    mean of the batches' variances, which fvcore's precise BN takes, leaves the second part out.

    All else stays: weights, num_batches_tracked, modes, random states (dropout is off). Whatever `batches` raises
    leaves the model as it was. Raises ValueError where there is no batch, NonFiniteError where a norm reads values that
    are not finite.
    """
    norms = [(name, norm) for name, norm in model.named_modules() if isinstance(norm, _BatchNorm)]
    pools = {name: _Pool(norm) for name, norm in norms if norm.running_mean is not None}
    seen = 0
    with _measuring(model, list(pools.values())):
        for batch in batches:
            model(batch)
            seen += 1
    if not seen:
        raise ValueError("no batches to take norms' statistics of")
    _pool_ranks(list(pools.values()))
    for name, pool in pools.items():
        if not pool.pooled.isfinite().all():
            raise NonFiniteError(f"norm {name} reads values that are not finite; all statistics stay as they were")
    for pool in pools.values():
        pool.apply()


class _Pool:
    """What the channels of a norm have read: float64 [3, C], count, mean and sum of squares about the mean, in the order
    of the norm's vectors. A norm that reads several maps (high, low) says by `order` where their channels stand there.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        assert norm.running_mean is not None
        self.norm = norm
        self.pooled = norm.running_mean.new_zeros(3, norm.num_features, dtype=torch.float64)

    def read(self, _norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A pre-hook. inputs: (x,), a map [N, C, ...] or a tuple of maps; of fewer channels than C, the first."""
        maps = [inputs[0]] if isinstance(inputs[0], Tensor) else inputs[0]
        own = torch.cat([_statistics(x) for x in maps], dim=1)
        order = getattr(self.norm, "order", None)
        places = slice(0, own.shape[1]) if order is None else order
        self.pooled[:, places] = _joined(self.pooled[:, places], own)

    def apply(self) -> None:
        """To the norm; a channel that read nothing (low ones behind a non-local block) keeps what it has."""
        count, mean, squares = self.pooled
        values = (mean, squares / (count - 1).clamp(min=1.0))
        for running, value in zip((self.norm.running_mean, self.norm.running_var), values, strict=True):
            assert running is not None
            running.copy_(torch.where(count > 1, value.to(running.dtype), running))


def _statistics(x: Tensor) -> Tensor:
    """Count, mean and sum of squares about the mean of each channel: [N, C, ...] -> float64 [3, C]."""
    if not x.numel():
        return x.new_zeros(3, x.shape[1], dtype=torch.float64)
    var, mean = torch.var_mean(x.double(), [0, *range(2, x.dim())], correction=0)
    count = torch.full_like(mean, x.numel() // x.shape[1])
    return torch.stack([count, mean, count * var])


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """Those of two sets of values -> those of their union (Chan et al., 1979)."""
    count, moved = a[0] + b[0], b[1] - a[1]
    share = b[0] / count.clamp(min=1.0)
    return torch.stack([count, a[1] + moved * share, a[2] + b[2] + moved.square() * a[0] * share])


@contextmanager
def _measuring(model: nn.Module, pools: list[_Pool]) -> Iterator[None]:
    """Inside, norms normalize by their batch, tell their pools what they read, and leave their buffers alone."""
    modes = [(module, module.training) for module in model.modules()]
    tracks = [(pool.norm, pool.norm.track_running_stats) for pool in pools]
    hooks = [pool.norm.register_forward_pre_hook(pool.read) for pool in pools]
    try:
        model.eval()
        for norm, _ in tracks:
            norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
        for norm, track in tracks:
            norm.track_running_stats = track


def _pool_ranks(pools: list[_Pool]) -> None:
    """The pools of all ranks together, in two sums for all norms."""
    if not pools:
        return
    count, mean, squares = torch.cat([pool.pooled for pool in pools], dim=1)
    total, summed = all_reduce(torch.stack([count, count * mean]))
    common = summed / total.clamp(min=1.0)
    squares = all_reduce(squares + count * (mean - common).square())
    joined = torch.stack([total, common, squares]).split([pool.norm.num_features for pool in pools], dim=1)
    for pool, pooled in zip(pools, joined, strict=True):
        pool.pooled = pooled
