import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from octvideo import yaml_file
from octvideo.yaml_file import MAX_BYTES, YamlError, parse, read


def write(folder: Path, text: str, name: str = "x.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def problems_of(call: Callable[[str], object], argument: str) -> list[str]:
    with pytest.raises(YamlError) as caught:
        call(argument)
    assert all(len(problem) < 700 and problem.isprintable() for problem in caught.value.problems)
    return caught.value.problems


def test_values_under_their_full_names(tmp_path: Path) -> None:
    text = (
        "SEED: 3\nMODEL: {NAME: a, DROPOUT: 1.0e-1}\nSOLVER.BASE_LR: .5\nDATA:\n  MEAN: [1, 2]\n  PREFIX:\nTEST: {}\n"
    )
    assert read(write(tmp_path, text)) == {
        **{"SEED": 3, "MODEL.NAME": "a", "MODEL.DROPOUT": 0.1, "SOLVER.BASE_LR": 0.5},
        **{"DATA.MEAN": [1, 2], "DATA.PREFIX": None},
    }


def test_anchors_and_merges(tmp_path: Path) -> None:
    text = "A: &a {X: 1, Y: [2]}\nB: {<<: *a, X: 3}\nC: *a\n"
    assert read(write(tmp_path, text)) == {"A.X": 1, "A.Y": [2], "B.X": 3, "B.Y": [2], "C.X": 1, "C.Y": [2]}


# ---- a key given twice


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("A: 1\nB: 2\nA: 1\n", ":3: A is given already in line 1; remove one of them"),
        ("{A: 1, A: 2}", ":1: A is given already in line 1; remove one of them"),
        ("S: {A: 1}\nT: 1\nS: {B: 2}\n", ":3: S is given already in line 1; remove one of them"),
        ("S:\n  A: 1\n  B: 2\n  A: 3\n", ":4: S.A is given already in line 2; remove one of them"),
        ("S:\n  T:\n    A: 1\n    A: 1\n", ":4: S.T.A is given already in line 3; remove one of them"),
        ("S: {A: 1}\nS.A: 2\n", ":2: S.A is given already in line 1; remove one of them"),
        ("S: [{A: 1, A: 2}]\n", ":1: S[0].A is given already in line 1; remove one of them"),
        ("_BASE_: a\n_BASE_: b\n", ":2: _BASE_ is given already in line 1; remove one of them"),
        ('A: 1\n"A": 2\n', ":2: A is given already in line 1; remove one of them"),
    ],
)
def test_a_key_is_given_once(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path, text)
    assert problems_of(read, path) == [path + problem]


def test_a_key_given_twice_in_a_base(tmp_path: Path) -> None:
    base = write(tmp_path, "A: 1\nA: 2\n", "base.yaml")
    assert problems_of(read, write(tmp_path, "_BASE_: base.yaml\nA: 3\n"))[0].startswith(
        f"{base}:2: A is given already"
    )


def test_all_problems_of_a_file_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "A: 010\nB: 2024-01-01\nA: !!set {x}\n1: 2\n")
    starts = [
        f"{path}:1: '010' is not a",
        f"{path}:2: '2024-01-01' is a date",
        f"{path}:3: A is given",
        f"{path}:3: not",
    ]
    found = problems_of(read, path)
    assert [each[: len(start)] for each, start in zip(found, starts, strict=False)] == starts
    assert "the key '1' is not text" in found[-1] and len(found) == 5


# ---- values that YAML changes, or that no memory holds


@pytest.mark.parametrize(
    "text",
    ["010", "0x10", "0b1", "1_000", "1:30", "1:30.5", "1_0.5", "9" * 19, "9" * 5000, "+" + "9" * 5000, "!!int x"],
)
def test_numbers_are_decimal(text: str) -> None:
    (problem,) = problems_of(parse, f"A: {text}")
    assert "is not a decimal number of at most 18 digits" in problem


@pytest.mark.parametrize(
    "text",
    ["!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]", "!!python/name:os.system ''", "!x 1", "!!float [1]", "!!bool 7"],
)
def test_other_types_are_refused(text: str) -> None:
    (problem,) = problems_of(parse, f"A: {text}")
    assert problem


@pytest.mark.parametrize("text", ["2024-01-01", "2024-01-01T10:00:00Z"])
def test_dates_are_refused(text: str) -> None:
    assert problems_of(parse, f"A: {text}") == [f"{text!r} is a date to YAML; put it in quotes if it is text"]
    assert parse(f"A: '{text}'") == {"A": text}


@pytest.mark.parametrize("key", ["1", "[a]", "{a: 1}", "yes", "null", "1.5", "2024-01-01"])
def test_keys_are_text(key: str) -> None:
    assert "is not text" in problems_of(parse, f"? {key}\n: 1\n")[0]


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    return "\n".join(lines + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("A: &a [*a]", ":1: an alias stands for a value that it is inside of"),
        ("&a {A: *a}", ":1: an alias stands for a value that it is inside of"),
        ("A: 1\nB: &b {C: {D: *b}}", ":2: an alias stands for a value that it is inside of"),
        (bomb(30), ": more than 10000 values, where an alias counts as what it repeats"),
        (f"A: {'[' * 30}{']' * 30}", ":1: values are inside one another more than 20 times"),
        ("[" * 50_000, ": not plain YAML: values are inside one another more than 20 times"),
        ("A: *nobody", ":1: not plain YAML: found undefined alias 'nobody'"),
        ("A: 1\n---\nA: 2\n", ":2: not plain YAML: but found another document"),
        ("A: \x01\n", ": not plain YAML: "),
        ("x" * (MAX_BYTES + 1), f": more than {MAX_BYTES} bytes"),
        ("A: [" + "1," * 11_000 + "]", ": more than 10000 values"),
    ],
)
def test_values_that_have_no_end(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path, text)
    (found,) = problems_of(read, path)
    assert found.startswith(path + problem), found


def test_a_file_of_any_size_is_not_held(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    os.truncate(path, 1 << 40)  # sparse
    assert "bytes" in problems_of(read, path)[0]


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"A: \xff\n", "byte 3 is 0xff, not UTF-8 text"), ("A: 1\n".encode("utf-16"), "byte 0 is 0xff, not UTF-8 text")],
)
def test_files_in_other_encodings(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    assert problems_of(read, str(tmp_path / "x.yaml")) == [f"{tmp_path}/x.yaml: {problem}"]


def test_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfA: 1\n")
    assert read(str(tmp_path / "x.yaml")) == {"A": 1}


# ---- _BASE_


def test_a_file_lies_over_its_bases_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "S: {A: 1, B: 1, C: 1, D: 1}\n", "one.yaml")
    write(tmp_path, "_BASE_: ~/one.yaml\nS: {B: 2, C: 2}\n", "sub/two.yaml")
    write(tmp_path, "S: {A: 3}\n", "three.yaml")
    path = write(tmp_path, f"_BASE_: [sub/two.yaml, {tmp_path}/three.yaml]\nS: {{C: 4}}\n")
    assert read(path) == {"S.A": 3, "S.B": 2, "S.C": 4, "S.D": 1}


@pytest.mark.parametrize(
    "base", ["5", "''", "null", "{A: b}", "[[a.yaml]]", "[1]", '"a\\nb.yaml"', "~nobody-here/a.yaml"]
)
def test_a_base_is_a_path(tmp_path: Path, base: str) -> None:
    (problem,) = problems_of(read, write(tmp_path, f"_BASE_: {base}\n"))
    assert problem.startswith(f"{tmp_path}/x.yaml: _BASE_ ")


def test_bases_that_name_one_another(tmp_path: Path) -> None:
    for one, other in ("ab", "bc", "ca"):
        write(tmp_path, f"_BASE_: {other}.yaml\n", f"{one}.yaml")
    assert problems_of(read, f"{tmp_path}/a.yaml") == [
        "_BASE_ leads back to the same file: a.yaml -> b.yaml -> c.yaml -> a.yaml"
    ]


def test_chains_and_doublings_of_bases(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path, f"_BASE_: [{number + 1}.yaml, {number + 1}.yaml]\nA{number}: 1\n", f"{number}.yaml")
    write(tmp_path, "A: 1\n", "30.yaml")
    assert "_BASE_ leads through more than 20 files" in problems_of(read, f"{tmp_path}/0.yaml")[0]
    assert len(read(f"{tmp_path}/12.yaml")) == 19  # each file is read once, not 2^18 times


def fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (fifo, "Not a regular file"),
        (Path.mkdir, "Is a directory"),
        (lambda p: p.symlink_to("/dev/zero"), "Not a regular"),
    ],
)
def test_files_that_are_none(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    make(tmp_path / "odd.yaml")
    for path in (f"{tmp_path}/odd.yaml", write(tmp_path, "_BASE_: odd.yaml\n")):
        assert problems_of(read, path)[0].startswith(f"{tmp_path}/odd.yaml: cannot be read ({reason}")


def test_missing_files_are_shown_as_they_were_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (problem,) = problems_of(read, "none.yaml")
    assert f"'none.yaml' (tried '{tmp_path}/none.yaml' from the current folder)" in problem
    (tmp_path / "sub").mkdir()
    write(tmp_path, "_BASE_: gone.yaml\n", "sub/a.yaml")
    (problem,) = problems_of(read, "sub/a.yaml")
    assert re.match(rf"_BASE_ names a file that does not exist: .* \(tried '{tmp_path}/sub/gone.yaml'", problem)


def test_the_limits_are_far_above_what_a_configuration_needs() -> None:
    text = "\n".join(f"S{n}: {{K: {n}, L: [1, 2, 3]}}" for n in range(1000))
    assert len(yaml_file.parse(text)) == 1000
