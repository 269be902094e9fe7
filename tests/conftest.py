"""One torch thread for every test: small networks gain nothing from more, and two busy pools on two cores stall."""

import contextlib

import pytest
import submitit  # noqa: F401
import torch

# submitit is imported here, before any test: its import closes every handler of logging, and absl's (of tensorboard) closes
# its stream with itself, which in a test is the file that pytest captures into.
torch.set_num_threads(1)


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
