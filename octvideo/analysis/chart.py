"""Line charts as a picture: panels in rows, one legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

FINER = 3  # everything is drawn so many times larger and then reduced, which smooths lines and letters
WIDTH, HEIGHT = 300, 230  # pixels of a panel, axes and texts included
LEFT, RIGHT, TOP, BOTTOM = 46, 288, 26, 190  # of the part that lines are drawn in
TEXT_SIZE, DOT, DASH, GAP = 12, 2, 6, 8
LEGEND, SAMPLE = 26, 64  # height of its row; width of an entry besides its text
INK, GREY, LIGHT = "#222222", "#888888", "#dddddd"
LOWEST = 1e-6  # of a panel's highest value; what is below is not drawn, nor is 0
LABELLED = 8  # values of the y axis; where there are more of 1, 2 and 5, only powers of ten

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """points: (x, y), of which those with y above LOWEST are drawn. name: with its colour, once in the legend."""

    name: str
    colour: str
    points: Sequence[Point]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """x from 0 to `end`, y logarithmic as far as the lines go. upright, level: x and y of thin lines to compare with."""

    title: str
    across: str
    lines: Sequence[Line]
    end: float
    upright: float
    level: float


def draw(rows: Sequence[Sequence[Panel]], note: str) -> Image.Image:
    """note: a line of text below everything, e.g. what y is."""
    legend = list({line.name: line for row in rows for panel in row for line in panel.lines}.values())
    texts = sum(SAMPLE + _width(line.name) for line in legend), _width(note)
    width = max(len(rows[0]) * WIDTH, math.ceil(LEFT + max(texts)) + GAP)
    height = len(rows) * HEIGHT + 2 * LEGEND
    image = Image.new("RGB", (width * FINER, height * FINER), "white")
    canvas = ImageDraw.Draw(image)
    for down, row in enumerate(rows):
        for along, panel in enumerate(row):
            _Frame(canvas, along * WIDTH, down * HEIGHT, _values(panel), panel.end).draw(panel)
    _legend(canvas, legend, len(rows) * HEIGHT, note)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _values(panel: Panel) -> list[float]:
    """The values of the y axis: 1, 2 and 5 times powers of ten, or those alone, from below all that is drawn to above."""
    drawn = [y for line in panel.lines for _, y in line.points if y > 0] + [panel.level]
    high = max(drawn)
    low = min(y for y in drawn if y >= high * LOWEST)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in (1, 2, 5), (1,):
        steps = [factor * 10.0**power for power in powers for factor in factors]
        first = max([step for step in steps if step <= low * (1 + 1e-9)])
        last = min([step for step in steps if step >= high * (1 - 1e-9) and step > first])
        steps = [step for step in steps if first <= step <= last]
        if len(steps) <= LABELLED:
            break
    return steps


@dataclass(frozen=True)
class _Frame:
    """Where a panel's values lie on the canvas. values: of the y axis, labelled."""

    canvas: ImageDraw.ImageDraw
    left: int
    top: int
    values: list[float]
    end: float

    def place(self, x: float, y: float) -> Point:
        low, high = self.values[0], self.values[-1]
        across = self.left + LEFT + (RIGHT - LEFT) * x / self.end
        down = self.top + BOTTOM - (BOTTOM - TOP) * math.log(y / low) / math.log(high / low)
        return across * FINER, down * FINER

    def draw(self, panel: Panel) -> None:
        low, high = self.values[0], self.values[-1]
        for y in self.values:
            self.line((0, y), (self.end, y), LIGHT)
            self.text(f"{y:.6g}", self.place(0, y), "rm", (-6, 0))
        for fifth in range(6):
            x = self.end * fifth / 5
            self.line((x, low), (x, high), LIGHT)
            self.text(f"{x:g}", self.place(x, low), "mt", (0, 6))
        self.line((panel.upright, low), (panel.upright, high), GREY)
        self.line((0, panel.level), (self.end, panel.level), GREY)
        self.text(panel.title, self.place(0, high), "lb", (0, -7))
        self.text(panel.across, self.place(self.end / 2, low), "mt", (0, 22))
        for line in panel.lines:
            _curve(self.canvas, [self.place(x, y) for x, y in line.points if low <= y <= high], line)

    def line(self, start: Point, stop: Point, colour: str) -> None:
        self.canvas.line([self.place(*start), self.place(*stop)], colour, FINER)

    def text(self, text: str, place: Point, anchor: str, shift: Point) -> None:
        _text(self.canvas, text, (place[0] + shift[0] * FINER, place[1] + shift[1] * FINER), anchor)


def _text(canvas: ImageDraw.ImageDraw, text: str, place: Point, anchor: str) -> None:
    canvas.text(place, text, INK, _font(), anchor=anchor)


def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(TEXT_SIZE * FINER)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise OSError("this Pillow is built without FreeType")
    return font


def _width(text: str) -> float:
    """In pixels of the finished picture."""
    return _font().getlength(text) / FINER


def _curve(canvas: ImageDraw.ImageDraw, places: Sequence[Point], line: Line) -> None:
    for start, stop in pairwise(places):
        for piece in _dashes(start, stop) if line.dashed else [(start, stop)]:
            canvas.line(piece, line.colour, 2 * FINER)
    for x, y in places:
        reach = DOT * FINER
        canvas.ellipse((x - reach, y - reach, x + reach, y + reach), line.colour)


def _dashes(start: Point, stop: Point) -> list[tuple[Point, Point]]:
    pieces = max(1, round(math.dist(start, stop) / (DASH * FINER)) // 2 * 2 + 1)  # odd: both ends are drawn

    def at(share: float) -> Point:
        return start[0] + (stop[0] - start[0]) * share, start[1] + (stop[1] - start[1]) * share

    return [(at(piece / pieces), at((piece + 1) / pieces)) for piece in range(0, pieces, 2)]


def _legend(canvas: ImageDraw.ImageDraw, lines: Sequence[Line], top: int, note: str) -> None:
    left, middle = float(LEFT * FINER), (top + LEGEND / 2) * FINER
    for line in lines:
        _curve(canvas, [(left, middle), (left + 28 * FINER, middle)], line)
        _text(canvas, line.name, (left + 36 * FINER, middle), "lm")
        left += (SAMPLE + _width(line.name)) * FINER
    _text(canvas, note, (LEFT * FINER, (top + LEGEND * 1.4) * FINER), "lm")
