import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from octvideo.engine.log import Log
from octvideo.engine.nonfinite import NonFinite, NonFiniteError, RunningStatistics


def test_overflows_of_a_scaler_are_events_and_do_not_count(tmp_path: Path) -> None:
    log = Log(tmp_path, main=True, step=0)
    nonfinite = NonFinite(0, tmp_path, str, log)
    nonfinite.report(3, lr=0.1, loss=1.5, grad_norm=math.inf, videos=[1, 2], scale=1024.0)
    log.flush()
    assert nonfinite.skipped == 0 and not list(tmp_path.glob("nonfinite_*"))
    (event,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (event["event"], event["step"], event["scale"]) == ("overflow", 3, 1024.0)
    with pytest.raises(NonFiniteError, match="step 4 "):  # the scale is 1, so it is not the reason
        nonfinite.report(4, lr=0.1, loss=1.5, grad_norm=math.inf, videos=[1, 2], scale=1.0)
    with pytest.raises(NonFiniteError, match="step 5 "):  # the loss itself
        nonfinite.report(5, lr=0.1, loss=math.nan, grad_norm=math.inf, videos=[1, 2], scale=1024.0)


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
