"""The modelled limits in the report are those of analysis.roofline for the same networks."""

import pytest
import torch

from octvideo import build
from octvideo.analysis.roofline import card_named, efficiency, step_roofline
from octvideo.benchmark.gpu_limit import FORMS, emit_limits
from octvideo.benchmark.gpu_networks import TOY_SIZE, network_config


def test_each_form_has_the_model_s_efficiency() -> None:
    records: list[dict] = []
    emit_limits(records.append, toy=True)
    assert [(record["mode"], record["backend"], record["alpha"]) for record in records] == [
        (*form, 0.25) for form in FORMS
    ]
    card = card_named("H100")
    assert card is not None
    modelled, macs = [], []
    for alpha in (0.0, 0.25):
        cfg = network_config(TOY_SIZE, alpha)
        options = {"batch": TOY_SIZE.batch, "card": card, "training": True, "fused": False}
        modelled.append(step_roofline(build.network(cfg), (3, 8, 32, 32), **options))
        macs.append(build.cost(cfg, 32).macs.total)
    assert records[1]["efficiency"] == efficiency(*modelled, macs[1] / macs[0])
    assert records[1]["seconds"] == modelled[1].seconds


def test_a_card_without_known_rates_has_no_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA L4")
    emit_limits(pytest.fail, toy=False)
    assert "NVIDIA L4: the model has no peak rate" in capsys.readouterr().out
