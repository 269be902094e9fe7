"""What a file of weights is and what it holds, by its content and never by its name. Nothing here writes.

A pickle is a program. octvideo.pickles follows its instructions as data: no name in a file leads to code that runs.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from octvideo import pickles, torch_file
from octvideo.claims import CONTENTS, BoundedFile
from octvideo.files import first_line
from octvideo.torch_file import DTYPES, TorchFileError
from octvideo.weights.coverage import WeightsError
from octvideo.weights.mxnet import GZIP_MAGIC, is_tar, read_params
from octvideo.weights.mxnet import MAGIC as MXNET_MAGIC

KINDS = "PyTorch (zip or older), safetensors, Caffe2 pickles of blobs, MXNet .params and tars of one"
_PICKLE = b"\x80"  # and the protocol, 2 or later

# where a training program puts the weights beside other things, first found first taken
_NESTS = ("model_state", "state_dict", "model")
_BOOKKEEPING = {"epoch", "step", "iteration", "iter", "arch", "cfg", "config", "args", "lr", "model_iter", "best_acc1"}

# what the modules that read pickles and arrays were seen to raise for damaged and hostile ones
_BROKEN = (pickle.UnpicklingError, AttributeError, EOFError, LookupError, OverflowError, TypeError, ValueError)


@dataclass(frozen=True)
class Source:
    """entries: what the file holds, under the names in the file; tensors on the CPU, NumPy arrays where kind is mxnet.

    kind: "octvideo" (a checkpoint of ours), "torch", "caffe2" or "mxnet".
    """

    kind: str
    entries: Mapping[str, Any]


def read(path: Path) -> Source:
    """Read a file of weights. Raises WeightsError for what is none, is damaged or holds anything but weights.

    Every size that a file claims is compared with the bytes that it has, before memory is allocated for it.
    """
    head = _head(path)
    try:
        return _read(path, head)
    except OSError as error:
        raise WeightsError(f"{path}: could not be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise WeightsError(f"{path}: not enough memory to read it ({error or 'no details'})") from error


def _read(path: Path, head: bytes) -> Source:
    if head.startswith((MXNET_MAGIC, GZIP_MAGIC)) or is_tar(head):
        return Source("mxnet", read_params(path))
    if head.startswith((torch_file.ZIP_MAGIC, torch_file.LEGACY_MAGIC)):
        return _read_torch(path)
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header < path.stat().st_size:  # a JSON header and its length
        return Source("torch", _without_module(_tensors(_read_safetensors(path, header), path)))
    if head.startswith(_PICKLE):
        return Source("caffe2", _read_caffe2(path))
    begins = f"begins with {head[:16]!r}" if head else "is empty"
    raise WeightsError(f"{path}: no weights; it {begins}. Files that are read: {KINDS}")


def _head(path: Path) -> bytes:
    if not path.exists():
        raise WeightsError(f"{path}: no such file")
    if not path.is_file():
        raise WeightsError(f"{path}: a folder or a device; name a file of weights. Files that are read: {KINDS}")
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise WeightsError(f"{path}: could not be read ({error.strerror})") from error


def _read_torch(path: Path) -> Source:
    try:
        content = torch_file.read(path)
    except TorchFileError as error:
        raise WeightsError(
            f"{path}: not a whole PyTorch file of tensors and plain values ({error}); if it holds more, save its state "
            "dict alone"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}; a state dict is read")
    if "format" in content and isinstance(content.get("model"), dict):
        return Source("octvideo", _tensors(content["model"], path))
    nested = next((content[key] for key in _NESTS if isinstance(content.get(key), dict)), content)
    return Source("torch", _without_module(_tensors(nested, path)))


def _read_safetensors(path: Path, header: int) -> dict[str, Tensor]:
    """header: its bytes. The reader compares the sizes in it with those of the file."""
    if header > CONTENTS:
        raise WeightsError(f"{path}: a header of {header} bytes; at most {CONTENTS} are read")
    try:
        return load_file(path)
    except (SafetensorError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({first_line(error)})") from error


def _tensors(entries: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Without bookkeeping. Raises WeightsError for anything else that is no tensor under a name."""
    kept = {name: value for name, value in entries.items() if name not in _BOOKKEEPING}
    strange = [name for name, value in kept.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if strange or not kept:
        what = f"{strange[0]!r} is a {type(kept[strange[0]]).__name__}" if strange else "it has no entries"
        raise WeightsError(f"{path}: not a state dict: {what}; tensors are read, alone or under {', '.join(_NESTS)}")
    for name, value in kept.items():
        if value.dtype not in DTYPES:
            raise WeightsError(f"{path}: {name} is of {value.dtype}; floats, integers and booleans are read")
    return kept


def _without_module(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that DataParallel and DistributedDataParallel put before every name."""
    if all(name.startswith("module.") for name in entries):
        return {name.removeprefix("module."): value for name, value in entries.items()}
    return entries


@dataclass(frozen=True)
class _Global:
    """A name that a pickle may call."""

    name: str


@dataclass(eq=False, slots=True)
class _Call:
    """What a pickle would have called, with what, and the state it would have set."""

    name: str
    args: tuple[Any, ...]
    state: Any = None


_ARRAYS = ("numpy.core.multiarray", "numpy._core.multiarray")
_NAMES = {(module, name): name for module in _ARRAYS for name in ("_reconstruct", "scalar")}
_NAMES |= {("numpy", "ndarray"): "ndarray", ("numpy", "dtype"): "dtype", ("_codecs", "encode"): "encode"}
_NAMES |= {("__builtin__", "bytes"): "bytes", ("collections", "OrderedDict"): "OrderedDict"}

_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
_MAX_DIMS, _MAX_SIZE = 32, 1 << 31
_OBJECTS = 48 << 20  # bytes that names and shapes may take in memory, besides twice the file's size for the arrays


class _Notes:
    """Each call in a pickle is noted instead of made."""

    def find(self, module: str, name: str) -> _Global:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; only NumPy arrays are read")
        return _Global(_NAMES[module, name])

    def call(self, function: Any, args: tuple[Any, ...]) -> _Call | dict[str, Any]:
        if not isinstance(function, _Global):
            raise pickle.UnpicklingError(f"it calls a {type(function).__name__}")
        return {} if function.name == "OrderedDict" and not args else _Call(function.name, args)

    def build(self, value: Any, state: Any) -> None:
        if not isinstance(value, _Call):
            raise pickle.UnpicklingError(f"it sets attributes of a {type(value).__name__}")
        value.state = state

    def load(self, identity: Any) -> Any:
        raise pickle.UnpicklingError("it uses BINPERSID, which no arrays need")


def _read_caffe2(path: Path) -> dict[str, Tensor]:
    try:
        with BoundedFile(path) as file:
            top = _dict(pickles.load(file, _Notes(), _OBJECTS + 2 * file.size))
            return _blobs(_dict(top.get("blobs")), budget=file.size)
    except _BROKEN as error:
        raise WeightsError(
            f"{path}: not a whole Caffe2 pickle {{'blobs': {{name: array}}}} ({first_line(error)})"
        ) from error


def _dict(value: Any) -> dict[str, Any]:
    if isinstance(value, _Call) and value.name == "OrderedDict":  # Python 2 gives it its items in one list
        pairs, value = value.args[0], {}
        for key, item in pairs:
            pickles.update(value, [key], [item])
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} where a dict is expected")
    return value


def _blobs(blobs: Mapping[str, Any], budget: int) -> dict[str, Tensor]:
    """budget: bytes that all arrays together may have; one that stands in the file once may be asked for often."""
    tensors = {}
    for name, value in blobs.items():
        if name in _BOOKKEEPING and not isinstance(value, _Call):
            continue
        if not isinstance(name, str):
            raise ValueError(f"{name} where the name of an array should be")
        array = _array(value, name)
        budget -= array.nbytes
        if budget < 0:
            raise ValueError("arrays of more bytes than the file has")
        tensors[name] = torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
    return tensors


def _array(call: Any, name: str) -> np.ndarray:
    """The array that NumPy would have made, if its bytes are there. A view of them."""
    shape: Any
    if isinstance(call, _Call) and call.name == "scalar":
        (dtype, content), shape, fortran = call.args, (), False
    elif isinstance(call, _Call) and call.name == "_reconstruct" and isinstance(call.state, tuple):
        _, shape, dtype, fortran, content = call.state
    else:
        raise ValueError(f"{name} is a {type(call).__name__.lstrip('_')}, not an array")
    dtype, content = _dtype(dtype, name), _bytes(content, name)
    if not isinstance(shape, tuple) or not all(isinstance(size, int) and 0 <= size <= _MAX_SIZE for size in shape):
        raise ValueError(f"{name} is of an impossible shape")
    if len(shape) > _MAX_DIMS or math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"{name} is of shape {shape} and dtype {dtype} in {len(content)} bytes")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _dtype(call: Any, name: str) -> np.dtype:
    if isinstance(call, _Call) and call.name == "dtype" and call.args:
        code, order = call.args[0], call.state[1] if call.state else "="
        if isinstance(code, str) and code in _DTYPES and isinstance(order, str) and order in ("<", ">", "=", "|"):
            return np.dtype(code).newbyteorder(order)  # type: ignore[arg-type]
    raise ValueError(f"{name} is not of numbers; dtypes that are read: {', '.join(_DTYPES)}")


def _bytes(content: Any, name: str) -> bytes:
    if isinstance(content, _Call) and content.name in ("encode", "bytes"):  # Python 3 writes them so for Python 2
        content = content.args[0] if content.args else b""
    if isinstance(content, str):
        return content.encode("latin1")
    if not isinstance(content, bytes):
        raise ValueError(f"{name} has a {type(content).__name__} where its bytes should be")
    return content
