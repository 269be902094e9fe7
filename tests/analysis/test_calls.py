"""Reference: operators counted by hand in small programs."""

from collections import Counter

import pytest
import torch
from torch import nn

from octvideo.analysis.calls import compiled_calls, operator_calls


def test_launches_of_a_small_step_by_hand() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    found = operator_calls(lambda: layer(x).relu().sum().backward())
    assert found.launches == Counter(
        {
            # forward, and the gradient that backward() starts with
            "aten::addmm": 1,
            "aten::relu": 1,
            "aten::sum": 2,  # of the result, and of the bias's gradient over the batch
            "aten::ones_like": 1,
            # backward: the weight's gradient; the input needs none
            "aten::threshold_backward": 1,
            "aten::mm": 1,
        }
    )


def test_views_and_allocations_launch_nothing() -> None:
    x = torch.randn(4, 6)

    def step() -> None:
        y = x[1:].t().view(6, 3).unsqueeze(0).detach()
        torch.empty_like(y), x.new_empty(3), x.add_(1)

    found = operator_calls(step)
    assert found.launches == Counter({"aten::add_": 1})
    assert found.views == Counter(
        {f"aten::{n}": 1 for n in ("slice", "t", "view", "unsqueeze", "detach", "empty_like", "new_empty")}
    )


def test_a_step_on_the_meta_device_is_counted_without_arithmetic() -> None:
    with torch.device("meta"):
        layer, x = nn.Conv3d(512, 512, 3), torch.empty(64, 512, 64, 256, 256)
    found = operator_calls(lambda: layer(x).mean().backward())
    assert found.launches["aten::convolution"] == found.launches["aten::convolution_backward"] == 1


def test_calls_before_and_after_are_not_counted() -> None:
    x = torch.ones(3)
    assert operator_calls(lambda: None) == (Counter(), Counter())
    assert operator_calls(lambda: x + 1).launches.total() == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dynamo_pgo")
def test_compiled_kernels_by_hand() -> None:
    torch._dynamo.reset()
    weight, x = torch.randn(4, 3, requires_grad=True), torch.randn(2, 4)
    step = torch.compile(lambda x: (x @ weight).relu().sin())
    found = compiled_calls(lambda: step(x).sum().backward())
    # forward: a product, and relu with sin as one kernel; backward: one kernel of both, and the weight's product
    assert found == Counter(generated=2, library=2)


def test_a_step_that_compiles_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="not compiled yet"):
        compiled_calls(lambda: torch.ones(2) + 1)
