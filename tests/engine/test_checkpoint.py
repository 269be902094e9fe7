import os
import pickle
import resource
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from octvideo.engine import checkpoint
from octvideo.engine.checkpoint import CheckpointError
from octvideo.files import WriteError


def state(value: float = 1.0) -> dict:
    return {"model": {"w": torch.full((3,), value)}, "epoch": 2, "random": [{"cpu": torch.get_rng_state()}]}


def test_round_trip_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 20, 100):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert [p.name for p in checkpoint.found(tmp_path)] == ["checkpoint_00000020.pt", "checkpoint_00000100.pt"]
    path, loaded = checkpoint.latest(tmp_path)
    assert path.name == "checkpoint_00000100.pt"
    assert (loaded["step"], loaded["epoch"]) == (100, 2)
    assert torch.equal(loaded["model"]["w"], torch.full((3,), 100.0))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage", "bits"])
def test_a_broken_newest_one_is_skipped_by_name(tmp_path: Path, damage: str) -> None:
    checkpoint.save(tmp_path, 1, state(1), keep=5)
    newest = checkpoint.save(tmp_path, 2, {**state(2), "big": torch.randn(5000)}, keep=5)
    content = bytearray(newest.read_bytes())
    if damage == "bits":
        content[len(content) // 2] ^= 0xFF  # inside the tensor, which torch.load alone would not notice
    newest.write_bytes(
        {"truncate": content[: len(content) // 2], "empty": b"", "garbage": b"<html>" * 100, "bits": content}[damage]
    )
    with pytest.warns(UserWarning, match="skipped a broken checkpoint.*checkpoint_00000002.pt"):
        path, loaded = checkpoint.latest(tmp_path)
    assert path.name == "checkpoint_00000001.pt" and loaded["step"] == 1


def test_all_broken_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 1, state(), keep=1).write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="all 1 checkpoints are broken"):
        checkpoint.latest(tmp_path)


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("pwned",)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    torch.save({"format": 1, "model": Evil()}, path)
    with pytest.raises(CheckpointError, match="evil.pt: not a checkpoint of tensors and plain values"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="evil.pt: not a"):
        checkpoint.load(path)
    assert not Path("pwned").exists()


def test_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "none.pt")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of octvideo"):
        checkpoint.load(tmp_path / "other.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as file:
        file.writestr("a", "b")
    with pytest.raises(CheckpointError, match="zip.pt: not a whole checkpoint"):
        checkpoint.load(tmp_path / "zip.pt")


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: the write stops half-way with an OS error."""
    checkpoint.save(tmp_path, 1, state(), keep=1)
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(WriteError, match="checkpoint_00000002.pt: cannot be written"):
            checkpoint.save(tmp_path, 2, {"model": {"w": torch.zeros(100_000)}}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_00000001.pt"]
    assert checkpoint.latest(tmp_path)[1]["step"] == 1


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_new_checkpoint_is_never_removed_and_corrupt_ones_do_not_count(tmp_path: Path, keep: int) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, state(step), keep=3)
    for step in (2, 9, 10, 11):
        checkpoint.path_of(tmp_path, step).write_bytes(b"corrupt")
    checkpoint.save(tmp_path, 8, state(8), keep=keep)
    left = [checkpoint.step_of(path) for path in checkpoint.found(tmp_path)]
    assert left == [*{1: [2], 2: [2, 3], 3: [1, 2, 3]}[keep], 8, 9, 10, 11]
    with pytest.warns(UserWarning):
        assert checkpoint.latest(tmp_path)[1]["step"] == 8
    moved = checkpoint.set_aside(tmp_path, 8)
    assert [path.name for path in moved] == [f"checkpoint_{step:08d}.pt.corrupt" for step in (9, 10, 11)]
    checkpoint.save(tmp_path, 9, state(9), keep=1)
    assert [checkpoint.step_of(path) for path in checkpoint.found(tmp_path)] == [2, 9]


class Net(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Module()
        self.head.fc = nn.Linear(4, classes)


def test_load_weights() -> None:
    source, target = Net(5), Net(5)
    checkpoint.load_weights(target, source.state_dict(), Path("a.pt"))
    assert torch.equal(target.head.fc.weight, source.head.fc.weight)


def test_another_class_count_is_an_error_with_the_remedy_unless_a_new_head_is_asked_for() -> None:
    source, target = Net(5), Net(6)
    with pytest.raises(CheckpointError, match="2 of 4 entries") as caught:
        checkpoint.load_weights(target, source.state_dict(), Path("a.pt"))
    assert "head.fc.weight: (5, 4) in the file, (6, 4) in the network" in str(caught.value)
    assert "TRAIN.NEW_HEAD True" in str(caught.value)
    checkpoint.load_weights(target, source.state_dict(), Path("a.pt"), new_head=True)
    assert torch.equal(target.body.weight, source.body.weight)


@pytest.mark.parametrize("new_head", [False, True])
def test_anything_else_missing_or_unexpected_is_an_error(new_head: bool) -> None:
    weights = Net(5).state_dict()
    weights["body.scale"] = weights.pop("body.bias")
    with pytest.raises(CheckpointError, match="2 of 4 entries") as caught:
        checkpoint.load_weights(Net(5), weights, Path("a.pt"), new_head=new_head)
    assert "missing     body.bias (4,)" in str(caught.value)
    assert "unexpected  body.scale (4,)" in str(caught.value)
    assert "NEW_HEAD" not in str(caught.value)
