"""Every program with streams that go away, and with ctrl-C while it imports its modules."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.runs import ROOT

PROGRAMS = [path for folder in ("tools", "datasets") for path in sorted((ROOT / folder).glob("*.py"))]
PROGRAMS = [path for path in PROGRAMS if '__name__ == "__main__":\n    sys.exit' in path.read_text()]
STREAMS = ["pipe", "full", "closed", "ascii"]
# One process imports torch, then a child for each program and kind of stream runs the program. At its end the child
# flushes what the interpreter would flush, without the second that taking torch apart costs.
DRIVER = """
import os, runpy, sys, traceback
import torch, submitit, tensorboard, octvideo.jobs, octvideo.deploy, octvideo.benchmark.data, octvideo.benchmark.model
out, streams, programs = sys.argv[1], sys.argv[2].split(","), sys.argv[3:]
def child(program, stream):
    name = f"{out}/{os.path.basename(program)}.{stream}"
    os.dup2(os.open(f"{name}.err", os.O_WRONLY | os.O_CREAT), 2)
    if stream == "pipe":
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
    elif stream == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif stream == "closed":
        os.close(1)
        sys.stdout = None
    else:
        os.dup2(os.open(f"{name}.out", os.O_WRONLY | os.O_CREAT), 1)
        sys.stdout.reconfigure(encoding="ascii", errors="strict")
    sys.path.insert(0, os.path.dirname(program))
    sys.argv = [program, "--help"]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        for file in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            if file is not None and not file.closed:
                file.flush()
        os._exit(end.code or 0)
for program in programs:
    for stream in streams:
        pid = os.fork()
        if not pid:
            try:
                child(program, stream)
            except BaseException:
                traceback.print_exc()
            os._exit(99)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        open(f"{out}/{os.path.basename(program)}.{stream}.status", "w").write(str(status))
"""


def test_all_programs_are_found() -> None:
    names = "analyze benchmark evaluate export inflate predict results run_net kinetics motion stills ut_interaction"
    assert [path.stem for path in PROGRAMS] == names.split()


@pytest.fixture(scope="module")
def helped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("help")
    command = [sys.executable, "-c", DRIVER, str(out), ",".join(STREAMS), *map(str, PROGRAMS)]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_a_lost_stream_ends_no_program(program: Path, stream: str, helped: Path) -> None:
    name = f"{program.name}.{stream}"
    assert (helped / f"{name}.err").read_text() == ""
    assert (helped / f"{name}.status").read_text() == "0"
    if stream == "ascii":
        assert "usage: " in (helped / f"{name}.out").read_text()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_the_first_import_of_a_program_makes_ctrl_c_quiet(program: Path) -> None:
    lines = [line for line in program.read_text().split('"""', 2)[2].splitlines() if line]
    assert lines[:2] == ["from __future__ import annotations", 'if __name__ == "__main__":']
    assert lines[2].startswith("    import octvideo.starting")


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_while_a_program_imports_its_modules(tmp_path: Path, ignored: bool) -> None:
    """A module called torch, which the program imports next, says that it is being imported and then takes its time."""
    begun = tmp_path / "importing"
    text = f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\ntime.sleep(1)\nraise SystemExit(7)\n"
    (tmp_path / "torch.py").write_text(text)

    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools/run_net.py")],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=ignore if ignored else None,  # no threads in a test
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    end = time.monotonic() + 30
    while not begun.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=30)[1]
    assert (process.returncode, error) == ((7, "") if ignored else (130, ""))
