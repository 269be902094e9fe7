import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from octvideo.engine.log import Log
from octvideo.engine.nonfinite import NonFinite, NonFiniteError, RunningStatistics


class Meter:
    def __init__(self) -> None:
        self.grad_norm, self.left_out = 0.0, 0

    def leave_out(self, clips: int) -> None:
        self.left_out += clips


def added(nonfinite: NonFinite, step: int, loss: float, grad_norm: float, scale: Tensor | None = None) -> None:
    numbers = {"loss": torch.tensor(loss), "grad_norm": torch.tensor(grad_norm)}
    nonfinite.add(step, lr=0.1, videos=torch.tensor([1, 2]), **numbers, scale=scale)


def test_overflows_of_a_scaler_are_events_and_do_not_count(tmp_path: Path) -> None:
    log, meter = Log(tmp_path, main=True, step=0), Meter()
    nonfinite = NonFinite(0, tmp_path, str, log)
    added(nonfinite, 3, 1.5, math.inf, torch.tensor(1024.0))
    assert not (tmp_path / "metrics.jsonl").exists()  # nothing is read yet
    nonfinite.read(meter)
    assert nonfinite.skipped == 0 and meter.left_out == 2 and not list(tmp_path.glob("nonfinite_*"))
    (event,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (event["event"], event["step"], event["scale"]) == ("overflow", 3, 1024.0)
    added(nonfinite, 4, 1.5, math.inf, torch.tensor(1.0))
    with pytest.raises(NonFiniteError, match="step 4 "):  # the scale is 1, so it is not the reason
        nonfinite.read(meter)
    added(nonfinite, 5, math.nan, math.inf, torch.tensor(1024.0))
    with pytest.raises(NonFiniteError, match="step 5 "):  # the loss itself
        nonfinite.read(meter)


def test_steps_are_read_together_and_once(tmp_path: Path) -> None:
    log, meter = Log(tmp_path, main=True, step=0), Meter()
    nonfinite = NonFinite(2, tmp_path, "clips/{}.mp4".format, log)
    for step, norm in enumerate((1.0, math.nan, 2.5, math.inf), start=1):
        added(nonfinite, step, 0.5, norm)
    nonfinite.read(meter)
    nonfinite.read(meter)
    assert (meter.grad_norm, meter.left_out, nonfinite.skipped) == (2.5, 4, 2)
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(event["step"], event["skipped"]) for event in events] == [(2, 1), (4, 2)]
    record = json.loads((tmp_path / "nonfinite_00000004.json").read_text())
    assert record["grad_norm"] == "inf" and record["paths"] == ["clips/1.mp4", "clips/2.mp4"]


def network() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    net.register_buffer("table", torch.arange(3.0), persistent=False)
    return net


@pytest.mark.parametrize("finite", [True, False])
def test_running_statistics_are_restored_after_a_skipped_step(finite: bool) -> None:
    torch.manual_seed(0)
    net = network()
    statistics = RunningStatistics(net)
    net(torch.randn(5, 3, 4, 4))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    statistics.save()
    net(torch.full((5, 3, 4, 4), 2.0 if finite else math.nan))
    after = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.table.add_(1)  # not persistent: no statistic
    statistics.restore_unless(torch.tensor(finite))
    expected = after if finite else before
    for name, buffer in net.named_buffers():
        if name == "table":
            assert buffer.tolist() == [1.0, 2.0, 3.0]
        else:
            assert torch.equal(buffer, expected[name]), name
    assert not torch.equal(before["1.running_mean"], after["1.running_mean"])
    assert int(net[1].num_batches_tracked) == (2 if finite else 1)


def test_a_network_without_statistics() -> None:
    statistics = RunningStatistics(nn.Linear(2, 2))
    statistics.save()
    statistics.restore_unless(torch.tensor(False))
