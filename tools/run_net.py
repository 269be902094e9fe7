#!/usr/bin/env python
"""Train and test a network: python tools/run_net.py --cfg CONFIG [KEY VALUE ...], alone or under torchrun."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from octvideo import build, launch
from octvideo.config import ConfigError
from octvideo.data.dataset import ListError
from octvideo.data.decode import DecodeError, MissingDecoderError
from octvideo.data.loader import LoaderError
from octvideo.engine.checkpoint import CheckpointError
from octvideo.engine.classes import ClassOrderError
from octvideo.engine.distributed import DistributedError, World
from octvideo.engine.failures import BudgetError
from octvideo.engine.log import LogError
from octvideo.engine.nonfinite import NonFiniteError
from octvideo.engine.scores import ScoresError
from octvideo.engine.train import Stopped, TrainingError

MISTAKES = (ConfigError, ListError, MissingDecoderError)
FAILURES = (
    *(DecodeError, LoaderError, CheckpointError, LogError, DistributedError, TrainingError, BudgetError),
    *(NonFiniteError, ClassOrderError, ScoresError),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted, 128 + N saved and
    stopped by signal N (SIGTERM, SIGUSR1)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cfg", required=True, metavar="CONFIG", help="YAML file, e.g. configs/motion/oct_i3d_tiny.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="e.g. TRAIN.EPOCHS 5 OUTPUT_DIR runs/short")
    options = parser.parse_args(arguments)
    try:
        cfg = build.load_config(options.cfg, options.overrides)

        def job(world: World, device: torch.device) -> None:
            if device.type == "cpu":
                build.use_threads(cfg, world)
            if cfg.TRAIN.ENABLE:
                build.train(cfg, world, device)
            if cfg.TEST.ENABLE:
                build.test(cfg, world, device)

        launch.run(job, cfg.DEVICE)
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FAILURES as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(f"{stop}; saved there, TRAIN.RESUME auto goes on", file=sys.stderr)
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        print("interrupted; TRAIN.RESUME auto goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
