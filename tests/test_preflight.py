"""What is checked before a run is queued: nothing that must fail is submitted, and each problem is printed once."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from octvideo import build, preflight
from octvideo.engine import checkpoint
from octvideo.launch import Request
from octvideo.preflight import Checks
from tests.launch.requests import CONFIG, error_of, write_lists
from tools import evaluate, run_net

SLURM = ["--slurm", "--dry-run"]


@pytest.fixture
def lists(tmp_path: Path) -> list[str]:
    return write_lists(tmp_path / "data")


def problems(request: Request, overrides: list[str]) -> list[str]:
    return Checks(request).problems(build.load_config(CONFIG, overrides))


def problem(overrides: list[str], **request: object) -> str:
    """Return the only problem of a configuration."""
    (found,) = problems(Request(slurm=True, **request), overrides)  # type: ignore[arg-type]
    return found


def saved(path: Path, **state: object) -> Path:
    torch.save({"format": checkpoint.FORMAT, "step": 3, "model": {"w": torch.zeros(1000)}, **state}, path)
    return path


def test_a_request_that_can_run_has_no_problem(lists: list[str], tmp_path: Path) -> None:
    init = ["TRAIN.INIT", str(saved(tmp_path / "init.pt"))]
    assert problems(Request(slurm=True), [*lists, *init, "DATA.NUM_WORKERS", "10"]) == []
    assert problems(Request(local=2), [*lists, *init, "DATA.NUM_WORKERS", "100"]) == []
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".octvideo-*"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "cannot be read"),
        ("", "the list is empty"),
        ("0.mp4\n", "train.txt:1: no label in '0.mp4'"),
        ("0.mp4 8\n", "train.txt:1: label 8 of '0.mp4' is outside 0..7"),
        ("0.mp4 0\n", "no video for 1, 2, 3, 4, 5, 6, 7"),
        (b"\xff\xfe 0\n", "train.txt:1: byte 0xff is not UTF-8"),
        ("".join(f"{label + 1}.mp4 {label}\n" for label in range(8)), "train.txt:8: no file"),
    ],
)
def test_a_list_that_cannot_be_used(lists: list[str], tmp_path: Path, text: str | bytes | None, expected: str) -> None:
    train = tmp_path / "data/train.txt"
    train.unlink()
    if text is not None:
        train.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = problem(lists)
    assert "DATA.TRAIN_LIST" in found and expected in found


def test_only_the_lists_that_a_run_reads_are_read(lists: list[str], tmp_path: Path) -> None:
    weights = ["TEST.CHECKPOINT", str(saved(tmp_path / "a.pt"))]
    (tmp_path / "data/train.txt").unlink()
    assert problems(Request(slurm=True), [*lists, *weights, "TRAIN.ENABLE", "False"]) == []
    (tmp_path / "data/val.txt").unlink()
    both = problems(Request(slurm=True), lists)
    assert [text.partition(":")[0] for text in both] == ["DATA.TRAIN_LIST", "DATA.VAL_LIST"]


def test_a_folder_of_images_is_counted(tmp_path: Path) -> None:
    config = "configs/imagenet/resnet50.yaml"
    for name in "ab":
        (tmp_path / name).mkdir()
    names = [
        "DATA.TRAIN_LIST",
        str(tmp_path),
        "TRAIN.VAL_PERIOD",
        "0",
        "TEST.ENABLE",
        "False",
        "OUTPUT_DIR",
        str(tmp_path),
    ]
    checks = Checks(Request(slurm=True))
    assert "2 class folders, but MODEL.NUM_CLASSES is 1000" in checks.problems(build.load_config(config, names))[0]
    assert checks.problems(build.load_config(config, [*names, "MODEL.NUM_CLASSES", "2"])) == []


def test_class_names_that_do_not_fit(lists: list[str], tmp_path: Path) -> None:
    (tmp_path / "data/labels.txt").write_text("a\nb\n")
    assert "labels.txt" in problem(lists) and "MODEL.NUM_CLASSES 8" in problem(lists)
    assert "cannot be read" in problem([*lists, "DATA.CLASS_NAMES", str(tmp_path / "none.txt")])


@pytest.mark.parametrize("key", ["TRAIN.INIT", "TRAIN.RESUME", "TEST.CHECKPOINT"])
def test_weights_that_cannot_be_read(lists: list[str], tmp_path: Path, key: str) -> None:
    path = tmp_path / "weights.pt"

    def found() -> str:
        text = problem([*lists, key, str(path), "TEST.ENABLE", "True"])
        assert text.startswith(f"{key}: ") and str(path) in text
        return text

    assert "no file" in found()
    path.write_bytes(b"weights")
    assert "not an intact checkpoint" in found()
    saved(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "not an intact checkpoint" in found()
    torch.save({"w": torch.zeros(3)}, path)
    assert "another project" in found() and "tools/inflate.py" in found()
    torch.save({"model": {}, "format": checkpoint.FORMAT}, path)
    assert "another project" in found()
    saved(path, format=checkpoint.FORMAT + 5)
    assert f"format {checkpoint.FORMAT + 5}" in found()
    torch.save([1, 2], path)
    assert "not a checkpoint of octvideo" in found()
    saved(path)
    assert problems(Request(slurm=True), [*lists, key, str(path)]) == []


def test_a_job_does_not_start_from_a_file_that_its_restarts_would_not_use(
    lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(tmp_path / "run", 7, {"model": {}}, keep=1)
    for resume in ("none", str(saved(tmp_path / "other.pt"))):
        error = error_of(capsys, *SLURM, *lists, "TRAIN.RESUME", resume)
        assert "holds checkpoints" in error and f"not TRAIN.RESUME {resume}; give TRAIN.RESUME auto" in error
    assert "holds checkpoints" in problems(Request(local=2), lists)[0]
    assert run_net.main(["--cfg", CONFIG, *SLURM, *lists, "TRAIN.RESUME", "auto", "TRAIN.INIT", "/nowhere"]) == 0


def test_nothing_to_test(lists: list[str]) -> None:
    assert "no checkpoint to test" in problem([*lists, "TRAIN.ENABLE", "False"])


def test_what_the_tasks_are_given(lists: list[str]) -> None:
    found = problem([*lists, "DATA.NUM_WORKERS", "16"], cpus_per_task=2)
    assert "DATA.NUM_WORKERS is 16" in found and "at most 2" in found and "--cpus-per-task 17" in found
    found = problem([*lists, "DEVICE", "cuda"], gpus_per_node=0)
    assert "DEVICE is cuda" in found and "--gpus-per-node is 0" in found
    assert "TRAIN.BATCH_SIZE 16 is not divisible by 7 processes; try 14" in problem(lists, gpus_per_node=7)
    (found,) = problems(Request(local=5), lists)
    assert "TRAIN.BATCH_SIZE 16 is not divisible by 5 processes; try 15" in found


def test_an_output_folder_that_cannot_be_written(
    lists: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    found = problem([*lists, "OUTPUT_DIR", str(tmp_path / "file/run")])
    assert found.startswith("OUTPUT_DIR") and f"{tmp_path / 'file'} is not a folder" in found
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert "read-only" in problem(lists, dry_run=True)
    monkeypatch.undo()

    def full(**options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preflight.tempfile, "TemporaryFile", full)
    assert "No space left on device" in problem(lists)
    assert problems(Request(slurm=True, dry_run=True), lists) == []  # which writes nothing


def test_checkpoints_that_do_not_fit_the_disk(
    lists: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = build.load_config(CONFIG, lists)
    size = 4 * build.cost(cfg, cfg.DATA.TRAIN_CROP).params * (2 + bool(cfg.TRAIN.EMA_DECAY))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, free=size - 1))
    assert "one checkpoint needs about" in problem(lists)
    kept = cfg.TRAIN.KEEP_CHECKPOINTS + 1  # the newest is written before the oldest is removed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, free=2 * kept * size))
    sweep = tmp_path / "sweep.txt"
    for tasks, warned in ((2, False), (3, True)):
        sweep.write_text("".join(f"SEED {seed}\n" for seed in range(tasks)))
        assert run_net.main(["--cfg", CONFIG, *SLURM, *lists, "--array-overrides", str(sweep)]) == 0
        assert ("warning: " in capsys.readouterr().err) == warned


def test_all_problems_of_all_tasks_at_once_and_equal_ones_once(
    lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data/train.txt").unlink()
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("SEED 1\nSEED -1\n# none\nSEED 2 TRAIN.INIT nope.pt\nSEED 3 DATA.NUM_WORKERS 16\n")
    error = error_of(capsys, *SLURM, "--cpus-per-task", "4", *lists, "--array-overrides", str(sweep))
    assert error.count("train.txt") == 1 and f"{sweep}, lines 1, 4, 5: DATA.TRAIN_LIST" in error
    for text in ("line 2: SEED is -1", "line 4: TRAIN.INIT", "line 5: DATA.NUM_WORKERS is 16"):
        assert text in error, error
    assert "4 problem(s)" in error


def test_a_list_that_all_tasks_share_is_read_once(lists: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = preflight.read_list, []
    monkeypatch.setattr(preflight, "read_list", lambda path, **options: calls.append(path) or read(path, **options))
    checks = Checks(Request(slurm=True))
    for seed in range(3):
        assert checks.problems(build.load_config(CONFIG, [*lists, "SEED", str(seed)])) == []
    assert len(calls) == 2


def test_a_sweep_shows_its_tasks_and_only_what_differs(
    lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text(f"SEED 1 TRAIN.EPOCHS 7\nSEED 2 OUTPUT_DIR {tmp_path}/other SOLVER.MILESTONES '[1, 2]'\n")
    assert run_net.main(["--cfg", CONFIG, *SLURM, *lists, "TRAIN.EPOCHS", "7", "--array-overrides", str(sweep)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("#!/bin/bash")
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.err.splitlines()]
    assert header == ["task", "OUTPUT_DIR", "SEED", "SOLVER.MILESTONES"]
    assert rows == [["0", f"{tmp_path}/run/0", "1", "[]"], ["1", f"{tmp_path}/other", "2", "[1, 2]"]]


def test_evaluate_checks_too(lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--cfg", CONFIG, "--checkpoint", str(tmp_path / "none.pt"), *SLURM, *lists]
    assert evaluate.main(command) == 2
    assert f"TEST.CHECKPOINT: no file '{tmp_path / 'none.pt'}'" in capsys.readouterr().err
    saved(tmp_path / "none.pt")
    assert evaluate.main(command) == 0
