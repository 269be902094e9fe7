"""Images, then inflation, then videos: train a small 2D Oct-ResNet, inflate it, fine-tune it on motion."""

import json
import math
from pathlib import Path

import pytest
import torch

from datasets import motion, stills
from octvideo import build
from octvideo.engine import checkpoint
from octvideo.engine.distributed import World
from tools import inflate, run_net

ROOT = Path(__file__).parents[2]
IMAGES = str(ROOT / "configs/stills/oct_resnet_tiny.yaml")
CPU = torch.device("cpu")


def on_images(data: Path, out: Path) -> list[str]:
    lists = ["DATA.TRAIN_LIST", f"{data}/train", "DATA.VAL_LIST", f"{data}/val.txt", "DATA.PREFIX", str(data)]
    return [*lists, "OUTPUT_DIR", str(out), "DEVICE", "cpu", "TRAIN.VAL_PERIOD", "0"]


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The stills and the folder of a network trained on them."""
    data, out = tmp_path_factory.mktemp("stills") / "data", tmp_path_factory.mktemp("run")
    stills.make(data, workers=1)
    assert run_net.main(["--cfg", IMAGES, *on_images(data, out)]) == 0
    return data, out


@pytest.fixture(scope="module")
def motions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("motion") / "data"
    motion.make(data, motion.Settings(train=24, val=2))
    return data


def test_the_image_network_learns(image_run: tuple[Path, Path]) -> None:
    result = json.loads((image_run[1] / "test.json").read_text())
    assert result["top1"] >= 90 and result["videos_listed"] == 128 and result["input"] == [3, 64, 64]


def inflated(image_run: tuple[Path, Path], name: str, out: Path) -> Path:
    newest, _ = checkpoint.latest(image_run[1])
    cfg = str(ROOT / f"configs/motion/{name}.yaml")
    assert inflate.main(["--from", str(newest), "--cfg", cfg, "--out", str(out)]) == 0
    return out


def test_on_still_clips_the_inflated_network_answers_as_the_image_network(
    image_run: tuple[Path, Path], tmp_path: Path
) -> None:
    data, out = image_run
    cfg = build.load_config(IMAGES, on_images(data, out))
    image_net = build.network(cfg).eval()
    image_net.load_state_dict(checkpoint.latest(out)[1]["model"])
    images = build.eval_loader(cfg, build.test_list(cfg), World(), CPU, num_clips=1, num_crops=1)
    x = torch.cat([build.prepare_clips(cfg)(batch.clips.flatten(0, 1)) for batch in images])
    with torch.no_grad():
        expected = image_net(x)
    for name, alike in (("c2d_tiny", 1.0), ("i3d_tiny", 0.9)):
        video_cfg = build.load_config(ROOT / f"configs/motion/{name}.yaml", ["OCTAVE.ALPHA", "0.25"])
        net = build.network(video_cfg).eval()
        weights = checkpoint.load(inflated(image_run, name, tmp_path / f"{name}.pt"))["model"]
        net.load_state_dict(weights)
        with torch.no_grad():
            logits = net(x[:, :, None].expand(-1, -1, 16, -1, -1))
        # C2D has no kernel over time, so nothing but rounding differs; I3D sees zeros before and after the clip
        assert (logits.argmax(1) == expected.argmax(1)).float().mean() >= alike
        if name == "c2d_tiny":
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def losses(out: Path) -> list[float]:
    events = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [event["loss"] for event in events if event["event"] == "train"]


def test_fine_tuning_beside_training_from_scratch(
    image_run: tuple[Path, Path], motions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = inflated(image_run, "oct_i3d_tiny", tmp_path / "start.pt")
    capsys.readouterr()
    lists = [
        "DATA.TRAIN_LIST",
        f"{motions}/train.txt",
        "DATA.VAL_LIST",
        f"{motions}/val.txt",
        "DATA.PREFIX",
        str(motions),
    ]
    short = [
        "DEVICE",
        "cpu",
        "TRAIN.EPOCHS",
        "6",
        "TRAIN.VAL_PERIOD",
        "0",
        "TRAIN.LOG_PERIOD",
        "1",
        "TEST.ENABLE",
        "False",
    ]
    runs = {"scratch": [], "fine-tuned": ["TRAIN.INIT", str(start), "TRAIN.NEW_HEAD", "True"]}
    curves = {}
    for title, more in runs.items():
        out = tmp_path / title
        cfg = str(ROOT / "configs/motion/oct_i3d_tiny.yaml")
        assert run_net.main(["--cfg", cfg, *lists, *short, "OUTPUT_DIR", str(out), *more]) == 0
        curves[title] = losses(out)
    capsys.readouterr()
    for title, curve in curves.items():
        last = sum(curve[-6:]) / 6
        with capsys.disabled():
            print(f"\n  {title}: loss {curve[0]:.3f} at step 0, {last:.3f} after {len(curve)} steps", end="")
        assert curve[0] == pytest.approx(math.log(8), abs=0.4), title  # a new classifier knows nothing
        assert last < curve[0] - 0.4, title
    assert curves["scratch"][0] != curves["fine-tuned"][0]
