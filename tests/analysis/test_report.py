import base64
import dataclasses
import hashlib
import html
import io
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from octvideo.analysis.report import SHADES, WorstVideo, report_html, spread, thumbnail
from octvideo.engine.metrics import calibration_error, class_rows, most_confused

VOID = {"meta", "img", "source", "br", "hr", "link", "input"}
HOSTILE = ["<script>alert(1)</script>", "\" onload=\"alert(2)' x='", "قفز & {{ 7 * 7 }}", "🏄‍♀️ surfing"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Elements with their attributes, tables as rows of text, all text; fails where a tag is not closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []
        self.tables = {
            name: [[" ".join(cell.split()) for cell in row] for row in rows] for name, rows in self.tables.items()
        }

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.rows = self.tables.setdefault(dict(attrs).get("class") or f"table {len(self.tables)}", [])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]


# Of 10 videos of a, 6 are right, 3 taken for b, 1 for c; of 5 of b, 2 are right, 2 taken for c, 1 failed; c has none.
CONFUSION = np.array([[6, 3, 1, 0], [0, 2, 2, 1], [0, 0, 0, 0]])
BINS = np.array([[np.nan, np.nan, 0], [0.4, 0.5, 4], [0.9, 0.6, 10]])


def worst(label: int = 0, predicted: int = 1, probability: float = 0.9, path: str = "x.mp4", t: int = 2) -> WorstVideo:
    frames = np.full((t, 12, 16, 3), 128, np.uint8)
    return WorstVideo(path, label, predicted, probability, frames)


def arguments(**changes: Any) -> dict[str, Any]:
    """A small report; `changes` replace arguments. What follows from confusion and bins is computed as a test does it."""
    given: dict[str, Any] = {
        "title": "a run",
        "headline": {"top-1": "53.3 %"},
        "facts": {"checkpoint": "runs/x.pt"},
        "events": [{"event": "train", "epoch": e / 2, "loss": 4.0 - e, "top1": 10.0 * e} for e in range(1, 4)],
        "classes": ["a", "b", "c"],
        "confusion": CONFUSION,
        "bins": BINS,
        "failed": [("bad.mp4", "moov atom not found")],
        "worst": [worst()],
    }
    return {**counted(**{**given, **changes}), **changes}


def counted(**given: Any) -> dict[str, Any]:
    """Arguments with the rows, pairs and calibration error of their confusion and bins."""
    table = torch.from_numpy(np.asarray(given["confusion"], np.int64))
    error = calibration_error(torch.from_numpy(given["bins"].astype(float)))
    given["rows"] = class_rows(table)
    return {**given, "pairs": most_confused(table, 15), "calibration_error": None if np.isnan(error) else error}


def page(**changes: Any) -> Page:
    return Page(report_html(**arguments(**changes)))


def kinetics(k: int = 400, videos: int = 19_761) -> dict[str, Any]:
    """Counts of the size of Kinetics-400's validation list, and 196 epochs of history."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, k, videos)
    wrong = generator.random(videos) < 0.3
    predicted = np.where(wrong, generator.integers(0, k, videos), labels)
    predicted[::500] = k
    confusion = np.zeros((k, k + 1), int)
    np.add.at(confusion, (labels, predicted), 1)
    keys = ("lr", "loss", "top1", "clips_per_s", "data_wait", "grad_norm", "step_s", "memory_gb")
    values = generator.random((18_000, len(keys))).tolist()
    events = [
        {"event": "train", "epoch": number / 92, **dict(zip(keys, row, strict=True))}
        for number, row in enumerate(values, 1)
    ]
    classes = [f"class number {number}" for number in range(k)]
    failed = [(f"{number}.mp4", "empty file") for number in range(len(predicted[::500]))]
    return arguments(events=events, classes=classes, confusion=confusion, failed=failed, worst=[])


def test_one_file_that_loads_nothing() -> None:
    for given in (arguments(), kinetics(k=50, videos=500)):
        text = report_html(**given)
        read = Page(text)
        assert "://" not in text and "@import" not in text and "url(" not in text
        assert not [tag for tag, _ in read.elements if tag in ("link", "iframe", "object", "base", "form")]
        for _, attributes in read.elements:
            for name in ("src", "srcset", "href"):
                assert attributes.get(name, "#").startswith(("#", "data:image/"))
            assert not [name for name in attributes if name.startswith("on")]
        anchors = {a["href"][1:] for a in read.all("a")}
        ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
        assert anchors <= set(ids) and len(ids) == len(set(ids))


def test_only_its_own_script_may_run() -> None:
    text = report_html(**arguments(title=HOSTILE[0], classes=HOSTILE[:3]))
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    policy = next(meta["content"] for meta in Page(text).all("meta") if meta.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert text.index("Content-Security-Policy") < text.index("<style>")


@pytest.mark.parametrize("many", [False, True])
def test_names_from_outside_are_text(many: bool) -> None:
    given = (
        kinetics(k=50, videos=500)
        if many
        else arguments(classes=["a", "b", "c", "d"], confusion=np.eye(4, 5, dtype=int) * 3)
    )
    k = len(given["classes"])
    given["classes"] = [*HOSTILE, *given["classes"][4:]]
    given["confusion"][0, 1], given["confusion"][2, 3] = 70, 60
    given["failed"] = [(HOSTILE[number % 4], HOSTILE[1]) for number in range(given["confusion"][:, -1].sum())]
    given["worst"] = [worst(number, (number + 1) % 4, path=HOSTILE[number]) for number in range(4)]
    given["worst"][0] = dataclasses.replace(worst(path=HOSTILE[0], t=0), note=HOSTILE[1] + "!")
    given |= {"facts": {HOSTILE[0]: HOSTILE[2]}, "headline": {HOSTILE[3]: HOSTILE[0]}, "history": HOSTILE[0] + "?"}
    read = Page(report_html(**counted(**{**given, "title": HOSTILE[1]})))
    assert HOSTILE[1] + "!" in read.text and HOSTILE[0] + "?" in read.text
    assert len(read.all("script")) == 1
    assert set(HOSTILE) <= {row[0] for row in read.tables["classes sortable"]}
    assert len(read.tables["classes sortable"]) == k + 1
    for name in HOSTILE:
        assert name in read.text
    assert ["<script>alert(1)</script>", HOSTILE[1], "70"] == read.tables["table 0" if many else "table 1"][1][:3]


def test_bytes_of_file_names_that_are_not_text_are_shown_as_escapes() -> None:
    text = report_html(**arguments(worst=[worst(path="a\udcff\x00\x1b[31m\nb.mp4")], failed=[("\ud800", "\x9f")]))
    text.encode("utf-8")
    assert r"a\udcff\x00\x1b[31m" in text and r"\ud800" in text and r"\x9f" in text


def test_the_numbers_of_the_tables() -> None:
    read = page()
    assert read.tables["matrix small"] == [
        ["label ↓ predicted →", "a", "b", "c", "not scored"],
        ["a", "6", "3", "1", ""],
        ["b", "", "2", "2", "1"],
        ["c", "", "", "", ""],
    ]
    assert read.tables["table 1"] == [
        ["Label", "Taken for", "Videos", "Share"],
        ["a", "b", "3", "30.0 %"],
        ["b", "c", "2", "40.0 %"],
        ["a", "c", "1", "10.0 %"],
    ]
    assert read.tables["classes sortable"] == [
        ["Class", "Accuracy", "Right", "Videos", "Not scored", "Most often taken for"],
        ["b", "40.0 %", "2", "5", "1", "c (2)"],
        ["a", "60.0 %", "6", "10", "0", "b (3)"],
        ["c", "no videos", "0", "0", "0", "-"],
    ]
    assert read.tables["bins"] == [
        ["Confidence", "Mean", "Accuracy", "Videos"],
        ["0.0 - 33.3 %", "-", "-", "0"],
        ["33.3 - 66.7 %", "40.0 %", "50.0 %", "4"],
        ["66.7 - 100.0 %", "90.0 %", "60.0 %", "10"],
    ]
    assert read.tables["failures"][1] == ["bad.mp4", "moov atom not found"]
    assert "24.3 %" in read.text  # (4 * 0.1 + 10 * 0.3) / 14
    assert "1 could not be scored; they count as wrong." in " ".join(read.text.split())
    bars = re.findall(r'class="(right|lost)" style="width:([\d.]+)%"', report_html(**arguments()))
    assert bars == [("right", "40.00"), ("lost", "20.00"), ("right", "60.00"), ("lost", "0.00")]


def test_the_most_confident_error_comes_first_with_its_frames() -> None:
    generator = np.random.default_rng(0)
    frames = np.repeat(generator.integers(0, 256, (20, 1, 1, 3), dtype=np.uint8), 400, axis=1).repeat(300, axis=2)
    videos = [
        worst(probability=0.5, path="less.mp4", t=0),
        dataclasses.replace(worst(1, 2, 0.913, "sure.mp4"), frames=frames),
    ]
    read = page(worst=videos)
    assert read.text.index("sure.mp4") < read.text.index("less.mp4") and "No frames of it were given." in read.text
    gone = dataclasses.replace(videos[0], note="it is gone")
    assert "No frames: it is gone" in page(worst=[gone]).text and "were given" not in page(worst=[gone]).text
    assert "c 91.3 %" in read.text and "label: b" in read.text
    pictures = [image["src"] for image in read.all("img")]
    assert len(pictures) == 8
    for picture, t in zip(pictures, (0, 3, 5, 8, 11, 14, 16, 19), strict=True):
        shown = Image.open(io.BytesIO(base64.b64decode(picture.removeprefix("data:image/jpeg;base64,"))))
        assert shown.size == (120, 160)
        np.testing.assert_allclose(np.asarray(shown, int), np.broadcast_to(frames[t, 0, 0], (160, 120, 3)), atol=4)


def test_few_and_small_frames() -> None:
    assert [spread(count) for count in (1, 2, 8)] == [[0], [0, 1], list(range(8))]
    assert spread(9) == [0, 1, 2, 3, 5, 6, 7, 8] and spread(1000)[-1] == 999 and len(spread(1000)) == 8
    assert thumbnail(np.zeros((90, 320, 3), np.uint8)).shape == (45, 160, 3)
    frame = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    assert np.array_equal(thumbnail(frame), frame)  # none is enlarged


def test_a_large_matrix_is_a_picture_whose_pixels_are_the_shares() -> None:
    given = kinetics(k=50, videos=3000)
    read = Page(report_html(**given))
    confusion = given["confusion"]
    shares = confusion / confusion.sum(axis=1, keepdims=True)
    for source, name in ((read.all("img")[0]["src"], "light"), (read.all("source")[0]["srcset"], "dark")):
        image = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        pixels = np.asarray(image.convert("RGB"), float)
        depth = np.round(255 * np.sqrt(shares[:, :-1])) / 255
        channels = [np.interp(depth, (0, 0.5, 1), channel) for channel in zip(*SHADES[name], strict=True)]
        np.testing.assert_allclose(pixels, np.stack(channels, axis=-1), atol=0.5)
    rows = next(attributes["data-cells"] for _, attributes in read.elements if "data-cells" in attributes).split(";")
    cells = np.zeros((50, 50), int)
    for label, row in enumerate(rows):
        for cell in row.split(","):
            predicted, count = map(int, cell.split(":"))
            cells[label, predicted] = count
    np.testing.assert_array_equal(cells, confusion[:, :-1])


def test_kinetics_makes_a_small_page_soon() -> None:
    given, started = kinetics(), time.perf_counter()
    text = report_html(**given)
    assert len(text.encode()) < 1_500_000 and time.perf_counter() - started < 20
    assert len(Page(text).tables["classes sortable"]) == 401


def test_what_is_not_there_is_said() -> None:
    read = page(
        events=[],
        worst=[],
        headline={},
        facts={},
        classes=["only"],
        confusion=np.array([[0, 1]]),
        bins=np.zeros((15, 3)),
    )
    assert not read.all("svg") and not read.all("img")
    assert "No history: none was kept." in page(events=[], history="none was kept.").text
    assert "From a.jsonl; 1 line is none." in page(history="From a.jsonl; 1 line is none.").text
    for sentence in (
        "No history: there are no events",
        "No scored video is taken for another class.",
        "No video was scored, so there is nothing to draw.",
        "No wrong predictions to show.",
    ):
        assert sentence in read.text
    assert read.tables["classes sortable"][1] == ["only", "0.0 %", "0", "1", "1", "-"]
    partly = " ".join(page().text.split())
    assert "speed: train clips_per_s" in partly and "peak memory (GPU, or process on a CPU): train memory_gb." in partly
    assert "Not in the history: epoch top1, val top1." in partly
    counted = page(events=[{"event": "train", "epoch": 1, "loss": v} for v in (1.0, float("nan"))]).text
    assert "Left out, because not finite: 1 value." in counted
    assert "not scored" not in page(confusion=CONFUSION * [1, 1, 1, 0], failed=[]).text.lower()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"classes": ["a", "b"]}, r"confusion is \[3, 4\] for 2 classes; it must be \[2, 3\]"),
        ({"classes": [], "confusion": np.zeros((0, 1), int)}, "at least one class"),
        ({"confusion": CONFUSION / 2}, "it must be counts of videos"),
        ({"confusion": -CONFUSION}, "smallest -6; it must be counts of videos"),
        ({"failed": []}, "0 failed videos are named, the last column of confusion counts 1"),
        ({"bins": BINS[:, :2]}, r"bins are \[3, 2\]; they must be \[B, 3\]"),
        ({"bins": np.zeros((0, 3))}, r"bins are \[0, 3\]"),
        ({"bins": np.array([[40.0, 0.5, 4]])}, "from 0 to 1"),
        ({"bins": np.array([[np.nan, 0.5, 4]])}, "from 0 to 1"),
        ({"bins": np.array([[0.4, 0.5, 1.5]])}, "counts of videos"),
        ({"rows": class_rows(torch.from_numpy(CONFUSION))[:2]}, "rows must be one for each of the classes 0..2"),
        ({"rows": class_rows(torch.from_numpy(CONFUSION * 2))}, "with its number of videos in confusion"),
        ({"pairs": [(0, 1, 3), (1, 2, 3)]}, r"pairs hold \(1, 2, 3\), which is no cell of confusion"),
        ({"pairs": [(0, 3, 0)]}, r"pairs hold \(0, 3, 0\)"),
        ({"pairs": [(1, 1, 2)]}, r"pairs hold \(1, 1, 2\)"),
        ({"calibration_error": None}, "calibration_error is None; it must be None if and only if bins are empty"),
        ({"bins": np.zeros((15, 3)), "calibration_error": 0.0}, "calibration_error is 0.0"),
        ({"worst": [worst(label=3)]}, "x.mp4: label 3, predicted 1; they must be two numbers of 0..2"),
        ({"worst": [worst(label=1)]}, "label 1, predicted 1"),
        ({"worst": [worst(probability=97.0)]}, "x.mp4: probability 97.0; it must be from 0 to 1"),
        (
            {"worst": [dataclasses.replace(worst(), frames=np.zeros((3, 8, 8), np.uint8))]},
            r"x.mp4: frames are uint8 \[3, 8, 8\]; they must be uint8 \[T, H, W, 3\]",
        ),
        ({"worst": [dataclasses.replace(worst(), frames=np.zeros((2, 8, 8, 3)))]}, "frames are float64"),  # type: ignore[arg-type]
    ],
)
def test_values_that_do_not_agree(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report_html(**{**arguments(), **changes})


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")
@pytest.mark.parametrize("many", [False, True])
def test_in_a_browser_on_a_phone_s_width(many: bool, tmp_path: Path) -> None:
    """In a frame of a phone's width: nothing reaches out of the page, the console is silent, the script has run."""
    long = ["a_name_without_any_space_that_goes_on_and_on_and_on_and_on", *HOSTILE[:2]]
    given = kinetics() if many else arguments(classes=long, facts={"x": "/".join(["folder"] * 40)})
    inside = html.escape(report_html(**given))
    measure = (
        "const d = document.querySelector('iframe').contentDocument, e = d.documentElement;"
        "document.title = [e.scrollWidth - e.clientWidth, d.querySelectorAll('th button').length, d.title].join(' ')"
    )
    outside = tmp_path / "frame.html"
    outside.write_text(
        f'<meta charset="utf-8"><iframe width="390" height="800" style="border:0" srcdoc="{inside}"></iframe>'
        f"<script>onload = () => {{ {measure} }}</script>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    command = [str(CHROMIUM), *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", outside.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<title>0 6 a run</title>" in done.stdout, re.findall("<title>.*?</title>", done.stdout)
