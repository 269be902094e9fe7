"""SLURM jobs as text, and what their tasks do. Jobs on a SLURM: tests/slurm."""

import argparse
import contextlib
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from octvideo import launch
from octvideo.launch import Job, LaunchError, Request, slurm
from octvideo.launch.request import NAMES
from tests.end_to_end.runs import ROOT
from tests.launch.requests import CONFIG
from tools import run_net

GOLDEN = ROOT / "tests/golden"
DRY = {
    "slurm_two_nodes": "--nodes 2 --gpus-per-node 8 --cpus-per-task 10 --mem-gb 200 --time-min 4320 --partition P "
    "--account A --constraint a100|h100 --snapshot",
    "slurm_array": "--gpus-per-node 0 --max-restarts 3 --signal-delay-s 300 --qos low",
}


@pytest.mark.parametrize("name", DRY)
def test_the_sbatch_text(name: str, lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--slurm", "--dry-run", *DRY[name].split()]
    if name == "slurm_array":
        (tmp_path / "sweep.txt").write_text("SEED 1\nSEED 2\nSEED 3\n")
        flags += ["--array-overrides", str(tmp_path / "sweep.txt")]
    assert run_net.main(["--cfg", CONFIG, *flags, *lists, "OUTPUT_DIR", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    for path, word in ((tmp_path.resolve(), "OUTPUT"), (sys.executable, "PYTHON"), (ROOT, "TREE")):
        text = text.replace(str(path), word)
    text = re.sub(r"\d{8}-\d{6}", "TIME", text)
    golden = GOLDEN / f"{name}.sbatch"
    if os.environ.get("OCTVIDEO_ACCEPT"):
        golden.write_text(text)
    accept = "accept the change with: OCTVIDEO_ACCEPT=1 python -m pytest tests/launch/test_slurm.py -k sbatch"
    assert text == golden.read_text(), f"not the text of {golden.relative_to(ROOT)}; {accept}"
    assert not (tmp_path / "run").exists()


STUBS = """
srun() { printf '%s\\0' "$@" >> "$CALLS/srun"; return "$STATUS"; }
squeue() { printf RUNNING; }
scontrol() { printf '%s\\0' "$@" >> "$CALLS/scontrol"; }
command_not_found_handle() { printf '%s\\0' "$@" >> "$CALLS/other"; }
PATH=$CALLS
"""
UNPRINTABLE = ["\n", "\r", "\u2028", "\udcff", "\x1b"]
QUOTING = ["'", '"', "\\", "%j", "%"]
SHELL = ["touch PWNED", "$(touch PWNED)", ";", "&", "|", ">", "#", "#SBATCH --uid=0", "$HOME", "${", "(", "*", "!", "~"]
PLAIN = ["-", "--", "=", ",", " ", "a", "é", "映"]


def random_text(rng: random.Random) -> str:
    """Return a text that may hold anything; two in three hold only what the name of a folder may."""
    pieces = SHELL + PLAIN + (UNPRINTABLE + QUOTING if rng.random() < 1 / 3 else [])
    return "".join(rng.choices(pieces, k=rng.randint(1, 5)))


def text_of(request: Request, output: Path, capsys: pytest.CaptureFixture[str]) -> str | None:
    """Return the sbatch text, or None if the request is refused."""
    try:
        launch.Request.of(argparse.Namespace(**asdict(request)))
        launch.start(request, slurm.TREE / "tool.py", [Job(output, "")])
    except LaunchError as error:
        assert str(error).replace("\n  ", "").isprintable()
        return None
    return capsys.readouterr().out


@pytest.mark.parametrize("seed", range(60))
def test_no_name_ends_a_line_or_a_quote_of_the_sbatch_text(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(seed)
    tree, output = tmp_path / f"tree{random_text(rng)}", tmp_path / random_text(rng)
    names = {name: random_text(rng).replace(" ", "_").lstrip("-") or "a" for name in rng.sample(NAMES, 2)}
    with contextlib.suppress(UnicodeEncodeError):
        tree.mkdir()
    monkeypatch.setattr(slurm, "TREE", tree)
    text = text_of(Request(slurm=True, dry_run=True, gpus_per_node=0, **names), output, capsys)
    printable = all(text.isprintable() for text in (str(tree), str(output), *names.values()))
    quoting = set(str(output)) & set("%\\'\"") or set("".join(names.values())) & set("\\'\"")
    assert (text is not None) == (printable and not quoting)
    if text is not None:
        check_text(text, tmp_path, output, names)


def check_text(text: str, folder: Path, output: Path, names: dict[str, str]) -> None:
    """Run the text with stubs: it starts srun once and nothing else, and each of its flags is one word."""
    calls = folder / "calls"
    calls.mkdir()
    environment = {"CALLS": str(calls), "STATUS": "143", "SLURM_JOB_ID": "7", "HOME": "/nowhere"}
    done = subprocess.run(
        ["/bin/bash", "-c", STUBS + text], capture_output=True, text=True, env=environment, cwd=folder
    )
    assert done.returncode == 143, done.stderr
    assert sorted(path.name for path in calls.iterdir()) == ["scontrol", "srun"]
    assert (calls / "scontrol").read_text() == "requeue\0007\0"
    arguments = (calls / "srun").read_text().split("\0")[:-1]
    assert Path(arguments[-1]).parents[1] == output.resolve() and arguments[-2] == "submitit.core._submit"
    flags = [shlex.split(line.removeprefix("#SBATCH ")) for line in text.splitlines() if line.startswith("#SBATCH")]
    assert len(flags) == 10 + len(names) and all(len(words) == 1 for words in flags)
    assert {f"--{name}={value}" for name, value in names.items()} <= {words[0] for words in flags}


@pytest.mark.parametrize(
    ("name", "job"), [("run", "run"), ("--uid=0", "uid_0"), ("a b'c", "a_b_c"), ("$(x)", "_x_"), ("---", "octvideo")]
)
def test_the_name_of_a_job_is_one_plain_word(name: str, job: str) -> None:
    assert slurm._job_name(name) == job


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
    text = [*slurm._setup(request, shell, ROOT), f"(exit {status})", *slurm._teardown(request)]
    place = {"SLURM_JOB_ID": "11", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "2"}
    environment = {**os.environ, **place, "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(["bash", "-c", "\n".join(text)], capture_output=True, text=True, env=environment)
    assert done.returncode == ends and said in done.stderr
    called = (shell / "called").read_text() if (shell / "called").exists() else ""
    assert called == ("requeue 9_2\n" if requeued else "")


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
        slurm.perform(str(tmp_path / "tool.py"), ["a"], str(tmp_path))
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
    files = slurm._files(["octvideo", "tools", "configs", "datasets"])
    assert {"octvideo/launch/slurm.py", "tools/run_net.py", "configs/_base/motion.yaml", "datasets/motion.py"} <= set(
        files
    )
    assert not [name for name in files if "__pycache__" in name or name.startswith("tests")]


def test_a_tool_outside_of_the_tree_has_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="which .* is not part of"):
        request = replace(Request(), slurm=True, dry_run=True, snapshot=True)
        launch.start(request, tmp_path / "tool.py", [Job(tmp_path, "")])
