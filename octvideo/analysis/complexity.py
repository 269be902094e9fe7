"""What a network costs: parameters and multiply-adds, counted on the meta device without memory or arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Complexity:
    """params: number of parameters. macs: multiply-adds of convolutions and linear layers for one input."""

    params: int
    macs: int


def complexity(model: nn.Module, input_size: Sequence[int]) -> Complexity:
    """Count one forward pass of `model` over an input [1, *input_size], e.g. (3, 8, 224, 224).

    The counts come from the convolutions that really run, so octave layers need no formula of their own.
    """
    model = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, *input_size, device="meta"))
    return Complexity(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)
