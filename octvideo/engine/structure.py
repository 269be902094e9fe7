"""What the entries of a file must be, written as tables; a check returns the first entry that is something else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Check = Callable[[Any, str], str]
"""(value, its place) -> "" if it is allowed, else "PLACE is ...; allowed: ..."."""


def leaf(allowed: str, fits: Callable[[Any], bool]) -> Check:
    """Return a check of a value without entries. allowed: what fits, for the message."""

    def check(value: Any, place: str) -> str:
        return "" if fits(value) else f"{place} is {shown(value)}; allowed: {allowed}"

    return check


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int)


count = leaf("an integer, 0 or more", lambda value: _is_integer(value) and 0 <= value < 1 << 63)
number = leaf("a number", _is_number)
positive = leaf("a finite number above 0", lambda value: _is_number(value) and 0 < value < math.inf)
flag = leaf("True or False", lambda value: isinstance(value, bool))
text = leaf("text", lambda value: isinstance(value, str))
tensor = leaf("a tensor", lambda value: isinstance(value, Tensor))


def list_of(check: Check, *, shortest: int = 0) -> Check:
    """Return a check of a list of at least `shortest` values."""

    def each(value: Any, place: str) -> str:
        if not isinstance(value, list) or len(value) < shortest:
            return f"{place} is {shown(value)}; allowed: a list" + (f" of {shortest} or more" if shortest else "")
        return next(filter(None, (check(entry, f"{place}[{index}]") for index, entry in enumerate(value))), "")

    return each


def dict_of(keys: type, check: Check) -> Check:
    """Return a check of a dict with any keys of one type, and values of one kind."""

    def each(value: Any, place: str) -> str:
        if not isinstance(value, dict):
            return f"{place} is {shown(value)}; allowed: a dict"
        for key, entry in value.items():
            if not isinstance(key, keys):
                return f"{place} has the key {shown(key)}; allowed: {_NAMES[keys]}"
            if problem := check(entry, f"{place}[{key!a:.80}]"):
                return problem
        return ""

    return each


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """Return a check of a dict with these entries. Others are allowed."""

    def each(value: Any, place: str) -> str:
        if not isinstance(value, dict):
            return f"{place} is {shown(value)}; allowed: a dict with {', '.join(required)}"
        return problem_of(value, required, optional or {}, f"{place}.")

    return each


def either(first: Check, second: Check) -> Check:
    """Return a check of a value that fits one of two; the message is that of the second."""
    return lambda value, place: first(value, place) and second(value, place)


def problem_of(
    entries: Mapping[str, Any], required: Mapping[str, Check], optional: Mapping[str, Check], place: str = ""
) -> str:
    """Return the first problem of the entries that the tables name; "" if there is none."""
    if missing := [name for name in required if name not in entries]:
        return f"{place}{missing[0]} is missing"
    tables = {**required, **optional}
    return next(filter(None, (tables[n](entries[n], f"{place}{n}") for n in tables if n in entries)), "")


def shown(value: Any) -> str:
    """Return what a value is, for a message: short, whatever it holds."""
    if value is None or isinstance(value, (bool, int, float)):
        return f"{value!r:.40}"
    if isinstance(value, str):
        return f"text {value[:40]!a}"
    if isinstance(value, Tensor):
        return f"a tensor of {tuple(value.shape)}"
    size = f" of {len(value)}" if isinstance(value, (list, tuple, dict)) else ""
    return f"a {type(value).__name__}{size}"


_NAMES = {int: "integers", str: "text"}
