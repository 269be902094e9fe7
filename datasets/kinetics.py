#!/usr/bin/env python
"""Kinetics, from the official csv and a folder of videos to lists, small files, a health report and shards.

    python datasets/kinetics.py index  --annotations CSV [CSV ...] --videos FOLDER --out FOLDER [--labels FILE]
    python datasets/kinetics.py resize --list LIST --prefix FOLDER --out FOLDER --short-side 256
    python datasets/kinetics.py check  --list LIST --prefix FOLDER --out FOLDER [--decoder decord]
    python datasets/kinetics.py shards --list LIST --prefix FOLDER --out FOLDER --name train

`index` finds the clips of the annotations among the videos, in any usual layout: folders of classes (spaces or
underscores) or none, of splits or none; names `<id>_<start>_<end>.<ext>`, zero-padded or not, or `<id>.<ext>`.
`resize` re-encodes to a short side with keyframes close together, which is what reading clips at random wants.
`check` separates the usable files from the others, by the decoder of --decoder. `shards` packs a list into a few large
tar files.
Each can be run again: what is whole is not made again.

Source: W. Kay et al., The Kinetics Human Action Video Dataset, arXiv:1705.06950; J. Carreira et al., A Short Note about
Kinetics-600, arXiv:1808.01340. The annotations and videos are not included.
"""

from __future__ import annotations

if __name__ == "__main__":
    import octvideo.starting  # noqa: F401  # first: importing the others takes seconds

import argparse
import csv
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tabulate import tabulate
from tqdm import tqdm

from octvideo import command
from octvideo.data.decode import BACKENDS, MissingDecoderError
from octvideo.data.lists import ListError, VideoList, read_list, text_lines, unlistable
from octvideo.engine.classes import class_key, csv_cell
from octvideo.errors import plain, shown
from octvideo.files import path_argument

if TYPE_CHECKING or __package__:
    from datasets import doctor, resizing, shards
    from datasets.motion import SettingsError, claim, write_text
else:  # run as a script, which has this folder on its path
    import doctor
    import resizing
    import shards
    from motion import SettingsError, claim, write_text

# What the csv call the splits -> the name of the list.
SPLITS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}
LISTS = ("train", "val", "test")
COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
CONTAINERS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
INDEX_OUTPUTS = (*map("{}.txt".format, LISTS), "labels.txt", "missing.csv", "unexpected.txt", "index_report.json")
# An id may itself look like `x_12_34`: its length, which YouTube never changed, tells where it ends.
YOUTUBE_ID = re.compile(r"[\w-]{11}", re.ASCII)
TIMED_NAME = re.compile(r"([\w-]{11})_(\d{1,9})_(\d{1,9})", re.ASCII)
SECONDS = re.compile(r"\d{1,9}(\.0+)?", re.ASCII)
NO_LABEL = -1


# ---- index


class Clip(NamedTuple):
    """A row of the annotations. start, end: seconds in the YouTube video; label: NO_LABEL where it has none."""

    name: str
    youtube_id: str
    start: int
    end: int
    split: str
    label: int
    place: str  # FILE:LINE


class Problem(NamedTuple):
    """What cannot be used, a row (FILE:LINE) or a file, and why."""

    place: str
    reason: str


class RowError(ValueError):
    """A row of the annotations that cannot be used."""


@lru_cache(maxsize=4096)
def read_labels(path: Path) -> list[str]:
    """The class names of a label map, one a line, in its order."""
    names = [name.strip() for _, name in text_lines(path, "label map")]
    while names and not names[-1]:
        names.pop()
    where: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if not class_key(name):
            raise SettingsError(f"{path}:{line}: {name!r} is no class name: give one class name a line")
        if where.setdefault(class_key(name), line) != line:
            raise SettingsError(f"{path}:{line}: {name!r} is in line {where[class_key(name)]} already: remove one")
    if not names:
        raise SettingsError(f"{path} is empty: give --labels a label map, one class name a line")
    return names


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, str] | None]]:
    """The rows of a csv as (FILE:LINE, cells by column); None for one with too few or too many cells."""
    rows = csv.reader(f"{line}\n" for _, line in text_lines(path, "csv"))
    try:
        header = [column.strip() for column in next(rows, [])]
        absent = [column for column in COLUMNS[1:4] if column not in header]
        if absent:
            has = plain(", ".join(header), 100) or "nothing"
            raise SettingsError(f"{path}:1: lacks the columns {', '.join(absent)}; it has {has}")
        if again := [column for column, count in Counter(header).items() if count > 1]:
            raise SettingsError(f"{path}:1: has the column {shown(again[0])} twice; remove one of them")
        for cells in rows:
            if cells:
                fits = len(cells) == len(header)
                yield f"{path}:{rows.line_num}", dict(zip(header, cells, strict=True)) if fits else None
    except csv.Error as error:
        raise SettingsError(f"{path}:{rows.line_num}: {error}: give --annotations an official csv") from error


def read_clip(cells: dict[str, str] | None, place: str, only: str | None) -> Clip:
    """A row as a Clip, its label not yet looked up. RowError where it is malformed."""
    if cells is None:
        raise RowError("has not as many cells as the header")
    name, youtube_id, *times, split = (cells.get(column, "").strip() for column in COLUMNS)
    if not YOUTUBE_ID.fullmatch(youtube_id):
        raise RowError(f"youtube_id is {youtube_id!r}, not 11 letters, digits, - and _")
    if not all(SECONDS.fullmatch(time) for time in times):
        raise RowError(f"times are {times[0]!r} to {times[1]!r}, not whole seconds")
    start, end = (int(time.partition(".")[0]) for time in times)
    if end <= start:
        raise RowError(f"ends at {end} s, which is not after its start {start} s")
    known = SPLITS.get(split.lower()) if split else only
    if known is None:
        told = f"split is {split!r}, none of {', '.join(SPLITS)}" if split else "it names no split: give --split"
        raise RowError(told)
    return Clip(name, youtube_id, start, end, known, NO_LABEL, place)


def read_annotations(
    files: Sequence[Path], label_map: Path | None, only: str | None
) -> tuple[list[Clip], list[str], list[Problem]]:
    """The clips of the csv files, the class names in the order of their labels, and the rows left out.

    Clips without a label stay, so that their files are not unexpected. `only`: one split, that of rows without one too.
    """
    clips: list[Clip] = []
    problems: list[Problem] = []
    for file in files:
        for place, cells in read_rows(file):
            try:
                clips.append(read_clip(cells, place, only))
            except RowError as error:
                problems.append(Problem(place, str(error)))
    names = read_labels(label_map) if label_map else sorted({clip.name for clip in clips if clip.name})
    labels = {class_key(name): label for label, name in enumerate(names)}
    if len(labels) < len(names):
        raise SettingsError("labels of the csv differ by case or signs only: give --labels with the official label map")
    first: dict[tuple[str, int, int], Clip] = {}
    for clip in clips:
        label = labels.get(class_key(clip.name), NO_LABEL)
        same = first.setdefault(clip[1:4], Clip(*clip[:5], label, clip.place))
        if same.place != clip.place:
            differs = "" if (same.name, same.split) == (clip.name, clip.split) else f" as {same.name}, {same.split}"
            problems.append(Problem(clip.place, f"the same clip is in {same.place} already{differs}: left out"))
        elif not clip.name:
            problems.append(Problem(clip.place, "has no label"))
        elif label == NO_LABEL:
            problems.append(Problem(clip.place, f"label {clip.name!r} is none of the {len(names)} in {label_map}"))
    kept = [clip for clip in first.values() if only in (None, clip.split)]
    if not any(clip.label != NO_LABEL for clip in kept):
        why = f"; the first problem: {problems[0].place}: {problems[0].reason}" if problems else ""
        raise SettingsError(f"no row of {', '.join(map(str, files))} can be used{why}")
    order = {str(file): number for number, file in enumerate(files)}
    places = {problem: problem.place.rpartition(":") for problem in problems}
    problems.sort(key=lambda problem: (order[places[problem][0]], int(places[problem][2])))
    return kept, names, problems


def scan(root: Path) -> Iterator[tuple[str, str]]:
    """All files below a folder as (path relative to it, ""), or with a reason why it is none. No stat per file."""
    folders, seen = [""], set()
    while folders:
        folder = folders.pop()
        real = os.path.realpath(root / folder)
        if real in seen:  # by a link: without this, one to a folder above would have no end
            yield folder, "a link to a folder that is searched already"
            continue
        seen.add(real)
        with os.scandir(real) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir():
                    folders.append(path)
                else:
                    yield path, "a link that leads nowhere" if entry.is_symlink() and not entry.is_file() else ""


class Finder:
    """Which clip a file is. Exact times go before an id alone, which must have one row only."""

    def __init__(self, clips: Sequence[Clip], names: Sequence[str]) -> None:
        self.labels = {class_key(name): label for label, name in enumerate(names)}
        self.by_key = {clip[1:4]: number for number, clip in enumerate(clips)}
        self.rows = Counter(clip.youtube_id for clip in clips)
        self.by_id = {clip.youtube_id: number for number, clip in enumerate(clips)}

    def clip_of(self, path: str) -> int | str:
        """The number of the clip, or why there is none."""
        stem, extension = os.path.splitext(path.rpartition("/")[2])  # noqa: PTH122  # Path takes seconds for 300 000
        if extension.lower() not in CONTAINERS:
            return f"no video: its name does not end in {', '.join(CONTAINERS)}"
        if timed := TIMED_NAME.fullmatch(stem):
            number = self.by_key.get((timed[1], int(timed[2]), int(timed[3])))
            told = "the annotations have this id with other times only" if timed[1] in self.rows else ""
            return (told or "no row has its id") if number is None else number
        if self.rows[stem] > 1:
            return f"{self.rows[stem]} rows have its id: its name must give the times"
        return self.by_id.get(stem, "no row has its id" if YOUTUBE_ID.fullmatch(stem) else "its name holds no id")

    def label_of_folder(self, path: str) -> int:
        """The label that the folder of a file names; NO_LABEL where it is no class."""
        return self.labels.get(class_key(path.rpartition("/")[0].rpartition("/")[2]), NO_LABEL)

    def rank(self, path: str, clip: Clip) -> tuple[bool, bool, bool, str]:
        """Sorts the files of one clip, the best first: exact times, the folder of its class, of its split."""
        folders = {SPLITS.get(folder.lower()) for folder in path.split("/")[:-1]}
        timed = TIMED_NAME.fullmatch(path.rpartition("/")[2].rpartition(".")[0])
        return not timed, self.label_of_folder(path) != clip.label, clip.split not in folders, path


def match(
    files: Iterable[tuple[str, str]], clips: Sequence[Clip], finder: Finder
) -> tuple[dict[int, str], list[Problem]]:
    """The file of each clip, by its number, and the files that are no clip's, with the reason."""
    candidates: dict[int, list[str]] = {}
    unexpected: list[Problem] = []
    for path, reason in files:
        why = unlistable(path)
        found = reason or (f"{why}: rename it" if why else finder.clip_of(path))
        if isinstance(found, int) and clips[found].label == NO_LABEL:
            found = f"its row has no label ({clips[found].place})"
        if isinstance(found, str):
            unexpected.append(Problem(path, found))
        else:
            candidates.setdefault(found, []).append(path)
    paths: dict[int, str] = {}
    for number, several in candidates.items():
        if len(several) > 1:
            several.sort(key=lambda path: finder.rank(path, clips[number]))
        paths[number], *others = several
        unexpected += [Problem(path, f"another file of the clip is used: {paths[number]}") for path in others]
    return paths, sorted(unexpected)


def index(
    annotations: Sequence[Path], videos: Path, out: Path, label_map: Path | None, only: str | None
) -> dict[str, Any]:
    """Writes the lists and what is missing or unexpected to folder `out`, and returns the report.

    SettingsError where the annotations or folders cannot be used.
    """
    if not videos.is_dir():
        raise SettingsError(f"there is no folder {videos}: give --videos the folder of the videos")
    clips, names, problems = read_annotations(annotations, label_map, only)
    settings = {
        "annotations": [str(path.resolve()) for path in annotations],
        "videos": str(videos.resolve()),
        "labels": str(label_map.resolve()) if label_map else None,
        "split": only,
    }
    claim(out, "index.json", settings, INDEX_OUTPUTS)
    finder = Finder(clips, names)
    ours = {os.path.relpath(out / name, videos) for name in (*INDEX_OUTPUTS, "index.json")}
    with tqdm(scan(videos), unit="file", desc=str(videos)) as files:
        paths, unexpected = match((each for each in files if each[0] not in ours), clips, finder)
    used = [(clip, paths.get(number)) for number, clip in enumerate(clips) if clip.label != NO_LABEL]
    for split in LISTS:
        rows = [(clip, path) for clip, path in used if clip.split == split]
        if rows:
            write_text(out / f"{split}.txt", "".join(f"{path} {clip.label}\n" for clip, path in rows if path))
    write_text(out / "labels.txt", "".join(f"{name}\n" for name in names))
    write_text(out / "missing.csv", as_csv([clip for clip, path in used if not path]))
    write_text(out / "unexpected.txt", "".join(f"{printable(path)}\t{reason}\n" for path, reason in unexpected))
    report = {
        **settings,
        "num_classes": len(names),
        "splits": {split: tally(row for row in used if row[0].split == split) for split in LISTS},
        "classes": tally_classes(used, unexpected, names, finder),
        "elsewhere": [
            path for clip, path in used if path and finder.label_of_folder(path) not in (NO_LABEL, clip.label)
        ],
        "unexpected": len(unexpected),
        "rows_left_out": [problem._asdict() for problem in problems],
    }
    write_text(out / "index_report.json", json.dumps(report, indent=1) + "\n")
    return report


def tally(rows: Iterable[tuple[Clip, str | None]]) -> dict[str, int]:
    """How many clips there are, and how many of them were found and not."""
    found = Counter(path is not None for _, path in rows)
    return {"clips": found.total(), "found": found[True], "missing": found[False]}


def tally_classes(
    used: Sequence[tuple[Clip, str | None]], unexpected: Sequence[Problem], names: Sequence[str], finder: Finder
) -> dict[str, dict[str, int]]:
    """The same by class name, and the unexpected files in the folder of the class."""
    rows: dict[int, list[tuple[Clip, str | None]]] = {label: [] for label in range(len(names))}
    for row in used:
        rows[row[0].label].append(row)
    strangers = Counter(finder.label_of_folder(problem.place) for problem in unexpected)
    return {name: {**tally(rows[label]), "unexpected": strangers[label]} for label, name in enumerate(names)}


def as_csv(clips: Iterable[Clip]) -> str:
    """Return rows as the official csv have them; names of classes as `csv_cell` writes them, which `index` reads alike."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((csv_cell(clip.name), clip.youtube_id, clip.start, clip.end, clip.split) for clip in clips)
    return text.getvalue()


def printable(path: str) -> str:
    """A path as one line of UTF-8 text, whatever bytes it has."""
    text = path.encode("utf-8", "backslashreplace").decode()
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


# ---- command line


def read_videos(given: argparse.Namespace) -> VideoList:
    """The list that the command line gives. ListError or SettingsError where it cannot be used."""
    if not given.prefix.is_dir():
        raise SettingsError(f"there is no folder {given.prefix}: give --prefix the folder of the videos")
    return read_list(str(given.list), num_classes=2**31, prefix=str(given.prefix), check_files=False)


def show(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    print(tabulate([*rows], [*headers], tablefmt="github"))


def index_command(given: argparse.Namespace) -> int:
    only = SPLITS[given.split] if given.split else None
    report = index(given.annotations, given.videos, given.out, given.labels, only)
    left_out, count = report["rows_left_out"], report["num_classes"]
    for problem in left_out[:5]:
        print(f"{problem['place']}: {problem['reason']}")
    if len(left_out) > 5:
        print(f"... and {len(left_out) - 5} more rows left out or without a label: see index_report.json")
    worst = sorted(report["classes"].items(), key=lambda item: -item[1]["missing"])[:10]
    rows = [(name, *numbers.values()) for name, numbers in worst if numbers["missing"]]
    if rows:
        show(("classes with the most missing", "clips", "found", "missing", "unexpected"), rows)
        print()
    show(
        ("split", "clips", "found", "missing"),
        [(split, *counts.values()) for split, counts in report["splits"].items()],
    )
    named = f"Kinetics-{count}" if count in (400, 600) else "neither 400 nor 600: --labels gives the official order"
    print(f"{count} classes ({named}); {report['unexpected']} unexpected files; {len(left_out)} rows left out")
    if report["elsewhere"]:
        print(
            f"{len(report['elsewhere'])} files lie in the folder of another class than their row says: the row counts"
        )
    print(f"{given.out}: lists, labels.txt, missing.csv, unexpected.txt, index_report.json; prefix {given.videos}")
    return 0


def resize_command(given: argparse.Namespace) -> int:
    videos = read_videos(given)
    settings = resizing.Resizing(given.short_side, given.crf, given.gop)
    settings.check()
    if not given.timeout_s > 0:
        raise SettingsError(f"timeout-s is {given.timeout_s:g}: give more than 0")
    targets = resizing.destinations(videos, given.out)
    claim(given.out, "resize.json", {**asdict(settings), "prefix": str(given.prefix.resolve())}, ("*",))
    counts = resizing.resize(
        videos,
        targets,
        given.out,
        settings,
        replace=given.replace,
        workers=given.workers,
        limit_s=given.timeout_s,
    )
    show(("files", *counts), [(len(videos), *counts.values())])
    print(f"{given.out}: list {given.list.name}, prefix {given.out}")
    if counts["failed"]:
        print(f"{counts['failed']} files failed: see {given.out / 'failed.txt'}", file=sys.stderr)
    return 1 if counts["failed"] else 0


def check_command(given: argparse.Namespace) -> int:
    settings = doctor.Settings(given.full, given.samples, given.seconds, given.shortest_s, given.timeout_s)
    settings.check()
    decoder = doctor.find_decoder(given.decoder)
    videos = read_videos(given)
    record = {"list": str(given.list.resolve()), "prefix": str(given.prefix.resolve()), **asdict(settings)}
    claim(given.out, "check.json", record, doctor.OUTPUTS)
    print(f"decoder {decoder}: {len(videos)} files", flush=True)
    counts = doctor.check(videos, given.out, settings, given.workers, decoder)["counts"]
    rows = [
        (column.removesuffix("s"), kind, count)
        for column in ("problems", "notes")
        for kind, count in sorted(counts[column].items(), key=lambda item: -item[1])
    ]
    show(("", "kind", "files"), rows)
    print(f"{counts['usable']} of {counts['files']} files are usable, {counts['bad']} are not")
    print(f"{given.out}: lists clean.txt and bad.txt, report.json; prefix {given.prefix}")
    return 0


def shards_command(given: argparse.Namespace) -> int:
    shards.check_name(given.name)
    if given.shard_mb < 1:
        raise SettingsError(f"shard-mb is {given.shard_mb}: give 1 or more")
    members = shards.read_members(read_videos(given))
    settings = {"list and sizes": shards.fingerprint(members), "shard_mb": given.shard_mb}
    claim(given.out, f"{given.name}.json", settings, (f"{given.name}.txt", f"{given.name}-*.tar"))
    planned = shards.split(members, given.name, given.shard_mb * 2**20)
    written = shards.write(planned, given.name, given.out, given.workers)
    size = sum(shard.size() for shard in planned) / 2**20
    show(("files", "shards", "written now", "MiB"), [(len(members), len(planned), written, f"{size:.1f}")])
    print(f"{given.out}: {given.name}-00000.tar ...; list {given.name}.txt, prefix {given.out}")
    return 0


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """The command line, and the parser of its command for messages."""
    parser = argparse.ArgumentParser(description="Prepares Kinetics: lists, small files, a health report, shards.")
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {}
    for name, run, told in (
        ("index", index_command, "lists from the official csv and a folder of videos"),
        ("resize", resize_command, "re-encode the files of a list to a short side"),
        ("check", check_command, "tell the usable files of a list from the others"),
        ("shards", shards_command, "pack the files of a list into tar files"),
    ):
        parsers[name] = commands.add_parser(name, help=told, description=told)
        parsers[name].set_defaults(run=run)
        parsers[name].add_argument("--out", type=path_argument, required=True, help="folder to write to")
        if name != "index":
            parsers[name].add_argument("--list", type=path_argument, required=True, help="lines `path label`")
            parsers[name].add_argument(
                "--prefix", type=path_argument, required=True, help="folder that the paths start from"
            )
            cores = os.cpu_count() or 1
            parsers[name].add_argument("--workers", type=int, default=cores, help="processes; default: the cores")
    add = parsers["index"].add_argument
    add("--annotations", type=path_argument, nargs="+", required=True, help="official csv")
    add("--videos", type=path_argument, required=True, help="folder of the videos")
    add("--labels", type=path_argument, help="label map, one class name a line; default: the sorted labels of the csv")
    add("--split", choices=list(SPLITS), help="this split only; rows that name none belong to it")
    add = parsers["resize"].add_argument
    add("--short-side", type=int, required=True, help="pixels, such as 256 or 320; smaller files keep their size")
    add("--replace", action="store_true", help="delete each original when its resized file is whole")
    add("--crf", type=int, default=resizing.Resizing.crf, help="quality, 0 (best) to 51")
    add("--gop", type=int, default=resizing.Resizing.gop, help="frames from keyframe to keyframe")
    add("--timeout-s", type=float, default=600, help="a file that takes longer has failed")
    add = parsers["check"].add_argument
    decoders = ["auto", *BACKENDS]
    add(
        "--decoder",
        choices=decoders,
        default="auto",
        help="judge by this decoder, as DATA.DECODER of training; auto: pyav",
    )
    add("--full", action="store_true", help="decode every frame")
    add("--samples", type=int, default=doctor.Settings.samples, help="frames to decode without --full")
    add("--seconds", type=float, help="what every file should last, to a tenth")
    add("--shortest-s", type=float, default=doctor.Settings.shortest_s, help="a shorter file is unusable")
    add("--timeout-s", type=float, default=doctor.Settings.timeout_s, help="a file that takes longer is unusable")
    add = parsers["shards"].add_argument
    add("--shard-mb", type=int, default=1024, help="most MiB in a tar file")
    add("--name", default="train", help="what the names of the files begin with")
    given = parser.parse_args(arguments)
    return given, parsers[given.command]


@command.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    given, parser = parse(arguments)
    try:
        if getattr(given, "workers", 1) < 1:
            raise SettingsError(f"workers is {given.workers}: give 1 or more")
        return given.run(given)
    except (SettingsError, ListError, MissingDecoderError, OSError) as error:
        parser.error(str(error))
    except BrokenProcessPool as error:
        parser.error(f"a worker process died, perhaps for lack of memory: {error}")
    except KeyboardInterrupt:
        print(f"\ninterrupted: run the same command again to go on with {given.out}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(command.run(main))
