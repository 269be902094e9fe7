"""Ranks and what they say to each other. Every function also works in a single process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class DistributedError(RuntimeError):
    """The environment of the processes contradicts itself."""


@dataclass(frozen=True)
class World:
    """rank of size processes; local_rank on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        return self.rank == 0


def world_from_environment() -> World:
    """The place that torchrun gave this process, or the only place. Raises DistributedError on half an environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return World()
    missing = [name for name in names if name not in os.environ]
    if missing:
        present = [name for name in names if name in os.environ]
        raise DistributedError(f"{', '.join(present)} are set but {', '.join(missing)} are not; start with torchrun")
    rank, size, local_rank = (int(os.environ[name]) for name in names[:3])
    if not 0 <= rank < size:
        raise DistributedError(f"RANK is {rank} but WORLD_SIZE is {size}")
    return World(rank, size, local_rank)


def device_of(name: str, world: World) -> torch.device:
    """`auto`, `cpu` or `cuda` -> this process's device. Raises DistributedError where cuda is asked for and absent."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DistributedError("DEVICE is cuda, but torch sees no GPU here; use DEVICE cpu or auto")
    if world.local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise DistributedError(f"local rank {world.local_rank} has no GPU of its own; this machine shows {count}")
    return torch.device("cuda", world.local_rank)


def start(world: World, device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Join the process group; nothing to do for a single process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The largest over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor, device: torch.device) -> Tensor | None:
    """[N_r, ...] of each rank, N_r may differ -> [sum of N_r, ...] in rank order on rank 0, None on the others; on the CPU.

    Rank by rank through `device`, which holds one rank's rows at a time.
    """
    if not dist.is_initialized():
        return rows
    counts = gather_objects(len(rows))
    if dist.get_rank() != 0:
        if len(rows):
            dist.send(rows.to(device).contiguous(), dst=0)
        return None
    gathered = torch.empty(sum(counts), *rows.shape[1:], dtype=rows.dtype)
    gathered[: counts[0]] = rows
    done = counts[0]
    for rank, count in enumerate(counts[1:], start=1):
        if count:
            part = torch.empty(count, *rows.shape[1:], dtype=rows.dtype, device=device)
            dist.recv(part, src=rank)
            gathered[done : done + count] = part.cpu()
            done += count
    return gathered


def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's buffers: each rank's norms have seen other clips since the last forward pass."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
