"""What a training step keeps for its backward pass, against the law: an octave map has (1 - alpha) + alpha / prod(pool) of
the vanilla map's values (paper, table 1)."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from octvideo.models import NETWORKS, with_octave
from octvideo.models.blocks import split, stage
from octvideo.octave import Feature, Octave
from octvideo.octave.feature import low_size


def kept(module: nn.Module, x: Feature) -> int:
    """Bytes that autograd keeps of a forward pass, each storage once, without weights and statistics, there anyway."""
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    sizes: dict[int, int] = {}
    alive = []  # or the next map may take the place of one that is gone

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        module(x)
    return sum(sizes.values())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("name", "pool", "alphas"),
    [
        ("i3d_tiny", (1, 2, 2), (0.125, 0.25, 0.5, 0.75)),
        ("i3d_tiny", (2, 2, 2), (0.125, 0.25, 0.5, 0.75)),
        ("resnet50_v1b", (2, 2), (0.125, 0.25, 0.5, 0.75)),
        ("resnet50", (2, 2), (0.125, 0.25, 0.5)),
        ("se_resnet50", (2, 2), (0.125, 0.25, 0.5)),
        ("resnext50_32x4d", (2, 2), (0.25, 0.5)),
    ],
)
def test_two_blocks_keep_what_the_law_says(
    name: str, pool: tuple[int, ...], alphas: tuple[float, ...], channels_last: bool
) -> None:
    spec = NETWORKS[name](10)
    size, width = (4, 16, 16)[-spec.dims :], 128 if spec.stages[1].groups > 1 else 64
    layout = (
        {2: torch.channels_last, 3: torch.channels_last_3d}[spec.dims] if channels_last else torch.contiguous_format
    )

    def bytes_of(alpha: float) -> int:
        octave = with_octave(spec, alpha, pool=pool)
        part = replace(octave.stages[1], width=width, channels=128, temporal_kernels=(3 if spec.dims == 3 else 1, 1))
        module = stage(octave, part, split(octave, 64, alpha)).to(memory_format=layout)
        (high, low) = split(octave, 64, alpha)[0]
        maps = [torch.randn(2, high, *size), torch.randn(2, low, *low_size(size, pool))]
        maps = [x.contiguous(memory_format=layout) for x in maps]
        return kept(module, Octave(*maps) if low else maps[0])

    vanilla = bytes_of(0.0)
    assert vanilla > 3 * 2 * 64 * math.prod(size) * 4  # three maps and more, in float32
    for alpha in alphas:
        law = (1 - alpha) + alpha / math.prod(pool)
        assert bytes_of(alpha) / vanilla == pytest.approx(law, rel=0.05), alpha


@pytest.mark.parametrize(("alpha", "pool"), [(0.25, (1, 2, 2)), (0.5, (2, 2, 2))])
def test_so_do_compiled_blocks(alpha: float, pool: tuple[int, ...]) -> None:
    """With the partitioner that chooses for torch.compile what is kept; by itself it keeps the pooled maps."""
    spec, size = NETWORKS["i3d_tiny"](10), (4, 16, 16)

    def bytes_of(alpha: float) -> int:
        torch._dynamo.reset()
        octave = with_octave(spec, alpha, pool=pool)
        part = replace(octave.stages[1], width=16, channels=32, temporal_kernels=(3,))
        module = stage(octave, part, split(octave, 16, alpha))
        (high, low) = split(octave, 16, alpha)[0]
        maps = [torch.randn(2, high, *size), torch.randn(2, low, *low_size(size, pool))]
        module.compile(fullgraph=True, backend="aot_eager_decomp_partition")
        return kept(module, Octave(*maps) if low else maps[0])

    law = (1 - alpha) + alpha / math.prod(pool)
    assert (
        0.85 * law < bytes_of(alpha) / bytes_of(0.0) < 1.05 * law
    )  # it may compute more maps again than the vanilla one
