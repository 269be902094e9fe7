"""The inference form of single layers and small networks, against the layers themselves."""

import copy

import pytest
import torch
from torch import Tensor, nn

from octvideo.octave import (
    Octave,
    OctBatchNorm2d,
    OctBatchNorm3d,
    OctConv2d,
    OctConv3d,
    concatenate,
    fuse,
    global_average_pool,
    lift,
)
from octvideo.octave.feature import Feature, low_size
from octvideo.octave.fuse import FusedConv, FusedNorm, FusedOctConv, arrangements, cost
from octvideo.octave.resample import average_pool


def randomize(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.3, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    return model.eval()


def check(y: Feature, expected: Feature) -> None:
    maps = zip(y, expected, strict=True) if isinstance(expected, Octave) else [(y, expected)]
    for own, other in maps:
        assert own.shape == other.shape
        if other.numel():
            assert (own - other).abs().max() < 1e-4 * other.abs().max()


def feature(channels: int, alpha: float, size: tuple[int, ...], pool: tuple[int, ...]) -> Feature:
    low = int(alpha * channels)
    high = torch.randn(2, channels - low, *size)
    return Octave(high, torch.randn(2, low, *low_size(size, pool))) if low else high


SIZES = [(4, 8, 6), (3, 7, 5)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pool", [(1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("kernel", [(1, 1, 1), (3, 1, 1), (1, 3, 3)])
@pytest.mark.parametrize("alphas", [(0.0, 0.5), (0.5, 0.25), (0.25, 0.0)])
def test_every_exact_arrangement_gives_the_layers_numbers(
    alphas: tuple[float, float],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pool: tuple[int, ...],
    size: tuple[int, ...],
) -> None:
    padding = tuple(k // 2 for k in kernel)
    conv = OctConv3d(8, 12, kernel, stride, padding, alpha_in=alphas[0], alpha_out=alphas[1], pool=pool).eval()
    x = feature(8, alphas[0], size, pool)
    with torch.no_grad():
        expected = conv(x)
        shortcut = lift(torch.randn_like, expected)
        found = arrangements(conv)
        assert found
        for arrangement in found:
            check(FusedOctConv(conv, None, arrangement)(x), expected)
            with_all = FusedOctConv(conv, nn.ReLU(inplace=True), arrangement)(x, shortcut)
            check(with_all, lift(torch.relu, lift(torch.add, expected, shortcut)))


def test_which_arrangements_are_exact() -> None:
    def of(*args: int, **kwargs: object) -> list[str]:
        return arrangements(OctConv2d(8, 8, *args, **kwargs))  # type: ignore[arg-type]

    both = {"alpha_in": 0.5, "alpha_out": 0.5}
    assert of(3, 1, 1, **both) == ["apart"]
    assert of(3, 2, 1, **both) == ["joint", "apart"]
    assert of(1, **both) == ["joint", "apart", "late"]
    assert of(3, 1, 1, alpha_out=0.5) == ["joint"]
    assert of(1, alpha_out=0.5) == ["joint", "late"]
    assert of(1, alpha_in=0.5) == ["joint", "apart"]
    # as they are: one frequency, all channels low, groups, other paddings, strides of the convolution's own
    for kwargs in ({}, {"alpha_in": 1.0, "alpha_out": 0.5}, {"groups": 2, **both}, {"padding_mode": "reflect", **both}):
        assert of(1, **kwargs) == []
    assert of(1, 2, pool_stride=False, **both) == []


def test_cost_counts_the_paths() -> None:
    """Of 1x1, 8 -> 8 at alpha 0.5: joint 8 * 4 + 8 * 4 / 4 multiply-adds, apart 4 * 4 + 4 * 4 / 4 + 8 * 4 / 4."""
    conv = OctConv2d(8, 8, 1, alpha_in=0.5, alpha_out=0.5)
    assert cost(conv, "joint", pooled=False, written=True) == 40 + 20 * (4 + 8)
    assert cost(conv, "joint", pooled=False, written=False) == 40 + 20 * (4 + 8 + 8)
    assert cost(conv, "apart", pooled=True, written=False) == 28 + 20 * (8 + 4)
    assert cost(conv, "late", pooled=False, written=False) == 40 + 20 * (8 + 4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("size", SIZES)
def test_pooling_keeps_the_layout(size: tuple[int, ...], layout: torch.memory_format) -> None:
    x = torch.randn(2, 6, *size).contiguous(memory_format=layout)
    for part in (x, x[:, 2:5]):
        expected = nn.functional.avg_pool3d(part, (1, 2, 2), ceil_mode=True, count_include_pad=False)
        pooled = average_pool(part, (1, 2, 2), fused=True)
        torch.testing.assert_close(pooled, expected)
        assert pooled.is_contiguous(memory_format=layout)


class Plain(nn.Module):
    """What a user may write: post- and pre-activation, operators, a layer called twice, two readers of one map."""

    def __init__(self, alpha: float, grouped: bool = False) -> None:
        super().__init__()
        groups = 2 if grouped else 1
        self.conv1 = OctConv2d(4, 8, 1, alpha_out=alpha, bias=True)
        self.bn1 = OctBatchNorm2d(8, alpha=alpha)
        self.conv2 = OctConv2d(8, 8, 3, padding=1, groups=groups, alpha_in=alpha, alpha_out=alpha, bias=False)
        self.bn2 = OctBatchNorm2d(8, alpha=alpha)
        self.bn3 = OctBatchNorm2d(8, affine=False, alpha=alpha)
        self.last = OctConv2d(16, 8, 1, in_parts=((8 - int(8 * alpha), int(8 * alpha)),) * 2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = lift(self.relu, self.bn1(self.conv1(x)))
        z = lift(torch.add, y, self.bn2(self.conv2(y)))
        z = lift(self.relu, self.bn3(lift(torch.sigmoid, z)))
        z = lift(torch.add, self.conv2(z), z)
        z = self.norm(self.last(concatenate(y, z)))
        return self.fc(self.drop(global_average_pool(z + z)))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_any_network_of_these_layers(alpha: float, grouped: bool) -> None:
    model = randomize(Plain(alpha, grouped))
    x = torch.randn(2, 4, 9, 10)
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model)
    with torch.no_grad():
        check(fused(x), model(x))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        for value in model.state_dict().values():
            value.zero_()
        assert fused(x).abs().max() > 1e-3  # nothing of it is the model's
    assert not any(p.requires_grad for p in fused.parameters())
    norms = [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == [] and sum(isinstance(m, FusedNorm) for m in fused.modules()) == 1  # bn3, behind a sigmoid
    assert sum(isinstance(m, FusedOctConv | FusedConv) for m in fused.modules()) == 4


def test_a_pooled_map_is_shared_by_those_that_read_it() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = OctConv3d(8, 8, (1, 3, 3), padding=(0, 1, 1), alpha_in=0.5, alpha_out=0.5)
            self.projection = OctConv3d(8, 8, 1, (1, 2, 2), alpha_in=0.5, alpha_out=0.5)
            self.first = OctConv3d(3, 8, 1, alpha_out=0.5)

        def forward(self, x: Tensor) -> tuple[Feature, Feature]:
            x = self.first(x)
            return self.conv(x), self.projection(x)

    fused = fuse(Two())
    poolings = [
        node for node in fused.graph.nodes if node.op == "call_function" and node.target.__name__ == "pool_high"
    ]
    assert [len(node.users) for node in poolings] == [1, 2]


def test_the_model_may_be_in_training_and_the_fused_one_may_not() -> None:
    model = randomize(Plain(0.5)).train()
    fused = fuse(model)
    assert model.training and not fused.training
    with pytest.raises(RuntimeError, match="a fused network cannot train"):
        fused.train()
    with pytest.raises(RuntimeError, match="FusedOctConv is an inference form"):
        fused.conv1.train()
    assert fused.eval() is fused and not any(module.training for module in fused.modules())


def test_a_norm_without_statistics_is_refused() -> None:
    model = nn.Sequential(nn.Conv3d(3, 4, 1), OctBatchNorm3d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="no running statistics"):
        fuse(model)
