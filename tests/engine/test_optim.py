import pytest
import torch
from torch import nn

from octvideo.engine.optim import set_lr, sgd, warmup_cosine


@pytest.mark.parametrize(
    "epoch,lr",
    [(0, 0.01), (1, 0.012434), (17, 0.051379), (34, 0.092757), (98, 0.05), (150, 0.012986), (195, 6e-6)],
)
def test_the_kinetics_schedule(epoch: float, lr: float) -> None:
    """Values measured on PySlowFast's schedule: base 0.1, 196 epochs, warm-up 34 from 0.01."""
    got = warmup_cosine(epoch, epochs=196, base_lr=0.1, warmup_epochs=34, warmup_lr=0.01)
    assert got == pytest.approx(lr, abs=6e-7)


def test_no_warmup_starts_at_the_base_rate_and_the_end_is_zero() -> None:
    assert warmup_cosine(0, epochs=10, base_lr=0.3, warmup_epochs=0, warmup_lr=0.01) == 0.3
    assert warmup_cosine(10, epochs=10, base_lr=0.3, warmup_epochs=0, warmup_lr=0.01) == pytest.approx(0, abs=1e-12)


def test_norms_and_biases_are_not_decayed() -> None:
    net = nn.Sequential(nn.Conv3d(2, 3, 1), nn.BatchNorm3d(3), nn.Flatten(), nn.Linear(3, 2))
    optimizer = sgd(net, lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.5, weight_decay_norm=0.0)
    before = {k: v.clone() for k, v in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_lr(optimizer, 0.1)
    optimizer.step()
    for name, parameter in net.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, before[name])
        else:
            torch.testing.assert_close(parameter, before[name] * (1 - 0.1 * 0.5 * 1.9))
