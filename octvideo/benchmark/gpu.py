"""Measure octvideo on one GPU: run parts one after the other and keep one report, `python tools/benchmark.py gpu`.

Each part is a process with a time limit, so a crash, a hang or a CUDA error ends only that part. The report is
rewritten after each part, so an interrupted run leaves the results of the earlier parts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import octvideo
from octvideo import command
from octvideo.benchmark.gpu_report import markdown
from octvideo.benchmark.speed import BenchmarkError

ROOT = Path(octvideo.__file__).resolve().parents[1]
NEEDED = ("configs", "datasets", "tests", "tools")
"""Folders of a checkout that the parts read."""
TAIL = 15
"""Lines of output that the report keeps of a part that did not finish."""


@dataclass(frozen=True)
class Part:
    """One part. limit: most seconds. reserve: seconds that earlier parts leave for it. least: fewest useful seconds."""

    name: str
    limit: float
    reserve: float
    least: float = 10.0


PARTS = (
    Part("machine", 20, 20, least=1),
    Part("tests", 120, 60),
    Part("training_eager", 70, 40),
    Part("training_compiled", 100, 60),
    Part("inference_compiled", 100, 45),
    Part("inference_eager", 45, 25),
    Part("training_graphs", 70, 20),
    Part("inference_graphs", 60, 15),
    Part("limit", 40, 15),
    Part("motion", 90, 70),
    Part("training_search", 60, 0),
    Part("slowfast", 80, 0),
)
"""In the order of importance. The reserves and the limit of the first part add up to less than the default budget."""


@dataclass
class Outcome:
    """What happened to a part. status: done, failed, cut (at its limit) or skipped (no time left).

    conditions: load average and clocks at the start and at the end. tail: last lines of output if it is not done.
    """

    name: str
    status: str
    seconds: float = 0.0
    limit: float = 0.0
    exit_status: int | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    conditions: list[dict[str, Any]] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)


def benchmark_gpu(options: argparse.Namespace) -> None:
    """Run the parts and write the report. Raises BenchmarkError if there is no CUDA device or no checkout."""
    if not options.toy and not torch.cuda.is_available():
        raise BenchmarkError(
            "torch finds no CUDA device on this machine; run this on a machine with a GPU, "
            "or use --toy for the same program at toy sizes on the CPU"
        )
    if missing := [name for name in NEEDED if not (ROOT / name).is_dir()]:
        raise BenchmarkError(f"{ROOT} has no folder {missing[0]}: run the benchmark from a checkout of octvideo")
    parts = [part for part in PARTS if part.name in ("machine", *options.parts)]  # the report has the card's name
    if options.toy:  # a CPU compiles slowly, and the limits are meant for a GPU
        parts = [replace(part, limit=10 * part.limit) for part in parts]
    run_parts(parts, options.out, options.budget, toy=options.toy)


def run_parts(
    parts: Sequence[Part],
    out: Path,
    budget: float,
    *,
    toy: bool,
    command: Callable[[str, Path], list[str]] | None = None,
) -> list[Outcome]:
    """Run `parts` within `budget` seconds; write CARD.json and CARD.md in `out` after each.

    command: part name and file for its records -> command line (default: the program of octvideo.benchmark.gpu_parts).
    """
    started, outcomes = time.monotonic(), []
    report: dict[str, Any] = {"toy": toy, "budget_s": budget, "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    with tempfile.TemporaryDirectory(prefix="octvideo_gpu_") as folder:
        environment = _environment(Path(folder))
        for number, part in enumerate(parts):
            left = budget - (time.monotonic() - started)
            limit = min(part.limit, left - sum(later.reserve for later in parts[number + 1 :]))
            if limit < part.least:
                outcomes.append(Outcome(part.name, "skipped", limit=max(limit, 0.0)))
                print(f"== {part.name}: skipped, {max(limit, 0):.0f} s are left for it", flush=True)
            else:
                print(f"== {part.name}: at most {limit:.0f} s", flush=True)
                records = Path(folder) / f"{part.name}.jsonl"
                line = command(part.name, records) if command else _command(part.name, records, toy)
                outcomes.append(_run(part.name, line, records, limit, environment))
            report |= {"seconds": time.monotonic() - started, "parts": [vars(outcome) for outcome in outcomes]}
            path = _write(report, out)
    print(f"== report: {path}.md and {path}.json after {report['seconds']:.0f} s", flush=True)
    return outcomes


def _command(name: str, records: Path, toy: bool) -> list[str]:
    return [sys.executable, "-m", "octvideo.benchmark.gpu_parts", name, str(records), *(["--toy"] if toy else [])]


def _environment(folder: Path) -> dict[str, str]:
    """One compiler cache for all parts: what one part has compiled is not compiled again in the next part."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    compilers = {
        "TORCHINDUCTOR_COMPILE_THREADS": str(os.cpu_count() or 1),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    return {**compilers, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _run(name: str, command: list[str], records: Path, limit: float, environment: dict[str, str]) -> Outcome:
    """Run one part, print its output, and kill its process group at the limit."""
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    tail: deque[str] = deque(maxlen=TAIL)
    reader = threading.Thread(target=_print_lines, args=(process, tail), daemon=True)
    reader.start()
    status = "done"
    try:
        if process.wait(limit) != 0:
            status = "failed"
    except subprocess.TimeoutExpired:
        status = "cut"
    finally:  # also after Ctrl-C: no process of the part remains
        _kill_group(process)
    reader.join(5)
    seconds = time.monotonic() - started
    print(f"== {name}: {status} after {seconds:.0f} s", flush=True)
    found = _read(records)
    return Outcome(
        name,
        status,
        seconds,
        limit,
        process.returncode,
        records=[record for record in found if "conditions" not in record],
        conditions=[record["conditions"] for record in found if "conditions" in record],
        tail=[] if status == "done" else list(tail),
    )


def _print_lines(process: subprocess.Popen[str], tail: deque[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("USDT:"):
            continue  # torch's profiler writes it at each start and stop
        print(f"   {line.rstrip()}", flush=True)
        tail.append(line.rstrip()[:300])


def _kill_group(process: subprocess.Popen[str]) -> None:
    """Kill the part and the processes that it started, such as data loader and compiler workers."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(records: Path) -> list[dict[str, Any]]:
    """Records, one JSON object a line. A killed process may leave an incomplete last line, which is dropped."""
    if not records.is_file():
        return []
    lines = records.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _write(report: dict[str, Any], out: Path) -> Path:
    path = out / card_file(report)
    try:
        out.mkdir(parents=True, exist_ok=True)
        command.write_output(path.with_suffix(".json"), (json.dumps(report, indent=1) + "\n").encode())
        command.write_output(path.with_suffix(".md"), markdown(report).encode())
    except OSError as error:
        raise BenchmarkError(f"{path}.json: cannot be written ({error}); set another folder with --out") from None
    return path


def card_file(report: dict[str, Any]) -> str:
    """Return the name of the report's files without suffix: NVIDIA H100 80GB HBM3 -> nvidia_h100_80gb_hbm3."""
    if report["toy"]:
        return "toy"
    records = [record for part in report["parts"] if part["name"] == "machine" for record in part["records"]]
    card = records[0]["card"] if records else "unknown card"
    return re.sub(r"[^a-z0-9]+", "_", card.lower()).strip("_")
