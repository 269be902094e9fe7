"""Scores of videos, averaged over their views, each video once whatever the number of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octvideo.engine.distributed import World, all_reduce, all_reduce_max, gather_objects, gather_rows
from octvideo.engine.log import bar
from octvideo.engine.metrics import top_percent
from octvideo.engine.scores import Averaged, ViewScores, aggregate

NOT_FINITE = "the network's scores of it are not finite numbers"


@dataclass(frozen=True)
class Evaluation:
    """scores float64 [M, K]: probabilities of each listed video, averaged over its views; zeros where `scored` [M] is False.

    labels [M]. failed: (video, reason) of those that could not be decoded, or got scores that are not finite. seconds:
    wall time; clips: views scored. views: every single one, on the main rank.
    """

    scores: Tensor
    scored: Tensor
    labels: Tensor
    failed: list[tuple[int, str]]
    clips: int
    seconds: float
    views: ViewScores | None

    def top(self, k: int) -> float:
        """Percent of LISTED videos with the label among the k best; a video that failed counts as wrong."""
        return top_percent(self.scores, self.labels, self.scored, k)

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
    num_clips: int,
    num_crops: int,
    prepare: Callable[[Tensor], Tensor],
    clips_per_forward: int,
    device: torch.device,
    world: World,
    title: str,
    average: str = "softmax",
    poll: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score every video of the list; the same on every rank, but for `views`.

    loader: batches of clips [N, V, C, T, H, W] uint8, V = num_clips * num_crops with the crops of a clip side by side,
    videos [N] (indices into labels [M]), errors and failed_videos of those left out. prepare: uint8 clips on the device
    -> network input. average: see scores.aggregate. poll: called before each batch, equally often on every rank; what it
    raises ends the evaluation.
    """
    was_training = model.training
    model.eval()
    logits = [torch.empty(0, num_clips * num_crops, num_classes)]
    videos = [torch.empty(0, dtype=torch.int64)]
    failed: list[tuple[int, str]] = []
    started = time.perf_counter()
    with bar(len(labels), title, unit="video", main=world.main) as shown:
        for batch in _in_step(loader, poll, device):
            failed += zip(batch.failed_videos.tolist(), batch.errors, strict=True)
            if len(batch.videos):
                # [N, V, C, T, H, W] -> [N*V, C, T, H, W] -> [N*V, K] -> [N, V, K]
                parts = batch.clips.flatten(0, 1).split(clips_per_forward)
                views = torch.cat([model(prepare(part.to(device))).float() for part in parts]).cpu()
                views = views.unflatten(0, batch.clips.shape[:2])
                finite = views.isfinite().flatten(1).all(dim=1)
                failed += [(video, NOT_FINITE) for video in batch.videos[~finite].tolist()]
                logits.append(views[finite])
                videos.append(batch.videos[finite])
            shown.update((len(batch.videos) + len(batch.errors)) * world.size)
    model.train(was_training)
    failed = sorted(entry for part in gather_objects(failed) for entry in part)
    clips = sum(gather_objects(sum(len(part) for part in videos))) * num_clips * num_crops
    all_logits, all_videos = (gather_rows(torch.cat(parts), device) for parts in (logits, videos))
    gathered = None
    if all_logits is not None and all_videos is not None:  # the main rank
        gathered = _view_scores(all_logits, all_videos, labels, num_clips, num_crops, failed)
    mean = aggregate(gathered, average) if gathered else Averaged.of_none(len(labels), num_classes)
    # [M, K + 1]: the others add zeros, so that every rank has what the main one has
    shared = all_reduce(torch.cat([mean.probabilities, mean.scored[:, None]], dim=1).to(device)).cpu()
    return Evaluation(
        scores=shared[:, :-1],
        scored=shared[:, -1] > 0,
        labels=labels,
        failed=failed,
        clips=clips,
        seconds=time.perf_counter() - started,
        views=gathered,
    )


def _in_step(loader: Any, poll: Callable[[], None], device: torch.device) -> Iterator[Any]:
    """The batches of this rank. poll() before each, and for those that other ranks have more, since ranks meet in it."""
    batches = iter(loader)
    for _ in range(int(all_reduce_max(torch.tensor(len(loader), device=device)))):
        poll()
        batch = next(batches, None)
        if batch is not None:
            yield batch


def _view_scores(
    logits: Tensor, videos: Tensor, labels: Tensor, num_clips: int, num_crops: int, failed: list[tuple[int, str]]
) -> ViewScores:
    """logits [N, V, K] of videos [N] -> rows, one for each view."""
    view = torch.arange(num_clips * num_crops).repeat(len(videos))
    return ViewScores(
        logits=logits.flatten(0, 1),
        video=videos.repeat_interleave(num_clips * num_crops),
        clip=view // num_crops,
        crop=view % num_crops,
        labels=labels,
        num_clips=num_clips,
        num_crops=num_crops,
        failed=failed,
    )
