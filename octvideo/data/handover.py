"""Batches handed over from a worker process to the program, in shared memory.

A batch is in a file in shared memory that has no name. Its descriptor is sent with the message, so the program copies
nothing, and a process that is killed leaves nothing in the file system.
"""

from __future__ import annotations

import errno
import io
import itertools
import mmap
import os
import pickle
import resource
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MESSAGE = 1 << 18  # bytes, the most that a datagram has
_SHARED = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


class WorkerError(Exception):
    """A worker that died, hangs or cannot hand over its batch; the message says why, and which file it was reading."""


def hand_over(its: socket.socket, result: Any) -> None:
    """Send a result through a socket; if that is not possible, a WorkerError in its place."""
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
        its.send(pickle.dumps(WorkerError(_cause(error, size))))


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


def _layout(lengths: Sequence[int]) -> tuple[list[slice], int]:
    """Return where buffers of these lengths are in a file, each at a multiple of 64 bytes, and the size of the file."""
    ends = list(itertools.accumulate(-(-length // 64) * 64 for length in lengths))
    starts = [0, *ends[:-1]]
    return [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)], ends[-1]


def taken_over(message: bytes, descriptors: Sequence[int]) -> Any:
    """Return the result, or exception, that a worker has sent; the tensors are in the shared memory."""
    answer = pickle.loads(message)
    if isinstance(answer, Exception):
        return answer
    places, size = _layout(answer)
    try:
        if not descriptors:  # the kernel drops a descriptor that this process has no room for
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        memory = memoryview(mmap.mmap(descriptors[0], size))
    except OSError as error:
        raise WorkerError(_cause(error, size)) from error
    content, *buffers = (memory[place] for place in places)
    return pickle.loads(content, buffers=buffers)


# Causes


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


def memory_cause(size: int = 0) -> str:
    """Return the message for a shared memory without room. size: of the batch in bytes, if it is known."""
    total, free = (value / 1e6 for value in _space())
    needs = f", and a batch needs {size / 1e6:.1f} MB" if size else ""
    return (
        f"shared memory is full ({total:.0f} MB at {_SHARED}, {free:.1f} MB free{needs}): give it more (docker run "
        "--shm-size), or lower DATA.NUM_WORKERS"
    )


def memory_is_full() -> bool:
    return _space()[1] < 1e6


def _space() -> tuple[int, int]:
    """Return the bytes of the shared memory in total and the free ones."""
    state = os.statvfs(_SHARED)
    return state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize


def _cause(error: OSError, size: int) -> str:
    if no_descriptors(error):
        return descriptors_cause()
    if error.errno == errno.ENOSPC:
        return memory_cause(size)
    return f"a batch of {size / 1e6:.1f} MB cannot be placed in shared memory at {_SHARED} ({error.strerror})"
