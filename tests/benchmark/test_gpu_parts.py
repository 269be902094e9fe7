import json
import os
from pathlib import Path

import pytest

from octvideo.benchmark import gpu_parts
from octvideo.benchmark.gpu import PARTS
from octvideo.benchmark.gpu_parts import parse_test
from octvideo.benchmark.speed import BenchmarkError


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[gw3] [ 12%] PASSED tests/a/test_b.py::test_c[cuda-x y] ", ("tests/a/test_b.py::test_c[cuda-x y]", "PASSED")),
        ("tests/a/test_b.py::test_c[cuda] FAILED            [ 50%]", ("tests/a/test_b.py::test_c[cuda]", "FAILED")),
        ("tests/a/test_b.py::test_c SKIPPED (no device)     [ 50%]", ("tests/a/test_b.py::test_c", "SKIPPED")),
        (
            "ERROR tests/a/test_b.py::test_c - RuntimeError: x",
            ("tests/a/test_b.py::test_c", "ERROR", "RuntimeError: x"),
        ),
        ("ERROR tests/a/test_b.py - ImportError: y - z", ("tests/a/test_b.py", "ERROR", "ImportError: y - z")),
        ("tests/a/test_b.py::test_c", None),
        ("============ 1 passed in 0.1s ============", None),
        ("    tests/a/test_b.py:12: AssertionError", None),
    ],
)
def test_lines_of_pytest(line: str, expected: tuple[str, ...] | None) -> None:
    found = parse_test(line.rstrip())
    assert (found and tuple(found.values())) == expected


def test_a_collected_test() -> None:
    assert parse_test("tests/a/test_b.py::test_c", collected=True) == {
        "test": "tests/a/test_b.py::test_c",
        "outcome": "COLLECTED",
    }


def test_the_marked_tests_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    records: list[dict] = []
    gpu_parts.tests(records.append, toy=True)
    files = {record["test"].split("::")[0] for record in records}
    assert {
        "tests/octave/test_conv_cuda.py",
        "tests/engine/test_train_cuda.py",
        "tests/end_to_end/test_cuda.py",
    } <= files
    assert "tests/octave/test_conv.py" in files  # some of its tests run on both devices
    assert len(records) > 50


def test_every_part_has_a_program() -> None:
    assert {part.name for part in PARTS} == set(gpu_parts.PARTS)


def test_the_state_of_the_card_is_nvidia_smi_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "$1" >&2\necho "1980 MHz, 2619 MHz, 35, 120.5 W, 1024 MiB"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = gpu_parts.conditions(toy=False)
    assert found.pop("load") >= 0
    assert found == dict(zip(gpu_parts.STATE, ["1980 MHz", "2619 MHz", "35", "120.5 W", "1024 MiB"], strict=True))
    program.write_text("#!/bin/sh\nexit 9\n")
    assert list(gpu_parts.conditions(toy=False)) == ["load"]


def test_a_part_s_mistake_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def part(emit: gpu_parts.Emit, toy: bool) -> None:
        emit({"toy": toy})
        raise BenchmarkError("no room")

    monkeypatch.setitem(gpu_parts.PARTS, "motion", part)
    assert gpu_parts.main(["motion", str(tmp_path / "x.jsonl"), "--toy"]) == 1
    assert capsys.readouterr().out == "error: no room\n"
    start, record = map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())
    assert start["conditions"]["when"] == "start" and record == {"toy": True}
