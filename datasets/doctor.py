"""Which files of a list can be used: each is opened and decoded, and what is wrong with it is told apart.

`python datasets/kinetics.py check` is the front of it. Decoders are native code and files come from anywhere, so
the work is done by processes that may die or hang without harm to the rest: `outcomes`.
"""

from __future__ import annotations

import faulthandler
import gc
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
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream
from torch import Tensor
from tqdm import tqdm

from octvideo.data.decode import DecodeError, Video, open_video
from octvideo.data.lists import VideoList

if TYPE_CHECKING or __package__:
    from datasets import motion
else:  # imported by a script, which has this folder on its path
    import motion

# Forked, so that a worker costs milliseconds and shares the list; each is told what to do through a pipe.
FORK = multiprocessing.get_context("fork")
OUTPUTS = ("clean.txt", "bad.txt", "report.json", "results.jsonl")
ZERO_BLOCK = 4096  # bytes: what a file system or a download that lost data leaves as zeros comes in such blocks
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
        except Exception as error:  # noqa: BLE001  # whatever a file brings about is that file's, and no one else's
            answer = Casualty(f"{type(error).__name__}: {error}")
        pipe.send(answer)


def outcomes(
    function: Callable[[Any], Any], tasks: Iterable[Any], workers: int, limit_s: float
) -> Iterator[tuple[Any, Any]]:
    """Yields (task, function(task)) as they are done, in `workers` processes.

    A Casualty stands for the answer where the function raised, its process died, or it took longer than limit_s
    seconds; such a process is replaced and the other tasks go on.
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


class Packets(NamedTuple):
    """What the packets of a file say without being decoded. Times in ticks of the video stream, places in bytes."""

    times: list[int | None]  # of the pictures that are shown, in file order
    last: int  # ticks for which the last of them is shown
    spans: list[tuple[int, int]]  # where in the file the pictures are
    other_spans: list[tuple[int, int]]  # and where sound and the rest
    seconds: float  # from 0, or from the first moment where that is before, to the last, of all streams
    cut: int | None  # the first packet that is not all there, if one is
    rotation: int  # degrees, of the first picture


def examine(path: str, settings: Settings, opener: Callable[[str], Video] = open_video) -> Facts:
    """Opens and decodes a file. Whatever is wrong with it ends up in the facts' problems."""
    facts = Facts()
    try:
        if not Path(path).stat().st_size:
            facts.problems.append("unreadable: the file is empty")
            return facts
        with av.open(f"file:{path}", metadata_errors="ignore") as container:
            survey(path, container, facts)
    except (FFmpegError, OSError) as error:
        facts.problems.append(f"unreadable: {error.strerror}")
    if any(problem.startswith(("unreadable", "no video")) for problem in facts.problems):
        return facts
    watch(path, settings, opener, facts)
    seconds = facts.seconds or (facts.frames / facts.fps if facts.frames and facts.fps else None)
    facts.seconds = seconds
    if seconds is not None and seconds < settings.shortest_s:
        facts.problems.append(f"wrong length: {seconds:.2f} s, less than {settings.shortest_s:g} s")
    elif seconds is not None and settings.seconds and abs(seconds - settings.seconds) > 0.1 * settings.seconds:
        facts.problems.append(f"wrong length: {seconds:.2f} s, not {settings.seconds:g} s")
    return facts


def video_stream(container: InputContainer) -> VideoStream | None:
    """The stream that the decoders read: the best that is no cover picture. One decoding thread."""
    pictures = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    stream = next((stream for stream in pictures if stream is best), pictures[0] if pictures else None)
    if stream is not None and stream.codec_context is not None:
        stream.codec_context.thread_count = 1
    return stream


def survey(path: str, container: InputContainer, facts: Facts) -> None:
    """What the container and its packets tell."""
    facts.container = container.format.name
    stream = video_stream(container)
    if stream is None:
        facts.problems.append("no video stream: nothing to see in this file")
        return
    if stream.codec_context is None:
        facts.problems.append("unreadable: no decoder for its video stream is built in")
        return
    facts.codec = stream.codec_context.codec.canonical_name
    facts.width, facts.height = stream.width, stream.height
    packets = read_packets(container, stream)
    promised = container.duration / av.time_base if container.duration else 0
    if packets.cut is not None:
        facts.problems.append(f"truncated: the data are cut short or damaged at frame {packets.cut}")
    elif promised - packets.seconds > max(0.5, 0.05 * promised):
        facts.problems.append(f"truncated: ends at {packets.seconds:.1f} s of {promised:.1f} s")
    if lost := lost_bytes(path, packets):
        facts.problems.append(f"zeroed: {lost} bytes of zeros where pictures should be")
    times = [when for when in packets.times if when is not None]
    steps = np.diff(np.sort(times))
    # Times that are missing or repeat (avi, joined files) say nothing: then frames are counted.
    if len(times) == len(packets.times) > 1 and steps.min() > 0:
        tick = float(stream.time_base or 1)
        facts.seconds = (int(steps.sum()) + (packets.last or int(np.median(steps)))) * tick
        median = float(np.median(steps))
        if np.abs(steps - median).max() > max(0.2 * median, 0.0015 / tick):  # containers may round to 1 ms
            shortest, longest = 1000 * tick * steps.min(), 1000 * tick * steps.max()
            facts.notes.append(f"variable frame rate: {shortest:.0f} to {longest:.0f} ms from frame to frame")
    if packets.rotation:
        facts.notes.append(f"rotated: stored turned by {packets.rotation % 360} degrees, shown upright")


def read_packets(container: InputContainer, stream: VideoStream) -> Packets:
    """One pass over all packets, decoding the first picture only. Errors: FFmpegError."""
    times: list[int | None] = []
    spans: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    begin, end, last, cut, rotation = float("inf"), float("-inf"), (-1, 0), None, None
    for packet in container.demux():
        if not packet.size:
            continue
        is_picture = packet.stream is stream
        if packet.pos is not None:
            spans[is_picture].append((packet.pos, packet.pos + packet.size))
        if packet.pts is not None and packet.time_base:
            begin = min(begin, float(packet.pts * packet.time_base))
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if not is_picture:
            continue
        if packet.is_corrupt and cut is None:
            cut = len(times)
        if rotation is None:
            with suppress(FFmpegError):  # the decoder's turn is later
                rotation = next((frame.rotation for frame in stream.decode(packet)), None)
        if not packet.is_discard:
            times.append(packet.pts)
            last = max(last, (packet.pts or 0, packet.duration or 0))
    return Packets(times, last[1], spans[True], spans[False], max(0.0, end - min(begin, 0)), cut, rotation or 0)


def lost_bytes(path: str, packets: Packets) -> int:
    """Zero bytes, in runs of blocks, that lie in pictures or between packets where no packet is.

    Coded pictures hold no such runs. Silence does, and so does padding, which is found before and behind the packets.
    """
    spans = sorted(packets.spans)
    other_spans = sorted(packets.other_spans)
    lost = 0
    for begin, end in zero_runs(path) if spans else ():
        within = spans[0][0] <= begin and end <= max(spans[-1][1], *(span[1] for span in other_spans[-1:]), 0)
        # A packet may begin with a few zeros of its own behind a run of padding.
        if covered(spans, begin, end) > 16 or (within and not covered(other_spans, begin, end)):
            lost += end - begin
    return lost


def covered(spans: Sequence[tuple[int, int]], begin: int, end: int) -> int:
    """Bytes of begin..end that lie in the spans."""
    return sum(max(0, min(end, last) - max(begin, first)) for first, last in spans)


def zero_runs(path: str) -> list[tuple[int, int]]:
    """Runs of whole blocks of zero bytes in a file, as (begin, end) in bytes."""
    runs: list[tuple[int, int]] = []
    with Path(path).open("rb") as file:
        place = 0
        while data := file.read(256 * ZERO_BLOCK):
            whole = len(data) // ZERO_BLOCK * ZERO_BLOCK
            blocks = np.frombuffer(data, np.uint8, whole).reshape(-1, ZERO_BLOCK)
            for block in np.flatnonzero(~blocks.any(axis=1)).tolist():
                begin = place + block * ZERO_BLOCK
                first = runs.pop()[0] if runs and runs[-1][1] == begin else begin
                runs.append((first, begin + ZERO_BLOCK))
            place += len(data)
    return runs


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


def places(num_frames: int, settings: Settings) -> list[int]:
    """The frames to look at, ascending: the first and the last are among them."""
    if settings.full:
        return list(range(num_frames))
    return sorted(set(np.linspace(0, num_frames - 1, settings.samples).round().astype(int).tolist()))


def is_flat(frame: Tensor) -> bool:
    """Whether uint8 [H, W, 3] is one colour, but for noise."""
    return bool(frame[::4, ::4].float().std(dim=(0, 1), correction=0).max() < FLAT)


# ---- a list of files


def check(
    videos: VideoList, out: Path, settings: Settings, workers: int, opener: Callable[[str], Video] = open_video
) -> dict[str, Any]:
    """Examines the files of a list and writes clean.txt, bad.txt and report.json to folder `out`: the report.

    Results go to results.jsonl as they come, and are not asked for again unless the file has changed.
    """
    results = out / "results.jsonl"
    known = read_results(results)
    marks = [(videos.name(index), *mark(videos.path(index))) for index in range(len(videos))]
    todo = [index for index, each in enumerate(marks) if each not in known]
    examined = outcomes(lambda index: examine(videos.path(index), settings, opener), todo, workers, settings.timeout_s)
    with results.open("a", encoding="utf-8") as file:
        for index, answer in tqdm(examined, total=len(videos), initial=len(videos) - len(todo), unit="file"):
            facts = Facts(problems=[answer.reason]) if isinstance(answer, Casualty) else answer
            for texts in (facts.problems, facts.notes):
                texts[:] = [" ".join(text.split()) for text in texts]  # a line each, whatever a message holds
            known[marks[index]] = asdict(facts)
            name, size, changed = marks[index]
            file.write(json.dumps({"path": name, "bytes": size, "changed": changed, **asdict(facts)}) + "\n")
            file.flush()
    return write_report(videos, [known[each] for each in marks], out)


def mark(path: str) -> tuple[int, int]:
    """Size and time of change of a file, by which a replaced one is known; zeros where there is none."""
    try:
        found = Path(path).stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def read_results(path: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    """The facts of earlier runs by name, size and time of change. Cuts off a line that an interruption left unfinished."""
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
                known[key] = asdict(Facts(**facts))
    os.truncate(path, whole)
    return known


def write_report(videos: VideoList, facts: Sequence[dict[str, Any]], out: Path) -> dict[str, Any]:
    """Writes clean.txt, bad.txt and report.json, in the list's order, and returns the report."""
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
    report = {"list": videos.source, "prefix": videos.prefix, "counts": counts, "files": files}
    motion.write_text(out / "clean.txt", "".join(clean))
    motion.write_text(out / "bad.txt", "".join(bad))
    motion.write_text(out / "report.json", json.dumps(report, indent=1) + "\n")
    return report
