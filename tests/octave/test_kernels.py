"""The functions of the Triton kernels: derivatives by autograd and torch.func, bad input, and where they are usable."""

import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from octvideo.octave import feature, kernels, kernels_library

from .kernel_maps import (
    CASES,
    LAYOUTS,
    Case,
    a_low_map,
    a_map,
    copy_of_module,
    double,
    eager_pool,
    eager_sum,
)


@pytest.fixture
def untried() -> Iterator[None]:
    """No device has been tried before the test, and none after it."""
    kernels._works.cache_clear()
    yield
    kernels._works.cache_clear()


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


def nearly(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case: Case, layout: str, device: str) -> None:
    """Those of torch's operations; and of a linear map A, sum(g * A x) = sum(A^T g * x) whatever torch says."""
    shape, kernel = case
    x, low = a_map(shape, device, layout).requires_grad_(), a_low_map(case, device, layout).requires_grad_()
    g_low, g_high = a_low_map(case, device, layout), a_map(shape, device, layout)

    y = kernels.average_pool(x, kernel)
    (grad,) = torch.autograd.grad(y, x, g_low)
    assert torch.equal(grad, torch.autograd.grad(eager_pool(x, kernel), x, g_low)[0])
    assert (g_low * y).sum().item() == pytest.approx((grad * x).sum().item(), abs=1e-4)
    assert grad.is_contiguous(memory_format=LAYOUTS[layout][x.dim()])

    total = kernels.add_upsampled_(x * 1, low)
    own = torch.autograd.grad(total, (x, low), g_high)
    theirs = torch.autograd.grad(eager_sum(x, low), (x, low), g_high)
    assert torch.equal(own[0], theirs[0])
    np.testing.assert_allclose(double(own[1]), double(theirs[1]), rtol=0, atol=2e-6)
    assert (g_high * total).sum().item() == pytest.approx(
        (own[0] * x).sum().item() + (own[1] * low).sum().item(), abs=1e-4
    )
    assert own[1].is_contiguous(memory_format=LAYOUTS[layout][x.dim()])


def test_gradients_are_finite_differences(device: str) -> None:
    """Steps of 1/4 of small integers: both maps are linear, so the quotients are exact."""
    x = torch.randint(-4, 5, (1, 1, 3, 2), device=device).float().requires_grad_()
    low = torch.randint(-4, 5, (1, 1, 2, 1), device=device).float().requires_grad_()
    weight = torch.randint(-4, 5, (1, 1, 3, 2), device=device).float()

    def loss() -> Tensor:
        pooled = kernels.average_pool(x, (2, 2))
        return (weight * kernels.add_upsampled(x, pooled + low)).sum()

    loss().backward()
    with torch.no_grad():
        for leaf in (x, low):
            assert leaf.grad is not None
            for index in np.ndindex(*leaf.shape):
                before = loss().item()
                leaf[index] += 0.25
                assert (loss().item() - before) / 0.25 == leaf.grad[index].item()
                leaf[index] -= 0.25


def test_gradients_of_gradients(device: str) -> None:
    x = a_map((1, 2, 3, 5), device).requires_grad_()
    low = a_map((1, 2, 2, 3), device).requires_grad_()
    found = []
    for pool, add in ((kernels.average_pool, kernels.add_upsampled), (eager_pool, eager_sum)):
        first = torch.autograd.grad(
            (pool(x, (2, 2)) ** 3).sum() + (add(x, low) ** 3).sum(), (x, low), create_graph=True
        )
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, low)))
    for own, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(double(own), double(theirs), rtol=1e-5, atol=1e-4)


def test_gradient_that_is_one_number_everywhere(device: str) -> None:
    """sum().backward() hands in a gradient whose strides are 0."""
    x, low = a_map((1, 2, 3, 5, 5), device).requires_grad_(), a_map((1, 2, 3, 3, 3), device).requires_grad_()
    kernels.average_pool(x, (1, 2, 2)).sum().backward()
    kernels.add_upsampled_(x * 2, low).sum().backward()
    assert x.grad is not None and low.grad is not None
    share = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0], device=device)  # the last row and column have windows of their own
    expected = share[:, None] * share
    assert torch.equal(x.grad[0, 0, 0], expected + 2)
    assert torch.equal(low.grad[0, 0, 0, 0].cpu(), torch.tensor([4.0, 4.0, 2.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_half_precision(dtype: torch.dtype, device: str) -> None:
    case = CASES[4]
    x, low = (m.requires_grad_() for m in (a_map(case[0], device, dtype=dtype), a_low_map(case, device, dtype=dtype)))
    g = a_map(case[0], device, dtype=dtype)
    total = kernels.add_upsampled(x, low + kernels.average_pool(x, case[1]))
    own = torch.autograd.grad(total, (x, low), g)
    a, b = (m.detach().float().requires_grad_() for m in (x, low))
    theirs = torch.autograd.grad(eager_sum(a, b + eager_pool(a, case[1])), (a, b), g.float())
    for one, other in zip(own, theirs, strict=True):
        assert one.dtype == dtype
        # three roundings on the way to x: the pooled gradient, its share, the sum of both ways
        step = 2 ** (-8 if dtype is torch.bfloat16 else -11)
        np.testing.assert_allclose(double(one), double(other), rtol=0, atol=8 * step)


def test_autograd_notices_that_a_saved_map_was_changed(device: str) -> None:
    x = a_map((1, 2, 4, 4), device).requires_grad_()
    low = a_map((1, 2, 2, 2), device)
    for grad_mode in (torch.enable_grad, torch.no_grad):
        y = x * 1
        saved = y * y
        with grad_mode():
            kernels.add_upsampled_(y, low)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()


def test_in_inference_mode(device: str) -> None:
    with torch.inference_mode():
        y, low = a_map((1, 2, 4, 4), device), a_map((1, 2, 2, 2), device)
        expected = eager_sum(y, low)
        assert torch.equal(kernels.add_upsampled_(y, low), expected)
        assert torch.equal(kernels.average_pool(y, (2, 2)), eager_pool(y, (2, 2)))


# --- second order and forward mode ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # gradcheck asks for float64, and the kernels sum in float32
@pytest.mark.parametrize("name", ["pool", "sum", "sum in place"])
def test_gradcheck(name: str, cpu: str) -> None:
    """Check first and second order, backward and forward. A linear function has exact difference quotients in float32."""
    y, low = torch.randn(1, 1, 3, 1).requires_grad_(), torch.randn(1, 1, 2, 1).requires_grad_()
    maps = (y,) if name == "pool" else (y, low)
    function = (lambda x: kernels.average_pool(x, (2, 1))) if name == "pool" else FUNCTIONS[name][0]
    options: dict[str, Any] = {"eps": 0.5, "atol": 1e-4, "rtol": 1e-4}
    batched = name == "pool"
    assert torch.autograd.gradcheck(function, maps, check_forward_ad=True, check_batched_grad=batched, **options)
    if name != "sum in place":  # which copies the other sum
        assert torch.autograd.gradgradcheck(function, maps, **options)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode(name: str, device: str, launches: Counter[str]) -> None:
    function, plain, names = FUNCTIONS[name]
    maps, tangents = maps_for(names, device), maps_for(names, device)

    def derivative(f: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad(), fwd.dual_level():
            tangent = fwd.unpack_dual(f(*map(fwd.make_dual, maps, tangents))).tangent
            assert tangent is not None
            return tangent

    nearly(derivative(function), derivative(plain))
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
    nearly(found, expected)
    assert 0 < found[0].count_nonzero().item() < found[0].numel()


# --- torch.func -----------------------------------------------------------------------------------------------------


def check_transform(name: str, maps: tuple[Tensor, ...], transform: Callable[..., Any]) -> None:
    """Apply a transform to a function of the kernels and to that of torch's operators, and compare the results."""
    function, plain, _ = FUNCTIONS[name]
    nearly(transform(function, maps), transform(plain, maps))


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
        nearly(found, torch.func.vmap(eager_sum, in_dims=in_dims)(*maps))


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
    nearly(torch.func.jvp(outer(function), (x,), (x,)), torch.func.jvp(outer(plain), (x,), (x,)))
    constant = torch.func.vmap(lambda scale: function(x) * scale)(torch.arange(3.0))
    nearly(constant, torch.func.vmap(lambda scale: plain(x) * scale)(torch.arange(3.0)))


# --- bad input ------------------------------------------------------------------------------------------------------


def test_errors_name_the_numbers(cpu: str) -> None:
    y, low = torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 2, 3)
    for window in ((2, 3), (1, 1, 1)):
        with pytest.raises(ValueError, match=rf"window is \({window[0]}, {window[1]}.*1 or 2.*2 dimensions"):
            kernels.average_pool(y, window)
    for wrong in ((1, 2, 2, 2), (1, 3, 2, 3), (2, 2, 2, 3), (1, 2, 1, 3), (1, 2, 1, 2, 3)):
        for add in (kernels.add_upsampled, kernels.add_upsampled_):
            with pytest.raises(ValueError, match=r"upsample to \(1, 2, 4, 5\)"):
                add(y, torch.zeros(wrong))
    with pytest.raises(ValueError, match=r"\(1, 2, 2, 3\).*upsample to \(4, 7\)"):
        kernels.upsample_shares(low, (4, 7), (2, 2))
    with pytest.raises(ValueError, match=r"shortcut \(1, 2, 1, 1\).*\(1, 2, 4, 5\)"):
        kernels.add_upsampled(y, low, shortcut=torch.zeros(1, 2, 1, 1))
    with pytest.raises(RuntimeError, match=r"one memory location.*clone\(\)"):
        kernels.add_upsampled_(torch.zeros(1, 2, 1, 1).expand(1, 2, 4, 5), low)


# --- where they are used --------------------------------------------------------------------------------------------


def test_usable_where_there_is_a_device(cpu: str) -> None:
    x = torch.zeros(1, 1, 2, 2)
    assert kernels.usable(x) and kernels.usable(x, x) and kernels.usable(nn.Parameter(x))
    assert kernels.usable(x.half()) and kernels.usable(x.bfloat16())
    assert not kernels.usable(x.double()) and not kernels.usable(x, x.half()) and not kernels.usable(x.to("meta"))
    with kernels.enabled(False):
        assert not kernels.usable(x)
        with kernels.enabled(True):
            assert kernels.usable(x)
    assert kernels.usable(x)


def test_not_usable_on_a_cpu() -> None:
    assert not kernels.usable(torch.zeros(1, 1, 2, 2))


def test_the_first_try_is_outside_of_modes_and_transforms(
    cpu: str, untried: None, recwarn: pytest.WarningsRecorder
) -> None:
    x = torch.randn(2, 1, 4, 4)
    with FlopCounterMode(display=False) as counter, fwd.dual_level():
        y = torch.func.vmap(lambda x: feature.average_pool(x, (2, 2)))(x[None])[0]
    assert counter.get_total_flops() == 2 * x.numel()
    assert torch.equal(y, eager_pool(x, (2, 2))) and len(recwarn) == 0
    kernels._works.cache_clear()
    with FakeTensorMode():
        assert kernels.usable(x)


def test_a_device_on_which_they_fail_is_told_once(cpu: str, untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Program:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            raise OSError("Failed to find C compiler")

    monkeypatch.setattr(kernels_library, "_programs", lambda: SimpleNamespace(pool=Program()))
    x = torch.randn(1, 1, 4, 4)
    with pytest.warns(RuntimeWarning, match=r"not used on cpu.*OSError: Failed to find C compiler.*OCTVIDEO_KERNELS=0"):
        y = feature.average_pool(x, (2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(feature.average_pool(x, (2, 2)), y)


def test_a_device_on_which_they_are_wrong_is_told(cpu: str, untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_library, "_launch_pool", lambda x, y, *_: y.zero_())
    with pytest.warns(RuntimeWarning, match=r"not used on cpu.*AssertionError"):
        assert not kernels.usable(torch.randn(1, 1, 4, 4))


def test_without_triton(untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DEVICES", ("cpu",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.usable(torch.randn(1, 1, 4, 4))


@pytest.mark.parametrize(("value", "on"), [("0", False), ("1", True), (None, True)])
def test_the_environment_turns_them_off(value: str | None, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("OCTVIDEO_KERNELS", raising=False)
    else:
        monkeypatch.setenv("OCTVIDEO_KERNELS", value)
    assert copy_of_module(Path(kernels.__file__), "kernels_of_another_process")._enabled is on
