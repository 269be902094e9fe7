import numpy as np
import pytest
import torch

from octvideo.engine.metrics import (
    Mean,
    calibration_bins,
    calibration_error,
    class_rows,
    confusion,
    mean_class_accuracy,
    most_confused,
    predicted,
    topk_correct,
)


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


def drawn(videos: int = 200, classes: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities [M, K] that lean to the label, labels [M] that leave out class 3, and which are scored [M]."""
    rng = np.random.default_rng(1)
    labels = rng.choice([label for label in range(classes) if label != 3], videos)
    logits = rng.standard_normal((videos, classes)) + 1.5 * np.eye(classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probabilities, labels, rng.random(videos) < 0.9


def test_confusion_and_what_follows_from_it_against_counting() -> None:
    probabilities, labels, scored = drawn()
    table = confusion(torch.from_numpy(probabilities), torch.from_numpy(labels), torch.from_numpy(scored))
    expected = np.zeros((7, 8), np.int64)
    for row, label, good in zip(probabilities, labels, scored, strict=True):
        expected[label, row.argmax() if good else 7] += 1
    assert table.dtype == torch.int64 and table.tolist() == expected.tolist()

    shares = [expected[c, c] / expected[c].sum() for c in range(7) if c != 3]
    assert mean_class_accuracy(table) == pytest.approx(100 * np.mean(shares), rel=1e-12)
    for label, row in enumerate(class_rows(table)):
        assert (row.label, row.videos, row.scored, row.correct) == (
            label,
            (labels == label).sum(),
            (scored & (labels == label)).sum(),
            expected[label, label],
        )
        others = np.where(np.arange(7) == label, -1, expected[label, :7])
        if label == 3:
            assert np.isnan(row.accuracy) and (row.confused_with, row.confused_videos) == (-1, 0)
        else:
            assert row.accuracy == pytest.approx(100 * expected[label, label] / expected[label].sum())
            assert (row.confused_with, row.confused_videos) == (others.argmax(), others.max())
    pairs = sorted((-expected[a, b], a, b) for a in range(7) for b in range(7) if a != b)[:6]
    assert most_confused(table, 6) == [(a, b, -videos) for videos, a, b in pairs]
    wrong = (probabilities.argmax(1) != labels) & scored
    assert sum(videos for _, _, videos in most_confused(table, 100)) == wrong.sum()


def test_no_pair_is_confused_where_all_are_right() -> None:
    table = confusion(torch.eye(3, dtype=torch.float64), torch.arange(3), torch.ones(3, dtype=torch.bool))
    assert most_confused(table, 5) == [] and mean_class_accuracy(table) == 100.0
    assert [row.confused_with for row in class_rows(table)] == [-1, -1, -1]


def test_a_tie_is_wrong_in_the_confusion_matrix_as_in_top_1() -> None:
    scores = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [0.0, 0.0, 0.0]])
    labels = torch.tensor([0, 2, 1])
    assert predicted(scores, labels).tolist() == [1, 1, 0]
    assert topk_correct(scores, labels, 1).tolist() == [False, False, False]
    assert predicted(torch.ones(2, 1), torch.zeros(2, dtype=torch.int64)).tolist() == [0, 0]


def test_rows_and_pairs_by_hand() -> None:
    """Of 10 videos of 0, 6 are right, 3 taken for 1, 1 for 2; of 5 of 1, 2 are right, 2 taken for 2, 1 failed."""
    table = torch.tensor([[6, 3, 1, 0], [0, 2, 2, 1], [0, 0, 0, 0]])
    rows = class_rows(table)
    assert rows[:2] == [(0, 10, 10, 6, 60.0, 1, 3), (1, 5, 4, 2, 40.0, 2, 2)]
    assert np.isnan(rows[2].accuracy) and rows[2].videos == 0
    assert most_confused(table, 9) == [(0, 1, 3), (1, 2, 2), (0, 2, 1)]
    assert mean_class_accuracy(table) == pytest.approx(50)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_against_its_definition(bins: int) -> None:
    probabilities, labels, scored = drawn(400)
    confidence, right = probabilities.max(1)[scored], (probabilities.argmax(1) == labels)[scored]
    table = calibration_bins(*map(torch.from_numpy, (probabilities, labels, scored)), bins=bins)
    assert table.shape == (bins, 3) and table.dtype == torch.float64
    expected = 0.0
    for b, row in enumerate(table.tolist(), 1):
        inside = ((b - 1) / bins < confidence) & (confidence <= b / bins)
        assert row[2] == inside.sum()
        if inside.any():
            expected += inside.sum() / scored.sum() * abs(right[inside].mean() - confidence[inside].mean())
            assert row[:2] == pytest.approx([confidence[inside].mean(), right[inside].mean()], rel=1e-12)
        else:
            assert np.isnan(row[:2]).all()
    got = calibration_error(table)
    assert got == pytest.approx(100 * expected, rel=1e-9) and got > 1


def test_calibration_by_hand() -> None:
    """Bins of 0.5: 0.5 belongs to the lower one; |0 - 0.5| * 1 / 3 + |1/2 - 0.8| * 2 / 3."""
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0], [0.7, 0.2, 0.1], [0.0, 0.0, 0.0]])
    labels, scored = torch.tensor([2, 0, 1, 0]), torch.tensor([True, True, True, False])
    table = calibration_bins(probabilities, labels, scored, bins=2)
    np.testing.assert_allclose(table, [[0.5, 0, 1], [0.8, 0.5, 2]], rtol=1e-7)
    assert calibration_error(table) == pytest.approx(100 * (0.5 + 2 * 0.3) / 3)
    none = calibration_bins(probabilities, labels, torch.zeros(4, dtype=torch.bool))
    assert none.shape == (15, 3) and not none[:, 2].any() and np.isnan(calibration_error(none))
    of_bins = torch.tensor([[0.2, 0.1, 1], [0.8, 0.5, 3], [torch.nan, torch.nan, 0]])
    assert calibration_error(of_bins) == pytest.approx(100 * (0.1 + 3 * 0.3) / 4)
