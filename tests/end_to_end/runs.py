"""tools/run_net.py in processes of its own, on a small motion set."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from octvideo.engine import checkpoint
from tests.torture.compare import differences

ROOT = Path(__file__).parents[2]
STEPS = 32  # of a Run


def check_same(one: Path, other: Path) -> None:
    found = checkpoint.latest(one)
    assert found is not None
    assert found[1]["step"] == STEPS
    assert differences(one, other) == []


class Run:
    """tools/run_net.py in processes of its own: 16 videos in batches of 4, 8 epochs, a checkpoint every 3 steps."""

    def __init__(self, data: Path, out: Path, processes: int = 1, *more: str) -> None:
        self.out, self.processes = out, processes
        lists = ["DATA.TRAIN_LIST", f"{data}/train.txt", "DATA.VAL_LIST", f"{data}/val.txt", "DATA.PREFIX", str(data)]
        small = ["DATA.TRAIN_SHORT_SIDE", "[36, 40]", "DATA.TRAIN_CROP", "32", "DATA.TEST_SHORT_SIDE", "36"]
        small += ["DATA.TEST_CROP", "32", "DATA.NUM_FRAMES", "4", "DATA.NUM_WORKERS", "1", "NUM_THREADS", "1"]
        train = ["TRAIN.BATCH_SIZE", "4", "TRAIN.EPOCHS", "8", "TRAIN.LOG_PERIOD", "2", "TRAIN.CHECKPOINT_STEPS", "3"]
        train += ["TRAIN.CHECKPOINT_PERIOD", "3", "TRAIN.RESUME", "auto", "TRAIN.MIXUP", "0.2", "MODEL.DROPOUT", "0.5"]
        train += ["TRAIN.EMA_DECAY", "0.9", "TRAIN.PRECISE_NORM_BATCHES", "2"]
        train += ["TRAIN.VAL_PERIOD", "4", "TEST.ENABLE", "False", "SOLVER.WARMUP_EPOCHS", "1", "DEVICE", "cpu"]
        cfg = ["--cfg", str(ROOT / "configs/motion/oct_i3d_tiny.yaml"), "OUTPUT_DIR", str(out)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        self.arguments = [*cfg, *lists, *small, *train, *more]
        script = [str(ROOT / "tools/run_net.py"), *self.arguments]
        self.command = [sys.executable, *(launcher if processes > 1 else []), *script]

    def start(self) -> subprocess.Popen:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            self.command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def finish(self) -> str:
        process = self.start()
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
        return said

    def steps(self) -> int:
        """Training steps that the history has by now."""
        path = self.out / "metrics.jsonl"
        return path.read_text().count('"event": "train"') * 2 if path.exists() else 0

    def signalled(self, number: int, at: int, delay: float = 0.0) -> tuple[int, str, float]:
        """Started, and signalled when the history has `at` steps, and `delay` seconds later: status, output, seconds."""
        process = self.start()
        while self.steps() < at and process.poll() is None:
            time.sleep(0.002)
        time.sleep(delay)
        sent = time.monotonic()
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)  # every process of it, as a power cut would
        else:
            process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said, time.monotonic() - sent
