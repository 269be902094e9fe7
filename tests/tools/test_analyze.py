import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import motion
from octvideo import build
from octvideo.analysis.contact import LINE, MARGIN
from octvideo.analysis.paper import IMAGES, PRINTED, allowed_difference
from tools import analyze

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/golden/complexity.json").read_text())
ACCEPT = "accept the change with: python tools/analyze.py golden --write tests/golden/complexity.json"


def say(*arguments: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert analyze.main(arguments) == 0
    return out.getvalue()


@pytest.mark.parametrize("name", analyze.configs())
def test_counts_of_every_config(name: str) -> None:
    cost = json.loads(json.dumps(analyze.cost_of(name).as_dict()))
    assert cost == GOLDEN.get(name), f"{name} counts otherwise than in tests/golden/complexity.json; {ACCEPT}"
    if name in PRINTED:
        assert cost["macs"]["conv_fc"] / 1e9 == pytest.approx(PRINTED[name].gmacs, abs=allowed_difference(name))
    row = IMAGES.get(name.removeprefix("imagenet/"))
    if row:
        digits = 0.1 if "152" in name else 1  # the rows of ResNet-152 are known to one digit less
        assert cost["macs"]["conv_fc"] / 1e6 == pytest.approx(row.mmacs, abs=0.00501 / digits)
        assert cost["params"] / 1e6 == pytest.approx(row.params, abs=0.00005001 / digits)


def test_golden_names_no_config_that_is_gone() -> None:
    assert set(GOLDEN) == set(analyze.configs()), ACCEPT
    assert set(PRINTED) | {f"imagenet/{name}" for name in IMAGES} <= set(GOLDEN)


def test_the_zoo_table_is_the_one_in_the_repository() -> None:
    assert say("zoo") == (ROOT / "configs/README.md").read_text(), (
        "run: python tools/analyze.py zoo --write configs/README.md"
    )


def test_complexity_as_json() -> None:
    cost = json.loads(
        say("complexity", "--json", "--cfg", str(ROOT / "configs/kinetics400/oct_i3d_nl_r50_8x8_a0.1.yaml"))
    )
    assert list(cost) == ["params", "macs", "activations", "input"]
    assert cost["input"] == [3, 8, 224, 224]
    assert list(cost["macs"]) == ["conv_fc", "pool", "attention"]
    assert cost["macs"]["conv_fc"] / 1e9 == pytest.approx(28.96, abs=0.01)
    assert cost["params"] == 35401936


def test_complexity_per_layer_and_overrides() -> None:
    cfg = str(ROOT / "configs/motion/oct_i3d_tiny.yaml")
    text = say("complexity", "--per-layer", "--cfg", cfg, "OCTAVE.ALPHA", "0.5")
    assert "stages.res2.0.conv1" in text and "OctConv3d" in text and "parameters" in text
    layers = json.loads(say("complexity", "--json", "--per-layer", "--cfg", cfg))["layers"]
    total = json.loads(say("complexity", "--json", "--cfg", cfg))["macs"]["conv_fc"]
    assert sum(sum(layer["macs"]) for layer in layers) == total


def test_a_typo_is_one_message() -> None:
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert analyze.main(["complexity", "--cfg", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in err.getvalue()


def test_a_picture_of_what_the_network_is_shown(tmp_path: Path) -> None:
    motion.make(tmp_path / "motion", motion.Settings(train=1, val=1), workers=1)
    lists = ["DATA.TRAIN_LIST", f"{tmp_path}/motion/train.txt", "DATA.VAL_LIST", f"{tmp_path}/motion/val.txt"]
    lists += ["DATA.PREFIX", f"{tmp_path}/motion", "TEST.CLIPS", "2"]
    cfg_path = str(ROOT / "configs/motion/oct_i3d_tiny.yaml")
    out = str(tmp_path / "sheet.png")
    said = say("clip", "--cfg", cfg_path, "--index", "5", "--out", out, "--epochs", "2", *lists)
    assert "8 views of 8 x 64 x 64" in said  # 2 draws, 2 clips x 3 crops
    sheet = np.asarray(Image.open(out))
    cfg = build.load_config(cfg_path, lists)
    clip = build.train_samples(cfg, build.video_list(cfg, cfg.DATA.TRAIN_LIST, training=False))[1, 5].clips[0]
    row = 2 * MARGIN + 64 + 2 * LINE  # the second one
    for t in range(8):
        left = MARGIN + t * (64 + MARGIN)
        np.testing.assert_array_equal(sheet[row : row + 64, left : left + 64], clip[:, t].permute(1, 2, 0).numpy())
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert analyze.main(["clip", "--cfg", cfg_path, "--index", "8", *lists]) == 2
    assert "train.txt: --index 8 is outside 0..7" in err.getvalue()
