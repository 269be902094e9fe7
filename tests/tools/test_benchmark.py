import contextlib
import io
from pathlib import Path

import pytest

from tools import benchmark

CFG = str(Path(__file__).parents[2] / "configs/motion/oct_i3d_tiny.yaml")


def main(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = benchmark.main(arguments)
    return status, out.getvalue(), err.getvalue()


def test_entries_are_run_in_turn_after_one_run_that_counts_nothing() -> None:
    order: list[str] = []
    entries = [benchmark.Timed(name, lambda name=name: order.append(name) or 8) for name in "ab"]
    benchmark.in_turn(entries, rounds=2)
    assert "".join(order) == "ababab"
    assert [len(entry.clips_per_s) for entry in entries] == [2, 2]
    assert all(speed > 0 for entry in entries for speed in entry.clips_per_s)


def test_a_network_beside_its_vanilla_twin() -> None:
    status, out, _ = main(
        "model", "--cfg", CFG, "--batch", "8", "--rounds", "1", "DEVICE", "cpu", "OCTAVE.ALPHA", "0.5"
    )
    assert status == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if "i3d_tiny" in line]
    assert [row[0] for row in rows] == ["i3d_tiny vanilla", "i3d_tiny alpha 0.5"] * 2
    vanilla, octave = float(rows[0][1]), float(rows[1][1])
    assert 0 < octave < vanilla and float(rows[1][2]) == pytest.approx(octave / vanilla, abs=0.01)
    assert all(int(row[5]) > 1 for row in rows[2:])  # MiB of a training step
    assert out.count("time ratio") == 2


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("model", "--cfg", CFG, "--rounds", "0"), "--rounds, --batch and --threads are 1 or more"),
        (("model", "--cfg", "none.yaml"), "none.yaml"),
        (("data", "--cfg", CFG, "DATA.TRAIN_LIST", "none.txt"), "none.txt"),
    ],
)
def test_mistakes_are_one_message(arguments: tuple[str, ...], message: str) -> None:
    status, out, err = main(*arguments)
    assert status == 2 and out == "" and message in err
