import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from octvideo.analysis.complexity import complexity
from octvideo.models import NETWORKS, SlowFastSpec, Spec, create, with_octave, with_pool_padding
from octvideo.models.spec import feature_sizes
from octvideo.octave import NonLocal, OctBatchNorm2d, OctBatchNorm3d, OctConv2d, OctConv3d

from .shallow import cut


@pytest.mark.parametrize(
    "size,padding,expected",
    [
        ((8, 224, 224), 1, [(8, 56, 56), (4, 56, 56), (4, 28, 28), (4, 14, 14), (4, 7, 7)]),
        ((8, 224, 224), 0, [(8, 55, 55), (4, 55, 55), (4, 28, 28), (4, 14, 14), (4, 7, 7)]),
        ((8, 256, 320), 1, [(8, 64, 80), (4, 64, 80), (4, 32, 40), (4, 16, 20), (4, 8, 10)]),
        ((5, 161, 200), 1, [(5, 41, 50), (2, 41, 50), (2, 21, 25), (2, 11, 13), (2, 6, 7)]),
    ],
)
def test_feature_sizes(size: tuple[int, ...], padding: int, expected: list[tuple[int, ...]]) -> None:
    sizes = feature_sizes(with_pool_padding(NETWORKS["i3d_r50"](), padding), size)
    assert list(sizes) == ["stem", "res2", "res3", "res4", "res5"]
    assert list(sizes.values()) == expected


def test_a_size_that_the_strides_do_not_admit_names_those_that_they_do() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 3\) leaves nothing at stem .* admit \(2, 5, 5\)"):
        feature_sizes(with_pool_padding(NETWORKS["i3d_r50"](), 0), (1, 3, 3))
    with pytest.raises(ValueError, match=r"leaves nothing at res2 .* admit \(2, 1, 1\)"):
        feature_sizes(NETWORKS["i3d_tiny"](), (1, 64, 64))


def test_with_octave() -> None:
    spec = NETWORKS["i3d_r50"]()
    assert [s.alpha for s in with_octave(spec, 0.125).stages] == [0.125, 0.125, 0.125, 0.0]
    assert with_octave(spec, 0.125).octave_pool == (1, 2, 2)
    assert with_octave(spec, 0.125, pool=(2, 2, 2)).octave_pool == (2, 2, 2)
    assert [s.alpha for s in with_octave(spec, 0.5, ratios=[0, 0.5, 0.25, 0]).stages] == [0, 0.5, 0.25, 0]
    assert with_octave(spec, 0.0, pool=(2, 2, 2)) == spec


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha {alpha} is out of range"):
        with_octave(NETWORKS["i3d_r50"](), alpha)


def test_ratios_of_another_length() -> None:
    with pytest.raises(ValueError, match="2 octave ratios .* for 4 stages"):
        with_octave(NETWORKS["i3d_r50"](), 0.5, ratios=[0.5, 0.5])


def test_no_padding_where_there_is_no_pool() -> None:
    assert with_pool_padding(NETWORKS["mobilenet_v1_1.0"](), 1) == NETWORKS["mobilenet_v1_1.0"]()
    with pytest.raises(ValueError, match="stem has no max-pool; leave it at 1"):
        with_pool_padding(NETWORKS["mobilenet_v1_1.0"](), 0)


def input_of(spec: Spec, batch: int = 1) -> tuple[int, ...]:
    return (batch, 3, 8, 48, 48) if isinstance(spec, SlowFastSpec) or spec.dims == 3 else (batch, 3, 64, 64)


# A grouped octave layer has all its groups in every path (the authors' code), so its wiring does depend on alpha.
# Of a depth, one network of each kind is enough; a non-local block's octave form uses a part of the vanilla kernels.
UNEQUAL = ("resnext", "_nl_", "101", "152_v1f", "200")


@pytest.mark.parametrize("name", [n for n in NETWORKS if not any(part in n for part in UNEQUAL)])
def test_vanilla_weights_mean_the_same_in_the_octave_network(name: str) -> None:
    """On a still and even picture both frequencies see the same, so equal weights must give equal logits at any alpha.

    Kernels that look at their centre only keep it even. This fails where a channel of the state dict meets another
    channel in the octave network: behind a concatenation (DenseNet, SlowFast), above all.
    """
    spec = cut(NETWORKS[name](8, dropout=0.0))
    torch.manual_seed(0)
    vanilla = create(spec).eval().double()  # a GloRe unit multiplies maps with one another: 1e45
    for module in vanilla.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            middle = tuple(size // 2 for size in module.kernel_size)
            centre = torch.zeros_like(module.weight.data)
            centre[(..., *middle)] = module.weight.data[(..., *middle)]
            module.weight.data = centre
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            # a norm that passes on what varies over channels keeps every layer's part in the logits
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.01, 0.03)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    size = input_of(spec)
    stages = len(spec.slow.stages if isinstance(spec, SlowFastSpec) else spec.stages)
    x = torch.randn(*size[:2], *(1,) * (len(size) - 2), dtype=torch.float64).expand(size)
    with torch.no_grad():
        expected = vanilla(x)
        assert expected.std() > 1e-3
        for ratios in ([0.25] * (stages - 1) + [0.0], [0.5] * stages):
            octave = create(with_octave(spec, ratios[0], ratios=ratios)).eval().double()
            octave.load_state_dict(vanilla.state_dict())
            difference = (octave(x) - expected).abs().max() / expected.abs().max()
            assert difference < 1e-9, ratios


@pytest.mark.parametrize("name", [n for n in NETWORKS if n.startswith(("resn", "se_", "dense", "mobile"))])
@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_image_networks_train_at_odd_sizes(name: str, alpha: float) -> None:
    torch.manual_seed(0)
    net = create(with_octave(cut(NETWORKS[name](5)), alpha)).train()
    entries = net.state_dict().values()
    assert len({value.data_ptr() for value in entries}) == len(entries)  # nothing stands in it under two names
    logits = net(torch.randn(2, 3, 71, 53))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    "name,size,expected",
    [
        ("resnet50", 224, [56, 56, 28, 14, 7]),
        ("resnet152_v1f", 224, [56, 56, 28, 14, 7]),
        ("resnext50_32x4d_bl", 320, [80, 80, 40, 20, 10]),
        ("densenet121", 224, [56, 56, 28, 14, 7]),
        ("mobilenet_v2_1.0", 224, [112, 112, 56, 28, 14, 7]),
    ],
)
def test_feature_sizes_of_images(name: str, size: int, expected: list[int]) -> None:
    assert [s for s, _ in feature_sizes(NETWORKS[name](), (size, size)).values()] == expected


def test_mobilenet_v1_splits_as_the_authors_code_does() -> None:
    """Depthwise ratios [0] + [a] * 10 + [0] * 2, pointwise ratios [a] * 10 + [0] * 3."""
    net = create(with_octave(NETWORKS["mobilenet_v1_1.0"](), 0.5))
    blocks = [block for stage in net.stages for block in stage]
    assert [block.conv1.alpha_out for block in blocks] == [0.0] + [0.5] * 10 + [0.0] * 2
    assert [block.conv2.alpha_out for block in blocks] == [0.5] * 10 + [0.0] * 3


def test_mobilenet_v2_is_octave_inside_the_first_13_blocks() -> None:
    net = create(with_octave(NETWORKS["mobilenet_v2_1.0"](), 0.375))
    blocks = [block for stage in net.stages for block in stage]
    assert [block.conv2.alpha_out for block in blocks] == [0.375] * 13 + [0.0] * 4
    assert {block.conv3.alpha_out for block in blocks} == {0.0}
    assert blocks[0].conv1.weight.shape == (32, 32, 1, 1)  # the block without expansion keeps this layer


def on_meta(spec: Spec) -> nn.Module:
    with torch.device("meta"):
        return create(spec)


FAMILIES = ("i3d_nl_r50", "slowfast_4x16_r50", "resnext50_32x4d", "densenet121", "mobilenet_v2_1.125")


@pytest.mark.parametrize("round_to", [8, 16])
@pytest.mark.parametrize("name", [n if n in FAMILIES else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS])
def test_low_channels_in_multiples(name: str, round_to: int) -> None:
    """Layers agree with their neighbours, or the forward pass would raise; the state dict stays; counts are what runs."""
    spec = cut(NETWORKS[name](10), keep=1)
    net = on_meta(with_octave(spec, 0.25, round_to=round_to))
    lows = []
    for module in net.modules():
        if isinstance(module, OctConv2d | OctConv3d):
            lows += [module.in_low, module.out_low]
        elif isinstance(module, OctBatchNorm2d | OctBatchNorm3d):
            lows.append(module.low)
        elif isinstance(module, NonLocal):
            lows += [module.low, module.theta.out_channels - module.inner]
    assert any(lows) and all(low % round_to == 0 for low in lows)
    state, vanilla = net.state_dict(), on_meta(spec).state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in vanilla.items()}
    size = input_of(spec)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert net.eval()(torch.empty(size, device="meta")).shape == (1, 10)
    assert complexity(net, size[1:]).macs.total == counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ["i3d_tiny", "slowfast_4x16_r50", "resnet50_glore", "mobilenet_v1_1.0", "densenet121"])
def test_a_network_of_rounded_channels_trains(name: str) -> None:
    torch.manual_seed(0)
    spec = cut(NETWORKS[name](5), keep=1)
    net = create(with_octave(spec, 0.2, round_to=8)).train()
    x: Tensor = torch.randn(input_of(spec, batch=2))
    net(x[..., :32]).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_rounding_changes_what_is_counted() -> None:
    """Of 64 channels a tenth is 6 and becomes 8, of 256 25 becomes 24: counts follow the layers."""
    spec = NETWORKS["i3d_r50"](400)
    paper, rounded = (on_meta(with_octave(spec, 0.1, round_to=r)) for r in (1, 8))
    splits = [
        [(c.out_high, c.out_low) for c in (b.conv1, b.conv3)] for b in (paper.stages.res2[0], rounded.stages.res2[0])
    ]
    assert splits == [[(58, 6), (231, 25)], [(56, 8), (232, 24)]]
    first, second = (complexity(net, (3, 8, 224, 224)).macs.total for net in (paper, rounded))
    assert second / first == pytest.approx(0.989, abs=0.001)  # 6 -> 8 outweighs 25 -> 24: there are more narrow layers


def test_round_to_1_is_the_paper_s_network() -> None:
    spec = NETWORKS["i3d_nl_r50"](400)
    assert with_octave(spec, 0.1, round_to=1) == with_octave(spec, 0.1)
    assert with_octave(spec, 0.0, round_to=8) == spec
    with pytest.raises(ValueError, match="round_to is 0; low channels come in multiples of 1 or more"):
        with_octave(spec, 0.1, round_to=0)
