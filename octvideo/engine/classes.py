"""Names of classes and their order: label 17 must mean the same to a network and to the list it is tested on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from octvideo.errors import RunError

FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last four: the same, full width
SHOWN = 3  # positions, or names, that a message lists


class ClassOrderError(RunError, ValueError):
    """Two sets of class names that should be one; the message names the first places where they differ."""


def class_key(name: str) -> str:
    """What the names of a class in csv, label maps, folders and checkpoints have in common: letters and digits."""
    return "".join(filter(str.isalnum, name.casefold()))


def csv_cell(value: Any) -> Any:
    """Return a value as the cell of a csv file: an apostrophe before text that a spreadsheet would run as a formula.

    `class_key` is the same with and without it.
    """
    is_formula = isinstance(value, str) and value.lstrip().startswith(FORMULA)
    return f"'{value}" if is_formula else value


def check_class_order(
    of_checkpoint: Sequence[str],
    of_data: Sequence[str],
    where: str,
    *,
    whose: tuple[str, str] = ("the checkpoint", "the data"),
) -> None:
    """Raise ClassOrderError unless both name the same classes in the order of the labels, compared by `class_key`.

    Where one of them gives no names (empty) there is nothing to compare. where: what the message begins with, a file.
    whose: what the message calls the two.
    """
    ours, theirs = ([class_key(name) for name in names] for names in (of_checkpoint, of_data))
    if not ours or not theirs or ours == theirs:
        return
    a, b = whose
    if len(ours) != len(theirs):
        lines = [f"{len(ours)} classes in {a}, {len(theirs)} in {b}"]
    else:
        differ = [label for label in range(len(ours)) if ours[label] != theirs[label]]
        lines = [f"{len(differ)} of {len(ours)} labels mean something else in {a} than in {b}"]
        lines += [
            f"label {label}: {of_checkpoint[label]!r} in {a}, {of_data[label]!r} in {b}" for label in differ[:SHOWN]
        ]
    if Counter(ours) == Counter(theirs):
        lines.append(
            "the same classes in another order: make the lists with the label map that the network was trained by"
        )
    else:
        lines.append(
            f"other classes: only {a} has {_some(of_checkpoint, theirs)}; only {b} has {_some(of_data, ours)}; "
            "test on lists of the classes that the network was trained on"
        )
    raise ClassOrderError(f"{where}: " + "\n  ".join(lines))


def _some(names: Sequence[str], keys_of_others: Sequence[str]) -> str:
    """The first of the names that the others lack."""
    others = set(keys_of_others)
    lacking = [name for name in names if class_key(name) not in others]
    more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
    return ", ".join(map(repr, lacking[:SHOWN])) + more if lacking else "none of its own"
