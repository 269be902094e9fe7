"""Videos re-encoded to a short side with keyframes close together, which is what reading clips at random wants.

`python datasets/kinetics.py resize` is the front of it.
"""

from __future__ import annotations

import errno
import gc
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import av
from av.codec.context import Flags
from av.container import InputContainer
from av.error import FFmpegError
from av.filter import Graph
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, VideoReformatter
from av.video.stream import VideoStream
from tqdm import tqdm

from octvideo.data.decode import DecodeError, MachineError, open_video
from octvideo.data.lists import VideoList

if TYPE_CHECKING or __package__:
    from datasets import doctor, shards
    from datasets.motion import SettingsError, write_text
else:  # imported by a script, which has this folder on its path
    import doctor
    import shards
    from motion import SettingsError, write_text


@dataclass(frozen=True)
class Resizing:
    """What decides the bytes of the resized files. short_side in pixels; gop: frames from keyframe to keyframe."""

    short_side: int
    crf: int = 20
    gop: int = 12
    version: int = 1  # raise it with every change that shows in the files

    def check(self) -> None:
        """Raises SettingsError that names every problem."""
        problems = []
        if self.short_side < 2 or self.short_side % 2:
            problems.append(f"short-side is {self.short_side}: h264 takes even sizes, give 256 or 320")
        if not 0 <= self.crf <= 51:
            problems.append(f"crf is {self.crf}: give 0 (best) to 51, such as {Resizing.crf}")
        if self.gop < 1:
            problems.append(f"gop is {self.gop}: give 1 or more")
        if problems:
            raise SettingsError("; ".join(problems))


class Failure(NamedTuple):
    """Why a file was not resized; code: the error number of the system, 0 where there is none."""

    reason: str
    code: int = 0


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no fault of the file: no other could be written either


def resized(width: int, height: int, sample_aspect: Fraction | None, short_side: int) -> tuple[int, int]:
    """Width and height, even, with square pixels: the short side as given, or its own where it is smaller."""
    shape = (width * (sample_aspect or 1), Fraction(height))
    scale = min(Fraction(1), short_side / min(shape))
    across, down = (max(2, 2 * round(side * scale / 2)) for side in shape)
    if scale == 1:  # never larger, not by the rounding to even sizes either
        across, down = (max(2, int(side) // 2 * 2) for side in shape)
    return across, down


def turns(frame: VideoFrame) -> list[str]:
    """The filters that show a picture upright: of its display matrix (x' = a x + c y, y' = b x + d y, y down)."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return []
    a, b, _, c, d = (round(value / 65536) for value in struct.unpack("=9i", bytes(data))[:5])
    across, down = (c, b) if (a, d) == (0, 0) else (a, d)
    if abs(across) != 1 or abs(down) != 1 or (a and b):
        raise DecodeError(f"its display matrix {(a, b, c, d)} is no multiple of 90 degrees")
    transposed = ["transpose"] if a == 0 else []
    return [*transposed, *(["hflip"] if across < 0 else []), *(["vflip"] if down < 0 else [])]


def filters(names: Sequence[str], size: tuple[int, int], time_base: Fraction) -> Callable[[VideoFrame], VideoFrame]:
    """A function that puts yuv420p frames of a size (width, height) through filters, in this thread."""
    if not names:
        return lambda frame: frame
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(width=size[0], height=size[1], format=VideoFormat("yuv420p"), time_base=time_base)
    chain = [graph.add(name, "dir=cclock_flip" if name == "transpose" else None) for name in names]
    graph.link_nodes(source, *chain, graph.add("buffersink")).configure()

    def apply(frame: VideoFrame) -> VideoFrame:
        graph.push(frame)
        return graph.vpull()

    return apply


def decoded(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """The frames of a stream. Errors: DecodeError for the first that is damaged."""
    count = 0
    try:
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise DecodeError(f"frame {count} is damaged; fetch or encode it again")
            yield frame
            count += 1
    except FFmpegError as error:
        raise DecodeError(f"cannot be decoded behind frame {count - 1} ({error.strerror}); fetch it again") from error


def small_frames(container: InputContainer, stream: VideoStream, short_side: int) -> Iterator[VideoFrame]:
    """The frames of a stream, small, upright, with square pixels, in yuv420p, their times ascending from 0."""
    shrink = VideoReformatter()
    tick = stream.time_base or Fraction(1, 1000)
    step = max(1, round(1 / (tick * (stream.average_rate or stream.guessed_rate or 25))))
    size, upright = (0, 0), None
    first = last = 0
    for frame in decoded(container, stream):
        # What is missing or goes back (joined files), or is a guess (avi with reordered pictures), is no time.
        guessed = "avi" in container.format.name and stream.codec_context.has_b_frames
        time = None if guessed else frame.pts
        if upright is None:
            size = resized(frame.width, frame.height, stream.sample_aspect_ratio, short_side)
            upright = filters(turns(frame), size, tick)
            first = last = time or 0
        else:
            last = time if time is not None and time > last else last + step
        small = shrink.reformat(
            frame,
            *size,
            "yuv420p",
            interpolation="BICUBIC",
            src_color_range=frame.color_range or None,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        small.pts, small.time_base, small.duration = last - first, tick, frame.duration
        small = upright(small)
        small.pict_type = 0  # else the encoder would make keyframes where the source has them
        yield small


def encode(source: str, target: Path, settings: Resizing) -> int:
    """Re-encodes a file to h264 in mp4 and returns the number of frames. Errors: FFmpegError, DecodeError."""
    options = {
        "crf": str(settings.crf),
        "preset": "veryfast",
        "g": str(settings.gop),
        "x264-params": "cpu-independent=1",  # the same bytes on every machine
    }
    count = 0
    with (
        av.open(f"file:{source}", metadata_errors="ignore") as old,
        av.open(f"file:{target}", "w", format="mp4", options={"movflags": "+faststart"}) as new,
    ):
        stream = doctor.video_stream(old)
        assert stream is not None  # open_video has read it
        out = new.add_stream("libx264", rate=stream.average_rate or stream.guessed_rate, options=options)
        codec = out.codec_context
        codec.thread_count = 1
        codec.flags |= Flags.frame_duration  # of the last frame: nothing else tells it
        for frame in small_frames(old, stream, settings.short_side):
            if not count:
                out.width, out.height, out.pix_fmt = frame.width, frame.height, "yuv420p"
                codec.time_base = frame.time_base
                codec.color_range, codec.colorspace = frame.color_range, frame.colorspace
                codec.color_primaries, codec.color_trc = frame.color_primaries, frame.color_trc
            new.mux(out.encode(frame))
            count += 1
        new.mux(out.encode(None))
    gc.collect()  # PyAV ties a frame that was asked for its side data to itself: see decode_pyav
    return count


def unfinished_of(target: Path) -> Path:
    """Where a file is while it is being written."""
    return target.with_name(f".{target.name}.part")


def resize_file(source: str, target: Path, settings: Resizing, replace: bool) -> Failure | None:
    """Writes target from source, whole or not at all. It is whole when it has all the frames of the source."""
    unfinished = unfinished_of(target)
    try:
        with open_video(source) as video:
            expected = video.num_frames
        target.parent.mkdir(parents=True, exist_ok=True)
        count = encode(source, unfinished, settings)
        with open_video(str(unfinished)) as video:
            count = min(count, video.num_frames)
        if count != expected:
            return Failure(f"{count} of its {expected} frames could be decoded; fetch or encode it again")
        if replace:
            with unfinished.open("rb") as file:
                os.fsync(file)  # before the only other copy goes
        unfinished.replace(target)
        if replace:
            Path(source).unlink()
    except (DecodeError, MachineError) as error:
        return Failure(str(error).removeprefix(f"{source}: "))
    except (FFmpegError, OSError) as error:
        return Failure(str(error.strerror or error), error.errno or 0)
    finally:
        unfinished.unlink(missing_ok=True)
    return None


def destinations(videos: VideoList, out: Path) -> list[Path]:
    """The resized file of each line. SettingsError names the lines that would write outside, twice or over a source."""
    problems = shards.strays(videos)
    lines: dict[Path, str] = {}
    targets = []
    for number in range(len(videos)):
        target = (out / videos.name(number)).with_suffix(".mp4")
        first = lines.setdefault(target, videos.place(number))
        if first != videos.place(number):
            problems.append(
                f"{videos.place(number)}: its resized file is that of {first}, {target}; rename one of them"
            )
        targets.append(target)
    if Path(videos.prefix).resolve() == out.resolve():
        problems.append(f"--out is the folder of the originals, {out}; give another")
    if Path(videos.source).resolve() == (out / Path(videos.source).name).resolve():
        problems.append(f"--out holds the list {videos.source} itself, which would be overwritten; give another")
    if Path(videos.source).name == "failed.txt":
        problems.append(f"{videos.source} would be overwritten by the list of failures; rename it")
    shards.refuse(problems)
    return targets


def resize(
    videos: VideoList,
    targets: Sequence[Path],
    out: Path,
    settings: Resizing,
    *,
    replace: bool,
    workers: int,
    limit_s: float,
) -> dict[str, int]:
    """Resizes the files of a list into folder `out` and returns how many were done before, resized and failed.

    Writes the list of the resized files under the name of the given one, and failed.txt (path, tab, reason), which
    keeps what failed of other lists. targets: the file of each line, see destinations. OSError for a full disk.
    """
    todo = [number for number, target in enumerate(targets) if not target.exists()]
    if replace:  # the originals of files that were resized before
        for number in set(range(len(targets))).difference(todo):
            Path(videos.path(number)).unlink(missing_ok=True)
    failed: dict[int, str] = {}
    answers = doctor.outcomes(
        lambda number: resize_file(videos.path(number), targets[number], settings, replace), todo, workers, limit_s
    )
    for number, answer in tqdm(answers, total=len(targets), initial=len(targets) - len(todo), unit="file"):
        if isinstance(answer, Failure) and answer.code in FULL:
            raise OSError(f"cannot write to {out}: {answer.reason}; make room, then run again to go on")
        if isinstance(answer, doctor.Casualty):  # its process could not clean up
            unfinished_of(targets[number]).unlink(missing_ok=True)
        if answer is not None:
            failed[number] = " ".join(answer.reason.split())
    lines = (
        f"{target.relative_to(out).as_posix()} {videos.label(number)}\n"
        for number, target in enumerate(targets)
        if number not in failed
    )
    write_text(out / Path(videos.source).name, "".join(lines))
    listed = {videos.name(number) for number in range(len(videos))}
    failures = [f"{videos.name(number)}\t{failed[number]}" for number in sorted(failed)]
    report = out / "failed.txt"
    others = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
    kept = [line for line in others if line.rpartition("\t")[0] not in listed]
    write_text(report, "".join(f"{line}\n" for line in (*kept, *failures)))
    return {"done before": len(targets) - len(todo), "resized": len(todo) - len(failed), "failed": len(failed)}
