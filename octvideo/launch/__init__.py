"""Start runs: in this process, in several processes of this machine (--local), or as a SLURM job (--slurm).

A job is the same command again in each task. What it needs to resume after a preemption, a time limit or the loss of a
node is in OUTPUT_DIR, so a restart is a start.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from octvideo.engine import distributed
from octvideo.engine.distributed import World
from octvideo.launch.local import run_local
from octvideo.launch.request import Job, LaunchError, Request, add_arguments
from octvideo.launch.slurm import submit

__all__ = ["Job", "LaunchError", "Request", "add_arguments", "run", "start"]

Result = TypeVar("Result")


def run(job: Callable[[World, torch.device], Result], device: str) -> Result:
    """Call job(world, device) inside the process group that the environment describes.

    device: auto, cpu or cuda. Raises DistributedError if the environment contradicts itself. If the ranks cannot continue,
    it names the rank that hangs or has died.
    """
    world = distributed.world_from_environment()
    own = distributed.device_of(device, world)
    distributed.start(world, own)
    try:
        with distributed.named_ranks():
            return job(world, own)
    finally:
        distributed.stop()


def start(request: Request, script: str | Path, jobs: Sequence[Job]) -> int:
    """Run the tool `script` as the request asks, and return the exit status: 0 once a SLURM job is submitted.

    Several jobs become one job array. Raises LaunchError if the request cannot be met.
    """
    world = distributed.world_from_environment()
    if "RANK" in os.environ or world.size > 1:
        raise LaunchError(
            f"this is already rank {world.rank} of {world.size} processes that torchrun or srun started; "
            f"{'--slurm' if request.slurm else '--local'} starts its own, so call the tool itself"
        )
    script = Path(script).resolve()
    return submit(request, script, jobs) if request.slurm else run_local(request.local, script, jobs[0])
