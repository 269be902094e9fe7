"""Worker processes that load batches. Whatever happens to a worker, the program waits for it no longer than it wants to.

Each worker has its own socket, and a message is one datagram: it arrives completely or not at all, at whatever moment its
sender is stopped or killed. A batch is in a file in shared memory that has no name; its descriptor is sent with the message,
so nothing is copied on arrival and nothing is left behind by a process that is killed.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import io
import itertools
import mmap
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, util
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from multiprocessing.process import BaseProcess, _children  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

AHEAD = 2  # tasks that a worker has at once: the one it works on, and the next
POLL_S = 0.2
_SHARED = Path("/dev/shm") if Path("/dev/shm").is_dir() else None  # None: the system's folder for temporary files
_IGNORED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
_MESSAGE = 1 << 18  # bytes, the most that a datagram has
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class WorkerError(Exception):
    """A worker that died, hangs or cannot hand over its batch; the message says why.

    worker: its number, None if the reason is not in a single worker. suspects_file: the file that it was reading may be the
    cause.
    """

    def __init__(self, cause: str, worker: int | None = None, *, suspects_file: bool = False) -> None:
        super().__init__(cause)
        self.worker, self.suspects_file = worker, suspects_file


class Readings:
    """Which entry each worker is reading, since when, in memory that all processes share."""

    def __init__(self, workers: int) -> None:
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

    def of(self, worker: int) -> tuple[int, float] | None:
        """Return the entry that a worker is reading and for how many seconds, None if it reads none."""
        entry = int(self._shared[2 * worker])
        return (entry, time.monotonic() - self._shared[2 * worker + 1]) if entry >= 0 else None


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    socket: socket.socket
    unanswered: int = 0


class Workers:
    """`count` processes that compute load(task) and return the results in the order of the tasks.

    They end with this object, with the program, and with the process if it is killed.
    """

    def __init__(self, load: Callable[[Any], Any], count: int, readings: Readings) -> None:
        """Raises WorkerError if the system cannot start so many."""
        self.workers: list[_Worker] = []
        # Before multiprocessing ends its processes at exit: it would wait for these forever, since they ignore SIGTERM.
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
        started, sentinels = time.monotonic(), {worker.process.sentinel: worker for worker in self.workers}
        while True:
            ready = connection.wait([worker.socket, *sentinels], POLL_S)
            for sentinel in ready:
                if isinstance(sentinel, int):
                    raise _death(sentinels[sentinel])
            if ready:
                break
            poll()
            if limit_s and time.monotonic() - started > limit_s:
                raise _hang(worker, limit_s)
        message, descriptors, _, _ = socket.recv_fds(worker.socket, _MESSAGE, 1)
        worker.unanswered -= 1
        try:
            return None if drop else _result(pickle.loads(message), descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def _start(load: Callable[[Any], Any], number: int, readings: Readings) -> _Worker:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in (ours, its):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE)
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
    return _Worker(number, process, ours)


def _kill(workers: list[_Worker]) -> None:
    """Kill these processes; wait at most 5 s for the system to end them."""
    for worker in workers:
        worker.process.kill()
    end = time.monotonic() + 5
    for worker in workers:
        worker.process.join(max(end - time.monotonic(), 0))
        worker.socket.close()
        _children.discard(
            worker.process
        )  # at exit, multiprocessing would wait without a limit for one that cannot be ended
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
            task = pickle.loads(its.recv(_MESSAGE))
        except TimeoutError:
            continue
        try:
            result = load(task)
        except Exception as error:  # noqa: BLE001  # raised again in the main process
            its.send(_portable(error))
        else:
            _hand_over(its, result)


def _portable(error: Exception) -> bytes:
    """Pickle an error with this process's traceback as its cause."""
    wrapped: Any = ExceptionWithTraceback(error, error.__traceback__)
    try:
        message = pickle.dumps(wrapped)
        pickle.loads(message)
    except Exception:  # noqa: BLE001  # of a type that needs other arguments than its message
        message = b""
    if 0 < len(message) < _MESSAGE // 4:
        return message
    return pickle.dumps(RuntimeError(str(wrapped.tb)[-_MESSAGE // 8 :]))


def _hand_over(its: socket.socket, result: Any) -> None:
    size = 0
    try:
        buffers = _pickled(result)
        lengths = [len(buffer) for buffer in buffers]
        places, size = _layout(lengths)
        with tempfile.TemporaryFile(dir=_SHARED, buffering=0) as file:
            _reserve(file.fileno(), size)
            with mmap.mmap(file.fileno(), size) as memory:
                for place, buffer in zip(places, buffers, strict=True):
                    memory[place] = buffer
            socket.send_fds(its, [pickle.dumps(lengths)], [file.fileno()])
    except OSError as error:
        cause = descriptors_cause() if no_descriptors(error) else _memory_cause(error, size)
        its.send(pickle.dumps(WorkerError(cause)))


def _reserve(descriptor: int, size: int) -> None:
    """Make a file of `size` bytes. If there is no room for them, that is an error now and not SIGBUS later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS
        os.ftruncate(descriptor, size)


class _Pickler(pickle.Pickler):
    """Tensors as arrays, whose content is left to the caller (buffer_callback)."""

    def reducer_override(self, value: Any) -> Any:
        return (_tensor, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)


def _pickled(result: Any) -> list[memoryview]:
    """Return a result without the content of its tensors, and the content of each of them."""
    stream, contents = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(stream, protocol=5, buffer_callback=contents.append).dump(result)
    return [stream.getbuffer(), *(content.raw() for content in contents)]


# In the program


def _layout(lengths: Sequence[int]) -> tuple[list[slice], int]:
    """Return where buffers of these lengths are in a file, each at a multiple of 64 bytes, and the size of the file."""
    ends = list(itertools.accumulate(-(-length // 64) * 64 for length in lengths))
    starts = [0, *ends[:-1]]
    return [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)], ends[-1]


def _result(answer: Any, descriptors: Sequence[int]) -> Any:
    """Return the result that a worker has handed over, its tensors in the shared memory."""
    if isinstance(answer, Exception):
        return answer
    places, size = _layout(answer)
    try:
        if not descriptors:  # the kernel drops a descriptor that this process has no room for
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        memory = memoryview(mmap.mmap(descriptors[0], size))
    except OSError as error:
        raise WorkerError(descriptors_cause() if no_descriptors(error) else _memory_cause(error, size)) from error
    content, *buffers = (memory[place] for place in places)
    return pickle.loads(content, buffers=buffers)


# Causes


def _death(worker: _Worker) -> WorkerError:
    worker.process.join(1)  # its socket is closed a moment before it can be joined
    status, name = worker.process.exitcode, f"worker {worker.process.pid}"
    if status is None or status >= 0:
        return WorkerError(f"{name} ended with status {status}", worker.number, suspects_file=True)
    number, crash = signal.Signals(-status), False
    if number == signal.SIGBUS and _SHARED and _space(_SHARED)[1] < 1e6:
        return WorkerError(f"{_full(_SHARED)}); {_FEWER}")
    if number == signal.SIGKILL:
        cause = (
            f"{name} was killed ({number.name}), as the system does when memory runs out: lower DATA.NUM_WORKERS, or raise "
            "the memory limit of the job or container"
        )
    elif number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE):
        cause, crash = f"{name} crashed in native code ({number.name})", True
    else:
        cause = f"{name} was ended by {number.name}"
    return WorkerError(cause, worker.number, suspects_file=crash)


def _hang(worker: _Worker, limit_s: float) -> WorkerError:
    state = _state(worker.process.pid)
    known = {
        "T": "is stopped (SIGSTOP, or a debugger)",
        "t": "is stopped by a debugger",
        "D": "waits for a disk or a network file system",
    }
    found = f"worker {worker.process.pid} {known.get(state, 'does not answer')}"
    return WorkerError(
        f"no batch within DATA.TIMEOUT_S {limit_s:g} s: {found}", worker.number, suspects_file=state not in known
    )


def _state(pid: int | None) -> str:
    """Return Linux's letter for the state of a process, "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def no_descriptors(error: OSError) -> bool:
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS)


def descriptors_cause() -> str:
    soft, hard = (
        "unlimited" if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return (
        f"too many open files (ulimit -n is {soft}, at most {hard} are allowed): raise it with ulimit -n, or lower "
        "DATA.NUM_WORKERS"
    )


_FEWER = "give it more (docker run --shm-size), or lower DATA.NUM_WORKERS"


def _memory_cause(error: OSError, size: int) -> str:
    folder = _SHARED or Path(tempfile.gettempdir())
    if error.errno == errno.ENOSPC:
        return f"{_full(folder)}, and a batch needs {size / 1e6:.1f} MB); {_FEWER}"
    return f"a batch of {size / 1e6:.1f} MB cannot be placed in shared memory at {folder} ({error.strerror})"


def _full(folder: Path) -> str:
    total, free = _space(folder)
    return f"shared memory is full ({total / 1e6:.0f} MB at {folder}, {free / 1e6:.1f} MB free"


def _space(folder: Path) -> tuple[int, int]:
    """Return the bytes in total and the free ones."""
    state = os.statvfs(folder)
    return state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize
