"""Plain YAML of bounded size, each key once; `_BASE_` names the files that a file starts from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from octvideo.errors import UserError, plain, shown
from octvideo.files import PathError, expanded, open_regular, tried

MAX_BYTES = 2**18  # of a file
MAX_VALUES = 10_000  # of a file, where an alias counts as the values that it repeats
MAX_DEPTH = 20  # of values inside one another, and of files of which each names the next as its _BASE_
BASE = "_BASE_"

# What a scalar of each type may look like. YAML itself reads 010 as 8, 1:30 as 90 and 1_0 as 10.
_PLAIN = {
    "str": re.compile(r".*", re.DOTALL),
    "int": re.compile(r"[-+]?(0|[1-9][0-9]{0,17})"),
    "float": re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.IGNORECASE),
    "bool": re.compile(r"yes|no|true|false|on|off", re.IGNORECASE),
    "null": re.compile(r"|~|null", re.IGNORECASE),
}
_NUMBER = "is not a decimal number of at most 18 digits; write one, or put text in quotes"
_REMEDIES = {"int": _NUMBER, "float": _NUMBER, "timestamp": "is a date to YAML; put it in quotes if it is text"}
_TOO_DEEP = f"values are inside one another more than {MAX_DEPTH} times"


class YamlError(UserError, ValueError):
    """A file or text that is refused. problems: a line each, which begins with FILE:LINE where there is a file."""

    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(problems))


def read(path: str) -> dict[str, Any]:
    """Read a file over the files of its `_BASE_`: "SECTION.KEY" -> value.

    `_BASE_` is a path, or a list of paths, relative to the folder of the file that names it. Raises YamlError.
    """
    return _read(path, (), {})


def parse(text: str, source: str = "") -> Any:
    """Return the value of a YAML text. source: its file, for messages. Raises YamlError with all that is wrong."""
    if len(text) > MAX_BYTES:
        raise YamlError(f"{_place(source)}more than {MAX_BYTES} bytes, which no configuration needs")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        check = _Check(source)
        check.visit(node, "", ())
        if check.problems:
            raise YamlError(*check.problems)
        return loader.construct_document(node)
    except RecursionError:
        raise YamlError(f"{_place(source)}not plain YAML: {_TOO_DEEP}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise YamlError(f"{_place(source, mark.line + 1 if mark else 0)}not plain YAML: {plain(reason)}") from None


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values below a mapping with their full names, SECTION.KEY."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class _Check:
    """Collects what is refused in a text, before any of its values is made."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.problems: list[str] = []
        self._values = 0
        self._lines: dict[str, int] = {}  # full name of a key -> line

    def visit(self, node: Node, name: str, above: tuple[Node, ...]) -> None:
        """Check a value and what is inside it. name: its full name; above: the values that it is inside of."""
        self._values += 1
        if self._values > MAX_VALUES:
            raise YamlError(
                f"{_place(self.source)}more than {MAX_VALUES} values, where an alias counts as what it repeats"
            )
        if any(node is each for each in above):
            raise YamlError(f"{self._at(node)}an alias stands for a value that it is inside of")
        if len(above) > MAX_DEPTH:
            raise YamlError(f"{self._at(node)}{_TOO_DEEP}")
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, ScalarNode) and kind in (*_PLAIN, *_REMEDIES):
            if kind not in _PLAIN or not _PLAIN[kind].fullmatch(node.value):
                self._refuse(node, f"{shown(node.value)} {_REMEDIES.get(kind, f'is not of the type {kind}')}")
        elif isinstance(node, MappingNode) and kind == "map":
            for key, value in node.value:
                self.visit(value, self._key(key, name), (*above, node))
        elif isinstance(node, SequenceNode) and kind == "seq":
            for number, value in enumerate(node.value):
                self.visit(value, f"{name}[{number}]", (*above, node))
        else:
            self._refuse(
                node, f"not plain YAML: the type !{plain(kind)} is not allowed; use mappings, lists, text, numbers"
            )

    def _key(self, node: Node, section: str) -> str:
        """Check a key and return its full name."""
        if not isinstance(node, ScalarNode) or not node.tag.endswith(("2002:str", "2002:merge")):
            self._refuse(node, f"the key {shown(node.value)} is not text; put it in quotes")
            return f"{section}.?"
        name = f"{section}.{node.value}" if section else node.value
        line = node.start_mark.line + 1
        if name in self._lines:
            self._refuse(node, f"{plain(name)} is given already in line {self._lines[name]}; remove one of them")
        self._lines.setdefault(name, line)
        return name

    def _refuse(self, node: Node, text: str) -> None:
        self.problems.append(f"{self._at(node)}{text}")

    def _at(self, node: Node) -> str:
        return _place(self.source, node.start_mark.line + 1)


def _read(path: str, above: tuple[str, ...], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """above: the files that name this one as their base; known: what the files read so far hold, by their real path."""
    real = os.path.realpath(path)
    if real in above or len(above) >= MAX_DEPTH:
        chain = " -> ".join(Path(each).name for each in (*above, real))
        reason = "leads back to the same file" if real in above else f"leads through more than {MAX_DEPTH} files"
        raise YamlError(f"{BASE} {reason}: {plain(chain)}")
    if real not in known:
        tree = _load(path, is_base=bool(above))
        named = tree.pop(BASE, [])
        values: dict[str, Any] = {}
        for base in named if isinstance(named, list) else [named]:
            values |= _read(_base_of(path, base), (*above, real), known)
        known[real] = values | dict(flatten(tree))
    return known[real]


def _load(path: str, *, is_base: bool) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            text = file.read(4 * MAX_BYTES + 1).decode("utf-8-sig")  # a character has up to 4 bytes
    except FileNotFoundError:
        text = "no such file; configs of the project are under configs/"
        text = f"{BASE} names a file that does not exist" if is_base else text
        raise YamlError(f"{text}: {shown(path, 300)}{tried(path)}") from None
    except OSError as error:
        raise YamlError(f"{path}: cannot be read ({error.strerror}){tried(path)}") from None
    except UnicodeDecodeError as error:
        raise YamlError(f"{path}: byte {error.start} is 0x{error.object[error.start]:02x}, not UTF-8 text") from None
    tree = parse(text, path)
    if not isinstance(tree, dict):
        raise YamlError(f"{path}: not a mapping of sections (MODEL:, DATA:, ...)")
    return tree


def _base_of(path: str, base: object) -> str:
    if not isinstance(base, str) or not base:
        raise YamlError(f"{path}: {BASE} is {shown(base)}; allowed: a path or a list of paths")
    try:
        return str(Path(path).parent / expanded(base))
    except PathError as error:
        raise YamlError(f"{path}: {BASE} {error}") from None


def _place(source: str, line: int = 0) -> str:
    """Return the beginning of a message: FILE:LINE, or nothing for a text that is in no file."""
    return f"{source}:{line}: " if source and line else f"{source}: " if source else ""
