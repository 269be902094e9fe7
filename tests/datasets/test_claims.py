"""datasets/claims.py: what a container states against what is in the file, as the file check reports it."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from datasets import doctor
from tests.data.conftest import silence, write_clip
from tests.datasets.conftest import FRAMES, STATING, patched, write_noise

Stating = Callable[[str], Path]


def examine(path: Path, *, full: bool = False) -> doctor.Facts:
    return doctor.examine(str(path), doctor.Settings(full=full, shortest_s=0))


@pytest.mark.parametrize("name", STATING)
def test_every_cut_is_noticed_and_no_intact_file(name: str, stating: Stating, tmp_path: Path) -> None:
    path = stating(name)
    assert examine(path, full=True).problems == []
    data = path.read_bytes()
    rng = random.Random(1)
    for size in [len(data) - 1, *(rng.randrange(len(data) // 20, len(data)) for _ in range(8))]:
        cut = tmp_path / path.name
        cut.write_bytes(data[:size])
        problems = examine(cut).problems
        assert problems, f"{size} of {len(data)} bytes"
        assert problems[0].startswith(("truncated: ", "unreadable: ")), problems


def packet_ends(path: Path) -> list[int]:
    """Return where the pictures of a file end, in bytes, in file order."""
    with av.open(str(path)) as container:
        return [
            packet.pos + packet.size for packet in container.demux(video=0) if packet.size and packet.pos is not None
        ]


# ---- evidence besides the lengths


def test_the_number_of_frames(stating: Stating, tmp_path: Path) -> None:
    """Between two pictures, so that none is incomplete."""
    path = stating("mp4, index first")
    cut = tmp_path / "a.mp4"
    cut.write_bytes(path.read_bytes()[: packet_ends(path)[9]])
    (problem,) = examine(cut).problems
    assert f"10 of {FRAMES} frames of stream 0" in problem


@pytest.mark.parametrize("packets", [1, FRAMES // 2, FRAMES - 3])
def test_the_duration_of_a_flash_video(packets: int, stating: Stating, tmp_path: Path) -> None:
    """Cut at the border of two tags: no length is wrong. A tag has 12 bytes before its picture, and 4 after it."""
    path = stating("flash")
    cut = tmp_path / "a.flv"
    cut.write_bytes(path.read_bytes()[: packet_ends(path)[packets - 1] + 16])
    (problem,) = examine(cut).problems
    assert problem.startswith("truncated: ends at ")
    assert problem.endswith(" s of 1.00 s")


def test_the_duration_of_a_matroska_file_of_unknown_length(stating: Stating, tmp_path: Path) -> None:
    data = stating("matroska").read_bytes()
    segment = data.index(bytes.fromhex("18538067")) + 4
    data = data[:segment] + b"\x01" + b"\xff" * 7 + data[segment + 8 :]
    whole, cut = tmp_path / "a.mkv", tmp_path / "b.mkv"
    whole.write_bytes(data)
    assert examine(whole).problems == []
    cluster = data.rindex(bytes.fromhex("A3"), 0, len(data) // 2)
    cut.write_bytes(data[:cluster])
    assert "s of 1.00 s" in examine(cut).problems[0]


def test_the_duration_of_an_avi_whose_length_was_adapted(stating: Stating, tmp_path: Path) -> None:
    path = stating("avi")
    data = bytearray(path.read_bytes()[: packet_ends(path)[11]])
    data[4:8] = struct.pack("<I", len(data) - 8)
    cut = tmp_path / "a.avi"
    cut.write_bytes(data)
    (problem,) = examine(cut).problems
    assert problem == "truncated: ends at 0.50 s of 1.00 s"


def test_where_nothing_states_more(stating: Stating, tmp_path: Path) -> None:
    """The limits: streams that end at the border of two packets are complete streams."""
    stream = write_noise(tmp_path / "a.h264", "libx264")
    stream.write_bytes(stream.read_bytes()[: stream.read_bytes().rindex(b"\0\0\1\x41")])
    piped = stating("matroska, pipe")
    cut = tmp_path / "b.mkv"
    cut.write_bytes(piped.read_bytes()[: piped.read_bytes().rindex(bytes.fromhex("1F43B675"))])
    for path in (stream, cut):
        facts = examine(path, full=True)
        assert facts.problems == []
        assert facts.frames is not None
        assert facts.frames < FRAMES


# ---- tables of times


@pytest.mark.parametrize(
    ("box", "place", "value"),
    [(b"stts", 16, 92_297_589), (b"stts", 16, 2**31 - 1), (b"mdhd", 16, 1)],
    ids=["long frames", "longer frames", "one tick a second"],
)
def test_a_time_table_that_leaves_one_frame_of_10_bits(box: bytes, place: int, value: int, tmp_path: Path) -> None:
    path = Path(write_clip(tmp_path / "a.mp4", 30, pix_fmt="yuv420p10le", b_frames=3))
    assert (examine(path).problems, examine(path).frames) == ([], 30)
    facts = examine(patched(path, tmp_path / "b.mp4", box, place, value))
    assert facts.frames == 1
    assert facts.problems[0].startswith("wrong times: ")


def test_an_edit_list_that_hides_frames_is_noted(tmp_path: Path) -> None:
    path = Path(write_clip(tmp_path / "a.mp4", 30, b_frames=2))
    hidden = patched(path, tmp_path / "b.mp4", b"elst", 16, 12 * 512 + 1024)  # the first of 12 frames is a keyframe
    hidden = patched(hidden, tmp_path / "c.mp4", b"elst", 12, 600)
    facts = examine(patched(hidden, tmp_path / "d.mp4", b"mvhd", 20, 600))
    assert (facts.problems, facts.frames) == ([], 18)
    assert facts.notes == ["hidden frames: the container hides 12 of 30"]


def test_an_edit_list_that_shows_less_than_the_file_states(tmp_path: Path) -> None:
    path = Path(write_clip(tmp_path / "a.mp4", 30, b_frames=2))
    facts = examine(patched(path, tmp_path / "b.mp4", b"elst", 12, 200))
    assert facts.frames is not None
    assert facts.frames < 10
    assert facts.problems == ["truncated: ends at 0.20 s of 1.00 s"]


# ---- notes


def two_streams(path: Path, defaults: tuple[int, ...]) -> Path:
    """A small stream and a larger one, which FFmpeg prefers if both or none are marked. defaults: the marked ones."""
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=24, width=side, height=side) for side in (48, 96)]
        for number, stream in enumerate(streams):
            stream.pix_fmt = "yuv420p"
            stream.disposition = Disposition.default if number in defaults else Disposition(0)  # type: ignore[assignment]
        for number in range(24):
            for stream in streams:
                pixels = np.random.default_rng(number).integers(0, 256, (stream.height, stream.width, 3), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("defaults", "read"), [((0, 1), 96), ((0,), 48), ((1,), 96)])
def test_several_video_streams(defaults: tuple[int, ...], read: int, tmp_path: Path) -> None:
    facts = examine(two_streams(tmp_path / "a.mp4", defaults))
    assert (facts.problems, facts.width) == ([], read)
    note = "another stream: frames are read from stream 1 (96x96), not from stream 0 (48x48)"
    assert facts.notes == ([note] if defaults == (0, 1) else [])


def test_the_tables_of_a_stream_that_is_not_read(tmp_path: Path) -> None:
    path = two_streams(tmp_path / "a.mp4", (1,))
    stated = patched(path, tmp_path / "b.mp4", b"stsz", 12, 23)  # stream 0
    problems = examine(stated).problems
    assert "the time table has 24 frames, the size table 23" in problems[-1]


def test_sound_that_outlasts_the_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, width=64, height=48)
        stream.pix_fmt = "yuv420p"
        sound = container.add_stream("aac", rate=16000, layout="mono")
        for number in range(24):
            pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
        for _ in range(90):
            container.mux(sound.encode(silence()))
        container.mux(sound.encode(None))
    facts = examine(path)
    assert facts.problems == []
    assert len(facts.notes) == 1
    assert facts.notes[0].startswith("early end: the pictures end at 1.00 s, the sound at 3.")
