"""datasets/kinetics.py: what is found in folders, and frames that carry their number through a re-encoding."""

from __future__ import annotations

import csv
import errno
import json
import os
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from datasets import doctor, kinetics, resizing
from octvideo.data.decode import open_video
from octvideo.data.lists import read_list
from tests.data.conftest import code_image, read_codes, remux, write_clip  # noqa: F401  # read_codes is a fixture

SCRIPT = Path(__file__).parents[2] / "datasets" / "kinetics.py"
OFFICIAL = Path(__file__).parents[3] / "shared" / "data" / "kinetics"
needs_official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"no official annotations at {OFFICIAL}")
HEADER = "label,youtube_id,time_start,time_end,split,is_cc\n"
# Ids that a naive split at - or _ takes for something else.
TRICKY = ("-_-_-_-_-_-", "_1_2_3_4_5_", "abcd_12_345", "-0000000001", "__________a")


def write_csv(path: Path, *rows: str, header: str = HEADER) -> Path:
    path.write_text(header + "".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def touch(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def run_index(tmp_path: Path, annotations: Path, *more: str) -> dict:
    arguments = [
        "--annotations",
        str(annotations),
        "--videos",
        str(tmp_path / "videos"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert kinetics.main(["index", *arguments, *more]) == 0
    return json.loads((tmp_path / "out" / "index_report.json").read_text())


def failing(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command line says of arguments that it refuses."""
    with pytest.raises(SystemExit) as stopped:
        kinetics.main([*map(str, arguments)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def reasons(report: dict) -> list[str]:
    return [f"{Path(row['place']).name} {row['reason']}" for row in report["rows_left_out"]]


# ---- index


LAYOUTS = {
    "class folders": "{label}/{id}_{start:06d}_{end:06d}.mp4",
    "underscores": "{label_}/{id}_{start:06d}_{end:06d}.mp4",
    "splits and classes": "{split}/{label}/{id}_{start}_{end}.mkv",
    "a split, flat": "{split}/{id}_{start:06d}_{end:06d}.webm",
    "flat": "{id}_{start}_{end}.AVI",
    "ids only": "{label_}/{id}.mov",
    "deep": "k400/part 1/{split}/{label}/{id}_{start:06d}_{end:06d}.mp4",
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_usual_layout_is_found(tmp_path: Path, layout: str) -> None:
    labels = ["zumba", "air drumming", "massaging person's head", "hurling (sport)", "abseiling"]
    rows = [
        (label, youtube_id, 7 * number, 7 * number + 10, ("train", "val", "test")[number % 3])
        for number, (label, youtube_id) in enumerate(zip(labels, TRICKY, strict=True))
    ]
    files = [
        layout.format(label=label, label_=label.replace(" ", "_"), id=key, start=start, end=end, split=split)
        for label, key, start, end, split in rows
    ]
    touch(tmp_path / "videos", *files)
    write_csv(tmp_path / "all.csv", *(",".join(map(str, row)) + ",0" for row in rows))
    report = run_index(tmp_path, tmp_path / "all.csv")
    out = tmp_path / "out"
    names = (out / "labels.txt").read_text().splitlines()
    assert names == sorted(labels)
    found = {}
    for split in ("train", "val", "test"):
        videos = read_list(str(out / f"{split}.txt"), num_classes=5, prefix=str(tmp_path / "videos"))
        found |= {videos.name(index): (names[videos.label(index)], split) for index in range(len(videos))}
    assert found == {file: (row[0], row[4]) for file, row in zip(files, rows, strict=True)}
    assert (report["unexpected"], report["rows_left_out"], report["elsewhere"]) == (0, [], [])
    assert (out / "missing.csv").read_text() == "label,youtube_id,time_start,time_end,split\n"
    assert (out / "unexpected.txt").read_text() == ""


def test_missing_and_unexpected_files_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c, d, e = TRICKY
    write_csv(
        tmp_path / "val.csv",
        f"yoga,{a},3,13,val,0",
        f"yoga,{a},20,30,val,0",  # the same video, another clip
        f"yoga,{b},0,10,val,0",
        f"archery,{c},5,15,val,0",
        f"archery,{d},5,15,val,0",
    )
    touch(
        tmp_path / "videos",
        f"yoga/{a}_000003_000013.mp4",
        f"yoga/{a}_000099_000109.mp4",
        f"yoga/{a}.mp4",
        f"archery/{c}.mp4",
        f"archery/{c}_000005_000015.mkv",
        f"archery/{e}_000000_000010.mp4",
        f"archery/{d}_000005_000015.mp4.part",
        "readme.txt",
        "archery/movie.mp4",
    )
    (tmp_path / "videos" / f"{b}.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "videos" / "yoga" / "loop").symlink_to(tmp_path / "videos")
    report = run_index(tmp_path, tmp_path / "val.csv")
    out = tmp_path / "out"
    assert (out / "val.txt").read_text() == f"yoga/{a}_000003_000013.mp4 1\narchery/{c}_000005_000015.mkv 0\n"
    assert not (out / "train.txt").exists()
    with (out / "missing.csv").open(newline="") as file:
        missing = [*csv.reader(file)][1:]
    assert missing == [
        ["yoga", a, "20", "30", "val"],
        ["yoga", b, "0", "10", "val"],
        ["archery", d, "5", "15", "val"],
    ]
    unexpected = dict(line.split("\t") for line in (out / "unexpected.txt").read_text().splitlines())
    assert unexpected == {
        f"yoga/{a}_000099_000109.mp4": "the annotations have this id with other times only",
        f"yoga/{a}.mp4": "2 rows have its id: its name must give the times",
        f"archery/{c}.mp4": f"another file of the clip is used: archery/{c}_000005_000015.mkv",
        f"archery/{e}_000000_000010.mp4": "no row has its id",
        f"archery/{d}_000005_000015.mp4.part": "no video: its name does not end in .mp4, .mkv, .webm, .avi, .mov",
        "readme.txt": "no video: its name does not end in .mp4, .mkv, .webm, .avi, .mov",
        "archery/movie.mp4": "its name holds no id",
        f"{b}.mp4": "a link that leads nowhere",
        "yoga/loop": "a link to a folder that is searched already",
    }
    assert report["splits"]["val"] == {"clips": 5, "found": 2, "missing": 3}
    assert report["classes"] == {
        "archery": {"clips": 2, "found": 1, "missing": 1, "unexpected": 4},
        "yoga": {"clips": 3, "found": 1, "missing": 2, "unexpected": 3},
    }
    told = capsys.readouterr().out
    assert "| yoga | 3 | 1 | 2 | 3 |" in " ".join(told.split())
    assert "2 classes (neither 400 nor 600: --labels gives the official order)" in told


def test_rows_that_cannot_be_used_are_named_by_line(tmp_path: Path) -> None:
    a, b, c, d, e = TRICKY
    write_csv(
        tmp_path / "bad.csv",
        f"yoga,{a},3,13,train,0",
        f",{b},3,13,test,0",
        "yoga,#NAME?,3,13,train,0",
        f"yoga,{c},three,13,train,0",
        f"yoga,{c},13,3,train,0",
        f"yoga,{c},3,13,holdout,0",
        f"yoga,{c},3,13",
        f"yoga,{a},3,13,train,0",
        f"archery,{a},3,13,val,0",
        "yoga,../../../x,3,13,train,0",
        "",
        f"yoga,{d},3.0,13.0,validate,0",
        f"swimming,{e},3,13,train,0",
    )
    (tmp_path / "map.txt").write_text("archery\nyoga\n")
    touch(tmp_path / "videos", f"{b}_3_13.mp4", f"{d}_3_13.mp4", f"{a}_3_13.mp4")
    report = run_index(tmp_path, tmp_path / "bad.csv", "--labels", str(tmp_path / "map.txt"))
    line = f"{tmp_path / 'bad.csv'}:2"
    assert reasons(report) == (
        [
            "bad.csv:3 has no label",
            "bad.csv:4 youtube_id is '#NAME?', not 11 letters, digits, - and _",
            "bad.csv:5 times are 'three' to '13', not whole seconds",
            "bad.csv:6 ends at 3 s, which is not after its start 13 s",
            "bad.csv:7 split is 'holdout', none of train, val, validate, validation, test",
            "bad.csv:8 has not as many cells as the header",
            f"bad.csv:9 the same clip is in {line} already: left out",
            f"bad.csv:10 the same clip is in {line} already as yoga, train: left out",
            "bad.csv:11 youtube_id is '../../../x', not 11 letters, digits, - and _",
            f"bad.csv:14 label 'swimming' is none of the 2 in {tmp_path / 'map.txt'}",
        ]
    )
    assert (tmp_path / "out" / "val.txt").read_text() == f"{d}_3_13.mp4 1\n"
    assert (tmp_path / "out" / "unexpected.txt").read_text().endswith(f"its row has no label ({line[:-1]}3)\n")


def test_csv_without_labels_or_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unlabelled = write_csv(
        tmp_path / "test.csv", f"{TRICKY[0]},3,13,test", header="youtube_id,time_start,time_end,split\n"
    )
    touch(tmp_path / "videos", f"{TRICKY[0]}.mp4")
    given = ("--videos", tmp_path / "videos", "--out", tmp_path / "out")
    told = failing(capsys, "index", "--annotations", unlabelled, *given)
    assert f"no row of {unlabelled} can be used; the first problem: {unlabelled}:2: has no label" in told
    assert not (tmp_path / "out").exists()
    plain = write_csv(tmp_path / "a.csv", f"yoga,{TRICKY[0]},3,13", header="label,youtube_id,time_start,time_end\n")
    assert "it names no split: give --split" in failing(capsys, "index", "--annotations", plain, *given)
    run_index(tmp_path, plain, "--split", "test")
    assert (tmp_path / "out" / "test.txt").read_text() == f"{TRICKY[0]}.mp4 0\n"


def test_one_split_only(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", f"yoga,{TRICKY[0]},3,13,train,0", f"archery,{TRICKY[1]},3,13,val,0")
    touch(tmp_path / "videos", *(f"{key}.mp4" for key in TRICKY[:2]))
    report = run_index(tmp_path, tmp_path / "a.csv", "--split", "validate")
    assert (tmp_path / "out" / "val.txt").read_text() == f"{TRICKY[1]}.mp4 0\n"
    assert not (tmp_path / "out" / "train.txt").exists()
    assert report["splits"]["train"]["clips"] == 0


def test_the_best_of_several_files_of_a_clip(tmp_path: Path) -> None:
    """The one with times, in the folder of its class, of its split, and the others are named."""
    write_csv(tmp_path / "a.csv", f"yoga,{TRICKY[0]},3,13,val,0", f"archery,{TRICKY[1]},3,13,val,0")
    name = f"{TRICKY[0]}_3_13.mp4"
    touch(
        tmp_path / "videos", f"train/yoga/{name}", f"val/archery/{name}", f"val/yoga/{name}", f"archery/{TRICKY[0]}.mp4"
    )
    touch(tmp_path / "videos", f"yoga/{TRICKY[1]}.mp4")
    report = run_index(tmp_path, tmp_path / "a.csv")
    assert (tmp_path / "out" / "val.txt").read_text() == f"val/yoga/{name} 1\nyoga/{TRICKY[1]}.mp4 0\n"
    assert report["unexpected"] == 3
    assert report["elsewhere"] == [f"yoga/{TRICKY[1]}.mp4"]


def test_paths_that_no_list_can_hold(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", *(f"yoga,{key},3,13,val,0" for key in TRICKY))
    videos = touch(tmp_path / "videos", f"a\nb/{TRICKY[0]}.mp4", f"# c/{TRICKY[1]}.mp4", f"ok/{TRICKY[2]}.mp4")
    folder = Path(bytes(videos).decode() + "/\udcff")
    folder.mkdir()
    (folder / f"{TRICKY[3]}.mp4").touch()
    run_index(tmp_path, tmp_path / "a.csv")
    assert (tmp_path / "out" / "val.txt").read_text() == f"ok/{TRICKY[2]}.mp4 0\n"
    assert (tmp_path / "out" / "unexpected.txt").read_text().splitlines() == [
        f"# c/{TRICKY[1]}.mp4\tits path begins with a space or #, or ends with a space: rename it",
        f"a\\nb/{TRICKY[0]}.mp4\tits path contains the control character '\\n': rename it",
        f"\\udcff/{TRICKY[3]}.mp4\tits path contains the undecodable character '\\udcff': rename it",
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "a.csv:1: lacks the columns youtube_id, time_start, time_end; it has nothing"),
        (b"air drumming/-VtLx-mcPds_000012_000022\n", "it has air drumming/-VtLx-mcPds_000012_000022"),
        (HEADER.encode() + b"yoga,\xff\xfe,1,2,val,0\n", "a.csv:2: byte 0xff is not UTF-8 text; is this a csv?"),
        (
            HEADER.encode() + b'yoga,"' + b"x" * 200_000 + b'",1,2,val,0\n',
            "a.csv:2: the line is longer than 65536 bytes",
        ),
        (HEADER.encode() + b'yoga,"' + b"x\n" * 100_000 + b'",1,2,val,0\n', ": field larger than field limit"),
        (
            HEADER.replace("\n", ",split\n").encode() + b"yoga,a,1,2,val,0,val\n",
            "a.csv:1: has the column 'split' twice",
        ),
    ],
    ids=["empty", "a list", "binary", "one huge line", "one huge cell", "a column twice"],
)
def test_annotations_that_are_no_csv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, told: str
) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    said = failing(
        capsys, "index", "--annotations", tmp_path / "a.csv", "--videos", tmp_path, "--out", tmp_path / "out"
    )
    assert told in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("yoga\narchery\nYoga\n", "map.txt:3: 'Yoga' is in line 1 already"),
        ("yoga\n\narchery\n", "map.txt:2: '' is no class name"),
        ("", "map.txt is empty"),
    ],
)
def test_label_maps_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, told: str) -> None:
    (tmp_path / "map.txt").write_text(content)
    rows = write_csv(tmp_path / "a.csv", f"yoga,{TRICKY[0]},3,13,val,0")
    given = ("--labels", tmp_path / "map.txt", "--videos", tmp_path, "--out", tmp_path / "out")
    assert told in failing(capsys, "index", "--annotations", rows, *given)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_csv(tmp_path / "a.csv", f"yoga,{TRICKY[0]},3,13,val,0")
    touch(tmp_path / "videos", f"{TRICKY[0]}.mp4")
    touch(tmp_path / "out", "train.txt", "labels.txt")
    given = ("--videos", tmp_path / "videos", "--out", tmp_path / "out")
    told = failing(capsys, "index", "--annotations", rows, *given)
    assert "holds labels.txt, train.txt but no index.json, so another tool made it: give another --out" in told
    run_index(
        tmp_path := tmp_path / "again",
        write_csv(touch(tmp_path, "videos/x.txt") / "a.csv", f"yoga,{TRICKY[0]},3,13,val,0"),
    )
    run_index(tmp_path, tmp_path / "a.csv")  # again is fine
    given = ("--videos", tmp_path / "videos", "--out", tmp_path / "out")
    told = failing(capsys, "index", "--annotations", tmp_path / "a.csv", "--split", "val", *given)
    assert "was made with split None, not val: give the same settings, another --out, or remove the folder" in told


def test_lists_may_lie_among_the_videos(tmp_path: Path) -> None:
    """Its own files are not unexpected when it is run again."""
    rows = write_csv(tmp_path / "a.csv", f"yoga,{TRICKY[0]},3,13,val,0")
    videos = touch(tmp_path / "videos", f"{TRICKY[0]}.mp4")
    for _ in range(2):
        assert kinetics.main(["index", "--annotations", str(rows), "--videos", str(videos), "--out", str(videos)]) == 0
    assert (videos / "unexpected.txt").read_text() == ""


@needs_official
@pytest.mark.parametrize(
    ("annotations", "label_map", "classes", "clips"),
    [
        ("kinetics-400_val.csv", None, 400, 19906),
        ("kinetics-400_test_labelled.csv", "label_map_400.txt", 400, 35308),
        ("kinetics-600_val.csv", "label_map_600.txt", 600, 30000),
        ("kinetics-600_val.csv", None, 600, 30000),
    ],
)
def test_the_official_annotations(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    annotations: str,
    label_map: str | None,
    classes: int,
    clips: int,
) -> None:
    with (OFFICIAL / annotations).open(newline="") as file:
        rows = [*csv.DictReader(file)]
    rng = random.Random(0)
    chosen = rng.sample(rows, 200)
    for row in chosen:
        times = f"{int(row['time_start']):06d}_{int(row['time_end']):06d}"
        touch(tmp_path / "videos", f"{row['split']}/{row['label'].replace(' ', '_')}/{row['youtube_id']}_{times}.mp4")
    more = ["--labels", str(OFFICIAL / label_map)] if label_map else []
    report = run_index(tmp_path, OFFICIAL / annotations, *more)
    split = rows[0]["split"]
    assert report["splits"][split] == {"clips": clips, "found": 200, "missing": clips - 200}
    assert (report["unexpected"], report["rows_left_out"]) == (0, [])
    names = (OFFICIAL / f"label_map_{classes}.txt").read_text().splitlines()
    assert (tmp_path / "out" / "labels.txt").read_text().splitlines() == names
    videos = read_list(str(tmp_path / "out" / f"{split}.txt"), num_classes=classes, prefix=str(tmp_path / "videos"))
    labels = {videos.name(index).split("/")[2][:11]: videos.label(index) for index in range(len(videos))}
    assert labels == {row["youtube_id"]: names.index(row["label"]) for row in chosen}
    assert f"{classes} classes (Kinetics-{classes})" in capsys.readouterr().out


# ---- resize


def write_list(path: Path, *names: str) -> Path:
    path.write_text("".join(f"{name} {label}\n" for label, name in enumerate(names)))
    return path


def run_resize(tmp_path: Path, listed: Path, *more: object, short_side: int = 48, code: int = 0) -> Path:
    out = tmp_path / "small"
    given = [
        "--list",
        listed,
        "--prefix",
        tmp_path / "videos",
        "--out",
        out,
        "--short-side",
        short_side,
        "--workers",
        1,
    ]
    assert kinetics.main([*map(str, ("resize", *given, *more))]) == code
    return out


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    (folder / "yoga").mkdir(parents=True)
    return folder


def packets(path: Path) -> list[tuple[float, bool]]:
    """Times in seconds and whether it is a keyframe, in order of time."""
    with av.open(str(path)) as container:
        found = [packet for packet in container.demux(video=0) if packet.size]
        return sorted((float(packet.pts * packet.time_base), packet.is_keyframe) for packet in found)


def test_frames_keep_their_number_and_time(tmp_path: Path, videos: Path, read_codes) -> None:  # noqa: F811
    times = [40 * i + 200 * (i // 7) for i in range(60)]
    kinds = {
        "yoga/a.mp4": {"gop": 60, "b_frames": 2, "audio": True},
        "yoga/b.mkv": {"times": times, "b_frames": 2},
        "c.avi": {"codec": "mpeg4", "b_frames": 2},
        "d.webm": {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}},
        "e.mov": {"pix_fmt": "yuv420p10le"},
        "f.mpg": {"codec": "mpeg2video", "b_frames": 2},
    }
    for name, arguments in kinds.items():
        write_clip(videos / name, size=(96, 160), **arguments)
    listed = write_list(tmp_path / "train.txt", *kinds)
    out = run_resize(tmp_path, listed)
    names = [str(Path(name).with_suffix(".mp4")) for name in kinds]
    assert (out / "train.txt").read_text() == "".join(f"{name} {label}\n" for label, name in enumerate(names))
    assert (out / "failed.txt").read_text() == ""
    assert all((videos / name).exists() for name in kinds)
    for name, source in zip(names, kinds, strict=True):
        with open_video(str(out / name)) as video, open_video(str(videos / source)) as old:
            assert video.num_frames == 60
            # Matroska says the rate that the writer had in mind, mp4 the mean.
            assert video.fps == pytest.approx(15.025 if "b." in name else old.fps, rel=2e-3), name
            clip = video.frames(range(60))
            assert clip.shape == (60, 48, 80, 3)
            assert read_codes(clip) == [*range(60)], name
        found = packets(out / name)
        assert [time for time, _ in found] == pytest.approx(
            [ms / 1000 for ms in times] if "b." in name else [i / 30 for i in range(60)], abs=1.1e-3
        )
        keys = [number for number, (_, is_key) in enumerate(found) if is_key]
        assert max(np.diff([*keys, 60])) <= 12
        data = (out / name).read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")
        with av.open(str(out / name)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt, len(container.streams)) == ("h264", "yuv420p", 1)


@pytest.mark.parametrize(
    ("stored", "aspect", "short_side", "expected"),
    [
        ((340, 256), None, 256, (340, 256)),
        ((340, 256), Fraction(64, 51), 128, (214, 128)),
        ((1920, 1080), Fraction(1), 256, (456, 256)),  # 455.1
        ((1080, 1920), None, 256, (256, 456)),
        ((720, 576), Fraction(16, 15), 320, (426, 320)),
        ((720, 480), Fraction(8, 9), 320, (426, 320)),
        ((161, 97), None, 256, (160, 96)),  # even, and not larger
        ((101, 100), None, 98, (98, 98)),
        ((1000, 20), None, 320, (1000, 20)),
        ((1, 1), None, 320, (2, 2)),
    ],
)
def test_sizes(stored: tuple[int, int], aspect: Fraction | None, short_side: int, expected: tuple[int, int]) -> None:
    assert resizing.resized(*stored, aspect, short_side) == expected


def picture() -> np.ndarray:
    """uint8 [64, 96, 3]: red top left, green top right, blue bottom left, white bottom right."""
    image = np.zeros((64, 96, 3), np.uint8)
    image[:32, :48, 0] = image[:32, 48:, 1] = image[32:, :48, 2] = 255
    image[32:, 48:] = 255
    return image


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda image: image),
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
        ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
        ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
        ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
        ((1, 0, 0, -1), lambda image: image[::-1]),
        ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda image: np.rot90(image.transpose(1, 0, 2), 2)),
    ],
)
def test_rotation_goes_into_the_pixels(tmp_path: Path, videos: Path, matrix, shown) -> None:
    """The display matrix (a, b, c, d) of the file, x' = a x + c y and y' = b x + d y."""
    path = videos / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, width=96, height=64, options={"crf": "5"})
        stream.pix_fmt = "yuv420p"
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(), format="rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    place = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value * 65536 for value in matrix)
    values = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:place] + b"".join(v.to_bytes(4, "big", signed=True) for v in values) + data[place + 36 :])
    out = run_resize(tmp_path, write_list(tmp_path / "l.txt", "a.mp4"), short_side=32)
    with av.open(str(out / "a.mp4")) as container:
        frame = next(container.decode(video=0))
        assert frame.rotation == 0
        found = frame.to_ndarray(format="rgb24").astype(int)
    expected = shown(picture())[::2, ::2].astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 16  # the edges are soft


def test_sample_aspect_is_applied(tmp_path: Path, videos: Path) -> None:
    path = str(videos / "a.mkv")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=30, width=96, height=96)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for number in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(code_image(number, 96, 96), format="rgb24")))
        container.mux(stream.encode(None))
    out = run_resize(tmp_path, write_list(tmp_path / "l.txt", "a.mkv"))
    with av.open(str(out / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.sample_aspect_ratio in (None, 1)) == (64, 48, True)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj420p"])
def test_colours_stay(tmp_path: Path, videos: Path, pix_fmt: str) -> None:
    """Full range is written as limited range, and both are shown alike."""
    with av.open(str(videos / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30, width=96, height=96)
        stream.pix_fmt = pix_fmt
        stream.codec_context.colorspace = 1  # BT.709
        frame = av.VideoFrame(96, 96, pix_fmt)
        frame.colorspace = 1
        for plane, value in zip(frame.planes, (120, 110, 170), strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        for _ in range(20):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    out = run_resize(tmp_path, write_list(tmp_path / "l.txt", "a.mp4"))
    with open_video(str(videos / "a.mp4")) as old, open_video(str(out / "a.mp4")) as new:
        before, after = (video.frames([5]).float().mean(dim=(0, 1, 2)) for video in (old, new))
    assert after.tolist() == pytest.approx(before.tolist(), abs=2.5)


def test_a_changing_size_becomes_one(tmp_path: Path, videos: Path) -> None:
    parts = [
        Path(write_clip(tmp_path / f"{n}.mpg", 20, codec="mpeg2video", size=size))
        for n, size in enumerate([(96, 160), (64, 128)])
    ]
    (videos / "a.mpg").write_bytes(b"".join(part.read_bytes() for part in parts))
    with open_video(str(videos / "a.mpg")) as video:
        count = video.num_frames
    out = run_resize(tmp_path, write_list(tmp_path / "l.txt", "a.mpg"))
    with open_video(str(out / "a.mp4")) as video:
        assert video.frames(range(count)).shape == (count, 48, 80, 3)


def test_files_that_fail_are_named_and_the_rest_go_on(
    tmp_path: Path, videos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = Path(write_clip(videos / "a.mp4", container_options={"movflags": "faststart"})).read_bytes()
    (videos / "yoga" / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (videos / "page.mp4").write_bytes(b"<!DOCTYPE html>\n" * 50)
    (videos / "empty.mp4").touch()
    listed = write_list(tmp_path / "val.txt", "page.mp4", "a.mp4", "yoga/cut.mp4", "empty.mp4", "none.mp4")
    out = run_resize(tmp_path, listed, code=1)
    failed = dict(line.split("\t") for line in (out / "failed.txt").read_text().splitlines())
    assert [*failed] == ["page.mp4", "yoga/cut.mp4", "empty.mp4", "none.mp4"]
    assert failed["page.mp4"].startswith("cannot be opened (Invalid data found")
    assert failed["yoga/cut.mp4"].startswith("cut short or damaged at frame")
    assert failed["none.mp4"] == "no such file; check the list and its prefix"
    assert (out / "val.txt").read_text() == "a.mp4 1\n"
    assert {path.name for path in out.rglob("*")} == {"a.mp4", "val.txt", "failed.txt", "resize.json"}
    told = capfd.readouterr()
    assert "4 files failed" in told.err
    assert "moov" not in told.err  # what the demuxer had to say
    # A second list into the same folder keeps what failed of the first; what is mended leaves the list of failures.
    (videos / "page.mp4").write_bytes(whole)
    run_resize(tmp_path, write_list(tmp_path / "more.txt", "page.mp4"))
    assert [line.split("\t")[0] for line in (out / "failed.txt").read_text().splitlines()] == [*failed][1:]


def test_what_is_done_is_skipped_and_replace_deletes(tmp_path: Path, videos: Path, monkeypatch) -> None:
    for name in ("a.mp4", "b.mkv"):
        write_clip(videos / name, 20)
    listed = write_list(tmp_path / "l.txt", "a.mp4", "b.mkv")
    out = run_resize(tmp_path, listed)
    first = {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    (out / "b.mp4").unlink()
    run_resize(tmp_path, listed)
    assert (out / "a.mp4").stat().st_mtime_ns == first[out / "a.mp4"]
    assert (out / "b.mp4").exists()
    assert (videos / "a.mp4").exists()
    (out / "b.mp4").unlink()
    run_resize(tmp_path, listed, "--replace")
    assert [*videos.glob("*.m*")] == []
    assert {path.name for path in out.glob("*.mp4")} == {"a.mp4", "b.mp4"}
    run_resize(tmp_path, listed, "--replace")
    assert (out / "l.txt").read_text() == "a.mp4 0\nb.mp4 1\n"


def test_an_original_stays_when_a_frame_is_lost(tmp_path: Path, videos: Path, monkeypatch) -> None:
    path = videos / "a.mp4"
    write_clip(path, 20)
    monkeypatch.setattr(resizing, "decoded", lambda *given, decoded=resizing.decoded: list(decoded(*given))[:-1])
    failure = resizing.resize_file(str(path), tmp_path / "o.mp4", resizing.Resizing(48), True)
    assert failure == resizing.Failure("19 of its 20 frames could be decoded; fetch or encode it again")
    assert path.exists()
    assert [*tmp_path.glob("*.mp4")] == [*tmp_path.glob(".*.part")] == []


def test_a_full_disk_is_no_fault_of_a_file(tmp_path: Path, videos: Path, monkeypatch, capsys) -> None:
    write_clip(videos / "a.mp4", 20)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resizing, "encode", full)
    listed = write_list(tmp_path / "l.txt", "a.mp4")
    given = ("--list", listed, "--prefix", videos, "--out", tmp_path / "small", "--short-side", 48)
    told = failing(capsys, "resize", *given)
    assert "No space left on device; make room, then run again to go on" in told
    assert not (tmp_path / "small" / "failed.txt").exists()


def test_an_encoder_that_dies_costs_one_file(tmp_path: Path, videos: Path, monkeypatch) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_clip(videos / name, 20)
    encode = resizing.encode

    def dies(source: str, target: Path, settings: resizing.Resizing) -> int:
        count = encode(source, target, settings)
        return os.abort() if "a.mp4" in source else count

    monkeypatch.setattr(resizing, "encode", dies)
    out = run_resize(tmp_path, write_list(tmp_path / "l.txt", "a.mp4", "b.mp4"), code=1)
    assert (out / "failed.txt").read_text() == "a.mp4\tcrashes the decoder: SIGABRT\n"
    assert (out / "l.txt").read_text() == "b.mp4 1\n"
    assert not [*out.glob(".*")]


def test_lists_that_cannot_be_resized(tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--prefix", videos, "--out", tmp_path / "small")
    listed = tmp_path / "l.txt"
    for lines, told in (
        ("a.mkv 0\na.webm 1\n", f"l.txt:2: its resized file is that of {listed}:1"),
        ("../a.mp4 0\n", "l.txt:1: '../a.mp4' leads out of the prefix"),
        ("/etc/a.mp4 0\n", "l.txt:1: '/etc/a.mp4' leads out of the prefix"),
        ("a.mp4\n", "l.txt:1: no label in 'a.mp4'"),
        ("a.mp4 99999999999999999999\n", "l.txt:1: label '99999999999999999999' of 'a.mp4' is not an integer"),
        ("", "the list is empty"),
    ):
        listed.write_text(lines)
        assert told in failing(capsys, "resize", "--list", listed, *given, "--short-side", 48)
    write_list(listed, "a.mp4")
    for more, told in (
        ((*given, "--short-side", 255), "short-side is 255: h264 takes even sizes, give 256 or 320"),
        (
            (*given, "--short-side", 256, "--crf", 52, "--gop", 0),
            "crf is 52: give 0 (best) to 51, such as 20; gop is 0",
        ),
        ((*given, "--short-side", 256, "--timeout-s", "nan"), "timeout-s is nan: give more than 0"),
        ((*given, "--short-side", 256, "--workers", 0), "workers is 0: give 1 or more"),
        (("--prefix", videos, "--out", videos, "--short-side", 256), "--out is the folder of the originals"),
        (("--prefix", videos, "--out", tmp_path, "--short-side", 256), "which would be overwritten; give another"),
        (("--prefix", tmp_path / "no", "--out", tmp_path / "o", "--short-side", 256), "there is no folder"),
    ):
        assert told in failing(capsys, "resize", "--list", listed, *more)
    assert not (tmp_path / "small").exists()
    touch(tmp_path / "small", "b.mp4")
    told = failing(capsys, "resize", "--list", listed, *given, "--short-side", 48)
    assert "holds b.mp4 but no resize.json" in told


def test_other_settings_want_another_folder(tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_clip(videos / "a.mp4", 20)
    listed = write_list(tmp_path / "l.txt", "a.mp4")
    out = run_resize(tmp_path, listed)
    given = ("--list", listed, "--prefix", videos, "--out", out, "--short-side", 64)
    assert "was made with short_side 48, not 64: give the same" in failing(capsys, "resize", *given)
    (out / "resize.json").write_text("{")
    assert "resize.json is damaged: remove the folder" in failing(capsys, "resize", *given)


def test_the_bytes_do_not_depend_on_the_workers(tmp_path: Path, videos: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_clip(videos / name, 20)
    listed = write_list(tmp_path / "l.txt", "a.mp4", "b.mp4")
    out = run_resize(tmp_path, listed)
    other = tmp_path / "other"
    given = ("--list", listed, "--prefix", videos, "--out", other, "--short-side", 48, "--workers", 2)
    assert kinetics.main([*map(str, ("resize", *given))]) == 0
    assert (out / "a.mp4").read_bytes() == (other / "a.mp4").read_bytes()
    assert (out / "b.mp4").read_bytes() == (other / "b.mp4").read_bytes()


# ---- command line


def test_it_runs_as_a_script(tmp_path: Path, videos: Path) -> None:
    """From another folder, where datasets/ alone is on the path."""
    write_clip(videos / "yoga" / f"{TRICKY[0]}_000003_000013.mp4", 20)
    rows = write_csv(tmp_path / "a.csv", f"yoga,{TRICKY[0]},3,13,val,0")
    index = ["index", "--annotations", rows, "--videos", videos, "--out", tmp_path / "lists"]
    check = ["check", "--list", tmp_path / "lists" / "val.txt", "--prefix", videos, "--out", tmp_path / "lists"]
    for arguments in (index, check):
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert "1 of 1 files are usable, 0 are not" in done.stdout
    assert (tmp_path / "lists" / "clean.txt").read_text() == (tmp_path / "lists" / "val.txt").read_text()


def test_interrupted(tmp_path: Path, videos: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "outcomes", interrupt)
    given = ("--list", write_list(tmp_path / "l.txt", "a.mp4"), "--prefix", videos, "--out", tmp_path / "small")
    assert kinetics.main([*map(str, ("resize", *given, "--short-side", 48))]) == 130
    assert "interrupted: run the same command again to go on" in capsys.readouterr().err


def test_a_class_in_missing_csv_is_no_formula_and_reads_back_as_the_same_class():
    clip = kinetics.Clip("=yoga+1", "-abcdefghij", 0, 10, "val", 0, "val.csv:2")
    (row,) = [*csv.reader(kinetics.as_csv([clip]).splitlines())][1:]
    assert row == ["'=yoga+1", "-abcdefghij", "0", "10", "val"]  # of an id there is nothing to run
    assert kinetics.class_key(row[0]) == kinetics.class_key(clip.name)
