"""Replaced clips: logged once per file, at the step that used them, also after a resume."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from octvideo.engine import failures
from octvideo.engine.failures import BudgetError, FailureBudget
from octvideo.engine.log import Log


@dataclass
class Failed:
    video: int

    @property
    def reason(self) -> str:
        return f"train.txt:{self.video + 1}: {self.video}.mp4: cut\nshort"

    @property
    def trace(self) -> str:
        return f"Traceback: of {self.video}\n\n  cause\n"


def events(folder: Path) -> list[tuple[int, int]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(event["step"], event["video"]) for event in lines if event["event"] == "failed"]


def entries(*videos: int) -> str:
    line = "train.txt:{}: {}.mp4: cut short\n  Traceback: of {}\n  \n    cause\n"
    return "".join(line.format(video + 1, video, video) for video in videos)


@pytest.mark.parametrize("shares", [(9,), (3, 9), (1, 2, 3, 4, 5, 6, 7, 8, 9)])
def test_events_are_at_the_steps_of_their_batches_whenever_they_are_shared(
    tmp_path: Path, shares: tuple[int, ...]
) -> None:
    log = Log(tmp_path, main=True, step=0)
    budget = FailureBudget(100, log, tmp_path / "failed.txt")
    for step, video in ((2, 5), (3, 1), (4, 5), (7, 0)):
        budget.add([Failed(video)], step)
        for share in shares:
            if share == step:
                budget.share(step)
    budget.share(9)
    log.flush()
    assert events(tmp_path) == [(2, 5), (3, 1), (7, 0)]
    assert (tmp_path / "failed.txt").read_text() == entries(5, 1, 0)
    assert budget.counts == {5: 2, 1: 1, 0: 1}


def test_failures_of_several_ranks_are_in_the_order_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tmp_path, main=True, step=0)
    budget = FailureBudget(100, log, tmp_path / "failed.txt")
    monkeypatch.setattr(failures, "gather_objects", lambda own: [[(5, Failed(1))], [(3, Failed(2)), (5, Failed(0))]])
    budget.share(6)
    log.flush()
    assert events(tmp_path) == [(3, 2), (5, 1), (5, 0)]


def test_a_resume_keeps_what_the_checkpoint_knows_and_a_start_from_scratch_nothing(tmp_path: Path) -> None:
    log, file = Log(tmp_path, main=True, step=0), tmp_path / "failed.txt"
    budget = FailureBudget(100, log, file)
    budget.add([Failed(4), Failed(2)], 1)
    budget.share(1)
    state = budget.state_dict()
    budget.add([Failed(7)], 2)
    budget.share(2)  # and the process is killed
    assert file.read_text() == entries(4, 2, 7)
    resumed = FailureBudget(100, log, file)
    resumed.load_state_dict(state)
    assert file.read_text() == entries(4, 2)
    resumed.add([Failed(7), Failed(2)], 2)
    resumed.share(2)
    assert file.read_text() == entries(4, 2, 7)
    FailureBudget(100, log, file).start()
    assert not file.exists()


def test_a_spent_budget_names_the_worst_files(tmp_path: Path) -> None:
    budget = FailureBudget(2, Log(tmp_path, main=True, step=0), tmp_path / "failed.txt")
    budget.add([Failed(3), Failed(3)], 1)
    with pytest.raises(
        BudgetError, match=r"(?s)3 clips .*by step 2; DATA.MAX_FAILED_FRACTION allows 2.*3\.mp4.*\(3 x\)"
    ):
        budget.add([Failed(3)], 2)
