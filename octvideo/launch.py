"""Where a run takes place: here, as one of the processes that torchrun, --local or SLURM started, or as a job of SLURM.

A job is the same command again, on every task: what it needs to go on after a preemption, a time-out or the loss of a node
is in OUTPUT_DIR, so a restart is a start. submitit writes the sbatch text and submits it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from octvideo.engine import distributed
from octvideo.engine.distributed import World
from octvideo.errors import UserError

Result = TypeVar("Result")
TREE = Path(__file__).resolve().parents[1]
# What a run answers that was asked to stop by a signal and has left everything on the disk: 128 + N
STOPPED = tuple(128 + int(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM))


class LaunchError(UserError, ValueError):
    """The request for a place to run cannot be met; the message says why and what to do."""


def run(job: Callable[[World, torch.device], Result], device: str) -> Result:
    """Call job(world, device) inside the process group that the environment describes.

    device: auto, cpu or cuda. Raises DistributedError where the environment contradicts itself, and names the rank that
    hangs or has died if the ranks cannot continue.
    """
    world = distributed.world_from_environment()
    own = distributed.device_of(device, world)
    distributed.start(world, own)
    try:
        with distributed.named_ranks():
            return job(world, own)
    finally:
        distributed.stop()


@dataclass(frozen=True)
class Request:
    """Where a run shall take place, as the command line asks (add_arguments has each one's meaning)."""

    local: int = 0
    slurm: bool = False
    nodes: int = 1
    gpus_per_node: int = 1
    cpus_per_task: int = 10
    mem_gb: float | None = None
    time_min: int = 1440
    partition: str | None = None
    account: str | None = None
    constraint: str | None = None
    qos: str | None = None
    exclude: str | None = None
    array_overrides: Path | None = None
    max_restarts: int = 20
    signal_delay_s: int = 120
    snapshot: bool = False
    wait: bool = False
    dry_run: bool = False

    @classmethod
    def of(cls, options: argparse.Namespace) -> Request:
        """What parse_args returned. Raises LaunchError with all that is wrong."""
        request = cls(**{field.name: getattr(options, field.name) for field in fields(cls)})
        if problems := request._problems():
            raise LaunchError("\n  ".join([f"{len(problems)} problem(s) with where to run", *problems]))
        return request

    @property
    def elsewhere(self) -> bool:
        """In other processes than this one?"""
        return self.slurm or self.local > 0

    @property
    def tasks_per_node(self) -> int:
        return max(1, self.gpus_per_node)

    @property
    def processes(self) -> int:
        return self.nodes * self.tasks_per_node if self.slurm else max(1, self.local)

    def lines(self) -> list[tuple[str, list[str]]]:
        """(place, KEY VALUE pairs) of each line of --array-overrides; one without a place where there is no array."""
        if self.array_overrides is None:
            return [("", [])]
        try:
            text = self.array_overrides.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise LaunchError(f"--array-overrides {self.array_overrides}: cannot be read ({error})") from None
        lines = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                words = shlex.split(line, comments=True)
            except ValueError as error:
                raise LaunchError(f"{self.array_overrides}, line {number}: {error}") from None
            if words:
                lines.append((f"{self.array_overrides}, line {number}", words))
        if not lines:
            raise LaunchError(f"--array-overrides {self.array_overrides}: no line with KEY VALUE pairs")
        return lines

    def _problems(self) -> list[str]:
        problems = []
        if self.slurm and self.local:
            problems.append("--slurm and --local ask for two places; give one")
        if not self.slurm:
            plain = ("local", "slurm")
            problems += [
                f"{_flag(field.name)} is for --slurm; give that too"
                for field in fields(self)
                if field.name not in plain and getattr(self, field.name) != field.default
            ]
        lowest = {"nodes": 1, "gpus_per_node": 0, "cpus_per_task": 1, "time_min": 1, "signal_delay_s": 1}
        for name, low in {**lowest, "local": 0, "max_restarts": 0}.items():
            if getattr(self, name) < low:
                problems.append(f"{_flag(name)} is {getattr(self, name)}; allowed: {low} or more")
        if self.mem_gb is not None and not 0 < self.mem_gb < 1e6:
            problems.append(f"--mem-gb is {self.mem_gb:g}; allowed: above 0 (leave it out for the cluster's default)")
        if self.signal_delay_s >= 60 * max(1, self.time_min):
            problems.append(
                f"--signal-delay-s is {self.signal_delay_s}; allowed: below --time-min's {self.time_min} min"
            )
        for name in _NAMES:
            if (text := getattr(self, name)) is not None and not (text and text.isprintable()):
                problems.append(f"{_flag(name)} is {text!r}; give a name of the cluster's")
        return problems


_NAMES = ("partition", "account", "constraint", "qos", "exclude")  # of the cluster's things


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that a Request is made of."""
    here = parser.add_argument_group("where to run (without these: here, or as what torchrun or srun started)")
    here.add_argument("--local", type=int, default=0, metavar="N", help="N processes on this machine")
    here.add_argument("--slurm", action="store_true", help="submit to SLURM; restarts go on from the last checkpoint")
    default = Request()
    numbers = {
        "nodes": "machines",
        "gpus_per_node": "and as many processes on each; 0: one process without a GPU",
        "cpus_per_task": "cores for each process; DATA.NUM_WORKERS of them decode",
        "time_min": "minutes; when they are over the run is saved and goes on in the queue",
        "max_restarts": "restarts after preemption, time-out or loss of a node, until the job is given up",
        "signal_delay_s": "seconds before the time is over at which to save",
    }
    for name, text in numbers.items():
        value = getattr(default, name)
        here.add_argument(_flag(name), type=int, default=value, metavar="N", help=f"{text} (default: {value})")
    here.add_argument("--mem-gb", type=float, metavar="GB", help="memory per node (default: the cluster's)")
    for name in _NAMES:
        what = "nodes to stay away from" if name == "exclude" else f"the cluster's {name} to use"
        here.add_argument(_flag(name), metavar=name.upper(), help=what)
    help_array = (
        "one job array, with a task for each line of KEY VALUE pairs in FILE; OUTPUT_DIR/0, /1, ... unless given"
    )
    here.add_argument("--array-overrides", type=Path, metavar="FILE", help=help_array)
    here.add_argument("--snapshot", action="store_true", help="run a copy of the code, made now")
    here.add_argument(
        "--wait", action="store_true", help="follow the job to its end; status 0 where it is done, else 1"
    )
    here.add_argument("--dry-run", action="store_true", help="print the sbatch text and submit nothing")


@dataclass(frozen=True)
class Job:
    """One run of a tool. config: YAML text, which the tool is given as --cfg; arguments: what follows that.

    batch: clips per step that the processes share, 0 where nothing is shared.
    """

    output: Path
    config: str
    arguments: Sequence[str] = ()
    batch: int = 0


def start(request: Request, script: str | Path, jobs: Sequence[Job]) -> int:
    """Run the tool `script` where the request says; the exit status, 0 once a job is submitted.

    Several jobs are one array of SLURM's. Raises LaunchError where the request cannot be met.
    """
    world = distributed.world_from_environment()
    if "RANK" in os.environ or world.size > 1:
        raise LaunchError(
            f"this is already rank {world.rank} of {world.size} processes that torchrun or srun started; "
            f"{'--slurm' if request.slurm else '--local'} starts its own, so call the tool itself"
        )
    for batch in {job.batch for job in jobs if job.batch % request.processes}:
        near = batch - batch % request.processes or request.processes
        raise LaunchError(f"TRAIN.BATCH_SIZE {batch} is not divisible by {request.processes} processes; try {near}")
    script = Path(script).resolve()
    return _submit(request, script, jobs) if request.slurm else _run_here(request.local, script, jobs[0])


# Processes on this machine


def _run_here(count: int, script: Path, job: Job) -> int:
    """`count` processes of the tool. The first that fails ends the others."""
    with tempfile.TemporaryDirectory(prefix="octvideo-") as folder, socket.socket() as free:
        config = Path(folder) / "config.yaml"
        config.write_text(job.config)
        free.bind(("127.0.0.1", 0))
        place: dict[str, Any] = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": free.getsockname()[1]}
        free.close()
        path = os.pathsep.join(filter(None, [str(TREE), os.environ.get("PYTHONPATH")]))
        place |= {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": path}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        command = [sys.executable, str(script), "--cfg", str(config), *job.arguments]
        processes: list[subprocess.Popen] = []
        try:
            with _forwarding(processes):
                for rank in range(count):
                    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    processes.append(subprocess.Popen(command, env={**environment, **own}))
                return _await(processes)
        except KeyboardInterrupt:  # a terminal sends it to all of them
            _end(processes, patience_s=5)
            return 130
        finally:
            _end(processes, patience_s=0)


def _await(processes: Sequence[subprocess.Popen]) -> int:
    ended: dict[int, int] = {}  # rank -> status
    while len(ended) < len(processes):
        for rank, process in enumerate(processes):
            if rank in ended or process.poll() is None:
                continue
            status = ended[rank] = process.returncode if process.returncode >= 0 else 128 - process.returncode
            if status in STOPPED:
                _end(processes, patience_s=60)  # all were told to stop, and leave together
                return status
            if status:
                _end(processes, patience_s=0)
                if len(processes) > 1:
                    said = f"rank {rank} of {len(processes)} ended with status {status}; the others were ended"
                    print(said, file=sys.stderr)
                return status
        time.sleep(0.05)
    return 0


def _end(processes: Sequence[subprocess.Popen], patience_s: float) -> None:
    end = time.monotonic() + patience_s
    for process in processes:
        try:
            process.wait(max(end - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
    for process in processes:
        process.wait()


@contextlib.contextmanager
def _forwarding(processes: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Signals that ask to stop go to all processes."""

    def forward(number: int, frame: Any) -> None:
        for process in processes:
            process.send_signal(number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# A job of SLURM, on the machine that submits it


def _submit(request: Request, script: Path, jobs: Sequence[Job]) -> int:
    import submitit

    output = jobs[0].output.resolve()
    folder = output / "slurm" / time.strftime("%Y%m%d-%H%M%S")
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
    return _follow(job_id, folder, len(jobs)) if request.wait else 0


def _fresh(folder: Path) -> Path:
    """A folder of its own for every submission: job numbers may begin again, and old results would be taken for new."""
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
        "job_name": name,
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
    parameters |= {key: getattr(request, key) for key in _NAMES}
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
        f"  {'|'.join(map(str, STOPPED))})",
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


# A job of SLURM, followed

_GOING_ON = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING",
             "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}  # fmt: skip


def _follow(job_id: str, folder: Path, count: int) -> int:
    """Say what the job says until it is over; 0 where every task of it is done, else 1."""
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


# A job of SLURM, on the machines it was given


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
