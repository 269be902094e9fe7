"""Compiled training: one graph for each kind of step, and none after the first epoch."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from octvideo.engine.train import Precision, train_step
from octvideo.models import NETWORKS, ResNetSpec, create, with_octave


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tiny(name: str = "i3d_tiny", alpha: float = 0.25, stages: int = 2) -> nn.Module:
    torch.manual_seed(0)
    spec = NETWORKS[name](5)
    assert isinstance(spec, ResNetSpec)
    return create(with_octave(replace(spec, stages=spec.stages[:stages]), alpha, ratios=[alpha] * (stages - 1) + [0.0]))


def epochs(model: nn.Module, precision: Precision, count: int = 2) -> list[int]:
    """Trains and evaluates as a run does, and gives the graphs that there are after each epoch.

    The learning rate moves every step, batches of training are all as large (`TrainBatches`), the last one of an evaluation
    is smaller (`EvalBatches`).
    """
    sgd, graphs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []
    for epoch in range(count):
        model.train()
        for step in range(3):
            clips, labels = torch.randn(4, 3, 8, 16, 16), torch.randint(5, (4,))
            _, _, norm = train_step(model, sgd, clips, labels, 0.1 / (1 + step + 3 * epoch), F.cross_entropy, precision)
            assert norm > 0
        model.eval()
        with torch.no_grad():
            for size in (4, 4, 3):
                assert model(torch.randn(size, 3, 8, 16, 16)).isfinite().all()
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


@pytest.mark.parametrize(
    "precision", [Precision(), Precision(accumulate=2, dtype=torch.bfloat16)], ids=["fp32", "bf16"]
)
def test_an_epoch_compiles_each_step_once_and_breaks_no_graph(precision: Precision) -> None:
    """Training, evaluation, and at most one more for the last batch of an evaluation, for any size of which it holds."""
    model = tiny()
    model.compile(backend="eager")
    first, second = epochs(model, precision)
    assert 2 <= first <= 3 and second == first
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert int(model.get_buffer("stem.bn.num_batches_tracked")) == 6 * precision.accumulate


def test_training_alone_is_one_graph() -> None:
    model = tiny()
    model.compile(backend="eager", fullgraph=True)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(4):
            train_step(
                model, sgd, torch.randn(2, 3, 8, 16, 16), torch.tensor([0, 1]), 1.0 / (1 + step), F.cross_entropy
            )
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["i3d_tiny", "c2d_tiny"])
@pytest.mark.parametrize("pool", [(1, 2, 2), (2, 2, 2)])
def test_an_epoch_through_autograds_compiler(name: str, pool: tuple[int, ...]) -> None:
    model = create(with_octave(NETWORKS[name](5), 0.25, pool=pool))
    model.compile(backend="aot_eager_decomp_partition")
    first, second = epochs(model, Precision())
    assert 2 <= first <= 3 and second == first
    assert not counters["graph_break"], dict(counters["graph_break"])
