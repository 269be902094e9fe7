"""Against NumPy over all that a norm read, one value behind the other. Two ranks are in tests/end_to_end/test_norms.py."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from octvideo.engine.nonfinite import NonFiniteError
from octvideo.engine.precise_bn import precise_statistics
from octvideo.models import NETWORKS, SlowFastSpec, create, with_octave
from octvideo.octave import Octave, OctBatchNorm2d

from ..models.shallow import cut

KINDS = ("i3d_nl_r50", "slowfast_4x16_r50", "se_resnet152_v1e", "densenet121", "mobilenet_v2_1.0", "resnet50_glore")


def batches(*shape: int, sizes: tuple[int, ...] = (3, 3, 2)) -> list[Tensor]:
    """Each of another mean, so that the batches' means vary, and the last one smaller."""
    generator = torch.Generator().manual_seed(0)
    return [number + torch.randn(size, *shape, generator=generator) for number, size in enumerate(sizes)]


def values(maps: list[Tensor]) -> np.ndarray:
    """[N, C, ...] of each batch -> [C, all values]."""
    return torch.cat([x.transpose(0, 1).flatten(1) for x in maps], dim=1).double().numpy()


class TwoFrequencies(nn.Module):
    """[N, 8, H, W] -> what the norm makes of 3 high and 5 low channels, kept in `read`."""

    def __init__(self, **split: object) -> None:
        super().__init__()
        self.bn, self.read = OctBatchNorm2d(8, **split), []

    def forward(self, x: Tensor) -> Octave:
        self.read.append(Octave(x[:, :3], 3 * x[:, 3:, ::2, ::2] - 1))
        return self.bn(self.read[-1])


def test_mean_and_variance_of_all_values_not_the_mean_of_the_batches_variances() -> None:
    net, inputs = nn.BatchNorm2d(4), batches(4, 5, 6)
    precise_statistics(net, inputs)
    np.testing.assert_allclose(net.running_mean.numpy(), values(inputs).mean(1), rtol=1e-6)
    np.testing.assert_allclose(net.running_var.numpy(), values(inputs).var(1, ddof=1), rtol=1e-6)
    averaged = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in inputs]).mean(0)
    assert (net.running_var - averaged > 0.4).all()  # it leaves out how far the means, 0, 1 and 2, are apart


@pytest.mark.parametrize(
    ("split", "places"),
    [
        ({"alpha": 0.625}, [0, 1, 2, 3, 4, 5, 6, 7]),
        # the vectors are [high, 2 lows; 2 highs, low; 2 lows], the maps [3 highs], [5 lows]
        ({"parts": ((1, 2), (2, 1), (0, 2))}, [0, 3, 4, 1, 2, 5, 6, 7]),
    ],
    ids=["alpha", "parts"],
)
def test_each_frequency_by_its_own_count_in_the_vanilla_order(split: dict, places: list[int]) -> None:
    net = TwoFrequencies(**split)
    precise_statistics(net, batches(8, 4, 6))
    highs, lows = (values(list(maps)) for maps in zip(*net.read, strict=True))
    assert lows.shape[1] * 4 == highs.shape[1]
    mean = np.concatenate([highs.mean(1), lows.mean(1)])
    var = np.concatenate([highs.var(1, ddof=1), lows.var(1, ddof=1)])
    np.testing.assert_allclose(net.bn.running_mean.numpy(), mean[places], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(net.bn.running_var.numpy(), var[places], rtol=1e-5)


def network(name: str) -> tuple[nn.Module, list[Tensor]]:
    """An octave network with random statistics, and inputs."""
    spec = cut(with_octave(NETWORKS[name](5), 0.25), keep=1)
    torch.manual_seed(0)
    net = create(spec)
    for buffer_name, buffer in net.named_buffers():
        if buffer_name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    frames = (16,) if isinstance(spec, SlowFastSpec) else (4,) if spec.dims == 3 else ()
    return net, batches(3, *frames, 48, 48, sizes=(2, 2))


def norms(net: nn.Module) -> Iterator[_BatchNorm]:
    return (module for module in net.modules() if isinstance(module, _BatchNorm))


@pytest.mark.parametrize("name", KINDS)
def test_of_one_batch_it_is_what_training_by_it_alone_leaves(name: str) -> None:
    """Every norm of every kind of network is reached, with what it reads in training."""
    net, inputs = network(name)
    trained = copy.deepcopy(net).train()
    for norm in norms(trained):
        norm.momentum = 1.0
    trained(inputs[0])
    before = copy.deepcopy(net)
    precise_statistics(net, inputs[:1])
    for own, other, old in zip(norms(net), norms(trained), norms(before), strict=True):
        torch.testing.assert_close(own.running_mean, other.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own.running_var, other.running_var, rtol=1e-4, atol=1e-5)
        assert not torch.equal(own.running_mean, old.running_mean)


def test_nothing_else_changes() -> None:
    net, inputs = network("i3d_nl_r50")
    net.train()
    net.stages.res2.eval()
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    random = torch.get_rng_state()
    precise_statistics(net, inputs)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in net.modules()] == modes
    assert all(norm.momentum == 0.1 and norm.track_running_stats for norm in norms(net))
    assert not any(module._forward_pre_hooks for module in net.modules())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) != name.endswith(("running_mean", "running_var")), name
    # Behind attention only high channels are normalized: low ones have read nothing and keep what they had.
    norm, old = net.stages.res3.nonlocal1.bn, before["stages.res3.nonlocal1.bn.running_mean"]
    assert torch.equal(norm.running_mean[norm.high :], old[norm.high :])


def test_interrupted_it_leaves_the_model_as_it_was() -> None:
    net, inputs = network("mobilenet_v2_1.0")
    net.train()
    before = copy.deepcopy(net.state_dict())

    def interrupted() -> Iterator[Tensor]:
        yield inputs[0]
        raise KeyboardInterrupt

    for given, error, message in (
        (interrupted(), KeyboardInterrupt, None),
        ([inputs[0], inputs[1] * float("inf")], NonFiniteError, "norm stem.bn reads values that are not finite"),
        ([], ValueError, "no batches"),
    ):
        with pytest.raises(error, match=message):
            precise_statistics(net, given)
        torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
        assert all(module.training for module in net.modules())
        assert all(norm.track_running_stats and not norm._forward_pre_hooks for norm in norms(net))
