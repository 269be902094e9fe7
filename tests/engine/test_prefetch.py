from types import SimpleNamespace

import torch

from octvideo.engine.prefetch import on_device


def test_batches_come_in_order_with_their_clips_and_labels() -> None:
    batches = [SimpleNamespace(clips=torch.full((2, 1, 3), i), labels=torch.tensor([i, i])) for i in range(3)]
    moved = list(on_device(iter(batches), torch.device("cpu")))
    assert [batch for batch, _, _ in moved] == batches
    for number, (_, clips, labels) in enumerate(moved):
        assert torch.equal(clips, torch.full((2, 1, 3), number)) and labels.tolist() == [number, number]


def test_a_batch_is_asked_for_when_the_step_before_it_is_done() -> None:
    """The loader must not be read ahead of a checkpoint: its order is part of what a resumed run repeats."""
    asked = []

    def loader():
        for i in range(3):
            asked.append(i)
            yield SimpleNamespace(clips=torch.zeros(1), labels=torch.zeros(1))

    batches = on_device(loader(), torch.device("cpu"))
    next(batches)
    assert asked == [0]
