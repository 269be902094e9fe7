"""Scalars for TensorBoard, written by the calling thread: a full disk is an OSError there, not the end of another thread."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from octvideo.files import HOST

_NAME = "events.out.tfevents"


class Board:
    """An event file in `folder`. purge_step: TensorBoard drops the points of earlier files from this step on.

    TensorBoard reads files in the order of their names, which begin with a second: that of this file is after all others,
    also if they were made within this second or the clock was set back. Raises OSError if the file cannot be written.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stamps = [path.name.removeprefix(f"{_NAME}.").split(".")[0] for path in folder.glob(f"{_NAME}.*")]
        second = max([int(time.time()), *(int(stamp) + 1 for stamp in stamps if stamp.isdecimal())])
        self._file = (folder / f"{_NAME}.{second:010d}.{HOST}.{os.getpid()}").open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            self._write(Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def add(self, name: str, value: float, step: int, when: float) -> None:
        """Add a point to the curve `name`. when: seconds since 1970."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
        self._write(Event(wall_time=when, step=step, summary=summary))

    def flush(self) -> None:
        """Write what is buffered."""
        self._records.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._records.close()

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
