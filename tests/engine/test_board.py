import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from octvideo.engine.board import Board


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(folder)).Reload()
    return [(s.step, s.value) for s in board.Scalars(name)]


def test_points_are_read_back_and_a_later_file_replaces_those_from_its_step_on(tmp_path: Path) -> None:
    for start, value in ((None, 1.0), (3, 2.0), (2, 4.0)):  # three files within a second
        board = Board(tmp_path, start)
        for step in range(start or 0, 5):
            board.add("train/loss", value, step, 100.0 + step)
        board.close()
    assert scalars(tmp_path, "train/loss") == [(0, 1.0), (1, 1.0), (2, 4.0), (3, 4.0), (4, 4.0)]
    assert [s.wall_time for s in EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")][:2] == [100.0, 101.0]


def test_a_new_file_is_read_last_when_the_clock_was_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    for hours in (5, 0):
        monkeypatch.setattr(time, "time", lambda hours=hours: now + 3600 * hours)
        board = Board(tmp_path, 1)
        board.add("a", float(hours), 1, now)
        board.close()
    assert scalars(tmp_path, "a") == [(1, 0.0)]


def test_a_full_disk_is_an_error_of_the_caller(tmp_path: Path) -> None:
    board = Board(tmp_path, None)
    board._records._writer.close()
    board._records._writer = Path("/dev/full").open("wb")  # noqa: SIM115
    board.add("a", 1.0, 1, 0.0)
    with pytest.raises(OSError, match="No space left"):
        board.flush()
    with pytest.raises(OSError, match="No space left"):
        board.close()
