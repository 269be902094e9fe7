"""Where a run takes place: in this process, or as one of the processes that torchrun started."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from octvideo.engine import distributed
from octvideo.engine.distributed import World

Result = TypeVar("Result")


def run(job: Callable[[World, torch.device], Result], device: str) -> Result:
    """Call job(world, device) inside the process group that the environment describes.

    device: auto, cpu or cuda. Raises DistributedError where the environment contradicts itself.
    """
    world = distributed.world_from_environment()
    own = distributed.device_of(device, world)
    distributed.start(world, own)
    try:
        return job(world, own)
    finally:
        distributed.stop()
