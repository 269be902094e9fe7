from dataclasses import replace

import pytest
import torch

from octvideo.models import NETWORKS, create, feature_sizes, with_octave
from octvideo.models.slowfast import pyslowfast_frames, strided_frames
from octvideo.models.spec import ResNetSpec


def one_block_each(net: ResNetSpec) -> ResNetSpec:
    return replace(net, stages=tuple(replace(s, temporal_kernels=s.temporal_kernels[:1]) for s in net.stages))


def small(name: str, alpha: float = 0.0, pool: tuple[int, ...] = (1, 2, 2), slow_frames: str = "strided"):
    """The real structure with one block per stage."""
    spec = NETWORKS[name](8)
    spec = replace(spec, slow=one_block_each(spec.slow), fast=one_block_each(spec.fast), slow_frames=slow_frames)
    torch.manual_seed(0)
    return create(with_octave(spec, alpha, pool=pool)).eval()


def test_slow_frames_against_the_recipes() -> None:
    assert strided_frames(32, 8) == [0, 8, 16, 24]
    assert pyslowfast_frames(32, 8) == [0, 10, 20, 31]
    assert pyslowfast_frames(32, 4) == [0, 4, 8, 13, 17, 22, 26, 31]


@pytest.mark.parametrize("alpha,pool", [(0.0, (1, 2, 2)), (0.1, (2, 2, 2)), (0.2, (1, 2, 2)), (0.5, (2, 2, 2))])
@pytest.mark.parametrize("size", [(16, 64, 64), (24, 47, 61), (8, 32, 32)])
def test_one_clip_tensor_of_any_admitted_size(alpha: float, pool: tuple[int, ...], size: tuple[int, ...]) -> None:
    net = small("slowfast_4x16_r50", alpha, pool).train()
    x = torch.randn(2, 3, *size)
    before = x.clone()
    logits = net(x)
    logits.sum().backward()
    assert logits.shape == (2, 8) and torch.equal(x, before)
    # a fast bottleneck of 8 channels has none to spare for low at alpha 0.1: such layers take and give one frequency
    assert all(p.grad is not None for p in net.parameters())


def test_frames_that_the_ratio_does_not_divide() -> None:
    with pytest.raises(ValueError, match="30 frames do not divide by 8, .* give a multiple of 8"):
        feature_sizes(NETWORKS["slowfast_4x16_r50"](), (30, 224, 224))
    assert feature_sizes(NETWORKS["slowfast_4x16_r50"](), (32, 224, 224))["res5"] == (4, 7, 7)


def test_which_frames_the_slow_pathway_sees() -> None:
    """Changing a frame outside the slow ones must change the fast pathway only."""
    clip = torch.randn(1, 3, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    for policy, seen in (("strided", [0, 8, 16, 24]), ("pyslowfast", [0, 10, 20, 31])):
        net = small("slowfast_4x16_r50", slow_frames=policy)
        stem = net.slow.stem
        got = []
        stem.register_forward_pre_hook(lambda _, args, got=got: got.append(args[0]))
        net(clip)
        assert torch.equal(got[0], clip[:, :, seen])


def test_unknown_slow_frames() -> None:
    with pytest.raises(ValueError, match="slow_frames is 'every'; allowed: strided, pyslowfast"):
        small("slowfast_4x16_r50", slow_frames="every")


def test_lateral_connections_carry_both_frequencies() -> None:
    net = small("slowfast_4x16_r50", 0.5, (2, 2, 2))
    seen = {}
    for name, lateral in net.laterals.items():
        lateral.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, (args[0], out)))
    net(torch.randn(1, 3, 16, 64, 64))
    assert isinstance(seen["stem"][1], torch.Tensor)
    for name in ("res2", "res3", "res4"):
        fast, lateral = seen[name]
        assert lateral.high.shape[2] == 2 and lateral.low.shape[2] == 1  # 16 and 8 frames at stride 8
        assert lateral.high.shape[1] == 2 * fast.high.shape[1] and lateral.low.shape[1] == 2 * fast.low.shape[1]
