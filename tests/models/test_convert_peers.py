"""octavize on the networks of pytorchvideo, torchvision and timm. Needs tests/peers.txt.

On a constant clip, with padding that keeps it constant, pooling and upsampling change nothing, and the octave network must
say what the vanilla one says: every channel, gate and concatenation has then met its own weights.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from octvideo.octave import ConversionError, OctaveNetwork, octavize
from octvideo.octave.operations import is_depthwise

pytestmark = pytest.mark.usefixtures("importable_torchvision")

IMAGE, CLIP, LONG_CLIP = (3, 64, 64), (3, 4, 64, 64), (3, 8, 64, 64)
# Package, what makes the network, the size of its input (or of each in a list).
Peer = tuple[str, Callable[[Any], nn.Module], Any]


def _video(module: str, function: str, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda package: getattr(importlib.import_module(f"pytorchvideo.models.{module}"), function)(**options)


def _torchvision(name: str, **options: Any) -> Callable[[Any], nn.Module]:
    def make(package: Any) -> nn.Module:
        models = importlib.import_module("torchvision.models")
        return getattr(models if hasattr(models, name) else models.video, name)(weights=None, **options)

    return make


def _timm(name: str, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda package: importlib.import_module("timm").create_model(name, **options)


POOL = {"head_pool_kernel_size": (1, 2, 2)}
PEERS: dict[str, Peer] = {
    "slow_r50": ("pytorchvideo", _video("resnet", "create_resnet", head_pool_kernel_size=(4, 2, 2)), CLIP),
    "slowfast": (
        "pytorchvideo",
        _video("slowfast", "create_slowfast", head_pool_kernel_sizes=((1, 2, 2), (4, 2, 2))),
        [(3, 1, 64, 64), CLIP],
    ),
    "x3d": (
        "pytorchvideo",
        _video("x3d", "create_x3d", input_clip_length=4, input_crop_size=64, head_activation=None),
        CLIP,
    ),
    "csn": ("pytorchvideo", _video("csn", "create_csn", **POOL), LONG_CLIP),
    "r2plus1d": ("pytorchvideo", _video("r2plus1d", "create_r2plus1d", head_activation=None, **POOL), LONG_CLIP),
    "resnet18": ("torchvision", _torchvision("resnet18"), IMAGE),
    "resnet50": ("torchvision", _torchvision("resnet50"), IMAGE),
    "densenet121": ("torchvision", _torchvision("densenet121"), IMAGE),
    "mobilenet_v2": ("torchvision", _torchvision("mobilenet_v2"), IMAGE),
    "mobilenet_v3_small": ("torchvision", _torchvision("mobilenet_v3_small"), IMAGE),
    "efficientnet_b0": ("torchvision", _torchvision("efficientnet_b0"), IMAGE),
    "shufflenet_v2": ("torchvision", _torchvision("shufflenet_v2_x0_5"), IMAGE),
    "vgg11_bn": ("torchvision", _torchvision("vgg11_bn"), IMAGE),
    "r3d_18": ("torchvision", _torchvision("r3d_18"), CLIP),
    "r2plus1d_18": ("torchvision", _torchvision("r2plus1d_18"), CLIP),
    "convnext": ("torchvision", _torchvision("convnext_tiny"), IMAGE),
    "timm seresnet50": ("timm", _timm("seresnet50"), IMAGE),
    "timm densenet121": ("timm", _timm("densenet121"), IMAGE),
    "timm mobilenetv2": ("timm", _timm("mobilenetv2_100"), IMAGE),
    "timm mobilenetv3": ("timm", _timm("mobilenetv3_small_100"), IMAGE),
    "timm efficientnet": ("timm", _timm("efficientnet_b0", drop_path_rate=0.2), IMAGE),
    "timm convnext": ("timm", _timm("convnext_atto"), IMAGE),
    "timm convnext with linear layers": ("timm", _timm("convnext_atto", conv_mlp=False), IMAGE),
    "timm resnet50d": ("timm", _timm("resnet50d"), IMAGE),
}


def peers(*quick: str) -> pytest.MarkDecorator:
    """All of them, of which the default run takes the quick ones; the others take minutes together."""
    names = [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in PEERS]
    return pytest.mark.parametrize("name", names)


def build(name: str) -> tuple[nn.Module, Any]:
    """The network with weights under which every layer matters."""
    package, make, sizes = PEERS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} not installed: pip install --no-deps -r tests/peers.txt")
    torch.manual_seed(0)
    network = make(package)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
    for key, weight in network.named_parameters():
        if "layer_scale" in key or key.endswith("gamma"):  # ConvNeXt's, which begin at 1e-6 and hide their branches
            nn.init.uniform_(weight, 0.5, 1.0)
    return network, sizes


def inputs(sizes: Any, make: Callable[[tuple[int, ...]], Tensor]) -> Any:
    """Anew each time: pytorchvideo's SlowFast writes into the list that it is given."""
    return [make(size) for size in sizes] if isinstance(sizes, list) else make(sizes)


def converted(network: nn.Module, sizes: Any, dtype: torch.dtype = torch.float32) -> OctaveNetwork:
    return octavize(network, 0.25, inputs(sizes, lambda s: torch.zeros(1, *s, dtype=dtype)), min_size=4)


@peers("x3d", "mobilenet_v3_small", "timm mobilenetv3")
def test_it_converts_trains_and_costs_what_the_law_says(name: str) -> None:
    network, sizes = build(name)
    octave = converted(network, sizes)
    weights = network.state_dict()
    assert list(octave.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[key]) for key, value in octave.state_dict().items())
    octave(inputs(sizes, lambda s: torch.randn(2, *s))).sum().backward()
    assert all(p.grad is not None for p in octave.parameters())
    check_law(octave)


def check_law(octave: OctaveNetwork) -> None:
    """1 - 3/4 alpha (2 - alpha) between two octave maps, 1 - 3/4 alpha with one of them, at the alphas that came out."""
    seen = 0
    for row in octave.report.rows:
        layer = octave.get_submodule(row.name)
        even = all(size % 2 == 0 for size in row.size[-2:])
        depthwise = isinstance(layer, nn.Conv2d | nn.Conv3d) and is_depthwise(layer)
        if not even or row.strides_by_pooling or (getattr(layer, "groups", 1) > 1 and not depthwise):
            continue
        a, b = row.alpha_in, row.alpha_out
        # Each of the four paths has the share of the kernel that its channels have; all but high -> high run on a quarter.
        share = (1 - a) * (1 - b) + (a + b - a * b) / 4
        if depthwise:
            share = 1 - 0.75 * a
        assert row.macs_after == pytest.approx(share * row.macs_before), row
        seen += a > 0 and b > 0
    assert seen > 0
    before, after = octave.report.macs
    assert after < before


@peers("mobilenet_v3_small", "timm mobilenetv3")
def test_on_constant_maps_it_agrees_with_the_vanilla_network(name: str) -> None:
    network, sizes = build(name)
    network.double()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.padding_mode = "replicate"
    with torch.no_grad():
        for _ in range(3):  # so that the norms' statistics are those of constant maps
            network.train()(inputs(sizes, lambda s: constant(4, *s)))
        network.eval()
        x = inputs(sizes, lambda s: constant(3, *s))
        octave = converted(network, sizes, torch.float64)
        got, expected = (model(pytree.tree_map(lambda t: t, x)) for model in (octave, network))
    assert expected.std() > 0
    assert ((got - expected).abs().max() / expected.abs().max()).item() < 1e-6


def constant(*size: int) -> Tensor:
    return torch.randn(*size[:2], *(1,) * (len(size) - 2), dtype=torch.float64).expand(size).clone()


@peers()
def test_at_alpha_0_it_is_the_network_bit_for_bit(name: str) -> None:
    network, sizes = build(name)
    network.eval()
    octave = octavize(network, 0.0, inputs(sizes, lambda s: torch.zeros(1, *s)))
    x = inputs(sizes, lambda s: torch.randn(2, *s))
    with torch.no_grad():
        got, expected = (model(pytree.tree_map(lambda t: t, x)) for model in (octave, network))
    assert torch.equal(got, expected)


@pytest.mark.slow
def test_what_does_not_convert_says_so() -> None:
    """Kernels that are standardized in forward."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm not installed: pip install --no-deps -r tests/peers.txt")
    with pytest.raises(ConversionError, match=r"vanilla: conv2d in stem.conv1: its weight is computed in forward"):
        octavize(_timm("eca_nfnet_l0")(None), 0.25, torch.zeros(1, *IMAGE), min_size=4)
