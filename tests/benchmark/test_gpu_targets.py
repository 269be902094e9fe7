"""Targets of made-up records, computed by hand."""

import pytest

from octvideo.benchmark.gpu_targets import Target, targets

from .records import complete, network, part, report


def by_name(found: list[Target]) -> dict[str, Target]:
    named = {target.what: target for target in found}
    assert len(named) == len(found)
    return named


def test_each_target_of_a_report() -> None:
    found = by_name(targets(complete()))
    expected = {
        # multiply-adds .875; fastest forms: compiled in 75 ms over compiled in 80 ms
        "training efficiency at alpha 0.25, each network in its fastest form": (0.875 / (75 / 80), "met"),
        "training efficiency at alpha 0.5, each network in its fastest form": (0.75 / (100 / 80), "missed"),
        "training efficiency at alpha 0.125, each network in its fastest form": (None, "not measured"),
        "inference efficiency at alpha 0.125, each network in its fastest form": (0.9375 / (25 / 20), "missed"),
        "training speed at alpha 0.25 relative to the naive form, each in its fastest form": (99 / 75, "met"),
        "vanilla training speed relative to pytorchvideo's network, eager": (1.04, "met"),
        "vanilla training speed relative to pytorchvideo's network, compiled": (None, "not measured"),
        "synchronisations per training step, most of all forms": (2.0, "missed"),
        "kernels per training step at alpha 0.25 relative to vanilla, eager": (1.5, "met"),
        "operator calls per training step at alpha 0.25 relative to vanilla, eager": (1.8, "missed"),
        "kernels per training step at alpha 0.25 relative to vanilla, compiled": (1.1, "met"),
        "seconds of the first compiled training step at alpha 0.25": (45.0, "met"),
        "CUDA tests that failed": (1.0, "missed"),
        "top-1 of oct_i3d_tiny on the motion data, %": (100.0, "met"),
        "top-1 of i3d_tiny on the motion data, %": (None, "not measured"),
    }
    for what, (measured, verdict) in expected.items():
        assert found[what].verdict == verdict, what
        assert found[what].measured == (measured if measured is None else pytest.approx(measured)), what
    assert found["training efficiency at alpha 0.25, each network in its fastest form"].note == "compiled / compiled"
    assert found["training efficiency at alpha 0.5, each network in its fastest form"].note == "eager / compiled"


def test_an_empty_report_has_every_target_and_no_measurement() -> None:
    found = targets(report())
    assert {target.what for target in found} == {target.what for target in targets(complete())}
    assert {target.verdict for target in found} == {"not measured"}


def test_the_fastest_form_may_be_without_kernels_and_slowfast_is_left_out() -> None:
    records = [
        network("vanilla", "inference", "eager", 10.0, fused=True),
        network("alpha 0.5", "inference", "eager", 9.0, fused=True),
        network("alpha 0.5, kernels off", "inference", "eager", 8.0, fused=True),
    ]
    slowfast = part("slowfast", [network("vanilla", "inference", "eager", 1.0)])
    what = "inference efficiency at alpha 0.5, each network in its fastest form"
    target = by_name(targets(report(part("inference_eager", records), slowfast)))[what]
    assert target.measured == pytest.approx(0.75 / 0.8)
    assert target.note == "eager, fused, kernels off / eager, fused"
