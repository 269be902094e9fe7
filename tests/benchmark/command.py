"""Run `tools/benchmark.py` in this process."""

import contextlib
import io
from pathlib import Path

from tools import benchmark

ROOT = Path(__file__).parents[2]
CFG = str(ROOT / "configs/motion/oct_i3d_tiny.yaml")


def main(*arguments: str) -> tuple[int, str, str]:
    """Return the exit status, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = benchmark.main(arguments)
    return status, out.getvalue(), err.getvalue()
