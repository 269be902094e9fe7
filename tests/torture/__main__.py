"""Interrupt training at random moments, resume it until it ends, and compare everything with an undisturbed run.

    python -m tests.torture --runs 200

Each run of a setting is interrupted up to three times: killed at a random moment, killed inside a file-system call of its
output folder (with half of a write done), or asked to stop by a signal. Exit status 1 if any result differs.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch._dynamo  # noqa: F401  # torch imports it at its first network, which takes every forked process 2 s

from datasets import motion
from octvideo import command
from tests.torture.compare import differences
from tests.torture.killed_calls import KilledCalls
from tools import run_net

ROOT = Path(__file__).parents[2]
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PATIENCE_S = 300.0  # of a start that does not end by itself


@dataclass(frozen=True)
class Setting:
    """A configuration to interrupt. processes: ranks. damaged: some training clips cannot be decoded."""

    overrides: tuple[str, ...] = ()
    processes: int = 1
    damaged: bool = False


EVERYTHING = (
    *("TRAIN.EMA_DECAY", "0.9", "TRAIN.MIXUP", "0.2", "TRAIN.CUTMIX", "1.0", "DATA.RANDAUGMENT_OPS", "2"),
    *("TRAIN.PRECISE_NORM_BATCHES", "2", "TRAIN.ACCUMULATE", "2", "TRAIN.CHECKPOINT_ACTIVATIONS", "True"),
    *("TRAIN.LABEL_SMOOTHING", "0.1", "SOLVER.CLIP_NORM", "5.0", "DATA.RANDAUGMENT_STD", "0.5"),
)
SETTINGS = {
    "plain": Setting(),
    "everything": Setting(EVERYTHING),
    "float16": Setting(("TRAIN.DTYPE", "float16", "TRAIN.MAX_NONFINITE", "100")),
    "damaged": Setting(("DATA.MAX_FAILED_FRACTION", "0.9"), damaged=True),
    "workers": Setting(("DATA.NUM_WORKERS", "2")),
    "processes": Setting(("TRAIN.SYNC_NORM", "True", "TRAIN.EMA_DECAY", "0.9"), processes=2),
    "each step": Setting(("TRAIN.CHECKPOINT_STEPS", "1")),
    "keep one": Setting(("TRAIN.CHECKPOINT_STEPS", "2", "TRAIN.KEEP_CHECKPOINTS", "1")),
}


@dataclass
class Trial:
    """A setting in a separate folder. events: what was done to it, in words."""

    setting: Setting
    data: Path
    out: Path
    seed: int
    events: list[str] = field(default_factory=list)

    def start(self, kill_at: int = 0, stop: tuple[int, float] | None = None) -> int:
        """Run until the end, and return the exit status of rank 0 (-9: killed).

        kill_at: number of the file-system call of rank 0 to be killed in. stop: signal to send, after so many seconds.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [self._fork(rank, port, kill_at) for rank in range(self.setting.processes)]
        if stop:
            time.sleep(stop[1])
            for pid in ranks:
                _signal(pid, stop[0])
        return self._wait(ranks)

    def _fork(self, rank: int, port: int, kill_at: int) -> int:
        if pid := os.fork():
            return pid
        status = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, command.end_quietly)  # as octvideo.starting does for a program
            if self.setting.processes > 1:
                world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.setting.processes, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in world.items()}, MASTER_ADDR="127.0.0.1")
            lines = os.open(self.out.with_suffix(f".{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(lines, 1)
            os.dup2(lines, 2)
            calls = KilledCalls(self.out, kill_at, random.Random(self.seed))
            if rank == 0 and kill_at:
                calls.install()
            status = run_net.main(self.arguments())
        except BaseException:  # noqa: BLE001  # this process must not return
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            if kill_at:
                self.calls.write_text(str(calls.count))
            os._exit(status)

    @property
    def calls(self) -> Path:
        """Where a start leaves its number of file-system calls, if they were counted."""
        return self.out.with_suffix(".calls")

    def _wait(self, ranks: list[int]) -> int:
        """Return rank 0's status. After the first rank has failed the others have seconds to end."""
        statuses: dict[int, int] = {}
        end = time.monotonic() + PATIENCE_S
        while len(statuses) < len(ranks):
            for pid in set(ranks) - statuses.keys():
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
                    end = min(end, time.monotonic() + 20) if statuses[pid] else end
            if time.monotonic() > end:
                for pid in set(ranks) - statuses.keys():
                    _signal(pid, signal.SIGKILL)
            time.sleep(0.005)
        return statuses[ranks[0]]

    def arguments(self) -> list[str]:
        """16 videos in batches of 4, 3 epochs, validation, a checkpoint every 3 steps, and a test."""
        lists = [f"DATA.{kind}_LIST {self.data}/{name}.txt" for kind, name in (("TRAIN", "train"), ("VAL", "val"))]
        small = "DATA.TRAIN_SHORT_SIDE [36,40] DATA.TRAIN_CROP 32 DATA.TEST_SHORT_SIDE 36 DATA.TEST_CROP 32"
        train = (
            "TRAIN.BATCH_SIZE 4 TRAIN.EPOCHS 3 TRAIN.LOG_PERIOD 2 TRAIN.CHECKPOINT_STEPS 3 TRAIN.CHECKPOINT_PERIOD 1"
        )
        more = "TRAIN.VAL_PERIOD 2 TEST.CLIPS 2 TEST.CROPS 1 SOLVER.WARMUP_EPOCHS 1 MODEL.DROPOUT 0.5 DEVICE cpu"
        more += " DATA.NUM_FRAMES 4 NUM_THREADS 1 DATA.NUM_WORKERS 0 TRAIN.RESUME auto"
        words = [word for line in (*lists, small, train, more) for word in line.split()]
        config = ROOT / "configs/motion/oct_i3d_tiny.yaml"
        fixed = ["--cfg", str(config), "OUTPUT_DIR", str(self.out), "DATA.PREFIX", str(self.data)]
        return [*fixed, *words, *self.setting.overrides]


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number) if number == signal.SIGKILL else os.kill(pid, number)


def interrupt(trial: Trial, seconds: float, calls: int) -> None:
    """Run the trial with one to three interruptions, and without more until it ends. Raises AssertionError.

    seconds, calls: how long an undisturbed run takes, and its number of file-system calls.
    """
    draw = random.Random(trial.seed)
    for number in range(draw.randint(1, 3)):
        share = 1.0 if number == 0 else 0.5  # what is left after an interruption is shorter
        way = draw.choice(["kill", "call", "call", "stop"])
        if way == "call":
            at = draw.randint(1, max(1, int(calls * share)))
            trial.events.append(f"killed in call {at}")
            status, allowed = trial.start(kill_at=at), {0, 1, -signal.SIGKILL}
        else:
            chosen = signal.SIGKILL if way == "kill" else draw.choice(STOPS)
            after = draw.uniform(0, seconds * share)
            trial.events.append(f"{signal.Signals(chosen).name} after {after:.2f} s")
            status = trial.start(stop=(chosen, after))
            allowed = {0, -chosen, 128 + chosen}
            if trial.setting.processes > 1:
                allowed.add(1)  # a rank that has not yet installed its handlers ends, and the other one fails
        trial.events[-1] += f" -> {status}"
        assert status in allowed, f"status {status}"
        if status == 0:
            break
    status = trial.start()
    assert status == 0, f"the last start ended with status {status}"
    left = [path.name for path in trial.out.rglob("*.tmp")]
    assert not left, f"left over: {left}"


def run_one(seed: int, name: str, *, references: dict[str, tuple[Trial, tuple[float, int]]], folder: Path) -> list[str]:
    """Return what differs after a trial of this seed, [] if nothing does."""
    reference, measured = references[name]
    trial = Trial(SETTINGS[name], reference.data, folder / f"{seed}" / "run", seed)
    trial.out.parent.mkdir()
    try:
        interrupt(trial, *measured)
        found = differences(reference.out, trial.out)
    except Exception as error:  # noqa: BLE001  # whatever a reader of the folder raises is a difference
        found = [f"{type(error).__name__}: {error}"]
    print(
        f"run {seed}, {name}: {'; '.join(trial.events)}: {'DIFFERS' if found else 'same'}",
        *found,
        sep="\n  ",
        flush=True,
    )
    if not found:
        shutil.rmtree(trial.out.parent)
    return found


def make_data(folder: Path) -> tuple[Path, Path]:
    """Return the folders of a good and of a damaged data set."""
    good, damaged = folder / "good", folder / "damaged"
    motion.make(good, motion.Settings(train=2, val=1, size=48), workers=1)
    shutil.copytree(good, damaged)
    lines = (damaged / "train.txt").read_text().splitlines()
    for number, keep in ((1, 0), (6, 500), (11, 1500)):
        path = damaged / lines[number].rpartition(" ")[0]
        path.write_bytes(path.read_bytes()[:keep])
    return good, damaged


def measure(name: str, data: Path, folder: Path) -> tuple[Trial, tuple[float, int]]:
    """Run a setting undisturbed; return it, its seconds and its number of file-system calls."""
    trial = Trial(SETTINGS[name], data, folder / name.replace(" ", "_"), seed=0)
    started = time.monotonic()
    status = trial.start(kill_at=sys.maxsize)
    seconds = time.monotonic() - started
    if status:
        raise SystemExit(f"{name}: the undisturbed run ended with status {status}: {trial.out.with_suffix('.0.txt')}")
    return trial, (seconds, int(trial.calls.read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=int, default=10, help="runs in all, the settings one after the other (default 10)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first run; each next one has the next number")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time (default 2)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for what failed (default: a temporary folder)")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="octvideo-torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    good, damaged = make_data(folder)
    chosen = [
        (seed, options.settings[seed % len(options.settings)])
        for seed in range(options.seed, options.seed + options.runs)
    ]
    names = dict.fromkeys(name for _, name in chosen)
    references = {name: measure(name, damaged if SETTINGS[name].damaged else good, folder) for name in names}
    started = time.monotonic()
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork")) as pool:
        results = list(pool.map(partial(run_one, references=references, folder=folder), *zip(*chosen, strict=True)))
    failed = sum(map(bool, results))
    print(
        f"{len(results)} runs, {failed} with differences, {time.monotonic() - started:.0f} s; settings: {', '.join(names)}"
    )
    if not failed and not options.keep:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
