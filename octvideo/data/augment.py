"""RandAugment for clips (Cubuk et al., arXiv 1909.13719): Pillow makes the pixels, here is what is drawn and how much.

The 14 operations of the paper. Their ranges are AutoAugment's (Cubuk et al., arXiv 1805.09501), and a larger magnitude
is a stronger change in all of them, as in torchvision.transforms.RandAugment. At level l, which is magnitude / 10 and
for the signed ones that or its negative, equally likely:

    identity       nothing                                                              no level
    autocontrast   each channel stretched to 0..255                                     no level
    equalize       each channel's histogram made flat                                   no level
    solarize       grey levels from 256 - 256 l on inverted                             256 to 0
    posterize      the upper 8 - 4 l bits kept, to the nearest number                   8 to 4
    color          1 + 0.9 l times the distance from grey                               0.1 to 1.9    signed
    contrast       1 + 0.9 l times the distance from the mean                           0.1 to 1.9    signed
    brightness     1 + 0.9 l times the grey level                                       0.1 to 1.9    signed
    sharpness      1 + 0.9 l times the distance from the smoothed picture               0.1 to 1.9    signed
    rotate         30 l degrees to the left, about the centre                           -30 to 30     signed
    shear_x        content moved 0.3 l pixels to the left per row, from the top on      -0.3 to 0.3   signed
    shear_y        content moved 0.3 l pixels up per column, from the left on           -0.3 to 0.3   signed
    translate_x    content moved 150/331 l of the width to the left, whole pixels       -0.45 to 0.45 signed
    translate_y    content moved 150/331 l of the height up, whole pixels               -0.45 to 0.45 signed

Nothing mirrors: left stays left. What comes in from outside the picture is GREY, that of the paper's code; between
pixels values are bilinear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Generator, Tensor

GREY = (128, 128, 128)
Operation = Callable[[Image.Image, float], Image.Image]  # picture and level -> picture


def rand_augment(frames: Tensor, *, num_ops: int, magnitude: float, std: float = 0.0, generator: Generator) -> Tensor:
    """`num_ops` operations one after another, each drawn uniformly from the 14, the same in all frames.

    uint8 [T, H, W, C = 3] -> new frames of the same shape. `magnitude` is 0 to 10; with `std` it is drawn for each
    operation from the normal distribution of that deviation around it, and cut to 0..10 (timm's mstd; the paper's is 0).
    Errors: ValueError for numbers outside their range.
    """
    check_rand_augment(num_ops, magnitude, std)
    operations = []
    for _ in range(num_ops):
        name = NAMES[int(torch.randint(len(NAMES), (), generator=generator))]
        sign = 1 if torch.rand((), generator=generator) < 0.5 else -1
        strength = magnitude
        if std:
            strength = min(max(magnitude + std * float(torch.randn((), generator=generator)), 0), 10)
        operations.append((name, sign * strength / 10))
    return operate(frames, operations)


def check_rand_augment(num_ops: int, magnitude: float, std: float) -> None:
    """Raises ValueError for numbers outside their range."""
    if num_ops < 0:
        raise ValueError(f"RandAugment's number of operations is {num_ops}; it must be 0 (none) or more")
    if not 0 <= magnitude <= 10:
        raise ValueError(f"RandAugment's magnitude is {magnitude}; it must be 0 to 10")
    if not 0 <= std <= 10:
        raise ValueError(f"RandAugment's deviation of the magnitude is {std}; it must be 0 (none) to 10")


def operate(frames: Tensor, operations: Iterable[tuple[str, float]]) -> Tensor:
    """uint8 [T, H, W, C = 3] -> new ones: names of OPERATIONS, each with its level from -1 to 1, one after another.

    Of a level below 0 the unsigned operations take the size.
    """
    height = frames.shape[1]
    # The frames below each other are one picture, [T * H, W, C]. So what follows from a histogram or a mean follows
    # from the clip's. Frame by frame, a clip would flicker.
    picture = Image.fromarray(frames.flatten(0, 1).numpy())
    for name, level in operations:
        operation = OPERATIONS[name]
        picture = _per_frame(picture, height, operation, level) if name in PER_FRAME else operation(picture, level)
    return torch.from_numpy(np.array(picture)).unflatten(0, (-1, height))


def _per_frame(picture: Image.Image, height: int, operation: Operation, level: float) -> Image.Image:
    out = Image.new(picture.mode, picture.size)
    for top in range(0, picture.height, height):
        frame = picture.crop((0, top, picture.width, top + height))
        out.paste(operation(frame, level), (0, top))
    return out


def _solarize(picture: Image.Image, level: float) -> Image.Image:
    return ImageOps.solarize(picture, 256 - round(256 * abs(level)))


def _posterize(picture: Image.Image, level: float) -> Image.Image:
    return ImageOps.posterize(picture, 8 - round(4 * abs(level)))


def _rotate(picture: Image.Image, level: float) -> Image.Image:
    return picture.rotate(30 * level, Image.Resampling.BILINEAR, fillcolor=GREY)


def _affine(picture: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Output (x, y) is input (a x + b y + c, d x + e y + f) of `matrix` = (a, b, c, d, e, f)."""
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


def _translate(picture: Image.Image, left: int, up: int) -> Image.Image:
    out = Image.new(picture.mode, picture.size, GREY)
    out.paste(picture, (-left, -up))
    return out


OPERATIONS: dict[str, Operation] = {
    "identity": lambda picture, level: picture,
    "autocontrast": lambda picture, level: ImageOps.autocontrast(picture),
    "equalize": lambda picture, level: ImageOps.equalize(picture),
    "solarize": _solarize,
    "posterize": _posterize,
    "color": lambda picture, level: ImageEnhance.Color(picture).enhance(1 + 0.9 * level),
    "contrast": lambda picture, level: ImageEnhance.Contrast(picture).enhance(1 + 0.9 * level),
    "brightness": lambda picture, level: ImageEnhance.Brightness(picture).enhance(1 + 0.9 * level),
    "sharpness": lambda picture, level: ImageEnhance.Sharpness(picture).enhance(1 + 0.9 * level),
    "rotate": _rotate,
    "shear_x": lambda picture, level: _affine(picture, (1, 0.3 * level, 0, 0, 1, 0)),
    "shear_y": lambda picture, level: _affine(picture, (1, 0, 0, 0.3 * level, 1, 0)),
    "translate_x": lambda picture, level: _translate(picture, round(150 / 331 * picture.width * level), 0),
    "translate_y": lambda picture, level: _translate(picture, 0, round(150 / 331 * picture.height * level)),
}
# These look at a pixel's place or neighbours, which must be of the same frame.
PER_FRAME = frozenset({"sharpness", "rotate", "shear_x", "shear_y", "translate_y"})
NAMES = tuple(OPERATIONS)
