"""Compare what the container of a video states (bytes, frames, duration) with what is in the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

if TYPE_CHECKING or __package__:
    from datasets import containers
    from datasets.packets import Packets, video_streams
else:  # imported by a script, which has this folder on its path
    import containers
    from packets import Packets, video_streams

# Containers that store their duration. For others FFmpeg estimates it from the packets or the size of the file, and asf
# stores a longer one.
STORE_DURATION = {"mp4", "matroska", "avi", "flv", "ivf", "nut", "mxf", "rm"}
# The duration of an AVI that was written to a pipe: its writer could not return to the header.
PLACEHOLDER = 1 << 30
ROUNDING_S = 0.001  # containers may round times to milliseconds
OUTLASTS_S = 0.5  # sound that lasts this much longer than the pictures is worth a note


class Claims:
    """The statements of an open file. path: for its bytes; stream: the one whose frames are read."""

    def __init__(self, path: str, container: InputContainer, stream: VideoStream, packets: Packets) -> None:
        self.size = Path(path).stat().st_size
        self.names = set(container.format.name.split(","))
        self.stated = containers.read(path, self.names)
        self.stream, self.packets = stream, packets
        self.streams = video_streams(container)
        self.sounds = [stream.index for stream in container.streams.audio]
        # Packets that are in an index. Only mp4 has a complete one; edit lists take packets out of it.
        self.indexed = {s.index: len(s.index_entries) if "mp4" in self.names else 0 for s in self.streams}
        self.begin, self.end = packets.extents.get(stream.index, (0.0, 0.0))
        steps = packets.steps() * float(stream.time_base or 1)
        frame = 1 / float(stream.average_rate or stream.guessed_rate or 25)
        self.longest_frame = float(steps.max()) if len(steps) else frame
        self.seconds = self._stated_seconds(container)

    def _stated_seconds(self, container: InputContainer) -> float | None:
        """Return the duration that the container stores, None if it stores none."""
        if not self.names & STORE_DURATION or self.stream.frames >= PLACEHOLDER:
            return None
        if self.stated.movie is not None and self.stated.movie.seconds is not None:
            return self.stated.movie.seconds
        return container.duration / av.time_base if container.duration else None

    def shortfalls(self) -> list[str]:
        """Return the evidence that the file holds less than it states."""
        evidence = []
        if self.stated.size > self.size:
            evidence.append(f"the container takes {self.stated.size} bytes or more, the file has {self.size}")
        if self.packets.cut is not None:
            evidence.append(f"the data are cut short or damaged at frame {self.packets.cut}")
        evidence += [
            f"{self.packets.counts[stream.index]} of {self.indexed[stream.index]} frames of stream {stream.index}"
            for stream in self.streams
            if self.packets.counts[stream.index] < self.indexed[stream.index]
        ]
        return evidence + self._early_end()

    def _early_end(self) -> list[str]:
        """Compare the durations. Writers differ about the last packets: a frame and a packet of sound may be missing."""
        if self.seconds is None:
            return []
        allowance = self.longest_frame + self.packets.longest_sound + ROUNDING_S
        begin = min([0.0, *(begin for begin, _ in self.packets.extents.values())])
        end = max((end for _, end in self.packets.extents.values()), default=0.0)
        if self.seconds - (end - begin) > allowance:
            return [f"ends at {end - begin:.2f} s of {self.seconds:.2f} s"]
        stated = float((self.stream.duration or 0) * (self.stream.time_base or 0))
        pictures = self.end - min(0.0, self.begin)
        if stated - pictures > allowance:
            return [f"the pictures end at {pictures:.2f} s of {stated:.2f} s"]
        return []

    def conflicts(self) -> list[str]:
        """Return the statements about time that contradict each other or the packets."""
        conflicts = list(self.stated.movie.conflicts) if self.stated.movie else []
        if self.seconds is not None:
            # A damaged time table makes a frame longer than the file.
            allowance = min(self.longest_frame, self.seconds) + self.packets.longest_sound + ROUNDING_S
            pictures = self.end - max(0.0, self.begin)
            if pictures - self.seconds > allowance:
                conflicts.append(f"the pictures last {pictures:.2f} s, the file {self.seconds:.2f} s")
        return conflicts

    def notes(self) -> list[str]:
        """Return what a user may want to know of a file that is complete."""
        notes = []
        default = next((stream for stream in self.streams if stream.disposition & Disposition.default), self.streams[0])
        if default is not self.stream:
            notes.append(
                f"another stream: frames are read from {_describe(self.stream)}, not from {_describe(default)}"
            )
        taken_out = max(0, self.stream.frames - self.indexed[self.stream.index]) if "mp4" in self.names else 0
        if hidden := self.packets.hidden + taken_out:
            notes.append(f"hidden frames: the container hides {hidden} of {hidden + len(self.packets.times)}")
        sound = max((end for index, (_, end) in self.packets.extents.items() if index in self.sounds), default=0.0)
        if sound - self.end > OUTLASTS_S:
            notes.append(f"early end: the pictures end at {self.end:.2f} s, the sound at {sound:.2f} s")
        return notes


def _describe(stream: VideoStream) -> str:
    return f"stream {stream.index} ({stream.width}x{stream.height})"
