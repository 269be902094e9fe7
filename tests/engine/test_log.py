import contextlib
import json
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from octvideo import streams
from octvideo.engine import log as log_module
from octvideo.engine.log import Log, duration, read_events, training_history
from octvideo.files import WriteError


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_line_per_event_and_the_same_numbers_in_tensorboard(tmp_path: Path) -> None:
    log = Log(tmp_path, main=True, step=0)
    log.event("train", 1, {"loss": 2.5, "name": "x"})
    log.event("train", 2, {"loss": 1.5})
    log.event("val", 2, {"top1": 50.0})
    log.close()
    lines = events(tmp_path)
    assert [(e["event"], e["step"]) for e in lines] == [("train", 1), ("train", 2), ("val", 2)]
    assert lines[0]["loss"] == 2.5 and lines[0]["name"] == "x" and lines[0]["time"] > 1.6e9
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in board.Scalars("train/loss")] == [(1, 2.5), (2, 1.5)]
    assert [s.value for s in board.Scalars("val/top1")] == [50.0]


def test_events_are_read_and_what_is_none_is_counted(tmp_path: Path) -> None:
    good = [{"event": "train", "loss": 2.5}, {"event": "val", "top1": 50.0}]
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(good[0]).encode(), b"[1, 2]", b"\xff\xfe", b"[" * 10**5, json.dumps(good[1]).encode()]
    path.write_bytes(b"\n".join([*lines, b'{"event": "train", "st']))  # killed while it wrote
    assert read_events(path) == (good, 4)
    path.write_bytes(b"")
    assert read_events(path) == ([], 0)


def test_the_first_folder_that_tells_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder, kind in zip(folders[1:], ("test", "train"), strict=True):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(json.dumps({"event": kind}) + "\n{")
    found = training_history(folders)
    assert found == (
        [{"event": "train"}],
        f"From {tmp_path}/c/metrics.jsonl; lines of it that cannot be read, left out: 1.",
    )
    none = f"no training is told of in {tmp_path}/a/metrics.jsonl or {tmp_path}/b/metrics.jsonl."
    assert training_history([*folders[:2], folders[0]]) == ([], none)

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(log_module, "read_events", refused)  # no permission stops root
    assert training_history(folders)[1].startswith(f"{tmp_path}/b/metrics.jsonl cannot be read ([Errno 13] Permission")


def test_going_on_from_a_step_forgets_what_a_dead_run_did_after_it(tmp_path: Path) -> None:
    log = Log(tmp_path, main=True, step=0)
    for step in range(1, 6):
        log.event("train", step, {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')  # killed while it wrote
    log = Log(tmp_path, main=True, step=3)
    log.event("train", 4, {"loss": 40.0})
    log.close()
    assert [(e["step"], e["loss"]) for e in events(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in board.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


@pytest.mark.parametrize("again", [(), ("epoch", "val"), ("test",), ("epoch", "val", "test")])
def test_events_that_will_be_repeated_are_removed_from_the_history_and_from_tensorboard(
    tmp_path: Path, again: tuple[str, ...]
) -> None:
    kinds = ("train", "epoch", "val", "test")
    log = Log(tmp_path, main=True, step=0)
    for kind in kinds:
        log.event(kind, 3, {"loss": 0.5})
        log.event(kind, 4, {"loss": 1.0})
    log.close()
    log = Log(tmp_path, main=True, step=4, again=again)
    for kind in again:
        log.event(kind, 4, {"loss": 1.0})
    log.close()
    assert sorted(e["event"] for e in events(tmp_path) if e["step"] == 4) == sorted(kinds)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for kind in kinds:
        assert [(s.step, s.value) for s in board.Scalars(f"{kind}/loss")] == [(3, 0.5), (4, 1.0)]


def test_noted_events_are_written_in_the_order_of_their_steps_before_the_next_event(tmp_path: Path) -> None:
    log = Log(tmp_path, main=True, step=0)
    log.note("nonfinite", 7, {})
    log.note("failed", 5, {"video": 1})
    log.note("failed", 7, {"video": 2})
    assert not (tmp_path / "metrics.jsonl").exists()
    log.event("train", 10, {})
    log.note("failed", 11, {})
    log.flush()
    found = [(e["event"], e["step"]) for e in events(tmp_path)]
    assert found == [("failed", 5), ("nonfinite", 7), ("failed", 7), ("train", 10), ("failed", 11)]


def test_a_clock_that_was_set_back_keeps_the_order_of_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for hours, steps in ((2, (1, 2)), (1, (2, 3)), (0, (3, 4))):
        monkeypatch.setattr(time, "time", lambda hours=hours: now + 3600 * hours)
        log = Log(tmp_path, main=True, step=steps[0] - 1)
        for step in steps:
            log.event("train", step, {"loss": float(10 * hours + step)})
        log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in board.Scalars("train/loss")] == [(1, 21.0), (2, 12.0), (3, 3.0), (4, 4.0)]


@pytest.mark.parametrize(
    "line", [b"\xff\xfe\x00", b"[" * 10**5, b"[1]", b'{"event": 1, "step": 1}', b'{"event": "x", "step": []}']
)
def test_lines_that_are_no_events_do_not_block_a_resume(tmp_path: Path, line: bytes, capsys) -> None:
    good = b'{"event": "train", "step": 1}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + line + b"\n" + good)
    Log(tmp_path, main=True, step=2).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == good + good
    assert "metrics.jsonl: 1 line(s)" in capsys.readouterr().out


def test_values_that_are_none_are_written_as_null_and_left_out_of_tensorboard(tmp_path: Path) -> None:
    log = Log(tmp_path, main=True, step=0)
    log.event("train", 1, {"loss": None})
    log.event("train", 2, {"loss": 1.5})
    log.close()
    assert [e["loss"] for e in events(tmp_path)] == [None, 1.5]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [s.step for s in board.Scalars("train/loss")] == [2]


def test_printed_lines_are_kept_in_log_txt_and_a_lost_stream_is_noted_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(streams, "lost", {})
    log = Log(tmp_path, main=True, step=0)
    log.say("first")
    full = Path("/dev/full").open("w")  # noqa: SIM115  # closing it raises the error again
    monkeypatch.setattr(sys, "stdout", full)
    log.say("second")
    log.say("third")
    monkeypatch.undo()
    with contextlib.suppress(OSError):
        full.close()
    lines = [line[20:] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines[0] == "first"
    assert lines[1] == "second"
    assert "standard output cannot be written" in lines[2]
    assert lines[3:] == ["third"]


def test_a_test_alone_leaves_the_history_alone(tmp_path: Path) -> None:
    log = Log(tmp_path, main=True, step=0)
    log.event("train", 9, {"loss": 1.0})
    log.close()
    log = Log(tmp_path, main=True)
    log.event("test", 3, {"top1": 1.0})
    log.close()
    assert [e["step"] for e in events(tmp_path)] == [9, 3]


def test_a_test_behind_a_line_that_a_kill_cut_off_keeps_its_own_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "step": 1}\n{"event": "tr')
    log = Log(tmp_path, main=True)
    log.event("test", 1, {"top1": 50.0})
    log.close()
    events, unread = read_events(tmp_path / "metrics.jsonl")
    assert [e["event"] for e in events] == ["train", "test"] and unread == 1


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = Log(tmp_path / "out", main=False, step=0)
    log.event("train", 1, {"loss": 1.0})
    log.close()
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_message_and_its_lines_are_written_later(tmp_path: Path, capsys) -> None:
    log = Log(tmp_path, main=True)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log.event("train", 1, {"loss": 2.5})
    log.event("train", 2, {"loss": 1.5})
    out = capsys.readouterr().out
    assert out.count("metrics.jsonl: cannot be written") == 1
    assert "No space left on device" in out
    with pytest.raises(WriteError, match=r"metrics\.jsonl: cannot be written .*No space left on device"):
        log.flush()
    (tmp_path / "metrics.jsonl").unlink()
    log.event("train", 3, {"loss": 0.5})
    assert [(e["step"], e["loss"]) for e in events(tmp_path)] == [(1, 2.5), (2, 1.5), (3, 0.5)]
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file/metrics\.jsonl: cannot be written"):
        Log(tmp_path / "file", main=True)


def test_duration() -> None:
    assert [duration(s) for s in (0, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]
