"""What the tracer follows, and what it says where it cannot."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from octvideo.octave import ConversionError, octavize
from octvideo.octave.trace import trace


class Around(nn.Module):
    """A small network and, in its middle, a part that may be hard to follow."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1))
        self.part, self.last = part, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(self.conv(x)))


class Sizes(nn.Module):
    """Python asks for sizes in every way."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if x.dim() != 4 or x.size(1) % 2:
            raise ValueError("even channels only")
        assert isinstance(h, int) or h == w
        for i in range(x.shape[1] // 4):
            x = x + float(i) * x
        if x.shape[2] > 4 and len(x.shape) == 4:
            x = F.relu(x)
        return x.view(n, c // 2, 2, h, w).sum(2).repeat(1, int(c) // (int(c) // 2), 1, 1)


def test_python_may_ask_for_sizes() -> None:
    network = Around(Sizes())
    graph = fx.GraphModule(network, trace(network, torch.randn(1, 3, 8, 8)))
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(graph(x), network(x))  # another batch: what was not asked by Python stays symbolic


class ByValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return x
        return -x


def test_a_decision_by_values_is_named_and_can_be_kept() -> None:
    network, x = Around(ByValue()), torch.randn(1, 3, 16, 16)
    with pytest.raises(ConversionError) as error:
        octavize(network, 0.5, x)
    text = str(error.value)
    assert "in part (ByValue)" in text and "if x.mean() > 0:" in text and "test_trace.py:" in text
    assert "pass keep=['part'] to leave this module as it is" in text
    converted = octavize(network, 0.5, x, keep=["part"])
    assert [(n.what, n.name) for n in converted.report.notes] == [("merge", "part")]
    assert converted(x).shape == (1, 4, 16, 16)


class ByMode(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


def test_another_way_in_training_is_named_and_can_be_kept() -> None:
    network, x = Around(ByMode()), torch.randn(1, 3, 16, 16)
    with pytest.raises(ConversionError) as error:
        octavize(network, 0.5, x)
    assert "forward takes other steps in training than in evaluation" in str(error.value)
    converted = octavize(network, 0.0, x, keep=["part"])
    for mode in (True, False):
        assert torch.equal(converted.train(mode)(x), network.train(mode)(x))


def test_the_network_s_own_forward_cannot_be_kept() -> None:
    with pytest.raises(ConversionError, match="in the network's own forward") as error:
        octavize(ByValue(), 0.5, torch.randn(1, 3, 16, 16))
    assert "`keep` takes parts of a network; this line must change" in str(error.value)


def test_an_input_that_the_network_refuses_is_not_a_module_s_fault() -> None:
    with pytest.raises(ConversionError, match="the network itself fails on example_input") as error:
        octavize(Around(nn.Identity()), 0.5, torch.randn(1, 5, 16, 16))
    assert "keep" not in str(error.value)


def test_the_model_is_left_as_it_is() -> None:
    network = Around(Sizes()).train()
    before = {name: type(module) for name, module in network.named_modules()}
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    octavize(network, 0.5, torch.randn(1, 3, 16, 16))
    assert {name: type(module) for name, module in network.named_modules()} == before and network.training
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
