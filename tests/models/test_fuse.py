"""Every network's inference form gives the network's numbers, and exports."""

import copy
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from octvideo.models import NETWORKS, SlowFastSpec, Spec, create, with_octave
from octvideo.octave import fuse
from octvideo.octave.fuse import FusedConv, FusedOctConv
from octvideo.octave.resample import frames_as_channels

from .shallow import cut
from .test_export import NETWORKS as CONFIGURATIONS

# Of a kind, one depth: the others have the same layers.
DEEP = ["oct_resnet50_glore_a0.5", "oct_resnet50_v1b_a0.5", "oct_resnet200_a0.5", "oct_se_resnet152_v1e_a0.125"]
KINDS = [n for n in NETWORKS if not any(part in n for part in ("101", "200", "26", "8x8", "0.75", "1.125", "balanced"))]


def network(spec: Spec) -> nn.Module:
    """With norms that do something: statistics and weights are random."""
    torch.manual_seed(0)
    model = create(spec).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
    return model


def clip(spec: Spec) -> torch.Tensor:
    video = isinstance(spec, SlowFastSpec) or spec.dims == 3
    return torch.randn(1, 3, *((8, 38, 46) if video else (70, 54)))


def check(spec: Spec) -> nn.Module:
    return compare(network(spec), clip(spec))


def compare(model: nn.Module, x: torch.Tensor) -> nn.Module:
    fused = fuse(model)
    with torch.no_grad():
        expected = model(x)
        assert (fused(x) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) for module in fused.modules())
    return fused


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_every_kind_of_network(name: str, alpha: float) -> None:
    fused = check(with_octave(cut(NETWORKS[name](8), keep=1), alpha))
    assert any(isinstance(module, FusedOctConv if alpha else FusedConv) for module in fused.modules())


@pytest.mark.parametrize("alpha", [0.125, 1.0])
@pytest.mark.parametrize("name", ["i3d_r50", "slowfast_4x16_r50", "resnet50", "densenet121", "mobilenet_v2_1.0"])
def test_other_alphas(name: str, alpha: float) -> None:
    check(with_octave(cut(NETWORKS[name](8), keep=1), alpha))


@pytest.mark.parametrize("name", ["i3d_tiny", "i3d_nl_r50", "slowfast_4x16_r50"])
def test_temporal_spatial_pooling(name: str) -> None:
    check(with_octave(cut(NETWORKS[name](8), keep=2), 0.25, pool=(2, 2, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("name", list({spec: name for name, spec in CONFIGURATIONS.items()}.values()))
def test_every_configuration_at_full_depth(name: str) -> None:
    """In double precision: with these norms, GloRe units give logits of 1e81."""
    spec = CONFIGURATIONS[name]
    compare(network(spec).double(), clip(spec).double())


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"imagenet/{n}" for n in DEEP])
def test_single_precision_at_full_depth(name: str) -> None:
    """No further from the truth than the network itself, where norms have the statistics of what they see."""
    spec = CONFIGURATIONS[name]
    model = network(spec)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.cat([clip(spec) for _ in range(8)]))
        x, truth = clip(spec), copy.deepcopy(model).double().eval()
        expected = truth(x.double())
        own, fused = ((f(x) - expected).abs().max() / expected.abs().max() for f in (model.eval(), fuse(model)))
    assert fused < max(1e-4, 2 * own) and own < 1e-3


def check_export(name: str, strict: bool) -> None:
    spec = with_octave(cut(NETWORKS[name](8), keep=1), 0.25)
    fused, x = fuse(network(spec)), clip(spec)
    exported = torch.export.export(fused, (x,), strict=strict).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), fused(x), rtol=1e-4, atol=1e-5)


def test_export() -> None:
    check_export("i3d_tiny", strict=False)


@pytest.mark.parametrize("dims,pool", [(3, (1, 2, 2)), (2, (1, 2, 2)), (3, (2, 2, 2))])
def test_pooling_and_upsampling_are_single_steps_of_an_exported_network(dims: int, pool: tuple[int, ...]) -> None:
    fused = fuse(network(with_octave(NETWORKS["i3d_tiny"](8), 0.25, pool=pool)))
    x, steps = torch.randn(1, 3, 5, 33, 35), Counter()
    with frames_as_channels() if dims == 2 else nullcontext():
        exported = torch.export.export(fused, (x,), strict=False)
    for node in exported.graph.nodes:
        steps[getattr(node.target, "__name__", "").split(".")[0]] += 1
    other = 5 - dims
    assert steps[f"avg_pool{dims}d"] > 5 and steps[f"upsample_nearest{dims}d"] > 5 and steps["slice"] == 0
    assert steps[f"avg_pool{other}d"] == 0 and steps[f"upsample_nearest{other}d"] == 0
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), fused(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["i3d_tiny", "i3d_nl_r50", "slowfast_4x16_r50", "resnet50_glore", "densenet121"])
def test_strict_export(name: str) -> None:
    check_export(name, strict=True)


def test_compiled_without_a_graph_break() -> None:
    """Odd sizes, which pool in another way when compiled."""
    spec = with_octave(NETWORKS["i3d_tiny"](8), 0.25)
    fused, x = fuse(network(spec)), torch.randn(1, 3, 5, 33, 35)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), fused(x), rtol=1e-4, atol=1e-5)
