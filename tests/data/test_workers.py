"""Workers that hang, die or cannot hand over: what the loader reports, and what it leaves running."""

import ctypes
import errno
import faulthandler
import gc
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from octvideo.data import loader as loader_module
from octvideo.data import workers
from octvideo.data.dataset import Batch, Replacing, Sample
from octvideo.data.loader import EvalBatches, Loader, LoaderError, TrainBatches

HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
Act = Callable[[int], Any]


class Probe(torch.utils.data.Dataset[Sample]):
    """Calls act(entry) for each entry; what that returns, if anything, is the error of the sample."""

    def __init__(self, act: Act) -> None:
        self.act = act

    def __len__(self) -> int:
        return 8

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        entry = key[1] if isinstance(key, tuple) else key
        error = self.act(entry)
        return Sample(torch.full((1, 3, 1, 64, 64), entry, dtype=torch.uint8), os.getpid(), entry, error or "")


def nothing(entry: int) -> None:
    pass


def probe(act: Act = nothing, *, entries: int = 8, num_workers: int = 2, **arguments: Any) -> Loader:
    batches = EvalBatches(entries, batch_size=1)
    return Loader(Probe(act), batches, path_of="clips/{}.mp4".format, num_workers=num_workers, **arguments)


@pytest.fixture
def own() -> Iterator[Callable[[], list[int]]]:
    """A function that returns the processes that the test has started and that have not ended."""
    gc.collect()
    before = set(multiprocessing.active_children())
    yield lambda: [p.pid for p in multiprocessing.active_children() if p not in before and p.pid is not None]


def message_of(loader: Loader, within_s: float) -> str:
    started = time.monotonic()
    with pytest.raises(LoaderError) as caught:
        list(loader)
    assert time.monotonic() - started < within_s
    return str(caught.value)


def in_child(work: Callable[[], Any]) -> Any:
    """Return what work() returns in a separate process, whose limits and mounts it may change."""
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe()
    process = context.Process(target=lambda: its.send(work()))
    process.start()
    assert ours.poll(30)
    answer = ours.recv()
    process.join(10)
    assert process.exitcode == 0
    return answer


def outcome(loader: Loader) -> str:
    try:
        return f"{len(list(loader))} batches"
    except LoaderError as error:
        return str(error)


def gone(pid: int, within_s: float = 3) -> bool:
    end = time.monotonic() + within_s
    while workers._state(pid) not in ("", "Z"):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


# ---- workers that die


@pytest.mark.parametrize(
    ("number", "timeout_s"),
    [("SIGKILL", 0), ("SIGKILL", 60), ("SIGSEGV", 0), ("SIGABRT", 60), ("SIGBUS", 0), ("SIGALRM", 60)],
)
def test_a_worker_that_a_signal_ends_is_reported_at_once_with_its_file(number: str, timeout_s: float) -> None:
    def act(entry: int) -> None:
        if entry == 3:
            faulthandler.disable()  # pytest's
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.kill(os.getpid(), signal.Signals[number])

    message = message_of(probe(act, timeout_s=timeout_s), within_s=4)
    assert number in message and "was reading clips/3.mp4 (for 0 s)" in message
    assert ("inspect this file" in message) == (number in ("SIGSEGV", "SIGABRT", "SIGBUS"))


def test_a_worker_that_ends_by_itself_is_reported_with_its_status() -> None:
    message = message_of(probe(lambda entry: os._exit(7) if entry == 2 else None), within_s=4)
    assert "status 7" in message and "clips/2.mp4" in message


def test_a_death_does_not_interrupt_the_program_and_is_reported_at_the_next_batch() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(probe())
    victim = int(next(batches).labels[0])
    os.kill(victim, signal.SIGKILL)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:  # bytecode, such as that of a training step
        assert signal.getsignal(signal.SIGCHLD) == before
    where = r"(no file is to blame|it was reading clips/\d+\.mp4)"  # it may have begun its next batch by then
    with pytest.raises(LoaderError, match=rf"worker {victim} was killed \(SIGKILL\).*{where}"):
        next(batches)


def test_a_worker_of_another_loader_is_reported_as_well() -> None:
    """Validation's workers wait during training."""
    resting, working = probe(num_workers=1), probe(num_workers=1)
    (victim,) = {int(batch.labels[0]) for batch in resting}
    batches = iter(working)
    next(batches)
    os.kill(victim, signal.SIGKILL)
    assert gone(victim)
    with pytest.raises(LoaderError, match=f"worker {victim} was killed"):
        next(batches)


def test_after_a_failure_the_next_iteration_starts_new_workers(own: Callable[[], list[int]], tmp_path: Path) -> None:
    def act(entry: int) -> None:
        if entry == 1 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    loader = probe(act)
    message_of(loader, within_s=4)
    assert own() == []
    assert [int(batch.videos) for batch in loader] == list(range(8))


# ---- workers that hang


def test_a_worker_that_hangs_is_reported_with_its_file_after_the_time_limit(own: Callable[[], list[int]]) -> None:
    message = message_of(probe(lambda entry: time.sleep(30 if entry == 1 else 0), timeout_s=0.5), within_s=3)
    assert "DATA.TIMEOUT_S 0.5 s" in message and "clips/1.mp4" in message and "inspect this file" in message
    assert own() == []


def test_a_replacement_that_hangs_is_reported_rather_than_the_clip_it_replaces() -> None:
    found = []

    def act(entry: int) -> str | None:
        return "cannot be read" if entry == 5 else found.append(entry)

    epoch, seed = 0, 0
    Replacing(Probe(act), seed)[epoch, 5]
    (replacement,) = found
    hangs = Replacing(Probe(lambda entry: "cannot be read" if entry == 5 else time.sleep(30)), seed)

    class One(TrainBatches):
        def __iter__(self) -> Iterator[list[tuple[int, int]]]:
            yield [(epoch, 5)]

    loader = Loader(hangs, One(8, global_batch=8, seed=0), path_of="clips/{}.mp4".format, num_workers=1, timeout_s=0.3)
    assert f"was reading clips/{replacement}.mp4" in message_of(loader, within_s=3)


@pytest.mark.parametrize("delay_s", [0, 0.003, 0.01, 0.03])
def test_a_worker_that_is_stopped_at_any_moment_is_reported(delay_s: float) -> None:
    """Also while it hands over a batch: its next one is ready, being sent, or being made."""
    batches = iter(probe(lambda entry: time.sleep(0.01), timeout_s=0.4))
    victim = int(next(batches).labels[0])
    time.sleep(delay_s)
    os.kill(victim, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(LoaderError, match=rf"TIMEOUT_S 0.4 s: worker {victim} is stopped .*; it was"):
        list(batches)
    assert time.monotonic() - started < 2
    assert gone(victim)


def test_without_a_time_limit_a_slow_worker_is_waited_for() -> None:
    assert len(list(probe(lambda entry: time.sleep(0.5 if entry == 1 else 0), entries=2))) == 2


# ---- shared memory and descriptors


def full_shared_memory() -> str:
    """Mount 1 MB at /dev/shm, in this process and its children alone, and let a worker hand over more."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private, recursive = 0x20000, 0x40000, 0x4000
    if libc.unshare(new_mounts) or libc.mount(None, b"/", None, private | recursive, None):
        return os.strerror(ctypes.get_errno())
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=1m"):
        return os.strerror(ctypes.get_errno())

    class Large(Probe):
        def __getitem__(self, entry: Any) -> Sample:
            return super().__getitem__(entry)._replace(clips=torch.zeros(1, 3, 8, 224, 224, dtype=torch.uint8))

    batches = EvalBatches(4, batch_size=2)
    return message_of(Loader(Large(nothing), batches, path_of=str, num_workers=1, timeout_s=60), within_s=5)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_full_shared_memory_is_reported_at_once_with_its_size() -> None:
    message = in_child(full_shared_memory)
    if message == os.strerror(errno.EPERM):
        pytest.skip("this container may not mount a file system")
    for part in ("1 MB at /dev/shm", "a batch needs 2.4 MB", "--shm-size", "DATA.NUM_WORKERS"):
        assert part in message


@pytest.mark.parametrize(("number", "part"), [(errno.ENOSPC, "/dev/shm, "), (errno.ENOMEM, "Cannot allocate memory")])
def test_a_shared_memory_without_room_is_reported_at_once(
    number: int, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    message = message_of(probe(timeout_s=60), within_s=4)
    assert part in message and "0.0 MB" in message


def test_sigbus_while_the_shared_memory_is_full_is_its_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octvideo.data.handover._space", lambda: (64_000_000, 4096))

    def act(entry: int) -> None:
        faulthandler.disable()  # pytest's
        os.kill(os.getpid(), signal.SIGBUS)

    message = message_of(probe(act), within_s=4)
    assert "64 MB at /dev/shm, 0.0 MB free" in message and "clips" not in message


def test_too_few_descriptors_at_any_point_are_one_message_with_the_limit() -> None:
    """From where not even the first worker starts to where all of them work."""

    def with_more(descriptors: int) -> tuple[int, str]:
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + descriptors, HARD))
        return lowest + descriptors, outcome(probe(timeout_s=60))

    found = [(0, "")]
    while found[-1][1] != "8 batches":
        found.append(in_child(lambda: with_more(3 * len(found))))
    assert len(found) > 4
    for limit, text in found[1:-1]:
        assert f"ulimit -n is {limit}," in text and "DATA.NUM_WORKERS" in text


def exhaust(entry: int) -> None:
    while True:
        try:
            os.open(os.devnull, os.O_RDONLY)
        except OSError:
            return


def test_a_worker_without_descriptors_to_hand_over_reports_the_limit() -> None:
    def work() -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, HARD))
        return outcome(probe(exhaust, timeout_s=60))

    assert "ulimit -n is 200," in in_child(work)


def test_a_program_without_descriptors_to_receive_reports_the_limit() -> None:
    def work() -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, HARD))
        batches = iter(probe(timeout_s=60))
        next(batches)
        exhaust(0)
        try:
            return f"{len(list(batches))} batches"
        except LoaderError as error:
            return str(error)

    assert "ulimit -n is 200," in in_child(work)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_is_not_blamed_if_there_was_no_descriptor_to_open_it_with(num_workers: int) -> None:
    text = f"clips/1.mp4: [Errno 24] {os.strerror(errno.EMFILE)}"
    message = message_of(probe(lambda entry: text if entry == 1 else None, num_workers=num_workers), within_s=4)
    assert "ulimit -n" in message and "clips" not in message


def test_workers_that_cannot_be_started_are_counted(
    own: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = multiprocessing.context.ForkProcess.start, []

    def limited(process: Any) -> None:
        if len(started) == 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(start(process))

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", limited)
    message = message_of(probe(num_workers=4), within_s=4)
    assert "worker 3 of 4" in message and "Resource temporarily unavailable" in message
    assert own() == []


# ---- the wait


def test_the_wait_calls_poll_and_what_it_raises_ends_it(own: Callable[[], list[int]]) -> None:
    calls: list[float] = []

    def poll() -> None:
        assert threading.current_thread() is threading.main_thread()
        calls.append(time.monotonic())
        if len(calls) == 4:
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        list(probe(lambda entry: time.sleep(30), poll=poll))
    assert calls[-1] - calls[0] < 3 * workers.POLL_S + 1
    assert own() == []


def test_a_batch_that_is_ready_does_not_wait_for_a_poll() -> None:
    loader = probe(
        lambda entry: time.sleep(0.01), num_workers=1, poll=lambda: pytest.fail("every batch was soon ready")
    )
    list(loader)
    started = time.monotonic()
    assert len(list(loader)) == 8
    assert time.monotonic() - started < 8 * workers.POLL_S / 2


def test_iterations_that_are_not_completed_leave_nothing_for_the_next() -> None:
    loader = probe(lambda entry: time.sleep(0.005), num_workers=3)
    pids = {int(batch.labels[0]) for batch in loader}
    for taken in (0, 1, 2, 5):
        batches = iter(loader)
        assert [int(next(batches).videos) for _ in range(taken)] == list(range(taken))
        del batches
    for _ in range(12):
        next(iter(loader))
    assert [int(batch.videos) for batch in loader] == list(range(8))
    assert {int(batch.labels[0]) for batch in loader} == pids


class TwoArguments(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (KeyError("a mistake"), KeyError, "a mistake"),
        (TwoArguments("one", "two"), RuntimeError, "TwoArguments: one"),
        (ValueError("x" * 500_000), RuntimeError, "xxx"),
    ],
)
def test_an_exception_of_the_dataset_is_raised_with_the_trace_of_the_worker(
    error: Exception, expected: type[Exception], text: str
) -> None:
    def act(entry: int) -> None:
        if entry == 1:
            raise error

    with pytest.raises(expected, match=text) as caught:
        list(probe(act))
    assert not isinstance(caught.value, LoaderError)
    trace = str(caught.value.__cause__) if caught.value.__cause__ else str(caught.value)
    assert "raise error" in trace or "xxx" in trace


# ---- whose processes


def test_a_loader_ends_its_own_workers_only() -> None:
    others = [multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True) for _ in range(2)]
    for other in others:
        other.start()
    try:
        first, second = probe(), probe()
        pids = {int(batch.labels[0]) for batch in second}
        list(first)
        first.close()
        assert all(workers._state(pid) not in ("", "Z") for pid in pids)
        message_of(probe(lambda entry: os._exit(1)), within_s=4)
        del second, first
        gc.collect()
        assert all(gone(pid) for pid in pids)
        assert all(other.is_alive() for other in others)
    finally:
        for other in others:
            other.kill()
            other.join()


def test_workers_end_with_a_process_that_is_killed() -> None:
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe()

    def work() -> None:
        loader = probe(lambda entry: time.sleep(30 if entry >= 2 else 0))  # each worker hangs, then
        batches = iter(loader)
        its.send([int(next(batches).labels[0]) for _ in range(2)])
        os.kill(os.getpid(), signal.SIGKILL)

    process = context.Process(target=work)
    process.start()
    pids = ours.recv()
    process.join(10)
    assert process.exitcode == -signal.SIGKILL and len(set(pids)) == 2
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_workers_ignore_the_signals_that_a_cluster_sends_to_every_process(number: str) -> None:
    loader = probe(lambda entry: os.kill(os.getpid(), signal.Signals[number]))
    assert len(list(loader)) == 8


# ---- the thread that pins


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pinned loaders run without a GPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(loader_module, "_pin", lambda batch: batch._replace(errors=["pinned"]))


@pytest.mark.usefixtures("pinned")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_that_pins_gives_the_same_batches(num_workers: int) -> None:
    loader = probe(num_workers=num_workers, pin_memory=True)
    for _ in range(2):
        found: list[Batch] = list(loader)
        assert [int(batch.videos) for batch in found] == list(range(8))
        assert all(batch.errors == ["pinned"] for batch in found)


@pytest.mark.usefixtures("pinned")
def test_a_loader_that_pins_keeps_its_workers_over_iterations_that_are_not_completed() -> None:
    loader = probe(lambda entry: time.sleep(0.01), pin_memory=True)
    pids = {int(batch.labels[0]) for batch in loader}
    for _ in range(3):
        next(iter(loader))
    assert {int(batch.labels[0]) for batch in loader} == pids
    assert [thread for thread in threading.enumerate() if thread.name == "pin batches"] == []


@pytest.mark.usefixtures("pinned")
def test_a_loader_that_pins_reports_and_can_be_interrupted_as_well(own: Callable[[], list[int]]) -> None:
    def poll() -> None:
        assert threading.current_thread() is threading.main_thread()
        raise KeyError("stop")

    message = message_of(probe(lambda entry: time.sleep(30), pin_memory=True, timeout_s=0.4), within_s=3)
    assert "clips/0.mp4" in message
    with pytest.raises(KeyError, match="stop"):
        list(probe(lambda entry: time.sleep(30), pin_memory=True, poll=poll))
    assert own() == []
