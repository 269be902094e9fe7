"""A run as a SLURM job: the sbatch text, its submission (by submitit), and what each task does."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from octvideo.launch.follow import follow_job
from octvideo.launch.local import STOPPED, TREE
from octvideo.launch.request import NAMES, Job, LaunchError, Request

# Statuses after which a job requeues itself: SLURM's own signals, not those of a person (scancel --signal=INT)
REQUEUED = tuple(128 + number for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM))


def submit(request: Request, script: Path, jobs: Sequence[Job]) -> int:
    """Submit the jobs and return the exit status, or print the sbatch text (--dry-run). Raises LaunchError."""
    import submitit

    output = jobs[0].output.resolve()
    folder = output / "slurm" / time.strftime("%Y%m%d-%H%M%S")
    _check_paths(folder, TREE)
    if not request.dry_run:
        for program in ("sbatch", "srun", "squeue", "scontrol"):
            if shutil.which(program) is None:
                raise LaunchError(f"--slurm needs {program}, which is not on PATH; log in to a node of the cluster")
        folder = _fresh(folder)
    tree, script = _code(request, script, folder)
    executor = _executor(request, folder, tree, name=output.parent.name if len(jobs) > 1 else output.name)
    if request.dry_run:
        if len(jobs) > 1:
            executor.parameters["map_count"] = len(jobs)
        print(executor._make_submission_file_text(executor._submitit_command_str, ""))
        return 0
    calls = []
    for number, job in enumerate(jobs):
        config = folder / (f"config_{number}.yaml" if len(jobs) > 1 else "config.yaml")
        config.write_text(job.config)
        calls.append(partial(perform, str(script), ["--cfg", str(config), *job.arguments], str(Path.cwd())))
    try:
        with _outside_a_job(), contextlib.redirect_stderr(io.StringIO()):  # sbatch's own words come with the error
            submitted = executor.submit_array(calls)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise LaunchError(f"sbatch refused the job: {str(error).strip()}") from None
    job_id = submitted[0].job_id.split("_")[0]
    _announce(request, job_id, folder, len(jobs))
    return follow_job(job_id, folder, len(jobs)) if request.wait else 0


def _check_paths(folder: Path, tree: Path) -> None:
    """Raise LaunchError for a path that the text of a job cannot name.

    `folder` is part of names of log files, in which SLURM replaces %x and drops backslashes.
    """
    problems = [
        f"{what} is {str(path)!r}; allowed: a path without characters that cannot be printed"
        for what, path in (("the folder of the code", tree), ("the Python interpreter", sys.executable))
        if not str(path).isprintable()
    ]
    if not str(folder).isprintable() or set(str(folder)) & _NOT_IN_LOG_NAMES:
        allowed = "printable characters other than % \\ ' and \""
        problems.insert(0, f"OUTPUT_DIR is {str(folder.parents[1])!r}; allowed with --slurm: {allowed}")
    if problems:
        raise LaunchError("\n  ".join(["--slurm", *problems]))


_NOT_IN_LOG_NAMES = frozenset("%\\'\"")


def _job_name(name: str) -> str:
    """Return a folder's name as the name of a job: tools that list jobs print it unquoted."""
    return re.sub(r"[^\w.+-]+", "_", name).lstrip("-") or "octvideo"


def _fresh(folder: Path) -> Path:
    """Create a new folder for every submission: job numbers may repeat, and old results would be taken for new ones."""
    for number in range(1000):
        path = folder.with_name(f"{folder.name}-{number}") if number else folder
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise LaunchError(f"{path}: cannot be made ({error.strerror}); give another OUTPUT_DIR") from None
    raise LaunchError(f"{folder.parent}: no free name for this submission")


def _code(request: Request, script: Path, folder: Path) -> tuple[Path, Path]:
    """The tree and the script to run: this one, or a copy of what git knows or could know of it."""
    if not request.snapshot:
        return TREE, script
    if TREE not in script.parents:
        raise LaunchError(f"--snapshot copies {TREE}, which {script} is not part of")
    tree, inside = folder / "code", script.relative_to(TREE)
    if not request.dry_run:
        parts = [name for name in ("octvideo", "tools", "configs", "datasets") if (TREE / name).exists()]
        for path in _files([*parts, str(inside)]):
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TREE / path, tree / path)
    return tree, tree / inside


def _files(parts: Sequence[str]) -> list[str]:
    command = ["git", "-C", str(TREE), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *parts]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        paths = [
            path for part in parts for path in ((TREE / part).rglob("*") if (TREE / part).is_dir() else [TREE / part])
        ]
        listed = [str(path.relative_to(TREE)) for path in paths if "__pycache__" not in path.parts]
    return [name for name in dict.fromkeys(listed) if name and (TREE / name).is_file()]


def _executor(request: Request, folder: Path, tree: Path, name: str) -> Any:
    import submitit

    class Executor(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # _submit asks for sbatch itself; --dry-run needs none

    executor = Executor(folder)
    parameters = {
        "job_name": _job_name(name),
        "nodes": request.nodes,
        "ntasks_per_node": request.tasks_per_node,
        "gpus_per_node": request.gpus_per_node or None,
        "cpus_per_task": request.cpus_per_task,
        "mem": None if request.mem_gb is None else f"{round(request.mem_gb * 1024)}M",
        "time": request.time_min,
        "signal_delay_s": request.signal_delay_s,
        "wckey": None,
        "additional_parameters": {"requeue": True},
        # A rank that fails ends the others. From 22.05 on srun does not take over --cpus-per-task.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={request.cpus_per_task}"],
        "setup": _setup(request, folder, tree),
        "teardown": _teardown(request),
    }
    parameters |= {key: getattr(request, key) for key in NAMES}
    executor.update_parameters(**parameters)
    return executor


def _setup(request: Request, folder: Path, tree: Path) -> list[str]:
    return [
        "job=$SLURM_JOB_ID restarts=${SLURM_RESTART_COUNT:-0}",
        '[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID',
        f'if [ "$restarts" -gt {request.max_restarts} ]; then',
        f'  echo "octvideo: given up after {request.max_restarts} restarts (--max-restarts)" >&2',
        "  exit 1",
        "fi",
        f"export OCTVIDEO_FAILED={shlex.quote(str(folder))}/${{job}}_${{restarts}}_failed",
        f"cd {shlex.quote(str(tree))} || exit 1",
        f"export PYTHONPATH={shlex.quote(str(tree))}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]


def _teardown(request: Request) -> list[str]:
    """Requeue what was stopped by a signal: not what failed, nor what SLURM itself has ended (scancel) or requeued."""
    return [
        "status=$?",
        'case "$status" in',
        f"  {'|'.join(map(str, REQUEUED))})",
        "    for again in 1 2 3 4 5 6; do  # controllers are restarted, too",
        '      state=$(squeue --noheader --jobs "$job" --format %T) && break',
        "      sleep 10",
        "    done",
        '    if [ -e "$OCTVIDEO_FAILED" ]; then',
        '      echo "octvideo: rank $(cat "$OCTVIDEO_FAILED") failed" >&2',
        "      status=1",
        '    elif [ "$state" != RUNNING ]; then',
        '      echo "octvideo: stopped; SLURM says ${state:-nothing}, so this job does not requeue itself" >&2',
        f'    elif [ "$restarts" -ge {request.max_restarts} ]; then',
        f'      echo "octvideo: stopped and given up after {request.max_restarts} restarts (--max-restarts)" >&2',
        "    else",
        '      echo "octvideo: stopped with status $status; requeued" >&2',
        "      for again in 1 2 3 4 5 6; do",
        '        scontrol requeue "$job" && break',
        "        sleep 10",
        "      done",
        "    fi",
        "    ;;",
        "esac",
        'exit "$status"',
    ]


@contextlib.contextmanager
def _outside_a_job() -> Iterator[None]:
    """A job submitted from within a job would inherit that one's sizes."""
    inherited = {name: value for name, value in os.environ.items() if name.startswith(("SLURM_", "SUBMITIT_"))}
    for name in inherited:
        if name != "SLURM_CONF":
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(inherited)


def _announce(request: Request, job_id: str, folder: Path, count: int) -> None:
    tasks = f" of {count} tasks, each" if count > 1 else ":"
    name = f"{job_id}_0_0" if count > 1 else f"{job_id}_0"
    print(f"job {job_id}{tasks} {request.nodes} node(s) with {request.tasks_per_node} process(es) each")
    print(f"  logs    {folder}/{name}_log.out and .err, one pair for each {'task and ' if count > 1 else ''}rank")
    print(f"  state   squeue --jobs {job_id}    (sacct --jobs {job_id} once it is over)")
    print(f"  follow  tail -F {shlex.quote(f'{folder}/{name}_log.out')}")
    print(f"  cancel  scancel {job_id}", flush=True)


def perform(script: str, arguments: Sequence[str], folder: str) -> None:
    """What each task of a job does: the tool, as if called in `folder`; ends with the tool's own exit status.

    A rank that fails leaves its number in the file OCTVIDEO_FAILED, before SLURM ends the others: by SIGTERM, as it
    does when it preempts.
    """
    for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)  # submitit's; the training loop brings its own
    os.chdir(folder)
    sys.argv = [script, *arguments]
    status: Any = 1
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
        if status:
            raise
    finally:
        if status and status not in STOPPED:
            with contextlib.suppress(FileExistsError), Path(os.environ["OCTVIDEO_FAILED"]).open("x") as note:
                note.write(os.environ.get("SLURM_PROCID", "0"))
