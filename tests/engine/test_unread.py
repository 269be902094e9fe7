import json
import math
from pathlib import Path

import torch

from octvideo.engine.distributed import World
from octvideo.engine.log import Log
from octvideo.engine.meter import Meter
from octvideo.engine.nonfinite import NonFinite
from octvideo.engine.unread import UnreadStep, UnreadSteps


def test_steps_are_read_together_and_once(tmp_path: Path) -> None:
    meter = Meter(torch.device("cpu"), World())
    log = Log(tmp_path, main=True, step=0)
    nonfinite = NonFinite(2, tmp_path, "clips/{}.mp4".format, log)
    unread = UnreadSteps(meter, nonfinite)
    for step, norm in enumerate((1.0, math.nan, 2.5, math.inf), start=1):
        loss, correct = torch.tensor(step / 2), torch.tensor(1)
        unread.add(UnreadStep(step, 0.1, torch.tensor([1, 2]), loss, correct, torch.tensor(norm), None))
    assert meter.loss.count == 0 and not (tmp_path / "metrics.jsonl").exists()
    unread.read()
    unread.read()
    log.flush()
    assert (meter.grad_norm, meter.loss.count, nonfinite.skipped) == (2.5, 4, 2)
    assert (meter.loss.value(), meter.correct.value()) == (1.0, 0.5)  # of steps 1 and 3
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"], event["skipped"]) for event in events] == [
        ("nonfinite", 2, 1),
        ("nonfinite", 4, 2),
    ]
    record = json.loads((tmp_path / "nonfinite_00000004.json").read_text())
    assert record == {
        "step": 4,
        "lr": 0.1,
        "scale": 1.0,
        "loss": [2.0],
        "grad_norm": "inf",
        "paths": ["clips/1.mp4", "clips/2.mp4"],
    }


def test_the_scale_of_a_skipped_step_is_read_with_it(tmp_path: Path) -> None:
    log = Log(tmp_path, main=True, step=0)
    nonfinite = NonFinite(0, tmp_path, str, log)
    unread = UnreadSteps(Meter(torch.device("cpu"), World()), nonfinite)
    scale, norm = torch.tensor(1024.0), torch.tensor(math.inf)
    unread.add(UnreadStep(7, 0.1, torch.tensor([0]), torch.tensor(1.5), torch.tensor(0), norm, scale))
    unread.read()
    log.flush()
    (event,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (event["event"], event["step"], event["scale"]) == ("overflow", 7, 1024.0)
