"""What a run says: one JSON line per event, the same numbers to TensorBoard, lines and a live bar for a person."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from octvideo.errors import RunError
from octvideo.files import write_atomic


class LogError(RunError, RuntimeError):
    """The history of a run cannot be written (disk full, no permission)."""


class Log:
    """metrics.jsonl and TensorBoard in `folder`; writes on the main rank only.

    step: the step that training goes on from (0: a start); events of later steps, left by a run that died, are taken
    out, so that the history has each step once. None adds to the history as it is. in_epoch: that step is within an
    epoch, or its last one, so what was said at the epoch's end will be said again.
    """

    def __init__(self, folder: Path, *, main: bool, step: int | None = None, in_epoch: bool = False) -> None:
        self.main = main
        self.path = folder / "metrics.jsonl"
        self.board: SummaryWriter | None = None
        if main:
            with self._written():
                folder.mkdir(parents=True, exist_ok=True)
                if step is None:
                    self._end_line()
                else:
                    self._forget_after(step, in_epoch)
                purge_step = None if step is None else step + 1
                self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def _end_line(self) -> None:
        """A line that a kill cut off must not swallow the next one."""
        if self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            with self.path.open("a") as file:
                file.write("\n")

    def _forget_after(self, step: int, in_epoch: bool) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text().splitlines(keepends=True)
        again = ("epoch", "val") if in_epoch else ()
        places = [(line, *_place_of(line)) for line in lines]
        kept = [line for line, at, kind in places if step and (at < step or (at == step and kind not in again))]
        write_atomic(self.path, "".join(kept).encode())

    def event(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line {"event": kind, "step": step, "time": seconds since 1970, ...values}."""
        if not self.main or self.board is None:
            return
        record = {"event": kind, "step": step, "time": round(time.time(), 3), **values}
        with self._written():
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self.board.add_scalar(f"{kind}/{name}", value, step)

    def step_line(self, step: int, values: dict[str, float]) -> None:
        """The numbers of a training event as a line, where no live bar shows them (a file, a cluster's log)."""
        if not has_terminal():
            self.say(
                f"step {step}, epoch {values['epoch']:.2f}: loss {values['loss']:.4f}, top-1 {values['top1']:.1f} %, "
                f"lr {values['lr']:.4g}, {values['step_s']:.3f} s/step, {values['clips_per_s']:.1f} clips/s, "
                f"data wait {100 * values['data_wait']:.0f} %, {values['memory_gb']:.2f} GB"
            )

    def say(self, line: str) -> None:
        """A line for the person, above a live bar if there is one."""
        if self.main:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def flush(self) -> None:
        """Put what TensorBoard holds back on the disk; metrics.jsonl is there already."""
        if self.board is not None:
            self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            with self._written():
                self.board.close()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LogError(
                f"{self.path.parent}: the run's history cannot be written ({error}); checkpoints are not harmed"
            ) from error


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


def _place_of(line: str) -> tuple[int, str]:
    """Step and kind of a line of metrics.jsonl; a line cut off by a kill sorts behind everything, so it is dropped."""
    try:
        record = json.loads(line)
        return int(record["step"]), str(record["event"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize, ""
