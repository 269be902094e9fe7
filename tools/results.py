#!/usr/bin/env python
"""One table of tested runs: python tools/results.py OUTPUT_DIR [OUTPUT_DIR ...]

Reads test.json and metrics.jsonl of each folder. clips/s: median over the epochs of training, and of the test, as
measured in that run, decoding included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

COLUMNS = ["run", "top-1 %", "videos", "views", "multiply-adds (G)", "parameters (M)", "train clips/s", "test clips/s"]


def row(folder: Path) -> list[Any]:
    """The cells of one run. Raises ValueError naming the file that is missing or not readable."""
    try:
        test = json.loads((folder / "test.json").read_text())
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        speeds = [event["clips_per_s"] for event in events if event["event"] == "epoch"]
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
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename}: no such file; {folder} holds no finished test of run_net.py") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: test.json or metrics.jsonl is not what run_net.py writes ({error!r})") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUTPUT_DIR")
    options = parser.parse_args(arguments)
    try:
        rows = [row(folder) for folder in options.folders]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(tabulate(rows, headers=COLUMNS, tablefmt="github", disable_numparse=True, stralign="right"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
