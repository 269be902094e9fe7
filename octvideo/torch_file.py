"""What torch.save wrote, zip or older, read without running anything in it: tensors on the CPU and plain values.

torch.load with weights_only runs nothing either, but it allocates whatever a file claims: bytes of a bytearray, values of a
storage, a tensor larger than its storage. Here a size is compared with the bytes of the file first.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octvideo import pickles
from octvideo.claims import BLOCK, BoundedFile, ClaimError, StoredZip

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # pickle of the number 0x1950a86a20f9469cfc6c
_OBJECTS = 48 << 20  # bytes that names, numbers and tensors without their values may take, besides half the file's size
_PICKLE = (
    8 << 20
)  # bytes that may describe them, besides a quarter of the file's size; text takes 4 times as much in memory
_MAX_DIMS, _MAX_SIZE = 64, 1 << 40

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Floats, integers and booleans; complex and quantized values are not weights of these networks.
DTYPES = (*_STORAGES.values(), torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


class TorchFileError(ValueError):
    """A file that is damaged, claims more than it holds, or holds more than tensors and plain values: the text says why."""


class _Storage(NamedTuple):
    """dtype: of its values; None if each tensor has its dtype."""

    memory: torch.UntypedStorage
    dtype: torch.dtype | None


def read(path: Path) -> Any:
    """Return the content of a file of torch.save: tensors, numbers, text, bytes, lists, tuples and dicts of them.

    Parameters become tensors. Errors: TorchFileError; OSError if the file cannot be read; MemoryError if the tensors that
    it holds do not fit into memory.
    """
    with path.open("rb") as file:
        zipped = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    try:
        return _read_zip(path) if zipped else _read_legacy(path)
    except (ValueError, EOFError, LookupError, TypeError, RuntimeError, OverflowError, pickle.UnpicklingError) as error:
        raise TorchFileError(str(error).strip().split("\n")[0][:200] or type(error).__name__) from error


def _read_zip(path: Path) -> Any:
    with StoredZip(path) as archive:
        folders = [name.removesuffix("data.pkl") for name in archive.sizes if name.count("/") == 1]
        folders = [name for name in folders if name.endswith("/")]
        if len(folders) != 1:
            raise ClaimError(f"{len(folders)} members FOLDER/data.pkl; a file of torch.save has one")
        if f"{folders[0]}byteorder" in archive.sizes and archive.read(f"{folders[0]}byteorder") != b"little":
            raise ClaimError("its numbers are big-endian; little-endian ones are read")

        def storage_of(key: str, size: int) -> torch.UntypedStorage:
            name = f"{folders[0]}data/{key}"
            if archive.sizes.get(name) != size:
                raise ClaimError(f"storage {key} of {size} bytes, where {name} has {archive.sizes.get(name, 'none')}")
            storage = _allocated(size)
            archive.read_into(name, _bytes_of(storage))
            return storage

        name = f"{folders[0]}data.pkl"
        if archive.sizes[name] > _PICKLE + archive.size // 4:
            raise ClaimError(f"{name} has {archive.sizes[name]} bytes of {archive.size}; the most should be tensors")
        return pickles.load(BytesIO(archive.read(name)), _TorchObjects(storage_of), _OBJECTS + archive.size // 2)


def _read_legacy(path: Path) -> Any:
    """Pickles one after the other: a magic number, a version, facts, the content, keys of storages; then their bytes."""
    with BoundedFile(path) as file:
        file.limit = _PICKLE + file.size // 4
        storages: dict[str, torch.UntypedStorage] = {}
        left, budget = file.size, _OBJECTS + file.size // 2

        def storage_of(key: str, size: int) -> torch.UntypedStorage:
            nonlocal left
            left -= size
            if left < 0:
                raise ClaimError(f"storages up to {key} of {file.size - left} bytes in a file of {file.size}")
            return storages.setdefault(key, _allocated(size))

        objects = _TorchObjects(storage_of)
        if file.read(len(LEGACY_MAGIC)) != LEGACY_MAGIC:
            raise ClaimError("it does not begin as a file of torch.save")
        version, facts, content, keys = (pickles.load(file, objects, budget) for _ in range(4))
        if version != 1001 or not isinstance(facts, dict) or facts.get("little_endian") is not True:
            raise ClaimError("it is of an unknown version, or its numbers are big-endian")
        if (
            not isinstance(keys, list)
            or not all(isinstance(key, str) for key in keys)
            or sorted(keys) != sorted(storages)
        ):
            raise ClaimError("its list of storages is not that of its tensors")
        for key in keys:
            _fill(file, key, storages[key], objects.item_size(key))
        return content


def _fill(file: BoundedFile, key: str, storage: torch.UntypedStorage, item_size: int) -> None:
    count, target = int.from_bytes(file.read(8), "little", signed=True), _bytes_of(storage)
    if count * item_size != len(target):
        raise ClaimError(f"storage {key} of {count} values in one place and {len(target) // item_size} in another")
    for start in range(0, len(target), BLOCK):
        part = target[start : start + BLOCK]
        part[:] = file.read(len(part))


def _allocated(size: int) -> torch.UntypedStorage:
    """Return memory for `size` bytes, which the file has."""
    try:
        return torch.UntypedStorage(size)
    except RuntimeError as error:
        raise MemoryError(f"{size} bytes for weights") from error


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data


class _TorchObjects:
    """The names, calls and storages of the pickle in a file of torch.save.

    storage_of: key, bytes -> memory of this size, which the file has.
    """

    def __init__(self, storage_of: Callable[[str, int], torch.UntypedStorage]) -> None:
        self.storage_of = storage_of
        self.storages: dict[str, _Storage] = {}

    def item_size(self, key: str) -> int:
        """Return the bytes of a value."""
        return (self.storages[key].dtype or torch.uint8).itemsize

    def find(self, module: str, name: str) -> Any:
        if (module, name) in _CALLS:
            return _CALLS[module, name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return torch.UntypedStorage
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; tensors and plain values are read")

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        if not isinstance(function, FunctionType):  # the only functions that `find` gives are those of _CALLS
            raise pickle.UnpicklingError(f"it calls a {type(function).__name__}")
        return function(*args)

    def build(self, value: Any, state: Any) -> None:
        """Keep the versions of modules that a state dict carries as an attribute."""
        if not isinstance(value, OrderedDict) or not isinstance(state, dict):
            raise pickle.UnpicklingError(f"it sets attributes of a {type(value).__name__}")
        metadata = state.get("_metadata", {})
        if not isinstance(metadata, dict) or not all(isinstance(versions, dict) for versions in metadata.values()):
            raise pickle.UnpicklingError("the versions of its modules are not dicts")
        value._metadata = metadata  # type: ignore[attr-defined]

    def load(self, identity: Any) -> _Storage:
        match identity:
            case ("storage", kind, str() as key, str(), int() as count, *view):
                dtype = kind if isinstance(kind, torch.dtype) else None
            case _:
                raise pickle.UnpicklingError("it asks for a storage in an unknown way")
        if dtype is None and kind is not torch.UntypedStorage:
            raise pickle.UnpicklingError(f"storage {key} of an unknown type")
        size = count * (dtype or torch.uint8).itemsize
        if count < 0 or len(view) > 1 or (view and view[0] is not None):
            raise pickle.UnpicklingError(f"storage {key} of {count} values, or a view of another storage")
        if key not in self.storages:
            self.storages[key] = _Storage(self.storage_of(key, size), dtype)
        if self.storages[key].memory.nbytes() != size:
            raise pickle.UnpicklingError(f"storage {key} of {size} bytes and of {self.storages[key].memory.nbytes()}")
        return _Storage(self.storages[key].memory, dtype)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """torch._utils._rebuild_tensor and _v2. rest: requires_grad, hooks, and metadata (of conjugates), which is refused."""
    if not isinstance(storage, _Storage) or storage.dtype is None or any(rest[2:]):
        raise pickle.UnpicklingError("a tensor without a storage of numbers, or with attributes")
    return _view(storage.memory, storage.dtype, offset, size, stride)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Tensor:
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype) or any(rest):
        raise pickle.UnpicklingError("a tensor without a storage or a dtype, or with attributes")
    return _view(storage.memory, dtype, offset, size, stride)


def _view(memory: torch.UntypedStorage, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> Tensor:
    """Return the tensor if the storage holds each of its values. More values than those of the storage are an expansion."""
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= _MAX_DIMS):
        raise pickle.UnpicklingError("a tensor whose size and stride are not two tuples of one length")
    if not all(isinstance(n, int) and 0 <= n <= _MAX_SIZE for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError(f"a tensor with a size, stride or offset that is not a number in 0..{_MAX_SIZE}")
    count, values, last = memory.nbytes() // dtype.itemsize, 1, offset
    for n, step in zip(size, stride, strict=True):
        values, last = values * n, last + (n - 1) * step
    if values > count or (values and last >= count) or offset > count:
        raise pickle.UnpicklingError(
            f"a tensor of size {size}, stride {stride} and offset {offset} in a storage of {count} values"
        )
    return torch.empty(0, dtype=dtype).set_(memory, offset, size, stride)


def _parameter(data: Any, *rest: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise pickle.UnpicklingError(f"a parameter of a {type(data).__name__}")
    return data


def _ordered_dict(pairs: Any = ()) -> OrderedDict[Any, Any]:
    """Python 2 wrote the items as a list of pairs."""
    result: OrderedDict[Any, Any] = OrderedDict()
    for key, value in pairs:
        pickles.update(result, [key], [value])
    return result


def _size(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, tuple) or not all(isinstance(size, int) for size in sizes):
        raise pickle.UnpicklingError("a torch.Size that is not of numbers")
    return sizes


def _device(kind: Any, index: Any = None) -> str:
    if not isinstance(kind, str) or not isinstance(index, int | None):
        raise pickle.UnpicklingError("a torch.device that is not a name and a number")
    return kind if index is None else f"{kind}:{index}"


def _encoded(text: Any, encoding: Any) -> bytes:
    """Protocol 2 has no bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes in an unknown encoding")
    return text.encode("latin1")


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("_codecs", "encode"): _encoded,
}
