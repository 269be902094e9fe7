"""Annotation lists, lines `path label`: no line vanishes, and no file counts twice, whatever its spelling."""

from __future__ import annotations

import bisect
import math
import os
import re
import stat
from array import array
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from octvideo.data.decode import member_of
from octvideo.errors import UserError, plain, shown
from octvideo.files import expanded, open_regular, tried, unprintable

MAX_LINE = 2**16  # bytes of a line
BLANKS = " \t"  # around path and label they are layout
_LABEL = re.compile(r"[0-9]{1,18}|-[1-9][0-9]{0,17}")


class ListError(UserError, ValueError):
    """An annotation list that cannot be used. The text names every problem with its line and its remedy."""


@dataclass(frozen=True, eq=False, repr=False)
class VideoList:
    """The videos of an annotation list, in its order; for an image network, the images.

    All paths are one byte buffer: a million cost tens of MB, and forked workers share them. A list of strings they
    would not: looking at a string writes its reference count, and so copies the memory page.
    """

    source: str
    prefix: str
    names: bytes
    ends: np.ndarray  # int64 [len], where each name ends in `names`
    labels: np.ndarray  # int64 [len]
    lines: np.ndarray  # int32 [len], line numbers in the list, from 1
    left_out: str = ""  # what of the source is in no entry and why, for the start of a run

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"VideoList({self.source!r}, {len(self)} videos)"

    def path(self, index: int) -> str:
        return str(Path(self.prefix, self.name(index)))

    def name(self, index: int) -> str:
        """The path as the list has it."""
        begin = self.ends[index - 1] if index else 0
        return self.names[begin : self.ends[index]].decode()

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def place(self, index: int) -> str:
        """LIST:LINE, for messages."""
        return f"{self.source}:{self.lines[index]}"


class Columns:
    """The entries of a list while it is read."""

    def __init__(self) -> None:
        self.names, self.ends, self.labels, self.lines = bytearray(), array("q"), array("q"), array("i")

    def add(self, name: str, label: int, line: int) -> None:
        self.names += name.encode()
        self.ends.append(len(self.names))
        self.labels.append(label)
        self.lines.append(line)

    def videos(self, source: str, prefix: str, left_out: str = "") -> VideoList:
        ends, labels = np.array(self.ends, np.int64), np.array(self.labels, np.int64)
        return VideoList(source, prefix, bytes(self.names), ends, labels, np.array(self.lines, np.int32), left_out)


class Problems:
    """Counts the problems of a list and keeps the first of them, in the order of its lines."""

    def __init__(self, most: int) -> None:
        self.count, self.most = 0, most
        self._first: list[tuple[float, int, str]] = []

    def add(self, order: float, place: str, text: str) -> None:
        """order: what the problems are sorted by. place: the file, or FILE:LINE."""
        self.count += 1
        bisect.insort(self._first, (order, self.count, f"{plain(place, 1000)}: {text}"))
        del self._first[self.most :]

    def raise_any(self, head: str) -> None:
        """Raise ListError if there are problems. head: what follows their number."""
        if self.count:
            lines = [f"{self.count} problem(s) {head}", *(text for *_, text in self._first)]
            lines += [f"... and {self.count - self.most} more"] if self.count > self.most else []
            raise ListError("\n".join(lines))


def text_lines(path: str | Path, what: str = "list") -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text) of the lines of a UTF-8 file, without line end (LF or CRLF) and byte order mark.

    what: the file, for messages. Raises ListError if it is not a regular file, not UTF-8, or has a line longer than
    MAX_LINE bytes.
    """
    try:
        with open_regular(path) as file:
            number = 0
            while line := file.readline(MAX_LINE + 2):
                number += 1
                line = line.removesuffix(b"\n").removesuffix(b"\r")
                if len(line) > MAX_LINE:
                    text = f"the line is longer than {MAX_LINE} bytes: {shown(line[:80])[1:]}"
                    raise ListError(f"{path}:{number}: {text}; is this a {what}?")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        text = f"byte 0x{error.object[error.start]:02x} is not UTF-8 text; is this a {what}? save it as UTF-8"
        raise ListError(f"{path}:{number}: {text}") from error
    except OSError as error:
        raise ListError(f"{path}: the {what} cannot be read ({error.strerror}); check its path{tried(path)}") from error


def read_list(
    path: str,
    *,
    num_classes: int,
    prefix: str = "",
    separator: str = " ",
    require_all_classes: bool = False,
    check_files: bool = True,
    by_path: bool = False,
    max_problems: int = 20,
) -> VideoList:
    """Read lines `path label`, UTF-8; the label is what follows the last separator, so paths may contain it.

    Relative paths start from the folder `prefix`. Blank lines are skipped, and comments: lines that start with # and
    name no file that exists. check_files: a file that is missing is a problem. by_path: recognize a file by its path alone;
    no file is looked at, which takes minutes for a large list on a network file system.
    Errors: ListError naming all problems at once, each with its line, up to `max_problems`.
    """
    problems = Problems(max_problems)
    reading = _Reading(path, prefix, separator, num_classes, problems)
    for number, line in text_lines(path):
        reading.add(number, line)
    videos = reading.columns.videos(path, prefix, counted(reading.comments, "comment line"))
    _check_files(videos, problems, _path_identity if by_path else _identity, missing_allowed=not check_files or by_path)
    if require_all_classes and len(videos):
        _check_classes(videos, num_classes, problems)
    problems.raise_any(f"in the list {path}")
    if not len(videos):
        comments = f" but for {videos.left_out}" if videos.left_out else ""
        raise ListError(f"{path}: the list is empty{comments}; give one video per line: path{separator}label")
    return videos


def unlabelled(paths: Sequence[str], source: str) -> VideoList:
    """Files that are in no list; their label is -1. source: where the paths are from, for messages."""
    columns = Columns()
    for number, path in enumerate(paths, 1):
        if problem := unprintable(path):
            raise ListError(f"{source}:{number}: {shown(path)} {problem}; rename it")
        columns.add(path, -1, number)
    return columns.videos(source, "")


def unlistable(path: str) -> str:
    """Return why a path cannot be written into a list; "" if it can."""
    if problem := unprintable(path):
        return f"its path {problem}"
    if path != path.strip(BLANKS) or path.startswith("#"):
        return "its path begins with a space or #, or ends with a space"
    return ""


def counted(count: int, singular: str) -> str:
    """2, "line" -> "2 lines"; "" for none."""
    return f"{count} {singular}{'' if count == 1 else 's'}" if count else ""


class _Reading:
    """Lines become entries, comments or problems."""

    def __init__(self, source: str, prefix: str, separator: str, num_classes: int, problems: Problems) -> None:
        self.source, self.prefix, self.separator, self.num_classes = source, prefix, separator, num_classes
        self.columns, self.comments, self.problems = Columns(), 0, problems

    def add(self, number: int, raw: str) -> None:
        line = raw.strip(BLANKS)
        name, _, label = (part.strip(BLANKS) for part in line.rpartition(self.separator))
        if line.startswith("#") and not (self._exists(name) or self._exists(line)):
            self.comments += 1
        elif line:
            if problem := self._problem(raw, line, name, label):
                self.problems.add(number, f"{self.source}:{number}", problem)
            if name and _LABEL.fullmatch(label) and not unprintable(name):
                self.columns.add(expanded(name) if name.startswith("~/") else name, int(label), number)

    def _problem(self, raw: str, line: str, name: str, label: str) -> str:
        wanted = f"write path{self.separator}label"
        if not name:
            return f"no label in {shown(line)}; {wanted}"
        if problem := unprintable(name):
            return f"the path {shown(name)} {problem}; {wanted}, with LF or CRLF at the end of each line"
        if not _LABEL.fullmatch(label):
            return f"label {shown(label)} of {shown(name)} is not an integer of at most 18 digits 0 to 9; {wanted}"
        if not 0 <= int(label) < self.num_classes:
            allowed = f"0..{self.num_classes - 1}; MODEL.NUM_CLASSES is {self.num_classes}"
            return f"label {int(label)} of {shown(name)} is outside {allowed}"
        written = raw.rstrip(BLANKS).rpartition(self.separator)[0]
        if written != name and self._exists(written):
            return f"the file {shown(written)} exists, but blanks around a path are not part of it; rename the file"
        return ""

    def _exists(self, name: str) -> bool:
        path = _joined(self.prefix, member.tar if (member := member_of(name)) else name)
        return bool(name) and os.path.lexists(path)


def _check_files(videos: VideoList, problems: Problems, identify: _Identify, *, missing_allowed: bool) -> None:
    """Add the files that are missing and those that are listed twice. Each file, or archive, is looked at once."""
    archives: dict[str, os.stat_result] = {}
    hashes = np.empty(len(videos), np.int64)
    for index in range(len(videos)):
        identity, reason = identify(_joined(videos.prefix, videos.name(index)), archives)
        hashes[index] = hash(identity)
        if reason and not missing_allowed:
            path = videos.path(index)
            what = f"no file {shown(path, 300)} ({reason}){tried(path)}"
            text = f"{what}; check the path and the prefix {shown(videos.prefix, 300)}"
            problems.add(int(videos.lines[index]), videos.place(index), text)

    def same(one: int, other: int) -> bool:
        paths = (_joined(videos.prefix, videos.name(index)) for index in (one, other))
        return len({identify(path, archives)[0] for path in paths}) == 1

    for index, earlier in repeated(hashes, same):
        name, line = videos.name(index), videos.lines[earlier]
        text = f"{shown(name)} is listed already in line {line}"
        if videos.name(earlier) != name:
            text = f"{shown(name)} is the file {shown(videos.name(earlier))} of line {line}"
        problems.add(int(videos.lines[index]), videos.place(index), f"{text}; remove one of them")


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix and not name.startswith("/") else name


def _identity(path: str, archives: dict[str, os.stat_result]) -> tuple[Hashable, str]:
    """Return what a file is recognized by, whatever its spelling, and "" or why it cannot be read.

    Of a video in an archive: the archive and the place in it. archives: what is known of them, by path.
    """
    member = member_of(path)
    path, place = (member.tar, member.offset) if member else (path, -1)
    try:
        found = archives.get(path) or os.stat(path)  # noqa: PTH116  # a Path is slow
    except OSError as error:
        return (os.path.normpath(path), place), error.strerror or str(error)
    if member:
        archives[path] = found
    # Some network file systems number no files. The size guards against those that use a number twice.
    file = (found.st_dev, found.st_ino, found.st_size) if found.st_ino else os.path.normpath(path)
    return (file, place), "" if stat.S_ISREG(found.st_mode) else "Not a regular file"


def _path_identity(path: str, archives: dict[str, os.stat_result]) -> tuple[Hashable, str]:
    member = member_of(path)
    return (os.path.normpath(member.tar), member.offset) if member else os.path.normpath(path), ""


_Identify = Callable[[str, dict[str, os.stat_result]], tuple[Hashable, str]]


def repeated(hashes: np.ndarray, same: Callable[[int, int], bool]) -> Iterator[tuple[int, int]]:
    """Yield (index, first index) of entries that are in a list again.

    Compared by hash: a dictionary of a million names would be several times the size of the list itself. same: are
    two entries of equal hash the same?
    """
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    for index in np.flatnonzero(first[group] != np.arange(len(hashes))).tolist():
        earlier = int(first[group[index]])
        if same(earlier, index):
            yield index, earlier


def _check_classes(videos: VideoList, num_classes: int, problems: Problems) -> None:
    """Add the classes that have no video."""
    named = np.unique(videos.labels[(videos.labels >= 0) & (videos.labels < num_classes)])
    absent = np.setdiff1d(np.arange(num_classes), named).tolist()
    if absent:
        some = ", ".join(map(str, absent[:10])) + (f" and {len(absent) - 10} more" if len(absent) > 10 else "")
        text = f"MODEL.NUM_CLASSES is {num_classes} but the list names {len(named)} classes: no video for {some}"
        problems.add(math.inf, videos.source, f"{text}; correct the number or add videos of these classes")
