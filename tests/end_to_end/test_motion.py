"""From the making of the data to a trained network whose answers turn with the direction of time."""

import json
from pathlib import Path

import pytest
import torch

from datasets import motion
from octvideo import build
from octvideo.engine import checkpoint
from octvideo.engine.distributed import World
from tools import run_net

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PAIR = (0, 1)  # left, right: the quickest to learn


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Left and right of a small motion set, 48 scenes to train and 16 to test, each played both ways."""
    folder = tmp_path_factory.mktemp("motion")
    settings = motion.Settings()
    for split, count in (("train", settings.train), ("val", settings.val)):
        for label in PAIR:
            (folder / split / motion.CLASSES[label]).mkdir(parents=True)
        pairs = [motion.Pair(split, index, PAIR[0]) for index in range(count)]
        for _ in motion.work(pairs, folder, settings, workers=2):
            pass
        lines = [f"{file} {label}\n" for pair in pairs for file, label in zip(pair.files(), PAIR, strict=True)]
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def overrides(data: Path, out: Path, *more: str) -> list[str]:
    lists = ["DATA.TRAIN_LIST", f"{data}/train.txt", "DATA.VAL_LIST", f"{data}/val.txt", "DATA.PREFIX", str(data)]
    run = [
        "OUTPUT_DIR",
        str(out),
        "MODEL.NUM_CLASSES",
        "2",
        "DEVICE",
        "cpu",
        "TRAIN.EPOCHS",
        "12",
        "TRAIN.VAL_PERIOD",
        "0",
    ]
    return [*lists, *run, "TEST.CLIPS", "3", "TEST.CROPS", "1", *more]


def trained(name: str, data: Path, out: Path, *more: str) -> tuple[torch.nn.Module, float, torch.Tensor]:
    """The tested network, its top-1, and its centred clips, one per test video: [M, 3, T, H, W]."""
    cfg_path, changes = ROOT / f"configs/motion/{name}.yaml", overrides(data, out, *more)
    assert run_net.main(["--cfg", str(cfg_path), *changes]) == 0
    cfg = build.load_config(cfg_path, changes)
    model = build.network(cfg).eval()
    path, state = checkpoint.latest(out)
    checkpoint.load_weights(model, state["model"], path)
    videos = build.video_list(cfg, cfg.DATA.VAL_LIST, training=False)
    loader = build.eval_loader(cfg, videos, World(), CPU, num_clips=1, num_crops=1)
    clips = torch.cat([build.prepare_clips(cfg)(batch.clips[:, 0]) for batch in loader])
    return model, json.loads((out / "test.json").read_text())["top1"], clips


def test_played_backwards_the_answers_become_the_partners(data: Path, tmp_path: Path) -> None:
    model, top1, clips = trained("oct_i3d_tiny", data, tmp_path)
    assert top1 >= 90
    with torch.inference_mode():
        forwards, backwards = model(clips).argmax(1), model(clips.flip(2)).argmax(1)
    partners = torch.tensor([motion.partner(label) for label in forwards.tolist()])
    assert (backwards == partners).float().mean() >= 0.9


def test_a_network_blind_to_order_answers_alike_and_passes_no_more_than_half(data: Path, tmp_path: Path) -> None:
    model, top1, clips = trained("c2d_tiny", data, tmp_path, "TRAIN.EPOCHS", "3")
    assert top1 <= 55
    with torch.inference_mode():
        forwards, backwards = model(clips), model(clips.flip(2))
    torch.testing.assert_close(forwards, backwards, rtol=1e-3, atol=1e-4)
