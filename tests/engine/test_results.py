import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octvideo.engine.results import NO_VIEW, Results, results_of, view_facts
from octvideo.engine.scores import ViewScores, aggregate


def scores(logits: list[list[float]], labels: list[int], **more: object) -> ViewScores:
    """One view of each of the first videos; those behind have none."""
    count = len(logits)
    place = torch.zeros(count, dtype=torch.int64)
    rows = torch.tensor(logits).reshape(count, 3)
    names = [f"{index}.mp4" for index in range(len(labels))]
    given = {"num_clips": 1, "num_crops": 1, "names": names, **more}
    return ViewScores(rows, torch.arange(count), place, place, torch.tensor(labels), **given)  # type: ignore[arg-type]


def found(views: ViewScores) -> Results:
    return results_of(views, aggregate(views), view_facts(1, 1, "softmax"))


def rows_of(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_text())))


def test_files(tmp_path: Path) -> None:
    views = scores(
        [[5, 0, 0], [5, 0, 0], [0, 0, 5]],
        [0, 1, 2, 2, 1],
        failed=[(3, "list.txt:4: no frames")],
        classes=["a, b", "\x1b[31mred", "c"],
        facts={"prefix": "videos", "top1": 100.0},
    )
    found(views).write(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    report = json.loads((folder / "test.json").read_text())
    assert (report["top1"], report["videos_scored"], report["videos_listed"]) == (40.0, 3, 5)
    assert report["mean_class_accuracy"] == pytest.approx(100 * (1 + 0 + 1 / 2) / 3)
    assert report["failed"] == [
        {"path": "videos/3.mp4", "reason": "list.txt:4: no frames"},
        {"path": "videos/4.mp4", "reason": NO_VIEW},
    ]
    assert (folder / "test_failed.txt").read_text() == f"videos/3.mp4\tlist.txt:4: no frames\nvideos/4.mp4\t{NO_VIEW}\n"
    assert rows_of(folder / "classes.csv")[1:] == [
        ["0", "a, b", "1", "1", "1", "100.0000", "", "0"],
        ["1", r"'\x1b[31mred'", "2", "1", "0", "0.0000", "a, b", "1"],
        ["2", "c", "2", "1", "1", "50.0000", "", "0"],
    ]
    assert rows_of(folder / "confusion.csv") == [
        ["label", "a, b", r"'\x1b[31mred'", "c", "not scored"],
        ["a, b", "1", "0", "0", "0"],
        [r"'\x1b[31mred'", "1", "0", "0", "1"],
        ["c", "0", "0", "1", "1"],
    ]


@pytest.mark.parametrize(
    "name", ["=1+1", "+a", "-2", "@SUM(A1)", " =b", "\uff1d1", "=cmd|' /C calc'!A0", '=HYPERLINK("x")']
)
def test_a_name_is_no_formula_of_a_spreadsheet(tmp_path: Path, name: str) -> None:
    found(scores([[0, 5, 0]], [0], classes=[name, "b = c", "d"])).write(tmp_path)
    assert [row[1] for row in rows_of(tmp_path / "classes.csv")[1:]] == [f"'{name}", "b = c", "d"]
    header, *rows = rows_of(tmp_path / "confusion.csv")
    assert header == ["label", f"'{name}", "b = c", "d", "not scored"] and rows[0][0] == f"'{name}"
    assert json.loads((tmp_path / "test.json").read_text())["top1"] == 0


def test_nothing_scored_is_a_report_too(tmp_path: Path) -> None:
    results = found(scores([], [0, 2]))
    results.write(tmp_path)
    report = json.loads((tmp_path / "test.json").read_text())
    assert report["top1"] == report["mean_class_accuracy"] == 0.0 and report["calibration_error"] is None
    assert len(report["failed"]) == 2 and "| 0 of 2" in results.summary() and "most confused" not in results.summary()
    assert rows_of(tmp_path / "classes.csv")[2] == ["1", "1", "0", "0", "0", "", "", "0"]  # no video, no accuracy


def test_the_summary() -> None:
    results = found(scores([[5, 0, 0], [5, 0, 0], [5, 0, 0], [0, 5, 0]], [1, 1, 0, 2]))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in results.summary().splitlines()]
    assert lines[2][:3] == ["25.00", "100.00", "33.33"] and lines[2][4:] == ["4 of 4", "1", "softmax"]
    assert lines[6:8] == [["1", "2", "0", "0.0", "0 (2)"], ["2", "1", "0", "0.0", "1 (1)"]]
    assert lines[11:] == [["1", "0", "2"], ["2", "1", "1"]]
    averaged = results.averaged._replace(complete=torch.tensor([True, False, True, False]))
    assert "2 videos lack some of their views" in replace(results, averaged=averaged).summary()


def test_all_right_leaves_no_table_of_mistakes() -> None:
    results = found(scores([[5, 0, 0], [0, 5, 0]], [0, 1]))
    assert len(results.summary().splitlines()) == 3 and results.worst(5) == []


def test_the_worst_are_scored_and_wrong_and_sure() -> None:
    """The first is right, the last has no scores; equal scores are wrong; of equally sure ones the first is first."""
    logits = [[9.0, 0, 0], [0, 1, 0], [0, 0, 4], [0, 4, 0], [2, 2, 0]]
    results = found(scores(logits, [0, 2, 0, 2, 1, 1]))
    expected = [(2, 2), (3, 1), (1, 1), (4, 0)]
    assert [(video, taken) for video, taken, _ in results.worst(9)] == expected
    shares = torch.tensor(logits, dtype=torch.float64).softmax(dim=1)
    assert [share for *_, share in results.worst(9)] == pytest.approx([float(shares[v, k]) for v, k in expected])
    assert results.worst(2) == results.worst(9)[:2]
