import contextlib
import io
from pathlib import Path

import pytest

from tools import analyze

CONFIG = str(Path(__file__).parents[2] / "configs/kinetics400/oct_i3d_r50_8x8_a0.1.yaml")


def table(*arguments: str) -> dict[str, list[str]]:
    """Cells of the first table by row name."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert analyze.main(["calls", "--cfg", CONFIG, *arguments]) == 0
    rows = out.getvalue().split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0][0] == "training step"
    return {row[0]: row[1:] for row in cells[2:]}


def test_eager_calls_of_i3d() -> None:
    rows = table("--alphas", ".25")
    assert list(rows) == ["vanilla", "alpha 0.25", "alpha 0.25, naive"]
    for forward, backward, _, calls, ratio in rows.values():
        assert int(forward) + int(backward) == int(calls)
        assert float(ratio) == round(int(calls) / int(rows["vanilla"][3]), 2)
    # 53 convolutions with a norm each, 49 ReLUs after a norm or a sum, 16 sums with a shortcut, 53 counters of batches
    layers = 53 + 53 + 49 + 16 + 53
    assert layers < int(rows["vanilla"][0]) < layers + 16  # and the max-pools, the head and the loss


def test_calls_of_each_operator(capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze.main(["calls", "--cfg", CONFIG, "--alphas", ".5", "--operators"]) == 0
    second = capsys.readouterr().out.split("\n\n")[1].splitlines()
    rows = {row.split("|")[1].strip(): [int(cell) for cell in row.split("|")[2:-1]] for row in second[2:]}
    assert rows["convolution"] == rows["convolution_backward"]
    assert rows["convolution"][0] == rows["native_batch_norm"][0] == 53
    assert rows["convolution"][1] < rows["convolution"][2]  # L->H and L->L are one convolution where they can be


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["OCTAVE.ALPHA", "0"], ["OCTAVE.ALPHA", "0", "--alphas"]),
        (["--alphas", "0,.5"], ["--alphas", "alpha 0"]),
        (["--alphas", "half"], ["--alphas", "'half'"]),
    ],
)
def test_a_vanilla_network_alone_is_refused(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = analyze.main(["calls", "--cfg", CONFIG, *arguments])
    except SystemExit as end:  # argparse
        code = end.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert code == 2 and all(word in error for word in words) and "Traceback" not in error
