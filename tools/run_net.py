#!/usr/bin/env python
"""Train and test a network: python tools/run_net.py --cfg CONFIG [KEY VALUE ...], alone, under torchrun, with --local N,
or as a job of SLURM's with --slurm."""

from __future__ import annotations

if __name__ == "__main__":
    import octvideo.starting  # noqa: F401  # first: importing the others takes seconds

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from octvideo import build, command, jobs, launch, preflight
from octvideo.engine import checkpoint
from octvideo.engine.distributed import World
from octvideo.launch import Job, Request


@command.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 the run failed, 2 the request was wrong, 128 + N saved and stopped by signal
    N (SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cfg", required=True, metavar="CONFIG", help="YAML file, e.g. configs/motion/oct_i3d_tiny.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="e.g. TRAIN.EPOCHS 5 OUTPUT_DIR runs/short")
    help_on = "where OUTPUT_DIR has checkpoints, TRAIN.RESUME is auto: how a job of SLURM's starts again"
    parser.add_argument("--go-on", action="store_true", help=help_on)
    launch.add_arguments(parser)
    options = parser.parse_args(arguments)
    request = Request.of(options)
    if request.elsewhere:
        cfgs = preflight.tasks(request, options.cfg, options.overrides)
        return launch.start(request, __file__, [_job(cfg, request) for cfg in cfgs])
    cfg = build.load_config(options.cfg, options.overrides)
    if options.go_on and checkpoint.found(Path(cfg.OUTPUT_DIR)):
        cfg = build.load_config(options.cfg, [*options.overrides, "TRAIN.RESUME", "auto"])

    def job(world: World, device: torch.device) -> None:
        if device.type == "cpu":
            build.use_threads(cfg, world)
        with jobs.session(cfg, world) as stop:
            if cfg.TRAIN.ENABLE:
                jobs.train(cfg, world, device, stop)
            if cfg.TEST.ENABLE:
                jobs.test(cfg, world, device, stop)

    launch.run(job, cfg.DEVICE)
    return 0


def _job(cfg: CfgNode, request: Request) -> Job:
    return Job(Path(cfg.OUTPUT_DIR), cfg.dump(), ["--go-on"] if request.slurm else [])


if __name__ == "__main__":
    sys.exit(command.run(main, keyboard_interrupt=False))
