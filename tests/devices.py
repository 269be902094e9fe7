"""The devices on which a test runs. A test over CUDA_ONLY would take too long on a CPU, or means nothing there."""

from collections.abc import Iterator

import pytest
import torch

CUDA_ONLY = [pytest.param("cuda", marks=pytest.mark.cuda)]
DEVICES = ["cpu", *CUDA_ONLY]


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """Turn TF32 off: float32 convolutions and products have float32's 24 bits."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed
