"""The naive twin gives what the network gives, so that a table of speeds compares the same work."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octvideo.analysis.naive import NaiveNorm, NaiveOctConv, naive
from octvideo.models import NETWORKS, create, with_octave
from octvideo.octave import Octave, OctBatchNorm3d, OctConv2d, OctConv3d
from octvideo.octave.conv import _OctConv

from ..models.shallow import cut


def feature(conv: _OctConv, size: tuple[int, ...]) -> Tensor | Octave:
    high = torch.randn(2, conv.in_high, *size)
    if not conv.in_low:
        return high
    return Octave(high, torch.randn(2, conv.in_low, *(-(-s // p) for s, p in zip(size, conv.pool, strict=True))))


def parts(y: Tensor | Octave) -> tuple[Tensor, ...]:
    return tuple(y) if isinstance(y, Octave) else (y,)


@pytest.mark.parametrize(
    "kind,size,fields",
    [
        (OctConv2d, (8, 8), {}),
        (OctConv2d, (7, 9), {"stride": 2}),
        (OctConv2d, (7, 9), {"stride": 2, "pool_stride": False}),
        (OctConv2d, (8, 8), {"alpha_in": 0.0}),
        (OctConv2d, (8, 8), {"alpha_out": 0.0, "bias": True}),
        (OctConv2d, (8, 8), {"alpha_in": 1.0, "bias": True}),
        (OctConv2d, (7, 8), {"alpha_out": 1.0, "stride": 2}),
        (OctConv2d, (7, 8), {"alpha_in": 1.0, "alpha_out": 1.0, "bias": True}),
        (OctConv2d, (8, 8), {"groups": 2, "bias": True}),
        (OctConv2d, (7, 7), {"groups": 16, "stride": 2, "alpha_in": 0.25, "alpha_out": 0.25, "bias": True}),
        (OctConv2d, (8, 8), {"padding_mode": "reflect", "dilation": 2, "padding": 2}),
        (OctConv2d, (8, 8), {"in_parts": ((6, 2), (4, 4))}),
        (OctConv3d, (4, 6, 6), {"stride": (1, 2, 2), "bias": True}),
        (OctConv3d, (5, 7, 7), {"stride": 2, "pool": (2, 2, 2)}),
        (OctConv3d, (8, 6, 6), {"stride": (4, 1, 1), "pool_stride": False}),
    ],
)
def test_layers_are_equal(kind: type[_OctConv], size: tuple[int, ...], fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    settings = {"padding": 1, "alpha_in": 0.5, "alpha_out": 0.25, "bias": False, **fields}
    conv = kind(16, 16, 3, **settings)  # type: ignore[call-arg]
    x = feature(conv, size)
    own = naive(conv)
    assert isinstance(own, NaiveOctConv)
    for got, expected in zip(parts(own(x)), parts(conv(x)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_it_has_four_weights_of_its_own_and_the_same_number_of_values() -> None:
    conv = OctConv3d(16, 32, (1, 3, 3), padding=(0, 1, 1), alpha_in=0.25, alpha_out=0.5)
    own = naive(conv)
    weights = {name: tuple(p.shape[:2]) for name, p in own.named_parameters() if p.dim() == 5}
    assert weights == {
        "high_to_high.weight": (16, 12),
        "high_to_low.weight": (16, 12),
        "low_to_high.weight": (16, 4),
        "low_to_low.weight": (16, 4),
    }
    assert sum(p.numel() for p in own.parameters()) == sum(p.numel() for p in conv.parameters())
    before = copy.deepcopy(conv.state_dict())
    with torch.no_grad():
        for p in own.parameters():
            p.zero_()
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())  # copies


@pytest.mark.parametrize(
    "name,size",
    [("i3d_nl_r50", (8, 32, 32)), ("slowfast_4x16_r50", (16, 32, 32)), ("densenet121", (64, 64))],
)
@pytest.mark.parametrize("training", [False, True])
def test_networks_are_equal(name: str, size: tuple[int, ...], training: bool) -> None:
    torch.manual_seed(0)
    spec = with_octave(cut(NETWORKS[name](5, dropout=0.0), 1), 0.25)
    model = create(spec).train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    twin = naive(model)
    assert twin.training == training
    left = [m for m in twin.modules() if isinstance(m, _OctConv) and (m.in_low or m.out_low)]
    assert not left and any(isinstance(m, NaiveNorm) for m in twin.modules())
    clip = torch.randn(4, 3, *size)
    expected, got = model(clip), twin(clip)
    assert expected.abs().mean() > 1e-3
    assert ((got - expected).abs().max() / expected.abs().max()).item() < 1e-5
    if training:
        got.sum().backward(), expected.sum().backward()
        stems = [name for name, _ in model.named_parameters() if name.endswith("stem.conv.weight")]
        assert stems
        for name in stems:  # in front of everything
            own, given = twin.get_parameter(name).grad, model.get_parameter(name).grad
            torch.testing.assert_close(own, given, rtol=1e-3, atol=1e-4)


def test_one_frequency_stays_as_it_is() -> None:
    vanilla = create(cut(NETWORKS["i3d_tiny"](5)))
    twin = naive(vanilla)
    assert twin is not vanilla
    assert [type(m) for m in twin.modules()] == [type(m) for m in vanilla.modules()]
    octave = create(with_octave(cut(NETWORKS["i3d_tiny"](5)), 0.5))
    assert any(isinstance(m, OctBatchNorm3d) for m in naive(octave).stem.modules())  # the stem has one frequency
