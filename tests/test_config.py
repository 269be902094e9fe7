import ast
from pathlib import Path

import pytest

from octvideo import build, config
from octvideo.config import ConfigError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if not p.parent.name.startswith("_"))


def write(folder: Path, text: str, name: str = "x.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build.load_config(path, overrides)
    assert str(caught.value).startswith(f"{path}: {len(caught.value.problems)} problem(s)\n  ")
    return caught.value.problems


GOOD = "{OUTPUT_DIR: out, DATA: {TRAIN_LIST: a.txt, VAL_LIST: b.txt}}"


def test_base_file_and_overrides_in_this_order(tmp_path: Path) -> None:
    write(tmp_path, "{MODEL: {NUM_CLASSES: 5, DROPOUT: 0.1}, SOLVER: {BASE_LR: 1}, SEED: 1}", "base.yaml")
    path = write(
        tmp_path, f"_BASE_: base.yaml\n{GOOD[1:-1].replace(', DATA', chr(10) + 'DATA')}\nMODEL: {{DROPOUT: 0.2}}"
    )
    cfg = build.load_config(path, ["SEED", "7", "OUTPUT_DIR", "2024", "DATA.SEPARATOR", ", "])
    assert (cfg.MODEL.NUM_CLASSES, cfg.MODEL.DROPOUT, cfg.SOLVER.BASE_LR) == (5, 0.2, 1.0)
    assert isinstance(cfg.SOLVER.BASE_LR, float)
    assert (cfg.SEED, cfg.OUTPUT_DIR, cfg.DATA.SEPARATOR) == (7, "2024", ", ")


def test_the_names_of_all_keys() -> None:
    names = config.key_names()
    assert {"SEED", "DATA.NUM_FRAMES", "SOLVER.BASE_LR"} < set(names)
    assert all(name.isupper() for name in names) and "DATA" not in names


def test_numbers_as_yaml_writes_them(tmp_path: Path) -> None:
    cfg = build.load_config(write(tmp_path, GOOD), ["SOLVER.WEIGHT_DECAY", "5e-5", "OCTAVE.ALPHA", "1"])
    assert (cfg.SOLVER.WEIGHT_DECAY, cfg.OCTAVE.ALPHA) == (5e-5, 1.0)


def test_all_problems_at_once_with_the_remedy(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
OUTPUT_DIR: out
MODEL: {NAME: i3d_r05, NUM_CLASES: 3}
DATA: {NUM_FRAMES: 4.5, TRAIN_CROP: 300, TRAIN_LIST: a, VAL_LIST: b}
SOLVER: {BASE_LR: fast}
OCTAVE: {ALPHA: 1.5, POOL: [2, 1, 1]}
""",
    )
    problems = problems_of(path, "TEST.CROP", "3", "TRAIN.EPOCHS", "0", "SEED")
    expected = [
        "unknown key MODEL.NUM_CLASES; did you mean MODEL.NUM_CLASSES?",
        "DATA.NUM_FRAMES is 4.5, of type float; allowed: an integer",
        "SOLVER.BASE_LR is 'fast', of type str; allowed: a number",
        "unknown key TEST.CROP; did you mean TEST.CROPS?",
        "override 'SEED' has no value; overrides are pairs: KEY VALUE KEY VALUE ...",
        "OCTAVE.ALPHA is 1.5; allowed: 0 to 1",
        "OCTAVE.POOL is [2, 1, 1]; allowed: [1, 2, 2], [2, 2, 2]",
        "DATA.TRAIN_CROP is 300; allowed: at most TRAIN_SHORT_SIDE's 256",
        "TRAIN.EPOCHS is 0; allowed: 1 or more",
        "SOLVER.WARMUP_EPOCHS is 34.0; allowed: below TRAIN.EPOCHS, which is 0",
    ]
    assert set(expected) < set(problems)
    name = next(p for p in problems if p.startswith("MODEL.NAME"))
    assert "is 'i3d_r05'; allowed: c2d_r50, c2d_r101, i3d_r50" in name and "did you mean 'i3d_r50'?" in name
    assert len(problems) == len(expected) + 1


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("DATA.DECODER", "pyva", "allowed: auto, pyav, decord, torchcodec (did you mean 'pyav'?)"),
        ("DATA.POLICY", "random", "allowed: strided, pyslowfast"),
        ("DEVICE", "gpu", "allowed: auto, cpu, cuda"),
        ("OCTAVE.RATIOS", "[2]", "allowed: [] or one number from 0 to 1 per stage"),
        ("OCTAVE.RATIOS", "[0.5]", "1 octave ratios [0.5] for 4 stages"),
        ("OCTAVE.ROUND_TO", "0", "allowed: 1 or more"),
        ("OCTAVE.ROUND_TO", "8.5", "allowed: an integer"),
        ("SOLVER.BASE_LR", ".inf", "SOLVER.BASE_LR is inf; allowed: finite numbers"),
        ("SOLVER.BASE_LR", "1e400", "SOLVER.BASE_LR is inf; allowed: finite numbers"),
        ("SOLVER.BASE_LR", "1_0", "SOLVER.BASE_LR is '1_0': '1_0' is not a decimal number of at most 18 digits"),
        ("SOLVER.BASE_LR", "\u0663", "SOLVER.BASE_LR is '\u0663', of type str; allowed: a number"),
        ("SOLVER.BASE_LR", "True", "SOLVER.BASE_LR is True, of type bool; allowed: a number"),
        ("SOLVER.MILESTONES", "[1, .nan]", "SOLVER.MILESTONES is [1, nan]; allowed: finite numbers"),
        ("DATA.MEAN", "[.inf, 0, 0]", "DATA.MEAN is [inf, 0, 0]; allowed: finite numbers"),
        ("DATA.MEAN", "[True, 0, 0]", "of type list; allowed: a list of numbers"),
        ("DATA.MEAN", "[[1], 0, 0]", "of type list; allowed: a list of numbers"),
        ("DATA.MEAN", "{a: 1}", "DATA.MEAN is {'a': 1}, of type dict; allowed: a list of numbers"),
        ("DATA.MEAN", "[1", "DATA.MEAN is '[1': not plain YAML"),
        ("OCTAVE.POOL", "[1.0, 2, 2]", "OCTAVE.POOL is [1.0, 2, 2]; allowed: [1, 2, 2], [2, 2, 2]"),
        ("SEED", "9" * 5000, "is not a decimal number of at most 18 digits"),
        ("SEED", "010", "SEED is '010': '010' is not a decimal number"),
        ("SEED", "1:30", "SEED is '1:30': '1:30' is not a decimal number"),
        ("TRAIN.EPOCHS", "2147483648", "TRAIN.EPOCHS is 2147483648; allowed: at most 2147483647"),
        ("SOLVER.ITERATIONS", "[2147483648]", "SOLVER.ITERATIONS is [2147483648]; allowed: at most 2147483647"),
        ("MODEL.NAME", "i3d\x1b[2J", "MODEL.NAME is 'i3d\\x1b[2J', which contains the control character '\\x1b'"),
        ("DATA.SEPARATOR", "\n", "DATA.SEPARATOR is '\\n', which contains the control character"),
        ("SEED" * 1000, "1", "unknown key SEEDSEED"),
        ("DATA.STD", "[1, 0, 1]", "allowed: numbers above 0"),
        ("DATA.TRAIN_SHORT_SIDE", "[300]", "allowed: [lowest, highest] in pixels"),
        ("TRAIN.NEW_HEAD", "True", "allowed: False unless TRAIN.INIT names a file"),
        ("TRAIN.CUTMIX", "-1", "allowed: 0 or more"),
        ("DATA.RANDAUGMENT_OPS", "-1", "allowed: 0 or more"),
        ("DATA.RANDAUGMENT_OPS", "1.5", "allowed: an integer"),
        ("DATA.RANDAUGMENT_MAGNITUDE", "11", "allowed: 0 to 10"),
        ("DATA.RANDAUGMENT_STD", ".nan", "allowed: finite numbers"),
        ("TEST.CROPS", "2", "allowed: 1, 3"),
        ("MODEL", "i3d", "MODEL is a section, not a key; it holds e.g. MODEL.NAME"),
        ("XYZ", "1", "unknown key XYZ; sections are DATA, MODEL, OCTAVE, SOLVER, TEST, TRAIN"),
        ("DATA.NUM_FRAMES", "1", "the strides of this network admit (2, 1, 1) and anything larger"),
    ],
)
def test_one_problem(tmp_path: Path, key: str, value: str, message: str) -> None:
    problems = problems_of(write(tmp_path, GOOD), key, value)
    assert any(message in problem for problem in problems), problems
    assert all("\n" not in problem and len(problem) < 1000 for problem in problems)


@pytest.mark.parametrize(
    "text,message",
    [
        ("a: [1", "not plain YAML"),
        ("!!python/object/apply:os.system ['true']", "not plain YAML"),
        ("", "not a mapping of sections"),
        ("- a", "not a mapping of sections"),
        ("_BASE_: nowhere.yaml", "_BASE_ names a file that does not exist"),
        ("_BASE_: x.yaml", "_BASE_ leads back to the same file"),
    ],
)
def test_files_that_are_not_a_config(tmp_path: Path, text: str, message: str) -> None:
    assert message in problems_of(write(tmp_path, text))[0]


def test_missing_file(tmp_path: Path) -> None:
    assert "no such file" in problems_of(tmp_path / "none.yaml")[0]


def test_check_changes_nothing() -> None:
    cfg = config.defaults()
    before = cfg.dump()
    assert config.check(
        cfg, networks=["i3d_r50"], image_networks=[], decoders=[], policies=["strided"], shorts=["loop"]
    )
    assert cfg.dump() == before


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_of_the_project_loads_and_is_short(path: Path) -> None:
    cfg = build.load_config(path)
    assert cfg.OUTPUT_DIR == f"runs/{path.parent.name}/{path.stem}"
    assert len(path.read_text().splitlines()) <= 15


def test_every_key_is_read_and_every_key_read_exists() -> None:
    keys = set(config.key_names())
    read = set()
    for path in [
        ROOT / "octvideo/build.py",
        *(ROOT / "octvideo/jobs").glob("*.py"),
        *sorted((ROOT / "tools").glob("*.py")),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                text = ast.unparse(node)
                if text.startswith("cfg.") and text.removeprefix("cfg.").replace(".", "").replace("_", "").isupper():
                    read.add(text.removeprefix("cfg."))
    sections = {key.split(".")[0] for key in keys if "." in key}
    assert read - sections == keys


def test_norms_that_read_no_batch_share_no_statistics(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, GOOD), "TRAIN.SYNC_NORM", "True", "TRAIN.FREEZE_NORM_STATS", "True")
    assert problem == "TRAIN.SYNC_NORM is True; allowed: False with TRAIN.FREEZE_NORM_STATS, whose norms read no batch"


def test_what_an_earlier_configuration_has_otherwise(tmp_path: Path) -> None:
    cfg = build.load_config(write(tmp_path, GOOD), ["OCTAVE.ALPHA", "0.25", "DATA.MEAN", "[0.5, 0.5, 0.5]"])
    assert config.changes(cfg.dump(), cfg) == []
    saved = build.load_config(write(tmp_path, GOOD), ["MODEL.NAME", "c2d_r50", "SEED", "3"]).dump()
    alpha, mean = "OCTAVE.ALPHA 0.0 (here 0.25)", "DATA.MEAN [0.45, 0.45, 0.45] (here [0.5, 0.5, 0.5])"
    seed, name = "SEED 3 (here 0)", f"MODEL.NAME 'c2d_r50' (here '{cfg.MODEL.NAME}')"
    assert sorted(config.changes(saved, cfg)) == sorted([alpha, mean, seed, name])
    assert config.changes(saved, cfg, ("OCTAVE.", "SEED")) == [seed, alpha]
    assert config.changes("OCTAVE: {GONE: 1, ALPHA: 2.5e-1}", cfg, ("OCTAVE.",)) == []  # older: the default, .5 as text


@pytest.mark.parametrize(
    ("saved", "shown"),
    [
        ('OCTAVE: {ALPHA: "\\e[2J"}', "OCTAVE.ALPHA '\\x1b[2J' (here 0.0)"),
        ("OCTAVE: {ALPHA: " + "9" * 300 + "x}", f"OCTAVE.ALPHA '{'9' * 200}...' (here 0.0)"),
        ("OCTAVE: {ALPHA: [[1], 2]}", "OCTAVE.ALPHA something else (here 0.0)"),
        ("OCTAVE: {ALPHA: {A: 1}}", "OCTAVE.ALPHA 'dict' (here 0.0)"),
        ("OCTAVE: {ALPHA: }", "OCTAVE.ALPHA 'NoneType' (here 0.0)"),
    ],
)
def test_values_of_a_strange_file_fit_on_a_line(saved: str, shown: str) -> None:
    assert config.changes(saved, config.defaults(), ("OCTAVE.ALPHA",)) == [shown]


def test_a_file_that_grows_when_read_is_not_followed() -> None:
    bomb = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    bomb += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    with pytest.raises(ConfigError, match="more than 10000 values, where an alias counts as what it repeats"):
        config.changes("\n".join([*bomb, "OCTAVE: {ALPHA: *a29}"]), config.defaults(), ("OCTAVE.ALPHA",))


@pytest.mark.parametrize(
    "saved", ["[1, 2", "- 1", "", "!!python/object:os.system {}", "[" * 5000, "&a [*a]", "A: 1\nA: 2"]
)
def test_what_is_no_configuration_is_an_error(saved: str) -> None:
    with pytest.raises(ConfigError, match="a saved configuration: 1 problem"):
        config.changes(saved, config.defaults())


@pytest.mark.parametrize(
    "value,mode",
    [
        ("True", "default"),
        ("true", "default"),
        ("False", "off"),
        ("off", "off"),
        ("default", "default"),
        ("graphs", "graphs"),
    ],
)
def test_compile_was_a_switch_once(value: str, mode: str, tmp_path: Path) -> None:
    """In a file, where YAML reads `off` as False, as an override, and in the configuration of a checkpoint."""
    file = write(tmp_path, f"{GOOD[:-1]}, MODEL: {{COMPILE: {value}}}}}")
    assert build.load_config(file).MODEL.COMPILE == mode
    cfg = build.load_config(write(tmp_path, GOOD), ["MODEL.COMPILE", value])
    assert cfg.MODEL.COMPILE == mode
    saved = f"MODEL: {{COMPILE: {value}}}"
    assert config.changes(saved, cfg, ["MODEL.COMPILE"]) == []


def test_a_mode_of_compilation_that_does_not_exist(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, GOOD), "MODEL.COMPILE", "graph")
    assert problem.startswith("MODEL.COMPILE is 'graph'; allowed: off, default, graphs") and "'graphs'?" in problem
