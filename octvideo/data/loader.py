"""Which videos make up which batch on which rank, and the workers that load it."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset

from octvideo.data.dataset import Batch, Replacing, Sample, collate
from octvideo.data.handover import WorkerError, descriptors_cause
from octvideo.data.sampling import seeded_generator
from octvideo.data.workers import POLL_S, Readings, Workers
from octvideo.errors import RunError


class TrainBatches:
    """A batch sampler of (epoch, index) keys for a training dataset.

    Step s of an epoch takes global_batch entries of a permutation that follows from (seed, epoch), and rank r the
    r-th of `world_size` equal parts of them, so the clips of a step are the same at any world size:

        permutation   5 0 3 6 | 1 7 2 4 | 8          global_batch 4: two steps, one video left over this epoch
        rank 0 of 2   5 0       1 7
        rank 1 of 2       3 6       2 4

    Errors: ValueError for fewer videos than one global batch, and for a batch that the ranks cannot share evenly.
    """

    def __init__(self, num_videos: int, *, global_batch: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if global_batch < 1 or num_videos < global_batch:
            raise ValueError(
                f"{num_videos} videos do not fill one global batch of {global_batch}; lower the batch or add videos"
            )
        if global_batch % world_size:
            raise ValueError(
                f"a global batch of {global_batch} is not divisible by {world_size} processes; "
                f"try {global_batch - global_batch % world_size or world_size}"
            )
        self.num_videos = num_videos
        self.global_batch = global_batch
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_clip: int = 0) -> None:
        """Choose the epoch of the next iteration, and how many entries of its permutation were used already.

        Those may have been taken in batches of another size. Raises ValueError for a number outside the epoch.
        """
        if not 0 <= start_clip <= self.num_videos:
            raise ValueError(f"start_clip is {start_clip}; allowed: 0 to {self.num_videos}, the number of videos")
        self.epoch = epoch
        self.start_clip = start_clip

    def __len__(self) -> int:
        """Steps left in this epoch."""
        return (self.num_videos - self.start_clip) // self.global_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = seeded_generator("order", self.seed, self.epoch)
        order = torch.randperm(self.num_videos, generator=generator)
        share = self.global_batch // self.world_size
        for step in range(len(self)):
            first = self.start_clip + step * self.global_batch + self.rank * share
            yield [(self.epoch, index) for index in order[first : first + share].tolist()]


class EvalBatches:
    """A batch sampler of indices for an evaluation dataset: over all ranks every index exactly once, nothing padded.

    Ranks take every world_size-th index. They may have different numbers of batches, or none.
    """

    def __init__(self, num_videos: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.indices = range(rank, num_videos, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(0, len(self.indices), self.batch_size):
            yield list(self.indices[first : first + self.batch_size])


class LoaderError(RunError, RuntimeError):
    """A worker that hangs or has died; the message names the cause, and the file that it was reading."""


class Loader:
    """Batches of a dataset, by workers or in this process; the same for any number of workers.

    Call `batch_sampler.set_epoch` before each epoch: keys carry the epoch to the workers, which stay alive between epochs.
    Raises LoaderError if a worker dies, or the next batch takes longer than `timeout_s` (0: no limit), or there is no shared
    memory or file descriptor left. path_of: entry -> name of its file. poll: called in this thread at least every 0.2 s of a
    wait for workers. What it raises ends the wait. After any exception the workers are killed; the next iteration starts
    new ones. They run torch on one thread.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        batches: TrainBatches | EvalBatches,
        *,
        path_of: Callable[[int], str],
        num_workers: int,
        timeout_s: float = 0,
        pin_memory: bool = False,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        self.batch_sampler, self.num_workers = batches, num_workers
        self.timeout_s, self.pin_memory, self.poll = timeout_s, pin_memory, poll
        self._readings = Readings(num_workers, path_of)
        self._dataset = _watched(dataset, self._readings)
        self._workers: Workers | None = None

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        try:
            if self.num_workers and self._workers is None:  # in this thread: see workers._start
                self._workers = Workers(self._load, self.num_workers, self._readings)
            if self._workers is None:
                batches = map(self._load, self.batch_sampler)
                yield from map(_pin, batches) if self.pin_memory else batches
            elif self.pin_memory:
                yield from _pinned(partial(self._received, self._workers), self.poll)
            else:
                yield from self._received(self._workers, self.poll)
        except GeneratorExit:  # the caller takes no more batches of this epoch
            raise
        except WorkerError as error:
            self.close()
            raise LoaderError(str(error)) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the workers. The next iteration starts new ones."""
        if self._workers:
            self._workers.close()
            self._workers = None

    def _received(self, workers: Workers, poll: Callable[[], None]) -> Iterator[Batch]:
        return workers.results(iter(self.batch_sampler), self.timeout_s, poll)

    def _load(self, keys: list[Any]) -> Batch:
        return collate([self._dataset[key] for key in keys])


def _pinned(batches: Callable[[Callable[[], None]], Iterator[Batch]], poll: Callable[[], None]) -> Iterator[Batch]:
    """Yield the batches in pinned memory. A thread receives and copies them, one ahead of the caller.

    batches: function of what it calls while it waits. poll: called in the caller's thread.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=1)
    ended, device = threading.Event(), torch.cuda.current_device()

    def check() -> None:
        if ended.is_set():
            raise GeneratorExit

    def put(item: Batch | BaseException | None) -> None:
        while not ended.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=POLL_S)

    def run() -> None:
        torch.cuda.set_device(device)
        torch.set_num_threads(1)  # of this thread: a copy needs no more
        try:
            for batch in batches(check):
                put(_pin(batch))
                check()
            put(None)
        except BaseException as error:  # noqa: BLE001  # raised again in the caller's thread
            put(error)

    thread = threading.Thread(target=run, name="pin batches", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = ready.get(timeout=POLL_S)
            except queue.Empty:
                poll()
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()
        thread.join(5)


def _pin(batch: Batch) -> Batch:
    return batch._replace(
        clips=batch.clips.pin_memory(),
        labels=batch.labels.pin_memory(),
        videos=batch.videos.pin_memory(),
        failed_videos=batch.failed_videos.pin_memory(),
    )


def _watched(dataset: Dataset[Sample], readings: Readings) -> Dataset[Sample]:
    """Return the dataset with a note of each entry that it reads, replacements included."""
    if isinstance(dataset, Replacing):
        return replace(dataset, samples=_watched(dataset.samples, readings))
    return HeartbeatDataset(dataset, readings)


class HeartbeatDataset(Dataset[Sample]):
    """A dataset that notes which entry it reads, since when."""

    def __init__(self, samples: Dataset[Sample], readings: Readings) -> None:
        self.samples, self.readings = samples, readings

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        self.readings.begin(key[1] if isinstance(key, tuple) else key)
        sample = self.samples[key]
        self.readings.end()
        if os.strerror(errno.EMFILE) in sample.error:  # which is not the fault of the file
            raise WorkerError(descriptors_cause())
        return sample
