"""Activation checkpointing: blocks computed a second time in the backward pass instead of kept (arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.fx
from torch import nn
from torch.utils.checkpoint import checkpoint

from octvideo.octave import Feature


class Blocks(nn.Sequential):
    """The blocks of a stage, one after the other; its state dict is nn.Sequential's.

    recomputed: where gradients are wanted, only each block's input is kept (`checkpoint_activations`). torch.compile
    decides by itself what it keeps; there, recomputed has no say.
    """

    recomputed = False

    def forward(self, x: Feature) -> Feature:
        if not self.recomputed or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        for block in self:
            x = _checkpointed(block, x)
        return x


def checkpoint_activations(model: nn.Module) -> None:
    """From now on, keep of each block of `model`'s stages its input alone for the backward pass, and compute it again there.

    Every number stays bit for bit the same, norms' running statistics and dropout among them.
    Raises TypeError for a model without `Blocks`, or one whose forward passes them by (`octvideo.octave.octavize`).
    """
    traced = isinstance(model, torch.fx.GraphModule)
    stages = [] if traced else [module for module in model.modules() if isinstance(module, Blocks)]
    if not stages:
        raise TypeError(f"{type(model).__name__} has no Blocks, whose activations could be computed again")
    for blocks in stages:
        blocks.recomputed = True


def _checkpointed(block: nn.Module, x: Feature) -> Feature:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _copied_buffers(block)

    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


@contextmanager
def _copied_buffers(block: nn.Module) -> Iterator[None]:
    """Inside, the block has copies of its buffers: norms have counted this batch in their statistics already."""
    own = [(module, dict(module._buffers)) for module in block.modules()]
    try:
        for module, buffers in own:
            module._buffers.update({k: None if v is None else v.clone() for k, v in buffers.items()})
        yield
    finally:
        for module, buffers in own:
            module._buffers.update(buffers)
