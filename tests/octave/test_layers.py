import copy
import math
import pickle
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octvideo.octave import (
    Feature,
    Octave,
    OctBatchNorm2d,
    OctBatchNorm3d,
    OctMaxPool2d,
    OctMaxPool3d,
    SqueezeExcite,
    lift,
)
from octvideo.octave.feature import low_size
from octvideo.octave.layers import max_pool

from . import reference

OctBatchNorm = OctBatchNorm2d | OctBatchNorm3d

ALPHAS = (0.125, 0.25, 0.5, 0.75, 1.0)
NORMS = [(OctBatchNorm2d, nn.BatchNorm2d, (5, 6)), (OctBatchNorm3d, nn.BatchNorm3d, (3, 5, 6))]
each_norm = pytest.mark.parametrize(("octave_norm", "vanilla_norm", "size"), NORMS, ids=["2d", "3d"])


def random_octave(channels: int, alpha: float, size: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Octave:
    c_high, c_low = reference.split(channels, alpha)
    high = 2 * torch.randn(3, c_high, *size, dtype=dtype) + 1
    return Octave(high, 3 * torch.randn(3, c_low, *low_size(size, (2,) * len(size)), dtype=dtype) - 2)


def randomize(norm: nn.Module) -> None:
    for name, value in norm.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5) if "var" in name or name == "weight" else value.normal_()


def one_norm_per_frequency(norm: OctBatchNorm, vanilla: type[nn.Module]) -> list[nn.Module]:
    """Two vanilla norms holding the halves of an octave norm's state."""
    halves = []
    c_high, c_low = reference.split(norm.num_features, norm.alpha)
    for start, stop in ((0, c_high), (c_high, c_high + c_low)):
        half = vanilla(
            stop - start, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, dtype=torch.float64
        )
        half.load_state_dict({k: v if v.dim() == 0 else v[start:stop] for k, v in norm.state_dict().items()})
        halves.append(half.train(norm.training))
    return halves


def joined_state(halves: list[nn.Module]) -> dict[str, Tensor]:
    high, low = (half.state_dict() for half in halves)
    return {k: v if v.dim() == 0 else torch.cat([v, low[k]]) for k, v in high.items()}


# --- batch norm -----------------------------------------------------------------------------------------------------


@each_norm
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.08, "eps": 1e-4},
        {"momentum": None},
        {"momentum": 0.0},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
def test_batch_norm_is_a_norm_per_frequency(
    octave_norm: type[OctBatchNorm],
    vanilla_norm: type[nn.Module],
    size: tuple[int, ...],
    alpha: float,
    options: dict,
) -> None:
    norm = octave_norm(8, **options, dtype=torch.float64, alpha=alpha)
    randomize(norm)
    halves = one_norm_per_frequency(norm, vanilla_norm)
    # train twice, evaluate, train on: running statistics move in steps 1, 2 and 3 and rest in between
    for step, training in enumerate([True, True, False, True]):
        norm.train(training)
        x = random_octave(8, alpha, size)
        before = copy.deepcopy(norm.state_dict())
        y = norm(x)
        assert isinstance(y, Octave)
        for half, part, got in zip(halves, x, y, strict=True):
            half.train(training)
            if not half.num_features:
                assert got.shape == part.shape  # F.batch_norm is not defined on no channels
                if training and half.track_running_stats:
                    half.num_batches_tracked += 1
                continue
            torch.testing.assert_close(got, half(part), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norm.state_dict(), joined_state(halves), rtol=1e-12, atol=1e-12)
        if not training:
            torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
        elif norm.track_running_stats:
            assert norm.num_batches_tracked.item() == before["num_batches_tracked"].item() + 1, step


@each_norm
def test_batch_norm_by_hand(octave_norm: type[OctBatchNorm], vanilla_norm: type[nn.Module], size: tuple) -> None:
    """In training every channel of either map comes out with mean bias and variance weight**2."""
    norm = octave_norm(8, eps=1e-12, momentum=0.25, dtype=torch.float64, alpha=0.25)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 9.0))
        norm.bias.copy_(torch.arange(10.0, 18.0))
    x = random_octave(8, 0.25, size)
    y = norm(x)
    axes = (0, *range(2, 2 + len(size)))
    mean = np.concatenate([part.detach().numpy().mean(axes) for part in y])
    variance = np.concatenate([part.detach().numpy().var(axes) for part in y])
    np.testing.assert_allclose(mean, np.arange(10, 18), atol=1e-10)
    np.testing.assert_allclose(variance, np.arange(1, 9) ** 2, atol=1e-10)
    seen_mean = np.concatenate([part.numpy().mean(axes) for part in x])
    seen_variance = np.concatenate([part.numpy().var(axes, ddof=1) for part in x])
    np.testing.assert_allclose(norm.running_mean.numpy(), 0.25 * seen_mean, atol=1e-12)
    np.testing.assert_allclose(norm.running_var.numpy(), 0.75 + 0.25 * seen_variance, atol=1e-12)


@each_norm
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_at_alpha_zero_is_its_parent(
    octave_norm: type[OctBatchNorm],
    vanilla_norm: type[nn.Module],
    size: tuple[int, ...],
    training: bool,
    momentum: float | None,
) -> None:
    vanilla, norm = vanilla_norm(8, momentum=momentum), octave_norm(8, momentum=momentum)
    randomize(vanilla)
    norm.load_state_dict(vanilla.state_dict())
    vanilla.train(training), norm.train(training)
    for _ in range(2):
        x = torch.randn(3, 8, *size)
        y = norm(x)
        assert type(y) is Tensor and torch.equal(y, vanilla(x))
    torch.testing.assert_close(norm.state_dict(), vanilla.state_dict(), rtol=0, atol=0)


@each_norm
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track_running_stats", [True, False])
def test_batch_norm_state_dict_is_the_vanilla_one(
    octave_norm: type[OctBatchNorm],
    vanilla_norm: type[nn.Module],
    size: tuple[int, ...],
    affine: bool,
    track_running_stats: bool,
) -> None:
    options = {"affine": affine, "track_running_stats": track_running_stats}
    vanilla = vanilla_norm(8, **options)
    randomize(vanilla)
    for alpha in (0, *ALPHAS):
        norm = octave_norm(8, **options, alpha=alpha)
        assert isinstance(norm, vanilla_norm)
        assert {k: v.shape for k, v in norm.state_dict().items()} == {
            k: v.shape for k, v in vanilla.state_dict().items()
        }
        norm.load_state_dict(vanilla.state_dict())
        assert all(torch.equal(norm.state_dict()[k], v) for k, v in vanilla.state_dict().items())
        assert len(list(norm.parameters())) == 2 * affine
    assert len(vanilla.state_dict()) == 2 * affine + 3 * track_running_stats


def test_batch_norm_gradients_equal_the_halves() -> None:
    for training, affine in product((True, False), (True, False)):
        norm = OctBatchNorm3d(8, affine=affine, dtype=torch.float64, alpha=0.25).train(training)
        randomize(norm)
        halves = one_norm_per_frequency(norm, nn.BatchNorm3d)
        x = random_octave(8, 0.25, (3, 5, 6))
        seen, truth = (Octave(*(part.clone().requires_grad_() for part in x)) for _ in range(2))
        weights = random_octave(8, 0.25, (3, 5, 6))
        sum((part * w).sum() for part, w in zip(norm(seen), weights, strict=True)).backward()
        outputs = [half(part) for half, part in zip(halves, truth, strict=True)]
        sum((part * w).sum() for part, w in zip(outputs, weights, strict=True)).backward()
        for got, expected in zip(seen, truth, strict=True):
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-10, atol=1e-10)
        if affine:
            for name in ("weight", "bias"):
                expected = torch.cat([getattr(half, name).grad for half in halves])
                torch.testing.assert_close(getattr(norm, name).grad, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_heeds_statistics_switched_off_after_construction_as_its_parent_does(training: bool) -> None:
    """`norm.track_running_stats = False`: the parent still evaluates by the buffers, and trains without them."""
    norm = OctBatchNorm2d(8, dtype=torch.float64, alpha=0.25).train(training)
    randomize(norm)
    halves = one_norm_per_frequency(norm, nn.BatchNorm2d)
    for module in (norm, *halves):
        module.track_running_stats = False
    x = random_octave(8, 0.25, (5, 6))
    for half, part, got in zip(halves, x, norm(x), strict=True):
        torch.testing.assert_close(got, half(part), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.state_dict(), joined_state(halves), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_normalize_high_is_the_norm_of_the_high_half(training: bool) -> None:
    norm = OctBatchNorm3d(8, dtype=torch.float64, alpha=0.25).train(training)
    randomize(norm)
    half, low_half = one_norm_per_frequency(norm, nn.BatchNorm3d)
    x = random_octave(8, 0.25, (3, 5, 6))
    torch.testing.assert_close(norm.normalize_high(x.high), half(x.high), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.state_dict(), joined_state([half, low_half]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_in_bf16_and_under_autocast(dtype: torch.dtype) -> None:
    norm = OctBatchNorm3d(8, alpha=0.5)
    randomize(norm)
    x = random_octave(8, 0.5, (3, 5, 6), torch.float32)
    expected = copy.deepcopy(norm)(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(lift(lambda t: t.to(dtype), x))
    for part, truth in zip(y, expected, strict=True):
        assert part.dtype == dtype
        assert (part.float() - truth).abs().max() <= 0.02 * truth.abs().max()
    for part in copy.deepcopy(norm).bfloat16()(lift(Tensor.bfloat16, x)):
        assert part.dtype == torch.bfloat16


def test_batch_norm_keeps_channels_last() -> None:
    norm = OctBatchNorm3d(8, alpha=0.5)
    x = random_octave(8, 0.5, (3, 5, 6), torch.float32)
    expected = copy.deepcopy(norm)(x)
    y = norm(lift(lambda t: t.contiguous(memory_format=torch.channels_last_3d), x))
    for part, truth in zip(y, expected, strict=True):
        assert part.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(part, truth, rtol=1e-5, atol=1e-5)


def test_batch_norm_copies_and_describes_itself() -> None:
    norm = OctBatchNorm3d(8, momentum=0.2, alpha=0.25)
    x = random_octave(8, 0.25, (3, 5, 6), torch.float32)
    norm(x)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        y, expected = other.eval()(x), norm.eval()(x)
        assert torch.equal(y.high, expected.high) and torch.equal(y.low, expected.low)
        assert repr(other) == repr(norm)
    assert "alpha=0.25" in repr(norm) and "momentum=0.2" in repr(norm)


@pytest.mark.parametrize(
    ("alpha", "x", "message"),
    [
        (0, Octave(torch.zeros(2, 6, 4, 4), torch.zeros(2, 2, 2, 2)), r"8 channels.*\(2, 6, 4, 4\).*\(2, 2, 2, 2\)"),
        (0.25, torch.zeros(2, 8, 4, 4), r"6 \+ 2 channels.*\(2, 8, 4, 4\)"),
        (0.25, Octave(torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 2, 2)), r"6 high and 2 low.*\(2, 4, 4, 4\)"),
        (0.25, Octave(torch.zeros(2, 6, 4, 4), torch.zeros(2, 3, 2, 2)), r"6 high and 2 low.*\(2, 3, 2, 2\)"),
        (0.25, Octave(torch.zeros(2, 6, 2, 4, 4), torch.zeros(2, 2, 2, 2, 2)), r"expected 4D input \(got 5D"),
    ],
    ids=["octave for one", "tensor for two", "channels", "low channels", "dimensions"],
)
def test_batch_norm_names_a_wrong_input(alpha: float, x: Feature, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OctBatchNorm2d(8, alpha=alpha)(x)


@pytest.mark.parametrize("alpha", [-0.5, 1.5, math.nan])
def test_batch_norm_rejects_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha is {alpha}.*0 to 1"):
        OctBatchNorm3d(8, alpha=alpha)


def test_a_rejected_input_leaves_the_statistics_alone() -> None:
    norm = OctBatchNorm2d(8, alpha=0.25)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(ValueError, match="6 high and 2 low"):
        norm(Octave(torch.ones(2, 6, 4, 4), torch.ones(2, 3, 2, 2)))
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)


# --- max pooling ----------------------------------------------------------------------------------------------------

POOLINGS_3D = [
    # kernel, stride, padding
    ((2, 1, 1), (2, 1, 1), (0, 0, 0)),
    ((1, 3, 3), (1, 2, 2), (0, 1, 1)),
    ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ((1, 2, 2), (1, 2, 2), (0, 0, 0)),
]
POOLINGS_2D = [((3, 3), (2, 2), (1, 1)), ((2, 2), (2, 2), (0, 0)), ((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (0, 0))]


def check_max_pool(
    layer: OctMaxPool2d | OctMaxPool3d, size: tuple[int, ...], channels: tuple[int, int] = (2, 2)
) -> None:
    """The high map is pooled as nn.MaxPool does; the low map window by window to the size that belongs to it."""
    geometry = (layer.kernel_size, layer.stride, layer.padding)
    x = Octave(torch.randn(2, channels[0], *size), torch.randn(2, channels[1], *reference.ceil_size(size, layer.pool)))
    y = layer(x)
    assert isinstance(y, Octave)
    high_size = [(s + 2 * p - k) // d + 1 for s, k, d, p in zip(size, *geometry, strict=True)]
    sizes = (high_size, reference.ceil_size(high_size, layer.pool))
    for part, got, out in zip(x, y, sizes, strict=True):
        assert got.shape == (2, part.shape[1], *out), (size, geometry)
        assert np.array_equal(got.numpy(), reference.max_pool(part.numpy(), *geometry, out)), (size, geometry)


@pytest.mark.parametrize("pool", [(1, 2, 2), (2, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), POOLINGS_3D)
def test_max_pool_3d_of_every_size(kernel: tuple, stride: tuple, padding: tuple, pool: tuple) -> None:
    layer = OctMaxPool3d(kernel, stride, padding, pool=pool)
    for time, height in product(range(2, 10), range(2, 10)):
        check_max_pool(layer, (time, height, 11 - height))


@pytest.mark.parametrize(("kernel", "stride", "padding"), POOLINGS_2D)
def test_max_pool_2d_of_every_size(kernel: tuple, stride: tuple, padding: tuple) -> None:
    layer = OctMaxPool2d(kernel, stride, padding, pool=(2, 2))
    for height, width in product(range(3 if padding == (0, 0) else 1, 10), range(3, 10)):
        check_max_pool(layer, (height, width))


def test_max_pool_of_odd_and_even_spatial_maps_that_are_unpadded() -> None:
    """The paper's video rows leave pool1 unpadded: 112 -> 55."""
    layer = OctMaxPool3d((1, 3, 3), (1, 2, 2), pool=(1, 2, 2))
    for height, width in product(range(3, 10), range(3, 10)):
        check_max_pool(layer, (2, height, width))
    check_max_pool(layer, (1, 112, 8), channels=(1, 1))
    assert layer(torch.zeros(1, 1, 1, 112, 112)).shape == (1, 1, 1, 55, 55)


def test_max_pool_of_a_tensor_and_of_all_low_channels() -> None:
    x = torch.randn(2, 3, 5, 7, 6)
    layer = OctMaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1), pool=(1, 2, 2))
    assert torch.equal(layer(x), F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1)))
    assert torch.equal(OctMaxPool2d((2, 2), pool=(2, 2))(x[:, :, 0]), F.max_pool2d(x[:, :, 0], 2))
    for kernel, stride, padding in POOLINGS_3D:
        layer = OctMaxPool3d(kernel, stride, padding, pool=(2, 2, 2))
        y = layer(Octave(torch.randn(2, 0, 5, 7, 6), torch.randn(2, 3, 3, 4, 3)))
        twin = layer(Octave(torch.randn(2, 1, 5, 7, 6), torch.randn(2, 3, 3, 4, 3)))
        assert y.high.shape == (2, 0, *twin.high.shape[2:]) and y.low.shape == twin.low.shape


def test_max_pool_in_bf16_in_channels_last_and_its_gradient() -> None:
    layer = OctMaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1), pool=(1, 2, 2))
    x = Octave(torch.randn(2, 4, 3, 7, 6), torch.randn(2, 4, 3, 4, 3))
    y = layer(x)
    half = layer(lift(Tensor.bfloat16, x))
    last = layer(lift(lambda t: t.contiguous(memory_format=torch.channels_last_3d), x))
    for part, low, strided in zip(y, half, last, strict=True):
        assert low.dtype == torch.bfloat16 and torch.equal(low, part.bfloat16())  # rounding keeps the order
        assert torch.equal(strided, part) and strided.stride(1) == 1
    seen = lift(lambda t: t.clone().requires_grad_(), x)
    sum(part.sum() for part in layer(seen)).backward()
    assert [part.grad.sum().item() for part in seen] == [part.numel() for part in y]


def test_max_pool_names_sizes_that_do_not_belong_together() -> None:
    layer = OctMaxPool2d((3, 3), (2, 2), (1, 1), pool=(2, 2))
    with pytest.raises(ValueError, match=r"\(8, 8\).*\(4, 4\).*\(2, 3, 8, 8\)"):
        layer(Octave(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)))


def test_max_pool_describes_itself() -> None:
    text = repr(OctMaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1), pool=(2, 2, 2)))
    for part in ("kernel_size=(1, 3, 3)", "stride=(1, 2, 2)", "padding=(0, 1, 1)", "pool=(2, 2, 2)"):
        assert part in text


def parts_case() -> tuple[tuple[tuple[int, int], ...], list[int]]:
    """Three parts of 5, 4 and 3 channels, and where [highs..., lows...] stand in their vanilla concatenation."""
    return ((5, 0), (1, 3), (2, 1)), [0, 1, 2, 3, 4, 5, 9, 10, 6, 7, 8, 11]


@pytest.mark.parametrize("training", [True, False])
def test_a_norm_over_a_concatenation_keeps_its_vectors_in_the_vanilla_order(training: bool) -> None:
    parts, order = parts_case()
    norm, plain = OctBatchNorm2d(12, parts=parts).train(training), OctBatchNorm2d(12, alpha=4 / 12).train(training)
    for value in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(value)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    plain.load_state_dict({k: v[order] if v.dim() else v for k, v in norm.state_dict().items()})
    x = Octave(torch.randn(3, 8, 6, 6), torch.randn(3, 4, 3, 3))
    got, expected = norm(x), plain(x)
    torch.testing.assert_close(got.high, expected.high)
    torch.testing.assert_close(got.low, expected.low)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(norm, name)[order], getattr(plain, name))
    assert norm.num_batches_tracked == (1 if training else 0)
    assert set(norm.state_dict()) == set(nn.BatchNorm2d(12).state_dict())


def test_parts_that_do_not_add_up() -> None:
    with pytest.raises(ValueError, match=r"parts \(\(3, 1\),\) do not add up to 5 channels"):
        OctBatchNorm2d(5, parts=((3, 1),))


@pytest.mark.parametrize("low", [0, 3])
@pytest.mark.parametrize("dims", [2, 3])
def test_squeeze_excite_against_numpy(low: int, dims: int) -> None:
    torch.manual_seed(0)
    layer = SqueezeExcite(8, 2)
    high_map, low_map = torch.randn(2, 8 - low, *[4] * dims), torch.randn(2, low, *[2] * dims)
    got = layer(Octave(high_map, low_map) if low else high_map)
    w1, b1, w2, b2 = (p.detach().numpy() for p in (layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias))
    pooled = np.concatenate(
        [m.flatten(2).numpy().mean(2) if m.numel() else m.numpy().reshape(2, 0) for m in (high_map, low_map)], 1
    )
    gate = 1 / (1 + np.exp(-(np.maximum(pooled @ w1.T + b1, 0) @ w2.T + b2)))
    gate = gate.reshape(2, 8, *[1] * dims)
    high_got, low_got = got if low else (got, low_map)
    np.testing.assert_allclose(high_got.detach().numpy(), high_map.numpy() * gate[:, : 8 - low], rtol=1e-5)
    np.testing.assert_allclose(low_got.detach().numpy(), low_map.numpy() * gate[:, 8 - low :], rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_a_cumulative_average_compiles_without_reading_the_count(alpha: float) -> None:
    torch._dynamo.reset()
    norm = OctBatchNorm3d(8, momentum=None, alpha=alpha)
    eager, compiled = copy.deepcopy(norm), torch.compile(norm, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            x = torch.randn(2, 8, 3, 4, 4)
            feature = Octave(x[:, :6], x[:, 6:, :, ::2, ::2]) if alpha else x
            torch.testing.assert_close(compiled(feature), eager(feature))
    torch.testing.assert_close(norm.state_dict(), eager.state_dict())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize(
    "kernel,stride,padding",
    [
        ((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        ((1, 2, 2), (1, 2, 2), (0, 0, 0)),
        ((2, 1, 1), (2, 1, 1), (0, 0, 0)),
        ((2, 3, 3), (2, 2, 2), (0, 1, 1)),
    ],
)
def test_max_pool_is_torch_s_with_its_gradient_and_memory_format(
    kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 4, 7, 9, generator=draw).contiguous(memory_format=memory_format)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    pooled = max_pool(ours, kernel, stride, padding, ceil_mode=True)
    expected = F.max_pool3d(theirs, kernel, stride, padding, ceil_mode=True)
    assert torch.equal(pooled, expected) and pooled.stride() == expected.stride()
    grad = torch.randn(expected.shape, generator=draw)
    pooled.backward(grad)
    expected.backward(grad)
    assert torch.equal(ours.grad, theirs.grad)
