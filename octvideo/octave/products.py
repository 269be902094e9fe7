"""Octave convolutions of one position (1 x 1, 1 x 1 x 1) as matrix products over channels-last maps, for training on CPUs.

torch copies a block of a weight before each convolution with it, forward and backward, and the gradient of a block has to
be copied to its place. A matrix product reads and writes a block in place, and adds to a map that is there already.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor


@functools.cache
def are_fast() -> bool:
    """Return True on Intel CPUs with MKL. On other CPUs, oneDNN's convolutions are faster (docs/performance.md)."""
    processors = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and processors.exists() and "GenuineIntel" in processors.read_text()


def usable(x: Tensor) -> bool:
    """Return True for a channels-last map on a CPU, in a precision that MKL knows."""
    return x.device.type == "cpu" and x.stride(1) == 1 and x.dtype in (torch.float32, torch.float64)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor | None) -> Tensor:
    """Return the convolution of x [N, C_in, ...] with weight [C_out, C_in, 1, ...], added to `onto`, if any, in place."""
    matrix = weight.flatten(1).t()
    if onto is None:
        y = _empty(x, len(weight))
        torch.mm(_rows(x), matrix, out=_rows(y))
    else:
        y = onto
        _rows(y).addmm_(_rows(x), matrix)
    if bias is not None:
        _rows(y).add_(bias)
    return y


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool], *, onto: Tensor | None, to_weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x, added to `onto`, if any, in place, and of the bias. grad: gradient of `convolve`'s result.

    needs: whether those of x, weight and bias are needed. to_weight: memory for the weight's gradient.
    """
    rows, matrix, grad_x = _rows(grad), weight.flatten(1), onto
    if needs[0] and onto is None:
        grad_x = _empty(x, x.shape[1])
        torch.mm(rows, matrix, out=_rows(grad_x))
    elif needs[0] and onto is not None:
        _rows(onto).addmm_(rows, matrix)
    if to_weight is not None:
        torch.mm(rows.t(), _rows(x), out=to_weight.flatten(1))
    return grad_x, rows.sum(0) if needs[2] else None


def _rows(x: Tensor) -> Tensor:
    """[N, C, T, H, W] -> [N * T * H * W, C]: a view of a channels-last map, a copy of another one."""
    return x.movedim(1, -1).flatten(0, -2)


def _empty(x: Tensor, channels: int) -> Tensor:
    layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
