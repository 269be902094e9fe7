"""A job that is followed: its states, logs and failures."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from octvideo.launch import follow


def test_a_job_is_followed_through_a_restart_to_its_failure(
    shell: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (shell / "squeue").write_text(  # each call takes a line
        f'#!/bin/sh\nhead -n 1 "{shell}/state"\n[ $(wc -l < "{shell}/state") = 1 ] || sed -i 1d "{shell}/state"\n'
    )
    states = ["PENDING", "RUNNING", "COMPLETING", "PENDING", "RUNNING", "FAILED"]
    (shell / "state").write_text("".join(f"7|{state}\n" for state in states))
    (tmp_path / "7_0_log.out").write_text("step 4\n")
    (tmp_path / "7_1_log.err").write_text("Traceback\nValueError: no\n")
    (tmp_path / "7_1_failed").write_text("1")
    clock = itertools.count(0, 3)
    monkeypatch.setattr(follow, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    assert follow.follow_job("7", tmp_path, 1) == 1
    said = capsys.readouterr()
    assert [line for line in said.out.splitlines() if line.startswith("job")] == [f"job 7: {s.lower()}" for s in states]
    assert "step 4\n" in said.out and "job 7: rank 1 failed" in said.err and "ValueError: no" in said.err
