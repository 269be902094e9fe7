"""The marker `cuda`: tests skip without a CUDA device, or fail if OCTVIDEO_REQUIRE_CUDA is 1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

@pytest.mark.cuda
def test_on_a_device(): pass

def test_anywhere(): pass
"""


@pytest.mark.parametrize(
    ("required", "status", "counts"), [("", 0, "1 passed, 1 skipped"), ("1", 1, "1 passed, 1 error")]
)
def test_without_a_device(tmp_path: Path, required: str, status: int, counts: str) -> None:
    file = tmp_path / "test_marked.py"
    file.write_text(TESTS)
    plain = ["-c", str(ROOT / "pyproject.toml"), "-o", "addopts=--strict-markers", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plain, "-p", "tests.conftest", "-q", "-rsE", str(file)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OCTVIDEO_REQUIRE_CUDA": required}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert counts in done.stdout and "no CUDA device on this machine" in done.stdout
