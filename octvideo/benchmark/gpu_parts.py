"""The parts of the GPU suite: `python -m octvideo.benchmark.gpu_parts NAME RECORDS [--toy]` runs one.

A part appends each result to the file RECORDS, one JSON object a line, as soon as it has the result: a part that is
killed at its time limit keeps its earlier results.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import octvideo
from octvideo.benchmark import gpu_networks
from octvideo.benchmark.gpu_limit import emit_limits
from octvideo.benchmark.speed import BenchmarkError

ROOT = Path(octvideo.__file__).resolve().parents[1]
CARD = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "memory.used")
"""Fields of nvidia-smi: of the card, and of its state beside the figures of each part."""
MARKED = re.compile(r"mark\.cuda\b|from tests\.devices import")
"""What a file with tests for CUDA contains."""
OUTCOMES = "PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS"
PROGRESS = r"(?:\[gw\d+\] \[ *\d+%\] )?"  # of xdist
TEST_LINE = re.compile(rf"{PROGRESS}(?:({OUTCOMES}) )?(tests/\S+?\.py(?:::.+?)?)(?: ({OUTCOMES})(?: .*)?| - (.*))?$")
MOTION_NETWORKS = ("i3d_tiny", "oct_i3d_tiny")
MOTION_WORKERS = 6  # of each of the two runs, on a machine with 16 cores

Emit = Callable[[dict[str, Any]], None]


def machine(emit: Emit, toy: bool) -> None:
    """Emit one record: card, driver, clocks, versions, cores and load."""
    facts: dict[str, Any] = {
        "card": "CPU",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "octvideo": octvideo.__version__,
        "commit": _output(["git", "rev-parse", "--short", "HEAD"]),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    if not toy:
        card = torch.cuda.get_device_properties(0)
        facts |= {
            "card": card.name,
            "memory_bytes": card.total_memory,
            "multiprocessors": card.multi_processor_count,
            "capability": f"{card.major}.{card.minor}",
            "cudnn": torch.backends.cudnn.version(),
            **_smi(CARD),
        }
    emit(facts)
    print(json.dumps(facts, indent=1))


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    return str(getattr(importlib.import_module(package), "__version__", "unknown"))


def conditions(toy: bool) -> dict[str, Any]:
    """Return the machine's load average and the state of the card."""
    return {"load": round(os.getloadavg()[0], 2), **({} if toy else _smi(STATE))}


def _smi(fields: Sequence[str]) -> dict[str, str]:
    """Ask nvidia-smi about the first card. Return an empty dict if it is missing or fails."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    values = _output(query) if shutil.which("nvidia-smi") else None
    return dict(zip(fields, values.split(", "), strict=True)) if values else {}


def _output(command: list[str]) -> str | None:
    """Return what a command prints, or None if it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def tests(emit: Emit, toy: bool) -> None:
    """Run the tests with the marker `cuda`; emit one record per test, and pytest's other output if some failed.

    A toy run collects them only.
    """
    # xdist without execnet would stop pytest
    parallel = all(importlib.util.find_spec(name) for name in ("xdist", "execnet"))
    workers = ["-n", "4", "--dist", "worksteal"] if parallel else []
    plain = [] if parallel else ["-p", "no:xdist", "-p", "no:xdist.looponfail"]
    plain += ["-o", "addopts=--strict-markers --import-mode=importlib", "-p", "no:cacheprovider", "-m", "cuda"]
    show = ["--collect-only", "-q"] if toy else [*workers, "-v", "-rfE", "--tb=short", "--durations=10"]
    environment = {**os.environ, "OCTVIDEO_REQUIRE_CUDA": "1", "COLUMNS": "250"}  # pytest cuts messages at the width
    command = [sys.executable, "-m", "pytest", "--continue-on-collection-errors", *plain, *show, *_marked_files()]
    output = []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            line = line.rstrip()
            if record := parse_test(line, collected=toy):
                emit(record)
            if not record or record["outcome"] in ("FAILED", "ERROR"):
                print(line)
                output.append(line)
        status = process.wait()
    if status != 0:
        emit({"output": "\n".join(output)[-20000:]})
    if status not in (0, 1):  # 1: some tests failed, which the records say
        raise BenchmarkError(f"pytest ended with status {status}: {' '.join(command)}")


def _marked_files() -> list[str]:
    """Return the files with tests for CUDA.

    Collecting all files takes longer than these tests do, and other files may need packages that a GPU machine lacks.
    """

    def is_marked(path: Path) -> bool:
        sources = (path, path.with_name("conftest.py"))
        return any(source.is_file() and MARKED.search(source.read_text()) for source in sources)

    return [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if is_marked(path)]


def parse_test(line: str, *, collected: bool = False) -> dict[str, Any] | None:
    """Return test and outcome from a line of `pytest -v` or of `--collect-only -q`, None for other lines."""
    match = TEST_LINE.match(line)
    if not match:
        return None
    outcome = match[1] or match[3] or ("COLLECTED" if collected else None)
    message = {"message": match[4]} if match[4] else {}  # lines of the summary have one
    return {"test": match[2], "outcome": outcome, **message} if outcome else None


def motion(emit: Emit, toy: bool) -> None:
    """Train and test the demo's I3D and Oct-I3D by tools/run_net.py, both at the same time; emit one record of each."""
    with tempfile.TemporaryDirectory(prefix="octvideo_motion_") as folder:
        data, small = Path(folder) / "data", ["--train", "2", "--val", "1", "--size", "48"] if toy else []
        started = time.monotonic()
        workers = ["--workers", str(os.cpu_count() or 1)]
        make = [sys.executable, "datasets/motion.py", "--out", str(data), *workers, *small]
        done = subprocess.run(make, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise BenchmarkError(f"datasets/motion.py ended with status {done.returncode}: {done.stdout[-500:]}")
        print(f"motion data: {time.monotonic() - started:.1f} s")
        started = time.monotonic()
        runs = {name: _start_run(name, data, Path(folder) / name, toy) for name in MOTION_NETWORKS}
        failed = []
        for name, process in runs.items():
            output, _ = process.communicate()
            seconds = time.monotonic() - started
            print(f"{name}: " + "\n".join(output.splitlines()[-3:]))
            if process.returncode != 0:
                failed.append(f"{name}: run_net.py ended with status {process.returncode}")
            else:
                emit({"network": name, "seconds": seconds, **_motion_result(Path(folder) / name)})
        if failed:
            raise BenchmarkError("; ".join(failed))


def _start_run(name: str, data: Path, out: Path, toy: bool) -> subprocess.Popen[str]:
    lists = ["DATA.TRAIN_LIST", f"{data}/train.txt", "DATA.VAL_LIST", f"{data}/val.txt", "DATA.PREFIX", str(data)]
    # Validation takes no part in the result: it is off, to leave the time to training.
    run = ["OUTPUT_DIR", str(out), "TRAIN.VAL_PERIOD", "0", "TRAIN.CHECKPOINT_PERIOD", "100"]
    if toy:
        run += ["DEVICE", "cpu", "NUM_THREADS", "1", "TRAIN.EPOCHS", "1", "DATA.TRAIN_SHORT_SIDE", "[36, 40]"]
        run += ["DATA.TRAIN_CROP", "32", "DATA.TEST_SHORT_SIDE", "36", "DATA.TEST_CROP", "32", "DATA.NUM_FRAMES", "4"]
        run += ["TEST.CLIPS", "1", "TEST.CROPS", "1", "SOLVER.WARMUP_EPOCHS", "0"]
    else:
        run += ["DEVICE", "cuda", "DATA.NUM_WORKERS", str(MOTION_WORKERS)]
    command = [sys.executable, "tools/run_net.py", "--cfg", f"configs/motion/{name}.yaml", *lists, *run]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _motion_result(out: Path) -> dict[str, Any]:
    """Accuracy from test.json; epochs, clips/s and peak memory from the log."""
    test = json.loads((out / "test.json").read_text())
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    epochs = [event for event in events if event["event"] == "epoch"]
    return {
        "top1": test["top1"],
        "videos": test["videos_listed"],
        "epochs": len(epochs),
        "train_clips_per_s": max(event["clips_per_s"] for event in epochs),
        "test_clips_per_s": test["clips_per_s"],
    }


PARTS: dict[str, Callable[[Emit, bool], None]] = {
    "machine": machine,
    "tests": tests,
    "limit": emit_limits,
    "motion": motion,
    **{name: partial(gpu_networks.measure_part, name) for name in gpu_networks.PLANS},
}


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("records", type=Path)
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU")
    options = parser.parse_args(arguments)
    emit = partial(_append, options.records)
    emit({"conditions": {"when": "start", **conditions(options.toy)}})
    try:
        PARTS[options.part](emit, options.toy)
        emit({"conditions": {"when": "end", **conditions(options.toy)}})
    except BenchmarkError as error:
        print(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
