"""A report of the GPU suite with made-up figures."""

from typing import Any


def network(label: str, mode: str, backend: str, ms: float, **fields: Any) -> dict[str, Any]:
    """A record whose three rounds are 1 % apart."""
    alpha = float(label.split()[1].strip(",")) if label.startswith("alpha") else 0.0
    kind = "naive" if "naive" in label else "pytorchvideo" if label == "pytorchvideo" else "octvideo"
    record = {
        "label": label,
        "mode": mode,
        "backend": backend,
        "alpha": alpha,
        "kind": kind,
        "fused": False,
        "search": False,
    }
    record |= {
        "kernels": "kernels off" not in label,
        "search": False,
        "batch": 16,
        "macs": round(1e9 * (1 - 0.5 * alpha)),
    }
    seconds = [ms / 1000 * factor for factor in (0.99, 1.0, 1.01)]
    record |= {"seconds": seconds, "host_seconds": seconds, "clips_per_s": 16000 / ms, "first_step_s": 12.0}
    record |= {"time_ratios": {}, "peak_memory": 2**30, "kernels_run": 1000, "launches": 1001, "operators": 5000}
    return {**record, "syncs": 0.0, **fields}


def part(name: str, records: list[dict[str, Any]], status: str = "done", tail: tuple[str, ...] = ()) -> dict[str, Any]:
    conditions = [{"when": "start", "load": 0.5, "clocks.sm": "1980 MHz"}]
    outcome = {"name": name, "status": status, "seconds": 10.0, "limit": 60.0, "exit_status": 0, "tail": list(tail)}
    return {**outcome, "records": records, "conditions": conditions}


def report(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"toy": False, "budget_s": 480.0, "seconds": 300.0, "started": "2026-01-01 00:00:00", "parts": list(parts)}


def complete() -> dict[str, Any]:
    """Two forms in training, one in inference; what they say of the targets is in test_gpu_targets."""
    over = {"time_ratios": {"vanilla": [0.8, 0.85, 0.9]}}
    eager = [
        network("vanilla", "training", "eager", 100.0),
        network("alpha 0.25", "training", "eager", 90.0, kernels_run=1500, operators=9000, **over),
        network("alpha 0.25, naive", "training", "eager", 99.0),
        network("pytorchvideo", "training", "eager", 104.0, time_ratios={"vanilla": [1.03, 1.04, 1.05]}),
        network("alpha 0.5", "training", "eager", 100.0, syncs=2.0),
    ]
    compiled = [
        network("vanilla", "training", "compiled", 80.0),
        network("alpha 0.25", "training", "compiled", 75.0, kernels_run=1100, first_step_s=45.0),
    ]
    inference = [
        network("vanilla", "inference", "compiled", 20.0, fused=True),
        network("alpha 0.125", "inference", "compiled", 25.0, fused=True),
    ]
    tests = [
        {"test": "tests/a.py::b", "outcome": "PASSED"},
        {"test": "tests/a.py::c", "outcome": "FAILED"},
        {"test": "tests/a.py::c", "outcome": "FAILED", "message": "assert 1 == 2"},
        {"output": "    assert 1 == 2"},
    ]
    demo = {"videos": 128, "epochs": 30, "seconds": 40.0, "train_clips_per_s": 900.0, "test_clips_per_s": 2000.0}
    limit = {"mode": "training", "backend": "eager", "alpha": 0.25, "seconds": 0.05, "efficiency": 0.97}
    return report(
        part("machine", [{"card": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "triton": None}]),
        part("tests", tests),
        part("training_eager", eager),
        part("training_compiled", compiled, "cut", ("compiling", "still ```compiling")),
        part(
            "inference_compiled", [*inference, {"label": "alpha 0.5", "backend": "compiled", "error": "out of memory"}]
        ),
        part("limit", [limit]),
        part("motion", [{"network": "oct_i3d_tiny", "top1": 100.0, **demo}]),
        part("slowfast", [network("vanilla", "training", "eager", 1.0)]),
    )
