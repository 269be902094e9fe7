"""Pure functions on decoded frames: uint8 [T, H, W, C], the decoder's layout, in and out.

Sizes are in pixels. Randomness comes from the Generator that is handed in, and from nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(H, W) with the shorter one `short_side` and the longer one to the nearest pixel in proportion."""
    if height <= width:
        return short_side, (2 * width * short_side + height) // (2 * height)
    return (2 * height * short_side + width) // (2 * width), short_side


def scale_short_side(frames: Tensor, short_side: int) -> Tensor:
    """[T, H, W, C] -> [T, H', W', C], min(H', W') = short_side: bilinear between pixel centres, no prefilter."""
    height, width = frames.shape[1:3]
    size = scaled_size(height, width, short_side)
    if size == (height, width):
        return frames
    # [T, H, W, C] -> [T, C, H, W] is a view in channels-last order, for which torch scales uint8 without floats.
    scaled = F.interpolate(frames.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)
    return scaled.permute(0, 2, 3, 1)


def random_short_side(low: int, high: int, generator: Generator) -> int:
    """Uniform over the whole numbers low..high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def random_crop(frames: Tensor, size: int, generator: Generator) -> Tensor:
    """[T, H, W, C] -> [T, size, size, C], the same place in all frames, uniform over all places."""
    height, width = _fitting(frames, size)
    top = int(torch.randint(height - size + 1, (), generator=generator))
    left = int(torch.randint(width - size + 1, (), generator=generator))
    return frames[:, top : top + size, left : left + size]


def uniform_crops(frames: Tensor, size: int, num_crops: int) -> list[Tensor]:
    """`num_crops` times [T, size, size, C]: 1 is the centre, 3 are both ends and the centre of the longer side."""
    height, width = _fitting(frames, size)
    top, left = (height - size + 1) // 2, (width - size + 1) // 2
    if num_crops == 1:
        places = [(top, left)]
    elif num_crops == 3 and height > width:
        places = [(0, left), (top, left), (height - size, left)]
    elif num_crops == 3:
        places = [(top, 0), (top, left), (top, width - size)]
    else:
        raise ValueError(f"num_crops is {num_crops}; it must be 1 (centre) or 3 (along the longer side)")
    return [frames[:, y : y + size, x : x + size] for y, x in places]


def random_flip(frames: Tensor, generator: Generator) -> Tensor:
    """Left and right exchanged in every second clip on average, in all frames of it."""
    return frames.flip(2) if torch.rand((), generator=generator) < 0.5 else frames


def to_clip(frames: Tensor) -> Tensor:
    """[T, H, W, C] -> contiguous [C, T, H, W] that owns its memory."""
    return frames.permute(3, 0, 1, 2).clone(memory_format=torch.contiguous_format)


def normalize(clips: Tensor, mean: float | Sequence[float], std: float | Sequence[float]) -> Tensor:
    """uint8 [..., C, T, H, W] -> float (x / 255 - mean) / std, where the clips are. One value, or one per channel."""
    shift, scale = (_per_channel(name, value, clips) for name, value in (("mean", mean), ("std", std)))
    return clips.to(torch.float32, copy=True).div_(255).sub_(shift).div_(scale)


def _per_channel(name: str, value: float | Sequence[float], clips: Tensor) -> Tensor:
    values = torch.as_tensor(value, dtype=torch.float32, device=clips.device).reshape(-1, 1, 1, 1)
    if len(values) not in (1, clips.shape[-4]):
        raise ValueError(f"{name} has {len(values)} values; give 1, or {clips.shape[-4]}: one per channel")
    return values


def _fitting(frames: Tensor, size: int) -> tuple[int, int]:
    height, width = frames.shape[1:3]
    if size > min(height, width):
        raise ValueError(
            f"a crop of {size} does not fit into frames of {width}x{height}; make the short side at least {size}"
        )
    return height, width
