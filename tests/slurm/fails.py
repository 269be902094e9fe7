"""A tool whose last rank fails while the others wait for it."""

import argparse
import sys
from pathlib import Path

import torch

from octvideo import launch
from octvideo.engine import distributed
from octvideo.engine.distributed import World


def work(world: World, device: torch.device) -> None:
    if world.rank == world.size - 1:
        raise ValueError("this one was meant to fail")
    distributed.barrier("the rank that fails")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg")
    parser.add_argument("--out", type=Path)
    launch.add_arguments(parser)
    options = parser.parse_args(arguments)
    request = launch.Request.of(options)
    if request.elsewhere:
        return launch.start(request, __file__, [launch.Job(options.out, "")])
    launch.run(work, "cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
