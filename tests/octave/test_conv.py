import copy
import io
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from octvideo.octave import (
    Feature,
    Octave,
    OctBatchNorm2d,
    OctBatchNorm3d,
    OctConv2d,
    OctConv3d,
    average_pool,
    lift,
    split_channels,
    upsample,
)
from octvideo.octave.feature import low_size
from tests.devices import DEVICES

from . import reference
from .ddp_worker import batch, network

OctConv = OctConv2d | OctConv3d

ALPHAS = (0, 0.125, 0.25, 0.5, 0.75, 1)
POOLS_3D = ((1, 2, 2), (2, 2, 2), (2, 1, 1))
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler (g++)")


def same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    return tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))


def make_input(
    channels: int, alpha: float, size: Sequence[int], pool: Sequence[int], dtype: torch.dtype = torch.float64
) -> Feature:
    """A random batch of two that a layer with this alpha_in takes."""
    c_high, c_low = reference.split(channels, alpha)
    high = torch.randn(2, c_high, *size, dtype=dtype)
    if not c_low:
        return high
    return Octave(high, torch.randn(2, c_low, *reference.ceil_size(size, pool), dtype=dtype))


def tensors(x: Feature) -> list[Tensor]:
    return list(x) if isinstance(x, Octave) else [x]


def map_feature(fn: Callable[[Tensor], Tensor], x: Feature) -> Feature:
    return Octave(fn(x.high), fn(x.low)) if isinstance(x, Octave) else fn(x)


def evaluate(layer: OctConv, x: Feature) -> list[np.ndarray]:
    """What the reference gives for this layer's parameters and what the user asked of it."""
    high, low = (x.high.numpy(), x.low.numpy()) if isinstance(x, Octave) else (x.numpy(), None)
    _, c_out_low = reference.split(layer.out_channels, layer.alpha_out)
    assert not isinstance(layer.padding, str)
    y_high, y_low = reference.octave_conv(
        high,
        low,
        layer.weight.detach().numpy(),
        None if layer.bias is None else layer.bias.detach().numpy(),
        c_out_low,
        layer.pool,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.padding_mode,
        layer.pool_stride,
    )
    return [y_high] if y_low is None else [y_high, y_low]


def error(layer: OctConv, x: Feature) -> float:
    """Largest difference between layer and reference; infinite where the shapes differ."""
    with torch.no_grad():
        got = [y.numpy() for y in tensors(layer(x))]
    expected = evaluate(layer, x)
    if [y.shape for y in got] != [y.shape for y in expected]:
        return math.inf
    return max((float(np.abs(g - e).max()) for g, e in zip(got, expected, strict=True) if e.size), default=0.0)


def assert_close(got: Feature, expected: Feature, rtol: float = 0, atol: float = 1e-12) -> None:
    assert type(got) is type(expected)
    torch.testing.assert_close(tensors(got), tensors(expected), rtol=rtol, atol=atol)


def assert_near(got: Feature, expected: Feature, tolerance: float) -> None:
    """Largest difference relative to the largest value of each map; dtypes may differ."""
    for g, e in zip(tensors(got), tensors(expected), strict=True):
        assert g.shape == e.shape
        if e.numel():
            assert (g.double() - e.double()).abs().max() <= tolerance * e.double().abs().max()


# --- against the reference ------------------------------------------------------------------------------------------

GEOMETRIES_3D = [
    # kernel, stride, dilation, size
    ((1, 1, 1), (1, 1, 1), (1, 1, 1), (4, 4, 6)),
    ((1, 1, 1), (2, 2, 2), (1, 1, 1), (3, 5, 4)),
    ((1, 1, 1), (1, 2, 2), (1, 1, 1), (1, 7, 3)),
    ((3, 3, 3), (1, 1, 1), (1, 1, 1), (3, 5, 3)),
    ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2), (1, 1, 1), (4, 4, 6)),
    ((3, 3, 3), (1, 2, 2), (1, 1, 1), (3, 6, 5)),
    ((3, 3, 3), (2, 1, 1), (1, 1, 1), (5, 3, 4)),
    ((3, 3, 3), (1, 1, 1), (2, 2, 2), (3, 4, 5)),
    ((3, 3, 3), (1, 2, 2), (2, 1, 2), (2, 5, 5)),
    ((3, 1, 1), (1, 1, 1), (1, 1, 1), (1, 4, 5)),
    ((3, 1, 1), (2, 1, 1), (1, 1, 1), (5, 4, 3)),
    ((1, 3, 3), (1, 1, 1), (1, 1, 1), (2, 4, 5)),
    ((1, 3, 3), (1, 2, 2), (1, 1, 1), (1, 7, 6)),
    ((1, 3, 3), (2, 2, 2), (1, 1, 1), (3, 1, 2)),
]


@pytest.mark.parametrize("pool", POOLS_3D)
@pytest.mark.parametrize(("kernel", "stride", "dilation", "size"), GEOMETRIES_3D)
def test_conv3d_equals_the_reference(
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    size: tuple[int, ...],
    pool: tuple[int, ...],
) -> None:
    errors = {}
    for alpha_in, alpha_out in product(ALPHAS, ALPHAS):
        layer = OctConv3d(
            8,
            16,
            kernel,
            stride,
            same_padding(kernel, dilation),
            dilation,
            bias=alpha_in != alpha_out,
            dtype=torch.float64,
            alpha_in=alpha_in,
            alpha_out=alpha_out,
            pool=pool,
        )
        errors[alpha_in, alpha_out] = error(layer, make_input(8, alpha_in, size, pool))
    assert len(errors) == 36
    assert {alphas: e for alphas, e in errors.items() if not e < 1e-12} == {}


@pytest.mark.parametrize("pool", [(2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "size"),
    [
        ((1, 1), (1, 1), (1, 1), (4, 6)),
        ((1, 1), (2, 2), (1, 1), (5, 4)),
        ((3, 3), (1, 1), (1, 1), (7, 5)),
        ((3, 3), (2, 2), (1, 1), (8, 6)),
        ((3, 3), (2, 2), (1, 1), (9, 7)),
        ((3, 3), (2, 1), (1, 1), (6, 1)),
        ((3, 3), (1, 1), (2, 2), (6, 5)),
        ((3, 5), (1, 2), (2, 1), (1, 5)),
        ((7, 7), (2, 2), (1, 1), (9, 8)),
    ],
)
def test_conv2d_equals_the_reference(
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    size: tuple[int, ...],
    pool: tuple[int, ...],
) -> None:
    errors = {}
    for alpha_in, alpha_out in product(ALPHAS, ALPHAS):
        layer = OctConv2d(
            16,
            8,
            kernel,
            stride,
            same_padding(kernel, dilation),
            dilation,
            bias=alpha_in == alpha_out,
            dtype=torch.float64,
            alpha_in=alpha_in,
            alpha_out=alpha_out,
            pool=pool,
        )
        errors[alpha_in, alpha_out] = error(layer, make_input(16, alpha_in, size, pool))
    assert {alphas: e for alphas, e in errors.items() if not e < 1e-12} == {}


@pytest.mark.parametrize("pool", POOLS_3D)
def test_large_kernel_equals_the_reference(pool: tuple[int, ...]) -> None:
    for stride, alpha_in, alpha_out in [((1, 2, 2), 0, 0.5), (1, 0.25, 0.75), (2, 1, 0.5), ((1, 2, 2), 0.5, 0)]:
        layer = OctConv3d(
            4, 4, (5, 7, 7), stride, (2, 3, 3), dtype=torch.float64, alpha_in=alpha_in, alpha_out=alpha_out, pool=pool
        )
        assert error(layer, make_input(4, alpha_in, (5, 9, 8), pool)) < 1e-12


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
@pytest.mark.parametrize("groups", [2, 4])
def test_groups_equal_the_reference(groups: int, stride: tuple[int, ...]) -> None:
    c_in, c_out = 8 * groups, 16 * groups
    for pool, alpha_in, alpha_out in product(POOLS_3D, ALPHAS, ALPHAS):
        layer = OctConv3d(
            c_in,
            c_out,
            (1, 3, 3),
            stride,
            (0, 1, 1),
            groups=groups,
            bias=alpha_in != alpha_out,
            dtype=torch.float64,
            alpha_in=alpha_in,
            alpha_out=alpha_out,
            pool=pool,
        )
        x = make_input(c_in, alpha_in, (3, 4, 5), pool)
        assert error(layer, x) < 1e-12, (pool, alpha_in, alpha_out)


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_depthwise_equals_the_reference(stride: tuple[int, ...], multiplier: int, bias: bool) -> None:
    for pool, alpha in product(POOLS_3D, ALPHAS):
        layer = OctConv3d(
            8,
            8 * multiplier,
            3,
            stride,
            1,
            groups=8,
            bias=bias,
            dtype=torch.float64,
            alpha_in=alpha,
            alpha_out=alpha,
            pool=pool,
        )
        assert error(layer, make_input(8, alpha, (3, 5, 4), pool)) < 1e-12, (pool, alpha)


def test_depthwise_has_no_path_between_frequencies() -> None:
    layer = OctConv2d(8, 8, 3, padding=1, groups=8, dtype=torch.float64, alpha_in=0.5, alpha_out=0.5)
    x, other = make_input(8, 0.5, (6, 6), (2, 2)), make_input(8, 0.5, (6, 6), (2, 2))
    assert isinstance(x, Octave) and isinstance(other, Octave)
    y, z = layer(x), layer(Octave(x.high, other.low))
    assert torch.equal(y.high, z.high) and not torch.allclose(y.low, z.low)
    z = layer(Octave(other.high, x.low))
    assert torch.equal(y.low, z.low) and not torch.allclose(y.high, z.high)


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_padding_modes_equal_the_reference(padding_mode: str) -> None:
    for stride, (alpha_in, alpha_out) in product((1, 2), [(0, 0.5), (0.5, 0.5), (0.25, 0), (1, 0.5), (0, 0)]):
        layer = OctConv2d(
            8,
            8,
            (3, 5),
            stride,
            (1, 2),
            padding_mode=padding_mode,
            dtype=torch.float64,
            alpha_in=alpha_in,
            alpha_out=alpha_out,
        )
        assert error(layer, make_input(8, alpha_in, (8, 13), (2, 2))) < 1e-12, (stride, alpha_in, alpha_out)


@pytest.mark.parametrize("pool", POOLS_3D)
@pytest.mark.parametrize(
    ("kernel", "stride", "groups"),
    [(3, (2, 2, 2), 1), (3, (1, 2, 2), 2), ((1, 3, 3), (2, 3, 4), 1), (3, (2, 1, 2), 16), (1, (2, 2, 2), 1)],
    ids=str,
)
def test_strides_of_the_convolution_itself_equal_the_reference(
    kernel: int | tuple[int, ...], stride: tuple[int, ...], groups: int, pool: tuple[int, ...]
) -> None:
    padding = 1 if kernel == 3 else tuple((k - 1) // 2 for k in np.broadcast_to(kernel, 3).tolist())
    for alpha_in, alpha_out in product(ALPHAS, ALPHAS):
        if groups == 16 and alpha_in != alpha_out:
            continue
        layer = OctConv3d(
            16,
            16,
            kernel,
            stride,
            padding,
            groups=groups,
            dtype=torch.float64,
            alpha_in=alpha_in,
            alpha_out=alpha_out,
            pool=pool,
            pool_stride=False,
        )
        assert error(layer, make_input(16, alpha_in, (3, 6, 5), pool)) < 1e-12, (alpha_in, alpha_out)


@pytest.mark.parametrize("time", [5, 6, 8])
@pytest.mark.parametrize("padding", [(0, 1, 1), (2, 1, 1)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 1, 1), (2, 2, 2)])
def test_padding_may_change_a_dimension_that_is_not_pooled(
    stride: tuple[int, ...], padding: tuple[int, ...], time: int
) -> None:
    for alpha_in, alpha_out in product((0, 0.5, 1), (0, 0.5, 1)):
        layer = OctConv3d(4, 4, 3, stride, padding, dtype=torch.float64, alpha_in=alpha_in, alpha_out=alpha_out)
        x = make_input(4, alpha_in, (time, 5, 4), (1, 2, 2))
        assert error(layer, x) < 1e-12, (alpha_in, alpha_out)


@pytest.mark.parametrize(("alpha_in", "alpha_out"), [(0.5, 0.5), (0, 0.5), (0.25, 0), (1, 1)])
def test_padding_same_is_the_padding_that_keeps_the_size(alpha_in: float, alpha_out: float) -> None:
    def layer(padding: str | tuple[int, ...]) -> OctConv3d:
        torch.manual_seed(1)
        return OctConv3d(
            8, 8, (3, 5, 1), padding=padding, dilation=(2, 1, 1), alpha_in=alpha_in, alpha_out=alpha_out, pool=(2, 2, 2)
        )

    x = make_input(8, alpha_in, (3, 6, 7), (2, 2, 2), torch.float32)
    assert_close(layer("same")(x), layer((2, 2, 0))(x), atol=0)


@pytest.mark.parametrize(("alpha_in", "alpha_out"), [(0.5, 0.5), (0, 0.5), (0.5, 0)])
def test_padding_same_of_an_even_kernel_keeps_the_size_as_its_parent_does(alpha_in: float, alpha_out: float) -> None:
    """nn.Conv3d pads (0, 1) in time for a kernel of two; with 1x1 in space the high map must be its size."""
    parent = nn.Conv3d(8, 8, (2, 1, 1), padding="same")
    layer = OctConv3d(8, 8, (2, 1, 1), padding="same", alpha_in=alpha_in, alpha_out=alpha_out)
    y = layer(make_input(8, alpha_in, (4, 6, 6), (1, 2, 2), torch.float32))
    assert tensors(y)[0].shape[2:] == parent(torch.zeros(2, 8, 4, 6, 6)).shape[2:]


def test_a_split_of_no_channels_is_one_frequency() -> None:
    """int(0.125 * 4) is 0: both sides are plain although alpha is not 0."""
    layer = OctConv2d(4, 4, 3, padding=1, alpha_in=0.125, alpha_out=0.125)
    x = torch.randn(2, 4, 5, 6)
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))


def test_one_input_channel_is_not_depthwise() -> None:
    layer = OctConv2d(1, 4, 3, padding=1, dtype=torch.float64, alpha_out=0.5)
    assert error(layer, make_input(1, 0, (5, 6), (2, 2))) < 1e-12
    layer = OctConv2d(1, 4, 3, padding=1, dtype=torch.float64, alpha_in=1, alpha_out=0.5)
    assert error(layer, make_input(1, 1, (5, 6), (2, 2))) < 1e-12


# --- one weight of the vanilla shape --------------------------------------------------------------------------------


def describe_state(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_is_the_vanilla_one_at_every_alpha(bias: bool) -> None:
    for groups, alpha_in, alpha_out in product((1, 2), ALPHAS, ALPHAS):
        ratios = {"alpha_in": alpha_in, "alpha_out": alpha_out}
        torch.manual_seed(3)
        vanilla2d = nn.Conv2d(16, 32, 3, groups=groups, bias=bias, padding=1)
        torch.manual_seed(3)
        octave2d = OctConv2d(16, 32, 3, groups=groups, bias=bias, padding=1, **ratios)
        vanilla3d = nn.Conv3d(16, 32, (3, 1, 1), groups=groups, bias=bias, padding=(1, 0, 0))
        octave3d = OctConv3d(16, 32, (3, 1, 1), groups=groups, bias=bias, padding=(1, 0, 0), pool=(2, 2, 2), **ratios)
        for vanilla, octave in [(vanilla2d, octave2d), (vanilla3d, octave3d)]:
            assert describe_state(octave) == describe_state(vanilla)
            assert len(list(octave.parameters())) == 1 + bias and not list(octave.buffers())
        # the same start, too: initialization sees the vanilla fan-in
        for name, value in vanilla2d.state_dict().items():
            assert torch.equal(octave2d.state_dict()[name], value)


def test_a_vanilla_state_dict_loads_and_comes_back() -> None:
    vanilla = nn.Conv3d(8, 16, 3, padding=1, dtype=torch.float64)
    for alpha_in, alpha_out in product(ALPHAS, ALPHAS):
        layer = OctConv3d(8, 16, 3, padding=1, dtype=torch.float64, alpha_in=alpha_in, alpha_out=alpha_out)
        assert str(layer.load_state_dict(vanilla.state_dict())) == "<All keys matched successfully>"
        assert all(torch.equal(layer.state_dict()[name], value) for name, value in vanilla.state_dict().items())
        back = nn.Conv3d(8, 16, 3, padding=1, dtype=torch.float64)
        back.load_state_dict(layer.state_dict())
        assert torch.equal(back.weight, vanilla.weight)
        assert error(layer, make_input(8, alpha_in, (2, 4, 4), (1, 2, 2))) < 1e-12


def test_layers_are_their_parents_and_say_their_octave_numbers() -> None:
    layer = OctConv3d(8, 8, 3, padding=1, alpha_in=0.25, alpha_out=0.5, pool=(2, 2, 2), device="meta")
    assert isinstance(layer, nn.Conv3d) and layer.weight.is_meta
    assert isinstance(OctConv2d(8, 8, 3), nn.Conv2d)
    for text in ("8, 8, kernel_size=(3, 3, 3)", "alpha_in=0.25", "alpha_out=0.5", "pool=(2, 2, 2)"):
        assert text in repr(layer)


# --- alpha 0: the parent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "bias": False},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": 3, "padding": "valid"},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 1, "groups": 8},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": 2, "padding_mode": "replicate"},
        {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 8, 7, 6), (8, 7, 6), (2, 8, 5, 7, 6), (8, 5, 7, 6)], ids=str)
@pytest.mark.parametrize("octave_first", [False, True])
def test_alpha_zero_is_the_parent_bit_for_bit(options: dict, shape: tuple[int, ...], octave_first: bool) -> None:
    dims = 2 if shape in [(2, 8, 7, 6), (8, 7, 6)] else 3
    vanilla = (nn.Conv2d if dims == 2 else nn.Conv3d)(8, 16, **options)
    layer = (OctConv2d if dims == 2 else OctConv3d)(8, 16, **options)
    if octave_first:
        vanilla.load_state_dict(layer.state_dict())
    else:
        layer.load_state_dict(vanilla.state_dict())
    x = torch.randn(shape)
    seen, expected_seen = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(seen), vanilla(expected_seen)
    assert type(y) is Tensor and torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(seen.grad, expected_seen.grad)
    assert torch.equal(layer.weight.grad, vanilla.weight.grad)


@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2, 2)])
def test_alpha_zero_without_pooled_strides_is_the_parent_bit_for_bit(stride: int | tuple[int, ...]) -> None:
    vanilla, layer = nn.Conv3d(4, 8, 3, stride, 1), OctConv3d(4, 8, 3, stride, 1, pool_stride=False)
    layer.load_state_dict(vanilla.state_dict())
    x = torch.randn(2, 4, 5, 7, 6)
    assert torch.equal(layer(x), vanilla(x))


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("size", [(4, 8, 6), (5, 7, 9), (2, 3, 5)])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_alpha_zero_with_a_stride_pools_then_convolves(
    stride: tuple[int, ...], size: tuple[int, ...], groups: int
) -> None:
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    pooled = F.avg_pool3d(x, stride, stride, ceil_mode=True, count_include_pad=False)
    layer = OctConv3d(8, 8, 3, stride, 1, groups=groups, dtype=torch.float64)
    assert_close(layer(x), F.conv3d(pooled, layer.weight, layer.bias, padding=1, groups=groups))
    flat = OctConv2d(8, 8, 3, stride[1:], 1, groups=groups, dtype=torch.float64)
    pooled = F.avg_pool2d(x[:, :, 0], stride[1:], stride[1:], ceil_mode=True, count_include_pad=False)
    assert_close(flat(x[:, :, 0]), F.conv2d(pooled, flat.weight, flat.bias, padding=1, groups=groups))


def test_first_layer_takes_a_tensor_and_last_layer_gives_one() -> None:
    x = torch.randn(2, 4, 3, 6, 6)
    first = OctConv3d(4, 8, 3, padding=1, alpha_out=0.25)(x)
    assert isinstance(first, Octave)
    assert (first.high.shape, first.low.shape) == ((2, 6, 3, 6, 6), (2, 2, 3, 3, 3))
    last = OctConv3d(8, 4, 3, padding=1, alpha_in=0.25)(first)
    assert type(last) is Tensor and last.shape == (2, 4, 3, 6, 6)
    all_low = OctConv3d(4, 8, 3, padding=1, alpha_out=1, pool=(2, 2, 2))(x)
    assert isinstance(all_low, Octave)
    assert (all_low.high.shape, all_low.low.shape) == ((2, 0, 3, 6, 6), (2, 8, 2, 3, 3))
    back = OctConv3d(8, 4, 3, padding=1, alpha_in=1, pool=(2, 2, 2))(all_low)
    assert back.shape == (2, 4, 3, 6, 6)


# --- properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS_3D)
@pytest.mark.parametrize("stride", [1, 2, (1, 2, 2)])
def test_constant_maps_give_what_a_vanilla_convolution_gives(pool: tuple[int, ...], stride: int) -> None:
    size = (5, 7, 6)
    for alpha_in, alpha_out in product(ALPHAS, ALPHAS):
        layer = OctConv3d(8, 16, 1, stride, dtype=torch.float64, alpha_in=alpha_in, alpha_out=alpha_out, pool=pool)
        values = torch.randn(2, 8, 1, 1, 1, dtype=torch.float64)
        expected = F.conv3d(values.expand(2, 8, *size), layer.weight, layer.bias, layer.stride)
        c_high, c_low = split_channels(8, alpha_in)
        high = values[:, :c_high].expand(-1, -1, *size)
        x = Octave(high, values[:, c_high:].expand(-1, -1, *low_size(size, pool))) if c_low else high
        y = layer(x)
        if isinstance(y, Octave):
            y = torch.cat([y.high, upsample(y.low, y.high.shape[2:])], dim=1)
        assert_close(y, expected)


@pytest.mark.parametrize("pool", POOLS_3D)
def test_maps_constant_on_blocks_give_what_a_vanilla_convolution_gives(pool: tuple[int, ...]) -> None:
    """Where every window of the pooling holds one value, a 1x1 octave convolution loses nothing."""
    size = (4, 6, 8)
    for alpha_in, alpha_out in product(ALPHAS, ALPHAS):
        layer = OctConv3d(8, 16, 1, dtype=torch.float64, alpha_in=alpha_in, alpha_out=alpha_out, pool=pool)
        blocks = torch.randn(2, 8, *low_size(size, pool), dtype=torch.float64)
        vanilla = upsample(blocks, size)
        expected = F.conv3d(vanilla, layer.weight, layer.bias)
        c_high, c_low = split_channels(8, alpha_in)
        y = layer(Octave(vanilla[:, :c_high], blocks[:, c_high:]) if c_low else vanilla)
        if isinstance(y, Octave):
            y = torch.cat([y.high, upsample(y.low, size)], dim=1)
        assert_close(y, expected)


@pytest.mark.parametrize(("alpha_in", "alpha_out"), [(0.5, 0.5), (0, 0.25), (0.75, 0), (1, 0.5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_linearity(alpha_in: float, alpha_out: float, stride: int) -> None:
    layer = OctConv3d(8, 8, 3, stride, 1, dtype=torch.float64, alpha_in=alpha_in, alpha_out=alpha_out, pool=(2, 2, 2))
    x, y = (make_input(8, alpha_in, (3, 5, 6), (2, 2, 2)) for _ in range(2))
    zero = layer(lift(torch.zeros_like, x))
    combined = lift(torch.sub, layer(lift(lambda a, b: 2 * a - 3 * b, x, y)), zero)
    parts = lift(lambda a, b, z: 2 * (a - z) - 3 * (b - z), layer(x), layer(y), zero)
    assert_close(combined, parts)
    # with nothing in, each output channel holds its own bias, once
    for map_, bias in zip(tensors(zero), layer.bias.split([s for s in split_channels(8, alpha_out) if s]), strict=True):
        assert torch.equal(map_, bias.reshape(1, -1, 1, 1, 1).expand_as(map_))


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 4, "alpha_in": 0.5, "alpha_out": 0.5}, r"4 groups.*6 \+ 6.*6 \+ 6.*0\.5"),
        ({"groups": 3, "alpha_in": 0.25, "alpha_out": 0.1}, r"3 groups.*9 \+ 3.*11 \+ 1.*0\.25.*0\.1"),
        ({"groups": 3, "alpha_out": 0.1}, r"3 groups.*12 \+ 0.*11 \+ 1"),
        ({"groups": 12, "alpha_out": 0.5}, r"depthwise.*12 \+ 0.*6 \+ 6.*0\.5"),
        ({"groups": 12, "alpha_in": 0.5, "alpha_out": 0.25}, r"depthwise.*6 \+ 6.*9 \+ 3"),
        ({"alpha_in": -0.1}, r"alpha is -0\.1.*0 to 1"),
        ({"alpha_in": 1.5}, r"alpha is 1\.5.*0 to 1"),
        ({"alpha_out": math.nan}, r"alpha is nan.*0 to 1"),
        ({"stride": 3}, r"stride \(3, 3\).*1 or 2"),
        ({"stride": (1, 4)}, r"stride \(1, 4\).*1 or 2"),
        ({"stride": 3, "alpha_in": 0.5, "alpha_out": 0.5}, r"stride \(3, 3\).*1 or 2"),
        ({"pool": (3, 3)}, r"pool is \(3, 3\).*1 or 2"),
        ({"pool": (1, 2, 2)}, r"pool is \(1, 2, 2\).*2 dimensions"),
        ({"pool": (1, 1), "alpha_in": 0.5}, r"pool is \(1, 1\).*at least one 2"),
        ({"pool": (0, 2)}, r"pool is \(0, 2\).*1 or 2"),
        ({"padding": 0, "alpha_in": 0.5}, r"kernel \(3, 3\) with padding \(0, 0\).*dimension 0.*= 1\b"),
        ({"padding": (1, 2), "alpha_out": 0.5}, r"kernel \(3, 3\) with padding \(1, 2\).*dimension 1.*= 1\b"),
        ({"padding": 1, "dilation": 2, "alpha_out": 0.5}, r"padding \(1, 1\) and dilation \(2, 2\).*= 2\b"),
        ({"padding": "valid", "alpha_out": 0.5}, r"kernel \(3, 3\) with padding \(0, 0\).*= 1\b"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_layer_that_cannot_work_is_not_built(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OctConv2d(12, 12, 3, **({"padding": 1} | options))


@pytest.mark.parametrize("pool", [(2, 2), (3, 2, 2), (1, 1, 1)])
def test_wrong_pool_in_3d(pool: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"pool is \({', '.join(map(str, pool))}\).*3 dimensions"):
        OctConv3d(8, 8, 1, alpha_in=0.5, pool=pool)


def test_resnext_at_an_eighth_is_impossible_as_in_the_paper() -> None:
    with pytest.raises(ValueError, match=r"32 groups.*112 \+ 16"):
        OctConv2d(128, 128, 3, padding=1, groups=32, alpha_in=0.125, alpha_out=0.125)
    OctConv2d(128, 128, 3, padding=1, groups=32, alpha_in=0.25, alpha_out=0.25)


def zeros(*shapes: tuple[int, ...]) -> Feature:
    maps = [torch.zeros(shape) for shape in shapes]
    return Octave(*maps) if len(maps) == 2 else maps[0]


@pytest.mark.parametrize(
    ("alpha_in", "x", "message"),
    [
        (0, zeros((2, 6, 2, 8, 8), (2, 2, 2, 4, 4)), r"OctConv3d.*8 channels.*\(2, 6, 2, 8, 8\).*\(2, 2, 2, 4, 4\)"),
        (0.25, zeros((2, 8, 2, 8, 8)), r"OctConv3d.*6 \+ 2 channels.*\(2, 8, 2, 8, 8\)"),
        (0.25, zeros((2, 4, 2, 8, 8), (2, 4, 2, 4, 4)), r"6 high and 2 low.*\(2, 4, 2, 8, 8\).*\(2, 4, 2, 4, 4\)"),
        (0.25, zeros((2, 6, 2, 7, 9), (2, 2, 2, 4, 4)), r"\(1, 2, 2\).*\(2, 7, 9\).*\(2, 4, 5\).*\(2, 2, 2, 4, 4\)"),
        (0.25, zeros((2, 6, 2, 8, 8), (2, 2, 1, 4, 4)), r"\(1, 2, 2\).*\(2, 8, 8\).*\(2, 4, 4\).*\(2, 2, 1, 4, 4\)"),
        (0.25, zeros((2, 6, 2, 8, 8), (2, 2, 2, 8, 8)), r"\(1, 2, 2\).*\(2, 8, 8\).*\(2, 4, 4\).*\(2, 2, 2, 8, 8\)"),
        (1.0, zeros((2, 8, 2, 4, 4)), r"0 \+ 8 channels.*\(2, 8, 2, 4, 4\)"),
        (0.25, zeros((6, 2, 8, 8), (2, 2, 4, 4)), r"5 dimensions.*\(6, 2, 8, 8\)"),
        (0.25, zeros((1, 6, 2, 8, 8), (4, 2, 2, 4, 4)), r"\(1, 6, 2, 8, 8\).*\(4, 2, 2, 4, 4\)"),
    ],
    ids=["octave", "tensor", "channels", "odd", "time pooled", "not pooled", "tensor to all low", "unbatched", "batch"],
)
@pytest.mark.parametrize("alpha_out", [0.0, 0.5])
def test_a_wrong_input_is_named(alpha_in: float, alpha_out: float, x: Feature, message: str) -> None:
    layer = OctConv3d(8, 8, 3, padding=1, alpha_in=alpha_in, alpha_out=alpha_out)
    with pytest.raises(ValueError, match=message):
        layer(x)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("alpha_out", [0.0, 0.5])
def test_a_tensor_of_wrong_channels_is_named(alpha_out: float, stride: int) -> None:
    layer = OctConv2d(8, 8, 3, stride, 1, alpha_out=alpha_out)
    with pytest.raises((ValueError, RuntimeError), match=r"8 channels.*6"):
        layer(torch.zeros(2, 6, 8, 8))


@pytest.mark.parametrize(("alpha_out", "stride"), [(0.5, 1), (0.5, 2), (0.0, 2)])
@pytest.mark.parametrize("shape", [(8, 8, 6), (2, 8, 3, 8, 6)], ids=str)
def test_a_tensor_of_wrong_dimensions_is_named(alpha_out: float, stride: int, shape: tuple[int, ...]) -> None:
    layer = OctConv2d(8, 8, 3, stride, 1, alpha_out=alpha_out)
    with pytest.raises((ValueError, RuntimeError), match=r"\[?\(?" + ", ".join(map(str, shape))):
        layer(torch.zeros(shape))


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"alpha_in": 0.5, "alpha_out": 0.5},
        {"alpha_in": 0.5, "alpha_out": 0.5, "stride": (1, 2, 2), "pool": (2, 2, 2)},
        {"alpha_in": 0.5, "alpha_out": 0.5, "stride": 2, "pool": (2, 1, 1)},
        {"alpha_in": 0, "alpha_out": 0.5, "stride": 2},
        {"alpha_in": 0.5, "alpha_out": 0, "pool": (2, 2, 2)},
        {"alpha_in": 1, "alpha_out": 0.5},
        {"alpha_in": 0.5, "alpha_out": 1, "bias": False},
        {"alpha_in": 0.5, "alpha_out": 0.5, "groups": 2, "stride": 2},
        {"alpha_in": 0.5, "alpha_out": 0.5, "groups": 4, "pool": (2, 2, 2)},
    ],
    ids=str,
)
def test_gradcheck_of_both_inputs_weight_and_bias(options: dict) -> None:
    layer = OctConv3d(4, 4, (1, 3, 1), padding=(0, 1, 0), dtype=torch.float64, **options)
    x = make_input(4, layer.alpha_in, (2, 3, 3), layer.pool)
    names = [name for name, _ in layer.named_parameters()]
    assert names == (["weight"] if layer.bias is None else ["weight", "bias"])

    def forward(*values: Tensor) -> tuple[Tensor, ...]:
        maps, parameters = values[: len(tensors(x))], values[len(tensors(x)) :]
        seen = Octave(*maps) if isinstance(x, Octave) else maps[0]
        # (seen,): functional_call spreads a tuple, an Octave too, over forward's arguments
        return tuple(tensors(functional_call(layer, dict(zip(names, parameters, strict=True)), (seen,))))

    inputs = [t.requires_grad_() for t in tensors(x)] + [p.detach().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(forward, inputs)


def test_every_weight_takes_part() -> None:
    """DDP waits for ever on a parameter without a gradient; a block that no path reads would hold zeros."""
    for alpha_in, alpha_out, stride, groups in product(ALPHAS, ALPHAS, (1, 2), (1, 2)):
        layer = OctConv2d(16, 16, 3, stride, 1, groups=groups, alpha_in=alpha_in, alpha_out=alpha_out)
        y = layer(make_input(16, alpha_in, (6, 5), (2, 2), torch.float32))
        sum(part.square().sum() for part in tensors(y)).backward()
        assert layer.weight.grad.count_nonzero() == layer.weight.numel(), (alpha_in, alpha_out, stride, groups)
        assert layer.bias.grad.count_nonzero() == 16


# --- the block: convolution, norm, activation, convolution ----------------------------------------------------------


class Block(nn.Module):
    """Two octave convolutions with a norm between them: a tensor in, a tensor out, Octave inside."""

    def __init__(self, pool: tuple[int, ...], stride: int = 1, alpha: float = 0.5) -> None:
        super().__init__()
        self.conv1 = OctConv3d(4, 8, 3, padding=1, alpha_out=alpha, pool=pool)
        self.norm = OctBatchNorm3d(8, alpha=alpha)
        self.conv2 = OctConv3d(8, 8, 3, stride, 1, alpha_in=alpha, alpha_out=alpha, pool=pool)
        self.conv3 = OctConv3d(8, 4, 1, alpha_in=alpha, pool=pool)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(lift(F.relu, self.conv2(lift(F.relu, self.norm(self.conv1(x))))))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in module.named_parameters()}
    assert grads and all(g is not None for g in grads.values())
    return grads


def step(module: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(output, gradient of the input) of one forward and backward."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.float().square().mean().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize(("pool", "stride"), [((1, 2, 2), 1), ((2, 2, 2), 2)])
def test_compiles_into_one_graph(pool: tuple[int, ...], stride: int) -> None:
    torch._dynamo.reset()
    eager = Block(pool, stride)
    module = copy.deepcopy(eager)
    x = torch.randn(2, 4, 3, 7, 6)
    y, x_grad = step(torch.compile(module, fullgraph=True, backend="aot_eager"), x)
    expected, expected_grad = step(eager, x)
    torch.testing.assert_close([y, x_grad], [expected, expected_grad], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(module), gradients(eager), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(module.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha_in": 1, "alpha_out": 1, "pool": (2, 2, 2)},
        {"alpha_in": 0.5, "alpha_out": 0.5, "groups": 2, "stride": (1, 2, 2)},
        {"alpha_in": 0.5, "alpha_out": 0.5, "groups": 8},
        {"alpha_in": 0, "alpha_out": 0, "stride": 2},
    ],
    ids=str,
)
def test_other_layers_compile_too_and_take_and_give_octaves(options: dict) -> None:
    torch._dynamo.reset()
    layer = OctConv3d(8, 8, 3, padding=1, **options)
    x = make_input(8, layer.alpha_in, (3, 5, 6), layer.pool, torch.float32)
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x), rtol=1e-5, atol=1e-6)


@needs_compiler
def test_compiles_with_inductor() -> None:
    """One layer and no gradient: with a cold cache most of the time goes to the C++ compiler."""
    torch._dynamo.reset()
    layer = OctConv3d(4, 4, 3, padding=1, alpha_in=0.5, alpha_out=0.5, pool=(2, 2, 2))
    x = make_input(4, 0.5, (3, 7, 6), (2, 2, 2), torch.float32)
    with torch.no_grad():
        assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-5, atol=1e-6)


# --- half precision -------------------------------------------------------------------------------------------------

HALF_LAYERS = [
    {"alpha_in": 0.5, "alpha_out": 0.5},
    {"alpha_in": 0.5, "alpha_out": 0.5, "stride": (1, 2, 2)},
    {"alpha_in": 0.5, "alpha_out": 0.5, "stride": 2},
    {"alpha_in": 0, "alpha_out": 0.5, "stride": 2},
    {"alpha_in": 0.5, "alpha_out": 0},
    {"alpha_in": 1, "alpha_out": 0.5},
    {"alpha_in": 1, "alpha_out": 0},
    {"alpha_in": 0.5, "alpha_out": 1},
    {"alpha_in": 0, "alpha_out": 0, "stride": 2},
    {"alpha_in": 0.5, "alpha_out": 0.5, "groups": 8},
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pool", POOLS_3D)
@pytest.mark.parametrize("options", HALF_LAYERS, ids=str)
def test_autocast_and_pure_bf16_are_close_to_fp32(options: dict, pool: tuple[int, ...], device: str) -> None:
    layer = OctConv3d(8, 8, 3, padding=1, pool=pool, device=device, **options)
    x = map_feature(lambda t: t.to(device), make_input(8, layer.alpha_in, (3, 7, 6), pool, torch.float32))
    x = map_feature(lambda t: t.requires_grad_(), x)
    pure, pure_x = copy.deepcopy(layer).bfloat16(), map_feature(lambda t: t.detach().bfloat16().requires_grad_(), x)
    cast, cast_x = copy.deepcopy(layer), map_feature(lambda t: t.detach().clone().requires_grad_(), x)

    y = layer(x)
    pure_y = pure(pure_x)
    with torch.autocast(device, torch.bfloat16):
        cast_y = cast(cast_x)
    for output in (y, pure_y, cast_y):
        sum(part.float().square().sum() for part in tensors(output)).backward()

    assert {part.dtype for part in tensors(pure_y)} == {torch.bfloat16}
    # what nn.Conv3d gives under autocast
    assert {part.dtype for part in tensors(cast_y)} == {torch.bfloat16}
    for other, other_y, other_x in [(pure, pure_y, pure_x), (cast, cast_y, cast_x)]:
        assert_near(map_feature(Tensor.detach, other_y), map_feature(Tensor.detach, y), 0.02)
        for seen, truth in zip(tensors(other_x), tensors(x), strict=True):
            if truth.numel():
                assert seen.grad.dtype == seen.dtype
                assert_near(seen.grad, truth.grad, 0.05)
        for seen, truth in zip(other.parameters(), layer.parameters(), strict=True):
            assert seen.grad.dtype == seen.dtype
            assert_near(seen.grad, truth.grad, 0.05)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pool", [(1, 2, 2), (2, 2, 2)])
def test_a_block_trains_in_bf16(pool: tuple[int, ...], device: str) -> None:
    block = Block(pool, stride=2).to(device)
    x = torch.randn(4, 4, 3, 9, 8, device=device)
    expected, _ = step(copy.deepcopy(block), x)
    cast = copy.deepcopy(block)
    with torch.autocast(device, torch.bfloat16):
        y, x_grad = step(cast, x)
    assert (y.dtype, x_grad.dtype) == (torch.bfloat16, torch.float32)
    assert {g.dtype for g in gradients(cast).values()} == {torch.float32}
    assert_near(y, expected, 0.04)
    pure = copy.deepcopy(block).bfloat16()
    y, x_grad = step(pure, x.bfloat16())
    assert (y.dtype, x_grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {g.dtype for g in gradients(pure).values()} == {torch.bfloat16}
    assert_near(y, expected, 0.04)


@pytest.mark.cuda
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pool", POOLS_3D)
def test_cuda_equals_the_reference(pool: tuple[int, ...], channels_last: bool) -> None:
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    for stride, groups, alpha_in, alpha_out in product((1, 2), (1, 2), (0, 0.25, 1), (0, 0.5, 1)):
        layer = OctConv3d(
            8, 8, 3, stride, 1, groups=groups, dtype=torch.float64, alpha_in=alpha_in, alpha_out=alpha_out, pool=pool
        )
        x = make_input(8, alpha_in, (3, 5, 6), pool)
        expected = evaluate(layer, x)
        y = layer.cuda()(map_feature(lambda t: t.cuda().contiguous(memory_format=layout), x))
        for got, truth in zip(tensors(y), expected, strict=True):
            np.testing.assert_allclose(got.detach().cpu().numpy(), truth, rtol=0, atol=1e-10)


# --- memory formats -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS_3D)
@pytest.mark.parametrize("stride", [1, 2, (1, 2, 2)])
@pytest.mark.parametrize(("alpha_in", "alpha_out"), [(0, 0.5), (0.5, 0.5), (0.5, 0), (0, 1), (1, 1), (1, 0)])
def test_channels_last_3d_stays_channels_last(
    pool: tuple[int, ...], stride: int, alpha_in: float, alpha_out: float
) -> None:
    layer = OctConv3d(16, 16, 3, stride, 1, alpha_in=alpha_in, alpha_out=alpha_out, pool=pool)
    x = make_input(16, alpha_in, (4, 10, 9), pool, torch.float32)
    expected = layer(x)
    x = map_feature(lambda t: t.contiguous(memory_format=torch.channels_last_3d), x)
    for module in (layer, copy.deepcopy(layer).to(memory_format=torch.channels_last_3d)):
        y = module(x)
        assert_close(y, expected, rtol=1e-5, atol=1e-6)
        for part in tensors(y):
            assert part.numel() == 0 or part.is_contiguous(memory_format=torch.channels_last_3d), part.stride()
            assert part.numel() == 0 or part.stride(1) == 1


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("alpha_in", "alpha_out"), [(0, 0.5), (0.5, 0.5), (0.5, 0), (0, 1), (1, 1), (1, 0)])
def test_channels_last_2d_stays_channels_last(stride: int, alpha_in: float, alpha_out: float) -> None:
    layer = OctConv2d(16, 16, 3, stride, 1, alpha_in=alpha_in, alpha_out=alpha_out)
    x = make_input(16, alpha_in, (11, 10), (2, 2), torch.float32)
    expected = layer(x)
    y = layer(map_feature(lambda t: t.contiguous(memory_format=torch.channels_last), x))
    assert_close(y, expected, rtol=1e-5, atol=1e-6)
    for part in tensors(y):
        assert part.numel() == 0 or part.is_contiguous(memory_format=torch.channels_last), part.stride()
        assert part.numel() == 0 or part.stride(1) == 1


# --- checkpointing, copies, DDP -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [(1, 2, 2), (2, 2, 2)])
def test_activation_checkpointing_gives_the_same_gradients(pool: tuple[int, ...]) -> None:
    block = Block(pool)
    again = copy.deepcopy(block)

    def checkpointed(x: Tensor) -> Tensor:
        first = again.conv1(x)
        assert isinstance(first, Octave)
        second = checkpoint(lambda f: again.conv2(lift(F.relu, again.norm(f))), first, use_reentrant=False)
        assert isinstance(second, Octave)
        return again.conv3(lift(F.relu, second))

    again.eval()  # in train mode the recomputed norm would count its batch twice
    x = torch.randn(2, 4, 3, 6, 5)
    expected, expected_grad = step(block.eval(), x)
    y, x_grad = step(checkpointed, x)
    assert torch.equal(y, expected)
    torch.testing.assert_close(x_grad, expected_grad, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradients(again), gradients(block), rtol=1e-6, atol=1e-8)


def test_deepcopy_pickle_and_save_keep_layer_and_numbers(tmp_path: Path) -> None:
    layer = OctConv3d(8, 8, 3, 2, 1, alpha_in=0.25, alpha_out=0.5, pool=(2, 2, 2))
    x = make_input(8, 0.25, (3, 6, 5), (2, 2, 2), torch.float32)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    with torch.no_grad():
        layer.weight.zero_()
    for other in copies:
        assert repr(other) == repr(layer)
        assert_close(map_feature(Tensor.detach, other(x)), map_feature(Tensor.detach, expected), atol=0)


def test_ddp_in_two_processes_gives_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    worker = Path(__file__).with_name("ddp_worker.py")
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(worker), str(tmp_path)]
    workers = [
        subprocess.Popen(
            [*command, str(rank)],
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in workers]
    finally:
        for process in workers:
            process.kill()
    assert [process.returncode for process in workers] == [0, 0], "\n".join(outputs)

    whole = network()
    whole(batch()).square().mean().backward()
    expected = gradients(whole)
    for rank in range(2):
        got = torch.load(tmp_path / f"gradients{rank}.pt", weights_only=True)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    # a rank alone must differ, or the test above shows nothing
    half = network()
    half(batch()[:4]).square().mean().backward()
    assert not torch.allclose(gradients(half)["0.weight"], expected["0.weight"], rtol=1e-3)


# --- cost -----------------------------------------------------------------------------------------------------------


def multiply_adds(layer: nn.Module, x: Feature) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def cost(
    alpha_in: float,
    alpha_out: float,
    pool: tuple[int, ...],
    stride: int = 1,
    kernel: int = 3,
    pool_stride: bool = True,
) -> float:
    """Multiply-adds of the real forward over the vanilla layer's."""
    geometry = (64, 64, kernel, stride, kernel // 2)
    layer = OctConv3d(*geometry, alpha_in=alpha_in, alpha_out=alpha_out, pool=pool, pool_stride=pool_stride)
    x = make_input(64, alpha_in, (4, 8, 8), pool, torch.float32)
    vanilla = 64 * 64 * kernel**3 * 4 * 8 * 8 // stride**3
    assert multiply_adds(nn.Conv3d(*geometry), torch.zeros(2, 64, 4, 8, 8)) == 2 * vanilla
    return multiply_adds(layer, x) / (2 * vanilla)


EIGHTHS = tuple(i / 8 for i in range(9))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("pool", "saved"), [((1, 2, 2), 3 / 4), ((2, 2, 2), 7 / 8), ((2, 1, 1), 1 / 2)])
def test_cost_law(pool: tuple[int, ...], saved: float, kernel: int) -> None:
    """Every number is a sum of powers of two times integers: equality is exact."""
    for alpha in EIGHTHS:
        assert cost(alpha, alpha, pool, kernel=kernel) == 1 - saved * alpha * (2 - alpha), alpha
        assert cost(0, alpha, pool, kernel=kernel) == 1 - saved * alpha, alpha
        assert cost(alpha, 0, pool, kernel=kernel) == 1 - saved * alpha, alpha


@pytest.mark.parametrize(("pool", "saved"), [((1, 2, 2), 3 / 4), ((2, 2, 2), 7 / 8)])
def test_cost_law_with_unequal_ratios(pool: tuple[int, ...], saved: float) -> None:
    """Only H->H runs at full resolution."""
    for alpha_in, alpha_out in product(EIGHTHS[::2], EIGHTHS[1::2]):
        full = (1 - alpha_in) * (1 - alpha_out)
        assert cost(alpha_in, alpha_out, pool) == full + (1 - full) * (1 - saved), (alpha_in, alpha_out)


@pytest.mark.parametrize(("pool", "saved"), [((1, 2, 2), 3 / 4), ((2, 2, 2), 7 / 8)])
def test_cost_at_stride_two(pool: tuple[int, ...], saved: float) -> None:
    """L->H reads the un-pooled low map, which is as large as the high output: only the low output is cheap."""
    for alpha in EIGHTHS:
        assert cost(alpha, alpha, pool, stride=2) == 1 - saved * alpha, alpha
        law = 1 - saved * alpha * (2 - alpha)
        assert cost(alpha, alpha, pool, stride=2, pool_stride=False) == law, alpha


def test_table_1_of_the_paper() -> None:
    alphas = (0, 0.125, 0.25, 0.5, 0.75, 0.875, 1)
    percent = [100 * cost(alpha, alpha, (1, 2, 2)) for alpha in alphas]
    assert [round(p) for p in percent] == [100, 82, 67, 44, 30, 26, 25]

    def elements(alpha: float) -> float:
        layer = OctConv2d(64, 64, 3, padding=1, alpha_out=alpha)
        return sum(part.numel() for part in tensors(layer(torch.zeros(1, 64, 8, 8)))) / (64 * 8 * 8)

    memory = [elements(alpha) for alpha in alphas]
    assert memory == [1 - 3 / 4 * alpha for alpha in alphas]
    # The paper prints 35 at 0.875, where its own law gives 34.4.
    printed = [100, 91, 81, 63, 44, 35, 25]
    assert [abs(100 * m - p) < 0.7 for m, p in zip(memory, printed, strict=True)] == [True] * 7


def test_depthwise_cost() -> None:
    layer = OctConv3d(64, 64, 3, padding=1, groups=64, alpha_in=0.5, alpha_out=0.5)
    x = make_input(64, 0.5, (4, 8, 8), (1, 2, 2), torch.float32)
    assert multiply_adds(layer, x) == 2 * 27 * (32 * 4 * 8 * 8 + 32 * 4 * 4 * 4)


def test_pooling_is_shared_by_the_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most: X_H by the stride, that by the pool, X_L by the stride. What is computed twice is a bug."""
    calls: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def counted(x: Tensor, kernel: Sequence[int]) -> Tensor:
        if any(k > 1 for k in kernel):
            calls.append((tuple(x.shape), tuple(kernel)))
        return average_pool(x, kernel)

    monkeypatch.setattr("octvideo.octave.paths.average_pool", counted)
    x = make_input(8, 0.5, (4, 8, 8), (1, 2, 2), torch.float32)
    high, low = (2, 4, 4, 8, 8), (2, 4, 4, 4, 4)
    OctConv3d(8, 8, 3, padding=1, alpha_in=0.5, alpha_out=0.5)(x)
    assert calls == [(high, (1, 2, 2))]
    calls.clear()
    OctConv3d(8, 8, 3, (1, 2, 2), 1, alpha_in=0.5, alpha_out=0.5)(x)
    assert sorted(calls) == sorted([(high, (1, 2, 2)), ((2, 4, 4, 4, 4), (1, 2, 2)), (low, (1, 2, 2))])
    calls.clear()
    OctConv3d(8, 8, 3, padding=1, alpha_in=0.5)(x)
    assert calls == []


def test_low_input_is_convolved_once_at_stride_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """L->H and L->L share one convolution: three calls for four paths."""
    weights: list[tuple[int, ...]] = []
    conv3d = F.conv3d

    def counted(x: Tensor, weight: Tensor, *arguments: object) -> Tensor:
        weights.append(tuple(weight.shape[:2]))
        return conv3d(x, weight, *arguments)

    monkeypatch.setattr(F, "conv3d", counted)
    x = make_input(8, 0.25, (2, 8, 8), (1, 2, 2), torch.float32)
    OctConv3d(8, 16, 3, padding=1, alpha_in=0.25, alpha_out=0.5)(x)
    assert sorted(weights) == [(8, 6), (8, 6), (16, 2)]


def test_export_keeps_the_numbers() -> None:
    module = nn.Sequential(
        OctConv2d(4, 8, 3, padding=1, alpha_out=0.5), OctBatchNorm2d(8, alpha=0.5), OctConv2d(8, 4, 1, alpha_in=0.5)
    ).eval()
    x = torch.randn(2, 4, 7, 6)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-6, atol=1e-6)


def test_a_concatenation_keeps_the_columns_of_the_weight_in_the_vanilla_order() -> None:
    parts, order = ((5, 0), (1, 3), (2, 1)), [0, 1, 2, 3, 4, 5, 9, 10, 6, 7, 8, 11]
    layer = OctConv2d(12, 6, 3, padding=1, in_parts=parts, alpha_out=0.5)
    plain = OctConv2d(12, 6, 3, padding=1, alpha_in=4 / 12, alpha_out=0.5)
    with torch.no_grad():
        plain.weight.copy_(layer.weight[:, order])
        plain.bias.copy_(layer.bias)
    x = Octave(torch.randn(2, 8, 7, 9), torch.randn(2, 4, 4, 5))
    got, expected = layer(x), plain(x)
    torch.testing.assert_close(got.high, expected.high)
    torch.testing.assert_close(got.low, expected.low)
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_a_concatenation_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"in_parts \(\(3, 1\),\) do not add up to 5 channels"):
        OctConv2d(5, 4, 1, in_parts=((3, 1),))
    with pytest.raises(ValueError, match="2 groups over a concatenation .* give 1 group or one part"):
        OctConv2d(8, 8, 1, groups=2, in_parts=((2, 2), (2, 2)), alpha_out=0.5)
