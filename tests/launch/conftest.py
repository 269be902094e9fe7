"""What requests for a place to run need: an environment without ranks, lists of files that exist, and a SLURM of stubs."""

import os
from pathlib import Path

import pytest

from tests.launch.requests import write_lists


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)


@pytest.fixture
def lists(tmp_path: Path) -> list[str]:
    """Overrides that name lists of the motion set's eight classes; no file in them is a video."""
    return write_lists(tmp_path / "data")


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH, with a squeue that prints the file `state`, and a scontrol that notes its calls."""
    for name, text in (("squeue", f'cat "{tmp_path}/state"'), ("scontrol", f'echo "$@" >> "{tmp_path}/called"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path
