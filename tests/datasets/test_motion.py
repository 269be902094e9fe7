"""datasets/motion.py: what the clips show is measured in pixels, not read from the renderer's own parameters."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "datasets" / "motion.py"
SPEC = importlib.util.spec_from_file_location("motion", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
motion = importlib.util.module_from_spec(SPEC)
sys.modules["motion"] = motion  # dataclasses look their module up there
SPEC.loader.exec_module(motion)

LABELS = range(8)
SMALL = motion.Settings(train=2, val=1, size=32, frames=6)


def decode(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def on_black(scene, start=None):
    """The scene without its background, so that every lit pixel is sprite."""
    black = np.zeros_like(scene.background)
    solid = scene.sprite.copy()
    solid[..., :3] = np.maximum(solid[..., :3], 60)  # no sprite texel may pass for background
    return replace(scene, background=black, sprite=solid, start=scene.start if start is None else np.array(start))


def centroids(clip):
    """Centre of the lit pixels on the torus: [T, 2], across and down, in sides."""
    lit = clip.max(axis=-1) > 30
    turns = np.exp(2j * np.pi * (np.arange(clip.shape[1]) + 0.5) / clip.shape[1])
    means = np.stack((lit.sum(axis=1) @ turns, lit.sum(axis=2) @ turns), axis=-1)
    return np.angle(means) / (2 * np.pi) % 1


def travelled(turns):
    """Total signed way along a circle, from positions in turns: [T, ...] -> [...]."""
    return ((np.diff(turns, axis=0) + 0.5) % 1 - 0.5).sum(axis=0)


def turned(before, after):
    """Degrees by which the picture turns about its middle, clockwise positive, by trying all angles."""
    side = len(before)
    angles = np.deg2rad(np.arange(360))
    radii = np.arange(side // 16, side // 3)[:, None]
    rows = np.rint(side / 2 - 0.5 + radii * np.sin(angles)).astype(int)
    columns = np.rint(side / 2 - 0.5 + radii * np.cos(angles)).astype(int)
    polar = [picture.mean(axis=-1)[rows, columns] for picture in (before, after)]
    scores = [-np.abs(np.roll(polar[0], degrees, axis=1) - polar[1]).mean() for degrees in range(-90, 91)]
    return int(np.argmax(scores)) - 90


# ---------------------------------------------------------------------------------------------- motion


def test_partners_are_the_pairs():
    names = [(motion.CLASSES[label], motion.CLASSES[motion.partner(label)]) for label in (0, 2, 4, 6)]
    assert names == [("left", "right"), ("up", "down"), ("clockwise", "anticlockwise"), ("zoom_in", "zoom_out")]
    assert [motion.partner(motion.partner(label)) for label in LABELS] == list(LABELS)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("frames", [7, 8])
def test_partner_is_the_exact_time_reversal(label, frames):
    clip = motion.render(label, 3, frames, 48)
    assert clip.shape == (frames, 48, 48, 3)
    assert clip.dtype == np.uint8
    assert np.array_equal(motion.render(motion.partner(label), 3, frames, 48), clip[::-1])
    assert not np.array_equal(clip, clip[::-1])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("label", "direction"), [(0, (-1, 0)), (1, (1, 0)), (2, (0, -1)), (3, (0, 1))])
def test_translations_go_where_their_names_say(label, direction, seed):
    clip = motion.film(on_black(motion.draw_scene(seed)), label, 17, 96)
    shift = travelled(centroids(clip))
    along = shift @ direction
    assert 0.18 < along < 0.47
    assert np.abs(shift - along * np.array(direction)).max() < 0.02


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("label", "sign"), [(4, 1), (5, -1)])
def test_rotations_turn_as_their_names_say(label, sign, seed):
    clip = motion.film(on_black(motion.draw_scene(seed), (0.5, 0.5, 0.2, 0.6)), label, 17, 128)
    steps = [sign * turned(before, after) for before, after in zip(clip[:-4:4], clip[4::4], strict=True)]
    assert min(steps) >= 17
    assert max(steps) <= 39
    assert 73 <= sum(steps) <= 152


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("label", "sign"), [(6, 1), (7, -1)])
def test_zooms_grow_as_their_names_say(label, sign, seed):
    clip = motion.film(on_black(motion.draw_scene(seed), (0.5, 0.5, 0.2, 0.45)), label, 17, 128)
    radii = np.sqrt((clip.max(axis=-1) > 30).sum(axis=(1, 2)))
    growth = np.diff(np.log(radii)) * sign
    assert growth.min() > 0
    assert 1.45 < np.exp(growth.sum()) < 2.1
    assert np.ptp((centroids(clip) - 0.5) / radii[:, None] * radii.mean(), axis=0).max() < 0.02


@pytest.mark.parametrize("label", [0, 2, 4, 6])
def test_other_coordinates_stay(label):
    """Only what the class is named after changes."""
    clip = motion.film(on_black(motion.draw_scene(5), (0.5, 0.5, 0.2, 0.45)), label, 9, 128)
    way = np.abs(travelled(centroids(clip))).max()
    area = (clip.max(axis=-1) > 30).sum(axis=(1, 2))
    assert (way > 0.08) == (label < 4)
    assert (area.max() / area.min() > 1.1) == (label == 6)
    if label == 4:
        assert turned(clip[0], clip[-1]) > 25


def test_the_background_drifts_alike_in_all_classes():
    """Without the sprite, the first classes of the pairs are one clip: the background knows no class."""
    scene = motion.draw_scene(11)
    empty = scene.sprite.copy()
    empty[..., 3] = 0
    clips = [motion.film(replace(scene, sprite=empty), label, 9, 32) for label in (0, 2, 4, 6)]
    assert all(np.array_equal(clip, clips[0]) for clip in clips)
    assert not np.array_equal(clips[0][0], clips[0][-1])


@pytest.fixture(scope="module")
def scenes():
    return [motion.draw_scene((1, index)) for index in range(240)]


def test_headings_of_the_drift_are_symmetric(scenes):
    drifts = np.array([scene.drift for scene in scenes])
    assert np.hypot(*drifts.T).max() <= 0.08 / 16
    quadrants = Counter((across > 0, down > 0) for across, down in drifts)
    assert len(quadrants) == 4
    assert min(quadrants.values()) > 40


# ------------------------------------------------------------------------- a single frame tells nothing


def test_the_middle_frame_is_the_same_picture_in_every_class():
    middles = [motion.render(label, 8, 9, 48)[4] for label in LABELS]
    assert all(np.array_equal(middle, middles[0]) for middle in middles)


def distance(sample, other):
    """Kolmogorov-Smirnov: the largest gap between the distributions of two samples."""
    points = np.sort(np.concatenate((sample, other)))
    first, second = (np.searchsorted(np.sort(s), points, "right") / len(s) for s in (sample, other))
    return np.abs(first - second).max()


def critical(count, other):
    """The distance that samples of one distribution exceed once in a thousand times."""
    return 1.95 * np.sqrt(1 / count + 1 / other)


@pytest.mark.parametrize("frame", [0, 5, -1])
def test_states_are_uniform_at_every_frame_of_every_class(frame, scenes):
    uniform = (np.arange(3000) + 0.5) / 3000
    for label in LABELS:
        state = np.array([motion.states(scene, label, 32)[frame] for scene in scenes])
        for coordinate in range(4):
            assert distance(state[:, coordinate], uniform) < critical(240, 3000), (label, coordinate)
    assert distance(state[:, 3] * 0.8, uniform) > critical(240, 3000), "the test would miss a dependence"


def test_the_first_frame_looks_alike_in_every_class(scenes):
    """Place, area, brightness and orientation of the sprite in pixels, each pair showing scenes of its own."""

    def look(frame):
        across, down = centroids(frame[None])[0]
        light = frame.mean(axis=-1)
        centred = np.roll(light, (12 - int(down * 24), 12 - int(across * 24)), (0, 1))
        lopsided = centred[:, :12].sum() - centred[:, 12:].sum(), centred[:12].sum() - centred[12:].sum()
        return across, down, (light > 30).sum(), light.max(), np.arctan2(*lopsided)

    seen = {}
    for label in (0, 2, 4, 6):
        clips = [motion.film(on_black(scene), label, 17, 24) for scene in scenes[label // 2 :: 4]]
        seen[label] = np.array([look(clip[0]) for clip in clips])
        seen[motion.partner(label)] = np.array([look(clip[-1]) for clip in clips])
    for label in LABELS[1:]:
        for feature in range(5):
            gap = distance(seen[label][:, feature], seen[0][:, feature])
            assert gap < critical(60, 60), (motion.CLASSES[label], feature)


# ------------------------------------------------------------------------------------------- random code


def test_render_is_repeatable_varied_and_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = (motion.render(4, (2, seed), 4, 32) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 10
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_sprites_stand_out():
    """The sprite is brighter than what it covers, in every scene by a margin that h264 keeps."""
    for index in range(40):
        scene = motion.draw_scene(index)
        inside = scene.sprite[..., 3] > 0.5
        assert scene.sprite[inside][:, :3].mean() - scene.background.mean() > 35
        assert scene.sprite[inside][:, :3].mean(axis=-1).std() > 12
        assert inside.mean() > 0.25


@pytest.mark.parametrize("label", [-1, 8])
def test_render_rejects_labels_out_of_range(label):
    with pytest.raises(ValueError, match=f"label {label} is none of the 8 classes: give 0 to 7"):
        motion.render(label, 0)


# ------------------------------------------------------------------------------------------------- files


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small data set, made in this process."""
    out = tmp_path_factory.mktemp("motion") / "small"
    assert motion.make(out, SMALL, workers=1) == 24
    return out


def test_videos_decode_to_what_was_rendered(tmp_path):
    clip = motion.render(4, 21)
    motion.write_video(tmp_path / "clip.mp4", clip, 15)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert (stream.width, stream.height, stream.frames, stream.average_rate) == (80, 80, 32, 15)
        assert sum(packet.is_keyframe for packet in container.demux(stream)) >= 2
    decoded = decode(tmp_path / "clip.mp4")
    assert decoded.shape == clip.shape
    errors = np.abs(decoded.astype(int) - clip).mean(axis=(1, 2, 3))
    assert errors.max() < 5
    assert np.abs(decoded[:-4].astype(int) - clip[4:]).mean() > 2 * errors.mean(), "frames could be out of order"
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_lists_are_complete_balanced_and_paired(small):
    assert (small / "labels.txt").read_text().split() == list(motion.CLASSES)
    listed = []
    for split, count in (("train", 2), ("val", 1)):
        rows = [line.split(" ") for line in (small / f"{split}.txt").read_text().splitlines()]
        assert Counter(int(label) for _, label in rows) == dict.fromkeys(LABELS, count)
        for path, label in rows:
            name = motion.CLASSES[int(label)]
            other = motion.CLASSES[motion.partner(int(label))]
            assert path.startswith(f"{split}/{name}/{name}_")
            assert [path.replace(name, other), str(motion.partner(int(label)))] in rows
        listed += [path for path, _ in rows]
    assert sorted(listed) == sorted(str(path.relative_to(small)) for path in small.rglob("*.mp4"))
    assert {path.name for path in small.iterdir()} == {
        "train",
        "val",
        "train.txt",
        "val.txt",
        "labels.txt",
        "motion.json",
    }


def test_files_hold_their_class_and_their_twin_plays_it_backwards(small):
    for split, position in (("train", 0), ("val", 1)):
        clips = np.stack([motion.render(label, (0, position, 1 - position), 6, 32) for label in LABELS]).astype(int)
        names = [f"{name}/{name}_{1 - position:04d}.mp4" for name in motion.CLASSES]
        decoded = np.stack([decode(small / split / name) for name in names])
        for label in LABELS:
            errors = np.abs(clips - decoded[label]).mean(axis=(1, 2, 3, 4))
            assert errors.argmin() == label
            assert errors[label] < 8
            assert np.abs(clips[label] - decoded[motion.partner(label)][::-1]).mean() < 8


def test_train_and_val_share_no_scene(small):
    clips = [decode(path)[3].astype(int) for path in sorted(small.glob("*/left/*.mp4"))]
    assert len(clips) == 3
    assert min(np.abs(clips[a] - clips[b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))) > 10


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )


def test_command_with_two_workers_writes_the_same_bytes(small, tmp_path):
    out = tmp_path / "two"
    done = command("--out", out, "--train", 2, "--val", 1, "--size", 32, "--frames", 6, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "24 clips written" in done.stdout
    assert "24/24" in done.stderr, "no progress bar"
    assert files(out) == files(small)


def test_another_seed_writes_other_clips(small, tmp_path):
    motion.make(tmp_path / "other", replace(SMALL, seed=1), workers=1)
    mine, other = files(small), files(tmp_path / "other")
    assert mine.keys() == other.keys()
    same = [name for name in mine if mine[name] == other[name]]
    assert same == ["labels.txt", "train.txt", "val.txt"]


def test_a_second_run_writes_no_clip(small):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*.mp4")}
    assert motion.make(small, SMALL, workers=1) == 0
    assert before == {path: path.stat().st_mtime_ns for path in small.rglob("*.mp4")}


def test_a_run_that_failed_half_way_goes_on(small, tmp_path, monkeypatch):
    write, count = motion.write_video, 0

    def fail_in_the_sixth(path, frames, fps):
        nonlocal count
        count += 1
        if count == 6:
            path.with_name(f".{path.name}.part").write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        write(path, frames, fps)

    monkeypatch.setattr(motion, "write_video", fail_in_the_sixth)
    with pytest.raises(OSError, match="No space left"):
        motion.make(tmp_path / "out", SMALL, workers=1)
    assert not list((tmp_path / "out").glob("*.txt"))
    assert len(list((tmp_path / "out").rglob("*.mp4"))) == 5
    monkeypatch.setattr(motion, "write_video", write)
    assert motion.make(tmp_path / "out", SMALL, workers=1) == 19
    assert files(tmp_path / "out") == files(small)


@pytest.fixture
def running(tmp_path):
    """The command at work in tmp_path/out with two workers, a few of its 328 clips written."""
    arguments = ["--out", tmp_path / "out", "--train", 40, "--val", 1, "--size", 48]
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    # A shell that starts this suite in the background has its children ignore ctrl-C; this one must not inherit that.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.rglob("*.mp4"))) < 8:
            assert time.monotonic() < deadline, "no clips in 30 s"
            assert process.poll() is None
            time.sleep(0.02)
        yield process
        process.kill()


def test_ctrl_c_ends_both_workers_and_leaves_whole_clips(running, tmp_path):
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    present = sorted(tmp_path.rglob("*.mp4"))
    assert len(present) < 328
    assert not list(tmp_path.rglob("*.txt"))
    assert all(len(decode(path)) == 32 for path in present[:20])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the worker is found through Linux's /proc")
def test_a_worker_that_dies_ends_the_run(running, tmp_path):
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 2
    assert f"cannot write the data set to {tmp_path / 'out'}" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob("*.txt"))


# ---------------------------------------------------------------------------------------- the user's errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "81"], "size is 81: h264 takes even sizes only, give 82"),
        (["--size", "8"], "size is 8: give 16 or more"),
        (["--train", "0"], "train is 0: give 1 or more"),
        (["--val", "-3"], "val is -3: give 1 or more"),
        (["--frames", "1", "--fps", "0"], "frames is 1: give 2 or more; fps is 0: give 1 or more"),
        (["--seed", "-1"], "seed is -1: give 0 or more"),
        (["--workers", "0"], "workers is 0: give 1 or more"),
        (["--train", "many"], "invalid int value: 'many'"),
    ],
)
def test_bad_arguments_exit_with_status_2_and_write_nothing(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        motion.main(["--out", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_settings_in_the_same_folder_name_both_values_and_the_remedy(small):
    message = "size 32, not 64, frames 6, not 8: give the same settings, another --out, or remove the folder"
    with pytest.raises(motion.SettingsError, match=message):
        motion.make(small, replace(SMALL, size=64, frames=8), workers=1)


def test_a_folder_of_another_tool_is_left_alone(tmp_path):
    (tmp_path / "train.txt").write_text("mine 0\n")
    with pytest.raises(motion.SettingsError, match=r"holds train.txt but no motion.json"):
        motion.make(tmp_path, SMALL, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["train.txt"]


@pytest.mark.parametrize("text", ["", '{"seed": 0', "7"])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "motion.json").write_text(text)
    with pytest.raises(motion.SettingsError, match=r"motion.json is damaged: remove the folder"):
        motion.make(tmp_path, SMALL, workers=1)


def test_the_record_holds_the_settings(small):
    record = json.loads((small / "motion.json").read_text())
    assert record == {"seed": 0, "train": 2, "val": 1, "size": 32, "frames": 6, "fps": 15, "version": motion.VERSION}


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = command("--out", tmp_path / "file" / "out")
    assert done.returncode == 2
    assert f"cannot write the data set to {tmp_path / 'file' / 'out'}" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_does_not_need_torch(tmp_path):
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "False"


# ------------------------------------------------------------------------------------------ datasets/README.md


def test_the_lines_for_ones_own_videos(tmp_path):
    """The code in the README writes complete lists from a folder per class."""
    text = (SCRIPT.parent / "README.md").read_text()
    block = text[text.index("    from pathlib import Path") : text.index("Then train with")]
    for name in ("jump high", "run"):
        (tmp_path / "videos" / name).mkdir(parents=True)
        for index in range(12):
            (tmp_path / "videos" / name / f"a b {index:02d}.mp4").write_bytes(b"")
    code = textwrap.dedent(block)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert (tmp_path / "labels.txt").read_text() == "jump high\nrun\n"
    val = (tmp_path / "val.txt").read_text().splitlines()
    assert val == ["jump high/a b 00.mp4 0", "jump high/a b 10.mp4 0", "run/a b 00.mp4 1", "run/a b 10.mp4 1"]
    assert len((tmp_path / "train.txt").read_text().splitlines()) == 20
