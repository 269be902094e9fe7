"""torch.compile, block by block: what repeats is compiled once."""

from __future__ import annotations

import torch
from torch import nn

from octvideo.models.recompute import Blocks


def compile_blocks(model: nn.Module, *, cuda_graphs: bool = False, backend: str = "inductor") -> int:
    """Compile the blocks of `model` in place and return their number; they are compiled when they first run.

    A block is each child of a stage, the stem, a lateral connection, the classifier; a network without stages is one
    block. What has no weights, such as a max-pool, stays eager. Blocks of equal structure and input share one
    compilation, so a ResNet takes a fraction of the time of its complete graph. Names in the state dict stay the same.

    cuda_graphs: record each block's kernels as CUDA graphs and replay them, so that a step costs the host little. Input
    shapes must then stay the same, and outputs of a forward pass are overwritten by the next one.
    """
    blocks = [block for block in _blocks(model) if any(True for _ in block.parameters())]
    # Dynamo limits the variants of one code; a deep network has more than 8 kinds of blocks, each for several batch shapes.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(blocks))
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, 16 * len(blocks)
    )
    for block in blocks:
        block.compile(backend=backend, dynamic=False, options={"triton.cudagraphs": True} if cuda_graphs else None)
    if cuda_graphs:
        model.register_forward_pre_hook(_begin_step)
    return len(blocks)


def _begin_step(*_: object) -> None:
    """Declare the outputs of the forward pass before this one as no longer needed."""
    torch.compiler.cudagraph_mark_step_begin()


def _blocks(module: nn.Module) -> list[nn.Module]:
    container = isinstance(module, nn.ModuleDict | nn.ModuleList)
    if not container and not any(isinstance(part, Blocks) for part in module.modules()):
        return [module]
    return [block for child in module.children() for block in _blocks(child)]
