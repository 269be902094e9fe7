"""What the GPU suite measures of a network, and how a failure of one network is kept apart."""

import contextlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from octvideo import build
from octvideo.benchmark import gpu_networks, peers
from octvideo.benchmark.gpu_networks import (
    I3D_SIZE,
    PLANS,
    SLOWFAST_SIZE,
    TOY_SIZE,
    Entry,
    measure_part,
    network_config,
)
from octvideo.benchmark.speed import BenchmarkError
from tests.devices import CUDA_ONLY


def test_each_plan_begins_with_vanilla_and_compares_with_earlier_entries() -> None:
    for name, lists in PLANS.items():
        for entries in lists:
            labels = [entry.label for entry in entries]
            assert labels[0] == "vanilla" and len(set(labels)) == len(labels), name
            assert len({(entry.mode, entry.backend, entry.fused) for entry in entries}) == 1, name
            for number, entry in enumerate(entries[1:], 1):
                assert set(entry.beside) <= set(labels[:number]), (name, entry)
    first = [entry.label for entry in PLANS["training_eager"][0]]
    assert first[:4] == ["vanilla", "alpha 0.25", "alpha 0.5", "alpha 0.125"]


def test_the_networks_are_those_of_the_targets() -> None:
    cfg = network_config(I3D_SIZE, 0.25)
    assert (build.network_name(cfg), build.clip_size(cfg, cfg.DATA.TRAIN_CROP)) == ("i3d_r50", (3, 8, 224, 224))
    assert (cfg.OCTAVE.ALPHA, cfg.OCTAVE.ROUND_TO, cfg.TRAIN.DTYPE, I3D_SIZE.batch) == (0.25, 8, "bfloat16", 16)
    assert build.memory_format(cfg) == torch.channels_last_3d
    vanilla, octave = (build.cost(network_config(I3D_SIZE, alpha), 224).macs.total for alpha in (0.0, 0.25))
    assert 0.7 < octave / vanilla < 0.85  # which pytorchvideo's network has too: see test_peers
    slowfast = network_config(SLOWFAST_SIZE, 0.25)
    assert build.network_name(slowfast) == "slowfast_4x16_r50" and SLOWFAST_SIZE.batch == 8


def test_one_network_s_failure_is_its_record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = gpu_networks._measure

    def failing(entry: Entry, *args: Any) -> dict[str, Any]:
        if entry.kind == "naive":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return measure(entry, *args)

    monkeypatch.setattr(gpu_networks, "_measure", failing)
    records: list[dict[str, Any]] = []
    with pytest.raises(BenchmarkError, match="1 of the networks failed: alpha 0.25, naive: OutOfMemoryError: CUDA"):
        measure_part("inference_eager", records.append, toy=True)
    by_label = {(record["label"], record["fused"]): record for record in records}
    failed = by_label["alpha 0.25, naive", True]
    assert failed["error"] == "OutOfMemoryError: CUDA out of memory." and "in failing" in failed["trace"]
    measured = [record for record in records if "seconds" in record]
    assert {"vanilla", "alpha 0.25", "alpha 0.25, kernels off"} == {record["label"] for record in measured}
    assert len(measured) == 5  # the first three fused, two as built
    assert "OutOfMemoryError" in capsys.readouterr().out


def test_a_missing_pytorchvideo_is_printed_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "is_installed", lambda *packages: False)
    monkeypatch.setitem(PLANS, "training_eager", [[Entry("training", "eager", kind="pytorchvideo")]])
    monkeypatch.setattr(gpu_networks, "_is_in_toy", lambda entry: True)
    measure_part("training_eager", pytest.fail, toy=True)
    assert "pytorchvideo: not measured, pytorchvideo and torchvision are not installed" in capsys.readouterr().out


def test_warnings_about_synchronisation_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with gpu_networks.sync_warnings() as found:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
    assert len(found) == 2 and modes == ["warn", 0]


class FakeEvent:
    """The device's clock moves by 250 ms with each event that is recorded."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now += 250.0
        self.at = FakeEvent.now

    def elapsed_time(self, other: Any) -> float:
        return other.at - self.at


def test_time_on_a_gpu_is_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    seconds, host = gpu_networks._timed(lambda: calls.append("step"), 5, torch.device("cuda"))
    assert seconds == pytest.approx(0.05) and 0 <= host < 0.05
    assert calls == ["synchronize", *["step"] * 5, "synchronize"]


def test_kernels_launches_and_operators_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    host, device = DeviceType.CPU, DeviceType.CUDA
    events = [
        *((name, host) for name in ("aten::conv3d", "aten::cudnn_convolution", "cudaLaunchKernel", "cuLaunchKernelEx")),
        *((name, host) for name in ("cudaGraphLaunch", "cudaMemcpyAsync", "Optimizer.step#SGD.step")),
        *((name, device) for name in ("void kernel<float>", "triton_poi_fused", "Memcpy HtoD", "Memset (Device)")),
        ("Optimizer.step#SGD.step", device),  # an annotation, which the profiler shows on the device too
    ]
    recorded = [
        SimpleNamespace(name=name, device_type=kind, is_user_annotation=name.startswith("Optimizer"))
        for name, kind in events
    ]
    profiler = SimpleNamespace(events=lambda: recorded)
    monkeypatch.setattr(gpu_networks, "profile", lambda activities: contextlib.nullcontext(profiler))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    run = object.__new__(gpu_networks._Run)
    run.entry, run.device, run.step = Entry("training", "eager"), torch.device("cuda"), lambda: None
    assert run.counts() == {"kernels_run": 2, "launches": 3, "operators": 2}


@pytest.mark.parametrize("device", CUDA_ONLY)
def test_counts_of_a_step_on_a_gpu(device: str) -> None:
    size = gpu_networks.Size(TOY_SIZE.config, 2, rounds=2, seconds=0.01, warmup=2, device=device)
    runs = {alpha: gpu_networks._Run(Entry("training", "eager", alpha), size) for alpha in (0.0, 0.25)}
    counts = {}
    for alpha, run in runs.items():
        assert run.first_step() > 0 and run.steps >= 1
        device_s, host_s = run.round()
        assert 0 < device_s < 1 and 0 < host_s < 1
        counts[alpha] = run.counts()
        assert 100 < counts[alpha]["kernels_run"] < 5000 and counts[alpha]["launches"] > 100
        assert run.peak_memory() > 2**20
        assert run.syncs() == 0
    assert counts[0.0]["kernels_run"] < counts[0.25]["kernels_run"]
    with gpu_networks.sync_warnings() as found:
        torch.ones((), device=device).item()
    assert len(found) == 1
