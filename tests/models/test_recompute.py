"""Activation checkpointing: the same bits, less memory."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from octvideo.models import NETWORKS, ResNetSpec, SlowFastSpec, Spec, checkpoint_activations, create, with_octave
from octvideo.models.recompute import Blocks

from .shallow import cut

KINDS = {
    "i3d_tiny": 0.0,
    "c2d_tiny": 0.5,
    "i3d_nl_r50": 0.25,
    "slowfast_4x16_r50": 0.25,
    "resnet50": 0.25,  # pre-activation
    "se_resnet152_v1e": 0.125,  # norms without parameters
    "resnet50_glore": 0.25,
    "densenet121": 0.25,
    "mobilenet_v1_1.0": 0.25,
    "mobilenet_v2_1.0": 0.25,
}


def images(spec: Spec) -> torch.Tensor:
    frames = (16,) if isinstance(spec, SlowFastSpec) else (4,) if spec.dims == 3 else ()
    return torch.randn(2, 3, *frames, 32, 32, generator=torch.Generator().manual_seed(1))


def train(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Two steps -> losses, gradients, every tensor of the state."""
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.1), []
    torch.manual_seed(2)  # dropout
    for _ in range(2):
        optimizer.zero_grad()
        loss = net.train()(x).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in net.parameters()), *net.state_dict().values(), torch.get_rng_state()]


@pytest.mark.parametrize("name", KINDS)
def test_every_bit_stays_in_every_kind_of_network(name: str) -> None:
    spec = cut(with_octave(NETWORKS[name](5, dropout=0.5), KINDS[name]), keep=1)
    torch.manual_seed(0)
    kept = create(spec)
    recomputed = copy.deepcopy(kept)
    checkpoint_activations(recomputed)
    assert list(recomputed.state_dict()) == list(kept.state_dict())
    calls = []
    for blocks in (module for module in recomputed.modules() if isinstance(module, Blocks)):
        blocks[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    a, b = train(kept, images(spec)), train(recomputed, images(spec))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    # Each first block twice a step; in its second time it may stop before its end, where all is there again.
    assert len(calls) >= 2 * sum(isinstance(module, Blocks) for module in recomputed.modules())
    buffers = [buffer for name, buffer in recomputed.named_buffers() if name.endswith("num_batches_tracked")]
    assert {int(buffer) for buffer in buffers} == {2}


def test_dropout_within_a_block_draws_the_same_again() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    kept = Blocks(block, copy.deepcopy(block))
    recomputed = copy.deepcopy(kept)
    checkpoint_activations(recomputed)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(train(kept, x), train(recomputed, x), strict=True))


class Held(TorchDispatchMode):
    """Memory that operations took and that is still in use, without the model's own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.own = {tensor.untyped_storage()._cdata for tensor in (*net.parameters(), *net.buffers())}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.own:
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def bytes(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def held_for_backward(net: nn.Module, x: torch.Tensor) -> int:
    with Held(net) as held:
        logits = net(x)
        assert logits.requires_grad  # and so is the graph behind it alive
        return held.bytes()


@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_a_third_of_the_memory_or_less_is_held_between_the_passes(alpha: float) -> None:
    spec = NETWORKS["i3d_tiny"](5)
    assert isinstance(spec, ResNetSpec)
    stages = tuple(replace(stage, temporal_kernels=(3, 1, 3, 1)) for stage in spec.stages)
    net = create(with_octave(replace(spec, stages=stages), alpha)).train()
    x = torch.randn(2, 3, 4, 64, 64)
    stem = held_for_backward(net.stem, x)  # kept in both
    kept = held_for_backward(net, x) - stem
    checkpoint_activations(net)
    assert held_for_backward(net, x) - stem < kept / 3


def test_no_gradient_no_second_time() -> None:
    net = create(NETWORKS["c2d_tiny"](5)).eval()
    x = torch.randn(1, 3, 4, 32, 32)
    expected = net(x)
    checkpoint_activations(net)
    with torch.no_grad():
        assert torch.equal(net(x), expected) and torch.equal(net.train().eval()(x), expected)


def test_it_compiles_to_one_graph() -> None:
    net = create(with_octave(NETWORKS["i3d_tiny"](5), 0.25)).train()
    checkpoint_activations(net)
    torch.compile(net, fullgraph=True, backend="eager")(torch.randn(2, 3, 4, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_model_without_blocks() -> None:
    with pytest.raises(TypeError, match="Linear has no Blocks"):
        checkpoint_activations(nn.Linear(2, 2))
