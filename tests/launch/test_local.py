"""Ranks on this machine: their environment, their end, and the signals of their launcher."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from octvideo import launch
from octvideo.launch import Job, Request
from tests.end_to_end.runs import Run, check_same
from tools import run_net

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the end of a parent process")
TOOL = """
import os, signal, sys, time
out, what, rank = sys.argv[3], sys.argv[4], os.environ["RANK"]
received = []
def stop(number, frame):
    received.append(number)
    with open(f"{out}/signals_{rank}", "a") as file:
        file.write(f"{signal.Signals(number).name} ")
def loop():
    while True:
        if received and what != "stubborn":
            time.sleep(0.2)  # saves; a second rank may take longer
            open(f"{out}/saved_{rank}", "w").close()
            sys.exit(128 + received[0])
        open(f"{out}/writes_{rank}", "w").write(str(time.monotonic()))
        time.sleep(0.01)
if what != "default":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
config = open(sys.argv[sys.argv.index("--cfg") + 1]).read()
open(f"{out}/new_{rank}", "w").write(" ".join([*(os.environ[name] for name in names), config]))
os.rename(f"{out}/new_{rank}", f"{out}/up_{rank}")
open(f"{out}/pid_{rank}", "w").write(str(os.getpid()))
if what == "fail" and rank == "1":
    raise ValueError("on purpose")
if what != "end":
    loop()
"""
# A package without its __init__, which imports torch: that takes longer than everything else here.
LAUNCHER = """
import sys, types
from pathlib import Path
import octvideo
package = sys.modules["octvideo.launch"] = types.ModuleType("octvideo.launch")
package.__path__ = [str(Path(octvideo.__file__).with_name("launch"))]
from octvideo.launch.local import run_local
from octvideo.launch.request import Job
tool, what = Path(sys.argv[1]), sys.argv[2]
sys.exit(run_local(2, tool, Job(tool.parent, "TEXT", [str(tool.parent), what])))
"""


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    (tmp_path / "tool.py").write_text(TOOL)
    return tmp_path / "tool.py"


def until(true: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


class Launcher:
    """A launcher of two ranks as a separate process in a separate process group, as a shell starts it."""

    def __init__(self, tool: Path, what: str, *before: str) -> None:
        command = [*before, sys.executable, "-c", LAUNCHER, str(tool), what]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]
        self.folder = tool.parent
        until(lambda: all((self.folder / f"pid_{rank}").exists() for rank in range(2)))
        until(lambda: all(self.read(f"pid_{rank}") for rank in range(2)))
        self.ranks = [int(self.read(f"pid_{rank}")) for rank in range(2)]

    def read(self, name: str) -> str:
        return (self.folder / name).read_text() if (self.folder / name).exists() else ""

    def signals(self) -> list[str]:
        return [self.read(f"signals_{rank}").strip() for rank in range(2)]

    def saved(self) -> bool:
        return all((self.folder / f"saved_{rank}").exists() for rank in range(2))

    def writes(self) -> bool:
        """True if a rank writes within 0.3 s."""
        before = [self.read(f"writes_{rank}") for rank in range(2)]
        time.sleep(0.3)
        return before != [self.read(f"writes_{rank}") for rank in range(2)]

    def end(self) -> tuple[int, str]:
        error = self.process.communicate(timeout=30)[1]
        return self.process.returncode, error


def gone(pid: int) -> bool:
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True


def here(tool: Path, what: str, processes: int = 3) -> int:
    return launch.start(Request(local=processes), tool, [Job(tool.parent, "TEXT", [str(tool.parent), what])])


def test_ranks_know_their_places(tool: Path) -> None:
    assert here(tool, "end") == 0
    assert [(tool.parent / f"up_{n}").read_text() for n in range(3)] == [f"3 3 {n} 127.0.0.1 TEXT" for n in range(3)]


def test_the_first_rank_that_fails_ends_the_others(tool: Path, capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert here(tool, "fail") == 1
    error = capfd.readouterr().err
    assert "ValueError: on purpose" in error and "rank 1 of 3 ended with status 1; the others were ended" in error
    assert time.monotonic() - started < 30 and not (tool.parent / "saved_0").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_reaches_each_rank_once_and_they_save(tool: Path, name: str) -> None:
    launcher = Launcher(tool, "save")
    number = getattr(signal, name)
    os.killpg(launcher.process.pid, number)  # as ctrl-C in a terminal: to the complete process group
    assert launcher.end() == (128 + number, "")
    assert launcher.saved() and launcher.signals() == [name, name]


@LINUX
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT"])
def test_ranks_save_and_end_when_their_launcher_is_killed(tool: Path, name: str) -> None:
    launcher = Launcher(tool, "save")
    launcher.process.send_signal(getattr(signal, name))
    launcher.process.wait()
    until(lambda: all(map(gone, launcher.ranks)))
    assert launcher.saved() and launcher.signals() == ["SIGTERM", "SIGTERM"] and not launcher.writes()
    launcher.end()


@LINUX
def test_a_launcher_that_ended_before_a_rank_started(tool: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with_parent = Path(launch.__file__).with_name("with_parent.py")
    command = [sys.executable, "-I", "-S", str(with_parent), str(ended.pid), "/bin/echo", "started"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")


def test_a_second_ctrl_c_is_forwarded_too(tool: Path) -> None:
    launcher = Launcher(tool, "stubborn")
    launcher.process.send_signal(signal.SIGINT)
    until(lambda: launcher.signals() == ["SIGINT", "SIGINT"])
    launcher.process.send_signal(signal.SIGINT)
    until(lambda: launcher.signals() == ["SIGINT SIGINT", "SIGINT SIGINT"])
    os.kill(launcher.ranks[1], signal.SIGKILL)
    status, error = launcher.end()
    assert status == 137 and "rank 1 of 2 was ended by SIGKILL" in error and "memory" in error
    assert gone(launcher.ranks[0])


def test_ranks_that_a_signal_ends_before_they_can_save(tool: Path) -> None:
    launcher = Launcher(tool, "default")
    launcher.process.send_signal(signal.SIGUSR2)
    status, error = launcher.end()
    assert status == 128 + signal.SIGUSR2 and "was ended by SIGUSR2 before it could save" in error
    assert all(map(gone, launcher.ranks))


def test_a_signal_that_the_launcher_was_started_to_ignore_is_not_forwarded(tool: Path) -> None:
    launcher = Launcher(tool, "save", "nohup")
    launcher.process.send_signal(signal.SIGHUP)
    assert launcher.writes() and launcher.signals() == ["", ""]
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.end()[0] == 143 and launcher.signals() == ["SIGTERM", "SIGTERM"]


@LINUX
def test_ctrl_z_suspends_the_ranks_and_sigcont_continues_them(tool: Path) -> None:
    launcher = Launcher(tool, "save")
    launcher.process.send_signal(signal.SIGTSTP)
    until(lambda: "T" in Path(f"/proc/{launcher.process.pid}/stat").read_text().rpartition(")")[2].split()[0])
    assert not launcher.writes()
    launcher.process.send_signal(signal.SIGCONT)
    until(launcher.writes)
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.end()[0] == 143 and launcher.signals() == ["SIGTERM", "SIGTERM"]


def test_the_handlers_of_the_caller_are_restored(tool: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGTSTP, signal.SIGCONT)
    before = [signal.getsignal(number) for number in numbers]
    assert here(tool, "end") == 0
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.slow
def test_processes_here_train_as_torchrun_s_do(tmp_path: Path) -> None:
    from datasets import motion

    data = tmp_path / "data"
    motion.make(data, motion.Settings(train=2, val=1, size=48), workers=1)
    Run(data, tmp_path / "torchrun", 2).finish()
    assert run_net.main(["--local", "2", *Run(data, tmp_path / "local").arguments]) == 0
    check_same(tmp_path / "torchrun", tmp_path / "local")
