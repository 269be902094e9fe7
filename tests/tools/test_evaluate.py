"""tools/evaluate.py on a small motion set: two networks tested, and what is made of the scores they left."""

import base64
import contextlib
import csv
import hashlib
import html
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import motion
from octvideo import build
from octvideo.data.decode import open_video
from octvideo.data.transforms import uniform_crops
from octvideo.engine import checkpoint
from octvideo.engine.scores import ViewScores
from tools import evaluate, results

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/motion/oct_i3d_tiny.yaml")
SMALL = ["DATA.TEST_SHORT_SIDE", "36", "DATA.TEST_CROP", "32", "DATA.NUM_FRAMES", "4", "DATA.NUM_WORKERS", "0"]
SMALL += ["NUM_THREADS", "1", "DEVICE", "cpu"]


def run(*command: object, status: int = 0) -> tuple[str, str]:
    """What evaluate.py says on standard output and standard error, called in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = evaluate.main([str(word) for word in command])
    assert got == status, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 videos to test on, three of each class."""
    folder = tmp_path_factory.mktemp("data") / "motion"
    motion.make(folder, motion.Settings(train=1, val=3, size=48, frames=24), workers=1)
    (folder / "labels.txt").unlink()  # so that names of classes are where a test puts them
    return folder


def overrides(data: Path, *more: str) -> list[str]:
    return ["DATA.VAL_LIST", f"{data}/val.txt", "DATA.PREFIX", str(data), *SMALL, *more]


@pytest.fixture(scope="module")
def networks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two that nobody has trained, made to disagree on what they see; the first has names of classes."""
    paths = []
    for seed in (0, 1):
        paths.append(tmp_path_factory.mktemp("networks") / f"network{seed}.pt")
        cfg = build.load_config(CONFIG, [*overrides(data), "SEED", str(seed), "TRAIN.ENABLE", "False"])
        samples = build.eval_samples(cfg, build.test_list(cfg), num_clips=1, num_crops=1)
        model = build.network(cfg).eval()
        with torch.no_grad():
            logits = model(build.prepare_clips(cfg)(torch.cat([samples[index].clips for index in range(len(samples))])))
        state, spread = model.state_dict(), logits.std(dim=0)
        state["head.fc.weight"] /= spread[:, None]  # logits of mean 0 and deviation 1 in every class
        state["head.fc.bias"] -= logits.mean(dim=0)
        state["head.fc.bias"] /= spread
        checkpoint.save_weights(paths[-1], state, **({} if seed else {"classes": list(motion.CLASSES)}))
    return paths


@pytest.fixture(scope="module")
def tested(data: Path, networks: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    """Each network's folder, and what was said: 4 clips x 3 crops."""
    found = []
    for path in networks:
        out = tmp_path_factory.mktemp("tested") / path.stem
        command = [
            "--cfg",
            CONFIG,
            "--checkpoint",
            path,
            "--clips",
            "4",
            *overrides(data),
            "--crops",
            "3",
            "--out",
            out,
        ]
        found.append((out, run(*command)[0]))
    return found


def report_of(folder: Path) -> dict:
    return json.loads((folder / "test.json").read_text())


def numbers(report: dict) -> list[float]:
    return [report[name] for name in ("top1", "top5", "mean_class_accuracy", "calibration_error")]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(folder: Path, average: str = "softmax", clips: list[int] | None = None, crops: list[int] | None = None):
    """Labels [M] and probabilities [M, K] from scores.npz, by NumPy alone."""
    with np.load(folder / "scores.npz", allow_pickle=False) as file:
        views = {
            (video, clip, crop): row.astype(np.float64)
            for video, clip, crop, row in zip(
                *(file[name] for name in ("video", "clip", "crop", "logits")), strict=True
            )
        }
        num_clips, num_crops = file["grid"].tolist()
        grid = np.array(
            [
                [views[v, clip, crop] for clip in clips or range(num_clips) for crop in crops or range(num_crops)]
                for v in range(len(file["labels"]))
            ]
        )
        return file["labels"], softmax(grid).mean(1) if average == "softmax" else softmax(grid.mean(1))


def metrics_by_hand(labels: np.ndarray, probabilities: np.ndarray) -> list[float]:
    order = np.argsort(-probabilities, axis=1)
    right = order[:, 0] == labels
    error, confidence = 0.0, probabilities.max(1)
    for b in range(15):
        inside = (b / 15 < confidence) & (confidence <= (b + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    of_classes = [right[labels == label].mean() for label in np.unique(labels)]
    top5 = (order[:, :5] == labels[:, None]).any(1).mean()
    return [100 * float(value) for value in (right.mean(), top5, np.mean(of_classes), error)]


def test_what_a_test_leaves(tested: list[tuple[Path, str]], networks: list[Path], data: Path) -> None:
    folder, said = tested[0]
    files = [
        "classes.csv",
        "confusion.csv",
        "log.txt",
        "metrics.jsonl",
        "run.lock",
        "scores.npz",
        "tensorboard",
        "test.json",
        "test_config.yaml",
        "test_failed.txt",
    ]
    assert sorted(path.name for path in folder.iterdir()) == files
    report = report_of(folder)
    labels, probabilities = by_hand(folder)
    assert numbers(report) == pytest.approx(metrics_by_hand(labels, probabilities))
    assert (report["views"], report["clips"], report["crops"], report["average"]) == (12, 4, 3, "softmax")
    assert (report["videos_scored"], report["videos_listed"], report["videos_incomplete"]) == (24, 24, 0)
    assert report["checkpoint"] == str(networks[0]) and report["input"] == [3, 4, 32, 32] and report["failed"] == []
    assert report["model"] == "i3d_tiny" and report["alpha"] == 0.25 and report["policy"] == "strided"
    assert report["checkpoint_sha256"] == hashlib.sha256(networks[0].read_bytes()).hexdigest()
    assert report["list"] == str(data / "val.txt") and len(report["list_sha256"]) == 64
    assert report["torch"] == torch.__version__ and report["tested"].startswith("20") and report["host"]
    assert f"CHECKPOINT: {networks[0]}" in (folder / "test_config.yaml").read_text()

    rows = list(csv.DictReader(io.StringIO((folder / "classes.csv").read_text())))
    assert [row["class"] for row in rows] == list(motion.CLASSES)
    right = probabilities.argmax(1) == labels
    assert [int(row["correct"]) for row in rows] == [right[labels == label].sum() for label in range(8)]
    assert [float(row["accuracy"]) for row in rows] == pytest.approx(
        [100 * right[labels == label].mean() for label in range(8)], abs=1e-4
    )
    header, *table = csv.reader(io.StringIO((folder / "confusion.csv").read_text()))
    assert header == ["label", *motion.CLASSES, "not scored"] and [row[0] for row in table] == list(motion.CLASSES)
    cells = np.array([row[1:] for row in table], int)
    assert cells.sum(1).tolist() == [3] * 8 and np.trace(cells[:, :8]) == right.sum()

    assert f"| {report['top1']:.2f}" in said and "| 24 of 24 | 12      | softmax" in said
    assert "| lowest accuracy" in said and "| most confused" in said


def test_results_py_reads_it(tested: list[tuple[Path, str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main([str(tested[0][0])]) == 0
    assert "24 of 24" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "views", "words"),
    [
        ([], {}, ""),
        (["--average", "logits"], {"average": "logits"}, "| logits"),
        (["--clips", "2"], {"clips": [0, 3]}, "clips 0, 3 of 0 to 3, which are the 2 of the protocol (strided)"),
        (["--clips", "3"], {"clips": [0, 2, 3]}, "clips 0, 2, 3 of 0 to 3: a subset of those 4, NOT the positions"),
        (["--clips", "1", "--crops", "1"], {"clips": [1], "crops": [1]}, "clips 1 of 0 to 3: a subset of those 4, NOT"),
    ],
)
def test_scores_are_enough(
    tested: list[tuple[Path, str]], tmp_path: Path, flags: list[str], views: dict, words: str
) -> None:
    folder = tested[0][0]
    said, _ = run("--scores", folder / "scores.npz", *flags, "--out", tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert numbers(report) == pytest.approx(metrics_by_hand(*by_hand(folder, **views)))
    assert words in said and report["model"] == "i3d_tiny"
    assert report["views"] == len(views.get("clips", range(4))) * len(views.get("crops", range(3)))
    if not flags:
        assert report == report_of(folder)
        assert "replaced" not in said
        again, _ = run("--scores", folder / "scores.npz", "--out", tmp_path / "out")
        assert f"replaced in {tmp_path / 'out'}: test.json, test_failed.txt, classes.csv, confusion.csv" in again
        for name in ("classes.csv", "confusion.csv", "test_failed.txt"):
            assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_fewer_views_are_those_of_a_test_with_fewer_views(
    data: Path, networks: list[Path], tested: list[tuple[Path, str]], tmp_path: Path
) -> None:
    """No second pass: 2 of 4 clips, and 1 of 3 crops, are where a test of 2 x 1 views looks."""
    run(
        "--cfg",
        CONFIG,
        *overrides(data),
        "--checkpoint",
        networks[0],
        "--clips",
        "2",
        "--crops",
        "1",
        "--out",
        tmp_path,
    )
    for a, b in zip(by_hand(tmp_path), by_hand(tested[0][0], clips=[0, 3], crops=[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (30, 30)])
def test_the_single_crop_is_the_second_of_three(size: tuple[int, int]) -> None:
    frames = torch.arange(2 * size[0] * size[1] * 3).view(2, *size, 3)
    assert torch.equal(uniform_crops(frames, 25, 1)[0], uniform_crops(frames, 25, 3)[1])


def test_an_ensemble(tested: list[tuple[Path, str]], tmp_path: Path) -> None:
    a, b = (folder / "scores.npz" for folder, _ in tested)
    said, _ = run("--scores", a, b, "--weights", "3", "1", "--out", tmp_path / "ab")
    (labels, of_a), (_, of_b) = (by_hand(folder) for folder, _ in tested)
    report = report_of(tmp_path / "ab")
    assert numbers(report) == pytest.approx(metrics_by_hand(labels, (3 * of_a + of_b) / 4))
    assert [(each["scores"], each["weight"]) for each in report["members"]] == [(str(a), 3.0), (str(b), 1.0)]
    assert [numbers(each) for each in report["members"]] == [numbers(report_of(folder)) for folder, _ in tested]
    assert report["views"] == 24 and str(a) in said and str(b) in said
    run("--scores", b, a, "--weights", "1", "3", "--out", tmp_path / "ba")  # b has no names of classes, a has
    assert (tmp_path / "ba/classes.csv").read_bytes() == (tmp_path / "ab/classes.csv").read_bytes()


def test_a_video_that_cannot_be_decoded_is_wrong_in_scores_too(
    data: Path, networks: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    listed = (tmp_path / "data/val.txt").read_text().splitlines()
    bad = tmp_path / "data" / listed[5].rpartition(" ")[0]
    bad.write_bytes(b"")
    one = ["--checkpoint", networks[1], "--clips", "1", "--crops", "1"]
    said, _ = run("--cfg", CONFIG, *one, *overrides(tmp_path / "data"), "--out", tmp_path / "a")
    run("--scores", tmp_path / "a/scores.npz", "--out", tmp_path / "b")
    report = report_of(tmp_path / "a")
    assert f"counted as wrong: {bad}: " in said and "23 of 24" in said
    assert report == report_of(tmp_path / "b") and [entry["path"] for entry in report["failed"]] == [str(bad)]
    assert (tmp_path / "b/test_failed.txt").read_text().startswith(f"{bad}\t{tmp_path}/data/val.txt:6: ")
    label = listed[5].rpartition(" ")[2]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "b/classes.csv").read_text())))
    assert [row["scored"] for row in rows] == [
        "2" if row["class"] == label else "3" for row in rows
    ]  # numbers: no names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scores", "A", "TEST.CLIPS", "2", "--out", "OUT"], "TEST.CLIPS: KEY VALUE goes with --cfg"),
        (["--scores", "A", "--out", "OUT", "TEST.CLIPS", "2"], "TEST.CLIPS: KEY VALUE goes with --cfg"),
        (["--scores", "A"], "--scores needs --out FOLDER"),
        (["--scores", "A", "--out", "A"], "scores.npz is a file; give a folder"),
        (["--scores", "A", "--out", "OUT", "--checkpoint", "x.pt"], "--checkpoint goes with --cfg"),
        (["--scores", "A", "--out", "OUT", "--clips", "5"], "holds 4; allowed: 1 to 4"),
        (["--scores", "A", "--out", "OUT", "--clips", "0"], "--clips is 0, but"),
        (["--scores", "A", "--out", "OUT", "--weights", "1", "2"], "--weights 1 2 for 1 file(s); allowed: one number"),
        (["--scores", "A", "B", "--out", "OUT", "--weights", "1", "nan"], "--weights 1 nan for 2 file(s)"),
        (["--scores", "A", "--out", "OUT", "--report", "A"], "scores.npz: give the name of a file that ends in .html"),
        (["--scores", "A", "--out", "OUT", "--report", "IN_A"], "scores.npz is a file; give a folder"),
        (["--cfg", CONFIG], "--cfg needs --checkpoint FILE"),
        (["--cfg", CONFIG, "--checkpoint", "x.pt", "--weights", "2"], "--weights goes with --scores"),
        (["--cfg", CONFIG, "--checkpoint", "x.pt", "--clips", "2", "TEST.CLIPS", "3"], "--clips and TEST.CLIPS are both"),
        (["--cfg", CONFIG, "--checkpoint", "x.pt", "--clips", "-1"], "TEST.CLIPS is -1; allowed: 1 or more"),
        (["--cfg", CONFIG, "--checkpoint", "x.pt", "TEST.CLIP", "1"], "did you mean TEST.CLIPS?"),
        (["--cfg", CONFIG, "DATA.NUM_WORKERS", "--checkpoint", "x.pt"], "override 'DATA.NUM_WORKERS' has no value"),
    ],
)  # fmt: skip
def test_requests_that_are_refused(
    tested: list[tuple[Path, str]], tmp_path: Path, words: list[str], message: str
) -> None:
    places = {"A": tested[0][0] / "scores.npz", "B": tested[1][0] / "scores.npz", "OUT": tmp_path / "out"}
    places["IN_A"] = places["A"] / "page.html"
    said, error = run(*(places.get(word, word) for word in words), status=2)
    assert error.startswith("error: ") and message in error and said == ""
    assert not (tmp_path / "out").exists()


def test_files_that_do_not_do(data: Path, networks: list[Path], tested: list[tuple[Path, str]], tmp_path: Path) -> None:
    (tmp_path / "no.npz").write_bytes((tested[0][0] / "scores.npz").read_bytes()[:2000])
    error = run("--scores", tested[0][0] / "scores.npz", tmp_path / "no.npz", "--out", tmp_path / "out", status=1)[1]
    assert error.startswith(f"error: {tmp_path}/no.npz: not a whole file of scores")
    one = ["--cfg", CONFIG, *overrides(data), "--out", tmp_path / "out", "--checkpoint"]
    assert "none.pt: no such checkpoint" in run(*one, tmp_path / "none.pt", status=1)[1]
    state = checkpoint.load(networks[0])
    for classes, message in (
        (["a", "b"], "names of 2 classes, but MODEL.NUM_CLASSES is 8"),
        ([1] * 8, "other.pt: classes[0] is 1; allowed: text"),
    ):
        checkpoint.save_weights(tmp_path / "other.pt", state["model"], classes=classes)
        assert message in run(*one, tmp_path / "other.pt", status=1)[1]
    assert not (tmp_path / "out").exists()


def test_classes_in_another_order_are_refused(data: Path, networks: list[Path], tmp_path: Path) -> None:
    """The first network has names; the data has them in labels.txt beside the list, or in DATA.CLASS_NAMES."""
    shutil.copy(data / "val.txt", tmp_path)
    one = ["--cfg", CONFIG, *overrides(data, "DATA.TEST_LIST", f"{tmp_path}/val.txt"), "--clips", "1", "--crops", "1"]
    one += ["--out", tmp_path / "out", "--checkpoint"]
    names = [*motion.CLASSES]
    names[2:4] = names[3], names[2]
    (tmp_path / "labels.txt").write_text("\n".join(names))
    error = run(*one, networks[0], status=1)[1]
    assert error.startswith(
        f"error: {networks[0]}: 2 of 8 labels mean something else in the checkpoint than in the data"
    )
    assert (
        "label 2: 'up' in the checkpoint, 'down' in the data" in error and "the same classes in another order" in error
    )
    assert not (tmp_path / "out").exists()
    run(*one, networks[1])  # which has none: the data's are used
    assert [line.split(",")[1] for line in (tmp_path / "out/classes.csv").read_text().splitlines()[1:]] == names
    (tmp_path / "right.txt").write_text("\n".join(motion.CLASSES).upper().replace("_", " "))
    run(*one, networks[0], "DATA.CLASS_NAMES", tmp_path / "right.txt")


def text_of(path: Path) -> str:
    """What a page says, without its marks."""
    page = re.sub(r"<(style|script)>.*?</\1>", "", path.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def cards(path: Path) -> list[tuple[str, list[np.ndarray]]]:
    """The worst videos of a page: their text and their frames."""
    found = []
    for card in re.findall(r'<article class="card">(.*?)</article>', path.read_text(), flags=re.DOTALL):
        pictures = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', card)
        frames = [np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))), int) for picture in pictures]
        found.append((" ".join(html.unescape(re.sub(r"<[^>]*>", " ", card)).split()), frames))
    return found


def test_a_page_of_a_test(data: Path, networks: list[Path], tmp_path: Path) -> None:
    """The history lies beside the checkpoint, with a line that a kill cut off; one video cannot be decoded."""
    shutil.copytree(data, tmp_path / "data")
    listed = (tmp_path / "data/val.txt").read_text().splitlines()
    (tmp_path / "data" / listed[5].rpartition(" ")[0]).write_bytes(b"")
    weights = shutil.copy(networks[0], tmp_path / "run.pt")
    lines = [json.dumps({"event": "train", "step": s, "epoch": s / 2, "loss": 3.5 - s}) for s in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"event": "tr']))
    one = ["--checkpoint", weights, "--clips", "1", "--crops", "1", "--out", tmp_path / "out"]
    said, _ = run("--cfg", CONFIG, *one, *overrides(tmp_path / "data"), "--report", tmp_path / "new/page.html")
    assert said.endswith(f"the page: {tmp_path}/new/page.html\n")
    report, text = report_of(tmp_path / "out"), text_of(tmp_path / "new/page.html")
    assert f"top-1 {report['top1']:.2f} % top-5 {report['top5']:.2f} % mean class accuracy" in text
    assert f"calibration error {report['calibration_error']:.2f} % scored 23 of 24" in text
    assert f"model i3d_tiny alpha 0.25 checkpoint {weights}" in text and "size of a view 3 x 4 x 32 x 32" in text
    assert f"parameters {report['params'] / 1e6:.3f} M" in text and "views 1 clips 1 crops 1 average softmax" in text
    assert f"From {tmp_path}/metrics.jsonl; lines of it that cannot be read, left out: 1." in text
    assert "training 1.5" in text  # the last loss
    assert all(f" {name} " in text for name in motion.CLASSES) and report["failed"][0]["reason"] in text
    probabilities = {}
    with np.load(tmp_path / "out/scores.npz", allow_pickle=False) as scores:
        for video, row in zip(scores["video"], softmax(scores["logits"].astype(float)), strict=True):
            if row.argmax() != scores["labels"][video]:
                probabilities[scores["names"][video]] = row.max()
    surest = sorted(probabilities, key=lambda name: -probabilities[name])[:12]
    shown = cards(tmp_path / "new/page.html")
    assert len(shown) == len(surest) > 5
    for name, (words, frames) in zip(surest, shown, strict=True):
        assert words.endswith(f"{tmp_path}/data/{name}") and f"{100 * probabilities[name]:.1f} %" in words
        with open_video(f"{tmp_path}/data/{name}") as video:
            expected = video.frames([0, 3, 7, 10, 13, 16, 20, 23]).numpy().astype(int)  # of 24
        assert len(frames) == 8 and np.abs(np.stack(frames) - expected).mean() < 6  # JPEG


def test_pages_of_scores(tested: list[tuple[Path, str]], tmp_path: Path) -> None:
    a, b = (folder / "scores.npz" for folder, _ in tested)
    run("--scores", a, "--clips", "2", "--out", tmp_path / "a", "--report", tmp_path / "a.html")
    text = text_of(tmp_path / "a.html")
    assert "views 6 clips 2 crops 3" in text and f"scores {a}" in text and len(cards(tmp_path / "a.html")) == 12
    assert "No history: no training is told of in" in text and f"{a.parent}/metrics.jsonl" in text  # only of a test
    said, _ = run("--scores", a, "--clips", "2", "--out", tmp_path / "again", "--report", tmp_path / "a.html")
    assert f"replaced {tmp_path / 'a.html'}\n" in said
    (tmp_path / "mine.html").write_text("<p>mine")
    _, wrong = run("--scores", a, "--out", tmp_path / "no", "--report", tmp_path / "mine.html", status=2)
    assert "mine.html is there, and not an earlier output" in wrong and not (tmp_path / "no").exists()
    run("--scores", a, b, "--weights", "3", "1", "--out", tmp_path / "ab", "--report", tmp_path / "ab.html")
    text, members = text_of(tmp_path / "ab.html"), report_of(tmp_path / "ab")["members"]
    assert "Test of an ensemble of 2 networks" in text and "No history: an ensemble has none of its own." in text
    for number, (path, weight, own) in enumerate(zip((a, b), (3, 1), members, strict=True), 1):
        line = f"network {number} i3d_tiny, alpha 0.25, 12 views, weight {weight}: top-1 {own['top1']:.2f} %, {path}"
        assert line in text
    shown = cards(tmp_path / "ab.html")
    assert len(shown) == 12 and all(len(frames) == 8 for _, frames in shown)


def test_a_page_of_hostile_scores_whose_videos_have_gone(tested: list[tuple[Path, str]], tmp_path: Path) -> None:
    """Whatever facts a file of scores holds; a pipe is not waited for; where no history can be read, the page says so."""
    scores = ViewScores.load(tested[0][0] / "scores.npz")
    names = [f"<script>{name}" for name in scores.names]
    (tmp_path / names[0]).parent.mkdir(parents=True)
    os.mkfifo(tmp_path / names[0])
    (tmp_path / "metrics.jsonl").mkdir()
    facts = {"macs": 10**400, "params": "<b>", "input": 3, "alpha": [], "members": ["x"], "weight": "y", "model": 7}
    facts |= {"checkpoint": f"{tmp_path}/run\0/x.pt", "prefix": str(tmp_path), "<i>": "</i>", "scores": "z"}
    replace(scores, names=names, classes=[], facts=facts).save(tmp_path / "scores.npz")
    page, path = tmp_path / "page.html", tmp_path / "scores.npz"
    run("--scores", path, "--out", tmp_path / "out", "--report", page)
    text = text_of(page)
    assert f"multiply-adds of a view {10**400}" in text and "parameters <b>" in text and "<i> </i>" in text
    assert f"scores {path}" in text and "No history: no training is told of in" in text
    shown = cards(page)
    assert len(shown) == 12 and not any(frames for _, frames in shown)
    assert all("No frames: " in words and "there is no such file now" in words for words, _ in shown)
    assert page.read_text().count("<script>") == 1
    run("--scores", path, path, "--out", tmp_path / "out", "--report", page)
    assert "network 2 7, alpha [], 12 views, weight 1: top-1" in text_of(page)


def test_a_page_of_images_and_of_a_video_cut_off(tested: list[tuple[Path, str]], data: Path, tmp_path: Path) -> None:
    """A view without frames is of an image network."""
    scores = ViewScores.load(tested[0][0] / "scores.npz")
    names = [f"{number}.mp4" for number in range(len(scores.names))]
    for name in names:
        Image.new("RGB", (400, 100), (200, 30, 30)).save(tmp_path / name, "PNG")
    facts = {"input": [3, 32, 32], "prefix": str(tmp_path)}
    replace(scores, names=names, facts=facts).save(tmp_path / "scores.npz")
    command = ["--scores", tmp_path / "scores.npz", "--out", tmp_path / "out", "--report", tmp_path / "page.html"]
    run(*command)
    for _, frames in cards(tmp_path / "page.html"):
        assert [frame.shape for frame in frames] == [(40, 160, 3)] and frames[0].mean(axis=(0, 1))[0] > 190
    whole = (data / scores.names[0]).read_bytes()
    for name in names:
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    run(*command)
    assert all("No frames: " in words and str(tmp_path) in words for words, _ in cards(tmp_path / "page.html"))
    assert "Test of a network" in text_of(tmp_path / "page.html")


def test_a_page_with_no_video_scored(data: Path, tested: list[tuple[Path, str]], tmp_path: Path) -> None:
    scores = ViewScores.load(tested[0][0] / "scores.npz").without_views()
    scores.save(tmp_path / "scores.npz")
    run("--scores", tmp_path / "scores.npz", "--out", tmp_path / "out", "--report", tmp_path / "page.html")
    text = text_of(tmp_path / "page.html")
    assert "calibration error - scored 0 of 24" in text and "No wrong predictions to show." in text
    assert text.count("no view of it is among the scores") == 24


def test_a_sweep_over_checkpoints_is_one_array(
    data: Path, networks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sweep.txt").write_text(f"TEST.CLIPS 2\nTEST.CHECKPOINT {networks[1]}\n")
    flags = ["--slurm", "--dry-run", "--array-overrides", tmp_path / "sweep.txt", "--out", tmp_path / "out"]
    seen = []
    monkeypatch.setattr(evaluate.launch, "submit", lambda request, script, jobs: seen.append((script, jobs)) or 0)
    run("--cfg", CONFIG, "--checkpoint", networks[0], "--average", "logits", *flags, *overrides(data))
    asked = ["--cfg", CONFIG, "--checkpoint", networks[0], *flags, "--report", "page.html", *overrides(data)]
    assert "--report page.html: 2 tests would write to that one page" in run(*asked, status=2)[1]
    ((script, jobs),) = seen
    assert script == ROOT / "tools/evaluate.py" and [job.output.name for job in jobs] == ["0", "1"]
    expected = [["--checkpoint", str(path), "--average", "logits"] for path in networks]
    assert [list(job.arguments) for job in jobs] == expected
    (tmp_path / "config.yaml").write_text(jobs[0].config)
    assert build.load_config(tmp_path / "config.yaml").TEST.CLIPS == 2


@pytest.mark.slow
def test_processes_here_give_the_scores_of_one(data: Path, networks: list[Path], tmp_path: Path) -> None:
    test = ["--cfg", CONFIG, "--checkpoint", networks[0], "--clips", "2", "--crops", "1"]
    run(*test, "--out", tmp_path / "one", *overrides(data))
    run(*test, "--out", tmp_path / "two", "--local", "2", *overrides(data))
    logits = []
    for name in ("one", "two"):
        scores = np.load(tmp_path / name / "scores.npz", allow_pickle=False)
        logits.append(scores["logits"][np.lexsort((scores["clip"], scores["video"]))])
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


def test_scores_need_no_job(tmp_path: Path) -> None:
    error = run("--scores", "a.npz", "--out", tmp_path, "--slurm", status=2)[1]
    assert "--slurm and --local go with --cfg" in error
