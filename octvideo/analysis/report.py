"""A run on one page: an HTML file that needs nothing else, no network and no other file.

report.html is the page, report.css its look, report.js sorts the class table and names the cells of the matrix.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from numpy.typing import NDArray
from PIL import Image

from octvideo.analysis import curves

FOLDER = Path(__file__).parent
LABELLED = 40  # most classes whose confusion matrix is a table with names; above, it is a picture
PAIRS = 15  # most confused pairs that are listed
FRAMES, FRAME_SIDE = 8, 160  # of a video: most frames shown, and pixels of their longer side
# Colours of the picture of the matrix from no video to all, in the light and the dark page (report.css).
SHADES = {
    "light": ((255, 255, 255), (43, 118, 205), (4, 28, 66)),
    "dark": ((23, 27, 33), (71, 137, 222), (228, 240, 255)),
}


@dataclass(frozen=True)
class WorstVideo:
    """A video that got a wrong class. label, predicted: numbers of classes; probability of the predicted one;
    frames: uint8 [T, H, W, 3], RGB, in the order of time; T may be 0."""

    path: str
    label: int
    predicted: int
    probability: float
    frames: NDArray[np.uint8]


@dataclass(frozen=True)
class ClassRow:
    """What became of the videos of class `number`. accuracy: right / videos, None without videos."""

    number: int
    name: str
    videos: int
    right: int
    failed: int
    taken_for: str
    taken: int

    @property
    def accuracy(self) -> float | None:
        return self.right / self.videos if self.videos else None


@dataclass(frozen=True)
class Pair:
    """`count` videos of class `label`, a share of its videos, taken for class `predicted`."""

    label: str
    predicted: str
    count: int
    share: float


def report_html(
    *,
    title: str,
    headline: Mapping[str, str],
    facts: Mapping[str, str],
    events: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    confusion: NDArray[np.integer],
    bins: NDArray[np.floating],
    failed: Sequence[tuple[str, str]],
    worst: Sequence[WorstVideo],
) -> str:
    """The page as text, to be written as UTF-8.

    headline: the few results shown large, such as {"top-1": "73.2 %"}. facts: what else was measured and how: name ->
    value. events: the parsed lines of metrics.jsonl (may be empty). classes: K names in the order of labels.
    confusion: integers [K, K + 1], videos by label and prediction, those that were not scored in the last column; they
    count as wrong. bins: [B, 3] mean confidence, accuracy (both 0 to 1, unread in an empty bin) and number of videos
    for B bins of equal width over the confidence 0 to 1. failed: path and reason of each video that was not scored.
    worst: shown with the most confident first.
    Everything is escaped; nothing of it can run or load anything. Raises ValueError for values that do not agree.
    """
    confusion, bins = np.asarray(confusion), np.asarray(bins, dtype=float)
    _check(classes, confusion, bins, failed, worst)
    charts = curves.curves(events)
    many = len(classes) > LABELLED
    script = (FOLDER / "report.js").read_text(encoding="utf-8")
    return _page().render(
        title=title,
        headline=headline,
        facts=facts,
        charts=[chart for chart in charts if chart.lines],
        without=[chart for chart in charts if not chart.lines],
        events=len(events),
        geometry=curves,
        classes=classes,
        videos=int(confusion.sum()),
        not_scored=int(confusion[:, -1].sum()),
        matrix=None if many else _matrix(confusion),
        pictures={name: _picture(confusion, shades) for name, shades in SHADES.items()} if many else None,
        cells=_cells(confusion) if many else None,
        shades={name: ", ".join(f"rgb{shade}" for shade in shades) for name, shades in SHADES.items()},
        pairs=pairs(classes, confusion),
        rows=class_rows(classes, confusion),
        bins=[_bin(number, len(bins), *values) for number, values in enumerate(bins.tolist())],
        calibration_error=calibration_error(bins),
        failed=failed,
        worst=[(video, _frames(video.frames)) for video in sorted(worst, key=lambda video: -video.probability)],
        style=(FOLDER / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _check(
    classes: Sequence[str],
    confusion: NDArray[Any],
    bins: NDArray[Any],
    failed: Sequence[tuple[str, str]],
    worst: Sequence[WorstVideo],
) -> None:
    k = len(classes)
    if k == 0 or confusion.shape != (k, k + 1):
        raise ValueError(
            f"confusion is {list(confusion.shape)} for {k} classes; it must be [{k}, {k + 1}]: a row for each label, "
            "a column for each prediction and a last one for videos that were not scored; at least one class"
        )
    if confusion.dtype.kind not in "iu" or (confusion < 0).any():
        raise ValueError(f"confusion holds {confusion.dtype}, smallest {confusion.min()}; it must be counts of videos")
    if len(failed) != confusion[:, -1].sum():
        raise ValueError(
            f"{len(failed)} failed videos are named, the last column of confusion counts {confusion[:, -1].sum()}"
        )
    if bins.ndim != 2 or bins.shape[1] != 3 or not len(bins):
        raise ValueError(f"bins are {list(bins.shape)}; they must be [B, 3]: mean confidence, accuracy, videos")
    means, counts = bins[bins[:, 2] != 0, :2], bins[:, 2]
    if not ((means >= 0) & (means <= 1)).all() or not ((counts >= 0) & (counts % 1 == 0)).all():
        raise ValueError("bins: confidence and accuracy must be from 0 to 1, and the last column counts of videos")
    for video in worst:
        _check_worst(video, k)


def _check_worst(video: WorstVideo, k: int) -> None:
    if not (0 <= video.label < k and 0 <= video.predicted < k) or video.label == video.predicted:
        raise ValueError(
            f"{video.path}: label {video.label}, predicted {video.predicted}; they must be two numbers of 0..{k - 1}"
        )
    if not 0 <= video.probability <= 1:
        raise ValueError(f"{video.path}: probability {video.probability}; it must be from 0 to 1")
    if video.frames.dtype != np.uint8 or video.frames.ndim != 4 or video.frames.shape[3] != 3:
        raise ValueError(
            f"{video.path}: frames are {video.frames.dtype} {list(video.frames.shape)}; they must be uint8 [T, H, W, 3]"
        )


def class_rows(classes: Sequence[str], confusion: NDArray[np.integer]) -> list[ClassRow]:
    """The classes of confusion [K, K + 1], the least accurate first, those without videos last."""
    rows = []
    for number, name in enumerate(classes):
        counts = confusion[number, :-1]
        wrong = np.where(np.arange(len(classes)) == number, 0, counts)
        taken = int(wrong.max())
        taken_for = classes[int(wrong.argmax())] if taken else ""
        videos, failed = int(confusion[number].sum()), int(confusion[number, -1])
        rows.append(ClassRow(number, name, videos, int(counts[number]), failed, taken_for, taken))
    return sorted(rows, key=lambda row: (row.accuracy is None, row.accuracy))


def pairs(classes: Sequence[str], confusion: NDArray[np.integer], most: int = PAIRS) -> list[Pair]:
    """The most frequent confusions of [K, K + 1] by number of videos, then by their share of the label's videos."""
    wrong = confusion[:, :-1] * (1 - np.eye(len(classes), dtype=confusion.dtype))
    shares = _shares(confusion)
    cells = sorted(
        zip(*(axis.tolist() for axis in np.nonzero(wrong)), strict=True),
        key=lambda cell: (-int(wrong[cell]), -float(shares[cell])),
    )
    return [Pair(classes[i], classes[j], int(wrong[i, j]), float(shares[i, j])) for i, j in cells[:most]]


def calibration_error(bins: NDArray[np.floating]) -> float | None:
    """Expected calibration error of bins [B, 3]: |accuracy - confidence|, 0 to 1, averaged over videos; None without."""
    full = bins[bins[:, 2] > 0]
    return float(np.average(np.abs(full[:, 1] - full[:, 0]), weights=full[:, 2])) if len(full) else None


def _shares(confusion: NDArray[np.integer]) -> NDArray[np.floating]:
    """[K, K + 1] counts -> shares of each label's videos; zeros for a class without videos."""
    return confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)


def _depth(shares: NDArray[np.floating]) -> NDArray[np.floating]:
    """How dark a share is: its square root, because confusions are mostly a few percent and should show."""
    return np.sqrt(shares)


def _matrix(confusion: NDArray[np.integer]) -> list[list[tuple[int, float, float]]]:
    """Count, share and depth of each cell."""
    shares = _shares(confusion)
    return [
        list(zip(*row, strict=True))
        for row in zip(confusion.tolist(), shares.tolist(), _depth(shares).tolist(), strict=True)
    ]


def _picture(confusion: NDArray[np.integer], shades: Sequence[tuple[int, int, int]]) -> str:
    """A pixel for each cell of [K, K], without the last column, which would be too narrow to see."""
    depth = np.round(255 * _depth(_shares(confusion)[:, :-1])).astype(np.uint8)
    image = Image.fromarray(depth, "L")
    image.putpalette(_palette(shades))
    return _data_uri(image, "PNG", optimize=True)


def _palette(shades: Sequence[tuple[int, int, int]]) -> list[int]:
    places = np.linspace(0, 255, len(shades))
    levels = [np.interp(np.arange(256), places, channel) for channel in zip(*shades, strict=True)]
    return np.round(np.stack(levels, axis=1)).astype(int).flatten().tolist()


def _cells(confusion: NDArray[np.integer]) -> str:
    """The cells that are not 0 for report.js: rows by ';', cells by ',', each prediction:count."""
    rows = ([(j, int(row[j])) for j in np.nonzero(row)[0]] for row in confusion[:, :-1])
    return ";".join(",".join(f"{j}:{count}" for j, count in row) for row in rows)


def _bin(number: int, bins: int, confidence: float, accuracy: float, count: float) -> dict[str, float]:
    return {
        "low": number / bins,
        "high": (number + 1) / bins,
        "confidence": confidence,
        "accuracy": accuracy,
        "count": int(count),
    }


def _frames(frames: NDArray[np.uint8]) -> list[str]:
    """Of [T, H, W, 3] at most FRAMES, evenly spread from the first to the last, as small pictures."""
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), FRAMES)).round().astype(int)
    pictures = []
    for frame in frames[chosen]:
        image = Image.fromarray(np.ascontiguousarray(frame), "RGB")
        image.thumbnail((FRAME_SIDE, FRAME_SIDE))
        pictures.append(_data_uri(image, "JPEG", quality=85))
    return pictures


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


# Control characters, which HTML does not allow, and halves of characters, which stand for bytes of a file name that are
# not UTF-8 and cannot be written as UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def _printable(value: Any) -> Any:
    """Text with what cannot be printed as its escape; anything else as it is."""
    plain = type(value) is str  # and not the subclass for markup of our own
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], value) if plain else value


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _page() -> Template:
    """The template. What it prints is made printable, then escaped."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    return environment.get_template("report.html")
