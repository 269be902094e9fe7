"""Worker processes that load batches. Whatever happens to a worker, the program waits for it no longer than it wants to.

Each worker has its own socket, and a message is one datagram: it arrives completely or not at all, at whatever moment its
sender is stopped or killed.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import mmap
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, util
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from multiprocessing.process import BaseProcess, _children  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import torch

from octvideo.data.handover import (
    MESSAGE,
    WorkerError,
    descriptors_cause,
    hand_over,
    memory_cause,
    memory_is_full,
    no_descriptors,
    taken_over,
)

AHEAD = 2  # tasks that a worker has at once: the one it works on, and the next
POLL_S = 0.2
_IGNORED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Readings:
    """Which entry each worker is reading, since when, in memory that all processes share. path_of: entry -> its file."""

    def __init__(self, workers: int, path_of: Callable[[int], str]) -> None:
        self.path_of = path_of
        self.worker = 0  # of this process; each worker sets its number
        # [2 * workers]: entry (-1: none) and time.monotonic(), which is one clock for all processes of a machine
        self._shared = memoryview(mmap.mmap(-1, 16 * max(workers, 1))).cast("d")
        for worker in range(max(workers, 1)):
            self._shared[2 * worker] = -1

    def begin(self, entry: int) -> None:
        self._shared[2 * self.worker + 1] = time.monotonic()
        self._shared[2 * self.worker] = entry

    def end(self) -> None:
        self._shared[2 * self.worker] = -1

    def text(self, worker: int, *, suspect: bool) -> str:
        """Return which file a worker is reading, for a message. suspect: the file may be the cause."""
        entry, since = int(self._shared[2 * worker]), self._shared[2 * worker + 1]
        if entry < 0:
            return "it was not reading a file: no file is to blame"
        remedy = ": inspect this file, or remove it from the list" if suspect else ""
        return f"it was reading {self.path_of(entry)} (for {time.monotonic() - since:.0f} s){remedy}"


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    socket: socket.socket
    readings: Readings
    unanswered: int = 0

    def error(self, cause: str, *, suspect: bool = False) -> WorkerError:
        return WorkerError(f"{cause}; {self.readings.text(self.number, suspect=suspect)}")


_alive: dict[int, _Worker] = {}
"""Sentinel -> worker, of all loaders: one that dies while its loader is not in use is reported at the next batch of any."""
os.register_at_fork(after_in_child=_alive.clear)


class Workers:
    """`count` processes that compute load(task) and return the results in the order of the tasks.

    They end with this object, with the program, and with the process if it is killed.
    """

    def __init__(self, load: Callable[[Any], Any], count: int, readings: Readings) -> None:
        """Raises WorkerError if the system cannot start so many."""
        self.workers: list[_Worker] = []
        # At exit this runs before multiprocessing waits for its processes, which it sends SIGTERM; these ignore it.
        self.close = util.Finalize(self, _kill, (self.workers,), exitpriority=10)
        # A worker must not free decoders that this process has dropped: it would wait forever for their threads, which a
        # forked process does not have.
        gc.collect()
        for number in range(count):
            try:
                self.workers.append(_start(load, number, readings))
            except OSError as error:
                self.close()
                if no_descriptors(error):
                    raise WorkerError(descriptors_cause()) from error
                raise WorkerError(
                    f"worker {number + 1} of {count} cannot be started ({error.strerror}): lower DATA.NUM_WORKERS, or raise "
                    "the limits of memory and processes (ulimit -u)"
                ) from error

    def results(self, tasks: Iterator[Any], limit_s: float, poll: Callable[[], None]) -> Iterator[Any]:
        """Yield load(task) for each task; what load raises is raised here.

        limit_s: of a wait for one result, 0 for none. poll: called at least every POLL_S seconds of a wait. Raises
        WorkerError if a worker has died or does not answer.
        """
        for worker in self.workers:  # those of an iteration that was not completed
            while worker.unanswered:
                self._receive(worker, limit_s, poll, drop=True)
        turns, asked = itertools.cycle(self.workers), deque[_Worker]()
        for task in itertools.islice(tasks, AHEAD * len(self.workers)):
            asked.append(self._ask(next(turns), task))
        while asked:
            result = self._receive(asked.popleft(), limit_s, poll)
            for task in itertools.islice(tasks, 1):
                asked.append(self._ask(next(turns), task))
            if isinstance(result, Exception):
                raise result
            yield result

    def _ask(self, worker: _Worker, task: Any) -> _Worker:
        try:
            worker.socket.send(pickle.dumps(task))
        except ConnectionError:
            raise _death(worker) from None
        worker.unanswered += 1
        return worker

    def _receive(self, worker: _Worker, limit_s: float, poll: Callable[[], None], *, drop: bool = False) -> Any:
        """Wait for the next result of a worker. drop: return None instead."""
        started = time.monotonic()
        while True:
            ready = connection.wait([worker.socket, *_alive], POLL_S)
            for dead in [_alive[sentinel] for sentinel in ready if sentinel in _alive]:
                raise _death(dead)
            if worker.socket in ready:
                break
            poll()
            if limit_s and time.monotonic() - started > limit_s:
                raise _hang(worker, limit_s)
        message, descriptors, _, _ = socket.recv_fds(worker.socket, MESSAGE, 1)
        worker.unanswered -= 1
        try:
            return None if drop else taken_over(message, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def _start(load: Callable[[Any], Any], number: int, readings: Readings) -> _Worker:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in (ours, its):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE)
    # The kernel ends a worker together with the thread that forked it, so that must be the one that lasts.
    lasts = threading.current_thread() is threading.main_thread()
    process = multiprocessing.get_context("fork").Process(
        target=_work, args=(load, its, number, readings, os.getpid(), lasts), daemon=True
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)  # until the worker ignores them
    try:
        process.start()
    except OSError:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        its.close()
    worker = _alive[process.sentinel] = _Worker(number, process, ours, readings)
    return worker


def _kill(workers: list[_Worker]) -> None:
    """Kill these processes; wait at most 5 s for the system to end them."""
    for worker in workers:
        _alive.pop(worker.process.sentinel, None)
        worker.process.kill()
    end = time.monotonic() + 5
    for worker in workers:
        worker.process.join(max(end - time.monotonic(), 0))
        worker.socket.close()
        # At exit, multiprocessing would wait without a limit for one that the system cannot end.
        _children.discard(worker.process)
    workers.clear()


# In a worker


def _work(
    load: Callable[[Any], Any], its: socket.socket, number: int, readings: Readings, parent: int, lasts: bool
) -> None:
    # A cluster signals every process of a job. The training process decides what to do; it needs its workers for that.
    for ignored in _IGNORED:
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    if lasts and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    readings.worker = number
    torch.set_num_threads(1)
    its.settimeout(5)
    while os.getppid() == parent:
        try:
            task = pickle.loads(its.recv(MESSAGE))
        except TimeoutError:
            continue
        try:
            result = load(task)
        except Exception as error:  # noqa: BLE001  # raised again in the main process
            its.send(_portable(error))
        else:
            hand_over(its, result)


def _portable(error: Exception) -> bytes:
    """Pickle an error with this process's traceback as its cause."""
    wrapped: Any = ExceptionWithTraceback(error, error.__traceback__)
    try:
        message = pickle.dumps(wrapped)
        pickle.loads(message)
    except Exception:  # noqa: BLE001  # of a type that needs other arguments than its message
        message = b""
    if 0 < len(message) < MESSAGE // 4:
        return message
    return pickle.dumps(RuntimeError(str(wrapped.tb)[-MESSAGE // 8 :]))


# Causes


def _death(worker: _Worker) -> WorkerError:
    worker.process.join(1)  # its socket is closed a moment before it can be joined
    status, name = worker.process.exitcode, f"worker {worker.process.pid}"
    if status is None or status >= 0:
        return worker.error(f"{name} ended with status {status}", suspect=True)
    number, crash = signal.Signals(-status), False
    if number == signal.SIGBUS and memory_is_full():
        return WorkerError(memory_cause())
    if number == signal.SIGKILL:
        cause = (
            f"{name} was killed ({number.name}), as the system does when memory runs out: lower DATA.NUM_WORKERS, or raise "
            "the memory limit of the job or container"
        )
    elif number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE):
        cause, crash = f"{name} crashed in native code ({number.name})", True
    else:
        cause = f"{name} was ended by {number.name}"
    return worker.error(cause, suspect=crash)


def _hang(worker: _Worker, limit_s: float) -> WorkerError:
    state = _state(worker.process.pid)
    known = {
        "T": "is stopped (SIGSTOP, or a debugger)",
        "t": "is stopped by a debugger",
        "D": "waits for a disk or a network file system",
    }
    found = f"worker {worker.process.pid} {known.get(state, 'does not answer')}"
    return worker.error(f"no batch within DATA.TIMEOUT_S {limit_s:g} s: {found}", suspect=state not in known)


def _state(pid: int | None) -> str:
    """Return Linux's letter for the state of a process, "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
