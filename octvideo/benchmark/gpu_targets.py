"""Targets of the GPU suite: compute each measured value from the records of a report and compare it with the target."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]

EFFICIENCY = {0.125: 0.85, 0.25: 0.90, 0.5: 0.90}
"""Least ratio of multiply-adds over ratio of times, by alpha."""
NAIVE = 1.15
"""Least speed of the octave network relative to the naive form."""
KERNELS = {"eager": 1.7, "compiled": 1.2}
"""Most kernels per training step relative to the vanilla network."""
FIRST_STEP = 60.0
"""Most seconds of the first compiled training step of I3D-R50."""


@dataclass(frozen=True)
class Target:
    """One row. measured: None if a figure is missing. note: the form in which the figure was measured."""

    what: str
    wanted: float
    measured: float | None
    at_least: bool = True
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        met = self.measured >= self.wanted if self.at_least else self.measured <= self.wanted
        return "met" if met else "missed"


def networks_of(report: Record, *, slowfast: bool = False) -> list[Record]:
    """Return the records of networks that were measured, of I3D-R50 or of SlowFast."""
    parts = [part for part in report["parts"] if (part["name"] == "slowfast") == slowfast]
    records = [record for part in parts for record in part["records"] if "label" in record]
    return [record for record in records if "error" not in record]


def part_of(report: Record, name: str) -> Record | None:
    return next((part for part in report["parts"] if part["name"] == name), None)


def outcomes_of_tests(report: Record) -> dict[str, Record]:
    """Return the last outcome of each test, with the failure's message."""
    merged: dict[str, Record] = {}
    for record in (part_of(report, "tests") or {"records": []})["records"]:
        if "test" in record:
            merged[record["test"]] = {**merged.get(record["test"], {}), **record}
    return merged


def median(record: Record) -> float:
    return statistics.median(record["seconds"])


def form(record: Record) -> str:
    """Return the form of a record: backend, fused or as built, kernels off, search for cuDNN's algorithms."""
    inference = ("fused" if record["fused"] and record["kind"] == "octvideo" else "as built",)
    parts = [record["backend"], *(inference if record["mode"] == "inference" else ())]
    options = ([] if record["kernels"] else ["kernels off"]) + (["cuDNN search"] if record["search"] else [])
    return ", ".join([*parts, *options])


def select(records: Sequence[Record], mode: str, kind: str, alpha: float, backend: str | None = None) -> list[Record]:
    wanted = {"mode": mode, "kind": kind, "alpha": alpha, **({"backend": backend} if backend else {})}
    return [record for record in records if all(record[name] == value for name, value in wanted.items())]


def fastest(records: Sequence[Record], mode: str, kind: str, alpha: float) -> Record | None:
    """Return the record of the fastest form of a network."""
    return min(select(records, mode, kind, alpha), key=median, default=None)


def efficiency(octave: Record, vanilla: Record, time_ratio: float | None = None) -> float:
    """Return the ratio of multiply-adds over the ratio of times; 1 means that time follows the multiply-adds."""
    return octave["macs"] / vanilla["macs"] / (time_ratio or median(octave) / median(vanilla))


def targets(report: Record) -> list[Target]:
    """Return all targets, also those whose figures are missing."""
    records = networks_of(report)
    return [
        *_efficiencies(records),
        *_over_naive(records),
        *_over_pytorchvideo(records),
        *_steps(records),
        *_correctness(report),
    ]


def _efficiencies(records: Sequence[Record]) -> Iterator[Target]:
    for mode in ("training", "inference"):
        vanilla = fastest(records, mode, "octvideo", 0.0)
        for alpha, wanted in EFFICIENCY.items():
            what = f"{mode} efficiency at alpha {alpha:g}, each network in its fastest form"
            octave = fastest(records, mode, "octvideo", alpha)
            if octave is None or vanilla is None:
                yield Target(what, wanted, None)
            else:
                yield Target(what, wanted, efficiency(octave, vanilla), note=f"{form(octave)} / {form(vanilla)}")


def _over_naive(records: Sequence[Record]) -> Iterator[Target]:
    for mode in ("training", "inference"):
        what = f"{mode} speed at alpha 0.25 relative to the naive form, each in its fastest form"
        octave, naive = (fastest(records, mode, kind, 0.25) for kind in ("octvideo", "naive"))
        if octave is None or naive is None:
            yield Target(what, NAIVE, None)
        else:
            note = f"{form(octave)} / {form(naive)}"
            yield Target(what, NAIVE, median(naive) / median(octave), note=note)


def _over_pytorchvideo(records: Sequence[Record]) -> Iterator[Target]:
    for backend in ("eager", "compiled"):
        what = f"vanilla training speed relative to pytorchvideo's network, {backend}"
        peer = next(iter(select(records, "training", "pytorchvideo", 0.0, backend)), None)
        ratios = peer["time_ratios"].get("vanilla") if peer else None
        yield Target(what, 1.0, statistics.median(ratios) if ratios else None, note="same rounds" if ratios else "")


def _steps(records: Sequence[Record]) -> Iterator[Target]:
    syncs = [r["syncs"] for r in records if r["mode"] == "training" and r["kind"] == "octvideo"]
    known = [count for count in syncs if count is not None]
    yield Target("synchronisations per training step, most of all forms", 0.0, max(known, default=None), at_least=False)
    for backend, wanted in KERNELS.items():
        pair = [next(iter(select(records, "training", "octvideo", alpha, backend)), None) for alpha in (0.25, 0.0)]
        for counted, what in (("kernels_run", "kernels"), ("operators", "operator calls")):
            name = f"{what} per training step at alpha 0.25 relative to vanilla, {backend}"
            octave, vanilla = (record[counted] if record else None for record in pair)
            yield Target(name, wanted, octave / vanilla if octave and vanilla else None, at_least=False)
    first = next(iter(select(records, "training", "octvideo", 0.25, "compiled")), None)
    name = "seconds of the first compiled training step at alpha 0.25"
    yield Target(name, FIRST_STEP, first["first_step_s"] if first else None, at_least=False)


def _correctness(report: Record) -> Iterator[Target]:
    found = outcomes_of_tests(report).values()
    failed = sum(record["outcome"] in ("FAILED", "ERROR") for record in found)
    yield Target("CUDA tests that failed", 0.0, float(failed) if found else None, at_least=False)
    part = part_of(report, "motion")
    top1 = {record["network"]: record["top1"] for record in (part["records"] if part else [])}
    for network in ("i3d_tiny", "oct_i3d_tiny"):
        yield Target(f"top-1 of {network} on the motion data, %", 100.0, top1.get(network))
