"""The tests here need a SLURM of their own: make test-slurm starts one (cluster.sh), runs them and stops it."""

import os
import shutil
from pathlib import Path

import pytest

from datasets import motion


@pytest.fixture(scope="session", autouse=True)
def cluster() -> None:
    if not os.environ.get("OCTVIDEO_TEST_SLURM"):
        pytest.skip("needs the test cluster: make test-slurm")
    assert os.environ.get("SLURM_CONF") and shutil.which("sbatch")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("motion") / "data"
    motion.make(folder, motion.Settings(train=2, val=1, size=48), workers=1)
    return folder
