"""Pure functions on decoded frames: uint8 [T, H, W, C], the decoder's layout, in and out; and on batches of clips.

Sizes are in pixels. Randomness comes from the Generator that is handed in, and from nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

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


def random_resized_box(
    height: int, width: int, *, area: tuple[float, float], aspect: tuple[float, float], generator: Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random box in an image of height x width, to be resized to one size.

    Its share of the image is uniform in `area` = (low, high), its W / H log-uniform in `aspect`, its place uniform.
    If ten draws do not fit: the largest box in the middle whose W / H is the image's, held to `aspect`. (The recipe
    of Inception: Szegedy et al., arXiv 1409.4842, section 6.)
    """
    low, high = map(math.log, aspect)
    for _ in range(10):
        share, lean = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        pixels = height * width * (area[0] + share * (area[1] - area[0]))
        ratio = math.exp(low + lean * (high - low))
        h, w = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < h <= height and 0 < w <= width:
            top = int(torch.randint(height - h + 1, (), generator=generator))
            left = int(torch.randint(width - w + 1, (), generator=generator))
            return top, left, h, w
    ratio = min(max(width / height, aspect[0]), aspect[1])
    h, w = max(1, min(height, round(width / ratio))), max(1, min(width, round(height * ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


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
    """uint8 [N, C, ...] -> float (x / 255 - mean) / std, where the clips are. One value, or one per channel."""
    shift, scale = (_per_channel(name, value, clips) for name, value in (("mean", mean), ("std", std)))
    return clips.to(torch.float32, copy=True).div_(255).sub_(shift).div_(scale)


@lru_cache(maxsize=16)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copy constants once: on a GPU each copy would wait for all earlier work."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def _moved(indices: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to the device without waiting for it."""
    return indices.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else indices.to(device)


def _per_channel(name: str, value: float | Sequence[float], clips: Tensor) -> Tensor:
    values = _on_device(tuple(value) if isinstance(value, Sequence) else (value,), clips.device)
    if len(values) not in (1, clips.shape[1]):
        raise ValueError(f"{name} has {len(values)} values; give 1, or {clips.shape[1]}: one per channel")
    return values.reshape(-1, *[1] * (clips.ndim - 2))


def mixup(
    clips: Tensor, labels: Tensor, *, num_classes: int, alpha: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Blend each clip, and its target, with another one of the batch (Zhang et al., arXiv 1710.09412).

    Float clips [N, C, ...] and labels int64 [N] -> clips of the same shape, targets float32 [N, K], both new and where
    the clips are. One weight for the batch, from Beta(alpha, alpha). `generator` is one of the CPU.
    Errors: ValueError for alpha <= 0.
    """
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; it must be positive (leave mixup out instead of giving 0)")
    weight = _beta(alpha, generator)
    other = _moved(torch.randperm(len(clips), generator=generator), clips.device)
    targets = F.one_hot(labels, num_classes).float()
    return clips.lerp(clips[other], 1 - weight), targets.lerp(targets[other], 1 - weight)


def cutmix(
    clips: Tensor, labels: Tensor, *, num_classes: int, alpha: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Put a box of another clip of the batch into each, and share the target (Yun et al., arXiv 1905.04899).

    Float clips [N, C, (T,) H, W] and labels int64 [N] -> clips of the same shape, targets float32 [N, K], both new and
    where the clips are. One box for the batch, the same in all frames: its share of H x W is drawn from
    Beta(alpha, alpha), its centre is uniform, what lies outside is cut off. Targets are weighted by the pixels that
    there are. `generator` is one of the CPU.
    Errors: ValueError for alpha <= 0.
    """
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; it must be positive (leave cutmix out instead of giving 0)")
    side = math.sqrt(1 - _beta(alpha, generator))
    other = _moved(torch.randperm(len(clips), generator=generator), clips.device)
    rows, columns = (_part(length, side, generator) for length in clips.shape[-2:])
    mixed = clips.clone()
    mixed[..., rows, columns] = clips[..., rows, columns][other]
    pixels = (rows.stop - rows.start) * (columns.stop - columns.start)
    targets = F.one_hot(labels, num_classes).float()
    return mixed, targets.lerp(targets[other], pixels / math.prod(clips.shape[-2:]))


def _part(length: int, share: float, generator: Generator) -> slice:
    """A part of 0..length around a random pixel, cut off at the ends (the paper's algorithm 1, and its code)."""
    centre, half = int(torch.randint(length, (), generator=generator)), int(length * share) // 2
    return slice(max(0, centre - half), min(length, centre + half))


def _beta(alpha: float, generator: Generator) -> float:
    """A number from Beta(alpha, alpha): x / (x + y) of two numbers from Gamma(alpha). torch's takes no Generator."""
    # Gamma(alpha) = Gamma(alpha + 1) * U ** (1 / alpha). As logarithms, because at a small alpha x and y underflow.
    gamma = torch._standard_gamma(torch.full((2,), alpha + 1, dtype=torch.float64), generator=generator)
    uniform = torch.rand(2, generator=generator, dtype=torch.float64)
    x, y = gamma.log() + torch.log1p(-uniform) / alpha
    return float(torch.sigmoid(x - y))


def _fitting(frames: Tensor, size: int) -> tuple[int, int]:
    height, width = frames.shape[1:3]
    if size > min(height, width):
        raise ValueError(
            f"a crop of {size} does not fit into frames of {width}x{height}; make the short side at least {size}"
        )
    return height, width
