"""SGD's parameter groups and the learning rate as a pure function of progress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn


def sgd(
    model: nn.Module,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    weight_decay_norm: float,
) -> torch.optim.SGD:
    """SGD with `weight_decay` on kernels (2 dimensions and more) and `weight_decay_norm` on norms and biases."""
    kernels = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [
        {"params": kernels, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": weight_decay_norm},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def warmup_cosine(epoch: float, *, epochs: int, base_lr: float, warmup_epochs: float, warmup_lr: float) -> float:
    """Half a cosine from base_lr to 0 over `epochs`; before `warmup_epochs` a line from warmup_lr to its value there.

    epoch: progress, with fractions, so the rate changes at every step. Source: PySlowFast's Kinetics recipe; base 0.1,
    196 epochs, 34 of warm-up from 0.01 give 0.01, 0.0514, 0.0928, 0.05 at epochs 0, 17, 34, 98.
    """

    def cosine(e: float) -> float:
        return base_lr * 0.5 * (1.0 + math.cos(math.pi * e / epochs))

    if epoch >= warmup_epochs:
        return cosine(epoch)
    return warmup_lr + (cosine(warmup_epochs) - warmup_lr) * epoch / warmup_epochs


def steps(epoch: float, *, base_lr: float, milestones: Sequence[float], factor: float = 0.1) -> float:
    """base_lr, multiplied by `factor` at each milestone passed. milestones: epochs, e.g. (44, 88) of 118.

    A milestone that is a number of steps, and so a fraction of an epoch, is met at that step despite rounding.
    """
    return base_lr * factor ** sum(epoch >= milestone - 1e-9 for milestone in milestones)


def milestones_of(iterations: Sequence[float], steps_per_epoch: int) -> tuple[float, ...]:
    """Steps that each rate is held for -> where they end, in epochs; the last one is the length of the run.

    (150_000, 100_000, 50_000), the paper's, at 3666 steps an epoch: 40.92, 68.19 and 81.83 epochs.
    """
    return tuple(total / steps_per_epoch for total in accumulate(iterations))
