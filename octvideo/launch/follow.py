"""Follow a SLURM job: print its logs and its states until it has ended."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from octvideo.launch.request import LaunchError

_GOING_ON = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING",
             "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}  # fmt: skip


def follow_job(job_id: str, folder: Path, count: int) -> int:
    """Print a job's logs and states until it has ended. Return 0 if each of its tasks is complete, else 1."""
    names = [f"{job_id}_{number}" for number in range(count)] if count > 1 else [job_id]
    shown = [] if count > 1 else [_Tail(folder / f"{job_id}_0_log.{end}") for end in ("out", "err")]
    states: dict[str, str] = {}
    failures: set[Path] = set()
    asked = -1e9
    try:
        while True:
            over = len(states) == count and all(state not in _GOING_ON for state in states.values())
            for tail in shown:
                tail.show()
            for note in sorted(set(folder.glob("*_failed")) - failures):
                failures.add(note)
                _show_failure(note, streamed=count == 1)
            if over:
                return 0 if set(states.values()) == {"COMPLETED"} else 1
            if time.monotonic() - asked > 2:
                for name, state in _states(job_id, names).items():
                    if states.get(name) != state:
                        print(f"job {name}: {state.lower()}", flush=True)
                    states[name] = state
                asked = time.monotonic()
            time.sleep(0.2)
    except KeyboardInterrupt:
        print(f"no longer followed; the job goes on. scancel {job_id} ends it", file=sys.stderr)
        return 130


class _Tail:
    """What is new in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.place = path, 0

    def show(self) -> None:
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self.place)
                text = file.read()
            self.place += len(text)
            print(text.decode(errors="replace"), end="", flush=True)


def _show_failure(note: Path, streamed: bool) -> None:
    """The end of what the rank that failed first had to say, where that was not shown already."""
    rank, job = note.read_text().strip(), note.name.rsplit("_", 2)[0]
    print(f"job {job}: rank {rank} failed", file=sys.stderr)
    if rank != "0" or not streamed:
        time.sleep(0.5)  # its last words
        log = note.with_name(f"{job}_{rank}_log.err")
        last = log.read_text(errors="replace").splitlines()[-40:] if log.exists() else []
        print("\n".join([f"{log}:", *last]), file=sys.stderr, flush=True)


def _states(job_id: str, names: Sequence[str]) -> dict[str, str]:
    """Name -> state. squeue knows jobs until some minutes after their end, accounting those of before."""
    asks = (
        ["squeue", "--noheader", "--array", "--states=all", "--jobs", job_id, "--format=%i|%T"],
        ["sacct", "--noheader", "--allocations", "--array", "--parsable2", "--jobs", job_id, "--format=JobID,State"],
    )
    said = ""
    for _ in range(30):  # controllers are restarted, too
        for command in asks:
            done = subprocess.run(command, capture_output=True, text=True)
            rows = [line.strip().split("|") for line in done.stdout.splitlines()]
            if found := {row[0]: row[1].split()[0] for row in rows if len(row) == 2 and row[0] in names and row[1]}:
                return found
            said = done.stderr.strip() or said
        time.sleep(2)
    raise LaunchError(f"SLURM knows nothing of job {job_id} any more: {said or 'no answer'}")
