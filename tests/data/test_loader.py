import gc
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from octvideo.data.dataset import Batch, EvalDataset, Replacing, Sample, TrainDataset
from octvideo.data.lists import VideoList, read_list
from octvideo.data.loader import EvalBatches, Loader, LoaderError, TrainBatches


def batches_of(num_videos: int, **arguments: Any) -> list[list[tuple[int, int]]]:
    return list(TrainBatches(num_videos, **arguments))


# ---- which videos


def test_an_epoch_is_a_permutation_without_its_incomplete_end() -> None:
    batches = batches_of(11, global_batch=4, seed=0)
    assert [len(batch) for batch in batches] == [4, 4]
    keys = [key for batch in batches for key in batch]
    assert {epoch for epoch, _ in keys} == {0}
    assert len({index for _, index in keys}) == 8
    assert {index for _, index in keys} <= set(range(11))


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_global_batch_is_the_same_at_any_world_size(world_size: int) -> None:
    alone = batches_of(40, global_batch=12, seed=5)
    ranks = [batches_of(40, global_batch=12, seed=5, rank=r, world_size=world_size) for r in range(world_size)]
    assert [[*chain(*parts)] for parts in zip(*ranks, strict=True)] == alone


def test_epochs_and_seeds_differ_and_repeat() -> None:
    before = torch.get_rng_state()
    batches = TrainBatches(30, global_batch=5, seed=0)
    epochs = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        epochs.append([[index for _, index in batch] for batch in batches])
    assert epochs[0] == epochs[2]
    assert epochs[0] != epochs[1]
    assert [[index for _, index in batch] for batch in batches_of(30, global_batch=5, seed=1)] != epochs[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_resumes_in_the_middle() -> None:
    batches = TrainBatches(30, global_batch=5, seed=0, rank=0, world_size=1)
    batches.set_epoch(3)
    whole = list(batches)
    batches.set_epoch(3, start_clip=20)
    assert len(batches) == 2
    assert list(batches) == whole[4:]
    batches.set_epoch(3, start_clip=30)
    assert (len(batches), list(batches)) == (0, [])
    batches.set_epoch(4)
    assert len(batches) == 6


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 5), (5, 2), (4, 4)])
def test_an_epoch_continues_at_its_clip_with_another_batch_size_and_process_count(before: int, after: int) -> None:
    order = [index for _, index in chain(*batches_of(31, global_batch=1, seed=4))]
    done = 3 * before
    ranks = []
    for rank in range(after):
        batches = TrainBatches(31, global_batch=2 * after, seed=4, rank=rank, world_size=after)
        batches.set_epoch(0, start_clip=done)
        ranks.append(list(batches))
    steps = [[index for _, index in chain(*parts)] for parts in zip(*ranks, strict=True)]
    assert len(steps) == (31 - done) // (2 * after)
    assert list(chain(*steps)) == order[done : done + 2 * after * len(steps)]


def test_a_position_outside_the_epoch_is_an_error() -> None:
    batches = TrainBatches(30, global_batch=5, seed=0)
    for clip in (-1, 31):
        with pytest.raises(ValueError, match=rf"start_clip is {clip}; allowed: 0 to 30"):
            batches.set_epoch(0, start_clip=clip)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="7 videos do not fill one global batch of 8; lower the batch or add videos"):
        TrainBatches(7, global_batch=8, seed=0)
    with pytest.raises(ValueError, match="a global batch of 10 is not divisible by 4 processes; try 8"):
        TrainBatches(70, global_batch=10, seed=0, world_size=4)
    with pytest.raises(ValueError, match="a global batch of 2 is not divisible by 4 processes; try 4"):
        TrainBatches(70, global_batch=2, seed=0, world_size=4)
    with pytest.raises(ValueError, match="batch_size is 0"):
        EvalBatches(5, batch_size=0)


@pytest.mark.parametrize(("num_videos", "batch_size", "world_size"), [(10, 3, 1), (10, 3, 4), (3, 2, 5), (0, 2, 2)])
def test_evaluation_sees_every_video_once(num_videos: int, batch_size: int, world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        batches = EvalBatches(num_videos, batch_size=batch_size, rank=rank, world_size=world_size)
        listed = list(batches)
        assert len(listed) == len(batches)
        assert all(0 < len(batch) <= batch_size for batch in listed)
        seen += chain(*listed)
    assert sorted(seen) == list(range(num_videos))


# ---- the loader


@pytest.fixture(scope="module")
def videos(clip_file: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> VideoList:
    folder = tmp_path_factory.mktemp("list")
    (folder / "broken.mp4").write_bytes(b"no video")
    names = ["h264, gop 12", "mpeg4", "vp9", "h264, gop 250", "hevc, open gop"]
    lines = [f"{clip_file(name)} {label}" for label, name in enumerate(names)] + [f"{folder}/broken.mp4 5"]
    (folder / "list.txt").write_text("\n".join(lines))
    return read_list(str(folder / "list.txt"), num_classes=6)


def train_dataset(videos: VideoList) -> TrainDataset:
    return TrainDataset(
        videos, num_frames=2, sampling_rate=4, target_fps=30, short_side=(64, 72), crop=56, flip=True, seed=0
    )


def two_epochs(videos: VideoList, num_workers: int) -> list[Batch]:
    batches = TrainBatches(len(videos), global_batch=2, seed=0)
    loader = Loader(train_dataset(videos), batches, path_of=videos.path, num_workers=num_workers)
    found = list(loader)
    batches.set_epoch(1, start_clip=2)
    assert len(loader) == 2
    return found + list(loader)


def test_batches_are_the_same_for_any_number_of_workers(videos: VideoList) -> None:
    """Over two epochs, the second resumed after one step: workers live on and are told by the keys."""
    before = torch.get_rng_state()
    alone = two_epochs(videos, 0)
    assert [len(batch.clips) + len(batch.errors) for batch in alone] == [2] * 5
    assert sum(len(batch.errors) for batch in alone[:3]) == 1
    for num_workers in (1, 2):
        for ours, theirs in zip(alone, two_epochs(videos, num_workers), strict=True):
            assert torch.equal(ours.clips, theirs.clips)
            assert ours.videos.tolist() == theirs.videos.tolist()
            assert ours.labels.tolist() == theirs.labels.tolist() == ours.videos.tolist()
            assert ours.errors == theirs.errors
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_through_the_loader(videos: VideoList) -> None:
    dataset = EvalDataset(
        videos, num_frames=2, sampling_rate=4, target_fps=30, num_clips=2, num_crops=3, short_side=32, crop=32
    )
    loader = Loader(dataset, EvalBatches(len(videos), batch_size=4), path_of=videos.path, num_workers=1)
    first, second = loader
    assert first.clips.shape == (4, 6, 3, 2, 32, 32)
    assert (first.videos.tolist(), first.errors) == ([0, 1, 2, 3], [])
    assert (second.videos.tolist(), second.failed_videos.tolist()) == ([4], [5])
    assert "list.txt:6:" in second.errors[0]


class Probe(torch.utils.data.Dataset[Sample]):
    """Gives the number of torch threads as its label."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        return Sample(torch.zeros(1, 3, 1, 2, 2, dtype=torch.uint8), torch.get_num_threads(), index)


def test_workers_run_torch_on_one_thread() -> None:
    loader = Loader(Probe(), EvalBatches(2, batch_size=1), path_of=str, num_workers=1)
    assert [batch.labels.tolist() for batch in loader] == [[1], [1]]


def test_workers_do_not_free_the_decoders_that_the_program_has_dropped(videos: VideoList) -> None:
    """A decoder with threads, held by nothing but itself, when the workers are forked."""

    class Collecting(Probe):
        def __getitem__(self, index: int) -> Sample:
            gc.collect()
            return super().__getitem__(index)

    gc.disable()
    try:
        container = av.open(videos.path(0))
        container.streams.video[0].codec_context.thread_count = 4
        container.streams.video[0].thread_type = "SLICE"
        next(container.decode(video=0))
        dropped: list = [container]
        dropped.append(dropped)
        del container, dropped
        loader = Loader(Collecting(), EvalBatches(2, batch_size=1), path_of=str, num_workers=1, timeout_s=10)
        assert len(list(loader)) == 2
    finally:
        gc.enable()


def test_an_error_in_a_dataset_is_no_matter_of_the_loader(videos: VideoList) -> None:
    class Broken(Probe):
        def __getitem__(self, index: int) -> Sample:
            raise RuntimeError("DataLoaders are not to blame")

    with pytest.raises(RuntimeError, match="not to blame") as caught:
        list(Loader(Broken(), EvalBatches(2, batch_size=1), path_of=str, num_workers=0))
    assert not isinstance(caught.value, LoaderError)


def test_replacing_is_decided_by_seed_epoch_and_index_alone(videos: VideoList) -> None:
    """Video 5 of the six is none. What stands for it is another clip of the list, the same in every worker."""
    replacing = Replacing(train_dataset(videos), seed=0)
    found = {}
    for num_workers in (0, 2):
        batches = TrainBatches(len(videos), global_batch=2, seed=0)
        loader = Loader(replacing, batches, path_of=videos.path, num_workers=num_workers)
        found[num_workers] = list(loader)
    for ours, theirs in zip(found[0], found[2], strict=True):
        assert torch.equal(ours.clips, theirs.clips) and ours.videos.tolist() == theirs.videos.tolist()
        assert len(ours.clips) == 2 and not ours.errors
        assert ours.replaced == theirs.replaced
    (failure,) = [failure for batch in found[0] for failure in batch.replaced]
    assert failure.video == 5 and "list.txt:6:" in failure.reason
    assert failure.trace.startswith("Traceback") and "DecodeError" in failure.trace
    stand_ins = {replacing[epoch, 5].video for epoch in range(12)}
    assert len(stand_ins) > 2 and 5 not in stand_ins


def test_when_nothing_can_be_decoded_the_sample_fails_and_names_all_it_tried(videos: VideoList) -> None:
    class Hopeless(Probe):
        def __getitem__(self, key: tuple[int, int]) -> Sample:
            return Sample(torch.empty(0), 0, key[1], f"{key[1]}: gone", "Traceback")

    sample = Replacing(Hopeless(), seed=0, tries=3)[0, 2]
    assert sample.error.endswith("gone") and len(sample.replaced) == 3 and sample.replaced[0].video == 2


DYING = """
import torch
from octvideo.data.dataset import Sample
from octvideo.data.loader import Loader, TrainBatches

class Samples(torch.utils.data.Dataset):
    def __getitem__(self, key):
        return Sample(torch.zeros(1, 3, 1, 1, 1, dtype=torch.uint8), 0, key[1])

def train():
    loader = Loader(Samples(), TrainBatches(8, global_batch=1, seed=0), path_of=str, num_workers=2)
    for batch in loader:
        raise KeyError("a mistake in the program")

train()
"""


def test_a_process_that_an_exception_ends_does_not_wait_for_its_workers() -> None:
    """The traceback holds the loader, and its workers ignore the SIGTERM with which multiprocessing ends them."""
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", DYING], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("KeyError: 'a mistake in the program'")
