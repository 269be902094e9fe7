from pathlib import Path

import pytest

from datasets import motion
from octvideo.benchmark import data as benchmark_data
from octvideo.benchmark import peers

from .command import CFG, main


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
    assert {"octvideo, pyav", "decoding alone, pyav", "decord, get_batch", *peers.readers()} <= set(cells)
    alone = float(cells["decoding alone, pyav"][0])
    assert float(cells["octvideo, pyav"][2]) == pytest.approx(float(cells["octvideo, pyav"][0]) / alone, abs=0.01)
    assert cells["decord, get_batch"][3] == "1.00" and float(cells["1"][0]) > 0


def test_sources_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        benchmark_data, "_write_source", lambda path, seed, gop: (calls.append((seed, gop)), path.touch())
    )
    for _ in range(2):
        assert main("sources", "--out", str(tmp_path / "x"))[0] == 0
    assert calls == [(i, gop) for gop in (12, 250) for i in range(8)]
    assert (tmp_path / "x" / "long.txt").read_text().splitlines()[3] == "long_3.mp4 3"
