"""Convolution and norm on a GPU in every dtype and memory format, with gradients, against float64 on the CPU."""

import copy
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from octvideo.octave import Feature, Octave, OctBatchNorm2d, OctBatchNorm3d, OctConv2d, OctConv3d, lift
from octvideo.octave.feature import low_size, split_channels
from tests.devices import CUDA_ONLY, DEVICES, exact_float32  # noqa: F401  # exact_float32 is a fixture

pytestmark = pytest.mark.usefixtures("exact_float32")
CHANNELS = 16
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error relative to the largest value: four roundings or more of 2**-24, 2**-11 and 2**-8."""
LAYOUTS = {
    False: {2: torch.contiguous_format, 3: torch.contiguous_format},
    True: {2: torch.channels_last, 3: torch.channels_last_3d},
}


def maps_of(x: Feature) -> list[Tensor]:
    return [part for part in (x if isinstance(x, Octave) else (x,)) if part.numel()]


def make_input(alpha: float, pool: Sequence[int]) -> Feature:
    """Maps of odd sizes, so that the last window of a pooling has fewer values."""
    size = (3, 9, 7)[-len(pool) :]
    high, low = split_channels(CHANNELS, alpha)
    x = torch.randn(3, high, *size, dtype=torch.float64)
    return Octave(x, torch.randn(3, low, *low_size(size, pool), dtype=torch.float64)) if low else x


def results(conv: nn.Module, norm: nn.Module, x: Feature) -> dict[str, list[Tensor]]:
    """One forward and backward pass in training: outputs, gradients and statistics."""
    x = lift(lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_(), x)
    y = norm(conv(x))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(part.shape, dtype=torch.float64, generator=generator) for part in maps_of(y)]
    pairs = zip(maps_of(y), weights, strict=True)
    sum((part.double() * weight.to(part.device)).sum() for part, weight in pairs).backward()
    return {
        "outputs": [part.detach() for part in maps_of(y)],
        "input gradients": [part.grad for part in maps_of(x)],
        "weight gradients": [p.grad for module in (conv, norm) for p in module.parameters()],
        "statistics": [norm.running_mean, norm.running_var],
    }


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("pool", [(1, 2, 2), (2, 2, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_convolution_and_norm_equal_float64(
    device: str, dtype: torch.dtype, pool: tuple[int, ...], channels_last: bool
) -> None:
    torch.manual_seed(0)
    convolution, batch_norm = {2: (OctConv2d, OctBatchNorm2d), 3: (OctConv3d, OctBatchNorm3d)}[len(pool)]
    layout = LAYOUTS[channels_last][len(pool)]
    for stride, alpha_in, alpha_out in product((1, 2), (0, 0.5), (0, 0.5)):
        # no bias: the norm subtracts it, so its gradient is nothing but rounding
        options = {"alpha_in": alpha_in, "alpha_out": alpha_out, "pool": pool}
        conv = convolution(CHANNELS, CHANNELS, 3, stride, 1, bias=False, **options).double()
        norm = batch_norm(CHANNELS, alpha=alpha_out).double()
        x = make_input(alpha_in, pool)
        # The reference reads what the layer on the device reads: values that are rounded to dtype.
        conv, x = conv.to(dtype).double(), lift(lambda t: t.to(dtype).double(), x)
        expected = results(copy.deepcopy(conv), copy.deepcopy(norm), x)
        got = results(
            conv.to(device, dtype).to(memory_format=layout),
            norm.to(device, torch.float32),
            lift(lambda t: t.to(device, dtype).contiguous(memory_format=layout), x),
        )
        for what, parts in expected.items():
            for part, truth in zip(got[what], parts, strict=True):
                error = (part.detach().cpu().double() - truth).abs().max() / truth.abs().max().clamp(min=1e-3)
                assert error < TOLERANCE[dtype], f"{what} at stride {stride}, alphas {alpha_in} and {alpha_out}"
        assert {part.dtype for part in got["outputs"]} == {dtype}
        for part in got["outputs"]:
            assert part.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("device", DEVICES)
def test_memory_format_changes_no_value(device: str) -> None:
    torch.manual_seed(0)
    conv = OctConv3d(CHANNELS, CHANNELS, 3, 1, 1, alpha_in=0.5, alpha_out=0.5, pool=(2, 2, 2)).to(device)
    x = lift(lambda t: t.to(device, torch.float32), make_input(0.5, (2, 2, 2)))
    last = copy.deepcopy(conv).to(memory_format=torch.channels_last_3d)
    y = last(lift(lambda t: t.contiguous(memory_format=torch.channels_last_3d), x))
    for part, expected in zip(maps_of(y), maps_of(conv(x)), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", CUDA_ONLY)
def test_a_large_map_has_the_reference_s_gradients(device: str) -> None:
    """One layer at the size of a real network's: cuDNN chooses other algorithms there than for small maps."""
    torch.manual_seed(0)
    conv = OctConv3d(64, 64, (3, 3, 3), 1, 1, alpha_in=0.25, alpha_out=0.25, pool=(1, 2, 2))
    x = Octave(torch.randn(1, 48, 4, 28, 28), torch.randn(1, 16, 4, 14, 14))
    exact = copy.deepcopy(conv).double()
    sum(part.square().sum() for part in exact(lift(Tensor.double, x))).backward()
    conv.to(device).to(memory_format=torch.channels_last_3d)
    y = conv(lift(lambda t: t.to(device).contiguous(memory_format=torch.channels_last_3d), x))
    sum(part.square().sum() for part in y).backward()
    truth = exact.weight.grad
    assert (conv.weight.grad.cpu().double() - truth).abs().max() < 1e-4 * truth.abs().max()
