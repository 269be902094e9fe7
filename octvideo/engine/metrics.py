"""Counts that become accuracies."""

from __future__ import annotations

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


class Mean:
    """A mean of device numbers that are read only when asked for, so that adding never waits for the device."""

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
