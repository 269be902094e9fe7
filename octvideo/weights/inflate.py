"""2D -> 3D: the weights of an image network in the video network of the same names (arXiv 1705.07750, section 2.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def mean(kernel: Tensor, frames: int) -> Tensor:
    """[O, I, kh, kw] -> [O, I, T, kh, kw], a T-th of it at every time: a still clip gets what the image got."""
    return kernel[:, :, None].expand(-1, -1, frames, -1, -1) / frames


def centre(kernel: Tensor, frames: int) -> Tensor:
    """[O, I, kh, kw] -> [O, I, T, kh, kw], all of it at the middle time: the network starts blind to motion."""
    inflated = torch.zeros(*kernel.shape[:2], frames, *kernel.shape[2:], dtype=kernel.dtype)
    inflated[:, :, frames // 2] = kernel
    return inflated


HOW: dict[str, Callable[[Tensor, int], Tensor]] = {"mean": mean, "centre": centre}


def image_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """What an image network has in place of an entry of a video network: a kernel [O, I, T, kh, kw] without its T."""
    return (*shape[:2], *shape[3:]) if len(shape) == 5 else tuple(shape)


def inflate(
    weights: Mapping[str, Tensor], own: Mapping[str, Sequence[int]], how: str = "mean"
) -> tuple[dict[str, Tensor], list[str]]:
    """Image weights under a video network's names -> (its weights, the names of the inflated kernels).

    own: shapes of the video network; `weights` may hold any of its names, each of the shape that `image_shape` gives.
    alpha plays no part: it is not in the names and shapes. Raises ValueError for an unknown `how`.
    """
    if how not in HOW:
        raise ValueError(f"how is {how!r}; allowed: {', '.join(HOW)}")
    inflated = [name for name in weights if len(own[name]) == 5]
    grown = {name: HOW[how](weights[name], own[name][2]).contiguous() for name in inflated}
    return {**weights, **grown}, inflated
