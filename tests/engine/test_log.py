import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from octvideo.engine import log as log_module
from octvideo.engine.log import Log, LogError, duration, read_events, training_history


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
    time.sleep(1)  # TensorBoard reads files in the order of their names: by second of start, then ".10" before ".9"
    log = Log(tmp_path, main=True, step=3)
    log.event("train", 4, {"loss": 40.0})
    log.close()
    assert [(e["step"], e["loss"]) for e in events(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in board.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_the_end_of_an_epoch_that_was_not_saved_is_said_again(tmp_path: Path) -> None:
    for in_epoch, kept in ((True, ["train"]), (False, ["train", "epoch", "val"])):
        log = Log(tmp_path / str(in_epoch), main=True, step=0)
        for kind in ("train", "epoch", "val"):
            log.event(kind, 4, {"loss": 1.0})
        log.close()
        Log(tmp_path / str(in_epoch), main=True, step=4, in_epoch=in_epoch).close()
        assert [e["event"] for e in events(tmp_path / str(in_epoch))] == kept


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


def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    log = Log(tmp_path, main=True)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(LogError, match="the run's history cannot be written .*No space left on device.*not harmed"):
        log.event("train", 1, {"loss": 2.5})
    (tmp_path / "file").touch()
    with pytest.raises(LogError, match="file: the run's history cannot be written"):
        Log(tmp_path / "file", main=True)


def test_duration() -> None:
    assert [duration(s) for s in (0, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]
