"""Where a run takes place: flags and their errors, the sbatch text, processes here. Jobs on a SLURM: tests/slurm."""

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from octvideo import build, launch
from octvideo.engine import checkpoint
from octvideo.launch import Job, LaunchError, Request
from tests.end_to_end.runs import ROOT, Run, check_same
from tools import run_net

CONFIG = str(ROOT / "configs/motion/oct_i3d_tiny.yaml")
GOLDEN = ROOT / "tests/golden"
LISTS = ["DATA.TRAIN_LIST", "train.txt", "DATA.VAL_LIST", "val.txt"]
NOWHERE = ["OUTPUT_DIR", "runs/nowhere"]  # the config's own has checkpoints after `make demo`


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH, with a squeue that says what is in the file `state`, and a scontrol that notes its calls."""
    for name, text in (("squeue", f'cat "{tmp_path}/state"'), ("scontrol", f'echo "$@" >> "{tmp_path}/called"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def error_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What run_net.py says of a wrong request."""
    assert run_net.main(["--cfg", CONFIG, *command]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize(
    "flags,text",
    [
        (["--slurm", "--local", "2"], "--slurm and --local ask for two places; give one"),
        (["--nodes", "2"], "--nodes is for --slurm; give that too"),
        (["--local", "2", "--wait", "--array-overrides", "x"], "--array-overrides is for --slurm"),
        (["--local", "-1"], "--local is -1; allowed: 0 or more"),
        (["--slurm", "--nodes", "0"], "--nodes is 0; allowed: 1 or more"),
        (["--slurm", "--gpus-per-node", "-1"], "--gpus-per-node is -1; allowed: 0 or more"),
        (["--slurm", "--mem-gb", "0"], "--mem-gb is 0; allowed: above 0 (leave it out for the cluster's default)"),
        (["--slurm", "--mem-gb", "nan"], "--mem-gb is nan; allowed"),
        (["--slurm", "--time-min", "0"], "--time-min is 0; allowed: 1 or more"),
        (["--slurm", "--time-min", "2"], "--signal-delay-s is 120; allowed: below --time-min's 2 min"),
        (["--slurm", "--partition", "a\n#SBATCH --uid=0"], r"--partition is 'a\n#SBATCH --uid=0'; give a name"),
        (["--slurm", "--nodes", "0", "--cpus-per-task", "0"], "2 problem(s) with where to run"),
        (
            ["--slurm", "--gpus-per-node", "7", *LISTS, *NOWHERE],
            "TRAIN.BATCH_SIZE 16 is not divisible by 7 processes; try 14",
        ),
        (["--local", "5", *LISTS], "TRAIN.BATCH_SIZE 16 is not divisible by 5 processes; try 15"),
        (["--slurm", "--array-overrides", "/nowhere"], "--array-overrides /nowhere: cannot be read"),
    ],
)
def test_wrong_flags_are_one_message(capsys: pytest.CaptureFixture[str], flags: list[str], text: str) -> None:
    assert text in error_of(capsys, *flags)


def test_without_slurm_here_the_message_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = error_of(capsys, "--slurm", *LISTS, "OUTPUT_DIR", str(tmp_path / "run"))
    assert error == "error: --slurm needs sbatch, which is not on PATH; log in to a node of the cluster\n"
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made(shell: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shell / "sbatch").symlink_to("squeue")
    (shell / "srun").symlink_to("squeue")
    (tmp_path / "file").write_text("")
    error = error_of(capsys, "--slurm", *LISTS, "OUTPUT_DIR", str(tmp_path / "file/run"))
    assert "file/run/slurm/" in error and "cannot be made (Not a directory)" in error


@pytest.mark.parametrize("where", ["by the key", "by a link", "by the current folder"])
def test_no_folder_ends_a_line_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    hostile = tmp_path / "a\ntouch PWNED #"
    hostile.mkdir()
    (tmp_path / "link").symlink_to(hostile)
    if where == "by the current folder":
        monkeypatch.chdir(hostile)
    folder = {"by the key": str(hostile), "by a link": str(tmp_path / "link"), "by the current folder": "runs/x"}[where]
    error = error_of(capsys, "--slurm", "--dry-run", *LISTS, "OUTPUT_DIR", folder)
    assert r"a\ntouch PWNED #" in error and r"contains the control character '\n'" in error


def test_ranks_do_not_start_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert "this is already rank 1 of 2 processes" in error_of(capsys, "--slurm", *LISTS, *NOWHERE)


def test_a_job_does_not_begin_from_a_file_where_its_restarts_would_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(tmp_path, 7, {"model": {}}, keep=1)
    flags = ["--slurm", "--dry-run", *LISTS, "OUTPUT_DIR", str(tmp_path)]
    for resume in ("none", "other.pt"):
        error = error_of(capsys, *flags, "TRAIN.RESUME", resume)
        assert "holds checkpoints" in error and f"not from TRAIN.RESUME {resume}; give TRAIN.RESUME auto" in error
    assert run_net.main(["--cfg", CONFIG, *flags, "TRAIN.RESUME", "auto"]) == 0


def test_every_line_of_a_sweep_is_checked_before_anything_is_submitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("SEED 1 # fine\n\nSEED -1\nTRAIN.EPOCH 3\nSEED\nOUTPUT_DIR same\nOUTPUT_DIR ./same\n")
    error = error_of(capsys, "--slurm", "--array-overrides", str(sweep), *LISTS)
    for text in (
        "line 3: SEED is -1; allowed: 0 or more",
        "line 4: unknown key TRAIN.EPOCH",
        "line 5: override 'SEED' has no value",
        f"line 7: OUTPUT_DIR ./same is that of {sweep}, line 6 already",
    ):
        assert text in error, error
    sweep.write_text("SEED '1\n")
    assert "line 1: No closing quotation" in error_of(capsys, "--slurm", "--array-overrides", str(sweep), *LISTS)
    sweep.write_text("# nothing\n")
    assert "no line with KEY VALUE pairs" in error_of(capsys, "--slurm", "--array-overrides", str(sweep), *LISTS)


def test_lines_of_a_sweep_get_folders_of_their_own() -> None:
    lines = [("a, line 1", ["SEED", "1"]), ("a, line 2", ["OUTPUT_DIR", "b"]), ("a, line 3", [])]
    cfgs = build.load_sweep(CONFIG, [*LISTS, "OUTPUT_DIR", "runs/x"], lines)
    assert [(cfg.OUTPUT_DIR, cfg.SEED) for cfg in cfgs] == [("runs/x/0", 1), ("b", 0), ("runs/x/2", 0)]


@pytest.mark.parametrize("name", ["motion/oct_i3d_tiny", "kinetics400/oct_slowfast_r50_4x16_a0.1", "imagenet/resnet50"])
def test_the_text_that_a_job_is_given_is_the_same_configuration(name: str, tmp_path: Path) -> None:
    cfg = build.load_config(ROOT / f"configs/{name}.yaml", [*LISTS, "SOLVER.BASE_LR", "1e-05"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert build.load_config(tmp_path / "config.yaml") == cfg


DRY = {
    "slurm_two_nodes": "--nodes 2 --gpus-per-node 8 --cpus-per-task 10 --mem-gb 200 --time-min 4320 --partition P "
    "--account A --constraint a100|h100 --snapshot",
    "slurm_array": "--gpus-per-node 0 --max-restarts 3 --signal-delay-s 300 --qos low",
}


@pytest.mark.parametrize("name", DRY)
def test_the_sbatch_text(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--slurm", "--dry-run", *DRY[name].split()]
    if name == "slurm_array":
        (tmp_path / "sweep.txt").write_text("SEED 1\nSEED 2\nSEED 3\n")
        flags += ["--array-overrides", str(tmp_path / "sweep.txt")]
    assert run_net.main(["--cfg", CONFIG, *flags, *LISTS, "OUTPUT_DIR", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    for path, word in ((tmp_path.resolve(), "OUTPUT"), (sys.executable, "PYTHON"), (ROOT, "TREE")):
        text = text.replace(str(path), word)
    text = re.sub(r"\d{8}-\d{6}", "TIME", text)
    golden = GOLDEN / f"{name}.sbatch"
    if os.environ.get("OCTVIDEO_ACCEPT"):
        golden.write_text(text)
    accept = "accept the change with: OCTVIDEO_ACCEPT=1 python -m pytest tests/test_launch.py -k sbatch"
    assert text == golden.read_text(), f"not the text of {golden.relative_to(ROOT)}; {accept}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "status,state,restarts,failed,ends,requeued,said",
    [
        (0, "RUNNING", 0, False, 0, False, ""),
        (1, "RUNNING", 0, False, 1, False, ""),
        (137, "RUNNING", 0, False, 137, False, ""),
        (140, "RUNNING", 0, False, 140, True, "stopped with status 140; requeued"),
        (143, "RUNNING", 2, False, 143, True, "stopped with status 143; requeued"),
        (143, "RUNNING", 3, False, 143, False, "stopped and given up after 3 restarts"),
        (143, "COMPLETING", 0, False, 143, False, "SLURM says COMPLETING, so this job does not requeue itself"),
        (143, "", 0, False, 143, False, "SLURM says nothing, so"),
        (143, "RUNNING", 0, True, 1, False, "rank 5 failed"),  # srun ends the others by SIGTERM
        (0, "RUNNING", 4, False, 1, False, "given up after 3 restarts"),
    ],
)
def test_what_the_batch_script_requeues(
    shell: Path, status: int, state: str, restarts: int, failed: bool, ends: int, requeued: bool, said: str
) -> None:
    (shell / "state").write_text(state)
    if failed:
        (shell / f"9_2_{restarts}_failed").write_text("5")
    request = Request(slurm=True, max_restarts=3)
    text = [*launch._setup(request, shell, ROOT), f"(exit {status})", *launch._teardown(request)]
    place = {"SLURM_JOB_ID": "11", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "2"}
    environment = {**os.environ, **place, "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(["bash", "-c", "\n".join(text)], capture_output=True, text=True, env=environment)
    assert done.returncode == ends and said in done.stderr
    called = (shell / "called").read_text() if (shell / "called").exists() else ""
    assert called == ("requeue 9_2\n" if requeued else "")


def test_a_job_is_followed_through_a_restart_to_its_failure(
    shell: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (shell / "squeue").write_text(  # each call takes a line
        f'#!/bin/sh\nhead -n 1 "{shell}/state"\n[ $(wc -l < "{shell}/state") = 1 ] || sed -i 1d "{shell}/state"\n'
    )
    states = ["PENDING", "RUNNING", "COMPLETING", "PENDING", "RUNNING", "FAILED"]
    (shell / "state").write_text("".join(f"7|{state}\n" for state in states))
    (tmp_path / "7_0_log.out").write_text("step 4\n")
    (tmp_path / "7_1_log.err").write_text("Traceback\nValueError: no\n")
    (tmp_path / "7_1_failed").write_text("1")
    clock = itertools.count(0, 3)
    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    assert launch._follow("7", tmp_path, 1) == 1
    said = capsys.readouterr()
    assert [line for line in said.out.splitlines() if line.startswith("job")] == [f"job 7: {s.lower()}" for s in states]
    assert "step 4\n" in said.out and "job 7: rank 1 failed" in said.err and "ValueError: no" in said.err


# Processes here

TOOL = """
import os, signal, sys, time
out, rank = sys.argv[3], os.environ["RANK"]
def stop(number, frame):
    open(f"{out}/stopped_{rank}", "w").close()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
config = open(sys.argv[sys.argv.index("--cfg") + 1]).read()
open(f"{out}/up_{rank}", "w").write(" ".join([*(os.environ[name] for name in names), config]))
if sys.argv[4] == "fail" and rank == "1":
    raise ValueError("on purpose")
if sys.argv[4] != "end":
    time.sleep(60)
"""


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    (tmp_path / "tool.py").write_text(TOOL)
    return tmp_path / "tool.py"


def here(tool: Path, what: str, processes: int = 3) -> int:
    return launch.start(Request(local=processes), tool, [Job(tool.parent, "TEXT", [str(tool.parent), what])])


def test_processes_here_know_their_places(tool: Path) -> None:
    assert here(tool, "end") == 0
    assert [(tool.parent / f"up_{n}").read_text() for n in range(3)] == [f"3 3 {n} 127.0.0.1 TEXT" for n in range(3)]


def test_the_first_that_fails_ends_the_others(tool: Path, capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert here(tool, "fail") == 1
    error = capfd.readouterr().err
    assert "ValueError: on purpose" in error and "rank 1 of 3 ended with status 1; the others were ended" in error
    assert time.monotonic() - started < 30 and not (tool.parent / "stopped_0").exists()


def test_a_signal_goes_to_all_of_them(tool: Path) -> None:
    def send() -> None:
        while not all((tool.parent / f"up_{rank}").exists() for rank in range(3)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    sender = threading.Thread(target=send)
    sender.start()
    assert here(tool, "wait") == 143
    sender.join()
    assert all((tool.parent / f"stopped_{rank}").exists() for rank in range(3))
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_processes_here_train_as_torchrun_s_do(tmp_path: Path) -> None:
    from datasets import motion

    data = tmp_path / "data"
    motion.make(data, motion.Settings(train=2, val=1, size=48), workers=1)
    Run(data, tmp_path / "torchrun", 2).finish()
    assert run_net.main(["--local", "2", *Run(data, tmp_path / "local").arguments]) == 0
    check_same(tmp_path / "torchrun", tmp_path / "local")


# What each task of a job does


@pytest.mark.parametrize(
    "text,status,failed",
    [
        ("sys.exit(0)", 0, False),
        ("pass", 0, False),
        ("sys.exit(143)", 143, False),
        ("sys.exit(140)", 140, False),
        ("sys.exit(1)", 1, True),
        ("sys.exit(2)", 2, True),
        ("raise ValueError('no')", 1, True),
    ],
)
def test_perform(text: str, status: int, failed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setenv("OCTVIDEO_FAILED", str(tmp_path / "failed"))
    monkeypatch.setenv("SLURM_PROCID", "3")
    (tmp_path / "tool.py").write_text(
        f"import os, sys\nassert sys.argv[1:] == ['a'] and __name__ == '__main__'\n{text}\n"
    )
    before = {n: signal.signal(n, lambda *_: None) for n in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2)}
    try:
        launch.perform(str(tmp_path / "tool.py"), ["a"], str(tmp_path))
        ended = 0
    except SystemExit as end:
        ended = end.code
    except ValueError:
        ended = 1  # as the interpreter would
    finally:
        assert all(signal.getsignal(number) == signal.SIG_DFL for number in before)
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended == status and Path.cwd() == tmp_path
    assert ((tmp_path / "failed").exists() and (tmp_path / "failed").read_text() == "3") == failed


def test_a_snapshot_has_the_code_and_nothing_that_git_ignores() -> None:
    files = launch._files(["octvideo", "tools", "configs", "datasets"])
    assert {"octvideo/launch.py", "tools/run_net.py", "configs/_base/motion.yaml", "datasets/motion.py"} <= set(files)
    assert not [name for name in files if "__pycache__" in name or name.startswith("tests")]


def test_a_tool_outside_of_the_tree_has_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="which .* is not part of"):
        request = replace(Request(), slurm=True, dry_run=True, snapshot=True)
        launch.start(request, tmp_path / "tool.py", [Job(tmp_path, "")])
