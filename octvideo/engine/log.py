"""The record of a run: metrics.jsonl, a JSON line per event; TensorBoard; log.txt; printed lines and a live bar."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from octvideo import streams
from octvideo.engine.board import Board
from octvideo.files import WriteError, append, write_atomic, write_error

_LAST = sys.maxsize  # the step of a line that is no event


class Log:
    """metrics.jsonl, log.txt and TensorBoard in `folder`; writes on the main rank only.

    step: the step that training resumes from (0: a start). Events of later steps, which a killed run left, are removed, so
    that the history has each event once, and so are events of the kinds `again` at this step, which will be repeated.
    None adds to the history without a change to it.
    """

    def __init__(self, folder: Path, *, main: bool, step: int | None = None, again: Collection[str] = ()) -> None:
        self.main = main
        self.path, self.text = folder / "metrics.jsonl", folder / "log.txt"
        self.board: Board | None = None
        self._pending: list[dict[str, Any]] = []
        self._unwritten = ""
        self._complained: set[str] = set()
        if not main:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            here = self._forget_after(step, again) if step is not None else self._end_line()
        except OSError as error:
            raise write_error(self.path, error, "nothing was started") from error
        with self._board_errors():
            self.board = Board(folder / "tensorboard", purge_step=step)
            for record in here:  # TensorBoard drops all points of this step
                self._to_board(record)

    def _end_line(self) -> list[dict[str, Any]]:
        """End a line that a kill cut off, so that it does not swallow the next one."""
        if self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            append(self.path, "\n")
        return []

    def _forget_after(self, step: int, again: Collection[str]) -> list[dict[str, Any]]:
        """Remove events that will be repeated; return those of `step` that stay."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        events = [_event_of(line) for line in lines]
        kept = [
            (line, event)
            for line, event in zip(lines, events, strict=True)
            if step and (event["step"] < step or (event["step"] == step and event["event"] not in again))
        ]
        write_atomic(self.path, b"".join(line for line, _ in kept))
        unread = sum(event["step"] == _LAST for event in events[:-1])
        if unread:
            self.say(f"{self.path}: {unread} line(s) that are not events were removed")
        return [event for _, event in kept if event["step"] == step]

    def event(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write one line {"event": kind, "step": step, "time": seconds since 1970, ...values}, after the noted ones.

        A line that cannot be written (disk full) is kept and written with a later one; `flush` insists.
        """
        self.note(kind, step, values)
        self._write_noted()

    def note(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Keep an event until the next `event` or `flush`, which writes all that were noted in the order of their steps.

        Ranks and the device report some events of past steps late; their order must not depend on when they do.
        """
        if self.main:
            self._pending.append({"event": kind, "step": step, "time": round(time.time(), 3), **values})

    def _write_noted(self) -> None:
        records, self._pending = sorted(self._pending, key=lambda record: record["step"]), []
        self._unwritten += "".join(json.dumps(record) + "\n" for record in records)
        for record in records:
            self._to_board(record)
        with contextlib.suppress(WriteError):
            try:
                self._append()
            except WriteError as error:
                self._complain("metrics", f"{error}; its new lines are kept in memory until it can be written")
                raise

    def _append(self) -> None:
        if self._unwritten:
            append(self.path, self._unwritten)
            self._unwritten = ""

    def _to_board(self, record: dict[str, Any]) -> None:
        if self.board is None:
            return
        when = record["time"] if isinstance(record["time"], float) else time.time()
        with self._board_errors():
            for name, value in record.items():
                if isinstance(value, int | float) and not isinstance(value, bool) and name not in ("step", "time"):
                    self.board.add(f"{record['event']}/{name}", value, record["step"], when)

    def step_line(self, step: int, values: dict[str, Any]) -> None:
        """Print the numbers of a training event where no live bar shows them (a file, a cluster's log)."""
        if not has_terminal():
            self.say(
                f"step {step}, epoch {values['epoch']:.2f}: {losses(values, 4)}, lr {values['lr']:.4g}, "
                f"{values['step_s']:.3f} s/step, {values['clips_per_s']:.1f} clips/s, "
                f"data wait {100 * values['data_wait']:.0f} %, {values['memory_gb']:.2f} GB"
            )

    def say(self, line: str) -> None:
        """Print a line, above a live bar if there is one, and add it to log.txt."""
        if not self.main:
            return
        self._to_text(line)
        try:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError) as error:  # of a program that does not guard its streams
            streams.lost.setdefault("standard output", str(error))
        for name, why in streams.lost.items():
            if name not in self._complained:
                self._complained.add(name)
                self._to_text(f"{name} cannot be written any more ({why}); the run continues, its lines are here")

    def _to_text(self, line: str) -> None:
        with contextlib.suppress(WriteError):  # metrics.jsonl is the record, and its error is the message
            append(self.text, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def _complain(self, what: str, line: str) -> None:
        if what not in self._complained:
            self._complained.add(what)
            self.say(f"warning: {line}")

    def flush(self) -> None:
        """Write everything that is kept, as a checkpoint requires: a resumed run does not repeat it. Raises WriteError."""
        if self.main:
            self._write_noted()
            self._append()
        if self.board is not None:
            with self._board_errors():
                self.board.flush()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Close; after another error, that one is the message."""
        with contextlib.suppress(WriteError) if error else contextlib.nullcontext():
            self.close()

    def close(self) -> None:
        self.flush()
        if self.board is not None:
            with self._board_errors():
                self.board.close()

    @contextlib.contextmanager
    def _board_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            board, self.board = self.board, None
            with contextlib.suppress(OSError):
                if board is not None:
                    board.close()
            self._complain("board", f"TensorBoard is not written any more ({error}); {self.path} has all numbers")


def read_events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The events of a metrics.jsonl, and how many of its lines are none: a kill may cut one off."""
    events = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict):
                events.append(event)
    return events, len(lines) - len(events)


def training_history(folders: Sequence[Path]) -> tuple[list[dict[str, Any]], str]:
    """The events of the first of these folders that tells of a training, and a sentence on where they are from, or why
    there are none."""
    paths = [folder / "metrics.jsonl" for folder in dict.fromkeys(folders)]
    for path in paths:
        try:
            events, broken = read_events(path) if path.is_file() else ([], 0)
        except OSError as error:
            return [], f"{path} cannot be read ({error})."
        if any(event.get("event") in ("train", "epoch", "val") for event in events):  # a test leaves events as well
            lines = f"; lines of it that cannot be read, left out: {broken}" if broken else ""
            return events, f"From {path}{lines}."
    return [], f"no training is told of in {' or '.join(map(str, paths))}."


def bar(total: int, title: str, *, unit: str, main: bool) -> tqdm:
    """A live bar on the main rank's terminal; silent where standard error is a file or a pipe."""
    hidden = not main or not has_terminal()
    return tqdm(total=total, desc=title, unit=unit, disable=hidden, leave=False, dynamic_ncols=True)


def has_terminal() -> bool:
    return sys.stderr.isatty()


def duration(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def losses(values: dict[str, Any], digits: int) -> str:
    """Return the loss and accuracy of a training event as text; they are None if every step was skipped."""
    if values["loss"] is None:
        return "every step skipped"
    return f"loss {values['loss']:.{digits}f}, top-1 {values['top1']:.1f} %"


def _event_of(line: bytes) -> dict[str, Any]:
    """Return the event of a line of metrics.jsonl; a line that is none, such as one that a kill cut off, has step _LAST."""
    with contextlib.suppress(ValueError, RecursionError):
        event = json.loads(line)
        if isinstance(event, dict) and isinstance(event.get("step"), int) and isinstance(event.get("event"), str):
            return {"time": None, **event}
    return {"event": "", "step": _LAST}
