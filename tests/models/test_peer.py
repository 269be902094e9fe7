"""Agreement with pytorchvideo's own networks, weight for weight. Needs tests/peers.txt (see CONTRIBUTING)."""

import contextlib
import importlib.util
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from octvideo.models import NETWORKS, create
from octvideo.octave import NonLocal

MISSING = [name for name in ("torchvision", "pytorchvideo") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{MISSING} not installed: pip install --no-deps -r tests/peers.txt"
)


@pytest.fixture(scope="module", autouse=True)
def importable_torchvision() -> torch.library.Library:
    """torchvision's wheel lacks its operators beside a CPU torch; declared, not implemented, its Python part imports."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float t) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float t) -> Tensor",
    ):
        with contextlib.suppress(RuntimeError):  # a torchvision that brought its own
            library.define(schema)
    return library


def their_name(name: str, time_pool: bool) -> str:
    """Our name in a ResNet -> pytorchvideo's. time_pool: its pool behind res2 counts as a block."""
    name = name.replace("stem.conv", "blocks.0.conv").replace("stem.bn", "blocks.0.norm")
    last = 6 if time_pool else 5
    name = name.replace("head.fc", f"blocks.{last}.proj")

    def in_stage(match: re.Match[str]) -> str:
        stage, block, layer = int(match[1]), match[2], match[3]
        index = stage - 1 + (time_pool and stage > 2)
        branch = {"projection": "branch1_conv", "projection_bn": "branch1_norm"}.get(layer)
        if branch is None:
            kind, number = re.fullmatch(r"(conv|bn)(\d)", layer).groups()
            branch = f"branch2.{'conv' if kind == 'conv' else 'norm'}_{'abc'[int(number) - 1]}"
        return f"blocks.{index}.res_blocks.{block}.{branch}"

    return re.sub(r"stages\.res(\d)\.(\d+)\.(\w+)", in_stage, name)


def their_slowfast_name(name: str) -> str:
    for number, pathway in enumerate(("slow", "fast")):
        if name.startswith(f"{pathway}."):
            single = their_name(name.removeprefix(f"{pathway}."), time_pool=False)
            return re.sub(r"^blocks\.(\d)\.", rf"blocks.\1.multipathway_blocks.{number}.", single)
    if name.startswith("laterals."):
        _, place, layer, rest = name.split(".", 3)
        index = 0 if place == "stem" else int(place[-1]) - 1
        return f"blocks.{index}.multipathway_fusion.{'conv_fast_to_slow' if layer == 'conv' else 'norm'}.{rest}"
    return name.replace("head.fc", "blocks.6.proj")


def randomize(model: nn.Module) -> None:
    """Weights under which every layer matters: the zero gammas of a fresh network would hide most of them."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.05)


def check_logits(ours: nn.Module, theirs: nn.Module, rename: Callable[[str], str], clip: torch.Tensor, inputs) -> None:
    randomize(ours)
    renamed = {rename(name): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(renamed, strict=True)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        expected, got = theirs(inputs(clip)), ours(clip)
    assert expected.abs().mean() > 0.01
    assert ((got - expected).abs().max() / expected.abs().max()).item() < 1e-5


RESNETS = {
    "c2d_r50": ((1, 7, 7), ((1, 1, 1),) * 4, True),
    "i3d_r50": (
        (5, 7, 7),
        (((3, 1, 1),), ((3, 1, 1), (1, 1, 1)), ((3, 1, 1), (1, 1, 1)), ((1, 1, 1), (3, 1, 1))),
        True,
    ),
    "slow_r50": ((1, 7, 7), ((1, 1, 1), (1, 1, 1), (3, 1, 1), (3, 1, 1)), False),
}


@pytest.mark.parametrize("crop", [224, 256])
@pytest.mark.parametrize("name", RESNETS)
def test_resnets(name: str, crop: int) -> None:
    from pytorchvideo.models.resnet import create_resnet

    stem, kernels, time_pool = RESNETS[name]
    theirs = create_resnet(
        stem_conv_kernel_size=stem,
        stage_conv_a_kernel_size=kernels,
        stage1_pool=nn.MaxPool3d if time_pool else None,
        head_pool_kernel_size=(2 if time_pool else 4, crop // 32, crop // 32),
    )
    clip = torch.randn(1, 3, 4, crop, crop, generator=torch.Generator().manual_seed(0))
    check_logits(create(NETWORKS[name]()), theirs, lambda n: their_name(n, time_pool), clip, lambda x: x)


@pytest.mark.parametrize("crop", [224, 256])
@pytest.mark.parametrize("name,ratio,kernel", [("slowfast_4x16_r50", 8, 5), ("slowfast_8x8_r50", 4, 7)])
def test_slowfast(name: str, ratio: int, kernel: int, crop: int) -> None:
    from pytorchvideo.models.slowfast import create_slowfast

    frames = 2 * ratio
    theirs = create_slowfast(
        slowfast_fusion_conv_kernel_size=(kernel, 1, 1),
        slowfast_fusion_conv_stride=(ratio, 1, 1),
        head_pool_kernel_sizes=((2, crop // 32, crop // 32), (frames, crop // 32, crop // 32)),
    )
    clip = torch.randn(1, 3, frames, crop, crop, generator=torch.Generator().manual_seed(0))
    check_logits(create(NETWORKS[name]()), theirs, their_slowfast_name, clip, lambda x: [x[:, :, ::ratio], x])


@pytest.mark.parametrize("form", ["softmax", "dot_product"])
def test_nonlocal_block(form: str) -> None:
    from pytorchvideo.layers.nonlocal_net import create_nonlocal

    torch.manual_seed(0)
    ours, theirs = (
        NonLocal(16, 8, form=form),
        create_nonlocal(dim_in=16, dim_inner=8, pool_size=(1, 2, 2), instantiation=form),
    )
    nn.init.uniform_(ours.bn.weight, 0.5, 1.5)
    for layer in (ours.theta, ours.phi, ours.g, ours.out):
        nn.init.normal_(layer.weight, std=0.5)
    names = {"bn": "norm", "theta": "conv_theta", "phi": "conv_phi", "g": "conv_g", "out": "conv_out"}
    weights = {".".join([names[n.split(".")[0]], n.split(".")[1]]): v for n, v in ours.state_dict().items()}
    theirs.load_state_dict(weights, strict=True)
    x = torch.randn(2, 16, 4, 14, 14)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)
