"""The GPU suite's program: parts that fail, hang or are killed, the budget, and a run at toy sizes."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from octvideo.benchmark import gpu
from octvideo.benchmark.gpu import PARTS, Part, run_parts
from tools import benchmark

from .command import main

HEADER = "import json, os, subprocess, sys, time\nrecords = open(sys.argv[1], 'a')\n"
WRITE = "print(json.dumps({'test': 'a', 'outcome': 'PASSED'}), file=records, flush=True)\n"
SCRIPTS = {
    "machine": "print(json.dumps({'card': 'NVIDIA H100 80GB HBM3'}), file=records, flush=True)",
    "tests": WRITE + "print('to the end'); raise SystemExit(3)",
    "hangs": WRITE + "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); time.sleep(60)",
    "killed": WRITE + "records.write('{\"half'); records.flush(); os.kill(os.getpid(), 9)",
    "last": "print(json.dumps({'report': json.load(open(os.environ['REPORT']))}), file=records)",
}


def command(name: str, records: Path) -> list[str]:
    return ["python3", "-c", HEADER + SCRIPTS[name], str(records)]


def test_each_end_of_a_part_is_in_the_report_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out/nvidia_h100_80gb_hbm3.json"
    monkeypatch.setenv("REPORT", str(path))
    parts = [Part(name, limit=2 if name == "hangs" else 30, reserve=0, least=1) for name in SCRIPTS]
    started = time.monotonic()
    outcomes = {
        outcome.name: outcome for outcome in run_parts(parts, tmp_path / "out", 100, toy=False, command=command)
    }
    assert time.monotonic() - started < 20
    statuses = {name: outcome.status for name, outcome in outcomes.items()}
    assert statuses == {"machine": "done", "tests": "failed", "hangs": "cut", "killed": "failed", "last": "done"}
    assert (outcomes["tests"].exit_status, outcomes["killed"].exit_status) == (3, -9)
    assert outcomes["tests"].tail == ["to the end"] and outcomes["machine"].tail == []
    # what a part wrote before its end is kept, an incomplete line is not
    record = {"test": "a", "outcome": "PASSED"}
    assert all(outcomes[name].records == [record] for name in ("tests", "hangs", "killed"))
    (pid,) = map(int, outcomes["hangs"].tail)
    with pytest.raises(ProcessLookupError):  # a part's processes end with it
        for _ in range(50):
            os.kill(pid, 0)
            time.sleep(0.1)
    # the report that the last part found has all parts before it
    (seen,) = outcomes["last"].records
    assert [part["name"] for part in seen["report"]["parts"]] == list(SCRIPTS)[:-1]
    text = path.with_suffix(".md").read_text()
    assert "tests failed with exit status 3" in text and "hangs cut" in text and "to the end" in text
    assert json.loads(path.read_text())["parts"][1]["status"] == "failed"
    assert "== hangs: cut" in capsys.readouterr().out


def test_later_parts_are_shortened_or_skipped_and_the_reserve_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCRIPTS, "short", "")
    monkeypatch.setitem(SCRIPTS, "long", "time.sleep(30)")
    parts = [Part("long", 60, 0, least=1), Part("none", 60, 0, least=10), Part("short", 5, reserve=4, least=1)]
    outcomes = run_parts(parts, tmp_path, budget=7, toy=True, command=command)
    assert [outcome.status for outcome in outcomes] == ["cut", "skipped", "done"]
    assert 2 < outcomes[0].limit < 3.1 and 3 < outcomes[2].limit <= 5
    assert "| none   | skipped" in (tmp_path / "toy.md").read_text()


def test_the_parts_fit_into_the_default_budget() -> None:
    assert PARTS[0].limit + sum(part.reserve for part in PARTS[1:]) < 480
    assert all(part.least <= part.reserve <= part.limit or part.reserve == 0 for part in PARTS)


def test_without_a_device_or_a_checkout_there_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = main("gpu")
    assert (status, out, err.count("\n")) == (2, "", 1) and "no CUDA device" in err and "--toy" in err
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    status, _, err = main("gpu", "--toy")
    assert status == 2 and "has no folder configs" in err


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(gpu, "_command", lambda name, records, toy: command(name, records))
    status, _, err = main("gpu", "--toy", "--parts", "machine", "--out", str(tmp_path / "file"))
    assert status == 2 and f"{tmp_path}/file/toy.json: cannot be written" in err


def test_unknown_parts_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["gpu", "--parts", "machine,x"])
    assert stopped.value.code == 2 and "unknown part 'x'; choose from machine, tests" in capsys.readouterr().err


def test_chosen_parts_run_after_the_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Part] = []
    monkeypatch.setattr(gpu, "run_parts", lambda parts, out, budget, toy: chosen.extend(parts))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main("gpu", "--parts", "motion,tests")[0] == 0
    assert chosen == [part for part in PARTS if part.name in ("machine", "tests", "motion")]


def toy_report(out: Path, *flags: str) -> tuple[dict, str]:
    status, _, err = main("gpu", "--toy", "--out", str(out), *flags)
    assert status == 0, err
    report = json.loads((out / "toy.json").read_text())
    assert {part["name"]: part["status"] for part in report["parts"]} == {
        part["name"]: "done" for part in report["parts"]
    }, json.dumps([part["tail"] for part in report["parts"]])
    return report, (out / "toy.md").read_text()


def test_a_toy_run_measures_and_reports(tmp_path: Path) -> None:
    report, text = toy_report(tmp_path, "--parts", "machine,training_eager")
    machine, training = report["parts"]
    assert machine["records"][0]["torch"] == torch.__version__
    assert [record["label"] for record in training["records"]] == [
        *("vanilla", "alpha 0.25", "alpha 0.25, naive", "alpha 0.25, kernels off")
    ]
    vanilla, octave, naive, _ = training["records"]
    assert octave["macs"] == naive["macs"] < vanilla["macs"]
    assert len(octave["seconds"]) == len(octave["time_ratios"]["vanilla"]) == 2
    assert list(naive["time_ratios"]) == ["vanilla", "alpha 0.25"]
    assert 500 < vanilla["operators"] < octave["operators"] and vanilla["syncs"] is None
    assert [condition["when"] for condition in training["conditions"]] == ["start", "end"]
    assert "no figure here says anything about a GPU" in text
    assert "### training, eager, batch 2" in text and "| alpha 0.25, naive" in text


@pytest.mark.slow
def test_a_toy_run_of_all_parts(tmp_path: Path) -> None:
    """Compiling takes minutes on two cores."""
    report, text = toy_report(tmp_path, "--budget", "3000")
    assert [part["name"] for part in report["parts"]] == [part.name for part in PARTS]
    assert "SlowFast" in text and "oct_i3d_tiny" in text
    records = [record for part in report["parts"] for record in part["records"] if record.get("backend") == "compiled"]
    measured = [record for record in records if "label" in record]
    assert {record["mode"] for record in measured} == {"training", "inference"}
    # blocks that the vanilla and the octave network have in common are compiled once
    assert all(record["compiled_graphs"] > 0 and record["graph_breaks"] == 0 for record in measured)
