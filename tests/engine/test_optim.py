import math
from functools import partial

import pytest
import torch
from torch import nn

from octvideo.engine.optim import SGD, cosine, load_momenta, milestones_of, set_lr, sgd, steps, warmed_up


@pytest.mark.parametrize(
    "epoch,lr",
    [(0, 0.01), (1, 0.012434), (17, 0.051379), (34, 0.092757), (98, 0.05), (150, 0.012986), (195, 6e-6)],
)
def test_the_kinetics_schedule(epoch: float, lr: float) -> None:
    """Values measured on PySlowFast's schedule: base 0.1, 196 epochs, warm-up 34 from 0.01."""
    got = warmed_up(epoch, schedule=partial(cosine, epochs=196, base_lr=0.1), warmup_epochs=34, warmup_lr=0.01)
    assert got == pytest.approx(lr, abs=6e-7)


def test_no_warmup_starts_at_the_base_rate_and_the_end_is_zero() -> None:
    schedule = partial(cosine, epochs=10, base_lr=0.3)
    assert warmed_up(0, schedule=schedule, warmup_epochs=0, warmup_lr=0.01) == 0.3
    assert warmed_up(10, schedule=schedule, warmup_epochs=0, warmup_lr=0.01) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "epoch,lr", [(0, 0.01), (17, 0.055), (33.9, 0.0997), (34, 0.1), (93, 0.1), (94, 0.01), (200, 1e-4)]
)
def test_steps_warm_up_as_in_pyslowfast(epoch: float, lr: float) -> None:
    """SLOWFAST_8x8's stepwise recipe: 0.1 after 34 epochs from 0.01, a tenth at 94, 154 and 196."""
    schedule = partial(steps, base_lr=0.1, milestones=(94, 154, 196))
    got = warmed_up(epoch, schedule=schedule, warmup_epochs=34, warmup_lr=0.01)
    assert got == pytest.approx(lr, abs=1e-4)


@pytest.mark.parametrize("epoch,lr", [(0, 0.01), (43.9, 0.01), (44, 1e-3), (87.9, 1e-3), (88, 1e-4), (118, 1e-4)])
def test_the_schedule_from_imagenet(epoch: float, lr: float) -> None:
    assert steps(epoch, base_lr=0.01, milestones=(44, 88)) == pytest.approx(lr)


def test_the_paper_s_iterations() -> None:
    """150k steps at the first rate, 100k at a tenth, 50k at a hundredth; every change at its step, to the step."""
    per_epoch = 234_643 // 64
    first, second, end = milestones_of((150_000, 100_000, 50_000), per_epoch)
    assert round(end * per_epoch) == 300_000 and end == pytest.approx(81.83, abs=0.01)

    def lr(step: int) -> float:
        epoch, in_epoch = divmod(step, per_epoch)
        return steps(epoch + in_epoch / per_epoch, base_lr=0.01, milestones=(first, second))

    for step, before, behind in ((150_000, 0.01, 1e-3), (250_000, 1e-3, 1e-4)):
        assert (lr(step - 1), lr(step)) == (pytest.approx(before), pytest.approx(behind))
    assert lr(0) == 0.01 and lr(299_999) == pytest.approx(1e-4)


def test_a_change_comes_at_its_step_whatever_the_length_of_an_epoch() -> None:
    for per_epoch in range(1, 200):
        (change,) = milestones_of((100,), per_epoch)
        rates = [
            steps(s // per_epoch + s % per_epoch / per_epoch, base_lr=1.0, milestones=(change,)) for s in (99, 100)
        ]
        assert rates == [1.0, 0.1], per_epoch


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


SHAPES = ((64, 3, 1, 7, 7), (16, 24, 3, 1, 1), (8,), (6,), (1,), (17,), (3, 5), (9, 3, 1, 3, 3))


def trained(kind: type[torch.optim.SGD], skipped: tuple[int, ...] = (), **settings: float | bool) -> list[torch.Tensor]:
    """Weights and momenta after 6 steps of drawn gradients; SGD of torch leaves the `skipped` ones out."""
    draw = torch.Generator().manual_seed(1)
    weights = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
    for weight in weights[:2]:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)
    optimizer = kind([{"params": weights[:3], "weight_decay": 1e-2}, {"params": weights[3:]}], lr=0.1, **settings)
    for step in range(6):
        set_lr(optimizer, 0.1 / (1 + step))
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=draw).mul_(math.nan if step in skipped else 1.0)
        if isinstance(optimizer, SGD):
            optimizer.found_inf = torch.tensor(float(step in skipped))
        if isinstance(optimizer, SGD) or step not in skipped:
            optimizer.step()
    momenta = [optimizer.state[weight].get("momentum_buffer") for weight in weights]
    return [*(w.detach() for w in weights), *(m for m in momenta if m is not None)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("momentum,nesterov", [(0.9, True), (0.9, False), (0.0, False)])
@pytest.mark.parametrize("skipped", [(), (0,), (2, 3)], ids=["all", "not the first", "not two"])
def test_sgd_has_the_bits_of_torch_s_and_skips_on_the_device(
    skipped: tuple[int, ...], momentum: float, nesterov: bool, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = trained(SGD, skipped, momentum=momentum, nesterov=nesterov)
        theirs = trained(torch.optim.SGD, skipped, momentum=momentum, nesterov=nesterov, foreach=False)
    finally:
        torch.set_num_threads(before)
    assert len(ours) == len(theirs)
    assert all(torch.equal(own, other) for own, other in zip(ours, theirs, strict=True))


def test_sgd_leaves_out_weights_without_a_gradient_and_resumes_from_torch_s_state() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    theirs = torch.optim.SGD([used, unused], lr=0.5, momentum=0.9)
    used.grad = torch.ones(3)
    theirs.step()
    ours = SGD([used, unused], lr=0.1, momentum=0.9)
    ours.load_state_dict(theirs.state_dict())
    ours.step()
    assert torch.equal(unused, torch.ones(3)) and unused not in ours.state
    torch.testing.assert_close(used.detach(), torch.full((3,), 1 - 0.5 - 0.5 * 1.9))


def test_momentum_of_another_memory_format_is_brought_into_the_weight_s() -> None:
    """A run that is resumed with another MODEL.CHANNELS_LAST."""
    draw, results = torch.Generator().manual_seed(0), []
    start, buffer, grad = (torch.randn(16, 3, 1, 3, 3, generator=draw) for _ in range(3))
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        weight = nn.Parameter(start.clone(memory_format=memory_format))
        optimizer = SGD([weight], lr=0.1, momentum=0.9)
        optimizer.state[weight]["momentum_buffer"] = buffer.clone()
        weight.grad = grad.clone()
        optimizer.step()
        results.append((weight.detach(), optimizer.state[weight]["momentum_buffer"]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_momenta_are_loaded_and_settings_stay_the_optimizer_s() -> None:
    draw = torch.Generator().manual_seed(0)
    net = nn.Linear(3, 2)
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "weight_decay_norm": 0.0}
    earlier = sgd(net, **settings)
    for weight in net.parameters():
        weight.grad = torch.randn(weight.shape, generator=draw)
    earlier.step()
    saved = earlier.state_dict()
    later = sgd(
        net,
        **{**settings, "lr": 9.0, "momentum": 0.5, "nesterov": False, "weight_decay": 0.7, "weight_decay_norm": 0.3},
    )
    load_momenta(later, saved)
    assert [group["weight_decay"] for group in later.param_groups] == [0.7, 0.3]
    assert {(group["momentum"], group["nesterov"], group["lr"]) for group in later.param_groups} == {(0.5, False, 0.1)}
    for weight in net.parameters():
        assert torch.equal(later.state[weight]["momentum_buffer"], earlier.state[weight]["momentum_buffer"])
