"""The operators of the Triton kernels by torch's own rules: autograd, torch.func, dispatch modes, compiler and export."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from octvideo.analysis.complexity import _POOLS
from octvideo.octave import feature, kernels

from .kernel_maps import CASES, Case, a_low_map, a_map, eager_pool, eager_sum

CASE = ((2, 2, 3, 5, 4), (2, 2, 2))
KERNEL = CASE[1]


def relu_sum(y: Tensor, low: Tensor, shortcut: Tensor) -> Tensor:
    return kernels.add_upsampled(y, low, shortcut=shortcut, relu=True)


def plain_relu_sum(y: Tensor, low: Tensor, shortcut: Tensor) -> Tensor:
    return torch.relu(eager_sum(y, low) + shortcut)


def sum_in_place(y: Tensor, low: Tensor) -> Tensor:
    return kernels.add_upsampled_(y * 1, low)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], str]] = {
    "pool": (lambda x: kernels.average_pool(x, KERNEL), lambda x: eager_pool(x, KERNEL), "y"),
    "sum": (kernels.add_upsampled, eager_sum, "y low"),
    "sum in place": (sum_in_place, eager_sum, "y low"),
    "sum, shortcut, relu": (relu_sum, plain_relu_sum, "y low shortcut"),
}
"""By name: a function of the kernels, the same of torch's operators, and the maps that both read."""


def maps_for(names: str, device: str, *batch: int, shape: tuple[int, ...] = CASE[0]) -> tuple[Tensor, ...]:
    shapes = {"y": shape, "shortcut": shape, "low": (*shape[:2], *feature.low_size(shape[2:], KERNEL))}
    return tuple(torch.randn(*batch, *shapes[name]).to(device) for name in names.split())


def loss_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *maps: function(*maps).pow(3).sum()


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # gradcheck asks for float64, and the kernels sum in float32
@pytest.mark.parametrize("name", ["pool", "sum", "sum in place"])
def test_gradcheck_forward_backward_and_second_order(name: str, cpu: str) -> None:
    """Linear functions have exact difference quotients at any step, so float32 is enough."""
    function, _, _ = FUNCTIONS[name]
    y, low = a_map((1, 1, 3, 1), cpu).requires_grad_(), a_map((1, 1, 2, 1), cpu).requires_grad_()
    maps = (y,) if name == "pool" else (y, low)
    called = (lambda x: kernels.average_pool(x, (2, 2))) if name == "pool" else function
    options = {"eps": 0.5, "atol": 1e-4, "rtol": 1e-4}
    assert torch.autograd.gradcheck(called, maps, check_forward_ad=True, check_batched_grad=True, **options)
    assert torch.autograd.gradgradcheck(called, maps, check_fwd_over_rev=True, **options)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode(name: str, device: str, launches: Counter[str]) -> None:
    function, plain, names = FUNCTIONS[name]
    maps, tangents = maps_for(names, device), maps_for(names, device)

    def derivative(f: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad(), fwd.dual_level():
            tangent = fwd.unpack_dual(f(*map(fwd.make_dual, maps, tangents))).tangent
            assert tangent is not None
            return tangent

    close(derivative(function), derivative(plain))
    assert sum(launches.values()) == 2  # the value and its tangent


@pytest.mark.parametrize("which", ["y", "low"])
def test_forward_mode_by_one_of_the_maps(which: str, cpu: str) -> None:
    y, low = maps_for("y low", cpu)
    with fwd.dual_level():
        maps = [fwd.make_dual(x, x) if name == which else x for name, x in (("y", y), ("low", low))]
        tangent = fwd.unpack_dual(kernels.add_upsampled(*maps)).tangent
    expected = y if which == "y" else feature.upsample(low, y.shape[2:])
    assert torch.equal(tangent, expected)


def test_the_gradient_stops_where_the_relu_is_zero(device: str) -> None:
    maps = [x.requires_grad_() for x in maps_for("y low shortcut", device)]
    grad = torch.randn(CASE[0], device=device)
    found = torch.autograd.grad(relu_sum(*maps), maps, grad)
    expected = torch.autograd.grad(plain_relu_sum(*maps), maps, grad)
    close(found, expected)
    assert 0 < found[0].count_nonzero().item() < found[0].numel()


# --- torch.func -----------------------------------------------------------------------------------------------------


def check_transform(name: str, maps: tuple[Tensor, ...], transform: Callable[..., Any]) -> None:
    """Apply a transform to a function of the kernels and to that of torch's operators, and compare the results."""
    function, plain, _ = FUNCTIONS[name]
    close(transform(function, maps), transform(plain, maps))


def argnums(maps: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(maps)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_grad(name: str, device: str, launches: Counter[str]) -> None:
    maps = maps_for(FUNCTIONS[name][2], device)
    check_transform(name, maps, lambda f, maps: torch.func.grad(loss_of(f), argnums(maps))(*maps))
    assert sum(launches.values()) == 2  # forward and backward


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jvp(name: str, device: str, launches: Counter[str]) -> None:
    check_transform(name, maps_for(FUNCTIONS[name][2], device), lambda f, maps: torch.func.jvp(f, maps, maps))
    assert sum(launches.values()) == 2


@pytest.mark.parametrize("dim", [0, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap(name: str, dim: int, device: str, launches: Counter[str]) -> None:
    maps = tuple(x.movedim(0, dim) for x in maps_for(FUNCTIONS[name][2], device, 3))
    check_transform(name, maps, lambda f, maps: torch.func.vmap(f, in_dims=dim, out_dims=1)(*maps))
    assert sum(launches.values()) == 1  # one launch for the batch


def test_vmap_over_one_of_the_maps(device: str) -> None:
    y, low = maps_for("y low", device)
    ys, lows = maps_for("y low", device, 3)
    for maps, in_dims in (((ys, low), (0, None)), ((y, lows), (None, 0))):
        found = torch.func.vmap(kernels.add_upsampled, in_dims=in_dims)(*maps)
        close(found, torch.func.vmap(eager_sum, in_dims=in_dims)(*maps))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nested_transforms(name: str, cpu: str) -> None:
    def gradient(f: Callable[..., Tensor]) -> Callable[..., Any]:
        return torch.func.grad(loss_of(f))

    names = FUNCTIONS[name][2]
    maps, batch, tiny = maps_for(names, cpu), maps_for(names, cpu, 2), maps_for(names, cpu, shape=(1, 1, 1, 2, 2))
    check_transform(name, batch, lambda f, maps: torch.func.vmap(gradient(f))(*maps))
    check_transform(name, batch, lambda f, maps: torch.func.grad(loss_of(torch.func.vmap(f)))(*maps))
    check_transform(name, batch, lambda f, maps: torch.func.jvp(torch.func.vmap(f), maps, maps))
    check_transform(name, maps, lambda f, maps: torch.func.jvp(gradient(f), maps, maps))
    check_transform(name, tiny, lambda f, maps: torch.func.hessian(loss_of(f))(*maps))


def test_a_map_of_an_outer_transform_in_an_inner_one(cpu: str) -> None:
    """The inner transform follows the weight only; the outer one must still see how the map changes the result."""
    (x,) = maps_for("y", cpu)
    weight = torch.ones_like(eager_pool(x, KERNEL))

    def outer(pool: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.func.grad(lambda w: (pool(x) * w).square().sum())(weight)

    function, plain, _ = FUNCTIONS["pool"]
    close(torch.func.jvp(outer(function), (x,), (x,)), torch.func.jvp(outer(plain), (x,), (x,)))
    constant = torch.func.vmap(lambda scale: function(x) * scale)(torch.arange(3.0))
    close(constant, torch.func.vmap(lambda scale: plain(x) * scale)(torch.arange(3.0)))


# --- dispatch modes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_flops_of_pooling_are_those_of_avg_pool2d(case: Case, cpu: str) -> None:
    x = a_map(case[0], cpu).requires_grad_()
    with FlopCounterMode(display=False, custom_mapping=_POOLS) as kernel:
        y = kernels.average_pool(x, case[1])
        y.sum().backward()  # sums are no multiply-adds
    with FlopCounterMode(display=False, custom_mapping=_POOLS) as plain:
        eager_pool(x, case[1])
    assert kernel.get_total_flops() == plain.get_total_flops() > 0
    assert set(kernel.get_flop_counts()["Global"]) == {torch.ops.octvideo.pool}


def test_sums_have_no_flops(cpu: str) -> None:
    y, low = maps_for("y low", cpu)
    with FlopCounterMode(display=False) as counter:
        kernels.add_upsampled(y, low.requires_grad_(), relu=True).sum().backward()
        kernels.sum_pool(y, KERNEL)
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_tensors_have_the_real_shapes_and_strides(case: Case, layout: str, cpu: str) -> None:
    real = a_map(case[0], cpu, layout), a_low_map(case, cpu, layout)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in real]
    for maps in (real, fake):
        assert maps is real or all(type(x) is not Tensor for x in maps)

    def results(y: Tensor, low: Tensor) -> list[Tensor]:
        y = y.clone()
        shares = kernels.upsample_shares(low, case[0][2:], case[1])
        return [kernels.average_pool(y, case[1]), kernels.add_upsampled(y, low), kernels.add_upsampled_(y, low), shares]

    for found, expected in zip(results(*fake), results(*real), strict=True):
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_the_meta_device(cpu: str) -> None:
    x = torch.empty(2, 3, 5, 7, device="meta")
    y = kernels.average_pool(x, (2, 2))
    assert y.shape == (2, 3, 3, 4) and y.device.type == "meta"
    assert kernels.add_upsampled(x, y).shape == x.shape
    with pytest.raises(ValueError, match="does not upsample"):
        kernels.add_upsampled(x, y[..., :2])


@pytest.mark.parametrize(("case", "layout"), [(CASES[0], "contiguous"), (CASES[4], "channels last")], ids=str)
def test_opcheck(case: Case, layout: str, cpu: str) -> None:
    """Check schema (what is mutated and aliased), fake kernel, and AOTAutograd with dynamic shapes."""
    y, low = a_map(case[0], cpu, layout), a_low_map(case, cpu, layout)
    window, last, operators = list(case[1]), layout == "channels last", torch.ops.octvideo
    opcheck(operators.pool, (y, window, True, last))
    opcheck(operators.upsample, (low, list(y.shape[2:]), window, True, last))
    opcheck(operators.upsample_add, (y, low, y.clone(), True, False))
    opcheck(operators.upsample_add_, (y.clone(), low, None, False, True))


# --- compiler and export --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_they_compile_with_their_gradients(backend: str, cpu: str, launches: Counter[str]) -> None:
    def loss(y: Tensor, low: Tensor) -> Tensor:
        total = kernels.add_upsampled(y, low + kernels.average_pool(y, KERNEL), shortcut=-y, relu=True)
        return kernels.add_upsampled_(total * 2, low).pow(2).sum()

    maps = [x.requires_grad_() for x in maps_for("y low", cpu)]
    expected = torch.autograd.grad(loss(*maps), maps)
    eager = launches.copy()
    launches.clear()
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    close(torch.autograd.grad(compiled(*maps), maps), expected)
    assert launches["pool"] == eager["pool"] and launches["upsample_add"] >= 3
    torch.compiler.reset()


class Module(nn.Module):
    def forward(self, y: Tensor, low: Tensor) -> Tensor:
        return kernels.add_upsampled(y, low + kernels.average_pool(y, KERNEL), relu=True)


@pytest.mark.parametrize("strict", [False, True])
def test_they_export(strict: bool, cpu: str) -> None:
    y, low = maps_for("y low", cpu)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Module(), (y, low), dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    names = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.octvideo.pool.default in names and torch.ops.octvideo.upsample_add.default in names
    more = torch.cat([y, y + 1]), torch.cat([low, low - 1])
    assert torch.equal(program.module()(*more), Module()(*more))


def test_the_operator_in_place_compiles(cpu: str) -> None:
    y, low = maps_for("y low", cpu)
    expected = eager_sum(y, low)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def add(y: Tensor, low: Tensor) -> Tensor:
        torch.ops.octvideo.upsample_add_(y, low, None, False, False)
        return y

    with torch.no_grad():
        assert torch.equal(add(y, low), expected)
    assert torch.equal(y, expected)


def test_the_operator_in_place_raises_the_version(device: str) -> None:
    y, low = maps_for("y low", device)
    before = y._version
    torch.ops.octvideo.upsample_add_(y, low, None, False, False)
    assert y._version == before + 1
