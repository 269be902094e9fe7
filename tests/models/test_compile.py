"""Compiled training: one graph for each kind of step, and none after the first epoch."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from octvideo.engine.optim import SGD
from octvideo.engine.train import Precision, train_step
from octvideo.models import NETWORKS, ResNetSpec, compile_blocks, create, with_octave


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
    sgd, graphs = SGD(model.parameters(), lr=0.1, momentum=0.9), []
    for epoch in range(count):
        model.train()
        for step in range(3):
            clips, labels = torch.randn(4, 3, 8, 16, 16), torch.randint(5, (4,))
            _, _, norm, finite = train_step(
                model, sgd, clips, labels, 0.1 / (1 + step + 3 * epoch), F.cross_entropy, precision
            )
            assert norm > 0 and finite
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
    sgd = SGD(model.parameters(), lr=0.1)
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


def deep(alpha: float = 0.25) -> nn.Module:
    """Two stages of four blocks, of which the first one alone has another structure."""
    torch.manual_seed(0)
    spec = NETWORKS["i3d_tiny"](5)
    assert isinstance(spec, ResNetSpec)
    stages = [replace(stage, temporal_kernels=(3,) * 4) for stage in spec.stages[:2]]
    return create(with_octave(replace(spec, stages=tuple(stages)), alpha, ratios=[alpha, 0.0]))


def test_blocks_of_equal_structure_are_compiled_once() -> None:
    model, eager = deep(), deep()
    assert compile_blocks(model, backend="eager") == 10  # the stem, eight blocks, the head
    assert model.state_dict().keys() == eager.state_dict().keys()
    sgd = SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        train_step(model, sgd, torch.randn(2, 3, 8, 16, 16), torch.tensor([0, 1]), 0.1, F.cross_entropy)
        # the stem, the head, and of each stage the first block and the others
        assert counters["stats"]["unique_graphs"] == 6
    assert not counters["graph_break"], dict(counters["graph_break"])


@pytest.mark.parametrize("name", ["slowfast_4x16_r50", "densenet121", "mobilenet_v2_1.0", "se_resnet50"])
def test_every_kind_of_network_has_blocks(name: str) -> None:
    with torch.device("meta"):
        model = create(NETWORKS[name](5))
    assert compile_blocks(model) > 10


@pytest.mark.slow
def test_compiled_by_blocks_the_numbers_are_the_eager_ones() -> None:
    losses = []
    for compiled in (False, True):
        model = deep()
        if compiled:
            compile_blocks(model)
        optimizer, draw = SGD(model.parameters(), lr=0.1, momentum=0.9), torch.Generator().manual_seed(1)
        model.head.dropout.p = 0.0
        for _ in range(4):
            clips = torch.randn(4, 3, 8, 16, 16, generator=draw)
            losses.append(float(train_step(model, optimizer, clips, torch.arange(4), 0.1, F.cross_entropy).loss))
    assert losses[4:] == pytest.approx(losses[:4], rel=1e-3)
