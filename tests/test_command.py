"""Errors as messages, and streams that go away or lack a character, in programs of their own."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from octvideo import command
from octvideo.errors import RunError, UserError
from tests.end_to_end.runs import ROOT

PROGRAM = """
import sys
from pathlib import Path
from octvideo import command, streams

@command.reports_errors
def main(arguments=None):
    for line in range(2000):
        print("line", line, "\\u6620\\u753b \\udcff")
    print("\\u6620", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    Path(sys.argv[1]).write_text(repr(streams.lost))
    return 0

sys.exit(command.run(main))
"""


def start(out: Path, **options: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(out)], text=True, **options)  # type: ignore[call-overload,no-any-return]


def test_a_pipe_that_closes_does_not_end_the_program(tmp_path: Path) -> None:
    utf8 = {**os.environ, "PYTHONUTF8": "1"}
    process = start(tmp_path / "lost", stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=utf8)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == "\u6620\n"
    assert process.wait() == 0
    assert "standard output" in (tmp_path / "lost").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_both_streams(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        assert start(tmp_path / "lost", stdout=full, stderr=full).wait() == 0
    lost = eval((tmp_path / "lost").read_text())
    assert set(lost) == {"standard output", "standard error"}
    assert "space" in lost["standard output"]


def test_streams_that_are_closed_from_the_start(tmp_path: Path) -> None:
    shell = f"{sys.executable} -c '{PROGRAM}' {tmp_path}/lost >&- 2>&-"
    assert subprocess.run(shell, shell=True).returncode == 0
    assert "closed" in (tmp_path / "lost").read_text()


def test_a_terminal_that_vanishes(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = start(tmp_path / "lost", stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, start_new_session=True)
    os.close(theirs)
    os.close(ours)
    assert process.wait() == 0
    assert "standard output" in (tmp_path / "lost").read_text()


def test_characters_that_the_encoding_lacks_are_escaped(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = start(tmp_path / "lost", stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    out, err = process.communicate()
    assert process.returncode == 0
    assert out.splitlines()[0] == "line 0 \\u6620\\u753b \\udcff"
    assert err == "\\u6620\n"
    assert (tmp_path / "lost").read_text() == "{}"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("what; where"), 2, "error: what; where\n"),
        (RunError("disk"), 1, "error: disk\n"),
        (MemoryError(), 1, "error: not enough memory (no details)\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "error: [Errno 2] No such file: 'x'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_expected_error_is_one_message_and_a_status(
    error: BaseException, status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command.reports_errors
    def main(arguments: object = None) -> int:
        raise error

    assert main() == status
    assert capsys.readouterr().err == text


def test_other_errors_keep_their_traceback() -> None:
    @command.reports_errors
    def main(arguments: object = None) -> int:
        raise KeyError("a fault of ours")

    with pytest.raises(KeyError):
        main()


def test_a_closed_stream_is_not_the_next_file_that_is_opened(tmp_path: Path) -> None:
    program = f"""
import os, sys
from octvideo import command
def main():
    with open({str(tmp_path / "data")!r}, "w") as file:
        os.write(1, b"native code prints")
        file.write("results")
    return 0
sys.exit(command.run(main))
"""
    (tmp_path / "program.py").write_text(program)
    shell = f"{sys.executable} {tmp_path}/program.py >&- 2>&-"
    assert subprocess.run(shell, shell=True, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
    assert (tmp_path / "data").read_text() == "results"


def test_an_output_that_replaces_one_is_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new/folder/a.json"
    command.write_output(path, b"1")
    assert capsys.readouterr().out == ""
    command.write_output(path, lambda file: file.write(b"2") and None)
    assert capsys.readouterr().out == f"replaced {path}\n" and path.read_bytes() == b"2"


def test_ctrl_c_raises_again_once_main_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    before = signal.signal(signal.SIGINT, command.end_quietly)
    try:
        assert command.run(lambda: int(signal.getsignal(signal.SIGINT) is signal.default_int_handler)) == 1
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("content", "allowed"), [(b"", True), (b"<!DOCTYPE html>", True), (b"a: 1", False), (b"<!", False)]
)
def test_only_a_file_of_the_same_kind_is_replaced(tmp_path: Path, content: bytes, allowed: bool) -> None:
    command.check_output(tmp_path / "none", b"<!doctype")
    (tmp_path / "a").write_bytes(content)
    with contextlib.nullcontext() if allowed else pytest.raises(command.OutputError, match="give another name"):
        command.check_output(tmp_path / "a", b"<!doctype")
    with pytest.raises(command.OutputError, match="is a folder"):
        command.check_output(tmp_path, b"<!doctype")
