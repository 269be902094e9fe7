"""Real people: one fold of UT-Interaction through the whole path, where its videos are at hand."""

import json
from pathlib import Path

import pytest

from datasets import ut_interaction
from tools import run_net

ROOT = Path(__file__).parents[2]
FOLDER = ROOT.parent / "shared/data/ut_interaction"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason=f"UT-Interaction is not in {FOLDER}; it may not be copied")


def test_one_fold_for_two_epochs(tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    assert ut_interaction.main(["--root", str(FOLDER), "--test-sequence", "1", "--out", str(lists)]) == 0
    overrides = ["DATA.TRAIN_LIST", f"{lists}/train_seq1.txt", "DATA.VAL_LIST", f"{lists}/val_seq1.txt"]
    overrides += ["DATA.PREFIX", str(FOLDER), "OUTPUT_DIR", str(tmp_path / "run"), "DEVICE", "cpu"]
    overrides += ["TRAIN.EPOCHS", "2", "SOLVER.WARMUP_EPOCHS", "1", "TRAIN.VAL_PERIOD", "0", "TEST.CLIPS", "2"]
    assert run_net.main(["--cfg", str(ROOT / "configs/ut_interaction/oct_i3d_tiny.yaml"), *overrides]) == 0
    test = json.loads((tmp_path / "run/test.json").read_text())
    assert (test["videos_scored"], test["videos_listed"], test["views"]) == (6, 6, 6)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 12  # 54 videos in batches of 9, twice
