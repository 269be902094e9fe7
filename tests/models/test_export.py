"""torch.export and torch.compile take every configuration: a strict export is one full graph without a break."""

from pathlib import Path

import pytest
import torch

from octvideo import build
from octvideo.models import SlowFastSpec, Spec, create

from .shallow import cut

ROOT = Path(__file__).parents[2]


def networks() -> dict[str, Spec]:
    """Every configuration's network, at 8 classes."""
    paths = [p for p in sorted((ROOT / "configs").glob("*/*.yaml")) if not p.parent.name.startswith("_")]
    load = lambda path: build.network_spec(build.load_config(path, ["MODEL.NUM_CLASSES", "8"]))  # noqa: E731
    return {f"{path.parent.name}/{path.stem}": load(path) for path in paths}


NETWORKS = networks()


def check_export(spec: Spec) -> None:
    torch.manual_seed(0)
    model = create(spec).eval()
    frames = (16,) if isinstance(spec, SlowFastSpec) else (4,) if spec.dims == 3 else ()
    clip = torch.randn(1, 3, *frames, 32, 32)
    exported = torch.export.export(model, (clip,), strict=True).module()
    with torch.inference_mode():
        torch.testing.assert_close(exported(clip), model(clip), rtol=1e-5, atol=1e-6)


QUICK = [
    *(f"kinetics400/oct_{name}" for name in ("i3d_r50_8x8_a0.2", "i3d_nl_r50_8x8_a0.1", "slowfast_r50_4x16_a0.2")),
    *(f"imagenet/oct_{name}" for name in ("se_resnet152_v1e_a0.125", "densenet121_a0.25", "mobilenet_v2_1.0_a0.375")),
    "imagenet/oct_resnet50_glore_a0.5",
]


@pytest.mark.parametrize("name", QUICK)
def test_octave_structures_export_strictly_and_give_the_same_numbers(name: str) -> None:
    check_export(cut(NETWORKS[name], keep=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", {spec: name for name, spec in NETWORKS.items()}.values())
def test_every_configuration_exports_strictly_at_full_depth(name: str) -> None:
    check_export(NETWORKS[name])


def test_compiled_training_step_has_no_graph_break() -> None:
    torch.manual_seed(0)
    model = create(NETWORKS["motion/oct_i3d_tiny"]).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    clip = torch.randn(2, 3, 4, 32, 32)
    compiled(clip).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("crop", [160, 256, 320])
def test_other_crops_and_frame_counts_on_one_network(crop: int) -> None:
    model = create(NETWORKS["motion/oct_i3d_tiny"]).eval()
    with torch.inference_mode():
        for frames in (2, 5, 16):
            assert model(torch.randn(1, 3, frames, crop, crop)).shape == (1, 8)
