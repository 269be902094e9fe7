"""What a network gave for each view of each video: one file, averaged over views in any order, and over networks.

M videos are seen in a grid of num_clips x num_crops views; a row is one view. Rows may come in any order, twice, or not
at all.
"""

from __future__ import annotations

import io
import json
import math
import sys
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from octvideo.claims import StoredZip
from octvideo.engine.classes import check_class_order
from octvideo.errors import RunError
from octvideo.files import write_atomic

FORMAT = 1
AVERAGES = ("softmax", "logits")
BLOCK = 4096  # rows averaged at a time: those of Kinetics-400's test as float64 would take 2 GB
MOST_VIEWS = 10**4  # of a grid, and
MOST_CELLS = 2**31  # of a table of videos or classes by classes: what a file may make its reader put aside
SHOWN = 3  # videos that a message lists

# The arrays of a file: kind and number of axes. U is text.
ARRAYS = {
    "format": ("int64", 0),
    "logits": ("float32", 2),
    "video": ("int64", 1),
    "clip": ("int64", 1),
    "crop": ("int64", 1),
    "labels": ("int64", 1),
    "names": ("U", 1),
    "classes": ("U", 1),
    "grid": ("int64", 1),
    "failed_videos": ("int64", 1),
    "failed_reasons": ("U", 1),
    "facts": ("U", 0),
}


class ScoresError(RunError, ValueError):
    """Scores that cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True, eq=False)
class ViewScores:
    """logits float32 [R, K]; video, clip, crop int64 [R] say of which view each row is; labels int64 [M].

    names: the M paths as the list has them. classes: K names in the order of labels, or none. failed: (video, reason).
    facts: plain values about where the scores are from (checkpoint, model, alpha, policy of the clips, ...).
    """

    logits: Tensor
    video: Tensor
    clip: Tensor
    crop: Tensor
    labels: Tensor
    num_clips: int
    num_crops: int
    failed: list[tuple[int, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write an .npz of plain arrays (see ARRAYS). Raises ScoresError for scores that `load` would refuse."""
        _check(self, path)
        arrays = {
            "format": np.array(FORMAT),
            **{name: getattr(self, name).numpy() for name in ("logits", "video", "clip", "crop", "labels")},
            "names": np.array(self.names, np.str_),
            "classes": np.array(self.classes, np.str_),
            "grid": np.array([self.num_clips, self.num_crops]),
            "failed_videos": np.array([video for video, _ in self.failed], np.int64),
            "failed_reasons": np.array([_as_text(reason) for _, reason in self.failed], np.str_),
            "facts": np.array(json.dumps(self.facts)),
        }
        write_atomic(path, lambda file: np.savez(file, **arrays))

    def without_views(self) -> ViewScores:
        """The same list of videos with no row: what is left to know, in little memory, once they are averaged."""
        rows = {name: getattr(self, name)[:0].clone() for name in ("logits", "video", "clip", "crop")}
        return replace(self, **rows)

    @classmethod
    def load(cls, path: Path) -> ViewScores:
        """Read what `save` wrote. Raises ScoresError for anything else, naming the file and what is wrong."""
        arrays = _read(path)
        try:
            facts = json.loads(str(arrays["facts"]), parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise ScoresError(f"{path}: facts is not JSON text ({error})") from None
        if len(arrays["grid"]) != 2:
            raise ScoresError(f"{path}: grid has {len(arrays['grid'])} numbers; allowed: 2, clips and crops")
        num_clips, num_crops = arrays["grid"].tolist()
        numbers = {name: torch.from_numpy(arrays[name]) for name in ("logits", "video", "clip", "crop", "labels")}
        videos, reasons = arrays["failed_videos"].tolist(), arrays["failed_reasons"].tolist()
        if len(videos) != len(reasons):
            raise ScoresError(f"{path}: {len(videos)} failed_videos, but {len(reasons)} failed_reasons")
        scores = cls(
            **numbers,
            num_clips=num_clips,
            num_crops=num_crops,
            failed=list(zip(videos, reasons, strict=True)),
            names=arrays["names"].tolist(),
            classes=arrays["classes"].tolist(),
            facts=facts,
        )
        _check(scores, path)
        return scores


class Averaged(NamedTuple):
    """probabilities float64 [M, K], zeros where not scored; scored bool [M]; complete bool [M]: by all views asked for."""

    probabilities: Tensor
    scored: Tensor
    complete: Tensor

    @classmethod
    def of_none(cls, num_videos: int, num_classes: int) -> Averaged:
        """No video is scored."""
        none = torch.zeros(num_videos, dtype=torch.bool)
        return cls(torch.zeros(num_videos, num_classes, dtype=torch.float64), none, none)

    @property
    def incomplete(self) -> int:
        """Videos averaged over fewer views, or networks, than asked for."""
        return int((self.scored & ~self.complete).sum())


def aggregate(
    scores: ViewScores,
    average: str = "softmax",
    clips: Sequence[int] | None = None,
    crops: Sequence[int] | None = None,
) -> Averaged:
    """One row of probabilities for each video, the mean over its views.

    average: "softmax", the mean of each view's softmax; "logits", the softmax of the mean logits. clips, crops: numbers
    in the grid of those to use; None: all. The same bits for any order of rows. A view that is there twice counts once;
    a video that lacks views is averaged over those that it has.
    Errors: ScoresError where a view is there twice with different logits.
    """
    if average not in AVERAGES:
        raise ScoresError(f"average is {average!r}; allowed: {', '.join(AVERAGES)}")
    clips = range(scores.num_clips) if clips is None else clips
    crops = range(scores.num_crops) if crops is None else crops
    rows = _rows_of(scores, clips, crops)
    num_videos, num_classes = len(scores.labels), scores.logits.shape[1]
    total = torch.zeros(num_videos, num_classes, dtype=torch.float64)
    for part in rows.split(BLOCK):
        logits = scores.logits[part].double()
        total.index_add_(0, scores.video[part], logits.softmax(dim=1) if average == "softmax" else logits)
    views = torch.bincount(scores.video[rows], minlength=num_videos)
    mean = total / views.clamp(min=1)[:, None]
    if average == "logits":
        mean = mean.softmax(dim=1)
    mean[views == 0] = 0
    return Averaged(mean, views > 0, views == len(clips) * len(crops))


def combine(
    members: Sequence[ViewScores], averaged: Sequence[Averaged], weights: Sequence[float], sources: Sequence[str]
) -> Averaged:
    """The weighted mean of several networks' probabilities, in the order of the first one's videos.

    averaged: of each member. Videos are matched by name. One that a network has not scored is averaged over the others.
    sources: what messages call the members, their files.
    Errors: ScoresError, ClassOrderError where they are not of the same videos, labels and classes.
    """
    first = members[0]
    shape = averaged[0].probabilities.shape
    total, weight = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[0], 1, dtype=torch.float64)
    complete = torch.ones(shape[0], dtype=torch.bool)
    for member, own, share, source in zip(members, averaged, weights, sources, strict=True):
        places = _places(first, member, sources[0], source)
        total += share * own.probabilities[places]
        weight += share * own.scored[places, None]
        complete &= own.complete[places]
    scored = weight[:, 0] > 0
    return Averaged(torch.where(scored[:, None], total / weight, 0.0), scored, complete)


def _rows_of(scores: ViewScores, clips: Sequence[int], crops: Sequence[int]) -> Tensor:
    """The rows of these views, each view once, in the order of videos, clips and crops."""
    wanted = torch.isin(scores.clip, torch.tensor(clips)) & torch.isin(scores.crop, torch.tensor(crops))
    rows = wanted.nonzero().flatten()
    view = (scores.video * scores.num_clips + scores.clip) * scores.num_crops + scores.crop
    rows = rows[view[rows].argsort(stable=True)]
    again = torch.zeros(len(rows), dtype=torch.bool)
    again[1:] = view[rows[1:]] == view[rows[:-1]]
    repeated = again.nonzero().flatten()
    differ = (scores.logits[rows[repeated]] != scores.logits[rows[repeated - 1]]).any(dim=1)
    if differ.any():
        row = int(rows[repeated[differ][0]])
        video, clip, crop = (int(column[row]) for column in (scores.video, scores.clip, scores.crop))
        name = scores.names[video] if scores.names else f"video {video}"
        raise ScoresError(
            f"{name}: clip {clip}, crop {crop} is there twice, with different logits; take out one of them"
        )
    return rows[~again]


def _places(first: ViewScores, other: ViewScores, a: str, b: str) -> list[int]:
    """Where each of the first one's videos stands in the other."""
    if first.logits.shape[1] != other.logits.shape[1]:
        raise ScoresError(f"{b}: scores of {other.logits.shape[1]} classes, but {a} has {first.logits.shape[1]}")
    check_class_order(other.classes, first.classes, b, whose=(b, a))
    place = {name: index for index, name in enumerate(other.names)}
    if place.keys() != set(first.names):
        ours = set(first.names)
        lacking = [name for name in first.names if name not in place]
        extra = [name for name in other.names if name not in ours]
        raise ScoresError(f"{b}: not the videos of {a}: only {a} has {_some(lacking)}; only {b} has {_some(extra)}")
    places = [place[name] for name in first.names]
    differ = (other.labels[places] != first.labels).nonzero().flatten().tolist()
    if differ:
        shown = [
            f"{first.names[v]!r} is {int(other.labels[places[v]])} there, {int(first.labels[v])} in {a}"
            for v in differ[:SHOWN]
        ]
        raise ScoresError(f"{b}: {len(differ)} videos have another label than in {a}: {'; '.join(shown)}")
    return places


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more if names else "none of its own"


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, each of its kind and number of axes."""
    try:
        with StoredZip(path) as archive:
            arrays = {name: _array(archive, f"{name}.npy") for name in ARRAYS if f"{name}.npy" in archive.sizes}
    except FileNotFoundError:
        raise ScoresError(f"{path}: no such file") from None
    except (OSError, SyntaxError, TypeError, ValueError, tokenize.TokenError) as error:
        raise ScoresError(f"{path}: not a whole file of scores ({_first_line(error)})") from None
    if missing := [name for name in ARRAYS if name not in arrays]:
        raise ScoresError(f"{path}: not a file of scores: {', '.join(missing)} missing")
    for name, (kind, axes) in ARRAYS.items():
        array = arrays[name]
        if not isinstance(array, np.ndarray) or array.ndim != axes or not _is_kind(array, kind):
            got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "no array"
            wanted = "text" if kind == "U" else kind
            raise ScoresError(f"{path}: {name} is {got}; allowed: {wanted} with {axes} axes")
    if int(arrays["format"]) != FORMAT:
        raise ScoresError(f"{path}: scores of format {int(arrays['format'])}; this version reads format {FORMAT}")
    return arrays


def _array(archive: StoredZip, name: str) -> np.ndarray:
    """Return an array in NumPy's format, of which the archive has every byte."""
    file = io.BytesIO(archive.read(name))
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"{name} is of the unknown version {version}")
    shape, fortran, dtype = _HEADERS[version](file)
    content = file.getbuffer()[file.tell() :]
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are not read")
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"{name} is of shape {shape} and dtype {dtype} in {len(content)} bytes")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C").copy()


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _refuse(constant: str) -> float:
    """NaN and Infinity, which JSON does not have and json.loads would take."""
    raise ValueError(f"{constant} is no number")


def _is_kind(array: np.ndarray, kind: str) -> bool:
    if kind != "U":
        return array.dtype == np.dtype(kind)
    # NumPy itself breaks on numbers that are no character
    return array.dtype.kind == "U" and bool((np.frombuffer(array.tobytes(), np.uint32) <= sys.maxunicode).all())


def _check(scores: ViewScores, path: Path) -> None:
    """Lengths that belong together, ranges, finite numbers, text that can be printed."""

    def require(good: bool, problem: str) -> None:
        if not good:
            raise ScoresError(f"{path}: {problem}")

    def in_range(name: str, values: Tensor, end: int) -> None:
        outside = values[(values < 0) | (values >= end)]
        if len(outside):
            raise ScoresError(f"{path}: {name} holds {int(outside[0])}; allowed: 0 to {end - 1}")

    (num_rows, num_classes), num_videos = scores.logits.shape, len(scores.labels)
    require(num_videos > 0 and num_classes > 0, f"{num_videos} videos and {num_classes} classes; allowed: 1 or more")
    cells = num_classes * max(num_videos, num_classes)
    require(cells <= MOST_CELLS, f"{num_videos} videos and {num_classes} classes are too many for one table")
    require(
        scores.num_clips > 0 and scores.num_crops > 0 and scores.num_clips * scores.num_crops <= MOST_VIEWS,
        f"a grid of {scores.num_clips} x {scores.num_crops} views; allowed: 1 x 1 to {MOST_VIEWS} in all",
    )
    for name, end in (("video", num_videos), ("clip", scores.num_clips), ("crop", scores.num_crops)):
        column = getattr(scores, name)
        require(len(column) == num_rows, f"{name} has {len(column)} rows, logits {num_rows}")
        in_range(name, column, end)
    in_range("labels", scores.labels, num_classes)
    in_range("failed_videos", torch.tensor([video for video, _ in scores.failed], dtype=torch.int64), num_videos)
    require(len(scores.names) == num_videos, f"{len(scores.names)} names for {num_videos} labels")
    require(len(set(scores.names)) == num_videos, "two videos have the same name, so that none can be found by it")
    require(len(scores.classes) in (0, num_classes), f"{len(scores.classes)} class names for {num_classes} classes")
    for text in (*scores.names, *scores.classes):
        require(_as_text(text) == text, f"{text!r} cannot be written as UTF-8")
    plain = isinstance(scores.facts, dict) and all(map(_is_plain, scores.facts.values()))
    require(plain, "facts is not a mapping of names to text, numbers and lists of them")
    finite = torch.cat([part.isfinite().all(dim=1) for part in scores.logits.split(BLOCK)])
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ScoresError(f"{path}: the logits of row {row} ({scores.names[int(scores.video[row])]!r}) are not finite")


def _as_text(text: str) -> str:
    """UTF-8 can hold it, whatever bytes the path in it has."""
    return text.encode("utf-8", "backslashreplace").decode()


def _is_plain(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, int | float | str) for item in items)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
