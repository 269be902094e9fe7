"""Reference: the same layers as convolutions, and torch's finite differences."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octvideo.octave import Octave, OctConv2d, OctConv3d, products
from octvideo.octave.feature import low_size

CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "both sides": (OctConv3d, {"alpha_in": 0.25, "alpha_out": 0.5}),
    "first layer": (OctConv3d, {"alpha_out": 0.25}),
    "last layer": (OctConv2d, {"alpha_in": 0.25}),
    "no bias": (OctConv2d, {"alpha_in": 0.5, "alpha_out": 0.25, "bias": False}),
    "pooled stride": (OctConv3d, {"alpha_in": 0.25, "alpha_out": 0.25, "stride": (1, 2, 2)}),
    "pooled in time": (OctConv3d, {"alpha_in": 0.25, "alpha_out": 0.25, "pool": (2, 2, 2)}),
    "all low": (OctConv2d, {"alpha_in": 1, "alpha_out": 1}),
    "concatenation": (OctConv2d, {"in_parts": ((4, 1), (2, 1)), "alpha_out": 0.5}),
}


def layer_and_maps(case: str) -> tuple[OctConv2d | OctConv3d, list[Tensor]]:
    torch.manual_seed(0)
    kind, options = CASES[case]
    layer = kind(8, 8, 1, dtype=torch.float64, **options)
    size = (3, 5, 6)[-len(layer.pool) :]
    layout = torch.channels_last if len(size) == 2 else torch.channels_last_3d
    shapes = [(2, layer.in_high, *size)] + ([(2, layer.in_low, *low_size(size, layer.pool))] if layer.in_low else [])
    maps = [torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout) for shape in shapes]
    return layer.to(memory_format=layout), maps  # type: ignore[call-overload]


def outputs(layer: Any, maps: list[Tensor]) -> list[Tensor]:
    y = layer(Octave(*maps) if layer.in_low else maps[0])
    return [part for part in (y if isinstance(y, Octave) else [y]) if part.numel()]


def results(layer: Any, maps: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of all that requires one."""
    ys = outputs(layer, maps)
    inputs = [x for x in (*maps, *layer.parameters()) if x.requires_grad and x.numel()]
    return [*ys, *torch.autograd.grad(sum(y.sin().sum() for y in ys), inputs)]


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def operators(layer: Any, maps: list[Tensor]) -> list[str]:
    with Operators() as seen:
        results(layer, maps)
    return seen.names


@pytest.mark.parametrize("frozen", ["nothing", "weight", "maps"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_convolutions(case: str, frozen: str) -> None:
    layer, maps = layer_and_maps(case)
    layer.weight.requires_grad_(frozen != "weight")
    maps = [x.requires_grad_(frozen != "maps") for x in maps]
    expected, convolved = results(layer, maps), operators(layer, maps)
    layer.use_products()
    got, multiplied = results(layer, maps), operators(layer, maps)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert "convolution" in convolved and "mm" not in convolved
    assert "mm" in multiplied and not {"convolution", "convolution_backward"} & set(multiplied)
    assert layer.bias is not None or "copy_" not in multiplied  # no block is copied; the parts of a bias are


@pytest.mark.parametrize("case", ["both sides", "pooled stride", "first layer"])
def test_gradients_by_finite_differences_of_first_and_second_order(case: str) -> None:
    layer, maps = layer_and_maps(case)
    layer.use_products()

    def forward(weight: Tensor, *maps: Tensor) -> list[Tensor]:
        return outputs_with(layer, weight, list(maps))

    inputs = [layer.weight.detach().requires_grad_(), *(x[:1].requires_grad_() for x in maps)]
    assert torch.autograd.gradcheck(forward, inputs)
    assert torch.autograd.gradgradcheck(forward, inputs)


def outputs_with(layer: Any, weight: Tensor, maps: list[Tensor]) -> Any:
    y = torch.func.functional_call(layer, {"weight": weight}, (Octave(*maps) if layer.in_low else maps[0],))
    return tuple(y) if isinstance(y, Octave) else y


def test_operations_in_place_may_follow() -> None:
    layer, maps = layer_and_maps("both sides")

    def gradient() -> Tensor:
        (grad,) = torch.autograd.grad(sum(y.relu_().square().sum() for y in outputs(layer, maps)), layer.weight)
        return grad

    expected = gradient()
    layer.use_products()
    torch.testing.assert_close(gradient(), expected, rtol=1e-12, atol=1e-12)


def test_only_eager_training_over_channels_last_maps_multiplies() -> None:
    layer, maps = layer_and_maps("both sides")
    layer.use_products()
    contiguous = [x.contiguous() for x in maps]
    assert "convolution" in operators(layer, contiguous)
    with torch.no_grad(), Operators() as seen:
        outputs(layer, maps)
    assert "convolution" in seen.names and "mm" not in seen.names
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for got, expected in zip(outputs_of(compiled, maps), outputs(layer, maps), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def outputs_of(function: Any, maps: list[Tensor]) -> list[Tensor]:
    return list(function(Octave(*maps)))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (1, 3, 3), "padding": (0, 1, 1)},
        {"kernel_size": 1, "groups": 2},
        {"kernel_size": 1, "stride": (2, 1, 1), "pool_stride": False},
        {"kernel_size": 1, "padding": (1, 0, 0)},
    ],
    ids=str,
)
def test_other_convolutions_stay(options: dict[str, Any]) -> None:
    layer = OctConv3d(8, 8, **options, alpha_in=0.5, alpha_out=0.5)
    layer.use_products()
    assert layer._product_paths == []


@pytest.mark.parametrize(("vendor", "expected"), [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_products_are_fast_on_intel_alone(vendor: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: f"vendor_id : {vendor}\n")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.are_fast.__wrapped__() is expected
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert products.are_fast.__wrapped__() is False
