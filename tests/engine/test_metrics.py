import numpy as np
import pytest
import torch

from octvideo.engine.metrics import Mean, topk_correct


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_topk_against_sorting(k: int) -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.standard_normal((50, 7)), rng.integers(0, 7, 50)
    expected = [label in np.argsort(-row)[:k] for row, label in zip(scores, labels, strict=True)]
    assert topk_correct(torch.from_numpy(scores), torch.from_numpy(labels), k).tolist() == expected


def test_ties_and_nan_earn_nothing() -> None:
    labels = torch.tensor([0, 2])
    assert topk_correct(torch.zeros(2, 3), labels, 1).tolist() == [False, False]
    assert topk_correct(torch.zeros(2, 3), labels, 3).tolist() == [True, True]
    assert topk_correct(torch.full((2, 3), torch.nan), labels, 3).tolist() == [False, False]


def test_mean() -> None:
    mean = Mean()
    assert np.isnan(mean.value())
    mean.add(torch.tensor(6.0), 3)
    mean.add(torch.tensor(4.0), 1)
    assert mean.value() == 2.5
    assert mean.pair(torch.device("cpu")).tolist() == [10.0, 4.0]
