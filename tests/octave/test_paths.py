import copy
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from octvideo.octave import Feature, Octave, OctConv2d, OctConv3d, average_pool, paths, shared_pooling, upsample
from octvideo.octave.feature import add_upsampled, low_size, pooling_gradient, upsampling_gradient

SIZES = [((4, 6), (2, 2)), ((5, 7), (2, 2)), ((1, 3), (2, 1)), ((3, 4, 6), (1, 2, 2)), ((3, 5, 6), (2, 2, 2))]


def layout(x: Tensor, channels_last: bool) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if channels_last else x


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("size", "kernel"), SIZES)
def test_pooling_and_adding_without_gradients_are_those_with(
    size: tuple[int, ...], kernel: tuple[int, ...], channels_last: bool
) -> None:
    x = layout(torch.randn(2, 3, *size), channels_last)
    low = layout(torch.randn(2, 3, *low_size(size, kernel)), channels_last)
    pooled, total = average_pool(x, kernel), add_upsampled(x, low)
    assert torch.equal(total, x + upsample(low, size))
    with torch.no_grad():
        assert torch.equal(average_pool(x, kernel), pooled)
        own = x.clone()
        assert add_upsampled(own, low) is own
    assert torch.equal(own, total)


@pytest.mark.parametrize(("size", "kernel"), SIZES)
def test_gradients_of_pooling_and_upsampling_are_autograds(size: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    low = torch.randn(2, 3, *low_size(size, kernel), dtype=torch.float64, requires_grad=True)
    grad_low, grad = torch.randn_like(low), torch.randn_like(x)
    (expected,) = torch.autograd.grad(average_pool(x, kernel), x, grad_low)
    torch.testing.assert_close(pooling_gradient(grad_low, size, kernel, None), expected)
    torch.testing.assert_close(pooling_gradient(grad_low, size, kernel, grad.clone()), grad + expected)
    (expected,) = torch.autograd.grad(upsample(low, size), low, grad)
    torch.testing.assert_close(upsampling_gradient(grad, kernel), expected)


def given(layer: OctConv2d | OctConv3d, size: Sequence[int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    maps = [torch.randn(2, layer.in_high, *size, dtype=dtype)]
    if layer.in_low:
        maps.append(torch.randn(2, layer.in_low, *low_size(size, layer.pool), dtype=dtype))
    return maps


def outputs(layer: torch.nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    x: Feature = Octave(*maps) if len(maps) == 2 else maps[0]
    y = layer(x)
    return list(y) if isinstance(y, Octave) else [y]


def gradients(layer: torch.nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    """Of maps, weight and bias; of random sums of the outputs."""
    wanted = [x.requires_grad_() for x in maps if x.numel()] + list(layer.parameters())
    ys = [y for y in outputs(layer, maps) if y.numel()]
    torch.manual_seed(1)
    return list(torch.autograd.grad(ys, wanted, [torch.randn_like(y) for y in ys]))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a function while layers are plain operators, which autograd follows one by one."""

    def forward(layer: Any, size: Any, dtype: torch.dtype, high: Any, low: Any, weight: Tensor, bias: Any) -> Any:
        return paths._forward(layer, size, high, low, paths._blocks(layer, weight, dtype), bias)

    def call(fn: Any, *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(paths._Paths, "apply", forward)
            return fn(*args)

    return call


@pytest.mark.parametrize("size", [(4, 6, 4), (3, 5, 1)])
@pytest.mark.parametrize("pool", [(1, 2, 2), (2, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"groups": 8}, {"pool_stride": False}], ids=str)
def test_gradients_are_those_of_plain_operators(
    options: dict, pool: tuple[int, ...], size: tuple[int, ...], plain: Any
) -> None:
    for stride, alpha_in, alpha_out in product((1, 2, (1, 2, 2)), (0, 0.25, 1), (0, 0.5, 1)):
        if (options.get("groups") == 8 and alpha_in != alpha_out) or (options.get("groups") == 2 and 0.25 == alpha_in):
            continue
        layer = OctConv3d(
            8, 8, 3, stride, 1, alpha_in=alpha_in, alpha_out=alpha_out, pool=pool, dtype=torch.float64, **options
        )
        maps = given(layer, size)
        expected = plain(gradients, layer, maps)
        assert all(x.abs().max() > 0 for x in expected)
        torch.testing.assert_close(gradients(layer, maps), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", [(2, 2), "same"])
def test_gradients_with_dilation_and_without_bias(padding: Any, plain: Any) -> None:
    options = {"padding": padding, "bias": False, "dilation": 2}
    layer = OctConv2d(8, 6, 3, alpha_in=0.25, alpha_out=0.5, dtype=torch.float64, **options)
    maps = given(layer, (7, 6))
    torch.testing.assert_close(gradients(layer, maps), plain(gradients, layer, maps), rtol=1e-12, atol=1e-12)


def test_an_even_kernel_of_padding_same_keeps_its_gradients() -> None:
    layer = OctConv3d(4, 4, (2, 1, 1), padding="same", alpha_in=0.5, alpha_out=0.5, dtype=torch.float64)
    maps = [x.requires_grad_() for x in given(layer, (3, 3, 2))]
    assert torch.autograd.gradcheck(lambda *x: tuple(outputs(layer, x)), maps)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha_in": 0.5, "alpha_out": 0.5},
        {"alpha_in": 0.5, "alpha_out": 0.5, "stride": (1, 2, 2), "pool": (2, 2, 2)},
        {"alpha_in": 1, "alpha_out": 0.5},
        {"alpha_in": 0, "alpha_out": 0.5, "stride": 2},
    ],
    ids=str,
)
def test_second_gradients(options: dict) -> None:
    layer = OctConv3d(2, 2, (1, 3, 1), padding=(0, 1, 0), dtype=torch.float64, **options)
    maps = [x[:1] for x in given(layer, (2, 3, 2))]
    names = [name for name, _ in layer.named_parameters()]

    def forward(*values: Tensor) -> tuple[Tensor, ...]:
        own = dict(zip(names, values[len(maps) :], strict=True))
        return tuple(outputs(lambda x: functional_call(layer, own, (x,)), values[: len(maps)]))  # type: ignore[arg-type]

    inputs = [x.detach().clone().requires_grad_() for x in [*maps, *layer.parameters()]]
    assert torch.autograd.gradgradcheck(forward, inputs)


@pytest.mark.parametrize("frozen", ["weight", "bias", "weight and bias", "high", "low", "maps"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(frozen: str, plain: Any) -> None:
    layer = OctConv2d(8, 8, 3, padding=1, alpha_in=0.5, alpha_out=0.25, dtype=torch.float64)
    maps = dict(zip(("high", "low"), given(layer, (5, 6)), strict=True))
    everything = {**maps, **dict(layer.named_parameters())}
    for name, x in everything.items():
        x.requires_grad_(name not in frozen and not (frozen == "maps" and name in maps))

    def gradients_left() -> dict[str, Tensor | None]:
        for x in everything.values():
            x.grad = None
        sum(y.square().sum() for y in outputs(layer, list(maps.values()))).backward()
        return {name: x.grad for name, x in everything.items()}

    got, expected = gradients_left(), plain(gradients_left)
    assert {name for name, x in got.items() if x is None} == {n for n, x in everything.items() if not x.requires_grad}
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_an_output_that_nobody_reads(plain: Any) -> None:
    layer = OctConv2d(8, 8, 3, padding=1, alpha_in=0.5, alpha_out=0.5, dtype=torch.float64)
    for index in (0, 1):

        def weight_gradient(index: int = index) -> Tensor:
            (grad,) = torch.autograd.grad(outputs(layer, given(layer, (4, 5)))[index].square().sum(), layer.weight)
            return grad

        torch.manual_seed(2)
        got = weight_gradient()
        torch.manual_seed(2)
        torch.testing.assert_close(got, plain(weight_gradient), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha_in", [0, 0.5, 1])
def test_operations_in_place_may_follow(alpha_in: float, plain: Any) -> None:
    layer = OctConv2d(4, 4, 3, padding=1, alpha_in=alpha_in, alpha_out=0.5, dtype=torch.float64)
    maps = given(layer, (4, 4))

    def gradient() -> Tensor:
        (grad,) = torch.autograd.grad(sum(y.relu_().square().sum() for y in outputs(layer, maps)), layer.weight)
        return grad

    torch.testing.assert_close(gradient(), plain(gradient), rtol=1e-12, atol=1e-12)


def test_only_what_the_layer_was_given_is_kept() -> None:
    layer = OctConv3d(8, 8, 3, (1, 2, 2), 1, alpha_in=0.5, alpha_out=0.5)
    maps, kept = given(layer, (2, 8, 8), torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        outputs(layer, maps)
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in [*maps, layer.weight]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_each_block_of_the_weight_once(dtype: torch.dtype) -> None:
    """The half-precision blocks have the size of one weight, and are dense; gradients come back in float32."""
    layer = OctConv2d(8, 8, 3, padding=1, alpha_in=0.5, alpha_out=0.5).to(memory_format=torch.channels_last)
    maps, kept = [x.requires_grad_() for x in given(layer, (6, 6), torch.float32)], []
    with (
        torch.autocast("cpu", dtype),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
    ):
        ys = outputs(layer, maps)
    assert {y.dtype for y in ys} == {dtype}
    high, low, weight, *blocks = kept
    assert [x.shape for x in (high, low)] == [x.shape for x in maps] and {high.dtype, low.dtype} == {dtype}
    assert weight.data_ptr() == layer.weight.data_ptr()
    assert {block.dtype for block in blocks} == {dtype} and sum(block.numel() for block in blocks) == weight.numel()
    assert all(block.is_contiguous(memory_format=torch.channels_last) for block in blocks)
    sum(y.float().square().sum() for y in ys).backward()
    for x in [*maps, layer.weight, layer.bias]:
        assert x.grad is not None and x.grad.dtype == torch.float32 and x.grad.abs().max() > 0


def test_second_derivatives_under_autocast_lead_to_the_weight() -> None:
    torch.manual_seed(0)
    layer = OctConv2d(8, 8, 3, padding=1, alpha_in=0.5, alpha_out=0.5)
    maps = given(layer, (6, 6), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total = sum(y.float().square().sum() for y in outputs(layer, maps))
    (grad,) = torch.autograd.grad(total, layer.weight, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), layer.weight)
    # the loss is quadratic in the weight: its Hessian times twice the gradient
    step = 1e-2 * grad.detach() / grad.detach().norm()
    moved = copy.deepcopy(layer)
    moved.weight.data += step
    exact = []
    for each in (layer, moved):
        (g,) = torch.autograd.grad(sum(y.square().sum() for y in outputs(each, maps)), each.weight)
        exact.append(g)
    expected = 2 * (exact[1] - exact[0]) * grad.detach().norm() / 1e-2
    assert (second - expected).norm() < 0.05 * expected.norm()


def test_maps_of_another_dtype_than_the_weight_are_refused() -> None:
    layer = OctConv2d(8, 8, 3, padding=1, alpha_in=0.5, alpha_out=0.5)
    with pytest.raises(RuntimeError):
        outputs(layer, given(layer, (6, 6), torch.bfloat16))


def test_the_same_numbers_each_time() -> None:
    layer = OctConv3d(8, 8, 3, padding=1, alpha_in=0.25, alpha_out=0.5)
    maps = given(layer, (3, 6, 7), torch.float32)
    first, second = gradients(layer, maps), gradients(layer, maps)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_can_be_traced() -> None:
    """torch.jit.trace, with gradients on as they are by default; it checks its graph without them."""
    module = torch.nn.Sequential(OctConv2d(4, 8, 3, padding=1, alpha_out=0.5), OctConv2d(8, 4, 1, alpha_in=0.5)).eval()
    x = torch.randn(2, 4, 6, 8)
    assert torch.equal(torch.jit.trace(module, x)(x), module(x))


def test_what_two_layers_read_is_pooled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strided layer and one that is not, as a projection and the first convolution of a block."""
    torch.manual_seed(0)
    pooled: list[tuple[int, ...]] = []
    monkeypatch.setattr(paths, "average_pool", lambda x, k: pooled.append(tuple(x.shape)) or average_pool(x, k))
    projection = OctConv3d(8, 8, 1, stride=(1, 2, 2), alpha_in=0.5, alpha_out=0.5)
    first = OctConv3d(8, 8, 1, alpha_in=0.5, alpha_out=0.5)
    x = Octave(torch.randn(2, 4, 3, 8, 8, requires_grad=True), torch.randn(2, 4, 3, 4, 4, requires_grad=True))

    def step(shared: bool) -> tuple[list[tuple[int, ...]], tuple[Tensor, ...]]:
        pooled.clear()
        with shared_pooling() if shared else nullcontext():
            maps = [*projection(x), *first(x)]
        made = [shape for shape in pooled if shape[1:] == (4, 3, 8, 8)]
        inputs = [*x, projection.weight, first.weight]
        return made, torch.autograd.grad(sum(y.square().sum() for y in maps), inputs)

    (twice, expected), (once, gradients) = step(shared=False), step(shared=True)
    assert (len(twice), len(once)) == (2, 1)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    with shared_pooling():  # a map that changes in between is another one
        high = x.high.detach().clone()
        before = first(Octave(high, x.low)).low
        high.zero_()
        assert not torch.equal(first(Octave(high, x.low)).low, before)
        assert torch.equal(first(Octave(torch.zeros_like(high), x.low)).low, first(Octave(high, x.low)).low)
    pooled.clear()
    first(x), first(x)
    assert len(pooled) == 2  # nothing is kept


def test_a_training_step_runs_on_the_meta_device() -> None:
    """A device without autocast, for counting: shapes of the outputs and gradients."""
    with torch.device("meta"):
        layer = OctConv3d(8, 8, 3, padding=1, alpha_in=0.5, alpha_out=0.5)
        x = Octave(torch.empty(1, 4, 2, 6, 6, requires_grad=True), torch.empty(1, 4, 2, 3, 3, requires_grad=True))
    high, low = layer(x)
    torch.autograd.backward([high, low], [torch.empty_like(high), torch.empty_like(low)])
    assert (high.shape, low.shape) == (x.high.shape, x.low.shape)
    for one in (x.high, x.low, layer.weight, layer.bias):
        assert one.grad.shape == one.shape and one.grad.is_meta
