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
from typing import Any, Protocol

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from numpy.typing import NDArray
from PIL import Image

from octvideo.analysis import curves

FOLDER = Path(__file__).parent
LABELLED = 40  # most classes whose confusion matrix is a table with names; above, it is a picture
FRAMES, FRAME_SIDE = 8, 160  # of a video: most frames shown, and pixels of their longer side
# Colours of the picture of the matrix from no video to all, in the light and the dark page (report.css).
SHADES = {
    "light": ((255, 255, 255), (43, 118, 205), (4, 28, 66)),
    "dark": ((23, 27, 33), (71, 137, 222), (228, 240, 255)),
}


@dataclass(frozen=True)
class WorstVideo:
    """A video that got a wrong class. label, predicted: numbers of classes; probability of the predicted one, 0 to 1;
    frames: uint8 [T, H, W, 3], RGB, in the order of time; T may be 0, and `note` says why."""

    path: str
    label: int
    predicted: int
    probability: float
    frames: NDArray[np.uint8]
    note: str = ""


class ClassRow(Protocol):
    """What became of the videos of class `label`; octvideo.engine.metrics.ClassRow is one.

    accuracy: percent of `videos`, those that were not scored included; NaN without videos. confused_with: the class that
    `confused_videos` of them, the most, were taken for; unread where those are 0.
    """

    @property
    def label(self) -> int: ...
    @property
    def videos(self) -> int: ...
    @property
    def scored(self) -> int: ...
    @property
    def correct(self) -> int: ...
    @property
    def accuracy(self) -> float: ...
    @property
    def confused_with(self) -> int: ...
    @property
    def confused_videos(self) -> int: ...


def report_html(
    *,
    title: str,
    headline: Mapping[str, str],
    facts: Mapping[str, str],
    events: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    confusion: NDArray[np.integer],
    rows: Sequence[ClassRow],
    pairs: Sequence[tuple[int, int, int]],
    bins: NDArray[np.floating],
    calibration_error: float | None,
    failed: Sequence[tuple[str, str]],
    worst: Sequence[WorstVideo],
    history: str = "",
) -> str:
    """The page as text, to be written as UTF-8.

    headline: the few results shown large, such as {"top-1": "73.2 %"}. facts: what else was measured and how: name ->
    value. events: the parsed lines of metrics.jsonl (may be empty). classes: K names in the order of labels.
    confusion: integers [K, K + 1], videos by label and prediction, those that were not scored in the last column; they
    count as wrong. rows: one for each class, in any order. pairs: (label, class it was taken for, videos), shown in this
    order. bins: [B, 3] mean confidence, accuracy (both 0 to 1, unread in an empty bin) and number of videos
    for B bins of equal width over the confidence 0 to 1. calibration_error: what they come to, in percent; None where no
    video is in them. failed: path and reason of each video that was not scored. worst: shown with the most confident
    first. history: a sentence on where the events are from, or why there are none.
    Everything is escaped; nothing of it can run or load anything. Raises ValueError for values that do not agree.
    """
    confusion, bins = np.asarray(confusion), np.asarray(bins, dtype=float)
    _check(classes, confusion, bins, failed, worst)
    _check_tables(confusion, rows, pairs, bins, calibration_error)
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
        history=history,
        geometry=curves,
        classes=classes,
        videos=int(confusion.sum()),
        not_scored=int(confusion[:, -1].sum()),
        matrix=None if many else _matrix(confusion),
        pictures={name: _picture(confusion, shades) for name, shades in SHADES.items()} if many else None,
        cells=_cells(confusion) if many else None,
        shades={name: ", ".join(f"rgb{shade}" for shade in shades) for name, shades in SHADES.items()},
        confusion=confusion,
        pairs=pairs,
        rows=sorted(rows, key=lambda row: (not row.videos, row.accuracy)),
        bins=[_bin(number, len(bins), *values) for number, values in enumerate(bins.tolist())],
        calibration_error=calibration_error,
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


def _check_tables(
    confusion: NDArray[Any],
    rows: Sequence[ClassRow],
    pairs: Sequence[tuple[int, int, int]],
    bins: NDArray[Any],
    calibration_error: float | None,
) -> None:
    """What was counted elsewhere, against the matrix that stands beside it."""
    k, videos = len(confusion), confusion.sum(axis=1).tolist()
    if sorted((row.label, row.videos) for row in rows) != list(enumerate(videos)):
        raise ValueError(f"rows must be one for each of the classes 0..{k - 1}, with its number of videos in confusion")
    for label, other, count in pairs:
        if not (0 <= label < k and 0 <= other < k) or label == other or count != confusion[label, other]:
            raise ValueError(f"pairs hold {(label, other, count)}, which is no cell of confusion beside its diagonal")
    if (calibration_error is None) != (not bins[:, 2].any()):
        raise ValueError(f"calibration_error is {calibration_error}; it must be None if and only if bins are empty")


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


def spread(num_frames: int) -> list[int]:
    """The frames of a video to show: at most FRAMES, evenly spread from the first to the last."""
    return np.linspace(0, num_frames - 1, min(num_frames, FRAMES)).round().astype(int).tolist()


def thumbnail(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB uint8 [H, W, 3] as it is shown: its longer side at most FRAME_SIDE, so that few bytes wait for the page."""
    image = Image.fromarray(np.ascontiguousarray(frame), "RGB")
    image.thumbnail((FRAME_SIDE, FRAME_SIDE))
    return np.asarray(image)


def _frames(frames: NDArray[np.uint8]) -> list[str]:
    """Those of [T, H, W, 3] that are shown."""
    chosen = (Image.fromarray(thumbnail(frames[number]), "RGB") for number in spread(len(frames)))
    return [_data_uri(image, "JPEG", quality=85) for image in chosen]


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
