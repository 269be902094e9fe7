"""One torch thread for every test: small networks gain nothing from more, and two busy pools on two cores stall."""

import contextlib
import os

import pytest

# Deterministic mode on a GPU needs it, and cuBLAS reads it once, at its first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import submitit  # noqa: F401
import torch

# submitit is imported here, before any test: its import closes every handler of logging, and absl's (of tensorboard) closes
# its stream with itself, which in a test is the file that pytest captures into.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before any `skipif`, which would hide a missing device
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests with the marker `cuda` if there is no CUDA device; fail them instead if OCTVIDEO_REQUIRE_CUDA=1."""
    if item.get_closest_marker("cuda") is None or torch.cuda.is_available():
        return
    if os.environ.get("OCTVIDEO_REQUIRE_CUDA") == "1":
        pytest.fail("no CUDA device on this machine, and OCTVIDEO_REQUIRE_CUDA is 1", pytrace=False)
    pytest.skip("no CUDA device on this machine")


@pytest.fixture(scope="session")
def importable_torchvision() -> torch.library.Library:
    """torchvision's wheel lacks its operators beside a CPU torch; declared, not implemented, its Python part imports."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float t) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float t) -> Tensor",
    ):
        with contextlib.suppress(RuntimeError):  # a torchvision that brought its own
            library.define(schema)
    return library
