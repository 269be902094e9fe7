"""Jobs on a real SLURM: what is preempted, timed out or lost with its node ends as if nothing had happened."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from octvideo.engine import checkpoint
from octvideo.launch.follow import follow_job
from tests.end_to_end.runs import ROOT, STEPS, Run, check_same
from tests.slurm import fails
from tools import evaluate, run_net

WHOLE = ["--slurm", "--nodes", "2", "--gpus-per-node", "0", "--cpus-per-task", "4", "--time-min", "10"]
PART = ["--slurm", "--gpus-per-node", "0", "--cpus-per-task", "1", "--time-min", "10"]
NODES = "octnode[1-2]"


def until(true: Callable[[], object], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}\n{slurm('squeue', '--states=all')}"
        time.sleep(0.01)


def slurm(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def field(job: str, name: str) -> str:
    return re.search(rf"\b{name}=(\S+)", slurm("scontrol", "show", "job", job))[1]


def state(job: str) -> str:
    return slurm("squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    slurm("scancel", "--user", "root")
    until(lambda: not slurm("squeue", "--noheader"), "all jobs are gone")


@pytest.fixture(scope="module")
def local(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in two processes here."""
    out = tmp_path_factory.mktemp("local") / "run"
    assert run_net.main(["--local", "2", *Run(data, out).arguments]) == 0
    return out


class Submitted:
    """A job of tools/run_net.py: its number, its run and its logs."""

    def __init__(self, said: str, run: Run) -> None:
        self.run, self.job = run, re.search(r"job (\d+):", said)[1]
        (self.folder,) = (run.out / "slurm").iterdir()

    def said(self, rank: int = 0) -> str:
        return "".join((self.folder / f"{self.job}_{rank}_log.{end}").read_text() for end in ("out", "err"))

    def frozen(self, at: int) -> "list[int]":
        """Stop its ranks once its history has `at` steps, so that it is not over before what is to happen to it."""
        until(lambda: self.run.steps() >= at, f"{at} steps of job {self.job}")
        ranks = ranks_of(self.job)
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        # not at once: a rank that still ran would be taken for one that SLURM has woken
        until(lambda: all(map(stopped, ranks)), f"the ranks of job {self.job} stand still")
        assert len(ranks) == 2 and self.run.steps() < STEPS
        return ranks

    def finish(self) -> None:
        until(lambda: state(self.job) == "COMPLETED", f"end of job {self.job}")


def ranks_of(job: str, name: str = "submitit") -> list[int]:
    """The processes of the job that slurmstepd started as its ranks; not their decoding workers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = Path("/proc", re.search(r"PPid:\t(\d+)", (folder / "status").read_text())[1], "comm")
            ours = f"SLURM_JOB_ID={job}\0" in (folder / "environ").read_text(errors="replace")
            if ours and parent.read_text() == "slurmstepd\n" and name in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:  # it ended while we looked
            continue
    return found


def stopped(pid: int) -> bool:
    return "T (stopped)" in Path(f"/proc/{pid}/status").read_text()


def goes_on_when_signalled(ranks: list[int], number: int) -> None:
    def signalled(pid: int) -> bool:
        pending = int(re.search(r"ShdPnd:\t(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)
        return bool(pending >> (number - 1) & 1) or not stopped(pid)  # SLURM sends SIGCONT before SIGTERM

    for pid in ranks:
        until(lambda: signalled(pid), f"signal {number} at {pid}")  # noqa: B023
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)


def submit(capsys: pytest.CaptureFixture[str], run: Run, *flags: str) -> Submitted:
    assert run_net.main([*flags, *run.arguments]) == 0
    return Submitted(capsys.readouterr().out, run)


def check_one_history(out: Path) -> None:
    """Each step once, in metrics.jsonl and in TensorBoard."""
    events = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    steps = list(range(2, STEPS + 1, 2))
    assert [event["step"] for event in events if event["event"] == "train"] == steps
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [scalar.step for scalar in board.Scalars("train/loss")] == steps


def test_two_nodes_train_as_two_processes_here(
    data: Path, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(data, tmp_path / "run")
    assert run_net.main([*WHOLE, "--wait", *run.arguments]) == 0
    said = capsys.readouterr().out
    job = Submitted(said, run)
    assert (
        f"scancel {job.job}" in said and f"squeue --jobs {job.job}" in said and f"{job.folder}/{job.job}_0_log" in said
    )
    assert f"job {job.job}: completed" in said
    assert "(2 on each of 2 process(es), cpu)" in said  # what rank 0 prints
    check_same(local, run.out)
    check_one_history(run.out)
    nodes = slurm("sacct", "--noheader", "--parsable2", "--jobs", f"{job.job}.0", "--format=NodeList,NTasks,State")
    assert nodes == f"{NODES}|2|COMPLETED"


def test_preempted(data: Path, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = submit(capsys, Run(data, tmp_path / "run", 2, "TRAIN.CHECKPOINT_STEPS", "0"), *WHOLE)
    ranks = job.frozen(at=6)
    slurm("sbatch", "--partition=high", "--nodes=2", "--cpus-per-task=4", "--output=/dev/null", "--wrap", "srun true")
    goes_on_when_signalled(ranks, signal.SIGTERM)
    job.finish()
    assert field(job.job, "Restarts") == "1"
    assert "stopped by SIGTERM at step" in job.said() and "; requeued" in job.said()
    assert job.said().count("resuming ") == 1
    check_same(local, job.run.out)
    check_one_history(job.run.out)


def test_time_is_over(data: Path, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*WHOLE, "--time-min", "1", "--signal-delay-s", "5"]
    job = submit(capsys, Run(data, tmp_path / "run", 2, "TRAIN.CHECKPOINT_STEPS", "0"), *flags)
    goes_on_when_signalled(job.frozen(at=6), signal.SIGUSR2)
    job.finish()
    assert field(job.job, "Restarts") == "1"
    assert "stopped by SIGUSR2 at step" in job.said() and "; requeued" in job.said()
    check_same(local, job.run.out)
    check_one_history(job.run.out)


def test_a_node_is_lost(data: Path, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = submit(capsys, Run(data, tmp_path / "run"), *WHOLE)
    ranks = job.frozen(at=8)
    for pid in ranks_of(job.job, "slurm_script"):
        os.kill(pid, signal.SIGSTOP)  # else it would say how they ended
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    slurm("scontrol", "update", "nodename=octnode2", "state=down", "reason=lost")
    until(lambda: field(job.job, "Restarts") == "1", "requeued by SLURM")

    def is_back() -> bool:
        """By the command, which is refused for a node that reported by itself in the meantime (ReturnToService=2)."""
        subprocess.run(["scontrol", "update", "nodename=octnode2", "state=resume"], capture_output=True)
        return "DOWN" not in re.search(r"State=(\S+)", slurm("scontrol", "show", "node", "octnode2"))[1]

    until(is_back, "the node is back")
    job.finish()
    assert "resuming " in job.said() and "stopped by" not in job.said()
    check_same(local, job.run.out)
    check_one_history(job.run.out)


def test_cancelled_jobs_stay_cancelled(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = submit(capsys, Run(data, tmp_path / "run"), *WHOLE)
    ranks = job.frozen(at=4)
    slurm("scancel", job.job)
    goes_on_when_signalled(ranks, signal.SIGTERM)
    assert follow_job(job.job, job.folder, 1) == 1
    assert f"job {job.job}: cancelled" in capsys.readouterr().out
    assert field(job.job, "Restarts") == "0" and not ranks_of(job.job)


def test_restarts_have_a_limit(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = submit(capsys, Run(data, tmp_path / "run"), *WHOLE, "--max-restarts", "0")
    ranks = job.frozen(at=4)
    slurm("scancel", "--signal=USR2", job.job)
    goes_on_when_signalled(ranks, signal.SIGUSR2)
    assert follow_job(job.job, job.folder, 1) == 1
    said = capsys.readouterr().out
    assert "stopped and given up after 0 restarts" in said and f"job {job.job}: failed" in said
    assert field(job.job, "Restarts") == "0" and checkpoint.found(job.run.out)


def test_a_signal_before_the_training_begins(
    data: Path, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = submit(capsys, Run(data, tmp_path / "run"), *WHOLE)
    until(lambda: len(ranks_of(job.job)) == 2, "both ranks are there")
    slurm("scancel", "--signal=TERM", job.job)
    job.finish()
    assert field(job.job, "Restarts") == "1" and "stopped by" not in job.said()
    check_same(local, job.run.out)


def test_an_array(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("# two seeds, and a rate in a folder of its own\nSEED 0\n\nSEED 1\nSEED 0 SOLVER.BASE_LR 0.01 "
                     f"OUTPUT_DIR {tmp_path}/run/low\n")  # fmt: skip
    run = Run(data, tmp_path / "run", 1, "TRAIN.EPOCHS", "3")
    assert run_net.main([*PART, "--array-overrides", str(sweep), *run.arguments]) == 0
    job = re.search(r"job (\d+) of 3 tasks", capsys.readouterr().out)[1]
    tasks = [f"{job}_{number}" for number in range(3)]
    # one of the tasks has the number of the whole array, and only that one is to start again
    until(lambda: all(ranks_of(field(task, "JobId")) for task in tasks), "all tasks run")
    (stopped,) = (task for task in tasks if field(task, "JobId") == job)
    slurm("scancel", "--signal=USR2", stopped)
    (folder,) = (run.out / "0" / "slurm").iterdir()
    assert follow_job(job, folder, 3) == 0
    said = capsys.readouterr().out
    assert all(f"job {task}: completed" in said for task in tasks)
    assert [field(task, "Restarts") for task in tasks] == [str(int(task == stopped)) for task in tasks]
    ends = {name: checkpoint.latest(run.out / name)[1] for name in ("0", "1", "low")}
    assert {end["step"] for end in ends.values()} == {12}
    weights = [sum(value.double().sum().item() for value in end["model"].values()) for end in ends.values()]
    assert len(set(weights)) == 3


def test_evaluate_as_a_job(data: Path, local: Path, tmp_path: Path) -> None:
    test = ["--checkpoint", str(checkpoint.found(local)[-1]), "--clips", "2"]
    assert evaluate.main([*test, *Run(data, tmp_path / "here", 1, "TEST.ENABLE", "True").arguments]) == 0
    assert (
        evaluate.main([*WHOLE, "--wait", *test, *Run(data, tmp_path / "job", 1, "TEST.ENABLE", "True").arguments]) == 0
    )
    here, job = (json.loads((tmp_path / name / "test.json").read_text()) for name in ("here", "job"))
    for name in set(here) - {"clips_per_s", "tested"}:
        assert job[name] == (pytest.approx(here[name], rel=1e-4) if isinstance(here[name], float) else here[name]), name
    assert here["views"] == 6 and here["videos_scored"] == 8


def test_a_job_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert fails.main([*WHOLE, "--wait", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "rank 1 failed" in said.err and "ValueError: this one was meant to fail" in said.err
    job = re.search(r"job (\d+):", said.out)[1]
    assert f"job {job}: failed" in said.out and field(job, "Restarts") == "0"
    assert time.monotonic() - started < 120  # and not the barrier's half hour


def test_what_sbatch_refuses(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_net.main([*WHOLE, "--partition", "nowhere", *Run(data, tmp_path / "run").arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: sbatch refused the job: sbatch: error: invalid partition specified: nowhere")


def test_a_snapshot_does_not_see_later_edits(data: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for part in ("octvideo", "tools", "configs", "datasets"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path / "run"
    arguments = Run(data, out, 1, "TRAIN.EPOCHS", "2").arguments
    slurm("scontrol", "update", f"nodename={NODES}", "state=drain", "reason=wait")
    try:
        command = [sys.executable, str(tree / "tools/run_net.py"), *PART, "--snapshot", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tree)})
        assert done.returncode == 0, done.stderr
        for path in (tree / "tools/run_net.py", tree / "octvideo/launch/__init__.py", tree / "octvideo/__init__.py"):
            path.write_text("raise SystemExit('edited')\n")
    finally:
        slurm("scontrol", "update", f"nodename={NODES}", "state=resume")
    job = re.search(r"job (\d+):", done.stdout)[1]
    until(lambda: state(job) in ("COMPLETED", "FAILED"), f"end of job {job}")
    assert state(job) == "COMPLETED", "".join(p.read_text() for p in (out / "slurm").glob("*/*_log.err"))
    assert checkpoint.latest(out)[1]["step"] == 8
