"""What a file of weights is and what it holds, by its content and never by its name. Nothing here writes.

A pickle is a program. PyTorch's are opened by torch.load with weights_only. Of Caffe2's the instructions are read here,
and a call is noted instead of made: no name in the file stands for anything that could run.
"""

from __future__ import annotations

import lzma
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from octvideo.weights.coverage import WeightsError
from octvideo.weights.mxnet import GZIP_MAGIC, is_tar, read_params
from octvideo.weights.mxnet import MAGIC as MXNET_MAGIC

KINDS = "PyTorch (zip or older), safetensors, Caffe2 pickles of blobs, MXNet .params and tars of one"
_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # pickle of the magic number 0x1950a86a20f9469cfc6c
_PICKLE = b"\x80"  # and the protocol, 2 or later

# where a training program puts the weights beside other things, first found first taken
_NESTS = ("model_state", "state_dict", "model")
_BOOKKEEPING = {"epoch", "step", "iteration", "iter", "arch", "cfg", "config", "args", "lr", "model_iter", "best_acc1"}

# all that a damaged or hostile pickle was seen to raise; the modules promise no common base
_BROKEN = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Source:
    """entries: what the file holds, under the names in the file; tensors on the CPU, NumPy arrays where kind is mxnet.

    kind: "octvideo" (a checkpoint of ours), "torch", "caffe2" or "mxnet".
    """

    kind: str
    entries: Mapping[str, Any]


def read(path: Path) -> Source:
    """Read a file of weights. Raises WeightsError for what is none, is damaged or holds anything but weights."""
    head = _head(path)
    if head.startswith((MXNET_MAGIC, GZIP_MAGIC)) or is_tar(head):
        return Source("mxnet", read_params(path))
    if head.startswith((_ZIP_MAGIC, _LEGACY_TORCH)):
        return _read_torch(path, zipped=head.startswith(_ZIP_MAGIC))
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:  # a JSON header and its length
        return Source("torch", _without_module(_read_safetensors(path)))
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


def _read_torch(path: Path, zipped: bool) -> Source:
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:  # torch.load itself compares no checksums
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"the checksum of {damaged} does not agree")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN as error:
        raise WeightsError(
            f"{path}: not a whole PyTorch file of tensors and plain values ({_first_line(error)}); if it holds more, save "
            "its state dict alone"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}; a state dict is read")
    if "format" in content and isinstance(content.get("model"), dict):
        return Source("octvideo", _tensors(content["model"], path))
    nested = next((content[key] for key in _NESTS if isinstance(content.get(key), dict)), content)
    return Source("torch", _without_module(_tensors(nested, path)))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({_first_line(error)})") from error


def _tensors(entries: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Without bookkeeping. Raises WeightsError for anything else that is no tensor under a name."""
    kept = {name: value for name, value in entries.items() if name not in _BOOKKEEPING}
    strange = [name for name, value in kept.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if strange or not kept:
        what = f"{strange[0]!r} is a {type(kept[strange[0]]).__name__}" if strange else "it has no entries"
        raise WeightsError(f"{path}: not a state dict: {what}; tensors are read, alone or under {', '.join(_NESTS)}")
    return kept


def _without_module(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that DataParallel and DistributedDataParallel put before every name."""
    if all(name.startswith("module.") for name in entries):
        return {name.removeprefix("module."): value for name, value in entries.items()}
    return entries


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


@dataclass(frozen=True)
class _Global:
    """A name that a pickle may call."""

    name: str


@dataclass(eq=False)
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

_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING"}
_LITERALS |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}


def _read_caffe2(path: Path) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
        top = _dict(_unpickle(content))
        return _blobs(_dict(top.get("blobs")), budget=len(content))
    except _BROKEN as error:
        raise WeightsError(
            f"{path}: not a whole Caffe2 pickle {{'blobs': {{name: array}}}} ({_first_line(error)})"
        ) from error


def _unpickle(content: bytes) -> Any:
    """What a pickle describes, of dicts, lists, tuples, plain values and `_Call`s.

    pickle.Unpickler with a find_class of its own would not do: it reserves memory for sizes that a file merely claims,
    and hashes keys nested deep enough to overflow the C stack. Here pickletools reads the instructions, of which those
    for arrays in dicts are followed, and bytes of Python 2 strings become characters (latin1).
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    argument: Any

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(content):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            case name if name in _LITERALS:
                stack.append(argument)
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                value = stack.pop()
                _list(stack[-1]).append(value)
            case "APPENDS":
                values = since_mark()
                _list(stack[-1]).extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _update(stack[-1], [key], [value])
            case "SETITEMS":
                values = since_mark()
                _update(stack[-1], values[::2], values[1::2])
            case "GLOBAL":
                stack.append(_global(*str(argument).split(" ", 1)))
            case "STACK_GLOBAL":
                name = stack.pop()
                stack.append(_global(stack.pop(), name))
            case "REDUCE":
                args = stack.pop()
                stack.append(_called(stack.pop(), args))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case name:
                raise pickle.UnpicklingError(f"it uses {name}, which no arrays need")


def _global(module: Any, name: Any) -> _Global:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise pickle.UnpicklingError("it asks for what is no name")
    if (module, name) not in _NAMES:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; only NumPy arrays are read")
    return _Global(_NAMES[module, name])


def _called(function: Any, args: Any) -> _Call | dict[str, Any]:
    if not isinstance(function, _Global) or not isinstance(args, tuple):
        raise pickle.UnpicklingError(f"it calls a {type(function).__name__}")
    return {} if function.name == "OrderedDict" and not args else _Call(function.name, args)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise pickle.UnpicklingError(f"a {type(value).__name__} where a list is expected")
    return value


def _update(target: Any, keys: Sequence[Any], values: Sequence[Any]) -> None:
    if not isinstance(target, dict) or not all(isinstance(key, str) for key in keys):
        raise pickle.UnpicklingError("items for what is no dict, or under what are no names")
    target.update(zip(keys, values, strict=True))


def _dict(value: Any) -> dict[str, Any]:
    if isinstance(value, _Call) and value.name == "OrderedDict":  # Python 2 gives it its items in one list
        pairs, value = _list(value.args[0]), {}
        for key, item in pairs:
            _update(value, [key], [item])
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} where a dict is expected")
    return value


def _blobs(blobs: Mapping[str, Any], budget: int) -> dict[str, Tensor]:
    """budget: bytes that all arrays together may have; one that stands in the file once may be asked for often."""
    tensors = {}
    for name, value in blobs.items():
        if name in _BOOKKEEPING and not isinstance(value, _Call):
            continue
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
