import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from octvideo.analysis.complexity import complexity
from octvideo.analysis.roofline import CARDS, Card, card_named, efficiency, roofline, step_roofline
from octvideo.analysis.traffic import Kernel
from octvideo.models import NETWORKS, create, with_octave
from octvideo.octave import fuse

H100 = CARDS[0]
CLIP, IMAGE = (3, 8, 64, 64), (3, 64, 64)


def network(name: str, alpha: float = 0.0, **options: int) -> nn.Module:
    with torch.device("meta"):
        return create(with_octave(NETWORKS[name](), alpha, **options))


def test_times_and_bounds_by_hand() -> None:
    card = Card("card", flops=100.0, bandwidth=10.0)
    kernels = [
        Kernel("convolution", "conv", "forward", 500, 20),  # 5 s of arithmetic, 2 s of memory
        Kernel("relu", "conv", "forward", 0, 30),  # 3 s
        Kernel("convolution", "fc", "forward", 100, 40),  # 1 s, 4 s
        Kernel("convolution", "conv", "backward", 200, 20),  # 2 s, 2 s
    ]
    model = roofline(kernels, card, {"conv": "Conv2d", "fc": "Linear"})
    found = [(one.name, one.kind, one.phase, one.flops, one.bytes, one.seconds, one.bound) for one in model.layers]
    assert found == [
        ("conv", "Conv2d", "forward", 500, 50, 8.0, "compute"),
        ("fc", "Linear", "forward", 100, 40, 4.0, "memory"),
        ("conv", "Conv2d", "backward", 200, 20, 2.0, "memory"),
    ]
    assert (model.flops, model.bytes, model.seconds) == (800, 110, 14.0)
    assert model.memory_bound == (3 + 4 + 2) / 14


def test_efficiency_is_the_ratio_of_ratios() -> None:
    kernels = [Kernel("", "", "forward", 0, size) for size in (100, 80)]
    vanilla, octave = (roofline([one], H100, {"": "Net"}) for one in kernels)
    assert efficiency(vanilla, octave, 0.6) == pytest.approx(0.6 / 0.8)
    with pytest.raises(ValueError, match="H200"):
        efficiency(vanilla, roofline(kernels, CARDS[1], {"": "Net"}), 0.6)


@pytest.mark.parametrize(
    "device,measured,flops,bandwidth",
    [
        ("NVIDIA H100 80GB HBM3", False, 990e12, 3.35e12),
        ("NVIDIA H200", False, 990e12, 4.8e12),
        ("h100", True, 790e12, 3.0e12),
        ("NVIDIA H200", True, 790e12, 4.3e12),
    ],
)
def test_cards_by_the_name_that_torch_reads(device: str, measured: bool, flops: float, bandwidth: float) -> None:
    card = card_named(device, measured=measured)
    assert card is not None and (card.flops, card.bandwidth, card.measured) == (flops, bandwidth, measured)


@pytest.mark.parametrize("device", ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB", "NVIDIA A100", ""])
def test_other_cards_are_not_taken_for_these(device: str) -> None:
    assert card_named(device) is None


@pytest.mark.parametrize(
    "name,alpha,size,stems",
    [
        ("i3d_r50", 0.0, CLIP, ["stem.conv"]),
        ("c2d_r50", 0.1, CLIP, ["stem.conv"]),
        ("slowfast_4x16_r50", 0.25, (3, 32, 64, 64), ["slow.stem.conv", "fast.stem.conv"]),
        ("resnet50", 0.5, IMAGE, ["stem.conv"]),
        ("resnext50_32x4d", 0.25, IMAGE, ["stem.conv"]),  # grouped
        ("mobilenet_v2_1.0", 0.375, IMAGE, None),  # depthwise
        ("i3d_nl_r50", 0.25, CLIP, ["stem.conv"]),
    ],
)
def test_a_training_step_is_three_forward_passes_without_the_clip_s_gradient(
    name: str, alpha: float, size: tuple[int, ...], stems: list[str] | None
) -> None:
    net, batch = network(name, alpha), 2
    cost = complexity(net, size)
    model = step_roofline(net, size, batch=batch, card=H100, training=True, fused=False, align=1)
    first = [cost.layers[0].name] if stems is None else stems
    by_name = {layer.name: sum(layer.macs) for layer in cost.layers}
    assert model.flops == 2 * batch * (3 * cost.macs.total - sum(by_name[name] for name in first))
    inference = step_roofline(net, size, batch=batch, card=H100, training=False, align=1)
    assert inference.flops == 2 * batch * cost.macs.total
    flops = {(one.name, one.phase): one.flops for one in model.layers}
    for layer in cost.layers:
        if layer.kind != "NonLocal":
            forward = 2 * batch * sum(layer.macs)
            assert flops[layer.name, "forward"] == forward
            assert flops[layer.name, "backward"] == forward * (1 if layer.name in first else 2)


def test_flops_beside_torch_s_counter_on_a_real_step() -> None:
    net = create(with_octave(NETWORKS["i3d_tiny"](), 0.25)).train()
    clips, labels = torch.randn(2, 3, 8, 32, 32), torch.zeros(2, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(net(clips), labels).backward()
    model = step_roofline(net, (3, 8, 32, 32), batch=2, card=H100, training=True, align=1)
    assert model.flops == counter.get_total_flops()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", [{"fused": False}, {"fused": True}, {"fused": True, "joint": True}])
def test_all_but_the_parameters_grows_with_the_batch(training: bool, form: dict[str, bool]) -> None:
    net = network("i3d_tiny", 0.25)
    options = {"card": H100, "training": training, "align": 1, **form}
    models = [step_roofline(net, (3, 8, 32, 32), batch=batch, **options) for batch in (2, 4, 6)]
    flops, sizes = [model.flops for model in models], [model.bytes for model in models]
    assert flops == [flops[0], 2 * flops[0], 3 * flops[0]]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0]
    fixed = sizes[0] - (sizes[1] - sizes[0])
    parameters = sum(p.numel() for p in net.parameters())
    norms = sum(p.numel() for m in net.modules() if isinstance(m, nn.BatchNorm3d) for p in m.parameters())
    if not training:  # two bytes for each parameter of convolutions and the classifier, four vectors for each norm
        assert fixed == 2 * (parameters - norms) + 4 * 2 * norms
    else:  # in any form more than cast, forward, input gradient, weight gradient and the update
        assert 38 * (parameters - norms) < fixed < 80 * parameters


def test_the_update_reads_and_writes_float32() -> None:
    net = network("i3d_tiny")
    model = step_roofline(net, (3, 8, 32, 32), batch=2, card=H100, training=True)
    (update,) = [layer for layer in model.layers if layer.phase == "update"]
    cast = [layer for layer in model.layers if layer.phase == "cast"]
    parameters = sum(p.numel() for p in net.parameters())
    norms = sum(p.numel() for m in net.modules() if isinstance(m, nn.BatchNorm3d) for p in m.parameters())
    assert update.bytes == 24 * parameters and update.flops == 0 and update.bound == "memory"
    assert sum(layer.bytes for layer in cast) == (4 + 2) * (parameters - norms)


@pytest.mark.parametrize("alpha", [0.125, 0.25, 0.5])
def test_a_joint_octave_layer_moves_what_the_paper_s_memory_law_says(alpha: float) -> None:
    """Of activations 1 - 3/4 alpha (paper, Table 1); the parameters are as many as before."""
    size, options = (3, 8, 256, 256), {"batch": 4, "card": H100, "training": False, "joint": True}
    vanilla, octave = (step_roofline(network("i3d_r50", a), size, **options) for a in (0.0, alpha))
    name = "stages.res2.1.conv1"  # 256 -> 64 channels with its norm and ReLU, one kernel
    before, after = ([one.bytes for one in model.layers if one.name == name] for model in (vanilla, octave))
    parameters = 2 * 64 * 256 * 3 + 4 * 4 * 64
    activations = 2 * 4 * 4 * 64 * 64 * (256 + 64) * 2  # batch 4; T is 8 in res2
    assert before == [parameters + activations]
    assert after == [parameters + (1 - 0.75 * alpha) * activations]


def test_a_fused_network_moves_what_fusing_its_operators_moves() -> None:
    """octave.fuse folds norms into the convolutions: another road to one kernel per convolution."""
    net = network("i3d_r50").eval()
    options = {"batch": 4, "card": H100, "training": False}
    built, folded = (step_roofline(model, CLIP, **options) for model in (net, fuse(net)))
    vectors = sum(p.numel() for m in net.modules() if isinstance(m, nn.BatchNorm3d) for p in m.parameters())
    # of a norm's four float32 vectors one remains, the bias in half precision
    assert built.bytes - folded.bytes == 2 * vectors * 4 - vectors // 2 * 2
    assert built.flops == folded.flops


def test_rounding_the_channels_saves_their_padding() -> None:
    net = {round_to: network("i3d_r50", 0.1, round_to=round_to) for round_to in (1, 8)}
    options = {"batch": 2, "card": H100, "training": False}
    padded = {key: step_roofline(model, CLIP, **options) for key, model in net.items()}
    plain = {key: step_roofline(model, CLIP, **options, align=1) for key, model in net.items()}
    assert padded[1].flops > 1.03 * plain[1].flops and padded[1].bytes > plain[1].bytes
    stem = next(one for one in plain[8].layers if one.name == "stem.conv")
    assert padded[8].flops - plain[8].flops == stem.flops * 5 // 3  # the clip's 3 channels count as 8
    assert padded[8].seconds < padded[1].seconds


def test_forms_move_fewer_bytes_one_after_the_other() -> None:
    net = network("i3d_r50", 0.25)
    forms = ({"fused": False}, {"fused": True}, {"fused": True, "joint": True})
    models = [step_roofline(net, CLIP, batch=4, card=H100, training=True, **form) for form in forms]
    assert models[0].bytes > 1.3 * models[1].bytes > 1.3 * models[2].bytes
    assert len({model.flops for model in models}) == 1
    for model in models:
        assert model.seconds >= max(model.flops / H100.flops, model.bytes / H100.bandwidth)
        assert model.seconds == pytest.approx(sum(layer.seconds for layer in model.layers))
        assert 0 < model.memory_bound < 1


def test_the_model_is_left_unchanged() -> None:
    net = create(with_octave(NETWORKS["i3d_tiny"](), 0.25)).eval()
    net.stem.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    for training in (True, False):
        step_roofline(net, (3, 8, 32, 32), batch=2, card=H100, training=training)
    assert not net.training and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(p.grad is None and p.device.type == "cpu" for p in net.parameters())
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {
        f"stem.{name}" for name, _ in net.stem.named_parameters()
    }
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    "options,value",
    [
        ({"input_size": (8, 32)}, r"\(8, 32\)"),
        ({"batch": 0}, "0"),
        ({"align": 0}, "0"),
        ({"dtype": torch.float32}, "float32"),
        ({"fused": False, "joint": True}, "joint"),
    ],
)
def test_bad_input_is_named(options: dict, value: str) -> None:
    arguments = {"input_size": (3, 8, 32, 32), "batch": 2, "card": H100, "training": True, **options}
    with pytest.raises(ValueError, match=value):
        step_roofline(nn.Conv3d(3, 4, 1), **arguments)


def test_half_precision_types_cost_the_same() -> None:
    net = network("i3d_tiny")
    first, second = (
        step_roofline(net, (3, 8, 32, 32), batch=2, card=H100, training=True, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16)
    )
    assert first == second and math.isfinite(first.seconds)
