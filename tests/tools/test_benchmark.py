import contextlib
import io
from pathlib import Path

import pytest

from datasets import motion
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


@pytest.mark.parametrize("backend", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
def test_inference_forms_beside_each_other(backend: str) -> None:
    form = ("--fuse", "--backend", backend, "--batch", "2", "--rounds", "1")
    status, out, err = main("model", "--cfg", CFG, *form, "DEVICE", "cpu", "OCTAVE.ALPHA", "0.5")
    assert status == 0, err
    assert out.count("time ratio") == 1 and "training step" not in out
    assert ("| inference, fused, compiled" if backend == "compile" else "| inference, fused  ") in out
    words = out.split("time ratio ")[1].split()
    macs = float(words[words.index("of") - 1])
    assert float(words[-1]) == pytest.approx(macs / float(words[0]), rel=0.03)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("model", "--cfg", CFG, "--rounds", "0"), "--rounds, --workers, --batch and --threads are 1 or more"),
        (("model", "--cfg", "none.yaml"), "none.yaml"),
        (("data", "--cfg", CFG, "DATA.TRAIN_LIST", "none.txt"), "none.txt"),
        (("data", "--cfg", CFG, "--workers", "0"), "--rounds, --workers, --batch and --threads are 1 or more"),
    ],
)
def test_mistakes_are_one_message(arguments: tuple[str, ...], message: str) -> None:
    status, out, err = main(*arguments)
    assert status == 2 and out == "" and message in err


def test_decoders_and_peers_beside_decoding_alone(tmp_path: Path) -> None:
    settings = motion.Settings(train=1, val=1)
    motion.make(tmp_path / "motion", settings, workers=1)
    small = ["DATA.TRAIN_LIST", f"{tmp_path}/motion/train.txt", "DATA.PREFIX", f"{tmp_path}/motion"]
    small += ["TRAIN.BATCH_SIZE", "4", "DATA.TARGET_FPS", "15"]
    status, out, err = main("data", "--cfg", CFG, "--rounds", "1", "--workers", "1", "--decoders", "pyav", *small)
    assert status == 0, err
    cells = {}
    for line in out.splitlines():
        first, *rest = [cell.strip() for cell in line.strip("|").split("|")]
        cells[first] = rest
    assert {"octvideo, pyav", "decoding alone, pyav", "decord, get_batch", *benchmark.peers()} <= set(cells)
    alone = float(cells["decoding alone, pyav"][0])
    assert float(cells["octvideo, pyav"][2]) == pytest.approx(float(cells["octvideo, pyav"][0]) / alone, abs=0.01)
    assert cells["decord, get_batch"][3] == "1.00" and float(cells["1"][0]) > 0


def test_sources_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(benchmark, "_write_source", lambda path, seed, gop: (calls.append((seed, gop)), path.touch()))
    for _ in range(2):
        assert main("sources", "--out", str(tmp_path / "x"))[0] == 0
    assert calls == [(i, gop) for gop in (12, 250) for i in range(8)]
    assert (tmp_path / "x" / "long.txt").read_text().splitlines()[3] == "long_3.mp4 3"
