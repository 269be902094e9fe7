"""datasets/ut_interaction.py: leave-one-sequence-out lists from a manifest."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "datasets" / "ut_interaction.py"
REAL = ROOT / "../shared/data/ut_interaction"
SPEC = importlib.util.spec_from_file_location("ut_interaction", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
ut_interaction = importlib.util.module_from_spec(SPEC)
sys.modules["ut_interaction"] = ut_interaction  # dataclasses look their module up there
SPEC.loader.exec_module(ut_interaction)

COLUMNS = ["path", "label", "class", "set", "sequence", "frames", "fps", "width", "height", "sha1"]


def write_manifest(root, rows, columns=COLUMNS):
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def rows(tmp_path):
    """Three classes in three sequences; class 2 is missing from sequence 3. Files and manifest lie in tmp_path."""
    made = []
    for sequence in (1, 2, 3):
        for label, name in enumerate(["hug", "kick", "shake hands"]):
            if (sequence, label) == (3, 2):
                continue
            content = f"{sequence} {label}".encode()
            path = f"set1/{label} {name}/{sequence}.avi"
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(content)
            row = dict.fromkeys(COLUMNS, "1") | {"path": path, "label": str(label), "class": name}
            made.append(row | {"sequence": str(sequence), "sha1": hashlib.sha1(content).hexdigest()})
    write_manifest(tmp_path, made)
    return made


def run(root, out, sequence="1", *more):
    return ut_interaction.main(["--root", str(root), "--test-sequence", sequence, "--out", str(out), *more])


def read_list(path):
    """(path, label) of each line."""
    return [(line.rsplit(" ", 1)[0], int(line.rsplit(" ", 1)[1])) for line in path.read_text().splitlines()]


def test_one_fold(rows, tmp_path, capsys):
    out = tmp_path / "lists"
    assert run(tmp_path, out, "3", "--verify") == 0
    assert sorted(path.name for path in out.iterdir()) == ["labels.txt", "train_seq3.txt", "val_seq3.txt"]
    assert (out / "labels.txt").read_text() == "hug\nkick\nshake hands\n"
    assert (out / "val_seq3.txt").read_text() == "set1/0 hug/3.avi 0\nset1/1 kick/3.avi 1\n"
    train = read_list(out / "train_seq3.txt")
    assert train == [(row["path"], int(row["label"])) for row in rows if row["sequence"] != "3"]
    printed = capsys.readouterr().out
    assert "(6 videos)" in printed
    assert "(2 videos)" in printed
    assert f"DATA.PREFIX {tmp_path}" in printed


def test_all_folds_partition_the_videos(rows, tmp_path):
    out = tmp_path / "lists"
    assert run(tmp_path, out, "all") == 0
    everything = sorted((row["path"], int(row["label"])) for row in rows)
    tested = []
    for sequence in (1, 2, 3):
        train, val = (read_list(out / f"{split}_seq{sequence}.txt") for split in ("train", "val"))
        assert sorted(train + val) == everything
        tested += val
    assert sorted(tested) == everything


def test_a_second_run_writes_the_same_and_prints_what_it_replaces(rows, tmp_path, capsys):
    for _ in range(2):
        assert run(tmp_path, tmp_path / "lists", "all") == 0
    assert len(list((tmp_path / "lists").iterdir())) == 7
    printed = capsys.readouterr().out
    assert printed.count(f"replaced {tmp_path}/lists/") == 7


def fails(capsys, *arguments):
    """The message of a run that must exit with status 2."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.replace("\n", " ")


def test_missing_folder_and_manifest(tmp_path, capsys):
    assert f"there is no folder {tmp_path / 'none'}" in fails(capsys, tmp_path / "none", tmp_path / "out")
    assert f"{tmp_path} holds no manifest.csv" in fails(capsys, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_columns_are_named(rows, tmp_path, capsys):
    write_manifest(tmp_path, rows, ["path", "label", "class", "frames"])
    message = fails(capsys, tmp_path, tmp_path / "out")
    assert "manifest.csv lacks the columns sequence, sha1; it has path, label, class, frames" in message


@pytest.mark.parametrize("sequence", ["4", "first", "-1"])
def test_unknown_sequence_lists_those_that_exist(rows, tmp_path, capsys, sequence):
    with pytest.raises(SystemExit) as stopped:
        ut_interaction.main(["--root", str(tmp_path), f"--test-sequence={sequence}", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert f"there is no sequence {sequence}: give one of 1, 2, 3, or all" in capsys.readouterr().err


def test_missing_files_are_counted_and_named(rows, tmp_path, capsys):
    for row in rows[:6]:
        (tmp_path / row["path"]).unlink()
    message = fails(capsys, tmp_path, tmp_path / "out")
    assert "6 of 8 files named in" in message
    assert f"are missing: {rows[0]['path']}, " in message
    assert "and 1 more" in message
    assert not (tmp_path / "out").exists()


def test_checksums_are_compared_on_demand_only(rows, tmp_path, capsys):
    (tmp_path / rows[3]["path"]).write_bytes(b"something else")
    assert run(tmp_path, tmp_path / "out") == 0
    message = fails(capsys, tmp_path, tmp_path / "verified", "1", "--verify")
    assert f"1 files differ from their sha1, fetch them again: {rows[3]['path']}" in message
    assert not (tmp_path / "verified").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "one"}, "manifest.csv line 4: label is 'one', not a number from 0"),
        ({"label": "-1"}, "manifest.csv line 4: label is '-1', not a number from 0"),
        ({"sequence": "2.5"}, "manifest.csv line 4: sequence is '2.5', not a number from 0"),
        ({"path": ""}, "manifest.csv line 4: path is empty"),
        ({"class": "kick"}, "label 2 has two names"),
        ({"label": "5"}, "labels run to 5, but no video has label 3, 4"),
    ],
)
def test_damaged_rows(rows, tmp_path, capsys, changes, message):
    write_manifest(tmp_path, [*rows[:2], rows[2] | changes, *rows[3:]])
    assert message in fails(capsys, tmp_path, tmp_path / "out")


def test_short_row(rows, tmp_path, capsys):
    with (tmp_path / "manifest.csv").open("a") as file:
        file.write("set1/half.avi,1\n")
    assert "line 10: class, sequence, sha1 is empty" in fails(capsys, tmp_path, tmp_path / "out")


def test_empty_manifest_and_single_sequence(rows, tmp_path, capsys):
    write_manifest(tmp_path, rows[:3])
    assert "one sequence only (1): nothing is left to train on" in fails(capsys, tmp_path, tmp_path / "out")
    write_manifest(tmp_path, [])
    assert "manifest.csv names no video" in fails(capsys, tmp_path, tmp_path / "out")
    (tmp_path / "manifest.csv").write_text("")
    assert "lacks the columns path, label, class, sequence, sha1; it has none" in fails(
        capsys, tmp_path, tmp_path / "out"
    )


def test_out_that_cannot_be_made(rows, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ["--root", tmp_path, "--test-sequence", "1", "--out", tmp_path / "file" / "out"]
    done = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Not a directory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not REAL.is_dir(), reason="the UT-Interaction videos are not part of the project")
def test_the_real_set(tmp_path):
    assert run(REAL, tmp_path / "out", "all", "--verify") == 0
    names = (tmp_path / "out" / "labels.txt").read_text().split()
    assert names == ["handshake", "hug", "kick", "point", "punch", "push"]
    tested = []
    for sequence in range(1, 11):
        train, val = (read_list(tmp_path / "out" / f"{split}_seq{sequence}.txt") for split in ("train", "val"))
        assert len(train) + len(val) == 60
        assert not set(train) & set(val)
        assert {label for _, label in train} == set(range(6))
        tested += val
    assert len(set(tested)) == 60
    assert Counter(label for _, label in tested) == dict.fromkeys(range(6), 10)
    assert all((REAL / path).is_file() for path, _ in tested)
