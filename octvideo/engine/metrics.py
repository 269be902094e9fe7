"""Counts that become accuracies. M videos, K classes; shares are in percent.

A video that could not be scored (`scored` [M] False) counts as wrong wherever videos are counted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def topk_correct(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """[N, K] scores, [N] labels -> [N] bool: is the label among the k best? k above K counts as K.

    Equal scores count against the label, so a network that gives every class the same score gets nothing; neither does
    one that gives NaN.
    """
    own = scores.gather(1, labels[:, None])
    better = (scores >= own).sum(dim=1) - 1
    return (better < k) & ~scores.isnan().any(dim=1)


def top_percent(scores: Tensor, labels: Tensor, scored: Tensor, k: int) -> float:
    """Percent of all M videos with the label among the k best."""
    return _percent(int((topk_correct(scores, labels, k) & scored).sum()), len(labels))


def predicted(scores: Tensor, labels: Tensor) -> Tensor:
    """[M, K] scores, [M] labels -> int64 [M], the best class.

    Equal scores count against the label here too, so `predicted == labels` is `topk_correct(scores, labels, 1)`.
    """
    others = scores.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    return torch.where(topk_correct(scores, labels, 1), labels, others)


def confusion(scores: Tensor, labels: Tensor, scored: Tensor) -> Tensor:
    """int64 [K, K + 1]: how many videos of each label (row) were taken for each class; last column: not scored."""
    num_classes = scores.shape[1]
    column = torch.where(scored, predicted(scores, labels), num_classes)
    cells = torch.bincount(labels * (num_classes + 1) + column, minlength=num_classes * (num_classes + 1))
    return cells.unflatten(0, (num_classes, num_classes + 1))


class ClassRow(NamedTuple):
    """One class: its videos, how many were scored, how many were right, and what the others were most often taken for.

    accuracy: percent of `videos`, NaN where there are none. confused_with: -1 where no scored video was wrong.
    """

    label: int
    videos: int
    scored: int
    correct: int
    accuracy: float
    confused_with: int
    confused_videos: int


def class_rows(table: Tensor) -> list[ClassRow]:
    """`confusion`'s [K, K + 1] -> a row for each class, in the order of the labels."""
    counts = table[:, :-1]
    times, others = (counts - counts.diag().diag()).max(dim=1)
    columns = torch.stack([table.sum(dim=1), counts.sum(dim=1), counts.diag(), others, times], dim=1)
    return [
        ClassRow(label, videos, scored, correct, _percent(correct, videos), other if wrong else -1, wrong)
        for label, (videos, scored, correct, other, wrong) in enumerate(columns.tolist())
    ]


def mean_class_accuracy(table: Tensor) -> float:
    """Mean over the classes that have videos of the percent of them that were right; `confusion`'s [K, K + 1]."""
    videos = table.sum(dim=1)
    present = videos > 0
    return 100.0 * float((table[:, :-1].diag()[present] / videos[present].double()).mean())


def most_confused(table: Tensor, count: int) -> list[tuple[int, int, int]]:
    """(label, class it was taken for, videos), most videos first, at most `count`; `confusion`'s [K, K + 1]."""
    wrong = table[:, :-1] - table[:, :-1].diag().diag()
    pairs = [(label, other, int(wrong[label, other])) for label, other in wrong.nonzero().tolist()]
    return sorted(pairs, key=lambda pair: -pair[2])[:count]


def calibration_bins(probabilities: Tensor, labels: Tensor, scored: Tensor, bins: int = 15) -> Tensor:
    """float64 [B, 3]: mean confidence and accuracy, 0 to 1 and NaN in an empty bin, and number of the scored videos.

    Bin b of `bins`, b from 1, holds those whose confidence, the largest of their K probabilities, is in
    ((b - 1) / bins, b / bins]. A video that is not scored has no confidence.
    """
    probabilities, labels = probabilities[scored].double(), labels[scored]
    confidence = probabilities.max(dim=1).values
    correct = topk_correct(probabilities, labels, 1).double()
    which = torch.bucketize(confidence, torch.arange(1, bins, dtype=torch.float64) / bins)
    table = torch.zeros(bins, 3, dtype=torch.float64)
    table.index_add_(0, which, torch.stack([confidence, correct, torch.ones_like(correct)], dim=1))
    table[:, :2] /= table[:, 2:]
    return table


def calibration_error(table: Tensor) -> float:
    """Expected calibration error, in percent (Guo et al., arXiv 1706.04599, equation 3); `calibration_bins`' [B, 3].

    |accuracy - confidence| of each bin, averaged over videos. NaN where no video is scored.
    """
    confidence, accuracy, videos = table[table[:, 2] > 0].unbind(dim=1)
    return 100.0 * float(((accuracy - confidence).abs() * videos).sum() / videos.sum())


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else float("nan")


class Mean:
    """A mean over clips. Totals may be tensors, which are read when the mean is."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, total: Tensor, count: int) -> None:
        self.total = self.total + total.detach()
        self.count += count

    def value(self) -> float:
        return float(self.total) / self.count if self.count else float("nan")

    def state_dict(self) -> dict[str, float]:
        return {"total": float(self.total), "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.total, self.count = state["total"], int(state["count"])

    def pair(self, device: torch.device) -> Tensor:
        """[total, count] for summing over ranks."""
        return torch.tensor([float(self.total), float(self.count)], dtype=torch.float64, device=device)
