"""Maps, and what torch's operators make of them, for the tests of the Triton kernels."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from octvideo.octave import feature, kernels

LAYOUTS = {
    "contiguous": {4: torch.contiguous_format, 5: torch.contiguous_format},
    "channels last": {4: torch.channels_last, 5: torch.channels_last_3d},
}
CASES = [
    ((1, 3, 5, 7), (2, 2)),
    ((2, 1, 4, 6), (2, 1)),
    ((2, 5, 1, 1), (2, 2)),
    ((1, 37, 3, 9), (1, 2)),
    ((2, 3, 3, 5, 7), (2, 2, 2)),
    ((1, 4, 1, 6, 4), (1, 2, 2)),
    ((2, 2, 4, 1, 3), (2, 2, 2)),
    ((1, 3, 5, 2, 3), (2, 1, 1)),
    ((1, 3, 4, 5, 3), (2, 1, 2)),
    ((1, 1, 2, 5, 33), (1, 2, 2)),
]
Case = tuple[tuple[int, ...], tuple[int, ...]]


def copy_of_programs(name: str) -> ModuleType:
    """Import kernels_triton.py a second time, so that nothing else in this process meets what a test does to it."""
    pytest.importorskip("triton", reason="Triton is not installed; tests/peers.txt lists it")
    return copy_of_module(Path(kernels.__file__).with_name("kernels_triton.py"), name)


def copy_of_module(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def a_map(
    shape: tuple[int, ...], device: str, layout: str = "contiguous", dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.randn(shape).to(device, dtype).contiguous(memory_format=LAYOUTS[layout][len(shape)])


def a_low_map(case: Case, device: str, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> Tensor:
    shape, kernel = case
    return a_map((*shape[:2], *feature.low_size(shape[2:], kernel)), device, layout, dtype)


def eager_pool(x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    with kernels.enabled(False):
        return feature.average_pool(x, kernel)


def eager_sum(y: Tensor, low: Tensor) -> Tensor:
    return y + feature.upsample(low, y.shape[2:])


def double(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def close(x: Tensor, expected: Tensor) -> None:
    """Assert equality within one rounding step; the interpreter rounds bfloat16 towards zero, GPUs to nearest."""
    steps = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
    np.testing.assert_allclose(double(x), double(expected), rtol=steps[x.dtype], atol=steps[x.dtype])
