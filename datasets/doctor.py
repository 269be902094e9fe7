"""Find the usable files of a list: open and decode each one, and name what is wrong with it.

`python datasets/kinetics.py check` is its command. Decoders are native code and files come from anywhere, so
the work is done by processes that may die or hang without harm to the rest: `outcomes`.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream
from torch import Tensor
from tqdm import tqdm

from octvideo.data.decode import DecodeError, MachineError, Video, check_machine, chosen_backend, open_video
from octvideo.data.lists import VideoList

if TYPE_CHECKING or __package__:
    from datasets import motion
    from datasets.claims import Claims
    from datasets.packets import Packets, lost_bytes, read_packets, video_stream
else:  # imported by a script, which has this folder on its path
    import motion
    from claims import Claims
    from packets import Packets, lost_bytes, read_packets, video_stream

# Forked, so that a worker costs milliseconds and shares the list; each is told what to do through a pipe.
FORK = multiprocessing.get_context("fork")
OUTPUTS = ("clean.txt", "bad.txt", "report.json", "results.jsonl")
FLAT = 2.0  # grey levels: the deviation below which a picture is one colour


# ---- processes that may die


class Casualty(NamedTuple):
    """What comes of a task whose worker did not answer: why."""

    reason: str


class Worker:
    """A process that does one task at a time. `others`: the pipes that this process holds to other workers."""

    def __init__(self, function: Callable[[Any], Any], others: Sequence[Connection]) -> None:
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=serve, args=(function, theirs, (*others, self.pipe)), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Any = None
        self.deadline = 0.0

    def give(self, task: Any, limit_s: float) -> None:
        self.task, self.deadline = task, time.monotonic() + limit_s
        with suppress(OSError):  # it died idle: answer() will say so
            self.pipe.send(task)

    def ready(self) -> bool:
        return self.pipe.poll() or not self.process.is_alive() or time.monotonic() >= self.deadline

    def answer(self) -> Any:
        """What came of the task. After a Casualty of its making, the worker is dead."""
        try:
            if self.pipe.poll():
                return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(1)  # its end of the pipe closes a moment before it is gone
        alive = self.process.is_alive()
        self.kill()
        if alive:
            return Casualty("hangs: no answer within the time limit")
        code = self.process.exitcode or 0
        return Casualty(f"crashes the decoder: {signal.Signals(-code).name if code < 0 else f'exit status {code}'}")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def serve(function: Callable[[Any], Any], pipe: Connection, inherited: Sequence[Connection]) -> None:
    """What a worker does: tasks from the pipe, answers to it, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers ctrl-C
    for other in inherited:  # a copy that stays open here would hide the parent's end from its other workers
        other.close()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # native code complains there of every damaged picture
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    gc.freeze()  # what the parent made need not be looked through, nor its memory copied
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            answer = function(task)
        except MachineError as error:
            answer = error
        except Exception as error:  # noqa: BLE001  # whatever a file brings about is that file's, and no one else's
            answer = Casualty(f"{type(error).__name__}: {error}")
        pipe.send(answer)


def outcomes(
    function: Callable[[Any], Any], tasks: Iterable[Any], workers: int, limit_s: float
) -> Iterator[tuple[Any, Any]]:
    """Yields (task, function(task)) as they are done, in `workers` processes.

    The answer is a Casualty if the function raised, its process died, or it took longer than limit_s seconds; such a
    process is replaced and the other tasks continue. Raises the function's MachineError: no file is to blame for it.
    """
    waiting = iter(tasks)
    idle: list[Worker] = []
    busy: list[Worker] = []
    try:
        while True:
            for task in islice(waiting, workers - len(busy)):
                worker = idle.pop() if idle else Worker(function, [worker.pipe for worker in busy])
                worker.give(task, limit_s)
                busy.append(worker)
            if not busy:
                return
            patience = min(worker.deadline for worker in busy) - time.monotonic()
            wait(
                [end for worker in busy for end in (worker.pipe, worker.process.sentinel)], min(max(0, patience), 3600)
            )
            for worker in [worker for worker in busy if worker.ready()]:
                busy.remove(worker)
                task, answer = worker.task, worker.answer()
                if not worker.pipe.closed:
                    idle.append(worker)
                if isinstance(answer, MachineError):
                    raise answer
                yield task, answer
    finally:
        for worker in (*idle, *busy):
            worker.kill()


# ---- one file


@dataclass(frozen=True)
class Settings:
    """How files are examined. seconds: what each should last, None for any; shortest_s: less is a problem."""

    full: bool = False
    samples: int = 8
    seconds: float | None = None
    shortest_s: float = 0.5
    timeout_s: float = 30

    def check(self) -> None:
        """Raises SettingsError that names every problem."""
        problems = []
        if self.samples < 1:
            problems.append(f"samples is {self.samples}: give 1 or more")
        if self.shortest_s < 0:
            problems.append(f"shortest-s is {self.shortest_s:g}: give 0 or more")
        for name, value in (("seconds", self.seconds), ("timeout-s", self.timeout_s)):
            if value is not None and not value > 0:
                problems.append(f"{name} is {value:g}: give more than 0")
        if problems:
            raise motion.SettingsError("; ".join(problems))


@dataclass(frozen=True)
class Decoder:
    """A decoder that files are judged by. opener: path -> open video."""

    name: str
    version: str
    opener: Callable[[str], Video]

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def find_decoder(backend: str = "auto") -> Decoder:
    """Return the decoder that a value of DATA.DECODER selects. Errors: MissingDecoderError, ValueError."""
    name = chosen_backend(backend)
    importlib.import_module(f"octvideo.data.decode_{name}")  # if it is missing, one error here, not one for each file
    version = importlib.metadata.version({"pyav": "av"}.get(name, name))
    return Decoder(name, version, partial(open_video, backend=name))


@dataclass
class Facts:
    """What is known of a file; None where it was not found out.

    width and height: of the first frame as shown; seconds: from the first frame shown to the end of the last.
    problems make it unusable, notes do not; each begins with its kind and a colon.
    """

    frames: int | None = None
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    codec: str | None = None
    container: str | None = None
    seconds: float | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def examine(path: str, settings: Settings, opener: Callable[[str], Video] = open_video) -> Facts:
    """Opens and decodes a file. Whatever is wrong with it ends up in the facts' problems."""
    facts = Facts()
    pictures = 0
    try:
        if not Path(path).stat().st_size:
            facts.problems.append("unreadable: the file is empty")
            return facts
        with av.open(f"file:{path}", metadata_errors="ignore") as container:
            pictures = survey(path, container, facts)
    except (FFmpegError, OSError) as error:
        check_machine(path, error)
        facts.problems.append(f"unreadable: {error.strerror}")
    if any(problem.startswith(("unreadable", "no video")) for problem in facts.problems):
        return facts
    watch(path, settings, opener, facts)
    compare_counts(pictures, facts)
    seconds = facts.seconds or (facts.frames / facts.fps if facts.frames and facts.fps else None)
    facts.seconds = seconds
    if seconds is not None and seconds < settings.shortest_s:
        facts.problems.append(f"wrong length: {seconds:.2f} s, less than {settings.shortest_s:g} s")
    elif seconds is not None and settings.seconds and abs(seconds - settings.seconds) > 0.1 * settings.seconds:
        facts.problems.append(f"wrong length: {seconds:.2f} s, not {settings.seconds:g} s")
    return facts


def survey(path: str, container: InputContainer, facts: Facts) -> int:
    """Record what the container and its packets show; return the number of pictures that are shown."""
    facts.container = container.format.name
    stream = video_stream(container)
    if stream is None:
        facts.problems.append("no video stream: nothing to see in this file")
        return 0
    if stream.codec_context is None:
        facts.problems.append("unreadable: no decoder for its video stream is built in")
        return 0
    facts.codec = stream.codec_context.codec.canonical_name
    facts.width, facts.height = stream.width, stream.height
    packets = read_packets(container, stream)
    claims = Claims(path, container, stream, packets)
    if shortfalls := claims.shortfalls():
        facts.problems.append(f"truncated: {', '.join(shortfalls)}")
    if conflicts := claims.conflicts():
        facts.problems.append(f"wrong times: {', '.join(conflicts)}")
    if lost := lost_bytes(path, packets):
        facts.problems.append(f"zeroed: {lost} bytes of zeros where pictures should be")
    facts.notes += claims.notes()
    measure(stream, packets, facts)
    return len(packets.times)


def measure(stream: VideoStream, packets: Packets, facts: Facts) -> None:
    """Record the duration, the frame rate and the rotation of the pictures."""
    steps = packets.steps()
    # Times that are missing or repeat (avi, joined files) are no measure: then frames are counted.
    if len(steps):
        tick = float(stream.time_base or 1)
        facts.seconds = (int(steps.sum()) + (packets.last_ticks or int(np.median(steps)))) * tick
        median = float(np.median(steps))
        if np.abs(steps - median).max() > max(0.2 * median, 0.0015 / tick):  # containers may round to 1 ms
            shortest, longest = 1000 * tick * steps.min(), 1000 * tick * steps.max()
            facts.notes.append(f"variable frame rate: {shortest:.0f} to {longest:.0f} ms from frame to frame")
    if packets.rotation:
        facts.notes.append(f"rotated: stored turned by {packets.rotation % 360} degrees, shown upright")


def watch(path: str, settings: Settings, opener: Callable[[str], Video], facts: Facts) -> None:
    """What the frames tell, all of them or samples from the first to the last."""
    sizes: dict[str, int] = {}
    flat = watched = 0
    try:
        with opener(path) as video:
            facts.frames, facts.fps = video.num_frames, video.fps
            for index in places(video.num_frames, settings):
                # One at a time: a clip is of one size, and reading on decodes nothing twice.
                frame = video.frames([index])[0]
                height, width = frame.shape[:2]
                sizes.setdefault(f"{width}x{height}", index)
                flat += is_flat(frame)
                watched += 1
    except DecodeError as error:
        reason = str(error).removeprefix(f"{path}: ")
        if not any(problem.startswith("truncated") for problem in facts.problems) or watched:
            facts.problems.append(f"{'unreadable' if facts.frames is None else 'damaged'}: {reason}")
    if sizes:
        facts.width, facts.height = map(int, next(iter(sizes)).split("x"))
    if len(sizes) > 1:
        seen = ", ".join(f"{size} from frame {index}" for size, index in sizes.items())
        facts.problems.append(f"changing frame size: {seen}")
    if flat > watched / 2:
        facts.problems.append(f"blank: {flat} of {watched} frames looked at are one colour")


def compare_counts(pictures: int, facts: Facts) -> None:
    """Compare the number of frames that the decoder finds with the number of pictures in the container.

    A few may differ: pictures before the first keyframe, and AVI packets that repeat a picture, give no frame.
    """
    if facts.frames is None or facts.frames == pictures:
        return
    text = f"the decoder finds {facts.frames} frames, the container holds {pictures} pictures"
    if facts.frames < pictures / 2:
        facts.problems.append(f"lost frames: {text}")
    else:
        facts.notes.append(f"frame count: {text}")


def places(num_frames: int, settings: Settings) -> list[int]:
    """The frames to look at, ascending: the first and the last are among them."""
    if settings.full:
        return list(range(num_frames))
    return sorted(set(np.linspace(0, num_frames - 1, settings.samples).round().astype(int).tolist()))


def is_flat(frame: Tensor) -> bool:
    """Whether uint8 [H, W, 3] is one colour, but for noise."""
    return bool(frame[::4, ::4].float().std(dim=(0, 1), correction=0).max() < FLAT)


# ---- a list of files


def check(videos: VideoList, out: Path, settings: Settings, workers: int, decoder: Decoder) -> dict[str, Any]:
    """Examine the files of a list, write clean.txt, bad.txt and report.json to folder `out`, and return the report.

    Results are added to results.jsonl one by one. They are reused unless the file or the decoder has changed.
    """
    results = out / "results.jsonl"
    known = read_results(results, decoder)
    marks = [(videos.name(index), *mark(videos.path(index))) for index in range(len(videos))]
    todo = [index for index, each in enumerate(marks) if each not in known]
    examined = outcomes(
        lambda index: examine(videos.path(index), settings, decoder.opener), todo, workers, settings.timeout_s
    )
    with results.open("a", encoding="utf-8") as file:
        for index, answer in tqdm(examined, total=len(videos), initial=len(videos) - len(todo), unit="file"):
            facts = Facts(problems=[answer.reason]) if isinstance(answer, Casualty) else answer
            for texts in (facts.problems, facts.notes):
                texts[:] = [" ".join(text.split()) for text in texts]  # a line each, whatever a message holds
            known[marks[index]] = asdict(facts)
            name, size, changed = marks[index]
            key = {"path": name, "bytes": size, "changed": changed, "decoder": str(decoder)}
            file.write(json.dumps({**key, **asdict(facts)}) + "\n")
            file.flush()
    return write_report(videos, [known[each] for each in marks], out, decoder)


def mark(path: str) -> tuple[int, int]:
    """Size and time of change of a file, by which a replaced one is known; zeros where there is none."""
    try:
        found = Path(path).stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def read_results(path: Path, decoder: Decoder) -> dict[tuple[str, int, int], dict[str, Any]]:
    """Return the facts of earlier runs with this decoder, by name, size and time of change.

    A line that an interruption left unfinished is removed from the file.
    """
    known: dict[tuple[str, int, int], dict[str, Any]] = {}
    if not path.exists():
        return known
    whole = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            with suppress(ValueError, KeyError, TypeError):  # a damaged line: the file is examined again
                facts = json.loads(line)
                key = facts.pop("path"), facts.pop("bytes"), facts.pop("changed")
                if facts.pop("decoder") == str(decoder):
                    known[key] = asdict(Facts(**facts))
    os.truncate(path, whole)
    return known


def write_report(videos: VideoList, facts: Sequence[dict[str, Any]], out: Path, decoder: Decoder) -> dict[str, Any]:
    """Write clean.txt, bad.txt and report.json, in the list's order, and return the report."""
    clean, bad, files = [], [], []
    for index, each in enumerate(facts):
        name = videos.name(index)
        if each["problems"]:
            bad.append(f"{name}\t{'; '.join(each['problems'])}\n")
        else:
            clean.append(f"{name} {videos.label(index)}\n")
        files.append({"path": name, "label": videos.label(index), **each})
    kinds = {
        column: dict(Counter(kind for each in facts for kind in {text.partition(":")[0] for text in each[column]}))
        for column in ("problems", "notes")
    }
    counts = {"files": len(facts), "usable": len(clean), "bad": len(bad), **kinds}
    judge = {"name": decoder.name, "version": decoder.version}
    report = {"decoder": judge, "list": videos.source, "prefix": videos.prefix, "counts": counts, "files": files}
    motion.write_text(out / "clean.txt", "".join(clean))
    motion.write_text(out / "bad.txt", "".join(bad))
    motion.write_text(out / "report.json", json.dumps(report, indent=1) + "\n")
    return report
