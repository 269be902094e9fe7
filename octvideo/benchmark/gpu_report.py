"""Write the report of the GPU suite as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tabulate import tabulate

from octvideo.benchmark.gpu_targets import (
    Record,
    efficiency,
    median,
    networks_of,
    outcomes_of_tests,
    part_of,
    targets,
)
from octvideo.benchmark.speed import spread

MISSING = "not measured"
DEFINITIONS = """\
- ms: one step, median of the rounds, on the device's clock; in brackets the fastest and the slowest round. Each network is
  measured in rounds that alternate with those of the vanilla network.
- host ms: median time that the host takes to queue one step. If it is close to ms, the host limits the speed.
- MiB: what a step allocates above weights and momenta, at its peak. No figure for CUDA graphs, which keep their memory.
- kernels: GPU kernels of one step. launches: calls that start them (one call starts a CUDA graph). operators: `aten::`
  calls on the host, nested ones included. syncs: calls per step that make the host wait for the device.
- first step: seconds of the first step, with compiling. cuDNN search: torch.backends.cudnn.benchmark is True, so the first
  step also measures cuDNN's algorithms; in all other tables it is False, which is torch's default.
- time ratio: over the vanilla network, round by round. efficiency: ratio of multiply-adds over time ratio; 1 means that time
  follows the multiply-adds. The targets over fastest forms divide medians of different rounds.
- limit: the efficiency that a roofline MODEL of this card predicts; it is not a measurement.
- The naive form (four convolutions per layer) and pytorchvideo's network are never fused."""


def markdown(report: Record) -> str:
    """Return the report: targets first, then what was measured, then what did not run and why."""
    machine = (part_of(report, "machine") or {"records": []})["records"]
    card = machine[0]["card"] if machine else "an unknown card"
    if report["toy"]:
        title = "# Toy run of the GPU suite on a CPU\n\nToy sizes: no figure here says anything about a GPU."
    else:
        title = f"# GPU report: {card}"
    sections = [
        f"{title}\n\nWritten by `python tools/benchmark.py gpu`, started {report['started']}, {report['seconds']:.0f} s "
        f"of at most {report['budget_s']:.0f} s.",
        _targets(report),
        _parts(report),
        _machine(machine),
        _tests(report),
        _networks("I3D-R50 8x8", networks_of(report), _limits(report)),
        _networks("SlowFast-R50 4x16", networks_of(report, slowfast=True), {}),
        _motion(report),
        f"## Definitions\n\n{DEFINITIONS}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def _targets(report: Record) -> str:
    rows = []
    for target in targets(report):
        measured = MISSING if target.measured is None else f"{target.measured:.2f}"
        wanted = f"{'at least' if target.at_least else 'at most'} {target.wanted:g}"
        rows.append([target.what, wanted, measured, "toy" if report["toy"] else target.verdict, target.note])
    return "## Targets\n\n" + _table(rows, ["target", "wanted", "measured", "", "form"])


def _parts(report: Record) -> str:
    rows = [
        [
            p["name"],
            p["status"],
            f"{p['seconds']:.0f}",
            f"{p['limit']:.0f}",
            *(_conditions(p, w) for w in ("start", "end")),
        ]
        for p in report["parts"]
    ]
    text = "## Parts\n\n" + _table(rows, ["part", "status", "seconds", "limit", "at the start", "at the end"])
    for part in report["parts"]:
        if part["tail"]:
            status = f" with exit status {part['exit_status']}" if part["status"] == "failed" else ""
            lines = "\n".join(line.replace("```", "'''") for line in part["tail"])
            text += f"\n\n{part['name']} {part['status']}{status}. Its last lines of output:\n\n```\n{lines}\n```"
    return text


def _conditions(part: Record, when: str) -> str:
    found: Record = next((c for c in part["conditions"] if c["when"] == when), {})
    return ", ".join(f"{name} {value}" for name, value in found.items() if name != "when")


def _machine(records: Sequence[Record]) -> str:
    if not records:
        return f"## Machine\n\n{MISSING}"
    rows = [[name, str(value)] for name, value in records[0].items() if value is not None]
    return "## Machine\n\n" + _table(rows, ["", ""])


def _tests(report: Record) -> str:
    found = outcomes_of_tests(report)
    if not found:
        return f"## CUDA tests\n\n{MISSING}"
    counts: dict[str, int] = {}
    for record in found.values():
        counts[record["outcome"]] = counts.get(record["outcome"], 0) + 1
    text = "## CUDA tests\n\n" + ", ".join(f"{count} {name.lower()}" for name, count in sorted(counts.items()))
    failed = [record for record in found.values() if record["outcome"] in ("FAILED", "ERROR")]
    lines = [f"- `{record['test']}`: {record.get('message', 'see the output')}" for record in failed]
    return "\n".join([text, *([""] if lines else []), *lines])


Limits = dict[tuple[str, str, float], float]


def _limits(report: Record) -> Limits:
    """Return the efficiencies that the model predicts, by mode, backend and alpha."""
    part = part_of(report, "limit")
    return {(r["mode"], r["backend"], r["alpha"]): r["efficiency"] for r in (part["records"] if part else [])}


def _networks(name: str, records: Sequence[Record], limits: Limits) -> str:
    """Write one table for each mode, backend and form, in the order in which they were measured."""
    if not records:
        return f"## {name}\n\n{MISSING}"
    tables: dict[str, list[Record]] = {}
    for record in records:
        fused = (", fused" if record["fused"] else ", as built") if record["mode"] == "inference" else ""
        search = ", cuDNN search" if record["search"] else ""
        title = f"{record['mode']}, {record['backend']}{fused}{search}, batch {record['batch']}"
        tables.setdefault(title, []).append(record)
    return "\n\n".join([f"## {name}", *(f"### {title}\n\n{_rows(rows, limits)}" for title, rows in tables.items())])


COLUMNS = (
    *(
        "network",
        "G MACs",
        "ms",
        "host ms",
        "clips/s",
        "MiB",
        "kernels",
        "launches",
        "operators",
        "syncs",
        "first step",
    ),
    *("time ratio", "efficiency", "limit"),
)


def _rows(records: Sequence[Record], limits: Limits) -> str:
    vanilla = next((record for record in records if record["label"] == "vanilla"), None)
    rows = []
    for record in records:
        ratios = record["time_ratios"].get("vanilla")
        ratio = statistics.median(ratios) if ratios else None
        kernels = "eager" if record["backend"] == "eager" else "compiled"  # CUDA graphs replay compiled kernels
        limit = limits.get((record["mode"], kernels, record["alpha"]))
        rows.append(
            [
                record["label"],
                f"{record['macs'] / 1e9:.2f}",
                f"{1000 * median(record):.2f} ({spread([1000 * s for s in record['seconds']])})",
                f"{1000 * statistics.median(record['host_seconds']):.2f}",
                f"{record['clips_per_s']:.1f}",
                "-" if record["peak_memory"] is None else f"{record['peak_memory'] / 2**20:.0f}",
                *(_count(record[name]) for name in ("kernels_run", "launches", "operators", "syncs")),
                f"{record['first_step_s']:.1f}",
                f"{ratio:.3f} ({spread(ratios, 3)})" if ratio else "-",
                f"{efficiency(record, vanilla, ratio):.2f}" if vanilla and ratio else "-",
                f"{limit:.2f}" if limit and record["kind"] == "octvideo" and record["alpha"] else "-",
            ]
        )
    return _table(rows, COLUMNS)


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _motion(report: Record) -> str:
    part = part_of(report, "motion")
    if not part or not part["records"]:
        return f"## Motion demo\n\n{MISSING}"
    rows = [
        [
            record["network"],
            f"{record['top1']:.2f}",
            str(record["videos"]),
            str(record["epochs"]),
            f"{record['seconds']:.0f}",
            f"{record['train_clips_per_s']:.0f}",
            f"{record['test_clips_per_s']:.0f}",
        ]
        for record in part["records"]
    ]
    header = ["network", "top-1 %", "videos", "epochs", "seconds", "train clips/s", "test clips/s"]
    note = "Trained and tested by `tools/run_net.py`, both at the same time, so they share the card and the cores."
    return f"## Motion demo\n\n{_table(rows, header)}\n\n{note}"
