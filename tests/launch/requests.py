"""Requests of tools/run_net.py on lists whose files exist."""

from pathlib import Path

import pytest

from tests.end_to_end.runs import ROOT
from tools import run_net

CONFIG = str(ROOT / "configs/motion/oct_i3d_tiny.yaml")


def write_lists(folder: Path) -> list[str]:
    """Write train.txt and val.txt with one file of each of eight classes, and return overrides that name them."""
    folder.mkdir(parents=True)
    for label in range(8):
        (folder / f"{label}.mp4").touch()
    for name in ("train", "val"):
        (folder / f"{name}.txt").write_text("".join(f"{label}.mp4 {label}\n" for label in range(8)))
    return [
        *("DATA.TRAIN_LIST", str(folder / "train.txt"), "DATA.VAL_LIST", str(folder / "val.txt")),
        *("DATA.PREFIX", str(folder), "OUTPUT_DIR", str(folder.parent / "run")),
    ]


def error_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """Return the message about a wrong request, which is all that is printed."""
    assert run_net.main(["--cfg", CONFIG, *command]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    return printed.err
