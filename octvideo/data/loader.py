"""Which videos make up which batch on which rank, and the torch DataLoader around it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from octvideo.data.dataset import Sample, collate
from octvideo.data.sampling import seeded_generator


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

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch of the next iteration; `start_step` > 0 goes on in the middle of it."""
        self.epoch = epoch
        self.start_step = start_step

    def __len__(self) -> int:
        """Steps left in this epoch."""
        return max(self.num_videos // self.global_batch - self.start_step, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = seeded_generator("order", self.seed, self.epoch)
        order = torch.randperm(self.num_videos, generator=generator)
        share = self.global_batch // self.world_size
        for step in range(self.start_step, self.start_step + len(self)):
            first = step * self.global_batch + self.rank * share
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


def make_loader(
    dataset: Dataset[Sample],
    batches: TrainBatches | EvalBatches,
    *,
    num_workers: int,
    timeout_s: float = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """A DataLoader of `Batch`. The same batches for any number of workers; 0 loads in this process.

    Call `batches.set_epoch` here before each epoch: keys carry the epoch into workers, which live on. A batch that
    takes a worker longer than `timeout_s` (0: no limit) is a RuntimeError. Workers run torch on one thread.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        timeout=timeout_s if num_workers else 0,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        prefetch_factor=2 if num_workers else None,
        generator=torch.Generator(),  # its own: else every epoch draws from the global one
    )
