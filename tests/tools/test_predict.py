"""Predictions of small videos made here: equal to a test's scores, annotated videos that are decoded again, bad input."""

import contextlib
import io
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from octvideo import build
from octvideo.data.decode import DecodeError, open_video
from octvideo.engine import checkpoint
from octvideo.engine.distributed import World
from octvideo.engine.evaluate import evaluate
from octvideo.files import write_atomic
from tools import predict

ROOT = Path(__file__).parents[2]
CFG = str(ROOT / "configs/motion/oct_i3d_tiny.yaml")
IMAGES = str(ROOT / "configs/stills/oct_resnet_tiny.yaml")
SMALL = ["NUM_THREADS", "1", "DATA.NUM_WORKERS", "0", "DATA.SAMPLING_RATE", "1", "DATA.NUM_FRAMES", "4"]
SMALL += ["DATA.TEST_SHORT_SIDE", "36", "DATA.TEST_CROP", "32", "MODEL.NUM_CLASSES", "3", "DEVICE", "cpu"]


def write_video(path: Path, width: int, height: int, frames: int, fps: int = 15) -> None:
    rng = np.random.default_rng(len(path.name))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10"})
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
        blocks = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3))
        for number in range(frames):
            frame = np.kron(np.roll(blocks, number, axis=1), np.ones((8, 8, 1))).astype(np.uint8)[:height, :width]
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "wide.mp4", 64, 48, 20)
    write_video(folder / "größe 51x67.mp4", 51, 67, 9, fps=24)
    write_video(folder / "one.mp4", 48, 48, 1)
    (folder / "bad.mp4").write_bytes((folder / "wide.mp4").read_bytes()[:300])
    return folder


def save(folder: Path, *, cfg_path: str = CFG, **more: Any) -> Path:
    """A checkpoint of a network whose classes are far apart."""
    cfg = build.load_config(cfg_path, SMALL)
    model = build.network(cfg)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.head.fc.weight, std=0.3)
    state = {"model": model.state_dict(), "epoch": 2, **more}
    return checkpoint.save(folder, 7, state, keep=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run"), classes=["jump", "run", "rückwärts\nlaufen"])


def run(*words: str, status: int = 0, cfg: str = CFG) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = predict.main([*words, "--cfg", cfg, *SMALL])
    assert got == status, out.getvalue() + err.getvalue()
    assert "Traceback" not in err.getvalue()
    return out.getvalue(), err.getvalue()


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "predictions.json").read_text())


def shares(top: list[dict[str, Any]]) -> list[float]:
    """Best first -> by label."""
    return [entry["probability"] for entry in sorted(top, key=lambda entry: entry["class"])]


def test_scores_are_those_of_a_test(videos: Path, trained: Path, tmp_path: Path) -> None:
    files = [str(videos / "wide.mp4"), str(videos / "größe 51x67.mp4"), str(videos / "one.mp4")]
    out, _ = run(*files, "--checkpoint", str(trained), "--clips", "3", "--crops", "3", "--out", str(tmp_path))
    (tmp_path / "list.txt").write_text("".join(f"{file} 0\n" for file in files))
    cfg = build.load_config(CFG, [*SMALL, "DATA.TEST_LIST", str(tmp_path / "list.txt"), "TEST.CLIPS", "3"])
    model, listed = build.network(cfg), build.test_list(cfg)
    model.load_state_dict(checkpoint.load(trained)["model"])
    cpu = torch.device("cpu")
    result = evaluate(
        build.place(cfg, model, cpu),
        build.eval_loader(cfg, listed, World(), cpu, num_clips=3, num_crops=3),
        torch.from_numpy(listed.labels),
        num_classes=3,
        num_clips=3,
        num_crops=3,
        prepare=build.prepare_clips(cfg),
        clips_per_forward=4,
        device=cpu,
        world=World(),
        title="test",
    )
    found = report(tmp_path)
    assert [video["path"] for video in found["videos"]] == files and found["failed"] == []
    averages = [shares(video["average"]) for video in found["videos"]]
    np.testing.assert_allclose(averages, result.scores, atol=1e-6)
    assert result.scores.std(dim=0).max() > 0.01
    for video in found["videos"]:
        clips = [shares(clip["top"]) for clip in video["clips"]]
        np.testing.assert_allclose(np.mean(clips, axis=0), shares(video["average"]), atol=1e-6)
    first = found["videos"][0]
    assert (first["frames"], first["fps"]) == (20, 15.0)
    # frames 0 to 3, 8 to 11 and 16 to 19
    times = [(clip["start_s"], clip["end_s"]) for clip in first["clips"]]
    np.testing.assert_allclose(times, np.array([(0, 4), (8, 12), (16, 20)]) / 15)
    best = first["average"][0]
    assert "| 1       | 0.53-0.80 | " in out and "wide.mp4: 20 frames at 15 a second, 1.33 s" in out
    assert f"| average |           | {best['name']} {100 * best['probability']:.1f} %" in out
    keys = {"config", "model", "alpha", "checkpoint", "random_weights", "moving_average", "step", "epoch"}
    assert set(found) == keys | {"clips", "crops", "input", "videos", "failed"}
    assert (found["checkpoint"], found["step"], found["epoch"]) == (str(trained), 7, 2)


def test_names_are_the_checkpoint_s_and_fit_on_a_line(videos: Path, trained: Path, tmp_path: Path) -> None:
    file = str(videos / "one.mp4")
    out, _ = run(file, "OUTPUT_DIR", str(trained.parent), "--top", "2", "--clips", "1", "--out", str(tmp_path))
    (answer,) = report(tmp_path)["videos"]
    assert len(answer["average"]) == 2
    assert {entry["name"] for entry in answer["average"]} < {"jump", "run", "rückwärts\ufffdlaufen"}
    save(tmp_path / "run", cfg_path=CFG)
    out, _ = run(file, "OUTPUT_DIR", str(tmp_path / "run"))
    assert "class 0" in out
    assert (tmp_path / "run/predictions/predictions.json").exists()  # where no --out is given
    long = "playing squash or racquetball on a Sunday"
    save(tmp_path / "long", classes=[long, long + " 2", long + " 3"])
    out, _ = run(file, "OUTPUT_DIR", str(tmp_path / "long"))
    assert "playing squash or racquetba..." in out and long not in out
    assert report(tmp_path / "long/predictions")["videos"][0]["average"][0]["name"].startswith(long)


def test_a_moving_average_is_what_predicts(videos: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "run")
    state = checkpoint.load(path)
    average = {name: value.clone() for name, value in state["model"].items()}
    average["head.fc.bias"] = torch.tensor([0.0, 0.0, 1000.0])
    save(tmp_path / "run", ema=average)
    out, _ = run(str(videos / "one.mp4"), "OUTPUT_DIR", str(tmp_path / "run"), "--out", str(tmp_path))
    assert "moving average" in out and report(tmp_path)["moving_average"]
    assert report(tmp_path)["videos"][0]["average"][0] == {"class": 2, "name": "class 2", "probability": 1.0}


def decoded(path: Path) -> tuple[np.ndarray, float]:
    with open_video(str(path)) as video:
        return video.frames(range(video.num_frames)).numpy(), video.fps


@pytest.mark.parametrize(
    "name,frames,fps,size",
    [("wide", 20, 15, (240, 320)), ("größe 51x67", 9, 24, (336, 256)), ("one", 1, 15, (240, 240))],
)
def test_annotated_videos_are_whole(
    videos: Path, trained: Path, tmp_path: Path, name: str, frames: int, fps: int, size: tuple[int, int]
) -> None:
    words = ["--checkpoint", str(trained), "--clips", "3", "--crops", "3", "--annotate", "--saliency"]
    run(str(videos / f"{name}.mp4"), *words, "--out", str(tmp_path))
    written = sorted(path.name for path in tmp_path.iterdir())
    ends = ["_annotated.mp4", "_saliency.mp4", "_saliency.png"]
    assert written == sorted([*(f"{name}{end}" for end in ends), "predictions.json"])
    plain, rate = decoded(tmp_path / f"{name}_annotated.mp4")
    hot, hot_rate = decoded(tmp_path / f"{name}_saliency.mp4")
    assert plain.shape == hot.shape == (frames, *size, 3)
    assert rate == hot_rate == fps
    with av.open(str(tmp_path / f"{name}_annotated.mp4")) as container:
        (stream,) = container.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    source, _ = decoded(videos / f"{name}.mp4")
    large = np.stack([predict.enlarged(frame, predict.VIDEO_SIDE) for frame in source]).astype(int)
    below = slice(size[0] * 2 // 3, None)  # of the panel
    rows, columns = large.shape[1:3]
    difference = abs(plain[:, :rows, :columns].astype(int) - large)
    assert difference[:, below].mean() < 6 < 30 < difference[:, 8:60, 8:200].mean()
    inside = [number for number in range(frames) if name != "wide" or number % 8 < 4]  # of a clip
    heat = abs(hot[:, :rows, :columns].astype(int) - large)[:, below]
    assert heat[inside].mean() > 1.5 * difference[inside][:, below].mean()
    for number in set(range(frames)) - set(inside):
        assert heat[number].mean() < 6


def test_the_panel_names_the_clip_that_is_near(videos: Path, trained: Path, tmp_path: Path) -> None:
    drawn: list[tuple[str, list]] = []
    original = predict.draw_panel

    def noting(frame: np.ndarray, title: str, rows: list, *more: Any, **named: Any) -> np.ndarray:
        drawn.append((title, rows))
        return original(frame, title, rows, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "draw_panel", noting)
        words = ["--checkpoint", str(trained), "--clips", "3", "--crops", "1", "--annotate", "--out", str(tmp_path)]
        run(str(videos / "wide.mp4"), *words)
    clips = report(tmp_path)["videos"][0]["clips"]
    # clips are centred at frames 1.5, 9.5 and 17.5
    for number, (title, rows) in enumerate(drawn):
        clip = 0 if number <= 5 else 1 if number <= 13 else 2
        start, end = clips[clip]["start_s"], clips[clip]["end_s"]
        assert title == f"{number / 15:.2f} s   clip {clip}: {start:.2f}-{end:.2f} s"
        assert rows == [(entry["name"], entry["probability"]) for entry in clips[clip]["top"]]
    assert len(drawn) == 20


def test_heat_stands_where_its_crop_was_cut(videos: Path) -> None:
    cfg = build.load_config(CFG, [*SMALL, "TEST.CROPS", "3"])
    samples = build.eval_samples(cfg, predict.unlabelled([], "nowhere"), 1, 3)
    annotation = predict.Annotation(None, None, {}, None, samples)
    heat = torch.stack([torch.full((4, 32, 32), value) for value in (0.25, 1.0, 0.5)])
    wide = annotation.whole_frame(heat, 48, 96)  # scaled to 36 x 72: crops from row 2, columns 0, 20 and 40
    expected = torch.zeros(36, 72)
    for left, value in ((0, 0.25), (40, 0.5), (20, 1.0)):
        expected[2:34, left : left + 32] = value
    assert torch.equal(wide, expected.expand(4, 36, 72))
    assert torch.equal(annotation.whole_frame(heat, 96, 48), expected.T.expand(4, 72, 36))


def test_heat_of_a_clip_is_highest_at_1_in_one_of_its_crops(videos: Path, trained: Path) -> None:
    cfg = build.load_config(CFG, [*SMALL, "TEST.CHECKPOINT", str(trained), "TEST.CLIPS", "2"])
    network = predict.load_network(cfg, random_weights=False)
    samples = build.eval_samples(cfg, predict.unlabelled([str(videos / "wide.mp4")], "here"), 2, 3)
    seen = predict.look(network, samples, 0)
    heats = predict.heat_of_clips(network, seen)
    assert [heat.shape for heat in heats] == [(3, 4, 32, 32)] * 2
    assert all(heat.max() == 1 and heat.min() >= 0 for heat in heats)
    assert any(heat.flatten(1).amax(1).min() < 1 for heat in heats)


def test_the_contact_sheet_has_the_clip_and_the_clip_under_heat(videos: Path, trained: Path, tmp_path: Path) -> None:
    run(str(videos / "wide.mp4"), "--checkpoint", str(trained), "--clips", "2", "--saliency", "--out", str(tmp_path))
    sheet = np.asarray(Image.open(tmp_path / "wide_saliency.png"))
    # two clips, each 16 pixels of title and twice 128 pixels; four frames of 128 side by side; 4 pixels between
    assert sheet.shape == (2 * (16 + 256 + 4) + 4, 4 * (128 + 4) + 4, 3)
    cfg = build.load_config(CFG, [*SMALL, "TEST.CLIPS", "2"])
    samples = build.eval_samples(cfg, predict.unlabelled([str(videos / "wide.mp4")], "here"), 2, 3)
    centre = samples[0].clips[1]  # of three crops
    frame = predict.enlarged(centre[:, 2].permute(1, 2, 0).numpy(), 128)
    left = 4 + 2 * 132
    np.testing.assert_array_equal(sheet[20:148, left : left + 128], frame)
    assert (sheet[148:276, left : left + 128] != frame).any()


def test_features_are_what_the_classifier_is_given(videos: Path, trained: Path, tmp_path: Path) -> None:
    file = str(videos / "wide.mp4")
    run(file, "--checkpoint", str(trained), "--clips", "2", "--crops", "3", "--features", "--out", str(tmp_path))
    with np.load(tmp_path / "wide_features.npz", allow_pickle=False) as stored:
        found = dict(stored)
    weights = checkpoint.load(trained)["model"]
    logits = found["features"] @ weights["head.fc.weight"].numpy().T + weights["head.fc.bias"].numpy()
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(found["probabilities"], exponents / exponents.sum(1, keepdims=True), atol=1e-5)
    assert found["features"].shape == (6, 512) and found["features"].dtype == np.float32
    assert found["clip"].tolist() == [0, 0, 0, 1, 1, 1] and found["crop"].tolist() == [0, 1, 2] * 2
    np.testing.assert_allclose(found["start_s"], np.repeat([0, 16 / 15], 3))
    np.testing.assert_allclose(found["end_s"], np.repeat([4 / 15, 20 / 15], 3))
    assert (str(found["video"]), str(found["config"]), str(found["checkpoint"])) == (file, CFG, str(trained))


def test_a_bad_file_is_named_and_the_others_go_on(videos: Path, trained: Path, tmp_path: Path) -> None:
    files = [str(videos / name) for name in ("wide.mp4", "bad.mp4", "one.mp4")]
    words = ["--checkpoint", str(trained), "--clips", "1", "--features", "--out", str(tmp_path)]
    out, err = run(*files, *words, status=1)
    assert f"error: {files[1]}: cannot be opened" in err and "1 of 3 files failed" in err
    assert "predictions.json: 2 of 3 files predicted" in out
    found = report(tmp_path)
    assert [video["path"] for video in found["videos"]] == [files[0], files[2]]
    (failure,) = found["failed"]
    assert failure["path"] == files[1] and failure["reason"].startswith(files[1])
    assert not (tmp_path / "bad_features.npz").exists() and (tmp_path / "one_features.npz").exists()


def test_a_second_call_loses_nothing_of_the_first(videos: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other/one.mp4"
    other.write_bytes((videos / "wide.mp4").read_bytes())
    wide, one = str(videos / "wide.mp4"), str(videos / "one.mp4")
    words = ["--checkpoint", str(trained), "--clips", "1", "--features", "--out", str(tmp_path / "out")]
    run(wide, one, *words)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    out, _ = run(str(other), str(videos / "bad.mp4"), *words, status=1)
    assert "1 of 2 files predicted" in out and "2 more from earlier calls" in out and "replaced" not in out
    assert [video["path"] for video in report(tmp_path / "out")["videos"]] == [wide, one, str(other)]
    assert [entry["path"] for entry in report(tmp_path / "out")["failed"]] == [str(videos / "bad.mp4")]
    assert (tmp_path / "out/one_2_features.npz").exists()  # of the other file called one
    for name in ("wide_features.npz", "one_features.npz"):
        assert (tmp_path / "out" / name).read_bytes() == first[name]
    out, _ = run(str(other), *words)
    assert (
        f"replaced {tmp_path}/out/one_2_features.npz" in out and "replaced the earlier predictions of 1 file\n" in out
    )
    out, _ = run(wide, *words, "--crops", "1")
    assert f"kept as {tmp_path}/out/predictions_1.json" in out and len(report(tmp_path / "out")["videos"]) == 1
    assert len(json.loads((tmp_path / "out/predictions_1.json").read_text())["videos"]) == 3


def test_what_was_predicted_before_an_interruption_is_written(
    videos: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(network: predict.Network, samples: Any, number: int) -> predict.Seen:
        if number == 1:
            raise KeyboardInterrupt
        return look(network, samples, number)

    look = predict.look
    monkeypatch.setattr(predict, "look", interrupted)
    files = [str(videos / name) for name in ("wide.mp4", "one.mp4")]
    run(*files, "--checkpoint", str(trained), "--out", str(tmp_path), status=130)
    assert [video["path"] for video in report(tmp_path)["videos"]] == [str(videos / "wide.mp4")]


def test_streams_that_go_away_or_lack_a_character(videos: Path, trained: Path, tmp_path: Path) -> None:
    """As a process: the pipe is closed after the first line, and the path cannot be written in ASCII."""
    video = tmp_path / "\u52d5\u753b.mp4"
    video.write_bytes((videos / "wide.mp4").read_bytes())
    words = [
        str(video),
        str(videos / "one.mp4"),
        "--checkpoint",
        str(trained),
        "--features",
        "--out",
        str(tmp_path / "out"),
    ]
    command = [sys.executable, str(ROOT / "tools/predict.py"), *words, "--cfg", CFG, *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, **pipes)  # type: ignore[call-overload]
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    assert [entry["path"] for entry in report(tmp_path / "out")["videos"]] == words[:2]
    assert (tmp_path / "out/\u52d5\u753b_features.npz").exists()


def test_damage_between_the_clips_leaves_no_half_video(
    videos: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Damaged:
        def __init__(self, path: str, backend: str, max_pixels: int) -> None:
            self.video = open_video(path, backend, max_pixels=max_pixels)
            self.num_frames, self.fps, self.pixels = self.video.num_frames, self.video.fps, self.video.pixels

        def __enter__(self) -> "Damaged":
            return self

        def __exit__(self, *exc_info: object) -> None:
            self.video.close()

        def frames(self, indices: range) -> torch.Tensor:
            assert len(indices) <= predict.CHUNK  # not the whole video at once
            if 17 in indices:
                raise DecodeError("wide.mp4: frame 17 of 20 cannot be decoded")
            return self.video.frames(indices)

    monkeypatch.setattr(predict, "open_video", Damaged)
    words = ["--checkpoint", str(trained), "--clips", "1", "--annotate", "--out", str(tmp_path)]
    _, err = run(str(videos / "wide.mp4"), *words, status=1)
    assert "frame 17 of 20 cannot be decoded" in err
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.json"]
    assert len(report(tmp_path)["videos"]) == len(report(tmp_path)["failed"]) == 1


def test_without_a_checkpoint_it_is_an_error(videos: Path, tmp_path: Path) -> None:
    file = str(videos / "one.mp4")
    _, err = run(file, "OUTPUT_DIR", str(tmp_path / "run"), status=1)
    assert f"error: {tmp_path}/run: no checkpoint to predict with; train first or give --checkpoint FILE" in err
    assert not (tmp_path / "run").exists()
    _, err = run(file, "--checkpoint", str(tmp_path / "none.pt"), status=1)
    assert "none.pt: no such checkpoint" in err


def test_random_weights_are_asked_for_and_marked(videos: Path, tmp_path: Path) -> None:
    words = ["--random-weights", "--clips", "1", "--features", "--annotate", "OUTPUT_DIR", str(tmp_path)]
    out, _ = run(str(videos / "one.mp4"), *words)
    assert "RANDOM WEIGHTS: this says nothing" in out
    found = report(tmp_path / "predictions")
    assert found["random_weights"] is True and found["checkpoint"] is None
    with np.load(tmp_path / "predictions/one_features.npz") as stored:
        assert str(stored["checkpoint"]) == "RANDOM WEIGHTS: this says nothing"
    (frame,), _ = decoded(tmp_path / "predictions/one_annotated.mp4")
    orange = (frame[..., 0] > 180) & (frame[..., 2] < 120) & (frame[..., 1] > 120)
    assert orange[20:45, 5:200].sum() > 50


@pytest.mark.parametrize(
    "more,message",
    [
        (["MODEL.NUM_CLASSES", "5"], "of 3 classes, but MODEL.NUM_CLASSES is 5; give MODEL.NUM_CLASSES 3"),
        (["MODEL.NAME", "c2d_tiny"], "entries do not fit"),
    ],
)
def test_another_network_s_checkpoint(
    videos: Path, trained: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    words = [str(videos / "one.mp4"), "--checkpoint", str(trained), "--out", str(tmp_path / "out")]
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert predict.main([*words, "--cfg", CFG, *SMALL, *more]) == 1
    assert message in err.getvalue() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "classes,message",
    [
        (["a", "b"], "names 2 classes, but MODEL.NUM_CLASSES is 3"),
        ({"a": 0}, "classes is a dict of 1; allowed: a list"),
    ],
)
def test_names_of_another_number_of_classes(videos: Path, tmp_path: Path, classes: Any, message: str) -> None:
    path = save(tmp_path, classes=classes)
    _, err = run(str(videos / "one.mp4"), "--checkpoint", str(path), status=1)
    assert message in err


def test_weights_of_no_use(videos: Path, tmp_path: Path) -> None:
    path = save(tmp_path)
    state = checkpoint.load(path)
    state["model"]["head.fc.weight"].fill_(float("nan"))
    write_atomic(path, lambda file: torch.save(state, file))
    _, err = run(str(videos / "one.mp4"), "--checkpoint", str(path), status=1)
    assert "the network's answer is not a number" in err


def test_files_and_overrides_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.mp4", "B.MP4", "0.5", "SEED"):
        (tmp_path / name).touch()
    split = predict.split_words
    assert split(["a.mp4", "OCTAVE.ALPHA", "0.5", "B.MP4"]) == (["a.mp4", "B.MP4"], ["OCTAVE.ALPHA", "0.5"])
    assert split(["DATA.PREFIX", "a.mp4", "0.5"]) == (["0.5"], ["DATA.PREFIX", "a.mp4"])  # a key takes what follows
    assert split(["a.mp4", "DATA.MEAN", "[0, 0, 0]", "SOLVER.BASE_LR"])[1] == [
        "DATA.MEAN",
        "[0, 0, 0]",
        "SOLVER.BASE_LR",
    ]
    assert split(["./SEED", "TEST.CLIPS", "1"]) == (["./SEED"], ["TEST.CLIPS", "1"])


@pytest.mark.parametrize(
    "words,messages",
    [
        (["a.mp4", "SEED", "3"], ["SEED is a key of the configuration and a file here; for the file write ./SEED"]),
        (
            ["none.mp4", "OCTAV.ALPHA", "0.5", "a.mp4"],
            [
                "2 problem(s)",
                "none.mp4: no such file, and no key",
                "OCTAV.ALPHA: no such file",
                "did you mean OCTAVE.ALPHA?",
            ],
        ),
        (["folder"], ["folder: a folder; give the files in it, e.g. folder/*.mp4"]),
        (["TEST.CLIPS", "1"], ["no video was given"]),
        (["a\udcff.mp4"], ["its name is not UTF-8"]),
        (["a.mp4", "TEST.CLIPS"], ["override 'TEST.CLIPS' has no value"]),
        (["a.mp4", "--crops", "2"], ["TEST.CROPS is 2; allowed: 1, 3"]),
        (["a.mp4", "--clips", "0"], ["TEST.CLIPS is 0; allowed: 1 or more"]),
        (["a.mp4", "--top", "0"], ["--top is 0; allowed: 1 or more"]),
        (["a.mp4", "--random-weights", "--checkpoint", "x.pt"], ["--random-weights and --checkpoint contradict"]),
        (
            ["a_annotated.mp4", "a.mp4", "--annotate", "--random-weights", "--out", "."],
            ["a_annotated.mp4: would be written over"],
        ),
        (["a.mp4", "--random-weights", "--annotate", "--font", "a.mp4"], ["--font a.mp4: cannot be used"]),
        (["a.mp4", "--random-weights", "--out", "a.mp4/x"], ["a.mp4/x: cannot be made"]),
    ],
)
def test_wrong_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], messages: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.mp4", "a_annotated.mp4", "SEED", "a\udcff.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert predict.main(["--cfg", CFG, *words]) == 2
    assert err.getvalue().startswith("error: ") and all(message in err.getvalue() for message in messages), (
        err.getvalue()
    )


def test_outputs_are_named_after_the_file() -> None:
    options = Namespace(annotate=False, saliency=True, features=True)
    assert predict.outputs(options, Path("o"), "x") == {
        "sheet": Path("o/x_saliency.png"),
        "npz": Path("o/x_features.npz"),
    }


def test_an_image_network_takes_images(videos: Path, tmp_path: Path) -> None:
    image = np.kron(np.random.default_rng(0).integers(0, 256, (5, 7, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    words = [str(tmp_path / "a.png"), "--random-weights", "--out", str(tmp_path / "out")]
    out, err = run(*words, str(videos / "one.mp4"), "--saliency", "--features", cfg=IMAGES, status=1)
    assert "one.mp4: is no JPEG" in err
    (answer,) = report(tmp_path / "out")["videos"]
    assert (
        set(answer) == {"path", "file", "name", "clips", "average"} and answer["clips"][0]["top"] == answer["average"]
    )
    assert "average" in out and "0.00-" not in out
    assert np.asarray(Image.open(tmp_path / "out/a_saliency.png")).shape[0] == 4 + 16 + 2 * 128 + 4
    with np.load(tmp_path / "out/a_features.npz") as stored:
        assert stored["features"].shape == (1, 512) and np.isnan(stored["start_s"]).all()
    _, err = run(*words, "--annotate", cfg=IMAGES, status=2)
    assert "--annotate is for videos, but resnet_tiny takes images" in err


def test_small_frames_are_enlarged_by_whole_factors() -> None:
    def size(height: int, width: int) -> tuple[int, ...]:
        return predict.enlarged(np.zeros((height, width, 3), np.uint8), 240).shape[:2]

    assert size(64, 64) == (256, 256) and size(240, 320) == (240, 320) and size(300, 239) == (600, 478)
    assert size(10, 1000) == (40, 4000) and size(10, 9000) == (10, 9000)  # no side above 4096 on that account
