"""datasets/stills.py: where the sprite is and how large, measured in pixels."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import motion, stills

SCRIPT = Path(__file__).parents[2] / "datasets" / "stills.py"
LABELS = range(8)
SMALL = stills.Settings(train=2, val=1, size=32)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small data set, made in this process."""
    out = tmp_path_factory.mktemp("stills") / "small"
    assert stills.make(out, SMALL, workers=1) == 24
    return out


# ---- what they show


@pytest.fixture
def on_black(monkeypatch):
    """The scenes without their backgrounds, so that every lit pixel is sprite."""

    def draw(seed, draw_scene=motion.draw_scene):
        scene = draw_scene(seed)
        solid = scene.sprite.copy()
        solid[..., :3] = 255
        return replace(scene, background=np.zeros_like(scene.background), sprite=solid)

    monkeypatch.setattr(motion, "draw_scene", draw)


@pytest.mark.parametrize("label", LABELS)
def test_the_sprite_is_where_and_as_large_as_the_name_says(label, on_black):
    down, across, size = stills.CLASSES[label].split("_")
    reaches, centres = [], []
    for seed in range(40):
        rows, columns = np.nonzero(stills.render(label, seed, 160).max(axis=-1) > 30)
        assert (rows < 80).all() if down == "top" else (rows >= 80).all()
        assert (columns < 80).all() if across == "left" else (columns >= 80).all()
        centre = np.array((rows.mean(), columns.mean()))
        reaches.append(np.hypot(rows - centre[0], columns - centre[1]).max() / 160)
        centres.append(centre)
    assert (0.06 < min(reaches) and max(reaches) < 0.15) if size == "small" else min(reaches) > 0.16
    assert np.ptp(centres, axis=0).min() > 5  # pixels: places vary


def test_scenes_are_shared_by_the_classes_and_differ_otherwise():
    """The corner of the frame that no sprite of the class reaches is the same background in all of them."""
    frames = [stills.render(label, 3, 64) for label in LABELS]
    assert len({frame.tobytes() for frame in frames}) == 8
    tops = [f[:32] for f, name in zip(frames, stills.CLASSES, strict=True) if name.startswith("bottom")]
    assert all(np.array_equal(top, tops[0]) for top in tops)
    assert not np.array_equal(stills.render(0, 4, 64), frames[0])


def test_sprites_stand_out_from_the_background():
    for seed in range(20):
        for label in (0, 1):
            frame = stills.render(label, seed).astype(int)
            assert np.abs(frame - stills.render(6, seed)).max() > 60


# ---- files


def test_folders_and_list_agree(small):
    """A reader of the folders counts the classes as val.txt and labels.txt do."""
    names = (small / "labels.txt").read_text().split()
    assert names == sorted(names) == list(stills.CLASSES) == sorted(path.name for path in (small / "train").iterdir())
    rows = [line.split(" ") for line in (small / "val.txt").read_text().splitlines()]
    assert sorted(path for path, _ in rows) == sorted(str(p.relative_to(small)) for p in small.glob("val/*/*.png"))
    assert all(path.split("/")[1] == names[int(label)] for path, label in rows)
    counts = Counter(path.parent.name for path in small.glob("train/*/*.png"))
    assert counts == dict.fromkeys(names, 2)
    assert {path.name for path in small.iterdir()} == {"train", "val", "val.txt", "labels.txt", "stills.json"}


def test_files_hold_what_was_rendered(small):
    for label, name in enumerate(stills.CLASSES):
        with Image.open(small / f"train/{name}/{name}_0001.png") as image:
            assert image.mode == "RGB"
            assert np.array_equal(np.array(image), stills.render(label, (0, 0, 1), 32))


def test_train_and_val_share_no_scene(small):
    pictures = [np.array(Image.open(path)).astype(int) for path in sorted(small.glob("*/top_left_small/*.png"))]
    assert len(pictures) == 3
    assert min(np.abs(pictures[a] - pictures[b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))) > 8


def test_command_with_two_workers_writes_the_same_bytes(small, tmp_path):
    arguments = ["--out", tmp_path / "two", "--train", "2", "--val", "1", "--size", "32", "--workers", "2"]
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "24 stills written" in done.stdout
    assert "24/24" in done.stderr, "no progress bar"
    assert files(tmp_path / "two") == files(small)


def test_another_seed_draws_other_stills(small, tmp_path):
    stills.make(tmp_path / "other", replace(SMALL, seed=1), workers=1)
    mine, other = files(small), files(tmp_path / "other")
    assert mine.keys() == other.keys()
    assert [name for name in mine if mine[name] == other[name]] == ["labels.txt", "val.txt"]


def test_a_run_that_failed_half_way_goes_on(small, tmp_path, monkeypatch):
    save, count = Image.Image.save, 0

    def fail_in_the_sixth(self, path, *rest):
        nonlocal count
        count += 1
        if count == 6:
            path.write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        save(self, path, *rest)

    monkeypatch.setattr(Image.Image, "save", fail_in_the_sixth)
    with pytest.raises(OSError, match="No space left"):
        stills.make(tmp_path / "out", SMALL, workers=1)
    assert not list((tmp_path / "out").glob("*.txt"))
    monkeypatch.setattr(Image.Image, "save", save)
    assert stills.make(tmp_path / "out", SMALL, workers=1) == 19
    assert files(tmp_path / "out") == files(small)
    assert stills.make(tmp_path / "out", SMALL, workers=1) == 0


# ---- the user's errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "8", "--train", "0"], "train is 0: give 1 or more; size is 8: give 16 or more"),
        (["--val", "-3"], "val is -3: give 1 or more"),
        (["--seed", "-1"], "seed is -1: give 0 or more"),
        (["--workers", "0"], "workers is 0: give 1 or more"),
    ],
)
def test_bad_arguments_exit_with_status_2_and_write_nothing(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        stills.main(["--out", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_settings_in_the_same_folder_are_named(small):
    message = "size 32, not 64: give the same settings, another --out, or remove the folder"
    with pytest.raises(motion.SettingsError, match=message):
        stills.make(small, replace(SMALL, size=64), workers=1)


def test_a_folder_of_another_tool_is_left_alone(tmp_path):
    (tmp_path / "val.txt").write_text("mine 0\n")
    message = "holds val.txt but no stills.json, so another tool made it: give another --out"
    with pytest.raises(motion.SettingsError, match=message):
        stills.make(tmp_path, SMALL, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["val.txt"]


def test_a_place_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        stills.main(["--out", str(tmp_path / "file" / "out")])
    assert f"cannot write the data set to {tmp_path / 'file' / 'out'}" in capsys.readouterr().err
