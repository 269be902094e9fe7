import copy
import math
import pickle
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octvideo.octave import Octave, average_pool, concatenate, global_average_pool, lift, split_channels, upsample
from octvideo.octave.feature import low_size, require_feature, rounded_alpha

from . import reference


def octave(high: tuple[int, ...], low: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Octave:
    return Octave(torch.randn(high, dtype=dtype), torch.randn(low, dtype=dtype))


def zeros(high: tuple[int, ...], low: tuple[int, ...]) -> Octave:
    return Octave(torch.zeros(high), torch.zeros(low))


# --- split_channels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "alpha", "expected"),
    [
        (64, 0.0, (64, 0)),
        (64, 0.1, (58, 6)),  # the paper's own example: no rounding to 8
        (64, 0.125, (56, 8)),
        (256, 0.2, (205, 51)),
        (7, 0.5, (4, 3)),
        (3, 0.25, (3, 0)),
        (64, 1.0, (0, 64)),
        (64, 1, (0, 64)),
        (1, 1.0, (0, 1)),
    ],
)
def test_split_channels(channels: int, alpha: float, expected: tuple[int, int]) -> None:
    assert split_channels(channels, alpha) == expected


def test_split_channels_adds_up_and_grows_with_alpha() -> None:
    alphas = [i / 40 for i in range(41)]
    for channels in range(1, 65):
        splits = [split_channels(channels, alpha) for alpha in alphas]
        assert all(high + low == channels and high >= 0 and low >= 0 for high, low in splits)
        lows = [low for _, low in splits]
        assert lows == sorted(lows) and (lows[0], lows[-1]) == (0, channels)


def test_split_channels_is_the_paper_s_int_at_the_paper_s_ratios() -> None:
    for alpha in (0.1, 0.125, 0.2, 0.25, 0.375, 0.5, 0.75, 0.875):
        for channels in range(1, 2049):
            assert split_channels(channels, alpha)[1] == int(alpha * channels)


def test_split_channels_gives_a_quotient_of_counts_back() -> None:
    """Behind a concatenation alpha is low / channels: (7 / 80) * 80 may fall short of 7."""
    for channels in range(1, 400):
        for low in range(channels + 1):
            assert split_channels(channels, low / channels) == (channels - low, low)


@pytest.mark.parametrize("alpha", [-0.1, 1.01, 2, math.inf, math.nan])
def test_split_channels_rejects_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha is {alpha}.*0 to 1"):
        split_channels(64, alpha)


# --- average_pool ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [(2, 2), (1, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1), (1, 8), (2, 3), (9, 1)])
def test_average_pool_2d(size: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = reference.average_pool(x.numpy(), kernel)
    y = average_pool(x, kernel)
    assert tuple(y.shape[2:]) == tuple(math.ceil(s / k) for s, k in zip(size, kernel, strict=True))
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kernel", [(1, 2, 2), (2, 2, 2), (2, 1, 1), (1, 1, 2), (2, 1, 2), (1, 1, 1)])
@pytest.mark.parametrize("size", [(4, 6, 8), (5, 7, 9), (1, 5, 4), (3, 1, 1), (1, 1, 1), (2, 3, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_average_pool_3d(size: tuple[int, ...], kernel: tuple[int, ...], channels_last: bool) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = reference.average_pool(x.numpy(), kernel)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    np.testing.assert_allclose(average_pool(x, kernel).numpy(), expected, rtol=0, atol=1e-14)


def test_average_pool_by_hand() -> None:
    x = torch.tensor([[1.0, 3.0, 5.0], [3.0, 5.0, 9.0], [10.0, 20.0, 7.0]]).reshape(1, 1, 3, 3)
    assert average_pool(x, (2, 2)).flatten().tolist() == [3.0, 7.0, 15.0, 7.0]


@pytest.mark.parametrize("kernel", [(1, 2, 2), (2, 2, 2), (2, 1, 1)])
def test_average_pool_of_a_strided_view_and_of_no_channels(kernel: tuple[int, ...]) -> None:
    x = torch.randn(2, 8, 5, 7, 6, dtype=torch.float64)
    for view in (x[:, 2:5], x[:, ::2], x.transpose(2, 4), x.flip(3)):
        expected = reference.average_pool(view.numpy(), kernel)
        np.testing.assert_allclose(average_pool(view, kernel).numpy(), expected, rtol=0, atol=1e-14)
    assert average_pool(x[:, :0], kernel).shape == (2, 0, *low_size((5, 7, 6), kernel))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (2, 3, 5, 7, 6)])
def test_average_pool_in_half_precision_with_its_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    kernel = (2,) * (len(shape) - 2)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = average_pool(x, kernel)
    assert y.dtype == dtype
    expected = reference.average_pool(x.detach().double().numpy(), kernel)
    np.testing.assert_allclose(y.detach().double().numpy(), expected, rtol=2**-6, atol=2**-6)
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype
    # each window hands out a gradient of 1 in all
    assert x.grad.double().sum().item() == pytest.approx(y.numel(), rel=2**-7)


@pytest.mark.parametrize("kernel", [(1, 2, 2), (2, 2, 2), (2, 1, 1)])
def test_average_pool_keeps_channels_last(kernel: tuple[int, ...]) -> None:
    x = torch.randn(2, 4, 5, 7, 6).contiguous(memory_format=torch.channels_last_3d)
    assert average_pool(x, kernel).is_contiguous(memory_format=torch.channels_last_3d)
    x2d = x[:, :, 0].contiguous(memory_format=torch.channels_last)
    assert average_pool(x2d, kernel[1:]).is_contiguous(memory_format=torch.channels_last)


def test_average_pool_gradient() -> None:
    for shape, kernel in [((1, 2, 3, 5), (2, 2)), ((1, 2, 3, 5, 2), (2, 2, 2)), ((1, 2, 3, 3, 2), (1, 2, 2))]:
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t, k=kernel: average_pool(t, k), x)


# --- upsample -------------------------------------------------------------------------------------------------------


def test_upsample_reads_the_value_at_half_the_index_for_every_size() -> None:
    for size in range(1, 301):
        x = torch.randn(1, 1, math.ceil(size / 2), 1)
        expected = x[:, :, [i // 2 for i in range(size)]]
        assert torch.equal(upsample(x, (size, 1)), expected), size
        assert torch.equal(upsample(x.transpose(2, 3), (1, size)), expected.transpose(2, 3)), size
        assert torch.equal(upsample(x[..., None], (size, 1, 1)), expected[..., None]), size


@pytest.mark.parametrize("factor", [(1, 2, 2), (2, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("size", [(4, 6, 8), (5, 7, 9), (1, 1, 3), (3, 2, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_upsample_3d(size: tuple[int, ...], factor: tuple[int, ...], channels_last: bool) -> None:
    x = torch.randn(2, 3, *low_size(size, factor), dtype=torch.float64)
    expected = reference.upsample(x.numpy(), factor, size)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    assert np.array_equal(upsample(x, size).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_upsample_copies_exactly_in_every_precision(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 2, 4, 5).to(dtype)
    y = upsample(x, (3, 8, 9))
    assert y.dtype == dtype
    assert torch.equal(y, x[:, :, [0, 0, 1]][:, :, :, [0, 0, 1, 1, 2, 2, 3, 3]][..., [0, 0, 1, 1, 2, 2, 3, 3, 4]])


def test_pooling_an_upsampled_map_gives_it_back() -> None:
    for size in [(4, 6, 8), (5, 7, 9), (1, 1, 1), (1, 5, 2)]:
        for factor in [(1, 2, 2), (2, 2, 2), (2, 1, 1)]:
            x = torch.randn(2, 3, *low_size(size, factor), dtype=torch.float64)
            torch.testing.assert_close(average_pool(upsample(x, size), factor), x, rtol=0, atol=1e-15)


# --- Octave, lift, global_average_pool ------------------------------------------------------------------------------


def test_octave_is_a_tuple_of_tensors_that_prints_shapes() -> None:
    x = octave((2, 6, 4, 8, 8), (2, 2, 4, 4, 4))
    high, low = x
    assert high is x.high and low is x.low
    assert "(2, 6, 4, 8, 8)" in repr(x) and "(2, 2, 4, 4, 4)" in repr(x) and "float64" in repr(x)


def test_octave_survives_pytree_pickle_and_deepcopy() -> None:
    x = octave((2, 6, 8, 8), (2, 2, 4, 4))
    leaves, spec = torch.utils._pytree.tree_flatten(x)
    copies = [torch.utils._pytree.tree_unflatten(leaves, spec), pickle.loads(pickle.dumps(x)), copy.deepcopy(x)]
    for y in copies:
        assert isinstance(y, Octave)
        assert torch.equal(y.high, x.high) and torch.equal(y.low, x.low)


def test_lift_of_relu_and_add() -> None:
    x, y = octave((2, 6, 8, 8), (2, 2, 4, 4)), octave((2, 6, 8, 8), (2, 2, 4, 4))
    activated = lift(F.relu, x)
    assert isinstance(activated, Octave)
    assert torch.equal(activated.high, x.high.clamp(min=0)) and torch.equal(activated.low, x.low.clamp(min=0))
    total = lift(torch.add, x, y)
    assert isinstance(total, Octave)
    assert torch.equal(total.high, x.high + y.high) and torch.equal(total.low, x.low + y.low)
    plain = lift(torch.add, x.high, y.high)
    assert isinstance(plain, Tensor) and torch.equal(plain, x.high + y.high)


def test_lift_of_dropout_drops_in_both_frequencies_apart() -> None:
    x = Octave(torch.ones(4, 6, 16, 16), torch.ones(4, 6, 16, 16))
    y = lift(torch.nn.Dropout(0.25), x)
    assert isinstance(y, Octave)
    for part in y:
        assert set(part.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        assert (part == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert not torch.equal(y.high, y.low)
    kept = lift(torch.nn.Dropout(0.25).eval(), x)
    assert isinstance(kept, Octave) and torch.equal(kept.high, x.high) and torch.equal(kept.low, x.low)


def test_lift_of_a_layer_with_no_high_channels() -> None:
    x = octave((2, 0, 8, 8), (2, 5, 4, 4))
    y = lift(torch.add, lift(F.relu, x), x)
    assert isinstance(y, Octave)
    assert y.high.shape == (2, 0, 8, 8)
    assert torch.equal(y.low, x.low.clamp(min=0) + x.low)


def test_lift_rejects_one_frequency_with_two() -> None:
    x = octave((2, 6, 8, 8), (2, 2, 4, 4))
    with pytest.raises(ValueError, match=r"\(2, 6, 8, 8\).*\(2, 2, 4, 4\).*\(2, 8, 8, 8\)"):
        lift(torch.add, x, torch.zeros(2, 8, 8, 8))
    with pytest.raises(ValueError, match=r"\(2, 8, 8, 8\)"):
        lift(torch.add, torch.zeros(2, 8, 8, 8), x)


def test_global_average_pool() -> None:
    x = octave((2, 6, 3, 5, 7), (2, 2, 2, 3, 4))
    expected = np.concatenate([x.high.numpy().mean((2, 3, 4)), x.low.numpy().mean((2, 3, 4))], axis=1)
    np.testing.assert_allclose(global_average_pool(x).numpy(), expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(global_average_pool(x.high).numpy(), expected[:, :6], rtol=0, atol=1e-14)
    all_low = Octave(x.high[:, :0], x.low)
    np.testing.assert_allclose(global_average_pool(all_low).numpy(), expected[:, 6:], rtol=0, atol=1e-14)
    flat = octave((2, 3, 4, 4), (2, 1, 2, 2))
    assert global_average_pool(flat).shape == (2, 4)


def test_concatenate_per_frequency() -> None:
    x, y = octave((2, 3, 4, 4), (2, 1, 2, 2)), octave((2, 2, 4, 4), (2, 5, 2, 2))
    plain = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    joined = concatenate(x, plain, y)
    assert isinstance(joined, Octave)
    assert np.array_equal(joined.high, np.concatenate([x.high, plain, y.high], axis=1))
    assert np.array_equal(joined.low, np.concatenate([x.low, y.low], axis=1))
    assert torch.equal(concatenate(plain, plain), torch.cat([plain, plain], dim=1))


def test_low_size_is_the_ceiling() -> None:
    for size in range(1, 50):
        assert low_size((size, size, size), (1, 2, 2)) == (size, (size + 1) // 2, (size + 1) // 2)


# --- require_feature ------------------------------------------------------------------------------------------------


def test_require_feature_accepts_what_belongs_together() -> None:
    for size in [(1, 1, 1), (4, 6, 8), (5, 7, 9)]:
        for pool in [(1, 2, 2), (2, 2, 2), (2, 1, 1)]:
            require_feature(octave((2, 6, *size), (2, 2, *low_size(size, pool))), 6, 2, pool, "Layer")
    require_feature(torch.zeros(2, 8, 4, 4), 8, 0, (2, 2), "Layer")


@pytest.mark.parametrize(
    ("x", "high", "low", "message"),
    [
        (zeros((2, 6, 8, 8), (2, 2, 4, 4)), 8, 0, r"Layer.*8 channels.*\(2, 6, 8, 8\)"),
        (torch.zeros(2, 8, 8, 8), 6, 2, r"Layer.*6 \+ 2.*\(2, 8, 8, 8\)"),
        (zeros((2, 5, 8, 8), (2, 3, 4, 4)), 6, 2, r"6 high and 2 low.*\(2, 5, 8, 8\).*\(2, 3, 4, 4\)"),
        (zeros((2, 6, 8, 9), (2, 2, 4, 4)), 6, 2, r"\(8, 9\).*\(4, 5\).*\(2, 2, 4, 4\)"),
        (zeros((2, 6, 8, 8), (2, 2, 8, 8)), 6, 2, r"\(8, 8\).*\(4, 4\).*\(2, 2, 8, 8\)"),
        (zeros((2, 6, 2, 8, 8), (2, 2, 2, 4, 4)), 6, 2, r"4 dimensions.*\(2, 6, 2, 8, 8\)"),
        (zeros((1, 6, 8, 8), (2, 2, 4, 4)), 6, 2, r"\(1, 6, 8, 8\).*\(2, 2, 4, 4\)"),
    ],
    ids=["octave for one", "tensor for two", "channels", "odd size", "not pooled", "dimensions", "batch"],
)
def test_require_feature_names_the_numbers(x: Tensor | Octave, high: int, low: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_feature(x, high, low, (2, 2), "Layer")


@pytest.mark.cuda
def test_pooling_and_upsampling_on_cuda() -> None:
    x = torch.randn(2, 4, 5, 7, 6, dtype=torch.float64)
    for kernel in [(1, 2, 2), (2, 2, 2), (2, 1, 1)]:
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            y = average_pool(x.cuda().contiguous(memory_format=layout), kernel)
            expected = reference.average_pool(x.numpy(), kernel)
            np.testing.assert_allclose(y.cpu().numpy(), expected, rtol=0, atol=1e-14)
            grown = reference.upsample(expected, kernel, (5, 7, 6))
            np.testing.assert_allclose(upsample(y, (5, 7, 6)).cpu().numpy(), grown, rtol=0, atol=1e-14)


def test_rounded_alpha_gives_the_nearest_multiple() -> None:
    def low(channels: int, alpha: float, round_to: int) -> int:
        return split_channels(channels, rounded_alpha(channels, alpha, round_to))[1]

    assert [low(64, alpha, 8) for alpha in (0.0, 0.01, 0.1, 0.18, 0.1875, 0.5, 0.9, 0.99, 1.0)] == [
        *(0, 8, 8, 8, 16, 32, 56, 56, 64)
    ]
    assert [low(channels, 0.25, 8) for channels in (8, 9, 16, 24, 80)] == [
        0,
        8,
        8,
        8,
        24,
    ]  # 80 / 4 lies between 16 and 24
    assert [low(1, alpha, 8) for alpha in (0.5, 1.0)] == [0, 1]
    for channels, alpha in product(range(1, 200), (0.125, 0.1, 0.3, 0.75)):
        assert rounded_alpha(channels, alpha, 1) == alpha
        for round_to in (2, 8, 16, 32):
            got = low(channels, alpha, round_to)
            assert got % round_to == 0 and got < channels and (got or channels <= round_to)
            assert abs(got - alpha * channels) <= round_to / 2 or got in (
                round_to,
                (channels - 1) // round_to * round_to,
            )
            # what a depthwise layer does with the quotient that it is given
            assert low(channels, got / channels, round_to) == got
