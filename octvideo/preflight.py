"""What is checked and shown before a run starts elsewhere: everything that would make it fail after hours in a queue.

Reads configurations, so that tools need not. Complete lists are read, but only some of their files are looked for: asking a
network file system for each file of Kinetics takes minutes.
"""

from __future__ import annotations

import os
import pickletools
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from tabulate import tabulate

from octvideo import build, config
from octvideo.config import ConfigError
from octvideo.data.decode import member_of
from octvideo.data.lists import ListError, read_list
from octvideo.engine import checkpoint
from octvideo.files import first_line
from octvideo.launch import Request

SHOWN_VALUE = 40  # characters of a value in the table of tasks


def tasks(request: Request, path: str | Path, overrides: Sequence[str]) -> list[CfgNode]:
    """Load and check the configuration of each task of a request; print warnings, and a table if there are several.

    Raises ConfigError with all problems of all tasks: each once, with the lines that have it.
    """
    checks = Checks(request)
    cfgs = build.load_sweep(path, overrides, request.lines(), check=checks.problems)
    for warning in checks.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    if len(cfgs) > 1:  # the output of --dry-run is the sbatch text alone
        print(table_of_tasks(cfgs), file=sys.stderr if request.dry_run else sys.stdout)
    return cfgs


def table_of_tasks(cfgs: Sequence[CfgNode]) -> str:
    """Return a row per task: its number, OUTPUT_DIR, and the keys whose values differ between the tasks."""
    values = {key: [reduce(getitem, key.split("."), cfg) for cfg in cfgs] for key in config.key_names()}
    output = values.pop("OUTPUT_DIR")
    differing = {key: each for key, each in values.items() if any(value != each[0] for value in each)}
    columns = [map(_shortened, each) for each in differing.values()]
    rows = zip(range(len(cfgs)), output, *columns, strict=True)
    return tabulate([*rows], ["task", "OUTPUT_DIR", *differing], tablefmt="github", disable_numparse=True)


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_VALUE else f"...{text[3 - SHOWN_VALUE :]}"


class Checks:
    """Problems of configurations that are to run as a request asks. A list or file that several name is read once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._known: dict[tuple[Any, ...], str] = {}
        self._parameters: dict[str, int] = {}
        self._space: dict[int, tuple[Path, int, int]] = {}  # disk -> a folder on it, free bytes, bytes of checkpoints

    def problems(self, cfg: CfgNode) -> list[str]:
        """Return one line for each reason why a run with this configuration would fail."""
        return [*self._resources(cfg), *self._lists(cfg), *self._weights(cfg), *self._output(cfg)]

    def warnings(self) -> list[str]:
        """Return what may fail later, for all configurations that were checked."""
        return [
            f"{folder} has {free / 1e9:.1f} GB free, but the checkpoints of all tasks need about {needed / 1e9:.1f} GB: "
            "free some space, or lower TRAIN.KEEP_CHECKPOINTS"
            for folder, free, needed in self._space.values()
            if needed > free
        ]

    def _once(self, read: Callable[..., str], *arguments: Any) -> str:
        key = (read, *arguments)
        if key not in self._known:
            self._known[key] = read(*arguments)
        return self._known[key]

    def _resources(self, cfg: CfgNode) -> list[str]:
        request, problems = self.request, []
        batch, processes = cfg.TRAIN.BATCH_SIZE, request.processes
        if cfg.TRAIN.ENABLE and batch % processes:
            near = batch - batch % processes or processes
            problems.append(f"TRAIN.BATCH_SIZE {batch} is not divisible by {processes} processes; try {near}")
        if request.slurm and cfg.DATA.NUM_WORKERS > request.cpus_per_task:
            problems.append(
                f"DATA.NUM_WORKERS is {cfg.DATA.NUM_WORKERS}; allowed with --cpus-per-task {request.cpus_per_task}: at most "
                f"{request.cpus_per_task}; lower it, or give --cpus-per-task {cfg.DATA.NUM_WORKERS + 1}"
            )
        if request.slurm and cfg.DEVICE == "cuda" and not request.gpus_per_node:
            problems.append(
                "DEVICE is cuda, but --gpus-per-node is 0; allowed: DEVICE cpu, or --gpus-per-node 1 or more"
            )
        return problems

    def _lists(self, cfg: CfgNode) -> list[str]:
        tested = "DATA.TEST_LIST" if cfg.DATA.TEST_LIST else "DATA.VAL_LIST"
        used = {"DATA.TRAIN_LIST": cfg.TRAIN.ENABLE, "DATA.VAL_LIST": cfg.TRAIN.ENABLE and cfg.TRAIN.VAL_PERIOD > 0}
        used[tested] = used.get(tested, False) or cfg.TEST.ENABLE
        problems = []
        for key in (key for key, is_used in used.items() if is_used):
            path, training = cfg.DATA[key.removeprefix("DATA.")], key == "DATA.TRAIN_LIST"
            data = (cfg.DATA.PREFIX, cfg.DATA.SEPARATOR, cfg.MODEL.NUM_CLASSES)
            if text := self._once(_list_problem, path, *data, training, build.takes_images(cfg)):
                problems.append(f"{key}: {text}")
            try:
                build.class_names(cfg, path)
            except ConfigError as error:
                problems.append(_indented(error))
        return list(dict.fromkeys(problems))

    def _weights(self, cfg: CfgNode) -> list[str]:
        folder = Path(cfg.OUTPUT_DIR)
        kept = bool(checkpoint.found(folder))
        problems, files = [], {}
        if cfg.TRAIN.ENABLE:
            resume = cfg.TRAIN.RESUME
            if kept and (resume == "none" or (self.request.slurm and resume != "auto")):
                problems.append(
                    f"OUTPUT_DIR {folder} holds checkpoints, which a restarted job would resume, not "
                    f"TRAIN.RESUME {resume}; give TRAIN.RESUME auto or another OUTPUT_DIR"
                )
            if resume not in ("none", "auto"):
                files["TRAIN.RESUME"] = resume
            elif cfg.TRAIN.INIT and not kept:
                files["TRAIN.INIT"] = cfg.TRAIN.INIT
        if cfg.TEST.ENABLE and cfg.TEST.CHECKPOINT:
            files["TEST.CHECKPOINT"] = cfg.TEST.CHECKPOINT
        elif not cfg.TRAIN.ENABLE and not kept:
            problems.append(
                f"OUTPUT_DIR {folder} holds no checkpoint to test; train first, or give TEST.CHECKPOINT FILE"
            )
        for key, path in files.items():
            if text := self._once(_checkpoint_problem, path):
                problems.append(f"{key}: {text}")
        return problems

    def _output(self, cfg: CfgNode) -> list[str]:
        folder = Path(cfg.OUTPUT_DIR).absolute()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if text := self._once(_folder_problem, there, not self.request.dry_run):
            return [f"OUTPUT_DIR: {text}"]
        return self._too_large(cfg, there) if cfg.TRAIN.ENABLE else []

    def _too_large(self, cfg: CfgNode, folder: Path) -> list[str]:
        """Compare the size of checkpoints with the free space. `folder` exists."""
        if (model := cfg.MODEL.dump()) not in self._parameters:  # whose number does not depend on OCTAVE
            self._parameters[model] = build.cost(cfg, cfg.DATA.TRAIN_CROP).params
        copies = 1 + bool(cfg.SOLVER.MOMENTUM) + bool(cfg.TRAIN.EMA_DECAY)
        size, usage = 4 * self._parameters[model] * copies, shutil.disk_usage(folder)
        if not usage.total:  # some network file systems report nothing
            return []
        if size > usage.free:
            free = f"{folder} has {usage.free / 1e9:.2f} GB free"
            return [f"OUTPUT_DIR: {free}, but one checkpoint needs about {size / 1e9:.2f} GB; choose another disk"]
        disk = folder.stat().st_dev
        needed = self._space.get(disk, (folder, 0, 0))[2] + size * (cfg.TRAIN.KEEP_CHECKPOINTS + 1)
        self._space[disk] = (folder, usage.free, needed)
        return []


def _list_problem(path: str, prefix: str, separator: str, num_classes: int, training: bool, images: bool) -> str:
    """Return what is wrong with a list, or "". Of its files, the first, the middle and the last are looked for."""
    try:
        if images and Path(path).is_dir():
            return _image_folder_problem(path, num_classes)
        videos = read_list(
            path,
            num_classes=num_classes,
            prefix=prefix,
            separator=separator,
            require_all_classes=training,
            by_path=True,
        )
    except (ListError, OSError) as error:
        return _indented(error)
    for index in sorted({0, len(videos) // 2, len(videos) - 1}):
        member = member_of(videos.path(index))
        file = Path(member.tar if member else videos.path(index)).absolute()
        if not file.is_file():
            return f"{videos.place(index)}: no file {str(file)!r}; check the path and DATA.PREFIX {prefix!r}"
    return ""


def _image_folder_problem(path: str, num_classes: int) -> str:
    """Count the classes only: ImageNet has a million files."""
    with os.scandir(path) as entries:
        count = sum(entry.is_dir() and not entry.name.startswith(".") for entry in entries)
    if count == num_classes:
        return ""
    return f"{path}: {count} class folders, but MODEL.NUM_CLASSES is {num_classes}; correct the number or the path"


def _checkpoint_problem(text: str) -> str:
    """Return why a file cannot be a checkpoint of octvideo, or "", without reading the weights."""
    path = Path(text).absolute()
    if not path.is_file():
        return f"no file {str(path)!r}"
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
            with archive.open(name) as file:
                found = _format_of(file.read(4096))
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        return f"{path} is not an intact checkpoint ({first_line(error)})"
    if found not in checkpoint.READABLE:
        other = "weights of another project; convert them with tools/inflate.py" if found is None else f"format {found}"
        return (
            f"{path} is not a checkpoint of octvideo (formats {', '.join(map(str, checkpoint.READABLE))}), but {other}"
        )
    return ""


def _format_of(head: bytes) -> int | None:
    """Return the value of the first key of a pickled dictionary if that is "format". Nothing is unpickled."""
    key = None
    try:
        for operation, value, _ in pickletools.genops(head):
            if key == "format" and isinstance(value, int) and operation.name.startswith("BININT"):
                return value
            if key not in (None, "format"):
                return None
            if operation.name.endswith("UNICODE"):
                key = value
    except ValueError:  # `head` ends within an operation
        pass
    return None


def _folder_problem(folder: Path, try_it: bool) -> str:
    """Return why nothing can be written below an existing folder, or ""."""
    if not folder.is_dir():
        return f"{folder} is not a folder; give another OUTPUT_DIR"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} cannot be written (no permission, or a read-only disk); give another OUTPUT_DIR"
    if try_it:
        try:
            with tempfile.TemporaryFile(dir=folder, prefix=".octvideo-") as file:
                file.write(b"0")
        except OSError as error:
            return f"{folder} cannot be written ({error.strerror}); give another OUTPUT_DIR"
    return ""


def _indented(error: Exception) -> str:
    """Return a message of several lines so that its further lines are indented in a list of problems."""
    return str(error).replace("\n", "\n    ")
