"""predictions.json: what several calls predicted with one network, each file once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octvideo.files import write_atomic

Entry = dict[str, Any]


class Predictions:
    """The predictions in one file, to which each call adds its own.

    header: plain values that describe the network and its views. If the file that is there has other ones, or cannot be
    read, it is kept under another name, and a new file is begun.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path, self.header = path, json.loads(json.dumps(header))
        # name of outputs -> absolute path of the file that they show
        self.owners = {entry["name"]: _file_of(entry) for entry in self._earlier()["videos"] if "name" in entry}

    def output_names(self, files: Sequence[str]) -> list[str]:
        """Return how the outputs of each file begin: its name without the ending, numbered if another file has that name.

        A file that was predicted before has the name that it had.
        """
        names: list[str] = []
        for file in files:
            name, number = Path(file).stem, 2
            while name in names or self.owners.get(name, _absolute(file)) != _absolute(file):
                name, number = f"{Path(file).stem}_{number}", number + 1
            names.append(name)
        return names

    def write(self, videos: Sequence[Entry], failed: Sequence[Entry]) -> list[str]:
        """Add entries, each with "path", in place of earlier ones of the same file. Return what the user should know."""
        earlier, notes = self._earlier(), []
        if self.path.exists() and not self._is_ours(earlier):
            kept = _free_name(self.path)
            self.path.rename(kept)
            notes.append(f"{self.path} was of another network, checkpoint or views: kept as {kept}")
        new = {_file_of(entry) for entry in (*videos, *failed)}
        content: dict[str, Any] = dict(self.header)
        for key, entries in {"videos": videos, "failed": failed}.items():
            content[key] = [*(entry for entry in earlier[key] if _file_of(entry) not in new), *entries]
        if replaced := sum(_file_of(entry) in new for entry in earlier["videos"]):
            notes.append(f"replaced the earlier predictions of {replaced} file{'s' * (replaced > 1)}")
        write_atomic(self.path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
        if others := len(content["videos"]) - len(videos):
            notes.append(f"{self.path} has {others} more from earlier calls")
        return notes

    def _earlier(self) -> dict[str, Any]:
        """Return the content of the file if it has this header, else one without entries."""
        nothing: dict[str, Any] = {"videos": [], "failed": []}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return nothing
        return content if self._is_ours(content) else nothing

    def _is_ours(self, content: Any) -> bool:
        if not isinstance(content, dict) or {key: content.get(key) for key in self.header} != self.header:
            return False
        lists = [content.get("videos"), content.get("failed")]
        return all(isinstance(each, list) and all(map(_is_entry, each)) for each in lists)


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("path"), str) and isinstance(value.get("name", ""), str)


def _file_of(entry: Entry) -> str:
    """Return the absolute path of an entry's file, which "path" gives as the command line did."""
    return str(entry.get("file") or _absolute(entry["path"]))


def _absolute(file: str) -> str:
    return str(Path(file).resolve())


def _free_name(path: Path) -> Path:
    number = 1
    while (free := path.with_name(f"{path.stem}_{number}{path.suffix}")).exists():
        number += 1
    return free
