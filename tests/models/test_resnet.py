import pytest
import torch
from torch import nn

from octvideo.models import NETWORKS, ResNet, SlowFastSpec, create, with_octave, with_pool_padding
from octvideo.octave import OctConv3d

POOLS = [(1, 2, 2), (2, 2, 2)]


def build(name: str, alpha: float = 0.0, pool: tuple[int, ...] = (1, 2, 2), pool_padding: int = 1) -> ResNet:
    torch.manual_seed(0)
    return ResNet(with_octave(with_pool_padding(NETWORKS[name](8), pool_padding), alpha, pool=pool)).eval()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("pool", POOLS)
def test_state_dict_is_the_vanilla_twin_s(name: str, alpha: float, pool: tuple[int, ...]) -> None:
    with torch.device("meta"):
        vanilla_spec = NETWORKS[name](8)
        images = not isinstance(vanilla_spec, SlowFastSpec) and vanilla_spec.dims == 2
        if images and pool != (1, 2, 2):
            return
        octave_spec = with_octave(vanilla_spec, alpha, pool=(2, 2) if images else pool)
        if "_nl_" in name and alpha == 1.0:
            with pytest.raises(ValueError, match="no high channels to query from"):
                create(octave_spec)
            return
        if "resnext" in name and alpha == 0.1:
            with pytest.raises(ValueError, match=r"32 groups do not divide the split of in 116 \+ 12"):
                create(octave_spec)
            return
        vanilla, octave = create(NETWORKS[name](8)).state_dict(), create(octave_spec).state_dict()
    assert [(k, v.shape) for k, v in octave.items()] == [(k, v.shape) for k, v in vanilla.items()]


def test_one_seed_gives_the_same_weights_at_every_alpha() -> None:
    vanilla, octave = build("i3d_tiny").state_dict(), build("i3d_tiny", 0.5).state_dict()
    assert all(torch.equal(vanilla[k], octave[k]) for k in vanilla)


def test_vanilla_has_strided_convolutions_and_octave_none() -> None:
    vanilla = [m for m in build("i3d_tiny").modules() if isinstance(m, nn.Conv3d)]
    octave = [m for m in build("i3d_tiny", 0.5).modules() if isinstance(m, nn.Conv3d)]
    assert not any(isinstance(m, OctConv3d) for m in vanilla)
    assert [type(m) is nn.Conv3d for m in octave].count(True) == 1  # the stem
    assert build("i3d_tiny", 0.0).spec.octave_pool is None


def test_ratios_split_in_res2_and_merge_in_res5() -> None:
    net = build("i3d_r50", 0.125)
    pairs = {name: (m.alpha_in, m.alpha_out) for name, m in net.named_modules() if isinstance(m, OctConv3d)}
    assert pairs["stages.res2.0.conv1"] == pairs["stages.res2.0.projection"] == (0.0, 0.125)
    assert pairs["stages.res3.0.conv1"] == pairs["stages.res4.5.conv3"] == (0.125, 0.125)
    assert pairs["stages.res5.0.conv1"] == pairs["stages.res5.0.projection"] == (0.125, 0.0)
    assert pairs["stages.res5.2.conv3"] == (0.0, 0.0)


def test_temporal_kernels_of_i3d_are_where_the_paper_has_them() -> None:
    net = build("i3d_r50")
    kernels = {n: m.kernel_size[0] for n, m in net.named_modules() if isinstance(m, nn.Conv3d)}
    threes = [n for n, k in kernels.items() if k == 3]
    blocks = ["res2.0", "res2.1", "res2.2", "res3.0", "res3.2", "res4.0", "res4.2", "res4.4", "res5.1"]
    assert threes == [f"stages.{b}.conv1" for b in blocks]
    assert kernels["stem.conv"] == 5


@pytest.mark.parametrize("alpha,pool", [(0.0, (1, 2, 2)), (0.25, (1, 2, 2)), (0.25, (2, 2, 2)), (1.0, (2, 2, 2))])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [(8, 64, 64), (5, 61, 47), (2, 32, 32)])
def test_any_size_runs_forward_and_backward(
    alpha: float, pool: tuple[int, ...], padding: int, size: tuple[int, ...]
) -> None:
    net = build("i3d_tiny", alpha, pool, pool_padding=padding).train()
    x = torch.randn(2, 3, *size)
    before = x.clone()
    logits = net(x)
    logits.square().sum().backward()
    assert logits.shape == (2, 8)
    assert torch.equal(x, before)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_octave_of_every_stage_pools_both_frequencies_in_the_head() -> None:
    spec = with_octave(NETWORKS["i3d_tiny"](8), 0.25, ratios=[0.25] * 4)
    assert ResNet(spec)(torch.randn(2, 3, 8, 64, 64)).shape == (2, 8)


def test_c2d_cannot_tell_a_clip_from_its_reverse() -> None:
    clip = torch.randn(2, 3, 8, 64, 64)
    c2d, i3d = build("c2d_tiny"), build("i3d_tiny")
    torch.testing.assert_close(c2d(clip), c2d(clip.flip(2)), rtol=1e-4, atol=1e-6)
    for module in i3d.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.ones_(module.weight)
    assert (i3d(clip) - i3d(clip.flip(2))).abs().max() > 1e-3


def test_initialization() -> None:
    net = build("i3d_r50")
    block = net.get_submodule("stages.res4.1")
    assert torch.all(block.get_submodule("bn3").weight == 0)
    assert torch.all(block.get_submodule("bn2").weight == 1)
    conv2 = block.get_submodule("conv2").weight
    assert conv2.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert net.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert torch.all(net.head.fc.bias == 0)
