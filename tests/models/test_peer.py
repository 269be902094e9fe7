"""Agreement with pytorchvideo's and torchvision's networks, weight for weight. Needs tests/peers.txt."""

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from octvideo.models import NETWORKS, create
from octvideo.models.zoo import resnet2d
from octvideo.octave import NonLocal
from octvideo.weights.names import from_octvideo

MISSING = [name for name in ("torchvision", "pytorchvideo") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed: pip install --no-deps -r tests/peers.txt"),
    pytest.mark.usefixtures("importable_torchvision"),
]


def randomize(model: nn.Module) -> None:
    """Weights under which every layer matters: the zero gammas of a fresh network would hide most of them."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.05)


Weights = Mapping[str, torch.Tensor]


def check_logits(
    ours: nn.Module, theirs: nn.Module, rename: Callable[[Weights], Weights], clip: torch.Tensor, inputs
) -> None:
    randomize(ours)
    theirs.load_state_dict(rename(ours.state_dict()), strict=True)
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
    check_logits(
        create(NETWORKS[name]()),
        theirs,
        partial(from_octvideo, layout="pytorchvideo", pool_block=time_pool),
        clip,
        lambda x: x,
    )


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
    check_logits(
        create(NETWORKS[name]()),
        theirs,
        partial(from_octvideo, layout="pytorchvideo"),
        clip,
        lambda x: [x[:, :, ::ratio], x],
    )


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


def their_image_name(name: str) -> str:
    """Our name in DenseNet-121 -> torchvision's."""
    name = name.replace("stem.conv", "features.conv0").replace("stem.bn", "features.norm0")
    name = name.replace("tail_bn", "features.norm5").replace("head.fc", "classifier")

    def in_block(match: re.Match[str]) -> str:
        layer = match[3].replace("bn", "norm")
        return f"features.denseblock{int(match[1]) - 1}.denselayer{int(match[2]) + 1}.{layer}"

    def between(match: re.Match[str]) -> str:
        return f"features.transition{int(match[1]) - 2}.{match[2].replace('bn', 'norm')}"

    name = re.sub(r"stages\.res(\d)\.(\d+)\.(\w+)", in_block, name)
    return re.sub(r"transitions\.res(\d)\.(\w+)", between, name)


def test_densenet() -> None:
    from torchvision.models import densenet121

    def renamed(weights: Weights) -> Weights:
        return {their_image_name(name): value for name, value in weights.items()}

    ours = create(replace(NETWORKS["densenet121"](1000), norm_eps=1e-5))
    image = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    check_logits(ours, densenet121(), renamed, image, lambda x: x)


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_post_activation_image_networks(name: str) -> None:
    from torchvision import models

    fields = {} if name == "resnet50" else {"groups": 32, "width": 128, "expansion": 2}
    ours = create(resnet2d(1000, blocks=(3, 4, 6, 3), **fields))
    image = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    check_logits(ours, getattr(models, name)(), partial(from_octvideo, layout="torchvision"), image, lambda x: x)
