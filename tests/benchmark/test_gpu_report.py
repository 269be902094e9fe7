"""The Markdown of a report with made-up figures."""

from octvideo.benchmark.gpu_report import markdown

from .records import complete, network, part, report


def tables(text: str) -> dict[str, dict[str, list[str]]]:
    """Heading -> first cell of a row -> the other cells."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            rows = found.setdefault(line.lstrip("# "), {})
        elif line.startswith("|") and not line.startswith("|-"):
            first, *rest = (cell.strip() for cell in line.strip("|").split("|"))
            rows[first] = rest
    return found


def test_a_complete_report() -> None:
    text = markdown(complete())
    assert text.startswith("# GPU report: NVIDIA H100 80GB HBM3\n")
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings[:5] == ["## Targets", "## Parts", "## Machine", "## CUDA tests", "## I3D-R50 8x8"]
    found = tables(text)
    assert found["Targets"]["training efficiency at alpha 0.25, each network in its fastest form"] == [
        *("at least 0.9", "0.93", "met", "compiled / compiled")
    ]
    assert found["Targets"]["CUDA tests that failed"][1:3] == ["1.00", "missed"]
    assert found["Parts"]["training_compiled"] == ["cut", "10", "60", "load 0.5, clocks.sm 1980 MHz", ""]
    assert "training_compiled cut. Its last lines of output:\n\n```\ncompiling\nstill '''compiling\n```" in text
    assert found["Machine"] == {"": [""], "card": ["NVIDIA H100 80GB HBM3"], "torch": ["2.11.0"]}
    assert "1 failed, 1 passed\n\n- `tests/a.py::c`: assert 1 == 2" in text
    row = dict(
        zip(
            found["training, eager, batch 16"]["network"], found["training, eager, batch 16"]["alpha 0.25"], strict=True
        )
    )
    assert row["ms"] == "90.00 (89.10-90.90)" and row["clips/s"] == "177.8" and row["MiB"] == "1024"
    assert (row["kernels"], row["launches"], row["operators"], row["syncs"]) == ("1500", "1001", "9000", "0")
    assert row["time ratio"] == "0.850 (0.800-0.900)" and row["efficiency"] == "1.03" and row["limit"] == "0.97"
    assert list(found["inference, compiled, fused, batch 16"]) == ["network", "vanilla", "alpha 0.125"]
    assert found["Motion demo"]["oct_i3d_tiny"] == ["100.00", "128", "30", "40", "900", "2000"]
    assert list(found["SlowFast-R50 4x16"]) == [] and "vanilla" in text.split("## SlowFast")[1]


def test_what_is_missing_is_said() -> None:
    text = markdown(report(part("machine", [], "failed", ("no driver",))))
    assert text.startswith("# GPU report: an unknown card")
    for heading in ("Machine", "CUDA tests", "I3D-R50 8x8", "SlowFast-R50 4x16", "Motion demo"):
        assert f"## {heading}\n\nnot measured" in text
    assert "no driver" in text


def test_a_toy_report_has_no_verdicts() -> None:
    content = report(
        part("training_eager", [network("vanilla", "training", "eager", 1.0, peak_memory=None, syncs=None)])
    )
    text = markdown({**content, "toy": True})
    assert "no figure here says anything about a GPU" in text and {
        row[2] for row in tables(text)["Targets"].values()
    } == {"", "toy"}
