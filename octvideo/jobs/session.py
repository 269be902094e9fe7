"""What a job holds while it runs: its output folder, and the signals that ask it to stop."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from fvcore.common.config import CfgNode

from octvideo.engine.distributed import World, gather_objects
from octvideo.engine.run_lock import FolderLock
from octvideo.engine.stop import StopRequest
from octvideo.errors import RunError


@contextlib.contextmanager
def session(cfg: CfgNode, world: World) -> Iterator[StopRequest]:
    """Lock OUTPUT_DIR for this run and note signals that ask it to stop; called by all ranks.

    Raises FolderInUseError on all ranks if another run writes to the folder, WriteError if it cannot be written.
    """
    with StopRequest() as stop, contextlib.ExitStack() as held:
        problem: RunError | None = None
        if world.main:
            try:
                lock = held.enter_context(FolderLock(Path(cfg.OUTPUT_DIR)))
                if lock.note:
                    print(lock.note, file=sys.stderr)
            except RunError as error:
                problem = error
        if problem := gather_objects(problem)[0]:
            raise problem
        yield stop
