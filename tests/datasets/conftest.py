"""Small videos in every container that states its lengths, for the tests of the file check."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

FRAMES = 24


class Pipe:
    """A file without seek, as a muxer sees a pipe: lengths that are known at the end only are never written."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")

    def write(self, data: bytes) -> int:
        return self.file.write(data)

    def close(self) -> None:
        self.file.close()


def write_noise(path: Path, codec: str, *, format: str | None = None, pipe: bool = False, **options: str) -> Path:
    """Write FRAMES frames of random pixels, 48 x 64, 24 a second."""
    file: Any = Pipe(path) if pipe else str(path)
    with av.open(file, "w", format=format, options=options) as container:
        fast = {"libx264": {"preset": "ultrafast"}, "libvpx": {"deadline": "realtime", "cpu-used": "8"}}
        stream = container.add_stream(codec, rate=24, options=fast.get(codec, {}))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = 6
        for number in range(FRAMES):
            pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    if pipe:
        file.close()
    return path


# Every kind of file whose container states lengths -> arguments of write_noise.
STATING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mp4, index first": ("a.mp4", "libx264", {"movflags": "faststart"}),
    "mp4, index last": ("b.mp4", "libx264", {}),
    "mp4, fragments": ("c.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "mp4, index of segments": ("d.mp4", "libx264", {"movflags": "dash+frag_keyframe+global_sidx"}),
    "mov": ("e.mov", "mpeg4", {}),
    "3gp": ("f.3gp", "mpeg4", {}),
    "matroska": ("g.mkv", "libx264", {}),
    "matroska, pipe": ("h.mkv", "libx264", {"format": "matroska", "pipe": True}),
    "webm": ("i.webm", "libvpx", {}),
    "webm, pipe": ("j.webm", "libvpx", {"format": "webm", "pipe": True}),
    "avi": ("k.avi", "mpeg4", {}),
    "avi, pipe": ("l.avi", "mpeg4", {"format": "avi", "pipe": True}),
    "ogg": ("m.ogv", "libvpx", {"format": "ogg"}),
    "flash": ("n.flv", "flv", {}),
    "flash, pipe": ("o.flv", "flv", {"format": "flv", "pipe": True}),
    "asf": ("p.wmv", "wmv2", {}),
    "program stream": ("q.mpg", "mpeg2video", {}),
    "transport stream": ("r.ts", "mpeg2video", {}),
    "transport stream of discs": ("s.m2ts", "mpeg2video", {"mpegts_m2ts_mode": "1"}),
}


@pytest.fixture(scope="session")
def stating(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name in STATING -> path; each is written once."""
    folder = tmp_path_factory.mktemp("containers")

    def write(name: str) -> Path:
        file_name, codec, arguments = STATING[name]
        path = folder / file_name
        return path if path.exists() else write_noise(path, codec, **arguments)

    return write


def patched(path: Path, out: Path, box: bytes, place: int, value: int) -> Path:
    """Overwrite 4 bytes, `place` bytes after the kind of the first such box."""
    data = bytearray(path.read_bytes())
    begin = data.index(box) + place
    data[begin : begin + 4] = struct.pack(">I", value)
    out.write_bytes(data)
    return out
