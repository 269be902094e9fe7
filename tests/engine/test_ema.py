import pytest
import torch
from torch import nn

from octvideo.engine.ema import Ema


def test_the_average_is_the_recurrence_s() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 4.0)
    ema, expected = Ema(net, 0.5), 4.0
    for step, value in enumerate((1.0, 7.0, -2.0, 0.5, 3.0, 9.0, 1.0, 2.0, 4.0), start=1):
        nn.init.constant_(net.weight, value)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert ema.average["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert decay == 0.5  # the warm-up is over


def test_statistics_stay_the_model_s_and_it_gets_its_own_weights_back() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    ema = Ema(net, 0.9)
    net(torch.randn(5, 3, 4, 4))
    nn.init.ones_(net[0].weight)
    ema.update(1)
    state = ema.state_dict()
    assert list(state) == list(net.state_dict())
    assert torch.equal(state["1.running_mean"], net[1].running_mean) and state["1.num_batches_tracked"] == 1
    with ema.applied():
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
        assert torch.equal(net[0].weight, ema.average["0.weight"]) and not (net[0].weight == 1).all()
    assert (net[0].weight == 1).all()
    with pytest.raises(ZeroDivisionError), ema.applied():
        raise ZeroDivisionError
    assert (net[0].weight == 1).all()


def test_it_goes_on_where_it_was() -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    ema = Ema(net, 0.9)
    nn.init.ones_(net.weight)
    ema.update(1)
    other = Ema(nn.Linear(3, 2), 0.9)
    other.load_state_dict(ema.state_dict())
    assert all(torch.equal(other.average[name], value) for name, value in ema.average.items())


def test_an_update_is_the_same_to_the_bit_as_weight_by_weight() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 3)).to(memory_format=torch.channels_last)
    ema = Ema(net, 0.9)
    for weight in net.parameters():
        nn.init.normal_(weight)
    expected = [
        average.clone().lerp_(weight, 1 - 2 / 11)
        for average, weight in zip(ema.average.values(), net.parameters(), strict=True)
    ]
    ema.update(1)
    assert all(torch.equal(average, value) for average, value in zip(ema.average.values(), expected, strict=True))
