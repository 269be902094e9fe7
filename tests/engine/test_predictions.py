"""One predictions.json for several calls."""

import json
from pathlib import Path
from typing import Any

import pytest

from octvideo.engine.predictions import Predictions

HEADER = {"model": "i3d", "alpha": 0.25, "input": {"mean": (0.5, 0.5)}}


def entry(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "file": str(Path(path).resolve()), "name": Path(path).stem, **more}


def paths(file: Path, key: str = "videos") -> list[str]:
    return [found["path"] for found in json.loads(file.read_text())[key]]


def test_files_of_one_name_get_names_of_their_own(tmp_path: Path) -> None:
    predictions = Predictions(tmp_path / "p.json", HEADER)
    files = ["a/x.mp4", "b/x.mp4", "x_2.avi", "c/x.mkv", "x.tar.mp4", "a/x.mp4"]
    assert predictions.output_names(files) == ["x", "x_2", "x_2_2", "x_3", "x.tar", "x_4"]


def test_a_file_keeps_its_name_and_others_do_not_get_it(tmp_path: Path) -> None:
    Predictions(tmp_path / "p.json", HEADER).write([entry("a/x.mp4", name="x"), entry("b/x.mp4", name="x_2")], [])
    later = Predictions(tmp_path / "p.json", HEADER)
    assert later.output_names(["c/x.mp4", "./b/x.mp4", "b/../a/x.mp4"]) == ["x_3", "x_2", "x"]


def test_entries_are_merged_by_file(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    assert Predictions(file, HEADER).write([entry("a.mp4", n=1), entry("b.mp4", n=1)], [{"path": "c.mp4"}]) == []
    notes = Predictions(file, HEADER).write([entry("./b.mp4", n=2), entry("c.mp4", n=2)], [{"path": "d.mp4"}])
    assert paths(file) == ["a.mp4", "./b.mp4", "c.mp4"] and paths(file, "failed") == ["d.mp4"]
    assert [found["n"] for found in json.loads(file.read_text())["videos"]] == [1, 2, 2]
    assert len(notes) == 2 and "of 1 file" in notes[0] and "1 more from earlier calls" in notes[1]
    notes = Predictions(file, HEADER).write([], [{"path": "a.mp4"}])
    assert paths(file) == ["./b.mp4", "c.mp4"] and paths(file, "failed") == ["d.mp4", "a.mp4"]


def test_two_calls_at_the_same_time(tmp_path: Path) -> None:
    one, other = Predictions(tmp_path / "p.json", HEADER), Predictions(tmp_path / "p.json", HEADER)
    one.write([entry("a.mp4")], [])
    other.write([entry("b.mp4")], [])
    assert paths(tmp_path / "p.json") == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({**HEADER, "alpha": 0.5, "videos": [], "failed": []}),
        json.dumps({**HEADER, "videos": [{"no": "path"}], "failed": []}),
        json.dumps({**HEADER, "videos": 3}),
        json.dumps([1]),
        "not json",
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_file_of_other_content_is_kept_under_another_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "p.json"
    (tmp_path / "p_1.json").write_text("taken")
    file.write_bytes(text.encode(errors="surrogateescape"))
    before = file.read_bytes()
    (note,) = Predictions(file, HEADER).write([entry("a.mp4")], [])
    assert f"kept as {tmp_path}/p_2.json" in note and (tmp_path / "p_2.json").read_bytes() == before
    assert paths(file) == ["a.mp4"] and (tmp_path / "p_1.json").read_text() == "taken"
