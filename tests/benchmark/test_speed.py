import os
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from octvideo.benchmark import speed
from octvideo.benchmark.speed import BenchmarkError, Timed, in_turn, peak_memory, saved_bytes, spread, time_ratios

CPU = torch.device("cpu")
linux = pytest.mark.skipif(not speed.CLEAR_REFS.exists(), reason="peaks are read from Linux's /proc")


def test_entries_are_run_in_turn_after_one_run_that_counts_nothing() -> None:
    order: list[str] = []
    entries = [Timed(name, lambda name=name: order.append(name) or 8) for name in "ab"]
    in_turn(entries, rounds=2)
    assert "".join(order) == "ababab"
    assert [len(entry.clips_per_s) for entry in entries] == [2, 2]
    assert all(speed > 0 for entry in entries for speed in entry.clips_per_s)


def test_times_are_the_clock_s_and_ratios_go_round_by_round() -> None:
    ticks = iter([0.0, 1.0, 1.0, 3.0, 10.0, 14.0, 20.0, 26.0])
    entries = [Timed(name, lambda: 4, lambda: next(ticks)) for name in "ab"]
    in_turn(entries, rounds=2)
    assert [entry.seconds for entry in entries] == [[1.0, 4.0], [2.0, 6.0]]
    assert [entry.clips_per_s for entry in entries] == [[4.0, 1.0], [2.0, 4 / 6]]
    assert time_ratios(entries[1], entries[0]) == [2.0, 1.5]
    assert entries[0].cells() == ["2.50", "1.00-4.00"]
    assert spread([3.14159, 1.0], 1) == "1.0-3.1"


def test_saved_bytes_are_what_backward_needs() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    x = torch.randn(32, 8)
    # the input, once for two layers that read it; ReLU's output, which the next layer reads too; no weights
    assert saved_bytes(lambda: model(x).sum(), model) == 4 * 32 * (8 + 16)
    assert saved_bytes(lambda: (model(x) + model[2](model[1](model[0](x)))).sum(), model) == 4 * 32 * (8 + 2 * 16)
    view = x[:16]  # of a storage that is kept whole
    assert saved_bytes(lambda: model(view).sum(), model) == 4 * (32 * 8 + 16 * 16)


def test_recomputed_activations_are_not_saved() -> None:
    layers = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
    x = torch.randn(32, 8, requires_grad=True)
    whole = saved_bytes(lambda: layers(x).sum(), layers)
    assert saved_bytes(lambda: checkpoint(layers, x, use_reentrant=False).sum(), layers) == 4 * 32 * 8 < whole


@linux
def test_the_peak_of_a_step_in_a_fresh_process() -> None:
    growth = peak_memory(partial(partial, torch.ones, 2**24), CPU)
    assert growth is not None and 0.98 < growth / 2**26 < 1.1


@linux
def test_a_killed_process_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(BenchmarkError, match="was killed"):
        peak_memory(partial(os._exit, 9), CPU)  # type: ignore[arg-type]


def test_no_peak_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(speed, "CLEAR_REFS", tmp_path / "none")
    assert peak_memory(partial(partial, torch.ones, 1), CPU) is None


@pytest.mark.cuda
def test_the_peak_on_a_gpu_is_what_is_allocated() -> None:
    growth = peak_memory(lambda: partial(torch.ones, 2**24, device="cuda"), torch.device("cuda"))
    assert growth == 2**26
