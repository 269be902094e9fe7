"""Values of configuration keys: from what YAML or an override holds to a value of the key's type, or why there is none."""

from __future__ import annotations

import math
import re
from typing import Any

from octvideo.errors import shown
from octvideo.files import PathError, expanded, unprintable

SWITCHES = {"MODEL.COMPILE": {False: "off", True: "default"}}
"""Keys that were True or False in earlier versions -> what these values mean."""

PATHS = frozenset(
    [
        *("OUTPUT_DIR", "DATA.TRAIN_LIST", "DATA.VAL_LIST", "DATA.TEST_LIST", "DATA.PREFIX", "DATA.CLASS_NAMES"),
        *("TRAIN.RESUME", "TRAIN.INIT", "TEST.CHECKPOINT"),
    ]
)
"""Keys that name a file or folder: a leading ~ is the home folder."""

LARGEST = 2**31 - 1  # integer of every key but SEED, which has up to 18 digits
_DECIMAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


def value_of(key: str, given: Any, default: Any) -> tuple[Any, str]:
    """Return the value of a key, and "" or why there is none, to follow the key in a message. given: as YAML has it."""
    try:
        value = coerced(key, given, default)
    except ValueError:
        kind = {bool: "True or False", int: "an integer", float: "a number", str: "text", list: "a list of numbers"}
        return None, f"is {shown(given, 200)}, of type {type(given).__name__}; allowed: {kind[type(default)]}"
    try:
        value = expanded(value) if key in PATHS else value
        problem = _unfit(key, value)
    except PathError as error:
        problem = f", which {error.reason}"
    return value, f"is {shown(value, 200)}{problem}" if problem else ""


def coerced(key: str, value: Any, default: Any) -> Any:
    """Return the value as the default's type, or raise ValueError. YAML reads 1e-4 as text and `30` as an integer."""
    value = _current(key, value)
    if isinstance(default, float):
        return float(_number(value))
    if isinstance(default, list) and isinstance(value, list | tuple):
        return [_number(each) for each in value]
    if isinstance(default, str) and type(value) is int:
        return str(value)  # a folder called 2024
    if isinstance(default, str) and value is None:
        return ""
    if type(value) is not type(default):
        raise ValueError(value)
    return value


def _number(value: Any) -> int | float:
    if isinstance(value, str) and _DECIMAL.fullmatch(value):
        return float(value)
    if type(value) not in (int, float):
        raise ValueError(value)
    return value


def _current(key: str, value: Any) -> Any:
    """Translate a value of an earlier version (`SWITCHES`); YAML reads `off` as False too."""
    if key not in SWITCHES or not isinstance(value, bool | str):  # a saved file may hold lists that no memory can print
        return value
    meanings = {str(old): new for old, new in SWITCHES[key].items()}
    return meanings.get(str(value).capitalize(), value)


def _unfit(key: str, value: Any) -> str:
    """Return why the key cannot have a value of its type, to follow the value in a message; "" if it can."""
    if isinstance(value, str):
        problem = unprintable(value.replace("\t", "") if key == "DATA.SEPARATOR" else value)
        return f", which {problem}" if problem else ""
    numbers = value if isinstance(value, list) else [value]
    if not all(math.isfinite(number) for number in numbers):
        return "; allowed: finite numbers"
    if key != "SEED" and any(isinstance(number, int) and abs(number) > LARGEST for number in numbers):
        return f"; allowed: at most {LARGEST}"
    return ""
