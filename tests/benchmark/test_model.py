import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from octvideo import build
from octvideo.analysis.naive import NaiveOctConv
from octvideo.benchmark import model as benchmark_model
from octvideo.benchmark.model import InferenceStep, Subject, TrainingStep, Way
from octvideo.octave.fuse import FusedNetwork

from .command import CFG, main
from .filled import fill_norms

IMAGES = str(Path(CFG).parents[1] / "stills/oct_resnet_tiny.yaml")
CPU = ("DEVICE", "cpu")
SMALL = ("--batch", "2", "--rounds", "2")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler (g++)")


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process takes seconds to start; one test reads memory."""
    monkeypatch.setattr(benchmark_model, "peak_memory", lambda prepare, device: None)


def tables(out: str) -> dict[str, dict[str, dict[str, str]]]:
    """title of the first column -> name of the network -> column -> cell"""
    found: dict[str, dict[str, dict[str, str]]] = {}
    header: list[str] = []
    for line in out.splitlines():
        if not line.startswith("|"):
            header = []
            continue
        assert len(line) <= 120
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not header:
            header = cells
            found[" ".join([header[0], *header[1:2]])] = rows = {}
        elif not line.startswith("|-"):
            rows[cells[0]] = dict(zip(header, cells, strict=True))
    return found


def check_row(row: dict[str, str], base: dict[str, str], batch: int, unit: str) -> None:
    """Every derived cell from the others."""
    ms, ratio = float(row["ms"]), float(row["ratio"])
    low, high = map(float, row["min-max"].split("-"))
    assert 0 < low <= ms <= high
    assert ratio == pytest.approx(float(row["G macs"]) / float(base["G macs"]), abs=0.02)
    time_ratio = float(row["time ratio"].split()[0])
    assert float(row["efficiency"]) == pytest.approx(ratio / time_ratio, abs=0.03)
    assert float(row[unit]) == pytest.approx(1000 * batch / ms, rel=0.15)  # medians of rounds, rounded


def test_a_network_beside_its_vanilla_twin() -> None:
    status, out, err = main("model", "--cfg", CFG, *SMALL, "--mode", "training", *CPU, "OCTAVE.ALPHA", "0.5")
    assert status == 0, err
    speeds, saved = tables(out)["training step G macs"], tables(out)["training step saved activations (MiB)"]
    assert list(speeds) == list(saved) == ["vanilla", "alpha 0.5"]
    for row in speeds.values():
        check_row(row, speeds["vanilla"], 2, "clips/s")
        assert 5 < int(row["MiB"]) < 60
    assert speeds["vanilla"]["time ratio"] == "1.00 (1.00-1.00)"
    assert 0 < float(speeds["alpha 0.5"]["G macs"]) < float(speeds["vanilla"]["G macs"])
    octave, vanilla = (float(saved[name]["saved activations (MiB)"]) for name in ("alpha 0.5", "vanilla"))
    assert float(saved["alpha 0.5"]["ratio"]) == pytest.approx(octave / vanilla, abs=0.01)
    outputs = [build.cost(build.load_config(CFG, ["OCTAVE.ALPHA", a]), 64).activations for a in ("0.5", "0")]
    assert float(saved["alpha 0.5"]["law"]) == pytest.approx(outputs[0] / outputs[1], abs=0.005)
    assert "processor time" in out


@pytest.mark.usefixtures("no_memory")
def test_several_alphas_with_naive_twins_in_both_modes(tmp_path: Path) -> None:
    flags = ("--alphas", ".25,.5,0", "--naive", "--json", str(tmp_path / "x.json"))
    status, out, err = main("model", "--cfg", CFG, *SMALL, *flags, *CPU)
    assert status == 0, err
    names = ["vanilla", "alpha 0.25", "alpha 0.25, naive", "alpha 0.5", "alpha 0.5, naive"]
    assert "never fused" in out and "MiB is -" in out
    content = json.loads((tmp_path / "x.json").read_text())
    assert [table["mode"] for table in content["tables"]] == ["inference", "training"]
    for table, title in zip(content["tables"], ("inference", "training step"), strict=True):
        rows = table["rows"]
        assert [row["name"] for row in rows] == [*names, "vanilla"]
        assert [row["kind"] for row in rows[1:5]] == ["octvideo", "naive"] * 2
        assert (table["backend"], table["dtype"], table["threads"], table["batch"]) == ("eager", "float32", 1, 2)
        printed = tables(out)[f"{title} G macs"]
        for row in rows:
            assert len(row["seconds"]) == len(row["time_ratios"]) == 2 and row["peak_memory"] is None
            assert row["macs_ratio"] == row["macs"] / rows[0]["macs"]
            assert row["efficiency"] == row["macs_ratio"] / row["time_ratio"]
            assert printed[row["name"]]["MiB"] == "-"
            check_row(printed[row["name"]], printed["vanilla"], 2, "clips/s")
        assert rows[1]["macs"] == rows[2]["macs"] < rows[0]["macs"]


@pytest.mark.usefixtures("no_memory")
def test_another_config_and_images() -> None:
    other = str(Path(CFG).with_name("c2d_tiny.yaml"))
    status, out, err = main("model", "--cfg", CFG, *SMALL, "--against", other, "--mode", "inference", *CPU)
    assert status == 0, err
    assert list(tables(out)["inference G macs"]) == ["c2d_tiny vanilla", "i3d_tiny alpha 0.25"]
    status, out, err = main("model", "--cfg", IMAGES, *SMALL, "--mode", "inference", *CPU)
    assert status == 0 and "images/s" in out, err


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param("compile", marks=[pytest.mark.slow, needs_compiler]),
        pytest.param("onnxruntime", marks=pytest.mark.slow),
        pytest.param("openvino", marks=pytest.mark.slow),
    ],
)
def test_inference_forms_beside_each_other(backend: str) -> None:
    for package in {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "openvino")}.get(
        backend, ()
    ):
        pytest.importorskip(package)
    form = ("--fuse", "--naive", "--backend", backend)
    status, out, err = main("model", "--cfg", CFG, *form, *SMALL, *CPU, "OCTAVE.ALPHA", "0.5")
    assert status == 0, err
    assert f"inference, fused, {backend}, float32; this process's processor time" in out
    rows = tables(out)["inference G macs"]
    assert list(rows) == ["vanilla", "alpha 0.5", "alpha 0.5, naive"] and len(tables(out)) == 1
    for row in rows.values():
        check_row(row, rows["vanilla"], 2, "clips/s")


def test_table_2_has_the_paper_s_latencies(monkeypatch: pytest.MonkeyPatch, no_memory: None) -> None:
    monkeypatch.setattr(benchmark_model, "TABLE_2_NETWORKS", ("resnet_tiny",))
    status, out, err = main("model", "--cfg", IMAGES, "--table2", "--fuse", "--naive", *SMALL, *CPU)
    assert status == 0, err
    speeds = {name: row for name, row in tables(out)["inference G macs"].items() if "naive" not in name}
    assert len(speeds) == 5 < len(tables(out)["inference G macs"]) == 9
    rows = next(rows for title, rows in tables(out).items() if title.startswith("Table 2"))
    assert list(rows) == list(speeds) == ["vanilla", "alpha 0.125", "alpha 0.25", "alpha 0.5", "alpha 0.75"]
    assert [row["paper's ms"] for row in rows.values()] == ["115", "116", "99", "74", "61"]
    assert [row["paper's time ratio"] for row in rows.values()] == ["1.00", "1.01", "0.86", "0.64", "0.53"]
    for name, row in rows.items():
        assert row["ms here"] == speeds[name]["ms"] and row["here"] == speeds[name]["time ratio"].split()[0]


def way(**fields: Any) -> Way:
    settings = {"mode": "inference", "backend": "eager", "fused": False, "dtype": "float32", "batch": 2, "threads": 1}
    return Way(**{**settings, "device": torch.device("cpu"), **fields})


def subject(kind: str = "octvideo", *overrides: str) -> Subject:
    return Subject("x", build.load_config(CFG, ["OCTAVE.ALPHA", "0.5", *overrides]), kind)


def test_steps_of_all_kinds_compute_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_norms(monkeypatch)
    steps = [
        InferenceStep(subject(kind), way(fused=fused)) for kind, fused in (("octvideo", False), ("octvideo", True))
    ]
    steps += [InferenceStep(subject("naive"), way(fused=True))]
    clips = steps[0].clips
    expected, *others = [step.logits(clips) for step in steps]
    assert expected.abs().mean() > 1e-3
    for logits in others:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-6)


def test_what_is_fused_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[nn.Module] = []
    monkeypatch.setattr(benchmark_model.deploy, "runner", lambda model, *args, **kwargs: given.append(model))
    for kind in ("octvideo", "naive"):
        InferenceStep(subject(kind), way(fused=True))
    assert isinstance(given[0], FusedNetwork)
    assert not isinstance(given[1], FusedNetwork) and any(isinstance(m, NaiveOctConv) for m in given[1].modules())


def test_a_training_step_trains_and_its_memory_is_forgotten() -> None:
    step = TrainingStep(subject(), way(mode="training"))
    before = step.model.get_parameter("head.fc.weight").clone()
    assert step() == 2
    assert not torch.equal(step.model.get_parameter("head.fc.weight"), before)
    assert step.optimizer.state
    step.forget()
    assert not step.optimizer.state and all(p.grad is None for p in step.model.parameters())


def test_saved_activations_are_those_of_the_dtype() -> None:
    full = TrainingStep(subject(), way(mode="training", batch=16)).saved()
    half = TrainingStep(subject("octvideo", "TRAIN.DTYPE", "bfloat16"), way(mode="training", batch=16)).saved()
    assert 0.5 < half / full < 0.9  # max-pools stay float32, and there are copies of the weights


def test_one_thread_is_timed_by_the_processor() -> None:
    assert str(way()) == "inference, eager, float32; this process's processor time"
    assert str(way(threads=2, fused=True)) == "inference, fused, eager, float32; time on the wall"
    assert str(way(device=torch.device("cuda"), dtype="float16")).endswith("eager, float16; time on the wall")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind", ["octvideo", "naive"])
def test_compiled_training_steps_are_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = TrainingStep(subject(kind, "MODEL.COMPILE", "True"), way(mode="training", backend="compile"))
    step(), step()
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert step.saved() > 0
