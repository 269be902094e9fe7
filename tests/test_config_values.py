from pathlib import Path

import pytest

from octvideo import build, config
from octvideo.config import ConfigError
from octvideo.config_values import PATHS, value_of

GOOD = "{OUTPUT_DIR: out, DATA: {TRAIN_LIST: a.txt, VAL_LIST: b.txt}}"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    (tmp_path / "x.yaml").write_text(GOOD)
    return tmp_path / "x.yaml"


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build.load_config(path, overrides)
    return caught.value.problems


def test_the_keys_that_name_paths_exist() -> None:
    assert set(config.key_names()) > PATHS
    ends = ("_DIR", "_LIST", "PREFIX", "CLASS_NAMES", ".INIT", ".RESUME", ".CHECKPOINT")
    assert {key for key in config.key_names() if key.endswith(ends)} == PATHS


@pytest.mark.parametrize("key", sorted(PATHS))
def test_the_home_folder_in_every_path(key: str, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    section, _, name = key.rpartition(".")
    text = f"{name}: ~/x y/z" if not section else f"{section}: {{{name}: ~/x y/z}}"
    (good.parent / "y.yaml").write_text(f"{text}\n")
    for cfg, problems in (config.read(good.parent / "y.yaml"), config.read(good, [key, "~/x y/z"])):
        assert problems == []
        value = dict(config.flatten(cfg))[key]
        assert value == "/home/somebody/x y/z"
        (good.parent / "again.yaml").write_text(cfg.dump())
        assert config.read(good.parent / "again.yaml")[0] == cfg


@pytest.mark.parametrize("key", sorted(PATHS))
@pytest.mark.parametrize("character", ["\n", "\r", "\x00", "\x1b", "\t", "\x7f", "\x85", "\u2028", "\u202e", "\udcff"])
def test_no_path_has_an_unprintable_character(key: str, character: str) -> None:
    _, problem = value_of(key, f"a{character}b", "")
    assert problem.startswith(f"is {'a' + character + 'b'!a}, which contains the ") and ascii(character) in problem
    assert problem.isprintable()


def test_a_line_break_in_a_folder_of_a_file(good: Path) -> None:
    good.write_text('OUTPUT_DIR: "runs/a\\ntouch PWNED #"\nDATA: {TRAIN_LIST: a, VAL_LIST: b}\n')
    (problem,) = problems_of(good)
    assert problem.startswith(r"OUTPUT_DIR is 'runs/a\ntouch PWNED #', which contains the control character '\n'")


def test_a_home_folder_of_nobody(good: Path) -> None:
    (problem,) = problems_of(good, "DATA.PREFIX", "~nobody-here/x")
    assert problem.startswith("DATA.PREFIX is '~nobody-here/x', which begins with '~nobody-here'")


def test_paths_are_left_as_they_are_given(good: Path) -> None:
    for path in ("runs//a/./b/", "../x", "a b", "/", "größe/動画　1", "a~b", "x/~/y"):
        assert build.load_config(good, ["DATA.PREFIX", path]).DATA.PREFIX == path


def test_a_folder_called_tilde(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Path("./~") is Path("~"), which a second reading would take for the home folder."""
    monkeypatch.chdir(good.parent)
    for path in ("./~", "./~x/y", ".//./~x"):
        assert build.load_config(good, ["DATA.PREFIX", path]).DATA.PREFIX == str(good.parent / Path(path))


def test_text_that_yaml_reads_as_something_else(good: Path) -> None:
    for text, value in (("2024", "2024"), ("'1.10'", "1.10"), ("1e3", "1e3")):
        good.write_text(f"OUTPUT_DIR: {text}\nDATA: {{TRAIN_LIST: a, VAL_LIST: b}}\n")
        assert build.load_config(good).OUTPUT_DIR == value
    for text in ("1.10", "yes", "[a]", "{A: b}", "2024_01", "010", "2024-01-01"):
        good.write_text(f"OUTPUT_DIR: {text}\n")
        assert str(problems_of(good))


def test_numbers_as_text_are_numbers_in_lists_too(good: Path) -> None:
    assert build.load_config(good, ["DATA.STD", "[1e-1, 2e-1, 1]"]).DATA.STD == [0.1, 0.2, 1]
