"""A trace of some training steps: for https://ui.perfetto.dev or chrome://tracing, and a table of what took longest."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from octvideo.engine.log import Log
from octvideo.files import write_atomic

SKIPPED, WARMUP = 3, 2  # steps before those recorded: memory and kernels find their place first


class StepProfiler(profile):
    """Records `steps` training steps behind the first five of the process; `step()` belongs behind each.

    Leaves FOLDER/rank_R.json.gz and the table rank_R.txt, of this rank's process (its decoding workers are others).
    """

    def __init__(self, steps: int, folder: Path, rank: int, device: torch.device, log: Log) -> None:
        self.folder, self.rank, self.device_type, self.log = folder, rank, device.type, log
        gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        super().__init__(
            activities=[ProfilerActivity.CPU, *gpu],
            schedule=schedule(wait=SKIPPED, warmup=WARMUP, active=steps, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
        )

    def _write(self, recorded: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank_{self.rank}.json.gz"
        unfinished = path.with_name(f".{path.name}")  # the writer looks at the ending
        recorded.export_chrome_trace(str(unfinished))
        unfinished.replace(path)
        table = recorded.key_averages().table(sort_by=f"self_{self.device_type}_time_total", row_limit=30)
        write_atomic(self.folder / f"rank_{self.rank}.txt", table.encode())
        self.log.say(
            f"profile: {path} (open it in ui.perfetto.dev) and the table {path.parent / f'rank_{self.rank}.txt'}"
        )
