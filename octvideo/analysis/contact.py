"""A contact sheet: the frames of clips in rows, to see what a network is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, LINE = 4, 16  # pixels; LINE holds a row's title


def contact_sheet(
    rows: Sequence[tuple[str, Tensor]], font: ImageFont.FreeTypeFont | ImageFont.ImageFont | None = None
) -> Image.Image:
    """Titles and uint8 clips [C, T, H, W] (or images [C, H, W]), RGB -> one picture, a row each, time to the right.

    font: of the titles, at most LINE pixels high; None is Pillow's own.
    """
    clips = [(title, clip if clip.dim() == 4 else clip.unsqueeze(1)) for title, clip in rows]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    titles = [math.ceil(measure.textlength(title, font)) + MARGIN for title, _ in clips]
    width = max(*titles, *(clip.shape[1] * (clip.shape[3] + MARGIN) for _, clip in clips)) + MARGIN
    height = sum(clip.shape[2] + LINE + MARGIN for _, clip in clips) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for title, clip in clips:
        draw.text((MARGIN, top), title, fill="black", font=font)
        for t in range(clip.shape[1]):
            frame = clip[:, t].permute(1, 2, 0).numpy()  # [C, H, W] -> [H, W, C]
            left = MARGIN + t * (clip.shape[3] + MARGIN)
            sheet.paste(Image.fromarray(np.ascontiguousarray(frame)), (left, top + LINE))
        top += clip.shape[2] + LINE + MARGIN
    return sheet
