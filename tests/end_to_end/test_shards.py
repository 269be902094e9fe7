"""A list of files and a list of shards of the same videos give the same clips for the same seed."""

from pathlib import Path

import pytest
import torch

from datasets import kinetics, motion
from octvideo.data.dataset import EvalDataset, TrainDataset
from octvideo.data.lists import ListError, read_list
from octvideo.data.loader import Loader, TrainBatches


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    files, shards = tmp_path_factory.mktemp("data") / "files", tmp_path_factory.mktemp("data") / "shards"
    motion.make(files, motion.Settings(train=2, val=1), workers=1)
    command = ["shards", "--list", f"{files}/train.txt", "--prefix", str(files), "--out", str(shards)]
    assert kinetics.main([*command, "--shard-mb", "1", "--workers", "1"]) == 0
    return files, shards


def train_set(folder: Path) -> TrainDataset:
    return TrainDataset(
        read_list(f"{folder}/train.txt", num_classes=8, prefix=str(folder), require_all_classes=True),
        num_frames=4,
        sampling_rate=3,
        target_fps=0,
        short_side=(64, 72),
        crop=56,
        flip=True,
        seed=5,
    )


def test_training_clips_are_the_same_in_order_and_at_random(folders: tuple[Path, Path]) -> None:
    files, shards = map(train_set, folders)
    assert len(files) == len(shards) == 16 and files.videos.labels.tolist() == shards.videos.labels.tolist()
    for index in (*range(16), 11, 3, 7):
        ours, theirs = files[1, index], shards[1, index]
        assert not ours.error and not theirs.error, theirs.error
        assert torch.equal(ours.clips, theirs.clips)
    batches = [TrainBatches(16, global_batch=4, seed=5) for _ in range(2)]
    loaders = [
        Loader(s, b, path_of=s.videos.path, num_workers=1) for s, b in zip((files, shards), batches, strict=True)
    ]
    for ours, theirs in zip(*loaders, strict=True):
        assert torch.equal(ours.clips, theirs.clips) and torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_test_views_are_the_same(folders: tuple[Path, Path], decoder: str) -> None:
    if decoder == "decord":
        pytest.importorskip("decord", reason="decord has no wheels for this platform")
    views = [
        EvalDataset(
            read_list(f"{folder}/train.txt", num_classes=8, prefix=str(folder)),
            num_frames=4,
            sampling_rate=3,
            target_fps=0,
            num_clips=2,
            num_crops=3,
            short_side=64,
            crop=56,
            decoder=decoder,
        )
        for folder in folders
    ]
    assert torch.equal(views[0][9].clips, views[1][9].clips)


def test_a_shard_that_is_gone_is_said_before_the_first_clip(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text((folders[1] / "train.txt").read_text())
    with pytest.raises(
        ListError, match=r"16 problem\(s\) .*\n.*train.txt:1: no file '.*/train-00000.tar:\d+:\d+:train/left"
    ):
        read_list(str(tmp_path / "train.txt"), num_classes=8, prefix=str(tmp_path))
