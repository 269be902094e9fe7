"""Scores of videos, averaged over their views, each video once whatever the number of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octvideo.engine.distributed import World, all_reduce, gather_objects
from octvideo.engine.log import bar
from octvideo.engine.metrics import topk_correct


@dataclass(frozen=True)
class Evaluation:
    """scores [M, K]: mean softmax over the views of each listed video; zeros where `scored` [M] is False.

    labels [M]. failed: (video, reason) of those that could not be decoded. seconds: wall time; clips: views scored.
    """

    scores: Tensor
    scored: Tensor
    labels: Tensor
    failed: list[tuple[int, str]]
    clips: int
    seconds: float

    def top(self, k: int) -> float:
        """Percent of LISTED videos with the label among the k best; a video that failed counts as wrong."""
        correct = topk_correct(self.scores, self.labels, k) & self.scored
        return 100.0 * float(correct.sum()) / len(self.labels)

    @property
    def clips_per_s(self) -> float:
        return self.clips / self.seconds


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Any,
    labels: Tensor,
    *,
    num_classes: int,
    prepare: Callable[[Tensor], Tensor],
    clips_per_forward: int,
    device: torch.device,
    world: World,
    title: str,
) -> Evaluation:
    """Score every video of the list.

    loader: batches of clips [N, V, C, T, H, W] uint8, videos [N] (indices into labels [M]), errors and failed_videos
    of those left out. prepare: uint8 clips on the device -> network input.
    """
    was_training = model.training
    model.eval()
    scores = torch.zeros(len(labels), num_classes, dtype=torch.float64)
    scored = torch.zeros(len(labels), dtype=torch.float64)
    failed: list[tuple[int, str]] = []
    clips_done, started = 0, time.perf_counter()
    with bar(len(labels), title, unit="video", main=world.main) as shown:
        for batch in loader:
            failed += list(zip(batch.failed_videos.tolist(), batch.errors, strict=True))
            if len(batch.videos):
                n, v = batch.clips.shape[:2]
                # [N, V, C, T, H, W] -> [N*V, C, T, H, W] -> [N*V, K] -> [N, V, K] -> [N, K]
                parts = batch.clips.flatten(0, 1).split(clips_per_forward)
                probabilities = torch.cat([model(prepare(p.to(device))).float().softmax(dim=1) for p in parts])
                scores[batch.videos] = probabilities.unflatten(0, (n, v)).mean(dim=1).double().cpu()
                scored[batch.videos] = 1.0
                clips_done += n * v
            shown.update((len(batch.videos) + len(batch.errors)) * world.size)
    model.train(was_training)
    totals = all_reduce(torch.cat([scores, scored[:, None]], dim=1).to(device)).cpu()
    return Evaluation(
        scores=totals[:, :-1],
        scored=totals[:, -1] > 0,
        labels=labels,
        failed=sorted(entry for part in gather_objects(failed) for entry in part),
        clips=sum(gather_objects(clips_done)),
        seconds=time.perf_counter() - started,
    )
