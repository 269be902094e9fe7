import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from octvideo.data.lists import MAX_LINE, ListError, read_list, text_lines, unlabelled, unlistable


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_lines_become_paths_and_labels(tmp_path: Path) -> None:
    text = "# made by hand\n\na.mp4 3\nmy holiday/run 1.mp4 0\r\n   \n/abs/b.mp4 12\n  c.mp4\t 7  \n"
    videos = read_list(write(tmp_path / "l.txt", text), num_classes=13, prefix="/data", check_files=False)
    assert len(videos) == 4
    assert [videos.path(i) for i in range(4)] == [
        "/data/a.mp4",
        "/data/my holiday/run 1.mp4",
        "/abs/b.mp4",
        "/data/c.mp4",
    ]
    assert videos.labels.tolist() == [3, 0, 12, 7]
    assert [videos.label(i) for i in range(4)] == [3, 0, 12, 7]
    assert videos.place(1) == f"{tmp_path}/l.txt:4"
    assert repr(videos) == f"VideoList('{tmp_path}/l.txt', 4 videos)"


def test_files_without_a_list() -> None:
    files = unlabelled(["a b/größe.mp4", "/c.mp4", "d.tar:512:9:e.mp4"], "the command line")
    assert [files.path(index) for index in range(len(files))] == ["a b/größe.mp4", "/c.mp4", "d.tar:512:9:e.mp4"]
    assert files.label(2) == -1 and files.place(1) == "the command line:2"
    assert len(unlabelled([], "nowhere")) == 0


def test_other_separators_and_a_byte_order_mark(tmp_path: Path) -> None:
    text = "\ufeffa, b.mp4,3\nübung.mp4, 1\n"
    videos = read_list(write(tmp_path / "l.csv", text), num_classes=4, separator=",", check_files=False)
    assert [videos.path(i) for i in range(2)] == ["a, b.mp4", "übung.mp4"]
    assert videos.labels.tolist() == [3, 1]


def test_all_problems_at_once_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "ok.mp4").touch()
    text = "ok.mp4 0\nok.mp4\nok.mp4 x\nok.mp4 8\nok.mp4 -1\n\ngone.mp4 1\nok.mp4 2\n"
    path = write(tmp_path / "l.txt", text)
    with pytest.raises(ListError) as caught:
        read_list(path, num_classes=8, prefix=str(tmp_path))
    lines = str(caught.value).splitlines()
    again = "'ok.mp4' is listed already in line 1; remove one of them"
    assert lines == [
        f"8 problem(s) in the list {path}",
        f"{path}:2: no label in 'ok.mp4'; write path label",
        f"{path}:3: label 'x' of 'ok.mp4' is not an integer of at most 18 digits 0 to 9; write path label",
        f"{path}:4: label 8 of 'ok.mp4' is outside 0..7; MODEL.NUM_CLASSES is 8",
        f"{path}:4: {again}",
        f"{path}:5: label -1 of 'ok.mp4' is outside 0..7; MODEL.NUM_CLASSES is 8",
        f"{path}:5: {again}",
        f"{path}:7: no file '{tmp_path}/gone.mp4' (No such file or directory); check the path and the prefix '{tmp_path}'",
        f"{path}:8: {again}",
    ]


def test_many_problems_are_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "l.txt", "".join(f"{i}.mp4 9\n" for i in range(30)))
    with pytest.raises(ListError) as caught:
        read_list(path, num_classes=9, check_files=False, max_problems=3)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"30 problem(s) in the list {path}"
    assert [line.split(":")[1] for line in lines[1:4]] == ["1", "2", "3"]
    assert lines[4:] == ["... and 27 more"]


def test_classes_without_a_video(tmp_path: Path) -> None:
    path = write(tmp_path / "l.txt", "".join(f"{i}.mp4 {i}\n" for i in range(6)))
    message = "MODEL.NUM_CLASSES is 8 but the list names 6 classes: no video for 6, 7; correct the number or add"
    with pytest.raises(ListError, match=message):
        read_list(path, num_classes=8, require_all_classes=True, check_files=False)
    assert len(read_list(path, num_classes=8, check_files=False)) == 6
    assert len(read_list(path, num_classes=6, require_all_classes=True, check_files=False)) == 6
    with pytest.raises(ListError, match=r"no video for 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 and 384 more;"):
        read_list(path, num_classes=400, require_all_classes=True, check_files=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the list is empty; give one video per line: path label"),
        (b"# nothing\n\n", "the list is empty"),
        (b"a.mp4 0\nb\xff.mp4 1\n", "list:2: byte 0xff is not UTF-8 text; is this a list"),
        (b"\x00\x00\x00\x18ftypmp42\x00\x80\x93", "list:1: byte 0x80 is not UTF-8 text"),
    ],
)
def test_files_that_are_no_list(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ListError, match=message):
        read_list(write(tmp_path / "list", content), num_classes=2, check_files=False)


def test_no_list_at_all(tmp_path: Path) -> None:
    with pytest.raises(ListError, match=r"gone.txt: the list cannot be read \(No such file or directory\)"):
        read_list(str(tmp_path / "gone.txt"), num_classes=2)
    with pytest.raises(ListError, match=r"the list cannot be read \(Is a directory\); check its path"):
        read_list(str(tmp_path), num_classes=2)


def test_a_long_list_is_compact(tmp_path: Path) -> None:
    """20 bytes a video and the text of its path; nothing is left of the reading."""
    path = write(tmp_path / "l.txt", "".join(f"class_{i % 400}/video_{i:07d}.mp4 {i % 400}\n" for i in range(30_000)))
    tracemalloc.start()
    videos = read_list(path, num_classes=400, require_all_classes=True, check_files=False)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert videos.path(29_999) == "class_399/video_0029999.mp4"
    assert kept < 30_000 * (20 + 28)
    assert peak < 30_000 * 200
    assert isinstance(videos.names, bytes)
    assert (videos.labels.dtype, videos.ends.dtype) == (np.int64, np.int64)


# ---- no line vanishes


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Three files, of which one looks like a comment in a list."""
    for name in ("a/a0.mp4", "b/b3.mp4", "#1 goal.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def read(folder: Path, text: str | bytes, **options: object) -> list[str]:
    videos = read_list(write(folder / "l.txt", text), num_classes=8, prefix=str(folder), **options)  # type: ignore[arg-type]
    return [videos.name(index) for index in range(len(videos))]


def refused(folder: Path, text: str | bytes, **options: object) -> list[str]:
    """The problems of a list, as LINE: text."""
    with pytest.raises(ListError) as caught:
        read(folder, text, **options)
    assert all(len(line) < 1500 for line in str(caught.value).split("\n"))
    return str(caught.value).replace(f"{folder}/l.txt", "l").split("\n")[1:]


def test_a_file_whose_name_looks_like_a_comment_is_listed(files: Path) -> None:
    assert read(files, "#1 goal.mp4 0\nb/b3.mp4 1\n") == ["#1 goal.mp4", "b/b3.mp4"]
    assert read(files, "#1 goal.mp4 0\nb/b3.mp4 1\n", check_files=False) == ["#1 goal.mp4", "b/b3.mp4"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("#1 goal.mp4", "l:1: label 'goal.mp4' of '#1' is not an integer"),
        ("#1 goal.mp4 x", "l:1: label 'x' of '#1 goal.mp4'"),
        ("#1 goal.mp4 9", "l:1: label 9 of '#1 goal.mp4' is outside 0..7"),
        ("  #1 goal.mp4 123456789012345678901", "l:1: label '123456789012345678901' of '#1 goal.mp4'"),
    ],
)
def test_such_a_file_with_a_wrong_label_is_no_comment(files: Path, line: str, problem: str) -> None:
    (found,) = refused(files, f"{line}\nb/b3.mp4 1\n")
    assert found.startswith(problem)


def test_comments_are_counted(files: Path) -> None:
    text = "# made by hand\n#a/a0.mp4 0\n\n  # version 2\nb/b3.mp4 1\n#\n"
    videos = read_list(write(files / "l.txt", text), num_classes=2, prefix=str(files))
    assert (len(videos), videos.left_out, videos.lines.tolist()) == (1, "4 comment lines", [5])
    assert read_list(write(files / "l.txt", "a/a0.mp4 0"), num_classes=2, prefix=str(files)).left_out == ""
    with pytest.raises(ListError, match="the list is empty but for 1 comment line; give one video per line"):
        read(files, "# nothing yet\n")


@pytest.mark.parametrize(
    "label", ["1_0", "\u0663", "+5", "-0", "1.0", "0x1", "9" * 19, "9" * 5000, "\u00b2", "1\u00a0", ""]
)
def test_labels_are_plain_decimal_integers(files: Path, label: str) -> None:
    (problem,) = refused(files, f"a/a0.mp4,{label}\n", separator=",")
    assert problem.startswith("l:1: label '") and "of 'a/a0.mp4' is not an integer of at most 18 digits" in problem


def test_labels_may_have_zeros_and_blanks_before_them(files: Path) -> None:
    videos = read_list(write(files / "l.txt", "a/a0.mp4,  07 \t\r\n"), num_classes=8, prefix=str(files), separator=",")
    assert videos.labels.tolist() == [7]
    assert "label 999999999999999999 of 'a/a0.mp4' is outside 0..7" in refused(files, f"a/a0.mp4 {'9' * 18}")[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"a/a0.mp4 0\rb/b3.mp4 1\r", "l:1: the path 'a/a0.mp4 0\\rb/b3.mp4' contains the control character '\\r'"),
        (b"a/a0.mp4 0\r\r\n", "l:1: label '0\\r' of 'a/a0.mp4'"),
        (b"a/\x00a0.mp4 0\n", "l:1: the path 'a/\\x00a0.mp4' contains the control character '\\x00'"),
        (b"a/\x1b[2Ja0.mp4 0\n", "contains the control character '\\x1b'"),
        (b"a/a\t0.mp4 0\n", "contains the control character '\\t'"),
        ("a/a0\u2028.mp4 0\n", "contains the line-break character '\\u2028'"),
        ("a/a0\x85.mp4 0\n", "contains the control character '\\x85'"),
        ("a/\u202e4pm.0a 0\n", "contains the invisible character '\\u202e'"),
        ("a/a0.mp4 0\n\ufeffb/b3.mp4 1\n", "l:2: the path '\\ufeffb/b3.mp4' contains the invisible character"),
        ("a/a0.mp4\u00a0 0\n", "l:1: no file"),
        ("\u3000\n", "l:1: no label in '\\u3000'"),
        (b"a/a0.mp4\t0\n", "l:1: no label in 'a/a0.mp4\\t0'"),
        ("a/a0.mp4 0\n".encode("utf-16-le"), "contains the control character '\\x00'"),
    ],
)
def test_nothing_is_changed_silently(files: Path, text: str | bytes, problem: str) -> None:
    problems = refused(files, text)
    assert any(problem in each for each in problems), problems


def test_other_encodings_are_named(files: Path) -> None:
    with pytest.raises(ListError, match="l.txt:1: byte 0xff is not UTF-8 text; is this a list"):
        read(files, "a/a0.mp4 0\n".encode("utf-16"))


@pytest.mark.parametrize("name", [" a.mp4", "a.mp4 ", "a.mp4\t"])
def test_blanks_around_a_path_are_layout_unless_there_is_such_a_file(files: Path, name: str) -> None:
    (files / "a.mp4").touch()
    assert read(files, f"{name} 0\n") == ["a.mp4"]
    (files / name).touch()
    (problem,) = refused(files, f"{name} 0\n")
    assert problem == f"l:1: the file {name!r} exists, but blanks around a path are not part of it; rename the file"


def test_a_home_folder_in_a_list(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(files))
    (files / "~x.mp4").touch()
    assert read(files, "~/a/a0.mp4 0\n~x.mp4 1\n") == [f"{files}/a/a0.mp4", "~x.mp4"]


# ---- no file counts twice


@pytest.mark.parametrize(
    "other", ["./a/a0.mp4", "a//a0.mp4", "a/./a0.mp4", "b/../a/a0.mp4", "{}/a/a0.mp4", "link.mp4", "hard.mp4"]
)
@pytest.mark.parametrize("check_files", [True, False])
def test_another_spelling_is_the_same_file(files: Path, other: str, check_files: bool) -> None:
    (files / "link.mp4").symlink_to("a/a0.mp4")
    os.link(files / "a/a0.mp4", files / "hard.mp4")
    other = other.format(files)
    (problem,) = refused(files, f"a/a0.mp4 0\nb/b3.mp4 1\n{other} 0\n", check_files=check_files)
    assert problem.startswith("l:3: ") and problem.endswith(" is the file 'a/a0.mp4' of line 1; remove one of them")


def test_a_missing_file_with_two_spellings(files: Path) -> None:
    problems = refused(files, "a/gone.mp4 0\n./a//gone.mp4 0\n")
    assert [problem[:12] for problem in problems] == ["l:1: no file", "l:2: no file", "l:2: './a//g"]


def test_a_video_in_an_archive_with_two_spellings(files: Path) -> None:
    (files / "x.tar").write_bytes(bytes(4096))
    (problem,) = refused(files, "x.tar:512:9:a 0\nx.tar:1536:9:a 0\n./x.tar:0512:9:b 1\n")
    assert problem == "l:3: './x.tar:0512:9:b' is the file 'x.tar:512:9:a' of line 1; remove one of them"


def test_empty_files_are_different_files(files: Path) -> None:
    for name in ("x", "y"):
        (files / name).touch()
    assert read(files, "x 0\ny 0\n") == ["x", "y"]


# ---- whatever the file is


def test_a_line_without_end_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "l.txt"
    path.write_bytes(b"a.mp4 0\n" + b"x" * 20_000_000)
    tracemalloc.start()
    with pytest.raises(ListError) as caught:
        read_list(str(path), num_classes=2, check_files=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert f"l.txt:2: the line is longer than {MAX_LINE} bytes" in str(caught.value) and len(str(caught.value)) < 400


def test_the_longest_line(tmp_path: Path) -> None:
    path = write(tmp_path / "l.txt", b"x" * MAX_LINE + b"\r\ny\n")
    assert [(number, len(line)) for number, line in text_lines(path)] == [(1, MAX_LINE), (2, 1)]
    with pytest.raises(ListError, match="l.txt:1: the line is longer"):
        list(text_lines(write(tmp_path / "l.txt", b"x" * (MAX_LINE + 1) + b"\n")))


def test_long_values_are_cut_in_messages(files: Path) -> None:
    (problem,) = refused(files, f"{'y' * 60_000}\n")
    assert "..." in problem and len(problem) < 200
    (problem,) = refused(files, f"a {'y' * 60_000}\n")
    assert "..." in problem and len(problem) < 300
    assert len(refused(files, f"x.tar:{'9' * 5000}:1:a 0\n")[0]) < 1000


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(ListError, match=r"the list cannot be read \(Not a regular file\)"):
            read_list(str(path), num_classes=2)
    assert "l:1: no file" in refused(tmp_path, "fifo 0\n")[0]
    assert "(Not a regular file)" in refused(tmp_path, "fifo 0\n")[0]


def test_relative_paths_are_shown_as_they_were_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ListError, match=rf"gone.txt: the list cannot be read .*\(tried '{tmp_path}/gone.txt' from the cur"
    ):
        read_list("gone.txt", num_classes=2)
    write(tmp_path / "l.txt", "a.mp4 0\n")
    with pytest.raises(
        ListError, match=rf"no file 'videos/a.mp4' .*\(tried '{tmp_path}/videos/a.mp4' from the current fol"
    ):
        read_list("l.txt", num_classes=2, prefix="videos")


def test_paths_from_a_command_line_that_no_line_can_show() -> None:
    with pytest.raises(ListError, match=r"here:2: 'caf\\udce9.mp4' contains the undecodable character"):
        unlabelled(["a.mp4", "caf\udce9.mp4"], "here")


@pytest.mark.parametrize("path", ["a\nb", "a\rb", "\udcff", "# a", " a", "a ", "\ta"])
def test_paths_that_cannot_be_listed(path: str) -> None:
    assert unlistable(path).startswith("its path ")
    assert unlistable("a #1/größe.mp4") == ""


def test_by_path_no_file_is_looked_at_and_spellings_of_a_path_are_recognized(tmp_path: Path) -> None:
    path = write(tmp_path / "l.txt", "a/b.mp4 0\n./a//b.mp4 1\nc.tar:0:9:x 0\n./c.tar:0:9:y 1\nd.mp4 1\n")
    with pytest.raises(ListError) as caught:
        read_list(path, num_classes=2, prefix="/nowhere", by_path=True)
    assert "2 problem(s)" in str(caught.value)
    assert "l.txt:2: './a//b.mp4' is the file 'a/b.mp4' of line 1" in str(caught.value)
    assert "l.txt:4: './c.tar:0:9:y' is the file 'c.tar:0:9:x' of line 3" in str(caught.value)
