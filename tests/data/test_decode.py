"""One contract for all decoders: the right frame or a DecodeError. The clips carry their frame numbers."""

import contextlib
import errno
import functools
import os
import pickle
import random
import re
import resource
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.bitstream import BitStreamFilterContext
from torch import Tensor

from octvideo.data import decode as decode_module
from octvideo.data.decode import (
    BACKENDS,
    MAX_PIXELS,
    DecodeError,
    MachineError,
    MissingDecoderError,
    check_machine,
    frames_at_a_time,
    member_of,
    open_video,
    url_of,
)

from ..memory import peak_memory

REAL_VIDEOS = Path(__file__).parents[3] / "shared" / "data" / "videos"
NO_TIMES = "torchcodec goes by the timestamps, and those of this file are no use; use the decoder pyav"
# What a decoder gets wrong, so that it is refused when it is opened.
REFUSED = {
    ("decord", "h264, transport stream"): "decord is inexact in mpegts; use the decoder pyav",
    ("decord", "h264, second of two streams"): "decord mixes up its 2 video streams; use the decoder pyav",
    ("decord", "h264, matroska without index"): "decord cannot open it .*frame-count.*; use the decoder pyav",
    ("decord", "h264, flash"): "decord is inexact in flv; use the decoder pyav",
    ("decord", "h264, elementary stream"): "decord is inexact in h264; use the decoder pyav",
    ("decord", "mpeg2, program stream"): "decord is inexact in mpeg; use the decoder pyav",
    ("decord", "av1, open gop"): "decord cannot open it .*; use the decoder pyav",
    ("decord", "av1, closed gop"): "decord cannot open it .*; use the decoder pyav",
    ("decord", "av1, 10 bit, gop 250"): "decord cannot open it .*; use the decoder pyav",
    ("torchcodec", "h264, transport stream"): "torchcodec is inexact in mpegts; use the decoder pyav",
    ("torchcodec", "h264, avi with B frames"): NO_TIMES,
    ("torchcodec", "h264, flash"): "torchcodec is inexact in flv; use the decoder pyav",
    ("torchcodec", "h264, elementary stream"): "torchcodec is inexact in h264; use the decoder pyav",
    ("torchcodec", "mpeg4, avi with B frames"): NO_TIMES,
    ("torchcodec", "mpeg2, program stream"): "torchcodec is inexact in mpeg; use the decoder pyav",
}
# What it gets wrong after some seeks, so that single frames are refused.
PARTLY_REFUSED = {
    ("torchcodec", "h264, refreshed bit by bit"): "torchcodec gives another frame for frame",
}

Read = Callable[[Tensor], list[int]]
ClipFile = Callable[[str], str]


@functools.cache
def missing(backend: str) -> str:
    """Why a decoder is not there and what to install; "" where it is."""
    try:
        open_video("no file", backend).close()
    except MissingDecoderError as error:
        return str(error)
    except DecodeError:
        return ""
    raise AssertionError("there is a file of this name")


def need(backend: str) -> None:
    if missing(backend):
        pytest.skip(missing(backend))


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    need(request.param)
    return request.param


def right_or_refused(
    path: str, backend: str, orders: Sequence[list[int]], expected: Callable[[int], int], read_codes: Read
) -> int:
    """The contract: the right frames or a DecodeError, for which PyAV has no cause. Gives the number of errors."""
    errors = 0
    for order in orders:
        try:
            with open_video(path, backend) as video:
                assert read_codes(video.frames(order)) == [expected(index) for index in order]
        except DecodeError as error:
            assert backend != "pyav"
            assert str(error).startswith(f"{path}: ")
            assert "; " in str(error)
            errors += 1
    return errors


def orders(num_frames: int) -> Iterator[list[int]]:
    """Single, ordered, shuffled and repeated frames, and the whole video."""
    rng = random.Random(0)
    yield list(range(num_frames))
    for _ in range(4):
        yield [rng.randrange(num_frames)]
    for stride in (1, 2, 7):
        start = rng.randrange(num_frames)
        yield list(range(start, num_frames, stride))
    for _ in range(3):
        yield [rng.randrange(num_frames) for _ in range(6)]
    yield [0, num_frames - 1, 0, num_frames - 1]


def test_the_right_frames_in_the_order_asked(any_clip: tuple[str, str], backend: str, read_codes: Read) -> None:
    name, path = any_clip
    if (backend, name) in REFUSED:
        with pytest.raises(DecodeError, match=REFUSED[backend, name]):
            open_video(path, backend)
        return
    with open_video(path, backend) as video:
        assert video.num_frames == {"h264, one frame": 1}.get(name, 100 if "250" in name else 60)
        for order in orders(video.num_frames):
            try:
                assert read_codes(video.frames(order)) == order
            except DecodeError as error:
                assert PARTLY_REFUSED.get((backend, name), "never") in str(error)


def test_each_first_frame_after_opening(any_clip: tuple[str, str], backend: str, read_codes: Read) -> None:
    """No state of an earlier call helps."""
    name, path = any_clip
    if (backend, name) in REFUSED:
        return
    with open_video(path) as video:
        num_frames = video.num_frames
    singles = [[index] for index in sorted({0, num_frames // 3, num_frames // 2, num_frames - 1})]
    errors = right_or_refused(path, backend, singles, lambda index: index, read_codes)
    assert errors == 0 or (backend, name) in PARTLY_REFUSED


def test_shape_type_and_frame_rate(clip_file: ClipFile, backend: str) -> None:
    with open_video(clip_file("h264, gop 12"), backend) as video:
        clip = video.frames([3, 5])
        assert (clip.dtype, clip.shape, video.fps) == (torch.uint8, (2, 96, 160, 3), 30.0)
        assert clip.is_contiguous()
    with open_video(clip_file("h264, variable frame rate"), backend) as video:
        assert video.fps == pytest.approx(15.025, abs=1e-2)  # 60 frames in 3.99 s
    with open_video(clip_file("h264, odd width"), backend) as video:
        assert video.frames([0]).shape == (1, 97, 161, 3)


@pytest.mark.parametrize("other", ["decord", "torchcodec"])
def test_the_decoders_agree_on_pixels(other: str, clip_file: ClipFile) -> None:
    need(other)
    for name in ("h264, gop 12, B frames", "hevc, open gop", "vp9", "mpeg4", "h264, 10 bit"):
        with open_video(clip_file(name), "pyav") as ours, open_video(clip_file(name), other) as theirs:
            difference = (ours.frames([4, 33]).float() - theirs.frames([4, 33]).float()).abs()
        assert difference.mean() < 1.5, name


def test_colours_are_those_of_the_standard(tmp_path: Path, backend: str) -> None:
    """BT.601, limited range (16..235 is black..white) and full range (0..255 is)."""
    for pix_fmt, luma, chroma in (("yuv420p", 255 / 219, 255 / 224), ("yuvj420p", 1, 1)):
        path = str(tmp_path / f"{pix_fmt}.mp4")
        with av.open(path, "w") as container:
            stream = container.add_stream("libx264", rate=30, width=64, height=48)
            stream.pix_fmt = pix_fmt
            frame = av.VideoFrame(64, 48, pix_fmt)
            for plane, value in zip(frame.planes, (120, 128, 178), strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        grey = (120 if luma == 1 else 120 - 16) * luma
        expected = [grey + 1.402 * 50 * chroma, grey - 0.714 * 50 * chroma, grey]
        with open_video(path, backend) as video:
            assert video.frames([0]).float().mean(dim=(0, 1, 2)).tolist() == pytest.approx(expected, abs=3)


# The display matrix (a, b, c, d) of the file, and what undoes it: [T, H, W, C] as shown -> as stored.
MATRICES: dict[str, tuple[tuple[int, int, int, int], Callable[[Tensor], Tensor]]] = {
    "as is": ((1, 0, 0, 1), lambda clip: clip),
    "90 clockwise": ((0, 1, -1, 0), lambda clip: torch.rot90(clip, 1, (1, 2))),
    "180": ((-1, 0, 0, -1), lambda clip: torch.rot90(clip, 2, (1, 2))),
    "90 anticlockwise": ((0, -1, 1, 0), lambda clip: torch.rot90(clip, -1, (1, 2))),
    "left and right exchanged": ((-1, 0, 0, 1), lambda clip: clip.flip(2)),
    "rows for columns": ((0, 1, 1, 0), lambda clip: clip.transpose(1, 2)),
}


def write_matrix(source: str, path: Path, a: float, b: float, c: float, d: float) -> str:
    """Copy an mp4 with another display matrix: 16.16 numbers 40 bytes into its track header."""
    data = bytearray(Path(source).read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    numbers = [round(value * 65536) for value in (a, b, 0, c, d, 0, 0, 0)]
    data[place : place + 32] = struct.pack(">8i", *numbers)
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("name", MATRICES)
def test_frames_come_upright(name: str, clip_file: ClipFile, tmp_path: Path, backend: str, read_codes: Read) -> None:
    matrix, undo = MATRICES[name]
    path = write_matrix(clip_file("h264, gop 12"), tmp_path / "turned.mp4", *matrix)
    mirrored = matrix[0] * matrix[3] < matrix[1] * matrix[2]
    if backend != "pyav" and mirrored:
        with pytest.raises(DecodeError, match=f"{backend} does not undo the mirroring .*; use the decoder pyav"):
            open_video(path, backend)
        return
    with open_video(path, backend) as video:
        clip = video.frames([20, 41])
    assert clip.shape == ((2, 160, 96, 3) if matrix[0] == 0 else (2, 96, 160, 3))
    assert read_codes(undo(clip).contiguous()) == [20, 41]


@pytest.mark.parametrize("matrix", [(0.7, 0.7, -0.7, 0.7), (0.94, 0.34, -0.34, 0.94)])
def test_other_angles_are_refused(matrix: tuple[float, ...], clip_file: ClipFile, tmp_path: Path) -> None:
    path = write_matrix(clip_file("h264, gop 12"), tmp_path / "turned.mp4", *matrix)
    with open_video(path) as video, pytest.raises(DecodeError, match="no multiple of 90 degrees"):
        video.frames([0])


def test_torchcodec_rounds_other_angles(clip_file: ClipFile, tmp_path: Path) -> None:
    need("torchcodec")
    path = write_matrix(clip_file("h264, gop 12"), tmp_path / "turned.mp4", 0.7, 0.7, -0.7, 0.7)
    with pytest.raises(DecodeError, match="torchcodec turns it by -?45 degrees, where it asks for -?4[45]; use the"):
        open_video(path, "torchcodec")


@pytest.mark.parametrize(("other", "angle"), [("decord", 90), ("torchcodec", 90), ("torchcodec", 180)])
def test_pictures_that_ask_to_be_turned_themselves(other: str, angle: int, clip_file: ClipFile, tmp_path: Path) -> None:
    """A display orientation within H.264, none in the container: only PyAV looks."""
    need(other)
    path = tmp_path / "turned.mp4"
    with av.open(clip_file("h264, gop 12")) as old, av.open(str(path), "w") as new:
        source = old.streams.video[0]
        stream = new.add_stream_from_template(source)
        turn = BitStreamFilterContext(f"h264_metadata=display_orientation=insert:rotate={angle}", source, stream)
        for packet in old.demux(source):
            for turned in turn.filter(packet) if packet.size else []:
                turned.stream = stream
                new.mux(turned)
    with pytest.raises(DecodeError, match=f"{other} (does not turn|turns it by 0 degrees).*; use the decoder pyav"):
        open_video(str(path), other)


def hide_a_copy(number: int, packet: av.Packet) -> list[av.Packet]:
    """VP8: after the first picture the same once more, marked as not to be shown (as alternate references are)."""
    if number:
        return [packet]
    data = bytearray(bytes(packet))
    data[0] &= ~0x10
    hidden = av.Packet(bytes(data))
    hidden.pts = hidden.dts = packet.pts + 1
    hidden.time_base = packet.time_base
    return [packet, hidden]


def test_pictures_that_are_never_shown_are_not_counted(
    clip_file: ClipFile, remux: Callable[..., str], tmp_path: Path, backend: str, read_codes: Read
) -> None:
    path = remux(clip_file("vp8"), tmp_path / "hidden.webm", hide_a_copy)
    try:
        with open_video(path, backend) as video:
            assert video.num_frames == 60
            assert read_codes(video.frames([0, 1, 2, 30, 59])) == [0, 1, 2, 30, 59]
    except DecodeError as error:
        assert backend != "pyav"
        assert f"{backend} finds 61 frames where there are 60" in str(error)


@pytest.mark.parametrize("name", ["h264, open gop", "h264, gop 12, B frames", "hevc, open gop"])
def test_a_file_cut_out_of_another(
    name: str, clip_file: ClipFile, remux: Callable[..., str], tmp_path: Path, backend: str, read_codes: Read
) -> None:
    """What is before the cut by the edit list is not shown: the clip starts at frame 17."""

    def earlier(number: int, packet: av.Packet) -> list[av.Packet]:
        packet.pts -= 17 * 512
        packet.dts -= 17 * 512
        return [packet]

    path = remux(clip_file(name), tmp_path / "cut.mp4", earlier, avoid_negative_ts="disabled")
    with open_video(path) as video:
        assert video.num_frames == 43
        for order in orders(43):
            assert read_codes(video.frames(order)) == [17 + index for index in order]
    right_or_refused(path, backend, [*orders(43), [5], [3, 7]], lambda index: 17 + index, read_codes)


def test_leading_pictures_that_lost_their_reference(
    clip_file: ClipFile, remux: Callable[..., str], tmp_path: Path, backend: str, read_codes: Read
) -> None:
    """A stream that starts at the second keyframe of an open group holds pictures that no decoder can show."""
    started = []

    def from_second_keyframe(number: int, packet: av.Packet) -> list[av.Packet]:
        started.extend([number] if packet.is_keyframe and number else [])
        return [packet] if started else []

    path = remux(clip_file("hevc, open gop"), tmp_path / "tail.mkv", from_second_keyframe)
    with open_video(path) as video:
        first = 60 - video.num_frames
        assert first == 12
        for order in orders(video.num_frames):
            assert read_codes(video.frames(order)) == [first + index for index in order]
    right_or_refused(path, backend, [*orders(60 - first)], lambda index: first + index, read_codes)


def no_h264(packet: av.Packet) -> bytes:
    return b"\xff" * 200


def second_half_lost(packet: av.Packet) -> bytes:
    """The decoder paints over such damage, and only marks the picture."""
    data = bytes(packet)
    return data[: len(data) // 2] + b"\xff" * (len(data) - len(data) // 2)


@pytest.fixture(params=[no_h264, second_half_lost])
def damaged(request: pytest.FixtureRequest, clip_file: ClipFile, remux: Callable[..., str], tmp_path: Path) -> str:
    """Frame 28 is damaged, and with it all up to the next keyframe, 36."""

    def damage(number: int, packet: av.Packet) -> list[av.Packet]:
        if number != 28:
            return [packet]
        broken = av.Packet(request.param(packet))
        broken.pts, broken.dts, broken.time_base = packet.pts, packet.dts, packet.time_base
        return [broken]

    return remux(clip_file("h264, gop 12"), tmp_path / "damaged.mp4", damage)


def test_damage_is_an_error_and_the_other_frames_are_right(damaged: str, read_codes: Read) -> None:
    for order in ([3, 20], [27], [40, 36], [59, 0]):
        with open_video(damaged) as video:
            assert read_codes(video.frames(order)) == order
    for order, wrong in (([28], 28), ([0, 30, 59], 30), ([35], 35), ([27, 33], 33)):
        with open_video(damaged) as video, pytest.raises(DecodeError) as caught:
            video.frames(order)
        reason = r"(Invalid data found when processing input|frame 28 is damaged)"
        assert re.match(
            rf"{damaged}: frame {wrong} of 60 cannot be decoded \({reason}\); the file is damaged: fetch or",
            str(caught.value),
        )


@pytest.mark.parametrize("damaged", [no_h264], indirect=True)
def test_decord_and_a_picture_that_does_not_parse(damaged: str, read_codes: Read) -> None:
    """decord decodes ahead, in a thread: it may or may not come upon the damage while it reads frame 3."""
    need("decord")
    with open_video(damaged, "decord") as video:
        with contextlib.suppress(DecodeError):
            assert read_codes(video.frames([3])) == [3]
        for order in ([3, 30], [29], [50]):  # never on from behind the damage
            with pytest.raises(DecodeError, match=rf"{damaged}: frame \d+ of 60 cannot be decoded"):
                video.frames(order)


@pytest.mark.parametrize("damaged", [no_h264], indirect=True)
def test_torchcodec_and_a_picture_that_does_not_parse(damaged: str, read_codes: Read) -> None:
    need("torchcodec")
    with open_video(damaged, "torchcodec") as video:
        for order in ([3, 28], [30], [29, 31]):  # never on from behind the damage
            with pytest.raises(DecodeError, match=rf"{damaged}: one of the frames .* of 60 cannot .* \(Could not push"):
                video.frames(order)
            assert read_codes(video.frames([3, 59, 27])) == [3, 59, 27]


def test_after_an_error_the_video_goes_on(damaged: str, read_codes: Read) -> None:
    with open_video(damaged) as video:
        for _ in range(2):
            for order in ([27, 28], [30], [31, 35]):
                with pytest.raises(DecodeError, match=f"frame {order[-1] if 27 in order else order[0]} of 60"):
                    video.frames(order)
            assert read_codes(video.frames([50, 3])) == [50, 3]


@pytest.mark.parametrize("name", ["h264, gop 12, B frames", "h264, open gop", "hevc, open gop", "mpeg4, B frames"])
def test_a_demuxer_that_seeks_beside_its_mark(
    name: str, clip_file: ClipFile, monkeypatch: pytest.MonkeyPatch, read_codes: Read
) -> None:
    """A seek that ends at the keyframe behind the one asked for, or between two: an earlier start must be found."""
    from octvideo.data import decode_pyav

    restart, packets = decode_pyav.PyAVVideo._restart, decode_pyav._packets

    def too_far(video: decode_pyav.PyAVVideo, start: int) -> None:
        restart(video, start if start < 0 else min(start + 1, 4))

    def without_its_keyframe(*source: Any) -> Iterator[Any]:
        found = packets(*source)
        first = next(found)
        yield from found if first.pts else chain([first], found)

    with open_video(clip_file(name)) as video:
        for attribute, wrong in (("PyAVVideo._restart", too_far), ("_packets", without_its_keyframe)):
            with monkeypatch.context() as patch:
                patch.setattr(f"octvideo.data.decode_pyav.{attribute}", wrong)
                for order in orders(60):
                    assert read_codes(video.frames(order)) == order


def test_a_picture_size_that_changes(tmp_path: Path, write_clip: Callable[..., str], read_codes: Read) -> None:
    """Two program streams end to end: the timestamps start again too, so frames are counted."""
    parts = [
        Path(write_clip(tmp_path / f"{n}.mpg", 20, codec="mpeg2video", size=size))
        for n, size in enumerate([(96, 160), (64, 128)])
    ]
    joined = tmp_path / "joined.mpg"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    with open_video(str(joined)) as video:
        last = video.num_frames - 1  # the decoder swallows a picture at the seam
        assert read_codes(video.frames([17, 3])) == [17, 3]
        assert video.frames([last]).shape == (1, 64, 128, 3)
        with pytest.raises(DecodeError, match=f"frame {last} is 128x64, the first one read is of another size"):
            video.frames([17, last])


def join_sizes(path: Path, write_clip: Callable[..., str]) -> str:
    """One video stream of 20 frames of 96 x 160 and 20 of 64 x 128, whose container states the first size."""
    frames = 0
    with av.open(str(path), "w") as joined:
        stream = None
        for size in ((96, 160), (64, 128)):
            part = write_clip(path.with_name(f"{size[0]}.mpg"), 20, codec="mpeg2video", size=size)
            with av.open(part) as container:
                stream = stream or joined.add_stream_from_template(container.streams.video[0])
                for packet in container.demux(video=0):
                    if packet.size and packet.time_base:
                        packet.pts = packet.dts = int(frames / 30 / packet.time_base)
                        packet.stream = stream
                        joined.mux(packet)
                        frames += 1
    return str(path)


@pytest.mark.parametrize("container", ["mkv", "mp4"])
def test_decord_scales_a_picture_of_another_size(
    container: str, tmp_path: Path, write_clip: Callable[..., str]
) -> None:
    """A documented limit: PyAV refuses to put both into one clip, decord scales the second to the first size."""
    need("decord")
    path = join_sizes(tmp_path / f"a.{container}", write_clip)
    with open_video(path) as video, pytest.raises(DecodeError, match="of another size"):
        video.frames([0, 39])
    with open_video(path, "decord") as video:
        assert video.frames([0, 39]).shape == (2, 96, 160, 3)


@pytest.mark.parametrize("count", [10**6, 2**30, 2**31 - 1, 2**32 - 1])
def test_more_frames_than_bytes(count: int, clip_file: ClipFile, tmp_path: Path) -> None:
    """decord allocates memory for the stated number of frames, and std::bad_alloc would end the process."""
    need("decord")
    data = bytearray(Path(clip_file("mpeg4, gop 250")).read_bytes())
    table = data.index(b"stts") + 12
    data[table : table + 4] = struct.pack(">I", count)
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    with pytest.raises(DecodeError, match=f"states [0-9]+ frames in {len(data)} bytes.*use the decoder pyav"):
        open_video(str(path), "decord")


def write_faults(folder: Path, write_clip: Callable[..., str]) -> dict[str, tuple[Path, str]]:
    """Name -> a file that is no readable video, and what the error must say."""
    plain = Path(write_clip(folder / "plain.mp4"))
    fast = Path(write_clip(folder / "fast.mp4", container_options={"movflags": "faststart"}))
    contents = {
        "empty": (b"", "Invalid data found"),
        "garbage": (np.random.default_rng(0).bytes(5000), "Invalid data found"),
        "html": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n" * 20, "Invalid data found"),
        "index lost": (plain.read_bytes()[: plain.stat().st_size // 2], "Invalid data found"),
        "data cut": (fast.read_bytes()[: fast.stat().st_size * 2 // 3], r"cut short or damaged at frame \d+"),
    }
    faults = {}
    for name, (data, reason) in contents.items():
        path = folder / f"{name}.mp4"
        path.write_bytes(data)
        faults[name] = (path, reason)
    faults["missing"] = (folder / "missing.mp4", "no such file; check the list and its prefix")
    faults["a folder"] = (folder, "Is a directory")
    sound = folder / "sound.mp3"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("libmp3lame", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), format="s16p", layout="mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    faults["sound only"] = (sound, "it has no video stream")
    cover = folder / "cover.mp3"
    cover.write_bytes(id3_cover() + sound.read_bytes())
    faults["sound with a cover picture"] = (cover, "it has no video stream")
    return faults


def id3_cover() -> bytes:
    """An ID3v2.3 tag that holds a picture."""
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 16, 16, "rgb24", Fraction(1)
    image = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
    body = b"\0image/png\0\3\0" + b"".join(bytes(packet) for packet in encoder.encode(image) + encoder.encode(None))
    frame = b"APIC" + struct.pack(">I", len(body)) + b"\0\0" + body
    size = bytes((len(frame) >> shift) & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + size + frame


def test_files_that_are_no_video(tmp_path: Path, backend: str, write_clip: Callable[..., str]) -> None:
    for name, (path, reason) in write_faults(tmp_path, write_clip).items():
        with pytest.raises(DecodeError, match=reason) as caught:
            open_video(str(path), backend)
        assert str(caught.value).startswith(f"{path}: "), name
        assert "; " in str(caught.value), name  # a remedy


def test_index_outside_the_video(clip_file: ClipFile, backend: str) -> None:
    with open_video(clip_file("h264, gop 12"), backend) as video:
        for index in (-1, 60):
            with pytest.raises(IndexError, match=rf"frame index {index} is outside 0\.\.59 \(60 frames\)"):
                video.frames([0, index])
        with pytest.raises(IndexError, match="no frame index"):
            video.frames([])


def test_unknown_decoder_lists_the_legal_ones() -> None:
    with pytest.raises(ValueError, match="unknown decoder 'ffmpeg'; choose one of: auto, pyav, decord, torchcodec"):
        open_video("x.mp4", "ffmpeg")


@pytest.mark.parametrize(
    ("name", "failure", "remedy"),
    [
        ("decord", "ModuleNotFoundError('no such module')", "pip install decord"),
        ("torchcodec", "ModuleNotFoundError('no such module')", "pip install torchcodec==0.13.0"),
        (
            "torchcodec",
            "RuntimeError('Could not load')",
            "pip install torchcodec==0.13.0, and .* apt-get install ffmpeg",
        ),
    ],
)
def test_a_decoder_that_is_not_installed(
    name: str, failure: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module is not there, or it does not find FFmpeg's libraries. No DecodeError: it is not about a clip."""
    (tmp_path / f"{name}.py").write_text(f"raise {failure}")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [each for each in sys.modules if each.split(".")[0] == name or each.endswith(f"decode_{name}")]:
        monkeypatch.delitem(sys.modules, module)
    for _ in range(2):
        with pytest.raises(MissingDecoderError, match=rf"the decoder {name} cannot be loaded \(.*; {remedy}") as caught:
            open_video("x.mp4", name)
        assert not isinstance(caught.value, DecodeError)


def test_decoders_are_imported_when_used(clip_file: ClipFile) -> None:
    code = (
        "import sys; from octvideo.data.decode import open_video; others = {'decord', 'torchcodec'};"
        "assert not {'av', *others} & set(sys.modules);"
        f"open_video({clip_file('mpeg4')!r}).close(); assert 'av' in sys.modules and not others & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("name", "order", "most"),
    [
        ("h264, gop 250", [0], 1),
        ("h264, gop 250", [9, 0, 5], 10),  # one pass, whatever the order
        ("h264, gop 250, B frames", list(range(0, 60, 8)), 57 + 8),  # and what the decoder holds back
        ("h264, gop 12", [40], 5),  # from the keyframe 36
        ("h264, gop 12", [4, 40], 5 + 5),
        ("h264, gop 12", [9, 12], 13),  # on to the next group: no seek, nothing twice
    ],
)
def test_no_more_is_decoded_than_needed(
    name: str, order: list[int], most: int, clip_file: ClipFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octvideo.data import decode_pyav

    sent, converted = [], []
    packets, rgb = decode_pyav._packets, decode_pyav.PyAVVideo._rgb
    with open_video(clip_file(name)) as video:
        monkeypatch.setattr(decode_pyav, "_packets", lambda *args: (sent.append(p) or p for p in packets(*args)))
        monkeypatch.setattr(decode_pyav.PyAVVideo, "_rgb", lambda *args: converted.append(1) or rgb(*args))
        video.frames(order + order)
    assert len(sent) <= most
    assert len(converted) == len(set(order))


def test_reading_on_decodes_nothing_twice(clip_file: ClipFile, monkeypatch: pytest.MonkeyPatch) -> None:
    from octvideo.data import decode_pyav

    sent = []
    packets = decode_pyav._packets
    with open_video(clip_file("h264, gop 250, B frames")) as video:
        monkeypatch.setattr(decode_pyav, "_packets", lambda *args: (sent.append(p) or p for p in packets(*args)))
        for first in range(0, 100, 10):
            video.frames(range(first, first + 10))
    assert len(sent) <= 100 + 1  # and the one that flushes


def by_plain_decoding(path: Path) -> tuple[int, dict[int, Tensor]]:
    """The number of frames that come when a file is just decoded, and the 1st, 5th, 9th ... turned by FFmpeg's angle."""
    count, images = 0, {}
    with av.open(str(path)) as container:
        try:
            for frame in container.decode(container.streams.best("video")):
                if count % 4 == 0:
                    upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                    images[count] = torch.from_numpy(upright.copy())
                count += 1
        except av.error.InvalidDataError:
            pass  # the rest of corrupted.mp4
    return count, images


@pytest.mark.skipif(not REAL_VIDEOS.is_dir(), reason=f"no real videos at {REAL_VIDEOS}")
@pytest.mark.parametrize("path", sorted(REAL_VIDEOS.glob("*.*")), ids=lambda path: path.name)
def test_real_files_by_seeking_and_in_sequence(path: Path) -> None:
    count, images = by_plain_decoding(path)
    with open_video(str(path)) as video:
        assert video.num_frames == {"corrupted.mp4": 50}.get(path.name, count)
        rng = random.Random(0)
        singles = [[index] for index in rng.choices(list(images), k=3)]
        for order in (list(images), *singles, rng.choices(list(images), k=4)):
            assert torch.equal(video.frames(order), torch.stack([images[index] for index in order]))
        if video.num_frames > count:
            with pytest.raises(DecodeError, match=f"frame {count} of 50 cannot be decoded"):
                video.frames([0, count])


# What the others do not read of the real files.
REAL_REFUSED = {
    ("decord", "corrupted.mp4"): r"frame \d+ of 50 cannot be decoded",
    ("decord", "nasa_13013.mp4"): "decord mixes up its 2 video streams",
    ("decord", "av1_video.mkv"): "decord cannot open it",
    ("torchcodec", "corrupted.mp4"): "one of the frames 0 to 49 of 50 cannot be decoded",
    ("torchcodec", "packed_b_frames.avi"): NO_TIMES,
}


@pytest.mark.skipif(not REAL_VIDEOS.is_dir(), reason=f"no real videos at {REAL_VIDEOS}")
@pytest.mark.parametrize("path", sorted(REAL_VIDEOS.glob("*.*")), ids=lambda path: path.name)
@pytest.mark.parametrize("other", ["decord", "torchcodec"])
def test_real_files_by_the_others(path: Path, other: str) -> None:
    """The frames that PyAV gives, but for the rounding of colours: FFmpeg dithers 10 bits in a way of each version."""
    need(other)
    if (other, path.name) in REAL_REFUSED:
        with (
            pytest.raises(DecodeError, match=REAL_REFUSED[other, path.name]),
            open_video(str(path), other) as video,
        ):
            video.frames([0, 49])
        return
    with open_video(str(path), other) as theirs, open_video(str(path)) as ours:
        last = theirs.num_frames - 1
        assert (ours.num_frames, ours.fps) == (theirs.num_frames, theirs.fps)
        for order in ([last, 0, last // 2], [last // 3], list(range(0, last, 11))[:6]):
            difference = (theirs.frames(order).float() - ours.frames(order).float()).abs().mean(dim=(1, 2, 3))
            assert difference.max() < (4 if "10bits" in path.name else 0.5), order


# ---- videos inside a tar archive


SHARDED = ("h264, gop 12", "h264, matroska", "h264, open gop")


def write_shard(path: Path, sources: Sequence[str]) -> list[str]:
    """A plain archive of these files, and the path of each inside it as a list would have it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for source in sources:
            # a name that plain tar has no room for goes ahead of the header
            archive.add(source, arcname=f"a classé{'x' * 120}/{Path(source).name}")
    with tarfile.open(path) as archive:
        return [f"{path}:{member.offset_data}:{member.size}:{member.name}" for member in archive]


@pytest.fixture
def shard(tmp_path: Path, clip_file: ClipFile) -> list[str]:
    return write_shard(tmp_path / "train-00000.tar", [clip_file(name) for name in SHARDED])


def test_paths_of_members() -> None:
    assert member_of("a/train-00000.tar:512:99:b c/d:e,f.mp4") == ("a/train-00000.tar", 512, 99, "b c/d:e,f.mp4")
    assert member_of("x.tar:1:2:y.tar:3:4:z") == ("x.tar", 1, 2, "y.tar:3:4:z")
    for path in ("a.mp4", "take 1: run.mp4", "a.tar", "a.tar:1:2", "a.tar:1:2:", "a.tar:-1:2:b", "a.zip:1:2:b"):
        assert member_of(path) is None
        assert url_of(path) == f"file:{path}"


def test_the_url_of_a_member_is_read_by_ffmpeg_and_ends_with_it(shard: list[str], clip_file: ClipFile) -> None:
    for path, name in zip(shard, SHARDED, strict=True):
        with av.open(url_of(path)) as inside, av.open(clip_file(name)) as outside:
            assert inside.size == outside.size == Path(clip_file(name)).stat().st_size
            assert [bytes(packet) for packet in inside.demux(video=0)] == [
                bytes(packet) for packet in outside.demux(video=0)
            ]


def test_frames_of_members(shard: list[str], clip_file: ClipFile, backend: str) -> None:
    for path, name in zip(shard, SHARDED, strict=True):
        with open_video(path, backend) as inside, open_video(clip_file(name), backend) as outside:
            assert (inside.num_frames, inside.fps) == (outside.num_frames, outside.fps) == (60, 30.0)
            for order in ([40], [5, 3, 59, 3], [0]):
                assert torch.equal(inside.frames(order), outside.frames(order))


@pytest.mark.parametrize("name", ["odd, dir: x/,,:é [1]%20.tar", "subfile,,start,1,,:x.tar", "{a}#b?c.tar"])
def test_archives_with_odd_names(
    name: str, tmp_path: Path, clip_file: ClipFile, monkeypatch: pytest.MonkeyPatch, backend: str, read_codes: Read
) -> None:
    path = write_shard(tmp_path / name, [clip_file("mpeg4"), clip_file("h264, gop 12")])[1]
    monkeypatch.chdir(tmp_path)
    for each in (path, path.removeprefix(f"{tmp_path}/")):
        with open_video(each, backend) as video:
            assert read_codes(video.frames([17])) == [17]


def test_files_with_odd_names(
    tmp_path: Path, clip_file: ClipFile, monkeypatch: pytest.MonkeyPatch, backend: str, read_codes: Read
) -> None:
    (tmp_path / "take 1: run.mp4").write_bytes(Path(clip_file("h264, gop 12")).read_bytes())
    monkeypatch.chdir(tmp_path)
    with open_video("take 1: run.mp4", backend) as video:
        assert read_codes(video.frames([17])) == [17]


def test_members_that_are_not_there(shard: list[str], tmp_path: Path, backend: str) -> None:
    member = member_of(shard[1])
    assert member is not None
    tar, offset, size, name = member
    end = Path(tar).stat().st_size
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "no archive.tar").write_bytes(bytes(range(256)) * 100)
    for path, reason in (
        (f"{tmp_path}/none.tar:512:100:a.mp4", f"no such archive '{tmp_path}/none.tar'; check the list and its prefix"),
        (f"{tmp_path}/folder.tar:512:100:a.mp4", "the archive cannot be read (Is a directory); check the list"),
        (f"{tmp_path}/no archive.tar:512:100:a.mp4", "at byte 512 of the archive no file of 100 bytes begins; make"),
        (
            f"{tar}:{offset}:{end}:{name}",
            f"bytes {offset} to {offset + end} are no part of the archive, which has {end}",
        ),
        (f"{tar}:{10**30}:1:{name}", f"bytes {10**30} to {10**30 + 1} are no part of the archive, which has {end}"),
        (f"{tar}:{offset}:{size - 1}:{name}", f"at byte {offset} of the archive no file of {size - 1} bytes begins"),
        (f"{tar}:{offset + 512}:{size}:{name}", f"at byte {offset + 512} of the archive no file of {size} bytes"),
        (f"{tar}:{offset}:0:{name}", f"at byte {offset} of the archive no file of 0 bytes begins; make a new list"),
        (f"{tar}:100:{member_of(shard[0])[2]}:{name}", "at byte 100 of the archive no file of"),  # type: ignore[index]
    ):
        with pytest.raises(DecodeError) as caught:
            open_video(path, backend)
        assert str(caught.value).startswith(f"{path}: {reason}")


def test_members_that_are_no_video(tmp_path: Path, backend: str) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video\n" * 99)
    path = write_shard(tmp_path / "x.tar", [str(tmp_path / "a.mp4")])[0]
    with pytest.raises(
        DecodeError, match=r"cannot be opened \(Invalid data found .*; fetch or encode it again"
    ) as caught:
        open_video(path, backend)
    assert str(caught.value).startswith(f"{path}: ")


# ---- limits


def large(path: Path, codec: str, size: str, count: int = 2) -> str:
    """Frames of one colour, of `size` (WxH)."""
    width, height = map(int, size.split("x"))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        frame = av.VideoFrame(width, height, stream.pix_fmt)
        for plane in frame.planes:
            plane.update(bytes([128]) * plane.buffer_size)
        for number in range(count):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


@pytest.mark.parametrize(
    "name,codec", [("a.mp4", "mpeg4"), ("a.avi", "mjpeg"), ("a.mkv", "ffv1"), ("a.mp4", "libx264")]
)
def test_frames_above_the_limit_are_refused_before_they_are_decoded(
    tmp_path: Path, name: str, codec: str, backend: str
) -> None:
    path = large(tmp_path / name, codec, "640x480", 3)
    with contextlib.suppress(DecodeError), open_video(path, backend, max_pixels=640 * 480) as video:
        assert video.pixels == 640 * 480 and video.frames([2]).shape == (1, 480, 640, 3)
    with pytest.raises(
        DecodeError, match=r"640x480 = 307200 pixels; at most 307199 .*MAX_PIXELS|above DATA.MAX_PIXELS 307199"
    ):
        open_video(path, backend, max_pixels=640 * 480 - 1).frames([0])


def test_8k_is_within_the_limit_and_little_is_held_at_a_time(tmp_path: Path) -> None:
    assert 7680 * 4320 < MAX_PIXELS < 8192 * 8192
    path = large(tmp_path / "a.mp4", "mpeg4", "7680x4320", 1)
    with open_video(path) as video:
        assert frames_at_a_time(video) == 2
        assert video.frames([0]).shape == (1, 4320, 7680, 3)


def test_decord_decodes_ahead_without_a_limit(clip_file: ClipFile, monkeypatch: pytest.MonkeyPatch) -> None:
    need("decord")
    from octvideo.data import decode_decord

    path = clip_file("h264, gop 12")
    for largest, message in ((96 * 160, ""), (96 * 160 - 1, "decord decodes 32 frames of 15360 pixels ahead, .* pyav")):
        monkeypatch.setattr(decode_decord, "LARGEST", largest)
        with pytest.raises(DecodeError, match=message) if message else contextlib.nullcontext():
            open_video(path, "decord").close()


def test_vast_frames_take_no_memory(tmp_path: Path) -> None:
    """16000 x 16000 as MJPEG: a picture has 768 MB as RGB."""
    small = Path(large(tmp_path / "a.avi", "mjpeg", "160x160")).read_bytes()
    begin = small.index(b"\xff\xc0") + 5  # height and width in the header of the first picture
    vast = small[:begin] + struct.pack(">HH", 16000, 16000) + small[begin + 4 :]
    (tmp_path / "b.avi").write_bytes(vast)
    with peak_memory() as peak, pytest.raises(DecodeError, match="b.avi: "), open_video(f"{tmp_path}/b.avi") as video:
        video.frames([0])
    assert peak[0] < 100 << 20


def test_a_stream_that_changes_to_a_vast_size(tmp_path: Path, write_clip: Callable[..., str]) -> None:
    parts = [write_clip(tmp_path / f"{side}.h264", 60, size=(side, side)) for side in (96, 480)]
    with av.open(f"{tmp_path}/c.ts", "w") as new:
        stream = None
        for place, part in enumerate(parts):
            with av.open(part) as old:
                stream = stream or new.add_stream_from_template(old.streams.video[0])
                packets = [packet for packet in old.demux(video=0) if packet.size]
                for number, packet in enumerate(packets, 60 * place):
                    packet.pts = packet.dts = 3600 * number
                    packet.time_base, packet.stream = Fraction(1, 90000), stream
                    new.mux(packet)
    for limit, reason in (
        (480 * 480 - 1, r"frame 60 has 480x480 = 230400 pixels; at most 230399 are decoded; .*DATA.MAX_PIXELS"),
        (480 * 480 // 3, r"frame 60 of 120 cannot be decoded \(.*\)"),  # FFmpeg itself refuses
    ):
        with (
            pytest.raises(DecodeError, match=f"c.ts: {reason}"),
            open_video(f"{tmp_path}/c.ts", max_pixels=limit) as video,
        ):
            video.frames([60])
    with open_video(f"{tmp_path}/c.ts") as video, pytest.raises(DecodeError, match="of another size"):
        video.frames([59, 60])


def test_frames_much_larger_than_the_container_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_video(large(tmp_path / "a.mp4", "mpeg4", "2560x1440", 8)) as video:
        video.pixels = 100  # as a container may state
        assert video.frames([1]).shape == (1, 1440, 2560, 3)
        with pytest.raises(
            DecodeError, match=r"its frames have 3686400 pixels, its container states 100; encode it again"
        ):
            video.frames([0] * 40)


# ---- faults of the machine

FAULTS = [errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN]


@pytest.mark.parametrize("code", FAULTS)
def test_faults_of_the_machine_when_a_video_is_opened(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "open", failing(code))
    with pytest.raises(MachineError, match=rf"a.mp4: cannot be read \({os.strerror(code)}\); not a fault of the file"):
        open_video("a.mp4")


def failing(code: int) -> Callable[..., Any]:
    def fails(*args: Any, **kwargs: Any) -> Any:
        av.error.err_check(-code)

    return fails


def test_a_video_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "open", failing(errno.EACCES))
    with pytest.raises(DecodeError, match=r"a.mp4: cannot be opened \(Permission denied\); allow this user to read it"):
        open_video("a.mp4")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOMEM])
def test_an_error_that_damaged_files_cause_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, clip_file: ClipFile
) -> None:
    """It is the machine's if a plain read, or an allocation, fails as well."""
    path = clip_file("h264, gop 12")
    with open_video(path) as video:
        monkeypatch.setattr(type(video), "_restart", failing(code))
        with pytest.raises(DecodeError, match=rf"frame 3 of 60 cannot be decoded \({os.strerror(code)}\)"):
            video.frames([3])
        for fault in (OSError(errno.EIO, "x"), OSError(errno.ESTALE, "x"), MemoryError()):

            def fails(path: str, fault: Exception = fault) -> None:
                raise fault

            monkeypatch.setattr(decode_module, "_read_plainly", fails)
            with pytest.raises(MachineError, match="not a fault of the file: (check the disk|lower DATA.NUM_WORKERS)"):
                video.frames([3])


def test_no_memory_to_decode_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_file: ClipFile) -> None:
    monkeypatch.setattr(decode_module, "_SPARE", 1 << 62)
    error = OSError(errno.ENOMEM, "Cannot allocate memory")
    with pytest.raises(MachineError, match="not enough memory to decode it; not a fault of the file: lower DATA.NUM_W"):
        check_machine(clip_file("h264, gop 12"), error)


def test_a_decoder_without_a_number_of_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_file: ClipFile
) -> None:
    """decord and torchcodec give text alone: the file is opened once more to see why."""
    path, error = clip_file("h264, gop 12"), RuntimeError("cannot open")
    check_machine(path, error)
    check_machine("gone.mp4", error)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(MachineError, match="Too many open files"):
            check_machine(path, error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_machine_error_reaches_another_process_unchanged() -> None:
    error = pickle.loads(pickle.dumps(MachineError("a.mp4: reason; remedy")))
    assert (type(error), str(error)) == (MachineError, "a.mp4: reason; remedy")
