import contextlib
import io
import json
from pathlib import Path

from tools import results


def finished(folder: Path) -> Path:
    folder.mkdir()
    test = {"top1": 93.75, "videos_scored": 15, "videos_listed": 16, "views": 30, "macs": 70_000_000, "params": 595_186}
    (folder / "test.json").write_text(json.dumps({**test, "clips_per_s": 120.4}))
    events = [{"event": "epoch", "clips_per_s": speed} for speed in (10.0, 70.0, 72.0)] + [{"event": "val"}]
    events += [{"event": "train", "step": step, "loss": 2.0 - step / 10} for step in range(1, 16)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def main(*folders: Path | str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = results.main([str(folder) for folder in folders])
    return status, out.getvalue(), err.getvalue()


def test_one_row_per_run(tmp_path: Path) -> None:
    status, out, _ = main(finished(tmp_path / "a"), finished(tmp_path / "b"))
    lines = out.splitlines()
    assert status == 0 and len(lines) == 4
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["a", "93.8", "15 of 16", "30", "0.0700", "0.595", "70", "120"]


def test_a_run_without_a_test_is_named(tmp_path: Path) -> None:
    status, out, err = main(finished(tmp_path / "a"), tmp_path / "b")
    assert status == 1 and out == "" and "b/test.json: no such file" in err


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    folder = finished(tmp_path / "a")
    (folder / "test.json").write_text("{}")
    status, _, err = main(folder)
    assert status == 1 and "is not what run_net.py writes" in err


def test_losses_are_means_over_the_ten_steps_that_end_there(tmp_path: Path) -> None:
    status, out, _ = main(finished(tmp_path / "a"), "--losses", "1", "12", "40")
    assert status == 0
    assert [cell.strip() for cell in out.splitlines()[0].strip("|").split("|")][1:] == [
        "loss at step 1",
        "loss at step 12",
        "loss at step 40",
    ]
    assert [cell.strip() for cell in out.splitlines()[2].strip("|").split("|")] == ["a", "1.900", "1.250", "-"]
