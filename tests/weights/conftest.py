"""Where MXNet's own files are, on the machines that have them."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "shared/data/mxnet"


@pytest.fixture(scope="session")
def mxnet_data() -> Path:
    if not FOLDER.is_dir():
        pytest.skip(f"files written by MXNet are not in {FOLDER}")
    return FOLDER
