"""Every kind of network on a GPU: deterministic mode, activation checkpointing, export."""

import copy
from collections.abc import Iterator

import pytest
import torch

from octvideo.models import NETWORKS, checkpoint_activations, create, with_octave
from octvideo.octave import fuse
from tests.devices import CUDA_ONLY, DEVICES

from .shallow import cut
from .test_recompute import KINDS, images, train


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def network(name: str, dropout: float = 0.0) -> tuple[torch.nn.Module, torch.Tensor]:
    spec = cut(with_octave(NETWORKS[name](5, dropout=dropout), KINDS[name]), keep=1)
    torch.manual_seed(0)
    return create(spec), images(spec)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("device", CUDA_ONLY)
def test_deterministic_steps_are_repeatable(device: str, name: str) -> None:
    net, x = network(name)
    first, second = (train(copy.deepcopy(net).to(device), x.to(device)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(value.isfinite().all() for value in first)


@pytest.mark.parametrize("name", ["i3d_tiny", "i3d_nl_r50", "slowfast_4x16_r50", "resnet50"])
@pytest.mark.parametrize("device", CUDA_ONLY)
def test_recomputed_blocks_have_equal_gradients(device: str, name: str) -> None:
    """Within the rounding of sums whose order is not fixed on a GPU. The dropout's random numbers are the same."""
    net, x = network(name, dropout=0.5)
    kept, recomputed = net.double().to(device), copy.deepcopy(net).double().to(device)
    checkpoint_activations(recomputed)
    x = x.double().to(device)
    torch.testing.assert_close(train(recomputed, x), train(kept, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["as built", "fused"])
@pytest.mark.parametrize("device", DEVICES)
def test_an_exported_network_has_the_same_logits(device: str, form: str) -> None:
    net, x = network("i3d_tiny")
    net, x = net.eval().to(device), x.to(device)
    model = fuse(net) if form == "fused" else net
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), net(x), rtol=1e-3, atol=1e-4)
