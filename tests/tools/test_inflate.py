"""Files of every kind through the command line: what is kept, what is refused, and that the result starts a run."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from octvideo.engine import checkpoint
from octvideo.models import NETWORKS, create, with_octave
from octvideo.models.zoo import resnet2d
from octvideo.weights import names
from tools import inflate

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs/motion/oct_i3d_tiny.yaml")
KINETICS = str(ROOT / "configs/kinetics400/oct_i3d_r50_8x8_a0.1_in1k.yaml")


def run(source: Path, out: Path, *more: str, cfg: str = TINY, status: int = 0) -> tuple[str, str]:
    said, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        got = inflate.main(["--from", str(source), "--cfg", cfg, "--out", str(out), *more])
    assert got == status, said.getvalue() + wrong.getvalue()
    return said.getvalue(), wrong.getvalue()


def image_weights(num_classes: int, alpha: float = 0.25) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return create(with_octave(NETWORKS["resnet_tiny"](num_classes), alpha)).state_dict()


def test_a_checkpoint_of_ours_with_the_head_kept(tmp_path: Path) -> None:
    weights = image_weights(8)
    checkpoint.save_weights(tmp_path / "in.pt", weights)
    said, _ = run(tmp_path / "in.pt", tmp_path / "sub" / "out.pt")
    assert re.search(r"inflated \(mean\) +\| +17 \| +589,328", said)
    assert "598,264 of 598,264" in said and "left out" not in said
    state = checkpoint.load(tmp_path / "sub" / "out.pt")
    kernel = state["model"]["stages.res3.0.conv1.weight"]
    assert kernel.shape[2] == 3
    torch.testing.assert_close(kernel.sum(2), weights["stages.res3.0.conv1.weight"])
    assert torch.equal(state["model"]["head.fc.weight"], weights["head.fc.weight"])
    assert state["source"].endswith("in.pt") and "i3d_tiny" in state["config"]


def test_only_an_earlier_file_of_this_tool_is_replaced(tmp_path: Path) -> None:
    source, out = tmp_path / "in.pt", tmp_path / "out.pt"
    checkpoint.save_weights(source, image_weights(8))
    run(source, out)
    said, _ = run(source, out, "--how", "centre")
    assert f"replaced {out}\n" in said
    trained = checkpoint.save(tmp_path, 7, {"model": {}}, keep=1)
    text = tmp_path / "list.txt"
    text.write_text("a.mp4 0\n")
    for other in (source, trained, text, tmp_path):
        before = other.read_bytes() if other.is_file() else None
        _, wrong = run(source, other, status=2)
        assert f"--out {other}" in wrong and "give another --out" in wrong
        assert before is None or other.read_bytes() == before


def test_another_number_of_classes_is_an_error_unless_a_new_head_is_asked_for(tmp_path: Path) -> None:
    checkpoint.save_weights(tmp_path / "in.pt", image_weights(10))
    _, wrong = run(tmp_path / "in.pt", tmp_path / "out.pt", status=1)
    assert "does not fit i3d_tiny; --new-head leaves the classifier out" in wrong
    assert "head.fc.weight: (10, 512) in the file, (8, 512) in ours" in wrong
    assert not (tmp_path / "out.pt").exists()
    said, _ = run(tmp_path / "in.pt", tmp_path / "out.pt", "--new-head")
    assert re.search(r"left out: the classifier +\| +2 \| +4,104", said)
    assert not [name for name in checkpoint.load(tmp_path / "out.pt")["model"] if name.startswith("head.")]


def test_the_configuration_s_own_names_of_torchvision(tmp_path: Path) -> None:
    """A ResNet-50 under torchvision's names, saved as torchvision saves it, to a Kinetics network of 400 classes."""
    torch.manual_seed(0)
    ours = create(resnet2d(1000, blocks=(3, 4, 6, 3))).state_dict()
    torch.save(names.from_octvideo(ours, "torchvision"), tmp_path / "resnet50.anything")
    said, _ = run(tmp_path / "resnet50.anything", tmp_path / "out.pt", cfg=KINETICS)
    assert "left out: the classifier" in said and "initialized" not in said
    model = checkpoint.load(tmp_path / "out.pt")["model"]
    torch.testing.assert_close(model["stem.conv.weight"].sum(2), ours["stem.conv.weight"])
    _, wrong = run(
        tmp_path / "resnet50.anything", tmp_path / "no.pt", "TRAIN.NEW_HEAD", "False", cfg=KINETICS, status=1
    )
    assert "--new-head leaves the classifier out" in wrong


def test_new_non_local_blocks_are_initialized_and_said(tmp_path: Path) -> None:
    checkpoint.save_weights(tmp_path / "in.pt", create(resnet2d(1000, blocks=(3, 4, 6, 3))).state_dict())
    cfg = str(ROOT / "configs/kinetics400/oct_i3d_nl_r50_8x8_a0.1_in1k.yaml")
    said, _ = run(tmp_path / "in.pt", tmp_path / "out.pt", cfg=cfg)
    assert re.search(r"initialized +\| +60 \| +7,358,464", said)
    model = checkpoint.load(tmp_path / "out.pt")["model"]
    assert model["stages.res4.nonlocal3.bn.weight"].abs().sum() == 0  # the identity


def test_a_video_file_is_copied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = create(NETWORKS["i3d_tiny"](8)).state_dict()
    torch.save({"model_state": names.from_octvideo(ours, "pyslowfast"), "epoch": 3}, tmp_path / "in.pyth")
    said, _ = run(tmp_path / "in.pyth", tmp_path / "out.pt")
    assert "inflated" not in said and "598,264 of 598,264" in said
    model = checkpoint.load(tmp_path / "out.pt")["model"]
    assert all(torch.equal(model[name], value) for name, value in ours.items())
    _, wrong = run(
        tmp_path / "in.pyth", tmp_path / "no.pt", cfg=str(ROOT / "configs/stills/resnet_tiny.yaml"), status=1
    )
    assert "weights of a video network, but resnet_tiny takes images" in wrong


def test_another_network_s_weights_are_refused_with_the_table(tmp_path: Path) -> None:
    """Pre-activation norms stand before their convolutions: nothing of this may be taken for post-activation ones."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in create(NETWORKS["resnet50"](1000)).state_dict().items()}
    checkpoint.save_weights(tmp_path / "in.pt", {name: torch.zeros(shape) for name, shape in shapes.items()})
    _, wrong = run(tmp_path / "in.pt", tmp_path / "out.pt", cfg=KINETICS, status=1)
    assert "does not fit i3d_r50; name a configuration of the network that it is of" in wrong
    assert "unexpected  tail_bn.weight" in wrong and "entries" in wrong
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "in.pt: no such file"),
        (b"", "in.pt: no weights; it is empty"),
        (b"<!DOCTYPE html>", "begins with b'<!DOCTYPE html>'"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "in.pt").write_bytes(content)
    _, wrong = run(tmp_path / "in.pt", tmp_path / "out.pt", status=1)
    assert message in wrong and "Traceback" not in wrong


def test_a_typo_in_the_configuration(tmp_path: Path) -> None:
    _, wrong = run(tmp_path / "in.pt", tmp_path / "out.pt", cfg="nowhere.yaml", status=2)
    assert "no such file" in wrong


ORACLE = ROOT.parent / "shared/data/mxnet"


@pytest.mark.skipif(not ORACLE.exists(), reason=f"no oracle at {ORACLE}")
def test_the_oracle_s_names_are_not_a_video_network_s(tmp_path: Path) -> None:
    _, wrong = run(ORACLE / "octresnet50_a0.125_w0.25-0000.params", tmp_path / "out.pt", cfg=KINETICS, status=1)
    assert "does not fit i3d_r50" in wrong and "tail_bn_gamma" in wrong
