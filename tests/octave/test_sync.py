"""Shared statistics and their gradient in a group of one; two processes are in tests/end_to_end/test_norms.py."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from octvideo.octave import NonLocal, Octave, OctBatchNorm2d, OctBatchNorm3d, lift, synchronize_norms
from octvideo.octave.sync import normalize, several_processes, shared_statistics


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def together(maps: tuple[Tensor, ...], weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
    return normalize(maps, *shared_statistics(maps), weight, bias, 1e-5)


def test_gradients_by_finite_differences(group: None) -> None:
    high, low = torch.randn(2, 2, 3, 2, dtype=torch.float64), torch.randn(2, 1, 2, 1, dtype=torch.float64)
    weight, bias = torch.randn(2, 3, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (high, low, weight, bias)]
    assert torch.autograd.gradcheck(lambda h, x, w, b: together((h, x), w, b), inputs)
    assert torch.autograd.gradcheck(lambda h, x: together((h, x), None, None), inputs[:2])


def test_only_what_is_trained_gets_a_gradient(group: None) -> None:
    x, weight, bias = torch.randn(4, 3, 2, 2), torch.ones(3), torch.zeros(3)
    (y,) = together((x,), weight.requires_grad_(), bias.requires_grad_())
    y.square().sum().backward()
    assert x.grad is None
    torch.testing.assert_close(bias.grad, torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(weight.grad, torch.full((3,), 2 * 16.0), atol=1e-2, rtol=0)  # 2 x-hat^2, summed


def test_one_map_of_two_may_have_no_gradient(group: None) -> None:
    high, low = torch.randn(4, 2, 4, 4, requires_grad=True), torch.randn(4, 2, 2, 2, requires_grad=True)
    together((high, low), None, None)[0].square().sum().backward()
    assert torch.equal(low.grad, torch.zeros_like(low))


def test_variance_of_a_small_spread_far_from_zero(group: None) -> None:
    """E[x^2] - E[x]^2 in float32 would be off by more than the variance itself."""
    x = (1e4 + torch.randn(8, 3, 16, 16, dtype=torch.float64)).float()
    mean, var, count = shared_statistics((x,))
    seen = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, seen.mean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(var, seen.var(1, correction=0), rtol=1e-4, atol=0)
    assert count.tolist() == [2048.0] * 3


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_bfloat16_maps_have_float32_statistics(group: None, parameters: torch.dtype) -> None:
    x = (3 + torch.randn(8, 3, 6, 5)).bfloat16()
    weight, bias = torch.rand(3, dtype=parameters), torch.rand(3, dtype=parameters)
    wanted = torch.randn(x.shape).bfloat16()
    exact = [t.double().clone().requires_grad_() for t in (x, weight, bias)]
    torch.nn.functional.batch_norm(exact[0], None, None, *exact[1:], training=True).backward(wanted.double())
    own = [t.clone().requires_grad_() for t in (x, weight, bias)]
    (y,) = together((own[0],), *own[1:])
    y.backward(wanted)
    assert y.dtype == own[0].grad.dtype == torch.bfloat16 and own[1].grad.dtype == parameters
    for got, expected in zip(own, exact, strict=True):
        assert (got.grad.double() - expected.grad).abs().max() <= 0.02 * expected.grad.abs().max()


def test_channels_last_stays(group: None) -> None:
    x = torch.randn(2, 4, 3, 5, 6).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    (y,) = together((x,), torch.ones(4), torch.zeros(4))
    y.backward(torch.randn_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert x.grad.is_contiguous(memory_format=torch.channels_last_3d)


def test_alone_nothing_changes(group: None) -> None:
    assert not several_processes()
    for norm, x in (
        (OctBatchNorm2d(8), torch.randn(3, 8, 4, 4)),
        (OctBatchNorm3d(8, alpha=0.25), Octave(torch.randn(3, 6, 2, 4, 4), torch.randn(3, 2, 2, 2, 2))),
    ):
        other = copy.deepcopy(norm)
        synchronize_norms(other)
        lift(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), norm(x), other(x))
        torch.testing.assert_close(other.state_dict(), norm.state_dict(), rtol=0, atol=0)


def test_every_norm_of_a_model_is_reached_and_another_kind_is_refused() -> None:
    model = nn.Sequential(OctBatchNorm2d(8), NonLocal(8, 4))
    synchronize_norms(model)
    assert model[0].synchronized and model[1].bn.synchronized
    with pytest.raises(TypeError, match="^1 is a BatchNorm2d; only OctBatchNorm2d and OctBatchNorm3d synchronize"):
        synchronize_norms(nn.Sequential(OctBatchNorm2d(8), nn.BatchNorm2d(8)))
