"""MXNet's .params files, read with NumPy alone, and the octave networks that were released in them.

Sources: MXNet 1.x's src/ndarray/ndarray.cc for the format; facebookresearch/OctConv's utils/symbol and utils/gluon for
the names. Their layers hold the four paths of a convolution apart; ours are one weight with the blocks

    [[high to high, low to high],
     [high to low,  low to low ]]
"""

from __future__ import annotations

import gzip
import io
import math
import re
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from octvideo.weights.coverage import Coverage, WeightsError, compare
from octvideo.weights.names import is_norm

MAGIC = struct.pack("<Q", 0x112)
GZIP_MAGIC = b"\x1f\x8b"
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_DTYPES = ("f4", "f8", "f2", "u1", "i4", "i1", "i8", "?", "i2", "u2", "u4", "u8", "u2")
_BFLOAT16 = 12
_MAX_DIMS = 32
_MAX_ARRAYS = 1 << 16
_MAX_RATIO = 10  # weights hardly compress; what does tenfold was made to fill a memory
_MAX_MEMBERS = 1000  # of a tar


def read_params(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .params file, or of the only one in a .tar or .tar.gz, under their names ("0", "1", ... without).

    bfloat16 comes as float32, everything else in its own dtype. Raises WeightsError, with the byte at which the file
    ceases to be MXNet's. Takes memory for what the file holds, not for what it claims.
    """
    try:
        content = path.read_bytes()
        if content.startswith(GZIP_MAGIC):
            content = _unpack(content, path)
        if is_tar(content):
            return _parse(*_only_params(content, path))
    except (OSError, EOFError, zlib.error) as error:
        raise WeightsError(f"{path}: could not be read ({error})") from error
    return _parse(content, str(path))


def is_tar(content: bytes) -> bool:
    return content[257:262] == b"ustar"


def _unpack(content: bytes, path: Path) -> bytes:
    limit = _MAX_RATIO * len(content) + (1 << 20)
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        unpacked = file.read(limit + 1)
    if len(unpacked) > limit:
        raise WeightsError(f"{path}: unpacks to more than {_MAX_RATIO} times its size, which no weights do")
    return unpacked


def _only_params(content: bytes, path: Path) -> tuple[bytes, str]:
    """The content of an archive's only .params member, and a name for messages. Nothing is put on the disk."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            members = list(islice(archive, _MAX_MEMBERS + 1))
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise WeightsError(f"{path}: not a whole archive ({error})") from error
    if len(members) > _MAX_MEMBERS:
        raise WeightsError(f"{path}: an archive of more than {_MAX_MEMBERS} members; pack the .params file alone")
    members = [member for member in members if _is_params(member.name)]
    found = ", ".join(repr(member.name) for member in members[:5]) or "none"
    if len(members) != 1:
        raise WeightsError(f"{path}: an archive is read if it holds one .params file; it holds {found}")
    member = members[0]
    # a sparse member claims bytes that the archive does not hold
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise WeightsError(f"{path}: {found} is not a regular file, such as a link; pack the file itself")
    return content[member.offset_data : member.offset_data + member.size], f"{path}:{member.name}"


def _is_params(name: str) -> bool:
    """macOS packs a "._name" with attributes beside every file."""
    return name.endswith(".params") and not PurePosixPath(name).name.startswith(".")


def _parse(content: bytes, source: str) -> dict[str, np.ndarray]:
    reader = _Reader(content, source)
    if not content.startswith(MAGIC):
        raise reader.error(f"it starts with {content[:8]!r}, not with {MAGIC!r}")
    reader.take(2 * len(MAGIC), "the header")
    arrays = [_array(reader) for _ in range(reader.count("arrays", smallest=4))]
    names = [_name(reader) for _ in range(reader.count("names", smallest=8))]
    if names and len(names) != len(arrays):
        raise reader.error(f"{len(names)} names for {len(arrays)} arrays")
    if reader.left:
        raise reader.error(f"{reader.left} bytes too many")
    if doubled := [name for name, times in Counter(names).items() if times > 1]:
        raise reader.error(f"several arrays are named {doubled[0]!r}")
    return dict(zip(names or map(str, range(len(arrays))), arrays, strict=True))


class _Reader:
    """Takes bytes from the front of a file and never more than there are."""

    def __init__(self, content: bytes, source: str) -> None:
        self.content, self.source, self.offset = memoryview(content), source, 0

    @property
    def left(self) -> int:
        return len(self.content) - self.offset

    def error(self, problem: str, at: int | None = None) -> WeightsError:
        offset = self.offset if at is None else at
        return WeightsError(f"{self.source}: not a whole MXNet .params file: at byte {offset}, {problem}")

    def take(self, size: int, what: str) -> memoryview:
        if size > self.left:
            raise self.error(f"{what} takes {size} bytes where {self.left} are left")
        self.offset += size
        return self.content[self.offset - size : self.offset]

    def number(self, kind: str, what: str) -> int:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}"), what))[0]

    def count(self, what: str, smallest: int) -> int:
        """How many follow, of at least `smallest` bytes each."""
        start, number = self.offset, self.number("Q", f"the number of {what}")
        if number > min(self.left // smallest, _MAX_ARRAYS):
            raise self.error(
                f"{number} {what} where {self.left} bytes are left (at most {_MAX_ARRAYS} are read)", start
            )
        return number


def _array(reader: _Reader) -> np.ndarray:
    start = reader.offset
    magic = reader.number("I", "an array")
    if magic in (_V2, _V3) and (storage := reader.number("i", "a storage type")):
        raise reader.error(f"an array of storage type {storage}, sparse; dense ones are read", start)
    if magic in (_V1, _V2, _V3):
        dims, size = reader.number("i", "a number of dimensions"), "q"
    else:
        dims, size = magic, "I"  # the oldest version has no magic number
    if not 0 <= dims <= _MAX_DIMS:
        raise reader.error(f"an array of {dims} dimensions; 0 to {_MAX_DIMS} are read", start)
    shape = tuple(reader.number(size, "a shape") for _ in range(dims))
    if not dims and magic != _V3:
        return np.empty(0, np.float32)
    reader.take(8, "a device")
    code = reader.number("i", "a dtype")
    if not 0 <= code < len(_DTYPES):
        raise reader.error(f"an array of dtype {code}; 0 to {len(_DTYPES) - 1} are read", start)
    return _values(reader, start, shape, code)


def _values(reader: _Reader, start: int, shape: tuple[int, ...], code: int) -> np.ndarray:
    # an array without values may still claim sizes that NumPy cannot hold
    if min(shape, default=0) < 0 or math.prod(max(size, 1) for size in shape) > max(reader.left, 1 << 31):
        raise reader.error(f"an array of shape {shape} where {reader.left} bytes are left", start)
    dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
    content = reader.take(math.prod(shape) * dtype.itemsize, f"an array of shape {shape}")
    if code == _BFLOAT16:  # the upper half of a float32
        values = (np.frombuffer(content, dtype).astype(np.uint32) << 16).view(np.float32)
    elif dtype.kind == "b":
        values = np.frombuffer(content, np.uint8) != 0
    else:
        values = np.frombuffer(content, dtype).astype(dtype.newbyteorder("="))
    return values.reshape(shape)


def _name(reader: _Reader) -> str:
    start = reader.offset
    content = bytes(reader.take(reader.number("Q", "the length of a name"), "a name"))
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise reader.error(f"the name {content[:40]!r} is not UTF-8", start) from None


Grid = tuple[tuple[str, ...], ...]
"""What tells the entries apart that make up one of ours: rows are outputs, high then low; columns are inputs."""

_WHOLE: Grid = (("",),)
_SYMBOL_PATHS: Grid = (("-h2h", "-l2h"), ("-h2l", "-l2l"))
_SYMBOL_VECTORS: Grid = (("-h",), ("-l",))
_GLUON_PATHS: Grid = ((".conv_h2h", ".conv_l2h"), (".conv_h2l", ".conv_l2l"))
_GLUON_VECTORS: Grid = ((".bn_h",), (".bn_l",))
_GLUON_SQUEEZE: Grid = (("_h",), ("_l",))

Place = tuple[str, Grid]
"""Where one of our entries stands in a file: a name with {} for what the grid says; "" where it is in one piece."""

_BLOCK = {f"{kind}{number}": (kind, f"{number}") for kind in ("conv", "bn") for number in (1, 2, 3)}
_BLOCK |= {"projection": ("conv", "4"), "projection_bn": ("bn", "4")}
_INPUT_NORMS = {"input_bn": ("bn", "1a"), "projection_input_bn": ("bn", "4a")}
_NORM_VALUES = {"weight": "gamma", "bias": "beta"}
# of the norms that have neither scale nor shift; Gluon stores what it does not use
_UNUSED = re.compile(r".*\.bn[14]a\..*(gamma|beta)")


def symbol_place(name: str) -> Place | None:
    """Our name -> its place in a file of OctConv's utils/symbol; None where those networks have no such layer."""
    layer, _, value = name.rpartition(".")
    if (theirs := _symbol_layer(layer)) is None:
        return None
    if is_norm(layer):
        value = _NORM_VALUES.get(value, value.replace("running", "moving"))
    return f"{theirs}{{}}_{value}", _SYMBOL_VECTORS if is_norm(layer) else _SYMBOL_PATHS


def _symbol_layer(layer: str) -> str | None:
    match layer.split("."):
        case ["stem", ("conv" | "bn") as kind]:
            return f"conv1_{kind}"
        case ["stages", stage, block, inner] if block.isdigit() and inner in _BLOCK:
            kind, number = _BLOCK[inner]
            return f"L{_number(stage)}_B{int(block) + 1:02d}_conv{number}_{kind}"
        case ["stages", stage, block, "se", fc]:
            return f"L{_number(stage)}_B{int(block) + 1:02d}_se_{fc}"
        case ["transitions", stage, kind]:
            return f"L{_number(stage)}_Trans_conv_{kind}"
        case ["tail_bn"]:
            return "tail_bn"
        case ["head", "fc"]:
            return "classifier"
    return None


def gluon_place(name: str, mobile: bool, stem_convs: int) -> Place | None:
    """Our name -> its place in a file of OctConv's utils/gluon; None where those networks have no such layer.

    mobile: a MobileNet, which counts its stages as we do. stem_convs: how many convolutions our stem has.
    """
    layer, _, value = name.rpartition(".")
    if (place := _gluon_layer(layer, mobile, stem_convs)) is None:
        return None
    if is_norm(layer):
        value = _NORM_VALUES.get(value, value)
    return f"{place[0]}{{}}.{value}", place[1]


def _gluon_layer(layer: str, mobile: bool, stem_convs: int) -> Place | None:
    match layer.split("."):
        case ["stem", inner] if match := re.fullmatch(r"(conv|bn)(\d?)", inner):
            return _gluon_stem(match[1], int(match[2] or 1), stem_convs), _WHOLE
        case ["stem", "bottleneck", inner] if inner in _BLOCK:
            return f"conv2.{''.join(_BLOCK[inner])}", _WHOLE
        case ["stages", stage, block, *inner] if block.isdigit():
            first = 1 if mobile and stage == "res1" else 0
            within = _gluon_block(inner)
            prefix = f"L{_number(stage) - (not mobile)}_B{int(block) + first}"
            return within and (f"{prefix}.{within[0]}", within[1])
        case ["tail", ("conv" | "bn") as kind]:
            return f"tail.{int(kind == 'bn')}", _WHOLE
        case ["head", "fc"]:
            return "classifer", _WHOLE  # their spelling
    return None


def _gluon_stem(kind: str, number: int, stem_convs: int) -> str:
    """conv1 holds one convolution or three, each with norm and ReLU; one more may stand in conv2."""
    if number == stem_convs and number in (2, 4):
        return f"conv2.{int(kind == 'bn')}"
    return f"conv1.{3 * (number - 1) + (kind == 'bn')}"


def _gluon_block(inner: Sequence[str]) -> Place | None:
    match inner:
        case ["se", "fc1"]:
            return "se_block.conv1", _WHOLE
        case ["se", "fc2"]:
            return "se_block.conv2", _GLUON_SQUEEZE
        case [layer] if layer in _BLOCK or layer in _INPUT_NORMS:
            kind, number = (_BLOCK | _INPUT_NORMS)[layer]
            return f"{kind}{number}", _GLUON_PATHS if kind == "conv" else _GLUON_VECTORS
    return None


def _number(stage: str) -> int:
    """'res2' -> 2"""
    return int(stage.removeprefix("res"))


_SIGNS = {"symbol": r"(arg:|aux:)?(L\d_(B\d\d|Trans)_|conv1_conv_)", "gluon": r"L\d_B\d+\.|conv1\.\d\."}


def layout_of(names: Iterable[str]) -> str:
    """'symbol' or 'gluon', the two ways in which OctConv's authors name weights. Raises WeightsError for neither."""
    seen = list(names)
    for layout, sign in _SIGNS.items():
        if any(re.match(sign, name) for name in seen):
            return layout
    raise WeightsError(
        f"MXNet weights in an unknown layout ({', '.join(seen[:5])}, ...); known are OctConv's utils/symbol "
        "(arg:L2_B01_conv1_conv-h2h_weight) and utils/gluon (L1_B0.conv1.conv_h2h.weight)"
    )


def to_octvideo(
    entries: Mapping[str, np.ndarray], own: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Tensor], Coverage]:
    """OctConv's arrays -> our state dict, float32, and what it covers.

    entries: as `read_params` gives them. own: the shapes of the target network's state dict, under our names.
    Raises WeightsError for an unknown layout and for blocks that do not fit together.
    """
    if layout_of(entries) == "symbol":
        places = {name: symbol_place(name) for name in own}
    else:
        mobile = any(name.startswith("stages.res1.") for name in own)
        stem_convs = sum(re.fullmatch(r"stem\.conv\d?\.weight", name) is not None for name in own)
        places = {name: gluon_place(name, mobile, stem_convs) for name in own}
    originals = {name.removeprefix("arg:").removeprefix("aux:"): name for name in entries}
    arrays = {name: entries[original] for name, original in originals.items()}
    pieces = {name: _pieces(arrays, place) for name, place in places.items() if place}
    found = {name: _join(arrays, rows) for name, rows in pieces.items() if any(rows)}
    for layer, parts in _concatenations(own).items():
        _reorder(found, layer, [_split(arrays, pieces.get(f"{part}.weight", [])) for part in parts])
    taken = {piece for rows in pieces.values() for row in rows for piece in row}
    unexpected = [original for name, original in originals.items() if name not in taken and not _UNUSED.fullmatch(name)]
    tensors = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in found.items()}
    return compare(tensors, own, unexpected)


Pieces = list[list[str]]
"""The names of the entries that make up one of ours, laid out as in its grid; an empty row where there are none."""


def _pieces(arrays: Collection[str], place: Place) -> Pieces:
    name, grid = place
    if (whole := name.format("")) in arrays:
        return [[whole]]
    return [[piece for path in row if (piece := name.format(path)) in arrays] for row in grid]


def _join(arrays: Mapping[str, np.ndarray], pieces: Pieces) -> np.ndarray:
    """The blocks put together. A frequency that does not exist has no blocks; a depthwise layer none between the two."""
    rows = [[arrays[piece] for piece in row] for row in pieces if row]
    widths = {tuple(block.shape[1:2] for block in row) for row in rows}
    try:
        if len(widths) > 1:
            raise ValueError("columns of different widths")
        return np.concatenate([np.concatenate(row, axis=1) if len(row) > 1 else row[0] for row in rows])
    except ValueError as error:
        shapes = ", ".join(f"{piece} {arrays[piece].shape}" for row in pieces for piece in row)
        raise WeightsError(f"blocks of one weight do not fit together: {shapes}") from error


def _split(arrays: Mapping[str, np.ndarray], pieces: Pieces) -> tuple[int, int]:
    """(high, low) outputs of a convolution."""
    high, low = ([arrays[row[0]].shape[0] if row else 0 for row in pieces] + [0, 0])[:2]
    return high, low


def _concatenations(own: Collection[str]) -> dict[str, list[str]]:
    """Of a DenseNet: the layers that read a concatenation -> the convolutions whose outputs are its parts, in order."""
    reads: dict[str, list[str]] = {}
    if not any(name.startswith("transitions.") for name in own):
        return reads
    parts = ["stem.conv"]
    for stage in sorted({name.split(".")[1] for name in own if name.startswith("stages.")}):
        if f"transitions.{stage}.conv.weight" in own:
            reads[f"transitions.{stage}.bn"] = reads[f"transitions.{stage}.conv"] = parts
            parts = [f"transitions.{stage}.conv"]
        index = 0
        while f"{(block := f'stages.{stage}.{index}')}.conv2.weight" in own:
            reads[f"{block}.bn1"] = reads[f"{block}.conv1"] = parts
            parts, index = [*parts, f"{block}.conv2"], index + 1
    reads["tail_bn"] = parts
    return reads


def _reorder(found: dict[str, np.ndarray], layer: str, parts: Sequence[tuple[int, int]]) -> None:
    """From [highs of all parts, lows of all parts], as the file has a concatenation, to part by part, as we do."""
    order: list[int] = []
    high, low = 0, sum(high for high, _ in parts)
    for highs, lows in parts:
        order += [*range(high, high + highs), *range(low, low + lows)]
        high, low = high + highs, low + lows
    axis = 0 if is_norm(layer) else 1
    for name in [name for name in found if name.rpartition(".")[0] == layer]:
        if found[name].ndim <= axis or found[name].shape[axis] != len(order):
            raise WeightsError(
                f"{name} is {found[name].shape} in the file, but the layers before it give {len(order)} channels there: "
                "the file is of a DenseNet with other blocks"
            )
        found[name] = found[name].take(order, axis)
