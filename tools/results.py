#!/usr/bin/env python
"""One table of tested runs: python tools/results.py OUTPUT_DIR [OUTPUT_DIR ...] [--losses STEP ...]

Reads test.json and metrics.jsonl of each folder. clips/s: median over the epochs of training, and of the test, as
measured in that run, decoding included. --losses: instead, the training loss at these steps, each the mean over the
lines of the ten steps that end there (TRAIN.LOG_PERIOD says how many lines those are).
"""

from __future__ import annotations

if __name__ == "__main__":
    import octvideo.starting  # noqa: F401  # first: importing the others takes seconds

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from octvideo import command
from octvideo.errors import RunError
from octvideo.files import path_argument

COLUMNS = ["run", "top-1 %", "videos", "views", "multiply-adds (G)", "parameters (M)", "train clips/s", "test clips/s"]


class ResultsError(RunError):
    """A folder without the results of a run; the message names what is missing."""


def row(folder: Path) -> list[Any]:
    """The cells of one run."""
    test = json.loads((folder / "test.json").read_text())
    speeds = [event["clips_per_s"] for event in events(folder, "epoch")]
    return [
        folder.name,
        f"{test['top1']:.1f}",
        f"{test['videos_scored']} of {test['videos_listed']}",
        test["views"],
        f"{test['macs'] / 1e9:.4f}",
        f"{test['params'] / 1e6:.3f}",
        f"{statistics.median(speeds):.0f}" if speeds else "-",
        f"{test['clips_per_s']:.0f}",
    ]


def losses(folder: Path, steps: Sequence[int]) -> list[Any]:
    """The cells of one run: the loss at each step, "-" where no line is near."""
    lines = [(event["step"], event["loss"]) for event in events(folder, "train")]
    near = [[loss for at, loss in lines if step - 10 < at <= step] for step in steps]
    return [folder.name, *(f"{statistics.mean(values):.3f}" if values else "-" for values in near)]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


def table(folders: Sequence[Path], steps: Sequence[int]) -> str:
    """Raises ValueError naming the file that is missing or not readable."""
    rows = [_checked(folder, lambda f: losses(f, steps) if steps else row(f)) for folder in folders]
    headers = ["run", *(f"loss at step {step}" for step in steps)] if steps else COLUMNS
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, stralign="right")


def _checked(folder: Path, read: Callable[[Path], list[Any]]) -> list[Any]:
    try:
        return read(folder)
    except FileNotFoundError as error:
        raise ResultsError(f"{error.filename}: no such file; {folder} holds no finished test of run_net.py") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ResultsError(f"{folder}: test.json or metrics.jsonl is not what run_net.py writes ({error!r})") from None


@command.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=path_argument, metavar="OUTPUT_DIR")
    parser.add_argument("--losses", nargs="+", type=int, default=[], metavar="STEP", help="the training loss instead")
    options = parser.parse_args(arguments)
    print(table(options.folders, options.losses))
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
