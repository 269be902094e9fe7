"""Files as others write them: MXNet .params in every version, and Python 2's pickles."""

import struct
from collections.abc import Sequence

import numpy as np

MAGICS = {1: 0xF993FAC8, 2: 0xF993FAC9, 3: 0xF993FACA}
CODES = {
    "float32": 0,
    "float64": 1,
    "float16": 2,
    "uint8": 3,
    "int32": 4,
    "int8": 5,
    "int64": 6,
    "bool": 7,
    "int16": 8,
    "uint16": 9,
    "uint32": 10,
    "uint64": 11,
}
BFLOAT16 = 12


def record(array: np.ndarray, version: int = 2, code: int | None = None) -> bytes:
    """One array of a .params file. version 0 has no magic number; code replaces the dtype's own."""
    head = b"" if version == 0 else struct.pack("<I", MAGICS[version])
    if version >= 2:
        head += struct.pack("<i", 0)
    head += struct.pack("<I", array.ndim)
    head += b"".join(struct.pack("<I" if version == 0 else "<q", size) for size in array.shape)
    if array.ndim == 0 and version < 3:
        return head
    head += struct.pack("<iii", 1, 0, CODES[array.dtype.name] if code is None else code)
    return head + np.ascontiguousarray(array).tobytes()


def params(records: Sequence[bytes], names: Sequence[str | bytes] = ()) -> bytes:
    """A .params file of these arrays."""
    content = struct.pack("<QQQ", 0x112, 0, len(records)) + b"".join(records) + struct.pack("<Q", len(names))
    for name in names:
        raw = name.encode() if isinstance(name, str) else name
        content += struct.pack("<Q", len(raw)) + raw
    return content


def named_params(entries: dict[str, np.ndarray], version: int = 2) -> bytes:
    return params([record(array, version) for array in entries.values()], list(entries))


def python2_pickle(blobs: dict[str, np.ndarray]) -> bytes:
    """{'blobs': blobs} in the instructions that Python 2.7's cPickle gives for protocol 2."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    content = b"\x80\x02}" + text(b"blobs") + b"}("
    for name, array in blobs.items():
        shape = b"(" + b"".join(map(number, array.shape)) + b"t"
        dtype = b"cnumpy\ndtype\n" + text(array.dtype.str[1:].encode()) + number(0) + number(1) + b"\x87R"
        dtype += b"(" + number(3) + text(b"<") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
        content += text(name.encode())
        content += (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
        )
        content += b"(" + number(1) + shape + dtype + b"\x89" + text(array.tobytes()) + b"tb"
    return content + b"us."
