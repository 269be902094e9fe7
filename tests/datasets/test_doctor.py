"""datasets/doctor.py: files that are wrong in every way, and decoders that hang and die."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from datasets import doctor, kinetics, packets
from octvideo.data.decode import MissingDecoderError, Video, open_video
from octvideo.data.lists import read_list
from tests.data.conftest import silence, write_clip

SCRIPT = Path(__file__).parents[2] / "datasets" / "kinetics.py"
REAL_VIDEOS = Path(__file__).parents[3] / "shared" / "data" / "videos"
FASTSTART = {"movflags": "faststart"}


def examine(path: object, **settings: Any) -> doctor.Facts:
    return doctor.examine(str(path), doctor.Settings(**settings))


def noise(path: Path, num_frames: int = 60, size: tuple[int, int] = (96, 160), **arguments: Any) -> Path:
    """A clip that takes some bytes: random pixels."""
    rng = np.random.default_rng(0)
    container_options = arguments.pop("container_options", {})
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast", "g": "12", **arguments})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for _ in range(num_frames):
            pixels = rng.integers(0, 256, (*size, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for _ in range(60):
            container.mux(stream.encode(silence()))
        container.mux(stream.encode(None))
    return path


def with_zeros(path: Path, begin: float, end: float) -> Path:
    """Zeros from one part of the file to another, 0 to 1."""
    data = bytearray(path.read_bytes())
    first, last = int(begin * len(data)), int(end * len(data))
    data[first:last] = bytes(last - first)
    path.write_bytes(data)
    return path


def cut(path: Path, part: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    return path


def content(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def grey(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, width=96, height=64)
        stream.pix_fmt = "yuv420p"
        for number in range(60):
            picture = np.full((64, 96, 3), 128, np.uint8)
            picture[: 32 if number < 20 else 0] = 0  # the first third is a picture
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def two_sizes(path: Path) -> Path:
    parts = [
        Path(write_clip(path.with_name(f"{path.stem}_{n}.mpg"), 20, codec="mpeg2video", size=size))
        for n, size in enumerate([(96, 160), (64, 128)])
    ]
    return content(path, b"".join(part.read_bytes() for part in parts))


def rotated(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, width=96, height=64)
        stream.pix_fmt = "yuv420p"
        stream.set_display_rotation(90)
        for number in range(30):
            picture = np.full((64, 96, 3), 8 * number, np.uint8)
            picture[:32] = 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


# What is wrong with a file -> its name, what writes it, and the beginning of each problem.
FAULTS: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "empty": ("a.mp4", lambda p: p.touch(), ["unreadable: the file is empty"]),
    "garbage": ("b.mp4", lambda p: content(p, np.random.default_rng(0).bytes(9000)), ["unreadable: Invalid data"]),
    "a web page": ("c.mp4", lambda p: content(p, b"<!DOCTYPE html>404\n" * 99), ["unreadable: Invalid data"]),
    "all zeros": ("d.mp4", lambda p: content(p, bytes(99999)), ["unreadable: Invalid data"]),
    "index lost": ("e.mp4", lambda p: cut(noise(p), 0.5), ["unreadable: Invalid data"]),
    "mp4 cut": (
        "f.mp4",
        lambda p: cut(noise(p, container_options=FASTSTART), 0.6),
        ["truncated: the container takes "],
    ),
    "mkv cut": ("g.mkv", lambda p: cut(noise(p), 0.6), ["truncated: the container takes "]),
    "avi cut": ("h.avi", lambda p: cut(Path(write_clip(p, codec="mpeg4")), 0.5), ["truncated: "]),
    "webm cut": (
        "i.webm",
        lambda p: cut(Path(write_clip(p, codec="libvpx", options={"deadline": "realtime"})), 0.5),
        ["truncated: the container takes "],
    ),
    "zeros in the middle": ("j.mp4", lambda p: with_zeros(noise(p), 0.4, 0.6), ["zeroed: "]),
    "zeros in the middle of mkv": ("k.mkv", lambda p: with_zeros(noise(p), 0.4, 0.6), ["zeroed: "]),
    "zeros at the end": ("l.mp4", lambda p: with_zeros(noise(p, container_options=FASTSTART), 0.7, 1), ["zeroed: "]),
    "grey": ("m.mp4", grey, ["blank: 5 of 8 frames looked at are one colour"]),
    "sound only": ("n.m4a", sound, ["no video stream: "]),
    "two sizes": ("o.mpg", two_sizes, ["changing frame size: 160x96 from frame 0, 128x64 from frame "]),
    "four frames": ("p.mp4", lambda p: write_clip(p, 4), ["wrong length: 0.13 s, less than 0.5 s"]),
    "missing": ("q.mp4", lambda p: None, ["unreadable: No such file or directory"]),
    "a folder": ("r.mp4", lambda p: p.mkdir(), ["unreadable: Is a directory"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_apart(tmp_path: Path, fault: str) -> None:
    name, write, expected = FAULTS[fault]
    write(tmp_path / name)
    problems = examine(tmp_path / name).problems
    assert len(problems) >= len(expected)
    for problem, beginning in zip(problems, expected, strict=False):
        assert problem.startswith(beginning), problems
    kinds = {problem.partition(":")[0] for problem in problems}
    assert kinds - {beginning.partition(":")[0] for beginning in expected} <= {"damaged", "unreadable"}


# Files that can be used -> their name, what writes it, and the notes.
SOUND: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "plain": ("a.mp4", write_clip, []),
    "fragments": (
        "b.mp4",
        lambda p: write_clip(p, container_options={"movflags": "frag_keyframe+empty_moov"}),
        [],
    ),
    "with sound": ("c.mkv", lambda p: write_clip(p, audio=True), []),
    "avi with B frames": ("d.avi", lambda p: write_clip(p, codec="mpeg4", b_frames=2), []),
    "webm": (
        "e.webm",
        lambda p: write_clip(p, codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}),
        [],
    ),
    "transport stream": ("f.ts", lambda p: write_clip(p, b_frames=2), []),
    "240 frames a second": ("g.mkv", lambda p: write_clip(p, 240, rate=240), []),
    "variable frame rate": (
        "h.mp4",
        lambda p: write_clip(p, times=[40 * i + 200 * (i // 7) for i in range(60)], b_frames=2),
        ["variable frame rate: 40 to 240 ms from frame to frame"],
    ),
    "rotated": ("i.mp4", rotated, ["rotated: stored turned by 90 degrees, shown upright"]),
    "padding": ("j.mp4", lambda p: write_clip(p, container_options={"movflags": "faststart", "moov_size": "0"}), []),
    "room reserved": ("k.mp4", lambda p: write_clip(p, container_options={"moov_size": "60000"}), []),
}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", SOUND)
def test_usable_files_have_no_problems(tmp_path: Path, kind: str, full: bool) -> None:
    name, write, notes = SOUND[kind]
    write(tmp_path / name)
    facts = examine(tmp_path / name, full=full)
    assert (facts.problems, facts.notes) == ([], notes)
    if kind == "room reserved":
        assert packets.zero_runs(str(tmp_path / name)) != []


def test_silence_is_no_fault(tmp_path: Path) -> None:
    """Uncompressed, it is zeros all along."""
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, width=96, height=64)
        stream.pix_fmt = "yuv420p"
        quiet = container.add_stream("pcm_s16le", rate=48000, layout="mono")
        for number in range(60):
            picture = np.random.default_rng(number).integers(0, 256, (64, 96, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000 // 2), np.int16), format="s16", layout="mono")
            frame.sample_rate = 48000
            container.mux(quiet.encode(frame))
        container.mux(stream.encode(None))
    assert packets.zero_runs(str(path)) != []
    assert not [problem for problem in examine(path).problems if problem.startswith("zeroed")]


def test_facts(tmp_path: Path) -> None:
    facts = examine(write_clip(tmp_path / "a.mp4", 60, rate=30))
    assert (facts.frames, facts.fps, facts.width, facts.height) == (60, 30.0, 160, 96)
    assert (facts.codec, facts.container, facts.seconds) == ("h264", "mov,mp4,m4a,3gp,3g2,mj2", 2.0)
    turned = examine(rotated(tmp_path / "b.mp4"))
    assert (turned.width, turned.height) == (64, 96)


def test_the_length_asked_for(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 60)
    assert examine(path).problems == []
    assert examine(path, seconds=2.15).problems == []
    assert examine(path, seconds=10.0).problems == ["wrong length: 2.00 s, not 10 s"]
    assert examine(path, shortest_s=2.5).problems == ["wrong length: 2.00 s, less than 2.5 s"]


def test_full_looks_at_every_frame(tmp_path: Path) -> None:
    """One picture that does not decode, between the samples."""
    path = noise(tmp_path / "a.mp4", 120, bf="0")
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][40]
    data = bytearray(path.read_bytes())
    data[packet.pos + 4 : packet.pos + 400] = b"\xff" * 396
    path.write_bytes(data)
    assert doctor.places(120, doctor.Settings(samples=3)) == [0, 60, 119]
    assert examine(path, samples=3).problems == []
    problems = examine(path, full=True).problems
    assert len(problems) == 1
    assert problems[0].startswith("damaged: frame ")
    assert "of 120 cannot be decoded" in problems[0]


@pytest.mark.parametrize(("num_frames", "samples", "expected"), [(100, 1, [0]), (3, 8, [0, 1, 2]), (10, 2, [0, 9])])
def test_sampled_places(num_frames: int, samples: int, expected: list[int]) -> None:
    assert doctor.places(num_frames, doctor.Settings(samples=samples)) == expected


@pytest.mark.skipif(not REAL_VIDEOS.is_dir(), reason=f"no real videos at {REAL_VIDEOS}")
@pytest.mark.parametrize("path", sorted(REAL_VIDEOS.glob("*.*")), ids=lambda path: path.name)
def test_real_files(path: Path) -> None:
    """Some are made of a few frames, one of those of grey frames: they are sound but for that."""
    problems = examine(path, shortest_s=0).problems
    expected = {"corrupted.mp4": "damaged: frame ", "unordered.mov": "blank: 4 of 4 frames"}.get(path.name)
    assert len(problems) == (expected is not None), problems
    assert expected is None or problems[0].startswith(expected)


@pytest.mark.skipif(not REAL_VIDEOS.is_dir(), reason=f"no real videos at {REAL_VIDEOS}")
@pytest.mark.parametrize("path", sorted(REAL_VIDEOS.glob("*.*")), ids=lambda path: path.name)
def test_truncated_real_files(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    cut = tmp_path / path.name
    for percent in (5, 10, 20, 35, 50, 65, 80, 90, 95, 99, 99.9):
        cut.write_bytes(data[: int(len(data) * percent / 100)])
        problems = examine(cut, shortest_s=0).problems
        assert problems, percent
        assert problems[0].startswith(("truncated: ", "unreadable: ", "no video stream: ")), problems


# ---- processes that may die


def behave(task: str) -> str:
    """What a worker of the tests does."""
    if task == "hang":
        time.sleep(60)
    elif task == "segfault":
        ctypes.string_at(0)
    elif task == "abort":
        os.abort()
    elif task == "exit":
        os._exit(3)
    elif task == "raise":
        raise UnicodeError("no such letter")
    elif task == "shout":
        os.write(2, b"NOISE OF NATIVE CODE\n")
    return f"{task} done"


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_task_is_answered(workers: int, capfd: pytest.CaptureFixture[str]) -> None:
    tasks = ["a", "hang", "b", "segfault", "shout", "abort", "c", "exit", "raise", "d", "segfault", "e"]
    began = time.monotonic()
    answers = [*doctor.outcomes(behave, tasks, workers, limit_s=0.5)]
    assert time.monotonic() - began < 15
    assert sorted(task for task, _ in answers) == sorted(tasks)
    told = {
        "hang": doctor.Casualty("hangs: no answer within the time limit"),
        "segfault": doctor.Casualty("crashes the decoder: SIGSEGV"),
        "abort": doctor.Casualty("crashes the decoder: SIGABRT"),
        "exit": doctor.Casualty("crashes the decoder: exit status 3"),
        "raise": doctor.Casualty("UnicodeError: no such letter"),
    }
    for task, answer in answers:
        assert answer == told.get(task, f"{task} done")
    assert "NOISE" not in capfd.readouterr().err


def test_workers_live_on(tmp_path: Path) -> None:
    pids = {answer for _, answer in doctor.outcomes(lambda task: os.getpid(), range(50), 2, 10)}
    assert len(pids) <= 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_no_worker_outlives_a_run_that_is_broken_off() -> None:
    run = doctor.outcomes(lambda task: (time.sleep(task), os.getpid())[1], [0, 60, 60], 2, 90)
    _, pid = next(run)
    run.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_killed_parent_leaves_no_workers(tmp_path: Path) -> None:
    code = (
        "import os, time; from datasets import doctor\n"
        "for _, pid in doctor.outcomes(lambda task: (time.sleep(task), os.getpid())[1], [0.2, 0.2, 3], 2, 90):\n"
        "    print(pid, flush=True)"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root)
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    """Not a zombie either, which whoever adopts it may leave lying."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- a list of files


def fake_open(path: str) -> Video:
    """A decoder that some files bring down."""
    if "hangs" in path:
        time.sleep(60)
    if "dies 1" in path:
        ctypes.string_at(0)
    if "dies 2" in path:
        os.abort()  # as an exception of C++ that nobody catches does, such as std::bad_alloc
    if "bug" in path:
        raise ZeroDivisionError("division by zero")
    return open_video(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Videos, one of each kind, and their list."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("a.mp4", "hangs.mp4", "dies 1.mp4", "b.mkv", "bug.mp4", "dies 2.mp4", "c.mp4"):
        write_clip(videos / name, 20)
    cut(videos / "c.mp4", 0.5)
    names = [*sorted(path.name for path in videos.iterdir()), "missing.mp4"]
    (tmp_path / "train.txt").write_text("".join(f"{name} {label}\n" for label, name in enumerate(names)))
    return tmp_path


def run_check(folder: Path, *more: object, code: int = 0) -> dict[str, Any]:
    given = ["--list", folder / "train.txt", "--prefix", folder / "videos", "--out", folder / "health", *more]
    assert kinetics.main([*map(str, ("check", *given, "--workers", 2))]) == code
    return json.loads((folder / "health" / "report.json").read_text())


def test_the_rest_survives_a_decoder_that_hangs_or_dies(folder: Path) -> None:
    out = folder / "health"
    out.mkdir()
    videos = read_list(str(folder / "train.txt"), num_classes=99, prefix=str(folder / "videos"), check_files=False)
    report = doctor.check(videos, out, doctor.Settings(timeout_s=2), 2, doctor.Decoder("fake", "1", fake_open))
    assert (out / "clean.txt").read_text() == "a.mp4 0\nb.mkv 1\n"
    bad = dict(line.split("\t") for line in (out / "bad.txt").read_text().splitlines())
    assert bad == {
        "bug.mp4": "ZeroDivisionError: division by zero",
        "c.mp4": "unreadable: Invalid data found when processing input",
        "dies 1.mp4": "crashes the decoder: SIGSEGV",
        "dies 2.mp4": "crashes the decoder: SIGABRT",
        "hangs.mp4": "hangs: no answer within the time limit",
        "missing.mp4": "unreadable: No such file or directory",
    }
    assert report["counts"] == {
        "files": 8,
        "usable": 2,
        "bad": 6,
        "problems": {"ZeroDivisionError": 1, "unreadable": 2, "crashes the decoder": 2, "hangs": 1},
        "notes": {},
    }


def test_the_report(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "videos" / "b.mkv").write_bytes(
        Path(write_clip(folder / "v.mkv", 20, times=[33 * i**2 for i in range(20)])).read_bytes()
    )
    report = run_check(folder)
    assert report == json.loads((folder / "health" / "report.json").read_text())
    assert [each["path"] for each in report["files"]] == [
        line.rpartition(" ")[0] for line in (folder / "train.txt").read_text().splitlines()
    ]
    assert report["files"][0] == {
        "path": "a.mp4",
        "label": 0,
        "frames": 20,
        "fps": 30.0,
        "width": 160,
        "height": 96,
        "codec": "h264",
        "container": "mov,mp4,m4a,3gp,3g2,mj2",
        "seconds": pytest.approx(20 / 30),
        "problems": [],
        "notes": [],
    }
    assert report["counts"]["notes"] == {"variable frame rate": 1}
    videos = read_list(str(folder / "health" / "clean.txt"), num_classes=99, prefix=str(folder / "videos"))
    assert [videos.name(index) for index in range(len(videos))] == [
        "a.mp4", "b.mkv", "bug.mp4", "dies 1.mp4", "dies 2.mp4", "hangs.mp4",
    ]  # fmt: skip
    told = capfd.readouterr()
    assert "| problem | unreadable | 2 |" in " ".join(told.out.split())
    assert "6 of 8 files are usable, 2 are not" in told.out
    assert "moov atom not found" not in told.err


def test_the_decoder_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """auto is the decoder that training takes for it."""
    version = importlib.metadata.version("av")
    assert run_check(folder)["decoder"] == {"name": "pyav", "version": version}
    assert capsys.readouterr().out.splitlines()[0] == f"decoder pyav {version}: 8 files"
    path = str(folder / "videos" / "a.mp4")
    with doctor.find_decoder("auto").opener(path) as judges, open_video(path, "auto") as trains:
        assert type(judges) is type(trains)


@pytest.mark.parametrize("name", ["decord", "torchcodec"])
def test_another_decoder(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It judges by itself: nothing that PyAV found is reused, and each has its lines in results.jsonl."""
    try:
        decoder = doctor.find_decoder(name)
    except MissingDecoderError as error:
        pytest.skip(str(error))
    Path(write_clip(folder / "t.ts", 20)).rename(folder / "videos" / "b.mkv")  # PyAV alone reads transport streams
    assert run_check(folder)["counts"]["bad"] == 2
    capsys.readouterr()
    report = run_check(folder, "--decoder", name)
    assert report["decoder"] == {"name": name, "version": decoder.version}
    assert capsys.readouterr().out.startswith(f"decoder {name} {decoder.version}: 8 files\n")
    assert report["files"][1]["problems"] == [f"unreadable: {name} is inexact in mpegts; use the decoder pyav"]
    lines = [json.loads(line) for line in (folder / "health" / "results.jsonl").read_text().splitlines()]
    assert Counter(line["decoder"].partition(" ")[0] for line in lines) == {"pyav": 8, name: 8}


def test_results_of_another_version_are_not_reused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_check(folder)
    results = folder / "health" / "results.jsonl"
    results.write_text(results.read_text().replace(f"pyav {first['decoder']['version']}", "pyav 9.0.0"))
    asked: list[int] = []
    outcomes = doctor.outcomes
    monkeypatch.setattr(doctor, "outcomes", lambda f, tasks, *rest: asked.extend(tasks) or outcomes(f, tasks, *rest))
    assert run_check(folder) == first
    assert len(asked) == 8


def test_a_decoder_that_is_missing_is_one_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    monkeypatch.delitem(sys.modules, "octvideo.data.decode_decord", raising=False)
    with pytest.raises(SystemExit) as stopped:
        run_check(folder, "--decoder", "decord")
    assert stopped.value.code == 2
    assert "decord cannot be loaded" in capsys.readouterr().err
    assert not (folder / "health").exists()


@pytest.mark.parametrize(
    ("frames", "problems", "notes"),
    [(None, 0, 0), (30, 0, 0), (28, 0, 1), (16, 0, 1), (14, 1, 0), (1, 1, 0), (31, 0, 1)],
)
def test_the_decoder_finds_other_frames_than_the_container(frames: int | None, problems: int, notes: int) -> None:
    facts = doctor.Facts(frames=frames)
    doctor.compare_counts(30, facts)
    assert (len(facts.problems), len(facts.notes)) == (problems, notes)
    for text in (*facts.problems, *facts.notes):
        assert f"the decoder finds {frames} frames, the container holds 30 pictures" in text


def test_an_interrupted_run_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_check(folder)
    results = folder / "health" / "results.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:3]) + b"not json\n" + lines[3][:20])
    asked: list[int] = []
    outcomes = doctor.outcomes
    monkeypatch.setattr(doctor, "outcomes", lambda f, tasks, *rest: asked.extend(tasks) or outcomes(f, tasks, *rest))
    assert run_check(folder) == first
    assert len(asked) == 5
    assert run_check(folder) == first
    assert len(asked) == 5
    write_clip(folder / "videos" / "c.mp4", 20)  # fetched again
    assert run_check(folder)["counts"]["bad"] == 1
    assert len(asked) == 6


def test_settings_and_folders_that_do_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(*more: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            run_check(folder, *more)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "samples is 0: give 1 or more; timeout-s is 0: give more than 0" in failing(
        "--samples", "0", "--timeout-s", "0"
    )
    assert "seconds is nan: give more than 0" in failing("--seconds", "nan")
    assert not (folder / "health").exists()
    run_check(folder)
    assert "was made with samples 8, not 3: give the same" in failing("--samples", "3")
    (folder / "health" / "check.json").unlink()
    assert "holds bad.txt, clean.txt, report.json, results.jsonl but no check.json" in failing()


def test_ctrl_c(folder: Path) -> None:
    """What was found out stays, and no worker does."""
    code = (
        "import sys, time; from datasets import doctor, kinetics\n"
        "examine = doctor.examine\n"
        "doctor.examine = lambda path, *rest: time.sleep(60 if 'hangs' in path else 0) or examine(path, *rest)\n"
        "sys.exit(kinetics.main(sys.argv[1:]))"
    )
    given = ["--list", folder / "train.txt", "--prefix", folder / "videos", "--out", folder / "health", "--workers", 2]
    # A shell that starts this suite in the background has its children ignore ctrl-C; this one must not inherit that.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    run = subprocess.Popen(
        [sys.executable, "-c", code, "check", *map(str, given)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
        cwd=Path(__file__).parents[2],
    )
    results = folder / "health" / "results.jsonl"
    deadline = time.monotonic() + 60
    while not (results.exists() and results.read_text().count("\n") == 7) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, told = run.communicate(timeout=20)
    assert run.returncode == 130
    assert "interrupted: run the same command again to go on" in told
    assert "Traceback" not in told
    assert results.read_text().count("\n") == 7
