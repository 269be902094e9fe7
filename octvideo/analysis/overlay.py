"""What a network says, drawn over the frames it says it of: a panel of names with bars, and heat."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont
Frame = NDArray[np.uint8]  # RGB [H, W, 3]

# The colour map "inferno" at every tenth (S. van der Walt and N. Smith, matplotlib, CC0): its lightness rises evenly.
INFERNO = "000004 160b39 420a68 6a176e 932667 bc3754 dd513a f3771a fca50a f6d746 fcffa4"
STOPS = np.array([list(bytes.fromhex(stop)) for stop in INFERNO.split()], np.float32)
COLOURS = np.stack(
    [np.interp(np.linspace(0, len(STOPS) - 1, 256), np.arange(len(STOPS)), c) for c in STOPS.T], axis=1
).astype(np.float32)  # [256, 3], of heat 0 to 1
OPAQUE = 0.65  # share of colour where the heat is 1; where it is 0 the frame stays as it is
BOX, BAR, TEXT, MARK = (0, 0, 0, 150), (70, 130, 220, 200), (255, 255, 255), (255, 190, 60)
SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf")  # looked for where the system keeps its fonts


def heat_over(frames: Frame, heat: NDArray[Any]) -> Frame:
    """RGB uint8 [..., 3] under heat [...], 0 to 1: colour by COLOURS, and the more of it the hotter. A new array."""
    colour = COLOURS[np.rint(255 * np.clip(heat, 0, 1)).astype(np.uint8)]
    share = OPAQUE * np.clip(heat, 0, 1)[..., None]
    return np.rint(frames + share * (colour - frames)).astype(np.uint8)


def choose_font(size: float, names: Sequence[str], path: str | None = None) -> Font:
    """The font in `path`; without one, of SYSTEM_FONTS and Pillow's own the first that lacks fewest signs of the names.

    size: in pixels. Errors: OSError for a file that is no font.
    """
    if path is not None:
        return ImageFont.truetype(path, size)
    fonts = []
    for name in SYSTEM_FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:  # not on this system
            continue
    own = ImageFont.load_default(size)  # has ASCII only
    if isinstance(own, Font):
        fonts.append(own)
    if not fonts:
        raise OSError("this Pillow is built without FreeType")
    return min(fonts, key=lambda font: len(lacking("".join(names), font)))


def lacking(text: str, font: Font) -> list[str]:
    """The characters that the font has no picture for, sorted: it draws the same for them as for one that is none."""
    nothing = bytes(font.getmask("\U0010ffff"))
    return sorted({sign for sign in text if not sign.isspace() and bytes(font.getmask(sign)) == nothing})


def legible(text: str, font: Font) -> str:
    """The text with what the font lacks written as the letter without its marks (é as e), or else as ?."""
    absent = set(lacking(text, font))
    plain = {sign: unicodedata.normalize("NFKD", sign)[0] for sign in absent}
    still = set(lacking("".join(plain.values()), font))
    return "".join(sign if sign not in absent else "?" if plain[sign] in still else plain[sign] for sign in text)


def shortened(text: str, font: Font, width: float) -> str:
    """The text, or as much of its beginning as goes into `width` pixels with ... behind it."""
    if font.getlength(text) <= width:
        return text
    end = len(text)
    while end and font.getlength(text[:end].rstrip() + "...") > width:
        end -= 1
    return text[:end].rstrip() + "..."


def draw_panel(
    frame: Frame, title: str, rows: Sequence[tuple[str, float]], font: Font, *, mark: str = "", most: float = 0.6
) -> Frame:
    """A frame with a translucent box in its upper left: title, mark (in another colour), and names with their shares.

    rows: (name, 0 to 1), a bar as long as the share behind each. As many as fit into `most` of the frame's height; at
    least one. A frame too narrow for a few letters is given back as it is.
    """
    if frame.shape[1] < 8 * font.size:
        return frame
    image = Image.fromarray(frame)
    draw = ImageDraw.Draw(image, "RGBA")
    pad, line = round(font.size / 3), round(font.size * 1.45)
    width = min(image.width - 2 * pad, round(21 * font.size))
    heads = [(text, colour) for text, colour in ((title, TEXT), (mark, MARK)) if text]
    fitting = int((image.height * most - 3 * pad) // line) - len(heads)
    rows = rows[: max(1, fitting)]
    draw.rectangle((pad, pad, pad + width, pad * 3 + line * (len(heads) + len(rows))), fill=BOX)
    left, right, top = 2 * pad, width, 2 * pad
    for text, colour in heads:
        draw.text((left, top), shortened(legible(text, font), font, right - left), font=font, fill=colour)
        top += line
    for name, share in rows:
        percent = f"{100 * share:.1f} %"
        if bar := round((right - left) * share):
            draw.rectangle((left, top, left + bar, top + line - max(2, pad // 2)), fill=BAR)
        room = right - left - font.getlength(percent) - 2 * pad
        draw.text((left + pad // 2, top), shortened(legible(name, font), font, room), font=font, fill=TEXT)
        draw.text((right - font.getlength(percent) - pad // 2, top), percent, font=font, fill=TEXT)
        top += line
    return np.array(image)
