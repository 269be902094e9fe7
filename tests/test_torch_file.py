"""What torch.save writes is read as torch.load reads it; hostile files are refused in little memory."""

import collections
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octvideo import torch_file
from octvideo.torch_file import TorchFileError

from .memory import peak_memory

MB = 1 << 20
CONTENT = {
    "values": torch.arange(24.0).view(2, 3, 4),
    "part": torch.arange(20.0)[3:7],
    "turned": torch.arange(20.0).view(4, 5).t(),
    "channels last": torch.randn(2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
    "scalar": torch.tensor(3),
    "none": torch.zeros(0, 5),
    **{f"{dtype}": torch.tensor([0, 1, 1]).to(dtype) for dtype in torch_file.DTYPES},
    "norm": torch.nn.BatchNorm2d(3).state_dict(),  # an OrderedDict with an attribute
    "plain": [None, True, -5, 2**63 + 5, 1.5, "äö€😀", b"a\xff", (1, (2,)), {5: {"a": "b"}}],
    "dtype": torch.float16,
}


def same(one: Any, other: Any) -> bool:
    if isinstance(other, Tensor):
        equal = (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        return equal and torch.equal(one.double(), other.double())
    if isinstance(other, dict):
        return (
            list(one) == list(other) and vars_of(one) == vars_of(other) and all(same(one[k], other[k]) for k in other)
        )
    return type(one) is type(other) and one == other


def vars_of(value: Any) -> Any:
    return getattr(value, "_metadata", None)


@pytest.mark.parametrize("zipped,protocol", [(True, 2), (True, 4), (False, 2)])
def test_what_torch_saves_comes_back(tmp_path: Path, zipped: bool, protocol: int) -> None:
    path = tmp_path / "a.pt"
    torch.save(CONTENT, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    found = torch_file.read(path)
    assert found.keys() == CONTENT.keys()
    assert [name for name in CONTENT if not same(found[name], CONTENT[name])] == []


def test_parameters_sizes_and_devices_are_plain(tmp_path: Path) -> None:
    content = {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.Size([1, 2]), "c": torch.device("cuda:1")}
    torch.save(content, tmp_path / "a.pt")
    found = torch_file.read(tmp_path / "a.pt")
    assert torch.equal(found["a"], torch.ones(2)) and not found["a"].requires_grad
    assert (found["b"], found["c"]) == ((1, 2), "cuda:1")


def test_tensors_of_one_storage_share_it(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    torch.save([base, base[2:]], tmp_path / "a.pt")
    first, second = torch_file.read(tmp_path / "a.pt")
    first[3] = 9
    assert second.tolist() == [2, 9, 4, 5]


def test_a_dict_of_python_2(tmp_path: Path) -> None:
    """Its items are one list of pairs."""
    pairs = b"ccollections\nOrderedDict\n](](U\x01aK\x05ee\x85R"
    assert torch_file.read(write(tmp_path / "a.pt", b"\x80\x02" + pairs + b".")) == {"a": 5}


def write(path: Path, content: bytes, storage: bytes = bytes(4), compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", storage)
    return path


class Call:
    """Unpickling it calls a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        Call(os.mkdir, "ran"),
        Call(bytearray, 3 << 30),
        Call(bytearray, b"abc"),
        Call(bytes, 3 << 30),
        Call(complex, 1, 2),
        Call(set, [1]),
        Call(range, 1 << 40),
        Call(collections.Counter, {"a": 1}),
        Call(torch.zeros, 1 << 30),
        Call(torch.Tensor, 1 << 30),
        Call(torch.FloatStorage, 1 << 30),
        Call(torch.UntypedStorage, 3 << 30),
        Call(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, ()),
    ],
    ids=lambda call: f"{call.function.__name__}{call.args}"[:40] if isinstance(call, Call) else None,
)
def test_calls_that_no_weights_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call, zipped: bool) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 2, "model": {}, "x": call}, "a.pt", _use_new_zipfile_serialization=zipped)
    with peak_memory() as peak, pytest.raises(TorchFileError, match=r"it (asks for|calls) "):
        torch_file.read(Path("a.pt"))
    assert peak[0] < 50 * MB
    assert not Path("ran").exists()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def storage(count: int, kind: str = "FloatStorage", key: str = "0") -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(count: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...], key: str = "0") -> bytes:
    tuples = (b"(" + b"".join(map(number, sizes)) + b"t" for sizes in (size, stride))
    args = b"(" + storage(count, key=key) + number(offset) + b"".join(tuples) + b"\x89}t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + args + b"R"


VAST = 1 << 30


@pytest.mark.parametrize(
    "content,problem",
    [
        (tensor(1, 0, (VAST,), (1,)), rf"size \({VAST},\), stride \(1,\) and offset 0 in a storage of 1 values"),
        (tensor(1, 0, (VAST,), (0,)), r"stride \(0,\)"),  # one value, repeated
        (tensor(1, 0, (1 << 20, 1 << 20), (0, 0)), r"stride \(0, 0\)"),
        (tensor(1, 1, (1,), (1,)), "offset 1 in a storage of 1 values"),
        (tensor(1, VAST, (0,), (1,)), f"offset {VAST}"),
        (tensor(1, 0, (2,), (VAST,)), rf"stride \({VAST},\)"),
        (tensor(1, 0, (1 << 62,), (0,)), "not a number in 0"),
        (tensor(1, 0, (-1,), (1,)), "not a number in 0"),
        (tensor(1, -1, (1,), (1,)), "not a number in 0"),
        (tensor(1, 0, (1,), (1, 1)), "not two tuples of one length"),
        (tensor(1, 0, (1,) * 65, (1,) * 65), "not two tuples of one length"),
        (tensor(VAST, 0, (1,), (1,)), f"storage 0 of {4 * VAST} bytes, where archive/data/0 has 4"),
        (tensor(0, 0, (0,), (1,)), "storage 0 of 0 bytes"),
        (tensor(-1, 0, (1,), (1,)), "storage 0 of -1 values"),
        (tensor(1, 0, (1,), (1,), key="1"), "archive/data/1 has none"),
        (tensor(1, 0, (1,), (1,), key="../0"), "archive/data/../0 has none"),
        (storage(1, "ComplexFloatStorage"), "it asks for torch.ComplexFloatStorage"),
        (b"N" + b"\x85" * 50_000 + b"Q", "a storage in an unknown way"),
        (b"}N" + b"\x85" * 50_000 + b"K\x01s", "a tuple as a key"),  # hashing it would end Python
        (b"}G\x3f\xf0\0\0\0\0\0\0K\x01s", "a float as a key"),
        (b"}" + number(1 << 64) + b"K\x01s", "integers of 64 bits"),  # such keys can be chosen to have one hash
        (b"]q\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"R", "calls a tuple|calls with|empty"),
        (b"K\x01}b", "it sets attributes of a int"),
        (b"ccollections\nOrderedDict\n)R}" + text("_metadata") + b"K\x01sb", "versions of its modules are not dicts"),
        (b"ctorch\ndevice\n(" + b"N\x85" * 9 + b"tR", "argument|torch.device that is not"),
        (b"c_codecs\nencode\n" + text("a") + text("zip") + b"\x86R", "unknown encoding"),
        (b"2", "it uses DUP"),
        (b"i__builtin__\neval\n", "it uses INST"),
        (b"\x96" + struct.pack("<Q", 1 << 40), "1099511627776 bytes"),
        (b"\x8d" + struct.pack("<Q", 1 << 40), "1099511627776 bytes"),
        (b"N", "exhausted before seeing STOP"),
    ],
)
def test_claims_of_a_pickle(tmp_path: Path, content: bytes, problem: str) -> None:
    path = write(tmp_path / "a.pt", b"\x80\x02" + content + (b"" if "STOP" in problem else b"."))
    with peak_memory() as peak, pytest.raises(TorchFileError, match=problem):
        torch_file.read(path)
    assert peak[0] < 50 * MB


OBJECTS = b"ccollections\nOrderedDict\nq\x02"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\nq\x00(" + storage(1) + b"K\x00K\x01\x85K\x01\x85\x89}tq\x01"


# Made where they are used: each has megabytes.
MANY: dict[str, Callable[[], bytes]] = {
    "dicts": lambda: b"](" + b"}" * 600_000 + b"e",
    "nested lists": lambda: b"]" * 300_000 + b"a" * 299_999,
    "nested dicts": lambda: b"}K\x01" * 200_000 + b"K\x01" + b"s" * 200_000,
    "ordered dicts": lambda: OBJECTS + b"](" + b"h\x02)R" * 200_000 + b"e",
    "tensors": lambda: TENSOR + b"](" + b"h\x00h\x01R" * 200_000 + b"e",
    "memo": lambda: b"N" + b"".join(b"r" + struct.pack("<I", 7919 * number) for number in range(520_000)),
    "wide text": lambda: text("😀" + "a" * (12 * MB)),  # a character of four bytes makes four of each
    "many texts": lambda: b"](" + text("😀" + "a" * 99_999) * 130 + b"e",
}


@pytest.mark.parametrize("kind", MANY)
def test_many_or_large_objects(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "a.pt", b"\x80\x02" + MANY[kind]() + b".")
    with peak_memory() as peak, pytest.raises(TorchFileError, match="objects take more than|most should be tensors"):
        torch_file.read(path)
    assert peak[0] < 2 * path.stat().st_size + 60 * MB


def test_members_that_expand(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", b"\x80\x02N.", bytes(64 * MB), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < MB
    with peak_memory() as peak, pytest.raises(TorchFileError, match="compressed or encrypted"):
        torch_file.read(path)
    assert peak[0] < 10 * MB


def legacy(path: Path, count: int, keys: list[str], present: bytes) -> Path:
    """One tensor of `count` values in torch's older format."""
    content = tensor(count, 0, (1,), (1,)).replace(number(count) + b"tQ", number(count) + b"NtQ")
    facts = {"protocol_version": 1001, "little_endian": True}
    heads = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, facts))
    path.write_bytes(heads + b"\x80\x02" + content + b"." + pickle.dumps(keys, 2) + present)
    return path


def test_claims_of_the_older_format(tmp_path: Path) -> None:
    right = struct.pack("<q", 1) + struct.pack("<f", 2.5)
    assert torch_file.read(legacy(tmp_path / "a.pt", 1, ["0"], right)).tolist() == [2.5]
    for count, keys, present, problem in (
        (VAST, ["0"], right, f"storages up to 0 of {4 * VAST} bytes in a file of"),
        (1, ["0"], struct.pack("<q", VAST), f"storage 0 of {VAST} values in one place and 1 in another"),
        (1, ["0"], right[:-1], "memoryview|shape|assign"),
        (1, [], right, "its list of storages"),
        (1, ["0", "0"], right, "its list of storages"),
        (1, ["1"], right, "its list of storages"),
        (1, [("0",)], right, "its list of storages"),
    ):
        path = legacy(tmp_path / "a.pt", count, keys, present)  # type: ignore[arg-type]
        with peak_memory() as peak, pytest.raises(TorchFileError, match=problem):
            torch_file.read(path)
        assert peak[0] < 10 * MB


def test_tensors_that_do_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(torch.zeros(3), tmp_path / "a.pt")

    def full(size: int) -> torch.UntypedStorage:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "UntypedStorage", full)
    with pytest.raises(MemoryError, match="12 bytes for weights"):
        torch_file.read(tmp_path / "a.pt")


def test_what_the_system_cannot_read_is_not_a_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        torch_file.read(tmp_path / "none.pt")
    with pytest.raises(IsADirectoryError):
        torch_file.read(tmp_path)
