import contextlib
import io
from pathlib import Path

import pytest

from octvideo import build
from octvideo.analysis.roofline import CARDS, Card, Roofline, step_roofline
from tools import analyze

ROOT = Path(__file__).parents[2]
CFG = str(ROOT / "configs/motion/oct_i3d_tiny.yaml")


def say(*words: str, batch: str = "4") -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert analyze.main(["roofline", "--cfg", CFG, "--batch", batch, *words]) == 0
    return out.getvalue()


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells}


def model(alpha: str, card: Card, *, training: bool, round_to: str = "1", **form: bool) -> tuple[Roofline, int]:
    cfg = build.load_config(CFG, ["OCTAVE.ALPHA", alpha, "OCTAVE.ROUND_TO", round_to])
    size = build.clip_size(cfg, cfg.DATA.TRAIN_CROP)
    found = step_roofline(build.network(cfg), size, batch=4, card=card, training=training, **form)
    return found, build.cost(cfg, cfg.DATA.TRAIN_CROP).macs.total


@pytest.mark.parametrize(
    "words,card,training,form",
    [
        (["--card", "H200"], CARDS[1], True, {}),
        (["--measured", "--mode", "inference", "--form", "joint"], CARDS[2], False, {"joint": True}),
    ],
)
def test_the_table_is_the_model_s(words: list[str], card: Card, training: bool, form: dict[str, bool]) -> None:
    text = say(*words, "--alphas", ".1,.5")
    found = rows(text)
    names = ["model", "vanilla", "alpha 0.1", "alpha 0.5", "alpha 0.1, ROUND_TO 8", "alpha 0.5, ROUND_TO 8"]
    assert list(found) == names
    assert "A model, not a measurement" in text
    vanilla, vanilla_macs = model("0.0", card, training=training, **form)
    octave, macs = model("0.1", card, training=training, round_to="8", **form)
    ratio, times = macs / vanilla_macs, octave.seconds / vanilla.seconds
    assert found["alpha 0.1, ROUND_TO 8"] == [
        f"{macs / 1e9:.3f}",
        f"{ratio:.3f}",
        f"{octave.flops / 1e12:.3f}",
        f"{octave.bytes / 1e9:.2f}",
        f"{1e3 * octave.seconds:.2f}",
        f"{100 * octave.memory_bound:.0f} %",
        f"{times:.3f}",
        f"{ratio / times:.2f}",
    ]
    assert found["vanilla"][-1] == "1.00"


def test_the_layers_and_a_card_that_is_described() -> None:
    rates = ["--card", "A100", "--flops", "312e12", "--bandwidth", "2.0e12"]
    text = say(*rates, "--per-layer", "--alphas", ".5", "OCTAVE.ALPHA", "0.25")
    assert "A100, nominal 312 TFLOP/s and 2 TB/s" in text
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| stages.res2.0.conv2 ")]
    cells = [[cell.strip() for cell in line] for line in lines]
    expected, _ = model("0.25", Card("A100", 312e12, 2.0e12), training=True)
    layers = [layer for layer in expected.layers if layer.name == "stages.res2.0.conv2"]
    assert [row[1:3] for row in cells] == [["OctConv3d", phase] for phase in ("cast", "forward", "backward")]
    for row, layer in zip(cells, layers, strict=True):
        seconds = f"{1e6 * layer.seconds:.1f}"
        assert row[3:] == [f"{layer.flops / 1e9:.2f}", f"{layer.bytes / 1e6:.2f}", seconds, layer.bound]


@pytest.mark.parametrize(
    "words,parts",
    [
        (["--card", "b200"], ["b200", "H100, H200", "--flops", "--bandwidth"]),
        (["--card", "b200", "--flops", "2e15"], ["--flops and --bandwidth"]),
        (["OCTAVE.ALPA", "0.1"], ["OCTAVE.ALPA"]),
    ],
)
def test_wrong_requests_are_one_message(words: list[str], parts: list[str]) -> None:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        assert analyze.main(["roofline", "--cfg", CFG, "--batch", "4", *words]) == 2
    assert err.getvalue().startswith("error: ") and all(part in err.getvalue() for part in parts)


@pytest.mark.parametrize(
    "option,value",
    [
        ("--batch", "0"),
        ("--batch", "x"),
        ("--flops", "-1"),
        ("--bandwidth", "inf"),
        ("--alphas", ".1,2"),
        ("--alphas", "0"),
    ],
)
def test_values_out_of_range_are_refused(option: str, value: str) -> None:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit, match="2"):
        analyze.main(["roofline", "--cfg", CFG, "--batch", "4", option, value])
    assert f"argument {option}" in err.getvalue() and repr(value) in err.getvalue()
