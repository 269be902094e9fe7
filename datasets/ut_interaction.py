#!/usr/bin/env python
"""Leave-one-sequence-out lists for UT-Interaction: six interactions of two people, ten sequences.

    python datasets/ut_interaction.py --root FOLDER --test-sequence 1 --out data/ut_interaction

FOLDER holds the videos, which this project does not include, and a manifest.csv that names them: one row per video
with the columns path (relative to FOLDER), label, class, sequence and sha1; more columns do no harm. Fold n is tested
on sequence n and trained on all the others. Paths in the lists are relative to FOLDER: give it as DATA.PREFIX.

Source: M. S. Ryoo and J. K. Aggarwal, UT-Interaction Dataset, ICPR contest on Semantic Description of Human
Activities (SDHA), 2010. For academic use, with citation.
"""

from __future__ import annotations

if __name__ == "__main__":
    import octvideo.starting  # noqa: F401  # first: importing the others takes seconds

import argparse
import csv
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from octvideo import command
from octvideo.errors import UserError
from octvideo.files import path_argument

COLUMNS = ("path", "label", "class", "sequence", "sha1")


class ManifestError(UserError, ValueError):
    """A manifest that is missing, damaged, or does not fit its folder or what is asked of it."""


@dataclass(frozen=True)
class Video:
    """A row of the manifest: path relative to the folder, label from 0, class name, sequence."""

    path: str
    label: int
    name: str
    sequence: int
    sha1: str


def read_manifest(root: Path) -> list[Video]:
    """The videos of root/manifest.csv. ManifestError names the file, the line and the remedy."""
    if not root.is_dir():
        raise ManifestError(f"there is no folder {root}: give --root the folder that holds manifest.csv")
    manifest = root / "manifest.csv"
    if not manifest.is_file():
        raise ManifestError(f"{root} holds no manifest.csv (columns {', '.join(COLUMNS)}): see datasets/README.md")
    with manifest.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or ()
        missing = [column for column in COLUMNS if column not in columns]
        if missing:
            raise ManifestError(
                f"{manifest} lacks the columns {', '.join(missing)}; it has {', '.join(columns) or 'none'}"
            )
        videos = [read_row(row, f"{manifest} line {rows.line_num}") for row in rows]
    if not videos:
        raise ManifestError(f"{manifest} names no video")
    return videos


def read_row(row: dict[str, str | None], where: str) -> Video:
    """One row of the manifest as a Video; `where` begins the message of a ManifestError."""
    cells = {column: row[column] for column in COLUMNS}
    empty = [column for column, cell in cells.items() if not cell]
    if empty:
        raise ManifestError(f"{where}: {', '.join(empty)} is empty")
    for column in ("label", "sequence"):
        if not str(cells[column]).isdecimal():
            raise ManifestError(f"{where}: {column} is {cells[column]!r}, not a number from 0")
    path, label, name, sequence, sha1 = map(str, cells.values())
    return Video(path, int(label), name, int(sequence), sha1)


def class_names(videos: Sequence[Video]) -> list[str]:
    """Class names in the order of their labels, which must be 0 to K - 1 with one name each."""
    names = {video.label: video.name for video in videos}
    for video in videos:
        if names[video.label] != video.name:
            raise ManifestError(f"label {video.label} has two names, {names[video.label]} and {video.name}")
    gaps = sorted(set(range(max(names) + 1)) - set(names))
    if gaps:
        raise ManifestError(f"labels run to {max(names)}, but no video has label {', '.join(map(str, gaps))}")
    return [names[label] for label in sorted(names)]


def check_files(root: Path, videos: Sequence[Video], verify: bool) -> None:
    """ManifestError where files are missing or, with verify, differ from their sha1."""
    missing = [video.path for video in videos if not (root / video.path).is_file()]
    if missing:
        raise ManifestError(
            f"{len(missing)} of {len(videos)} files named in {root / 'manifest.csv'} are missing: {shorten(missing)}"
        )
    if verify:
        damaged = [video.path for video in videos if sha1(root / video.path) != video.sha1]
        if damaged:
            raise ManifestError(f"{len(damaged)} files differ from their sha1, fetch them again: {shorten(damaged)}")


def sha1(path: Path) -> str:
    """SHA-1 of a file, in hexadecimal."""
    return hashlib.sha1(path.read_bytes()).hexdigest()


def shorten(paths: Sequence[str]) -> str:
    """The first five paths, and how many more there are."""
    return ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def write_fold(videos: Sequence[Video], sequence: int, out: Path) -> tuple[Path, Path]:
    """Writes the lists of a fold, lines `path label`, and returns their paths: train, val."""
    train, val = out / f"train_seq{sequence}.txt", out / f"val_seq{sequence}.txt"
    for path, tested in ((train, False), (val, True)):
        kept = [video for video in videos if (video.sequence == sequence) == tested]
        command.write_output(path, "".join(f"{video.path} {video.label}\n" for video in kept).encode())
    return train, val


def choose_folds(videos: Sequence[Video], test_sequence: str) -> list[int]:
    """The sequences to test on: one by its number, or `all`."""
    existing = sorted({video.sequence for video in videos})
    if len(existing) < 2:
        raise ManifestError(f"the manifest has one sequence only ({existing[0]}): nothing is left to train on")
    if test_sequence == "all":
        return existing
    if test_sequence not in map(str, existing):
        known = ", ".join(map(str, existing))
        raise ManifestError(f"there is no sequence {test_sequence}: give one of {known}, or all")
    return [int(test_sequence)]


@command.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes leave-one-sequence-out lists for UT-Interaction.")
    parser.add_argument(
        "--root", type=path_argument, required=True, help="folder that holds manifest.csv and the videos"
    )
    parser.add_argument("--test-sequence", required=True, help="sequence to test on, or all for every fold")
    parser.add_argument("--out", type=path_argument, required=True, help="folder for the lists")
    parser.add_argument("--verify", action="store_true", help="compare each file with its sha1 as well")
    given = parser.parse_args(arguments)
    try:
        videos = read_manifest(given.root)
        names = class_names(videos)
        folds = choose_folds(videos, given.test_sequence)
        check_files(given.root, videos, given.verify)
        given.out.mkdir(parents=True, exist_ok=True)
        command.write_output(given.out / "labels.txt", "".join(f"{name}\n" for name in names).encode())
        for fold in folds:
            train, val = write_fold(videos, fold, given.out)
            tested = sum(video.sequence == fold for video in videos)
            print(f"sequence {fold}: {train} ({len(videos) - tested} videos), {val} ({tested} videos)")
    except (ManifestError, OSError, UnicodeDecodeError) as error:
        parser.error(str(error))
    print(
        f"{len(names)} classes in {given.out / 'labels.txt'}; paths are relative to DATA.PREFIX {given.root.resolve()}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
