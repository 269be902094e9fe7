"""A run on a small file system that fills up, or becomes read-only: one message, earlier checkpoints stay, it resumes."""

import contextlib
import io
import os
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from datasets import motion
from octvideo.engine import checkpoint
from octvideo.jobs import training
from tests.torture.compare import history
from tools import run_net

ROOT = Path(__file__).parents[2]


def mount(folder: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB: two checkpoints of this network (4.8 MB) fit, three do not."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() or not mount(folder, "size=12m"):
        pytest.skip("no file system can be mounted here: needs root and permission to mount tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("motion") / "data"
    motion.make(folder, motion.Settings(train=1, val=1, size=48), workers=1)
    return folder


def run(data: Path, out: Path, *more: str) -> tuple[int, str]:
    lists = f"DATA.TRAIN_LIST {data}/train.txt DATA.VAL_LIST {data}/val.txt DATA.PREFIX {data} OUTPUT_DIR {out}"
    small = (
        "DATA.TRAIN_SHORT_SIDE [36,40] DATA.TRAIN_CROP 32 DATA.TEST_SHORT_SIDE 36 DATA.TEST_CROP 32 DATA.NUM_FRAMES 4"
    )
    train = "TRAIN.BATCH_SIZE 4 TRAIN.EPOCHS 4 TRAIN.VAL_PERIOD 0 TRAIN.CHECKPOINT_PERIOD 1 TRAIN.LOG_PERIOD 1"
    rest = "NUM_THREADS 1 DATA.NUM_WORKERS 0 SOLVER.WARMUP_EPOCHS 1 DEVICE cpu TEST.ENABLE False TRAIN.RESUME auto"
    words = [word for line in (lists, small, train, rest) for word in line.split()]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), warnings.catch_warnings():
        warnings.simplefilter("error")  # an intact checkpoint is found without one
        status = run_net.main(["--cfg", str(ROOT / "configs/motion/oct_i3d_tiny.yaml"), *words, *more])
    return status, text.getvalue()


def test_a_full_disk_ends_the_run_with_one_message_and_it_resumes_when_there_is_room(
    data: Path, small: Path, tmp_path: Path
) -> None:
    status, text = run(data, small / "run")
    assert status == 1
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "checkpoint_0000000" in error
    assert "No space left on device" in error or "MB are free there" in error
    assert "Traceback" not in text
    kept = checkpoint.found(small / "run")
    assert kept
    for path in kept:
        checkpoint.load(path)
    assert not list((small / "run").glob(".*.tmp"))
    assert mount_again(small, "size=64m")
    assert run(data, small / "run")[0] == 0
    assert run(data, tmp_path / "undisturbed")[0] == 0
    here, there = (checkpoint.latest(folder)[1] for folder in (small / "run", tmp_path / "undisturbed"))
    assert all(torch.equal(value, there["model"][name]) for name, value in here["model"].items())
    assert history(small / "run") == history(tmp_path / "undisturbed")


def mount_again(folder: Path, options: str) -> bool:
    return subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], capture_output=True).returncode == 0


def test_a_disk_that_is_full_for_a_while_costs_nothing(
    data: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two checkpoints the lines of the log are kept in memory until there is room."""
    ballast, after_step = small / "ballast", training._Run.after_step

    def filled(run: training._Run, profiler: object) -> None:
        if run.progress.step == 1:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 16))
        if run.progress.step == 22:  # the lines in between do not fit into the last page of the file
            ballast.unlink()
        after_step(run, profiler)  # type: ignore[arg-type]

    monkeypatch.setattr(training._Run, "after_step", filled)
    more = ["TRAIN.EPOCHS", "3", "TRAIN.CHECKPOINT_PERIOD", "3", "TRAIN.KEEP_CHECKPOINTS", "1", "TRAIN.BATCH_SIZE", "1"]
    status, text = run(data, small / "run", *more)
    assert status == 0, text
    assert text.count("kept in memory until it can be written") == 1
    assert [event["step"] for event in history(small / "run") if event["event"] == "train"] == list(range(1, 25))


def test_a_disk_that_becomes_read_only_is_one_message(data: Path, small: Path) -> None:
    assert run(data, small / "run", "TRAIN.EPOCHS", "1", "SOLVER.WARMUP_EPOCHS", "0")[0] == 0
    assert mount_again(small, "ro")
    status, text = run(data, small / "run")
    assert status == 1
    assert text.startswith("error: ")
    assert "Read-only file system" in text
    assert len(text.splitlines()) == 1
