"""Ranks and what they exchange. Every function also works in a single process."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from octvideo.engine.meeting import DistributedError, Meeting, is_of_ranks, seconds
from octvideo.files import first_line


@dataclass(frozen=True)
class World:
    """rank of size processes; local_rank of the local_size on this machine. Rank 0 is to be met at address:port."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    port: int = 0

    @property
    def main(self) -> bool:
        return self.rank == 0


def world_from_environment() -> World:
    """This process's place, from whoever started it; the only place where nobody says otherwise.

    1. RANK, WORLD_SIZE, ...: torchrun, octvideo.launch's --local, or a person.
    2. A step of SLURM (srun). In the shell of sbatch or salloc SLURM_NTASKS says how many tasks a step would have, and
       SLURM_PROCID may be 0: a process there is no rank.

    Raises DistributedError on half an environment, on impossible values, and where 1 and 2 contradict each other.
    """
    ranked, step = _ranked(), _slurm_step()
    if ranked and step:
        _check_agreement(ranked, step)
    return ranked or step or World()


def _ranked() -> World | None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return None
    missing = [name for name in names if name not in os.environ]
    if missing:
        present = [name for name in names if name in os.environ]
        raise DistributedError(f"{', '.join(present)} are set but {', '.join(missing)} are not; start with torchrun")
    rank, size, local_rank = (_integer(name) for name in names[:3])
    local_size = _integer("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else size
    if not 0 <= rank < size:
        raise DistributedError(f"RANK is {rank} but WORLD_SIZE is {size}")
    if not 0 <= local_rank < local_size <= size:
        raise DistributedError(f"LOCAL_RANK is {local_rank}, LOCAL_WORLD_SIZE {local_size} and WORLD_SIZE {size}")
    return World(rank, size, local_rank, local_size, os.environ["MASTER_ADDR"], _integer("MASTER_PORT"))


_NO_STEP = 0xFFFFFFF0  # and above: what SLURM calls the shells of sbatch and salloc


def _slurm_step() -> World | None:
    if "SLURM_STEP_ID" not in os.environ or _integer("SLURM_STEP_ID") >= _NO_STEP:
        return None
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID")
    texts = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST")
    if missing := [name for name in (*names, *texts) if name not in os.environ]:
        raise DistributedError(f"SLURM_STEP_ID is set but {', '.join(missing)} are not; start with srun")
    rank, size, local_rank, node, job = map(_integer, names)
    tasks = _tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
    if not (0 <= rank < size == sum(tasks) and node < len(tasks) and local_rank < tasks[node]):
        said = ", ".join(f"{name} {os.environ[name]}" for name in (*names[:4], texts[0]))
        raise DistributedError(f"SLURM's variables contradict each other: {said}")
    address = os.environ.get("MASTER_ADDR") or _first_host(os.environ["SLURM_STEP_NODELIST"])
    # jobs that share a node have different numbers; below the ports that systems give away themselves
    port = _integer("MASTER_PORT") if "MASTER_PORT" in os.environ else 10000 + job % 20000
    return World(rank, size, local_rank, tasks[node], address, port)


def _check_agreement(ranked: World, step: World) -> None:
    """One rank per task of the step, or one torchrun per task."""
    a_rank_each = (ranked.rank, ranked.size) == (step.rank, step.size)
    a_launcher_each = ranked.size == step.size * ranked.local_size and step.rank < ranked.size // ranked.local_size
    if not (a_rank_each or a_launcher_each):
        raise DistributedError(
            f"RANK {ranked.rank} of WORLD_SIZE {ranked.size} (LOCAL_WORLD_SIZE {ranked.local_size}), but SLURM started "
            f"task {step.rank} of {step.size} here, so several runs would write to one folder; either let srun start "
            "every rank, without torchrun, or one torchrun on each node that knows of the others (--nnodes)"
        )


def _integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise DistributedError(f"{name} is {os.environ[name]!r}; it must be an integer") from None


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's way: '2(x3),1' -> [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise DistributedError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}; it must look like 2(x3),1")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _first_host(nodes: str) -> str:
    """SLURM's way: 'gpu[03-05,9]-ib,login' -> 'gpu03-ib'."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if not first:
        raise DistributedError(f"SLURM_STEP_NODELIST is {nodes!r}; it must look like gpu[03-05]")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def device_of(name: str, world: World) -> torch.device:
    """`auto`, `cpu` or `cuda` -> this process's device. Raises DistributedError where cuda is asked for and absent."""
    if name == "auto" and not torch.cuda.is_available() and (gpus := os.environ.get("SLURM_STEP_GPUS")):
        raise DistributedError(f"SLURM gave GPUs {gpus} to this job, but torch sees none: is it a build for CPUs?")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DistributedError("DEVICE is cuda, but torch sees no GPU here; use DEVICE cpu or auto")
    if world.local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise DistributedError(f"local rank {world.local_rank} has no GPU of its own; this machine shows {count}")
    return torch.device("cuda", world.local_rank)


_meeting: Meeting | None = None  # of the process group, which is torch's own global
_host_group: dist.ProcessGroup | None = None  # over CPUs, for numbers that the host decides by; None without processes


def start(
    world: World,
    device: torch.device,
    timeout: timedelta = timedelta(minutes=30),
    meet_within: timedelta = timedelta(minutes=10),
) -> None:
    """Join the process group; nothing to do for a single process. timeout: of whatever the ranks do together.

    Raises DistributedError naming the ranks that have not come when `meet_within` is over.
    """
    global _meeting, _host_group
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.size > 1:
        agent = (
            os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        )  # torchrun's, which listens at the port already
        store = _store(world, meet_within, listen=world.main and not agent)
        notes = [dist.PrefixStore("meeting", connection) for connection in (store, _store(world, meet_within))]
        _meeting = Meeting(*notes, rank=world.rank, size=world.size)
        _meeting.open(meet_within)
        # If a rank hangs, NCCL's watchdog ends the processes without an exception. The hosts, which meet at every step,
        # get theirs before.
        later = timedelta(minutes=1)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=world.rank,
            world_size=world.size,
            timeout=timeout + later if device.type == "cuda" else timeout,
        )
        _host_group = dist.new_group(backend="gloo", timeout=timeout)


def _store(world: World, timeout: timedelta, *, listen: bool = False) -> dist.Store:
    where = f"{world.address}:{world.port}"
    try:
        store = dist.TCPStore(world.address, world.port, None, listen, timeout, wait_for_workers=False)
    except RuntimeError as error:
        what = "could not listen at" if listen else f"did not answer within {seconds(timeout)} at"
        raise DistributedError(
            f"rank {world.rank} of {world.size}: rank 0 {what} {where} ({first_line(error)})"
        ) from error
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@contextlib.contextmanager
def named_ranks() -> Iterator[None]:
    """Inside, torch's error in a collective becomes a DistributedError that names the ranks which are its cause.

    Any other exception is noted for the ranks that will wait for this one.
    """
    try:
        yield
    except BaseException as error:
        if _meeting is None or isinstance(error, DistributedError):
            raise
        if is_of_ranks(error):
            raise _meeting.explain(error) from error
        _meeting.report(error)
        raise


def barrier(what: str, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Wait for every rank. Raises DistributedError, on all that wait, naming those that do not join within the time."""
    if _meeting:
        _meeting.wait(what, timeout)


def stop() -> None:
    global _meeting, _host_group
    if _meeting:
        _meeting.close()
    _meeting = _host_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


@named_ranks()
def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@named_ranks()
def all_reduce_max(tensor: Tensor) -> Tensor:
    """The largest over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


class HostMax:
    """The largest of an integer over the ranks, by way of the hosts, without a wait for the device or for other ranks.

    Each call posts this rank's number and returns the largest of the numbers that were posted at the call before, 0 at the
    first call. A single process gets its own number at once. Called by all ranks, equally often.
    """

    def __init__(self) -> None:
        self._posted: tuple[np.ndarray, dist.Work] | None = None

    @property
    def alone(self) -> bool:
        """True if there is one process only."""
        return _host_group is None

    @named_ranks()
    def __call__(self, value: int) -> int:
        if _host_group is None:
            return value
        largest = 0
        if self._posted:
            number, work = self._posted
            work.wait()
            largest = int(number[0])
        number = np.array([value])  # memory that the host reads without an operator of torch
        work = dist.all_reduce(torch.from_numpy(number), dist.ReduceOp.MAX, group=_host_group, async_op=True)
        self._posted = number, work
        return largest


@named_ranks()
def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@named_ranks()
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


@named_ranks()
def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's buffers: each rank's norms have seen other clips since the last forward pass."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
