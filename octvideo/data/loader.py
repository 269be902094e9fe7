"""Which videos make up which batch on which rank, and the workers that load it."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from octvideo.data.dataset import Batch, Sample, collate
from octvideo.data.sampling import seeded_generator
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
    """A worker that hangs or has died; the message names the file that it was reading."""


class Loader:
    """Batches of a dataset, by workers or in this process; the same for any number of workers.

    Call `batch_sampler.set_epoch` before each epoch: keys carry the epoch into workers, which live on. Raises
    LoaderError where the next batch takes longer than `timeout_s` (0: no limit) or a worker dies; path_of gives the
    name of a key's file. Workers run torch on one thread.
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
    ) -> None:
        if num_workers:
            # An exception that ends the process still holds its loaders, and multiprocessing would wait for their workers
            # for ever, since these ignore the SIGTERM that it sends.
            atexit.unregister(_kill_workers)
            atexit.register(_kill_workers)
        self.batch_sampler, self.path_of, self.timeout_s = batches, path_of, timeout_s
        self.watched = Watched(dataset, num_workers)
        self.loader = DataLoader(
            self.watched,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate,
            timeout=timeout_s if num_workers else 0,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            prefetch_factor=2 if num_workers else None,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # its own: else every epoch draws from the global one
        )

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        if self.loader.num_workers:
            # Decoders that the program has dropped, but not freed yet, would be freed by a worker, which waits for ever for
            # their threads: a fork has none of them.
            gc.collect()
        try:
            yield from self.loader
        except RuntimeError as error:
            if not str(error).startswith("DataLoader "):
                raise  # an exception in a dataset; what follows is about the workers themselves
            _kill_workers()  # the run ends here, and a worker that hangs in native code answers to nothing else
            hanging = "timed out" in str(error)
            what = f"no batch within DATA.TIMEOUT_S {self.timeout_s:g} s" if hanging else "a decoding worker died"
            raise LoaderError(f"{what}; {self._reading()}") from error

    def _reading(self) -> str:
        """The files that workers are at, the longest one first."""
        now = time.monotonic()
        busy = [(now - float(since), int(index)) for index, since in self.watched.state.tolist() if index >= 0]
        if not busy:
            return "no worker was reading a file: look at the machine (memory, file system)"
        lines = [f"{seconds:.0f} s: {self.path_of(index)}" for seconds, index in sorted(busy, reverse=True)]
        return (
            "workers have been reading, for\n  " + "\n  ".join(lines) + "\ntake the first off the list, or look at it"
        )


def _ignore_signals(worker: int) -> None:
    """A cluster signals every process of a job. The training process decides what to do; it needs its workers for that."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _kill_workers() -> None:
    """Of all loaders; returns when they are gone, or after seconds in which the system could not end them."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    # torch's handler of SIGCHLD raises an error for each, wherever the program has got to by then
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main else None
    for process in workers:
        process.kill()
    for process in workers:
        process.join(timeout=5)
    if in_main:
        signal.signal(signal.SIGCHLD, handler)


class Watched(Dataset[Sample]):
    """A dataset that notes, for each worker in memory that all processes share, which entry it reads since when."""

    def __init__(self, samples: Dataset[Sample], num_workers: int) -> None:
        self.samples = samples
        # [workers, 2]: index (-1: none) and time.monotonic(), which is one clock for all processes of a machine
        self.state = torch.full((max(num_workers, 1), 2), -1.0, dtype=torch.float64).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        worker = torch.utils.data.get_worker_info()
        place = self.state[worker.id if worker else 0]
        place[1] = time.monotonic()
        place[0] = key[1] if isinstance(key, tuple) else key
        sample = self.samples[key]
        place[0] = -1
        return sample
