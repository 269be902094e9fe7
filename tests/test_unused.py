from pathlib import Path

import pytest

from octvideo import build, config, unused

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if not p.parent.name.startswith("_"))
VIDEO = ROOT / "configs/motion/i3d_tiny.yaml"
IMAGE = ROOT / "configs/stills/resnet_tiny.yaml"

EXPECTED = {
    name: ["TRAIN.EPOCHS 118 has no effect: SOLVER.ITERATIONS has the length of the run"]
    for name in ("i3d_r50_8x8_in1k_300k", "oct_i3d_r50_8x8_a0.1_in1k_300k")
}


def lines(path: Path, *overrides: str) -> list[str]:
    return build.unused(build.load_config(path, overrides))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_configs_of_the_project(path: Path) -> None:
    assert lines(path) == EXPECTED.get(path.stem, [])


STEPS = ("SOLVER.SCHEDULE", "steps", "SOLVER.MILESTONES", "[5]")
ITERATIONS = ("SOLVER.SCHEDULE", "iterations", "SOLVER.ITERATIONS", "[5]")


@pytest.mark.parametrize(
    ("path", "overrides", "expected"),
    [
        (VIDEO, ("SOLVER.MILESTONES", "[5, 6]"), "SOLVER.MILESTONES [5, 6] has no effect: SOLVER.SCHEDULE is cosine"),
        (
            VIDEO,
            (*ITERATIONS, "SOLVER.MILESTONES", "[5]"),
            "SOLVER.MILESTONES [5] has no effect: SOLVER.SCHEDULE is iter",
        ),
        (VIDEO, ITERATIONS, "TRAIN.EPOCHS 30 has no effect: SOLVER.ITERATIONS has the length of the run"),
        (
            VIDEO,
            ("SOLVER.WARMUP_EPOCHS", "0", "SOLVER.WARMUP_LR", "0.5"),
            "SOLVER.WARMUP_LR 0.5 has no effect: SOLVER.WARM",
        ),
        (VIDEO, ("DATA.RANDAUGMENT_STD", "1"), "DATA.RANDAUGMENT_STD 1.0 has no effect: DATA.RANDAUGMENT_OPS is 0"),
        (
            VIDEO,
            ("DATA.RANDAUGMENT_MAGNITUDE", "1", "DATA.RANDAUGMENT_STD", "1"),
            "DATA.RANDAUGMENT_MAGNITUDE 1.0, DATA.RANDAUGMENT_STD 1.0 have no effect: DATA.RANDAUGMENT_OPS is 0",
        ),
        (
            VIDEO,
            ("OCTAVE.POOL", "[2, 2, 2]"),
            "OCTAVE.POOL [2, 2, 2] has no effect: no stage has low-frequency channels",
        ),
        (VIDEO, ("OCTAVE.ROUND_TO", "8"), "OCTAVE.ROUND_TO 8 has no effect: no stage has low-frequency channels"),
        (
            VIDEO,
            ("OCTAVE.ALPHA", "0.5", "OCTAVE.RATIOS", "[0.5, 0.5, 0.5, 0]"),
            "OCTAVE.ALPHA 0.5 has no effect: OCTAVE.RATIOS has the alpha of each stage",
        ),
        (
            VIDEO,
            ("MODEL.NONLOCAL_FORM", "dot_product"),
            "MODEL.NONLOCAL_FORM 'dot_product' has no effect: i3d_tiny has no",
        ),
        (VIDEO, ("DATA.INTERPOLATION", "bicubic"), "DATA.INTERPOLATION 'bicubic' has no effect: i3d_tiny takes videos"),
        (VIDEO, ("DATA.TRAIN_AREA", "[0.5, 1]"), "DATA.TRAIN_AREA [0.5, 1] has no effect: i3d_tiny takes videos"),
        (IMAGE, ("DATA.NUM_FRAMES", "4"), "DATA.NUM_FRAMES 4 has no effect: resnet_tiny takes images"),
        (IMAGE, ("DATA.DECODER", "pyav"), "DATA.DECODER 'pyav' has no effect: resnet_tiny takes images"),
        (IMAGE, ("DATA.POLICY", "pyslowfast"), "DATA.POLICY 'pyslowfast' has no effect: resnet_tiny takes images"),
        (IMAGE, ("DATA.SHORT", "clamp"), "DATA.SHORT 'clamp' has no effect: resnet_tiny takes images"),
        (
            VIDEO,
            ("DATA.NUM_WORKERS", "0", "DATA.TIMEOUT_S", "9"),
            "DATA.TIMEOUT_S 9 has no effect: DATA.NUM_WORKERS is 0",
        ),
        (VIDEO, ("DEVICE", "cuda", "NUM_THREADS", "2"), "NUM_THREADS 2 has no effect: DEVICE is cuda"),
        (
            VIDEO,
            ("TRAIN.RESUME", "x.pt", "TRAIN.INIT", "y.pt"),
            "TRAIN.INIT 'y.pt' has no effect: the weights are those of",
        ),
        (
            VIDEO,
            ("TRAIN.RESUME", "x.pt", "TRAIN.INIT", "y.pt", "TRAIN.NEW_HEAD", "True"),
            "TRAIN.INIT 'y.pt', TRAIN.NEW_HEAD True have no effect: the weights are those of TRAIN.RESUME",
        ),
        (VIDEO, ("TEST.ENABLE", "False", "TEST.CLIPS", "3"), "TEST.CLIPS 3 has no effect: TEST.ENABLE is False"),
        (
            VIDEO,
            ("TRAIN.VAL_PERIOD", "0", "DATA.TEST_LIST", "x"),
            "DATA.VAL_LIST 'data/motion/val.txt' has no effect: only",
        ),
    ],
)
def test_a_key_without_effect_is_named_with_the_reason(path: Path, overrides: tuple[str, ...], expected: str) -> None:
    found = lines(path, *overrides)
    assert any(line.startswith(expected) for line in found), found


@pytest.mark.parametrize(
    ("path", "overrides"),
    [
        (VIDEO, STEPS),
        (VIDEO, (*STEPS, "SOLVER.WARMUP_LR", "0.5")),
        (VIDEO, ("DATA.RANDAUGMENT_OPS", "1", "DATA.RANDAUGMENT_STD", "1")),
        (VIDEO, ("OCTAVE.ALPHA", "0.5", "OCTAVE.POOL", "[2, 2, 2]", "OCTAVE.ROUND_TO", "8")),
        (VIDEO, ("OCTAVE.RATIOS", "[0.5, 0.5, 0.5, 0]", "OCTAVE.ROUND_TO", "8")),
        (VIDEO, ("MODEL.NAME", "i3d_nl_r50", "MODEL.NONLOCAL_FORM", "dot_product")),
        (VIDEO, ("TRAIN.RESUME", "auto", "TRAIN.INIT", "y.pt", "TRAIN.NEW_HEAD", "True")),
        (VIDEO, ("DATA.TEST_LIST", "x", "TEST.CLIPS", "3")),
        (IMAGE, ("DATA.TRAIN_AREA", "[0.5, 1]", "DATA.INTERPOLATION", "bicubic", "TEST.ENABLE", "False")),
    ],
)
def test_keys_that_are_read_are_not_named(path: Path, overrides: tuple[str, ...]) -> None:
    assert lines(path, *overrides) == []


def test_what_a_factory_does_not_read() -> None:
    cfg = config.defaults()
    cfg.MODEL.FACTORY, cfg.MODEL.NAME, cfg.MODEL.DROPOUT, cfg.OUTPUT_DIR = "a:b", "c2d_r50", 0.1, "x"
    line = "MODEL.NAME 'c2d_r50', MODEL.DROPOUT 0.1 have no effect: MODEL.FACTORY builds the network"
    assert unused.unused(cfg, images=False, absent={}) == [line]


def test_a_test_alone_reads_nothing_of_the_training() -> None:
    (line,) = lines(VIDEO, "TRAIN.ENABLE", "False")
    assert line.startswith("TRAIN.BATCH_SIZE 16, TRAIN.EPOCHS 30, ") and line.endswith(": TRAIN.ENABLE is False")
    assert "TEST" not in line.replace("DATA.TEST", "") and "SOLVER.BASE_BATCH 32" in line


def test_every_key_that_is_named_exists() -> None:
    cfg = config.defaults()
    for images in (True, False):
        rows = [*unused._of_the_mode(cfg, images), *unused._of_the_network(cfg, images), *unused._of_the_solver(cfg)]
        assert {key for _, keys, _ in rows for key in keys} <= set(config.key_names())
