"""Image networks through the main job: folders and lists, both input styles, mixed targets, and corrupt files."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from octvideo import build
from octvideo.data.dataset import collate
from octvideo.data.images import ImageEvalDataset
from tools import run_net

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs/stills/oct_resnet_tiny.yaml")
SMALL = [
    "DEVICE",
    "cpu",
    "NUM_THREADS",
    "1",
    "DATA.NUM_WORKERS",
    "0",
    "MODEL.NUM_CLASSES",
    "2",
    "TRAIN.BATCH_SIZE",
    "4",
]
SMALL += ["DATA.TRAIN_CROP", "32", "DATA.TEST_SHORT_SIDE", "36", "DATA.TEST_CROP", "32", "TRAIN.VAL_PERIOD", "1"]
SMALL += ["TRAIN.EPOCHS", "2", "SOLVER.WARMUP_EPOCHS", "1", "TRAIN.LOG_PERIOD", "1"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Bright and dark noise: eight images in class folders to train, five in a list to test."""
    folder, rng, lines = tmp_path / "images", np.random.default_rng(0), []
    for split, count in (("train", 8), ("val", 5)):
        for index in range(count):
            label = index % 2
            place = folder / split / ("bright" if label else "dark") if split == "train" else folder / split
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 100, (48, 40 + index, 3), dtype=np.uint8) + np.uint8(150 * label)
            Image.fromarray(pixels).save(place / f"ILSVRC2012_{index:08d}.JPEG", quality=95)
            if split == "val":
                lines.append(f"ILSVRC2012_{index:08d}.JPEG {label}\n")
    (folder / "val.txt").write_text("".join(lines))
    return folder


def run(images: Path, out: Path, *more: str, cfg: str = TINY, status: int = 0) -> tuple[str, str]:
    lists = ["DATA.TRAIN_LIST", f"{images}/train", "DATA.VAL_LIST", f"{images}/val.txt", "DATA.PREFIX", f"{images}/val"]
    said, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        got = run_net.main(["--cfg", cfg, "OUTPUT_DIR", str(out), *lists, *SMALL, *more])
    assert got == status, said.getvalue() + wrong.getvalue()
    return said.getvalue(), wrong.getvalue()


def result(out: Path) -> dict:
    return json.loads((out / "test.json").read_text())


def events(out: Path, kind: str) -> list[dict]:
    return [e for e in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if e["event"] == kind]


def test_the_paper_s_network_trains_and_tests_from_folders_and_the_val_list(images: Path, tmp_path: Path) -> None:
    cfg = str(ROOT / "configs/imagenet/oct_resnet50_a0.125.yaml")
    said, _ = run(images, tmp_path / "run", cfg=cfg)
    assert "8 images in batches of 4 images" in said and "32 x 32: 2 steps an epoch, 4 in total" in said
    assert "octave alpha 0.125, pool (2, 2)" in said and "5 of 5 images scored with 1 view(s) each" in said
    assert result(tmp_path / "run")["videos_scored"] == 5
    assert result(tmp_path / "run")["input"] == [3, 32, 32]


@pytest.mark.parametrize(
    "style,interpolation,white,grey",
    [
        # (255 - mean) / std and (124 - mean) / std per channel, from the grey levels that the authors give
        (
            "symbol",
            Image.Resampling.BICUBIC,
            [131 * 0.0167, 138 * 0.0167, 151 * 0.0167],
            [0.0, 7 * 0.0167, 20 * 0.0167],
        ),
        (
            "gluon",
            Image.Resampling.BILINEAR,
            [(255 - 123.68) / 58.393, (255 - 116.779) / 57.12, (255 - 103.939) / 57.375],
            [(124 - 123.68) / 58.393, (124 - 116.779) / 57.12, (124 - 103.939) / 57.375],
        ),
    ],
)
def test_both_input_styles(
    style: str, interpolation: Image.Resampling, white: list[float], grey: list[float], images: Path
) -> None:
    name = {"symbol": "resnet50", "gluon": "resnet50_v1b"}[style]
    path = images / "val" / "ILSVRC2012_00000000.JPEG"
    half = np.full((300, 400, 3), 124, np.uint8)
    half[:, 200:] = 255
    Image.fromarray(half).save(path, "PNG")
    lists = ["DATA.VAL_LIST", f"{images}/val.txt", "DATA.PREFIX", f"{images}/val", "MODEL.NUM_CLASSES", "2"]
    cfg = build.load_config(ROOT / f"configs/imagenet/{name}.yaml", lists)
    views = build.eval_samples(cfg, build.test_list(cfg), 1, 1)
    assert isinstance(views, ImageEvalDataset)
    clips = views[0].clips
    with Image.open(path) as image:
        scaled = np.asarray(image.resize((341, 256), interpolation))
    np.testing.assert_array_equal(clips[0].permute(1, 2, 0).numpy(), scaled[16:240, 59:283])
    x = build.prepare_clips(cfg)(collate([views[0]]).clips.flatten(0, 1))
    assert x.shape == (1, 3, 224, 224)
    assert x[0, :, 100, 10].tolist() == pytest.approx(grey, abs=2e-4)
    assert x[0, :, 100, 210].tolist() == pytest.approx(white, abs=2e-4)


def test_mixup_and_label_smoothing_reach_the_loss(images: Path, tmp_path: Path) -> None:
    """At a rate of nearly 0 the network stays as it is, so the losses of step 1 show the targets alone."""
    still = ["SOLVER.BASE_LR", "1e-9", "SOLVER.WARMUP_LR", "1e-9", "TEST.ENABLE", "False", "TRAIN.EPOCHS", "2"]
    changes = {"plain": [], "smooth": ["TRAIN.LABEL_SMOOTHING", "0.4"], "mixed": ["TRAIN.MIXUP", "8.0"]}
    first = {}
    for title, more in changes.items():
        run(images, tmp_path / title, *still, *more)
        first[title] = [event["loss"] for event in events(tmp_path / title, "train")]
    run(images, tmp_path / "again", *still, *changes["mixed"])
    assert [event["loss"] for event in events(tmp_path / "again", "train")] == first["mixed"]
    assert len({losses[0] for losses in first.values()}) == 3


def test_a_corrupt_image_stops_training_and_counts_as_wrong_in_a_test(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "run")
    (images / "val" / "ILSVRC2012_00000001.JPEG").write_bytes(b"\xff\xd8 not an image")
    said, _ = run(images, tmp_path / "run", "TRAIN.ENABLE", "False")
    assert "4 of 5 images scored" in said
    assert "counted as wrong" in said and "ILSVRC2012_00000001.JPEG: is no JPEG" in said
    assert result(tmp_path / "run")["failed"][0]["path"].endswith("val/ILSVRC2012_00000001.JPEG")
    assert result(tmp_path / "run")["top1"] <= 80.0
    (images / "train" / "dark" / "ILSVRC2012_00000002.JPEG").write_bytes(b"")
    _, wrong = run(images, tmp_path / "other", status=1)
    assert "ILSVRC2012_00000002.JPEG" in wrong and "Traceback" not in wrong


@pytest.mark.parametrize(
    "change,message",
    [
        (["TEST.CROPS", "3"], "TEST.CROPS is 3; allowed: 1 for images, which resnet_tiny takes"),
        (["OCTAVE.POOL", "[2, 2, 2]"], "OCTAVE.POOL is [2, 2, 2]; allowed: [1, 2, 2] for images"),
        (["DATA.TRAIN_AREA", "[0.5, 1.5]"], "DATA.TRAIN_AREA is [0.5, 1.5]; allowed: [lowest, highest], above 0 to 1"),
        (["DATA.INTERPOLATION", "cubic"], "did you mean 'bicubic'?"),
        (["TRAIN.LABEL_SMOOTHING", "1"], "TRAIN.LABEL_SMOOTHING is 1.0; allowed: 0 to below 1"),
        (["MODEL.NUM_CLASSES", "3"], "2 class folders, but MODEL.NUM_CLASSES is 3"),
        (["MODEL.NAME", "mobilenet_v1_1.0", "MODEL.POOL_PADDING", "0"], "stem has no max-pool; leave it at 1"),
        (["MODEL.NAME", "resnext50_32x4d", "OCTAVE.ALPHA", "0.125"], "32 groups do not divide the split"),
    ],
)
def test_mistakes_are_one_message(images: Path, tmp_path: Path, change: list[str], message: str) -> None:
    _, wrong = run(images, tmp_path / "run", *change, status=2)
    assert message in wrong and "Traceback" not in wrong


def test_channels_last_is_that_of_images(images: Path) -> None:
    cfg = build.load_config(TINY, ["MODEL.CHANNELS_LAST", "True"])
    x = build.prepare_clips(cfg)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
