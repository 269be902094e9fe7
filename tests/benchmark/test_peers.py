"""pytorchvideo's network in a table is the config's network: the same logits."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from octvideo import build
from octvideo.benchmark import peers
from octvideo.benchmark.speed import BenchmarkError

from .filled import fill_norms

KINETICS = Path(__file__).parents[2] / "configs/kinetics400"
MISSING = [name for name in ("torchvision", "pytorchvideo") if importlib.util.find_spec(name) is None]
needs_pytorchvideo = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING}: pip install --no-deps -r tests/peers.txt")


@needs_pytorchvideo
@pytest.mark.parametrize(
    "config,frames",
    [
        ("c2d_r50_8x8_padded", 2),
        ("i3d_r50_8x8_padded", 4),
        ("slow_r50_8x8", 2),
        ("slowfast_r50_4x16", 16),
        ("slowfast_r50_8x8", 4),
    ],
)
def test_logits_agree(config: str, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{KINETICS}/{config}.yaml"
    size = ["DATA.NUM_FRAMES", str(frames), "DATA.TRAIN_CROP", "64", "MODEL.NUM_CLASSES", "5"]
    cfg = build.load_config(path, size)
    fill_norms(monkeypatch)
    ours, theirs = build.network(cfg), peers.network(cfg)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    strides = [step for m in theirs.modules() if isinstance(m, nn.Conv3d) for step in m.stride]
    assert {type(step) for step in strides} == {int}  # NumPy's break torch.compile's graphs
    clip = torch.randn(2, 3, frames, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = ours.eval()(clip), theirs.eval()(clip)
    assert got.shape == expected.shape
    assert expected.std() > 1e-3
    assert ((got - expected).abs().max() / expected.abs().max()).item() < 1e-5


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["MODEL.NAME", "i3d_nl_r50"], "pytorchvideo has no i3d_nl_r50 to measure against; it has c2d_r50, "),
        (["MODEL.POOL_PADDING", "0"], "pads the stem's max-pool .* give MODEL.POOL_PADDING 1"),
    ],
)
def test_refusals(overrides: list[str], message: str) -> None:
    cfg = build.load_config(KINETICS / "i3d_r50_8x8_padded.yaml", overrides)
    with pytest.raises(BenchmarkError, match=message):
        peers.network(cfg)


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cfg = build.load_config(KINETICS / "i3d_r50_8x8_padded.yaml")
    with pytest.raises(
        BenchmarkError, match="needs pytorchvideo and torchvision: pip install --no-deps -r tests/peers"
    ):
        peers.network(cfg)
    assert peers.readers() == {}
