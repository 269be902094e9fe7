"""Video clips that the tests write themselves. Every frame carries its own number as a bar code."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from torch import Tensor

ROWS, COLUMNS = 2, 5  # blocks of the code: numbers up to 1023
GREY = np.full((32, 48, 3), 128, np.uint8)
# Every kind of video that the decoders must get right: name -> file and arguments of write_clip.
CLIPS: dict[str, tuple[str, dict[str, Any]]] = {
    "h264, gop 12": ("a.mp4", {"gop": 12}),
    "h264, gop 12, B frames": ("b.mp4", {"gop": 12, "b_frames": 3}),
    "h264, gop 250": ("c.mp4", {"gop": 250, "num_frames": 100}),
    "h264, gop 250, B frames": ("d.mp4", {"gop": 250, "b_frames": 3, "num_frames": 100}),
    "h264, open gop": ("e.mp4", {"gop": 12, "b_frames": 3, "x264": "open-gop=1"}),
    "h264, refreshed bit by bit": ("f.mp4", {"gop": 30, "x264": "intra-refresh=1"}),
    "h264, one frame": ("g.mp4", {"num_frames": 1}),
    "h264, 10 bit": ("h.mp4", {"pix_fmt": "yuv420p10le"}),
    "h264, odd width": ("i.mkv", {"size": (97, 161), "pix_fmt": "yuv444p"}),
    "h264, transport stream": ("j.ts", {"b_frames": 2}),
    "h264, matroska": ("k.mkv", {"b_frames": 2}),
    "h264, matroska without index": ("k2.mkv", {"b_frames": 2, "container_options": {"live": "1"}}),
    "h264, flash": ("k3.flv", {"b_frames": 2}),
    "h264, elementary stream": ("k4.h264", {}),
    "h264, fragments": ("l.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    "h264, sound": ("m.mp4", {"audio": True}),
    "h264, second of two streams": ("n.mp4", {"with_grey_stream": True}),
    "h264, variable frame rate": ("o.mp4", {"times": [40 * i + 200 * (i // 7) for i in range(60)], "b_frames": 2}),
    "h264, avi with B frames": ("p.avi", {"b_frames": 2}),
    "hevc, open gop": (
        "q.mp4",
        {"codec": "libx265", "options": {"x265-params": "keyint=12:bframes=3:b-adapt=0:scenecut=0:log-level=none"}},
    ),
    "hevc, closed gop": (
        "q2.mp4",
        {"codec": "libx265", "options": {"x265-params": "keyint=12:open-gop=0:bframes=3:scenecut=0:log-level=none"}},
    ),
    "hevc, 10 bit, gop 250": (
        "q3.mp4",
        {"codec": "libx265", "pix_fmt": "yuv420p10le", "num_frames": 100, "options": {"x265-params": "log-level=none"}},
    ),
    "hevc, variable frame rate": (
        "q4.mkv",
        {
            "codec": "libx265",
            "times": [40 * i + 200 * (i // 7) for i in range(60)],
            "options": {"x265-params": "keyint=12:bframes=3:log-level=none"},
        },
    ),
    "vp9": ("r.webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}),
    "vp9, alternate references": (
        "r2.webm",
        {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}},
    ),
    "vp9, variable frame rate": (
        "r3.mp4",
        {
            "codec": "libvpx-vp9",
            "times": [40 * i + 200 * (i // 7) for i in range(60)],
            "options": {"deadline": "realtime", "cpu-used": "8"},
        },
    ),
    # Preset 8, because faster ones leave changes of the code out.
    "av1, open gop": ("x.mp4", {"codec": "libsvtav1", "options": {"preset": "8", "svtav1-params": "irefresh-type=1"}}),
    "av1, closed gop": (
        "x2.mkv",
        {"codec": "libsvtav1", "options": {"preset": "8", "svtav1-params": "irefresh-type=2"}},
    ),
    "av1, 10 bit, gop 250": (
        "x3.mp4",
        {
            "codec": "libsvtav1",
            "pix_fmt": "yuv420p10le",
            "gop": 250,
            "num_frames": 100,
            "options": {"preset": "8"},
        },
    ),
    "vp8": ("s.webm", {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}}),
    "mpeg4": ("t.avi", {"codec": "mpeg4"}),
    "mpeg4, gop 250": ("t2.mp4", {"codec": "mpeg4", "gop": 250, "num_frames": 100}),
    "mpeg4, B frames": ("u.mp4", {"codec": "mpeg4", "b_frames": 2}),
    "mpeg4, avi with B frames": ("v.avi", {"codec": "mpeg4", "b_frames": 2}),
    "mpeg2, program stream": ("w.mpg", {"codec": "mpeg2video", "b_frames": 2}),
}


def code_image(number: int, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3]: the number in binary, highest bit top left, black 0 and white 1."""
    bits = [(number >> bit) & 1 for bit in reversed(range(ROWS * COLUMNS))]
    grid = np.array(bits, np.uint8).reshape(ROWS, COLUMNS) * np.uint8(255)
    blocks = grid[np.arange(height) * ROWS // height][:, np.arange(width) * COLUMNS // width]
    return np.repeat(blocks[..., None], 3, axis=2)


@pytest.fixture(scope="session")
def read_codes() -> Callable[[Tensor], list[int]]:
    """uint8 [T, H, W, 3] -> the number in each frame; -1 for a grey block, that is for garbage."""

    def read(clip: Tensor) -> list[int]:
        _, height, width, _ = clip.shape
        y = (2 * np.arange(ROWS) + 1) * height // (2 * ROWS)
        x = (2 * np.arange(COLUMNS) + 1) * width // (2 * COLUMNS)
        near = np.arange(-5, 6)
        patches = clip.numpy()[:, (y[:, None] + near).ravel()][:, :, (x[:, None] + near).ravel()]
        levels = patches.reshape(len(clip), ROWS, near.size, COLUMNS, near.size * 3).mean(axis=(2, 4))
        numbers = ((levels > 128).reshape(len(clip), -1) << np.arange(ROWS * COLUMNS)[::-1]).sum(axis=1)
        grey = ((levels > 70) & (levels < 185)).any(axis=(1, 2))
        return np.where(grey, -1, numbers).tolist()

    return read


def write_clip(
    path: Path,
    num_frames: int = 60,
    *,
    codec: str = "libx264",
    size: tuple[int, int] = (96, 160),
    rate: int = 30,
    gop: int = 12,
    b_frames: int = 0,
    pix_fmt: str = "yuv420p",
    x264: str = "",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    audio: bool = False,
    with_grey_stream: bool = False,
) -> str:
    """Encode the bar codes 0..num_frames - 1. `times` are presentation times in milliseconds."""
    options = dict(options or {})
    if codec == "libx264":
        options["preset"] = "veryfast"
        options["x264-params"] = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes={b_frames}:{x264}".rstrip(":")
    with av.open(str(path), "w", options=container_options or {}) as container:
        grey = container.add_stream("libx264", rate=rate, width=48, height=32) if with_grey_stream else None
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = size
        if grey is not None:
            stream.disposition = Disposition.default.value  # type: ignore[assignment]
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = gop
        if "vp" not in codec and "av1" not in codec:
            stream.codec_context.max_b_frames = b_frames
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(code_image(number, *size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
            if grey is not None:
                container.mux(grey.encode(av.VideoFrame.from_ndarray(GREY, format="rgb24")))
            if sound is not None:
                container.mux(sound.encode(silence()))
        for each in (stream, grey, sound):
            if each is not None:
                container.mux(each.encode(None))
    return str(path)


def silence(samples: int = 533) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, samples), np.float32), format="fltp", layout="mono")
    frame.sample_rate = 16000
    return frame


def remux(source: str, path: Path, change: Callable[[int, av.Packet], list[av.Packet]], **options: str) -> str:
    """Copy the packets of `source`; `change` gets the number of a packet and the packet, and gives what to write."""
    with av.open(source) as old, av.open(str(path), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            for each in change(number, packet) if packet.size else []:
                each.stream = stream
                new.mux(each)
    return str(path)


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Name in CLIPS -> path; each is written once."""
    folder = tmp_path_factory.mktemp("clips")

    def write(name: str) -> str:
        file_name, arguments = CLIPS[name]
        codec = arguments.get("codec", "libx264")
        if codec not in av.codecs_available:
            pytest.skip(f"this build of PyAV has no encoder {codec}")
        path = folder / file_name
        return str(path) if path.exists() else write_clip(path, **arguments)

    return write


@pytest.fixture(params=list(CLIPS))
def any_clip(request: pytest.FixtureRequest, clip_file: Callable[[str], str]) -> tuple[str, str]:
    """The name and the path of each clip of CLIPS in turn."""
    return request.param, clip_file(request.param)


@pytest.fixture(scope="session", name="write_clip")
def write_clip_fixture() -> Callable[..., str]:
    return write_clip


@pytest.fixture(scope="session", name="remux")
def remux_fixture() -> Callable[..., str]:
    return remux
