"""What an evaluation leaves: test.json, test_failed.txt, classes.csv, confusion.csv; and what it says of itself.

tools/results.py reads test.json; octvideo/engine/scores.py has the file of single views.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor

from octvideo.engine.classes import csv_cell
from octvideo.engine.metrics import (
    ClassRow,
    calibration_bins,
    calibration_error,
    class_rows,
    confusion,
    mean_class_accuracy,
    most_confused,
    predicted,
    top_percent,
)
from octvideo.engine.scores import Averaged, ViewScores
from octvideo.files import write_atomic

NO_VIEW = "no view of it is among the scores"
RESULT_FILES = ("test.json", "test_failed.txt", "classes.csv", "confusion.csv")  # what Results.write leaves
SHOWN = 5  # classes, and pairs of classes, that the summary lists


@dataclass(frozen=True, eq=False)
class Results:
    """One row of probabilities for each video, and what they come to.

    probabilities float64 [M, K], zeros where `scored` [M] is False; labels int64 [M]; paths [M]; classes: K names or
    none; failed: (video, reason) of those not scored; facts: plain values that test.json repeats.
    """

    averaged: Averaged
    labels: Tensor
    paths: list[str]
    classes: list[str]
    failed: list[tuple[int, str]]
    facts: dict[str, Any]

    @cached_property
    def confusion(self) -> Tensor:
        """[K, K + 1], see metrics.confusion."""
        return confusion(self.averaged.probabilities, self.labels, self.averaged.scored)

    @cached_property
    def class_rows(self) -> list[ClassRow]:
        """In the order of the labels."""
        return class_rows(self.confusion)

    @cached_property
    def calibration_bins(self) -> Tensor:
        """[B, 3], see metrics.calibration_bins."""
        return calibration_bins(self.averaged.probabilities, self.labels, self.averaged.scored)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Percentages of LISTED videos, one that failed counting as wrong; only the calibration error leaves those out."""
        scores, scored, _ = self.averaged
        error = calibration_error(self.calibration_bins)
        return {
            "top1": top_percent(scores, self.labels, scored, 1),
            "top5": top_percent(scores, self.labels, scored, 5),
            "mean_class_accuracy": mean_class_accuracy(self.confusion),
            "calibration_error": None if math.isnan(error) else error,
            "videos_scored": int(scored.sum()),
            "videos_listed": len(self.labels),
            "videos_incomplete": self.averaged.incomplete,
        }

    def worst(self, count: int) -> list[tuple[int, int, float]]:
        """(video, class it was taken for, probability of that) of at most `count` wrong scored ones, the surest first."""
        scores, scored, _ = self.averaged
        taken = predicted(scores, self.labels)
        wrong = (scored & (taken != self.labels)).nonzero().flatten()
        confidence = scores[wrong, taken[wrong]]
        order = confidence.argsort(descending=True, stable=True)[:count]
        return list(zip(wrong[order].tolist(), taken[wrong[order]].tolist(), confidence[order].tolist(), strict=True))

    def write(self, folder: Path) -> None:
        """test.json comes last: where it is, the others are too."""
        folder.mkdir(parents=True, exist_ok=True)
        failed = [{"path": self.paths[video], "reason": reason} for video, reason in self.failed]
        listed = "".join(f"{entry['path']}\t{entry['reason']}\n" for entry in failed)
        write_atomic(folder / "test_failed.txt", listed.encode("utf-8", "backslashreplace"))
        write_atomic(folder / "classes.csv", self._classes_csv().encode())
        write_atomic(folder / "confusion.csv", self._confusion_csv().encode())
        report = {**self.metrics, **self.facts} | self.metrics | {"failed": failed}  # facts of a file overrule nothing
        write_atomic(folder / "test.json", (json.dumps(report, indent=2) + "\n").encode())

    def summary(self) -> str:
        """The metrics, the classes with the lowest accuracy and the pairs most often confused, as tables."""
        m = self.metrics
        error = "-" if m["calibration_error"] is None else f"{m['calibration_error']:.2f}"
        shares = [f"{m[name]:.2f}" for name in ("top1", "top5", "mean_class_accuracy")]
        headers = ["top-1 %", "top-5 %", "mean class %", "calibration error %", "scored", "views", "average"]
        scored = f"{m['videos_scored']} of {m['videos_listed']}"
        tables = [_table(headers, [[*shares, error, scored, self.facts["views"], self.facts["average"]]])]
        if m["videos_incomplete"]:
            tables.append(f"{m['videos_incomplete']} videos lack some of their views and are averaged over the others")
        worst = sorted((row for row in self.class_rows if row.accuracy < 100), key=lambda row: row.accuracy)
        if worst:
            rows = [self._cells(row) for row in worst[:SHOWN]]
            tables.append(_table(["lowest accuracy", "videos", "correct", "%", "most often taken for"], rows))
        if pairs := most_confused(self.confusion, SHOWN):
            rows = [[self.name(label), self.name(other), videos] for label, other, videos in pairs]
            tables.append(_table(["most confused", "taken for", "videos"], rows))
        return "\n\n".join(tables)

    def name(self, label: int) -> str:
        """Of a class; its number where there are no names."""
        if not self.classes:
            return str(label)
        text = self.classes[label]
        return text if text.isprintable() else ascii(text)

    def _cells(self, row: ClassRow) -> list[Any]:
        other = f"{self.name(row.confused_with)} ({row.confused_videos})" if row.confused_videos else "-"
        return [self.name(row.label), row.videos, row.correct, f"{row.accuracy:.1f}", other]

    def _classes_csv(self) -> str:
        headers = ["label", "class", "videos", "scored", "correct", "accuracy", "confused_with", "confused_videos"]
        return _csv(
            headers,
            (
                [
                    *(row.label, self.name(row.label), row.videos, row.scored, row.correct),
                    f"{row.accuracy:.4f}" if row.videos else "",
                    *((self.name(row.confused_with), row.confused_videos) if row.confused_videos else ("", 0)),
                ]
                for row in self.class_rows
            ),
        )

    def _confusion_csv(self) -> str:
        names = [self.name(label) for label in range(len(self.confusion))]
        rows = ([name, *cells] for name, cells in zip(names, self.confusion.tolist(), strict=True))
        return _csv(["label", *names, "not scored"], rows)


def results_of(scores: ViewScores, averaged: Averaged, facts: dict[str, Any]) -> Results:
    """Results of the videos of `scores`, whatever they were averaged from."""
    reasons = dict(scores.failed)
    unscored = (~averaged.scored).nonzero().flatten().tolist()
    prefix = str(scores.facts.get("prefix", ""))
    return Results(
        averaged,
        scores.labels,
        [str(Path(prefix, name)) for name in scores.names],
        scores.classes,
        [(video, reasons.get(video, NO_VIEW)) for video in unscored],
        facts,
    )


def view_facts(num_clips: int, num_crops: int, average: str) -> dict[str, Any]:
    return {"views": num_clips * num_crops, "clips": num_clips, "crops": num_crops, "average": average}


def _table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _csv(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([csv_cell(cell) for cell in row] for row in (headers, *rows))
    return text.getvalue()
