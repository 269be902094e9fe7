from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from octvideo.engine.distributed import World
from octvideo.engine.evaluate import NOT_FINITE, Evaluation, evaluate

CPU = torch.device("cpu")


@dataclass
class Batch:
    clips: Tensor  # [N, V, C, T, H, W]
    videos: Tensor
    errors: list[str] = field(default_factory=list)
    failed_videos: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class PixelsAreLogits(nn.Module):
    """[N, K, 1, 1, 1] -> [N, K]"""

    def __init__(self) -> None:
        super().__init__()
        self.largest_batch = 0

    def forward(self, x: Tensor) -> Tensor:
        self.largest_batch = max(self.largest_batch, len(x))
        assert not self.training
        return x.flatten(1)


def run(
    model: nn.Module, batches: list[Batch], labels: list[int], num_crops: int = 1, average: str = "softmax"
) -> Evaluation:
    return evaluate(
        model,
        batches,
        torch.tensor(labels),
        num_classes=3,
        num_clips=batches[0].clips.shape[1] // num_crops,
        num_crops=num_crops,
        prepare=lambda clips: clips.float(),
        clips_per_forward=4,
        device=CPU,
        world=World(),
        title="test",
        average=average,
    )


def test_softmax_is_averaged_over_views_whatever_the_order_of_videos() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 3)  # M videos, V views, K classes
    clips = logits[..., None, None, None]
    model = PixelsAreLogits().train()
    result = run(model, [Batch(clips[[2, 0]], torch.tensor([2, 0])), Batch(clips[[1]], torch.tensor([1]))], [0, 1, 2])
    torch.testing.assert_close(result.scores.float(), logits.softmax(2).mean(1))
    assert result.scored.all() and result.clips == 15
    assert model.largest_batch == 4 and model.training
    expected = (logits.softmax(2).mean(1).argmax(1) == torch.arange(3)).float().mean() * 100
    assert result.top(1) == pytest.approx(expected.item())
    assert result.top(5) == 100.0


def test_a_failed_video_counts_as_wrong_and_is_named() -> None:
    right = torch.eye(3)[[0, 1]].mul(9)[:, None, :, None, None, None]
    batches = [
        Batch(right[:1], torch.tensor([0]), ["b.mp4: truncated"], torch.tensor([2])),
        Batch(right[1:], torch.tensor([1])),
        Batch(torch.empty(0, 1, 3, 1, 1, 1), torch.empty(0, dtype=torch.int64), ["c.mp4: empty"], torch.tensor([3])),
    ]
    result = run(PixelsAreLogits(), batches, [0, 1, 0, 0])
    assert result.top(1) == result.top(5) == 50.0
    assert result.scored.tolist() == [True, True, False, False]
    assert result.failed == [(2, "b.mp4: truncated"), (3, "c.mp4: empty")]


def test_every_view_is_kept_in_its_place() -> None:
    logits = torch.randn(3, 6, 3, generator=torch.Generator().manual_seed(0))  # M videos, 2 clips x 3 crops, K classes
    clips = logits[..., None, None, None]
    batches = [
        Batch(clips[[2, 0]], torch.tensor([2, 0])),
        Batch(clips[[1]], torch.tensor([1]), ["d: bad"], torch.tensor([3])),
    ]
    result = run(PixelsAreLogits(), batches, [0, 1, 2, 1], num_crops=3, average="logits")
    views = result.views
    assert views is not None and (views.num_clips, views.num_crops) == (2, 3)
    for row, video, clip, crop in zip(views.logits, views.video, views.clip, views.crop, strict=True):
        assert torch.equal(row, logits[video, 3 * clip + crop])
    assert len(views.logits) == 18 and views.failed == [(3, "d: bad")] and views.labels.tolist() == [0, 1, 2, 1]
    torch.testing.assert_close(result.scores[:3].float(), logits.mean(1).softmax(1))
    assert result.scores[3].tolist() == [0, 0, 0]


def test_scores_that_are_no_numbers_count_as_wrong_and_are_named() -> None:
    logits = torch.tensor([[[9.0, 0, 0]], [[torch.nan, 9, 0]], [[0, torch.inf, 0]]])
    result = run(PixelsAreLogits(), [Batch(logits[..., None, None, None], torch.arange(3))], [0, 1, 1])
    assert result.failed == [(1, NOT_FINITE), (2, NOT_FINITE)] and result.scored.tolist() == [True, False, False]
    assert result.top(1) == pytest.approx(100 / 3) and result.scores.isfinite().all()


def test_a_list_of_which_nothing_can_be_scored() -> None:
    nothing = Batch(torch.empty(0, 1, 3, 1, 1, 1), torch.empty(0, dtype=torch.int64), ["a", "b"], torch.tensor([0, 1]))
    result = run(PixelsAreLogits(), [nothing], [0, 1])
    assert result.top(5) == 0.0 and result.clips == 0 and not result.scored.any()
