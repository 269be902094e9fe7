"""Read the packets of a video file without decoding them: times, positions, and zeros where pictures should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

ZERO_BLOCK = 4096  # bytes: file systems and downloads that lose data leave zeros in blocks of this size

Span = tuple[int, int]


@dataclass
class Packets:
    """A summary of the packets of a file. Lists are in file order."""

    times: list[int | None] = field(default_factory=list)  # of the shown pictures, in ticks of the video stream
    spans: list[Span] = field(default_factory=list)  # bytes of the pictures
    other_spans: list[Span] = field(default_factory=list)  # bytes of sound and the rest
    counts: Counter[int] = field(default_factory=Counter)  # packets by stream, hidden ones included
    hidden: int = 0  # pictures that the container does not show (edit lists)
    last_ticks: int = 0  # duration of the picture that is shown last
    extents: dict[int, tuple[float, float]] = field(default_factory=dict)  # seconds, begin and end by stream
    longest_sound: float = 0.0  # seconds, of a packet
    cut: int | None = None  # the first picture that is incomplete, if there is one
    rotation: int = 0  # degrees, of the first picture

    def add(self, packet: Packet, is_picture: bool) -> None:
        """Count a packet."""
        self.counts[packet.stream_index] += 1
        if packet.pos is not None:
            (self.spans if is_picture else self.other_spans).append((packet.pos, packet.pos + packet.size))
        if is_picture:
            if packet.is_corrupt and self.cut is None:
                self.cut = len(self.times)
            if packet.is_discard:
                self.hidden += 1
            else:
                self.times.append(packet.pts)
        if packet.pts is not None and packet.time_base and not packet.is_discard:
            self._extend(packet, float(packet.pts * packet.time_base))

    def _extend(self, packet: Packet, begin: float) -> None:
        seconds = float((packet.duration or 0) * (packet.time_base or 0))
        first, last = self.extents.get(packet.stream_index, (begin, begin))
        self.extents[packet.stream_index] = min(first, begin), max(last, begin + seconds)
        if packet.stream.type == "audio":
            self.longest_sound = max(self.longest_sound, seconds)

    def steps(self) -> np.ndarray:
        """Return the ticks from each shown picture to the next; empty if times are missing or repeated."""
        times = [when for when in self.times if when is not None]
        steps = np.diff(np.sort(times))
        return steps if len(times) == len(self.times) > 1 and steps.min() > 0 else steps[:0]


def video_stream(container: InputContainer) -> VideoStream | None:
    """Return the stream that the decoders read: the best that is no cover picture. It gets one decoding thread."""
    pictures = video_streams(container)
    best = container.streams.best("video")
    stream = next((stream for stream in pictures if stream is best), pictures[0] if pictures else None)
    if stream is not None and stream.codec_context is not None:
        stream.codec_context.thread_count = 1
    return stream


def video_streams(container: InputContainer) -> list[VideoStream]:
    """Return the video streams that are no cover pictures."""
    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def read_packets(container: InputContainer, stream: VideoStream) -> Packets:
    """Read all packets; decode only the first picture. Errors: FFmpegError."""
    packets = Packets()
    rotation: int | None = None
    last = (-1, 0)
    for packet in container.demux():
        if not packet.size:
            continue
        is_picture = packet.stream is stream
        packets.add(packet, is_picture)
        if is_picture and rotation is None:
            with suppress(FFmpegError):  # the decoder reports it later
                rotation = next((frame.rotation for frame in stream.decode(packet)), None)
        if is_picture and not packet.is_discard:
            last = max(last, (packet.pts or 0, packet.duration or 0))
    packets.last_ticks, packets.rotation = last[1], rotation or 0
    return packets


def lost_bytes(path: str, packets: Packets) -> int:
    """Count the zero bytes, in runs of blocks, that are in pictures or between packets where no packet is.

    Coded pictures have no such runs. Silence has them, and so has padding, which is before and after the packets.
    """
    spans = sorted(packets.spans)
    other_spans = sorted(packets.other_spans)
    lost = 0
    for begin, end in zero_runs(path) if spans else ():
        within = spans[0][0] <= begin and end <= max(spans[-1][1], *(span[1] for span in other_spans[-1:]), 0)
        # A packet after padding may itself begin with a few zeros.
        if covered(spans, begin, end) > 16 or (within and not covered(other_spans, begin, end)):
            lost += end - begin
    return lost


def covered(spans: Sequence[Span], begin: int, end: int) -> int:
    """Count the bytes of begin..end that are in the spans."""
    return sum(max(0, min(end, last) - max(begin, first)) for first, last in spans)


def zero_runs(path: str) -> list[Span]:
    """Find runs of complete blocks of zero bytes in a file, as (begin, end) in bytes."""
    runs: list[Span] = []
    with Path(path).open("rb") as file:
        place = 0
        while data := file.read(256 * ZERO_BLOCK):
            complete = len(data) // ZERO_BLOCK * ZERO_BLOCK
            blocks = np.frombuffer(data, np.uint8, complete).reshape(-1, ZERO_BLOCK)
            for block in np.flatnonzero(~blocks.any(axis=1)).tolist():
                begin = place + block * ZERO_BLOCK
                first = runs.pop()[0] if runs and runs[-1][1] == begin else begin
                runs.append((first, begin + ZERO_BLOCK))
            place += len(data)
    return runs
