"""Where a run takes place, as the command line asks: the flags, their problems, and what is to run."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from octvideo.errors import UserError
from octvideo.files import path_argument


class LaunchError(UserError, ValueError):
    """The request for a place to run cannot be met; the message has the reason and the remedy."""


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
        for name, high in {"time_min": 60 * 24 * 366, "signal_delay_s": 65535}.items():
            if getattr(self, name) > high:
                problems.append(f"{_flag(name)} is {getattr(self, name)}; allowed: at most {high}")
        if self.mem_gb is not None and not 0.001 <= self.mem_gb < 1e6:  # 0 MB is all memory of a node
            allowed = "0.001 to 999999 (leave it out for the cluster's default)"
            problems.append(f"--mem-gb is {self.mem_gb:g}; allowed: {allowed}")
        if self.signal_delay_s >= 60 * max(1, self.time_min):
            problems.append(
                f"--signal-delay-s is {self.signal_delay_s}; allowed: below --time-min's {self.time_min} min"
            )
        for name in NAMES:
            if (text := getattr(self, name)) is not None and not (text.isprintable() and _NAME.fullmatch(text)):
                allowed = "give a name that the cluster defines, without spaces, quotes and backslashes"
                problems.append(f"{_flag(name)} is {text!r}; {allowed}")
        return problems


NAMES = ("partition", "account", "constraint", "qos", "exclude")  # flags whose value is a name that the cluster defines
_NAME = re.compile(r"(?!-)[^\s'\"\\\\]+")


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
    for name in NAMES:
        what = "nodes to stay away from" if name == "exclude" else f"the cluster's {name} to use"
        here.add_argument(_flag(name), metavar=name.upper(), help=what)
    help_array = (
        "one job array, with a task for each line of KEY VALUE pairs in FILE; OUTPUT_DIR/0, /1, ... unless given"
    )
    here.add_argument("--array-overrides", type=path_argument, metavar="FILE", help=help_array)
    here.add_argument("--snapshot", action="store_true", help="run a copy of the code, made now")
    here.add_argument(
        "--wait", action="store_true", help="follow the job to its end; status 0 where it is done, else 1"
    )
    here.add_argument("--dry-run", action="store_true", help="print the sbatch text and submit nothing")


@dataclass(frozen=True)
class Job:
    """One run of a tool. config: YAML text, which the tool receives as --cfg; arguments: the further arguments."""

    output: Path
    config: str
    arguments: Sequence[str] = ()
