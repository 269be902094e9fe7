"""All forms of pooling, upsampling and adding return the same values, and each mode runs the form that is meant for it."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from octvideo.octave import Octave, OctConv3d, feature, fuse, kernels, resample
from octvideo.octave.fuse import FusedOctConv

from . import reference
from .kernel_maps import CASES, LAYOUTS, Case, a_low_map, a_map, double, eager_pool, eager_sum

EVEN_CASES = [
    ((2, 3, 4, 6), (2, 2)),
    ((2, 3, 4, 6, 8), (1, 2, 2)),
    ((2, 3, 4, 6, 8), (2, 2, 2)),
    ((1, 2, 4, 1, 3), (2, 1, 1)),
]
SOME_CASES = [CASES[0], CASES[4], CASES[6], *EVEN_CASES]
POOLING_FORMS = ["_pool_by_sum_of_slices", "_pool_by_slices", "_pool_by_avg_pool2d", "_pool_by_avg_pool3d"]
SUM_FORMS = [
    "_add_by_interpolate",
    "_add_by_interpolate_",
    "_add_by_slices_",
    "_add_by_broadcast",
    "_add_by_broadcast_",
]


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the forms that ran, in order."""
    ran: list[str] = []

    def recorded(name: str, form: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **options: Any) -> Tensor:
            ran.append(name)
            return form(*args, **options)

        return run

    for name in POOLING_FORMS + SUM_FORMS:
        monkeypatch.setattr(resample, name, recorded(name, getattr(resample, name)))
    for name in ("average_pool", "add_upsampled", "add_upsampled_", "upsample_shares"):
        monkeypatch.setattr(kernels, name, recorded(f"kernels.{name}", getattr(kernels, name)))
    return ran


# --- the forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_every_form_of_pooling(case: Case, layout: str, cpu: str) -> None:
    """Bit for bit, except for sums of 8 values at once and avg_pool3d, whose order of summation is another."""
    shape, kernel = case
    x = a_map(shape, cpu, layout)
    expected = resample._pool_by_avg_pool2d(x, kernel)
    np.testing.assert_allclose(double(expected), reference.average_pool(double(x), kernel), rtol=0, atol=1e-6)
    assert torch.equal(kernels.average_pool(x, kernel), expected)
    if all(size % k == 0 for size, k in zip(shape[2:], kernel, strict=True)):
        assert torch.equal(resample._pool_by_slices(x, kernel), expected)
    torch.testing.assert_close(resample._pool_by_sum_of_slices(x, kernel), expected, rtol=0, atol=5e-7)
    if len(kernel) == 3:
        torch.testing.assert_close(resample._pool_by_avg_pool3d(x, kernel), expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_every_form_of_the_sum(case: Case, layout: str, cpu: str) -> None:
    """Bit for bit: each value is one sum of two."""
    shape, kernel = case
    y, low = a_map(shape, cpu, layout), a_low_map(case, cpu, layout)
    expected = torch.from_numpy(double(y) + reference.upsample(double(low), kernel, shape[2:])).float()
    even = all(size % k == 0 for size, k in zip(shape[2:], kernel, strict=True))
    names = [name for name in SUM_FORMS if even or "broadcast" not in name]
    for form in (kernels.add_upsampled, kernels.add_upsampled_, *(getattr(resample, name) for name in names)):
        before = y.clone()
        total = form(before, low)
        assert torch.equal(total, expected)
        assert torch.equal(before, expected if form.__name__.endswith("_") else y)
        assert total.is_contiguous(memory_format=LAYOUTS[layout][y.dim()])


@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_gradients_by_kernels_and_by_operators(case: Case, cpu: str) -> None:
    shape, kernel = case
    x, low = a_map(shape, cpu), a_low_map(case, cpu)

    def gradients() -> list[Tensor]:
        with torch.no_grad():
            alone = resample.pooling_gradient(low, shape[2:], kernel, None)
            added = resample.pooling_gradient(low, shape[2:], kernel, x.clone())
            return [alone, added, resample.upsampling_gradient(x, kernel)]

    found = gradients()
    with kernels.enabled(False):
        for one, other in zip(found, gradients(), strict=True):
            assert torch.equal(one, other)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(resample._pool_by_avg_pool2d(leaf, kernel), leaf, low)
    assert torch.equal(found[0], expected)


# --- which form runs ------------------------------------------------------------------------------------------------


def ran_by(forms: list[str], call: Callable[[], Any]) -> list[str]:
    forms.clear()
    call()
    return forms.copy()


@pytest.mark.parametrize("fused", [False, True])
def test_forms_on_a_cpu(fused: bool, forms: list[str]) -> None:
    even, odd = torch.randn(1, 2, 2, 4, 4), torch.randn(1, 2, 2, 5, 4)
    last = even.contiguous(memory_format=torch.channels_last_3d)
    low, kernel = torch.randn(1, 2, 2, 2, 2), (1, 2, 2)

    def pooled(x: Tensor) -> list[str]:
        return ran_by(forms, lambda: resample.average_pool(x, kernel, fused=fused))

    def added(y: Tensor, low: Tensor) -> list[str]:
        return ran_by(forms, lambda: resample.add_upsampled(y, low, fused=fused))

    small = resample.average_pool(odd, kernel)
    with torch.no_grad():
        assert pooled(even) == ["_pool_by_sum_of_slices" if fused else "_pool_by_slices"]
        assert pooled(last) == ["_pool_by_sum_of_slices" if fused else "_pool_by_avg_pool2d"]
        assert pooled(odd) == pooled(odd.bfloat16()) == ["_pool_by_avg_pool2d"]
        assert added(even, low) == ["_add_by_broadcast" if fused else "_add_by_slices_"]
        assert added(last, low) == ["_add_by_broadcast" if fused else "_add_by_broadcast_"]
        assert added(odd, small) == ["_add_by_interpolate" if fused else "_add_by_slices_"]
    assert pooled(even) == ["_pool_by_sum_of_slices" if fused else "_pool_by_avg_pool2d"]
    assert added(even, low) == ["_add_by_broadcast" if fused else "_add_by_interpolate"]
    assert ran_by(forms, lambda: resample.average_pool(even, (1, 1, 1), fused=fused)) == []


class Resample(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        return resample.add_upsampled(x * 1, resample.average_pool(x, (1, 2, 2), fused=self.fused), fused=self.fused)


COMPILED = {False: {"avg_pool2d", "upsample_nearest3d"}, True: set()}
EXPORTED = {
    (False, False): {"avg_pool2d", "upsample_nearest3d"},
    (False, True): {"avg_pool2d", "upsample_nearest2d"},
    (True, False): {"avg_pool3d", "upsample_nearest3d"},
    (True, True): {"avg_pool2d", "upsample_nearest2d"},
}
"""By fused and frames_as_channels: the operators of pooling and upsampling."""


def resampling_operators(graph: fx.Graph) -> set[str]:
    names = {
        str(node.target).split(".")[1] for node in graph.nodes if str(node.target).startswith(("aten.", "octvideo."))
    }
    return {name for name in names if "pool" in name or "upsample" in name}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("frames", [False, True])
def test_forms_in_an_exported_network(fused: bool, frames: bool, cpu: str, launches: Counter[str]) -> None:
    x = torch.randn(1, 2, 2, 4, 6)
    with resample.frames_as_channels() if frames else contextlib.nullcontext():
        program = torch.export.export(Resample(fused), (x,))
    assert resampling_operators(program.graph) == EXPORTED[fused, frames]
    torch.testing.assert_close(program.module()(x), eager_sum(x, eager_pool(x, (1, 2, 2))), rtol=0, atol=1e-6)
    assert launches == {}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("height", [4, 5])
def test_forms_under_the_compiler(fused: bool, height: int, cpu: str, launches: Counter[str]) -> None:
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(1, 2, 2, height, 6)
    torch.compiler.reset()
    y = torch.compile(Resample(fused), fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(y, eager_sum(x, eager_pool(x, (1, 2, 2))), rtol=0, atol=1e-6)
    names = {getattr(node.target, "__name__", node.target) for graph in graphs for node in graph.graph.nodes}
    # Windows that the border cuts are pooled and upsampled by torch's operators.
    assert ("avg_pool2d" in names) == (height == 5 and not fused)
    assert ("interpolate" in names) == (height == 5)
    assert launches == {}


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace warns that it is old, and of sizes
def test_other_tracers_see_operators_of_torch(cpu: str, launches: Counter[str]) -> None:
    x = torch.randn(2, 2, 2, 4, 4)
    expected = eager_sum(x, eager_pool(x, (1, 2, 2)))
    with torch.no_grad():
        traced = torch.jit.trace(Resample(False), (x,), check_trace=False)
    assert torch.equal(traced(x), expected) and "octvideo::" not in str(traced.graph)
    assert launches == {}


# --- the kernels in the package -------------------------------------------------------------------------------------


def test_forms_where_kernels_run(device: str, forms: list[str]) -> None:
    x, low = a_map((1, 2, 3, 5, 5), device), a_map((1, 2, 3, 3, 3), device)
    kernel = (1, 2, 2)
    pooled = [ran_by(forms, lambda f=fused: resample.average_pool(x, kernel, fused=f)) for fused in (False, True)]
    assert pooled == [["kernels.average_pool"]] * 2
    add = lambda fused=False: ran_by(forms, lambda: resample.add_upsampled(x.clone(), low, fused=fused))  # noqa: E731
    grad = lambda to: ran_by(forms, lambda: resample.pooling_gradient(low, (3, 5, 5), kernel, to))  # noqa: E731
    assert add() == add(fused=True) == ["kernels.add_upsampled"]
    assert grad(None) == ["kernels.upsample_shares"] and grad(x) == ["kernels.add_upsampled"]
    with torch.no_grad():
        assert add() == ["kernels.add_upsampled_"] and add(fused=True) == ["kernels.add_upsampled"]
        assert grad(x.clone()) == ["kernels.add_upsampled_"]
    assert ran_by(forms, lambda: resample.upsampling_gradient(x, kernel)) == ["kernels.average_pool"]
    # what they do not cover
    assert ran_by(forms, lambda: resample.average_pool(x, (3, 1, 1))) == ["_pool_by_avg_pool2d"]
    assert ran_by(forms, lambda: resample.average_pool(x.double(), kernel)) == ["_pool_by_avg_pool2d"]
    assert ran_by(forms, lambda: resample.average_pool(x[:, :0], kernel)) == []


def test_dispatch_modes_and_transforms_meet_the_kernels(cpu: str, launches: Counter[str]) -> None:
    x = torch.randn(2, 2, 4, 4)
    expected = eager_pool(x, (2, 2))

    def pool(x: Tensor) -> Tensor:
        return resample.average_pool(x, (2, 2))

    with FlopCounterMode(display=False) as counter:
        pool(x)
    assert counter.get_total_flops() == 2 * x.numel()
    assert torch.equal(torch.func.vmap(pool)(x[None])[0], expected)
    assert torch.equal(torch.func.grad(lambda t: pool(t).sum())(x), torch.full_like(x, 0.25))
    assert torch.equal(torch.func.jvp(pool, (x,), (x,))[1], expected)
    assert launches == {"pool": 5, "upsample_add": 1}  # pool: 1 + 1 + 1 + 2


@pytest.mark.parametrize("arrangement", ["apart", "late"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.ReLU6()], ids=str)
@pytest.mark.parametrize("alpha_out", [0.0, 0.5])
def test_fused_layers_use_the_kernels(
    alpha_out: float, activation: nn.Module | None, layout: str, arrangement: str, device: str, launches: Counter[str]
) -> None:
    if arrangement == "late" and not alpha_out:
        pytest.skip("late is for two frequencies")
    conv = OctConv3d(6, 8, 1, alpha_in=0.5, alpha_out=alpha_out).to(device)
    layer = FusedOctConv(conv, activation, arrangement)
    x = Octave(a_map((1, 3, 2, 5, 4), device, layout), a_map((1, 3, 2, 3, 2), device, layout))
    high, low = a_map((1, 8 - int(8 * alpha_out), 2, 5, 4), device, layout), a_map((1, 4, 2, 3, 2), device, layout)
    for shortcut in (None, Octave(high, low) if alpha_out else high):
        launches.clear()
        with torch.no_grad():
            y = layer(x, shortcut)
        assert launches["upsample_add"] == 1 and launches["pool"] == (1 if alpha_out else 0)
        with kernels.enabled(False), torch.no_grad():
            expected = layer(x, shortcut)
        for own, theirs in zip(y, expected, strict=True) if alpha_out else [(y, expected)]:
            np.testing.assert_allclose(double(own), double(theirs), rtol=0, atol=1e-5)
    if not alpha_out:  # a shortcut that broadcasts is added by torch
        with torch.no_grad():
            found = layer(x, high[..., :1, :1])
            with kernels.enabled(False):
                np.testing.assert_allclose(double(found), double(layer(x, high[..., :1, :1])), rtol=0, atol=1e-5)


def test_fused_layers_have_gradients_by_their_input(device: str) -> None:
    layer = FusedOctConv(OctConv3d(6, 8, 1, alpha_in=0.5, alpha_out=0.5).to(device), nn.ReLU(), "apart")
    x = Octave(*(a_map(shape, device).requires_grad_() for shape in ((1, 3, 2, 5, 4), (1, 3, 2, 3, 2))))

    def gradients() -> tuple[Tensor, ...]:
        y = layer(x, None)
        return torch.autograd.grad(y.high.square().sum() + y.low.sum(), tuple(x))

    found = gradients()
    with kernels.enabled(False):
        for own, theirs in zip(found, gradients(), strict=True):
            np.testing.assert_allclose(double(own), double(theirs), rtol=0, atol=1e-5)


def test_a_training_step_by_the_kernels(device: str, launches: Counter[str]) -> None:
    conv = OctConv3d(6, 8, (1, 3, 3), padding=(0, 1, 1), alpha_in=0.5, alpha_out=0.5).to(device)
    x = Octave(*(a_map(shape, device).requires_grad_() for shape in ((1, 3, 2, 5, 4), (1, 3, 2, 3, 2))))

    def gradients() -> tuple[Tensor, ...]:
        y = conv(x)
        return torch.autograd.grad(y.high.square().sum() + y.low.square().sum(), (*x, *conv.parameters()))

    found = gradients()
    assert launches["pool"] and launches["upsample_add"]
    step = 1e-5 if device == "cpu" else 1e-3  # cuDNN rounds to TF32, and sums weight gradients in any order
    with kernels.enabled(False):
        for own, theirs in zip(found, gradients(), strict=True):
            np.testing.assert_allclose(double(own), double(theirs), rtol=step, atol=step)


def test_a_fused_network_gives_the_same(device: str, launches: Counter[str]) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = OctConv3d(4, 8, (1, 3, 3), padding=(0, 1, 1), alpha_in=0.5, alpha_out=0.5)
            self.b = OctConv3d(8, 4, (1, 3, 3), padding=(0, 1, 1), alpha_in=0.5, alpha_out=0.5)
            self.relu = nn.ReLU()

        def forward(self, x: Octave) -> feature.Feature:
            return feature.lift(self.relu, feature.lift(torch.add, self.b(feature.lift(self.relu, self.a(x))), x))

    network = fuse(Block()).to(device)
    x = Octave(a_map((2, 2, 2, 5, 6), device), a_map((2, 2, 2, 3, 3), device))
    with torch.no_grad():
        y = network(x)
        assert launches["upsample_add"] and launches["pool"]
        with kernels.enabled(False):
            expected = network(x)
    for own, theirs in zip(y, expected, strict=True):
        np.testing.assert_allclose(double(own), double(theirs), rtol=0, atol=1e-5)
