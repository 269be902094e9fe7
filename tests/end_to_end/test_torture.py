"""Ten runs of `make torture`: interrupted and resumed, a run ends with the bits and history of an undisturbed one."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_ten_interrupted_runs_end_as_undisturbed_ones(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.torture", "--runs", "10", "--jobs", "1", "--keep", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 runs, 0 with differences" in done.stdout
    interrupted = re.findall(r"(killed in call|SIGKILL|SIG\w+) .*?-> (-?\d+)", done.stdout)
    assert len(interrupted) >= 10
    assert any(int(status) for _, status in interrupted)
