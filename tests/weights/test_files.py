"""Kinds of files told by their content; damaged and hostile ones."""

import collections
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from octvideo.weights import Source, WeightsError, read

from . import writer

WEIGHTS = {"conv.weight": torch.arange(6.0).view(2, 3), "bn.num_batches_tracked": torch.tensor(3)}
BLOBS = {"conv1_w": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "pred_b": np.linspace(0, 1, 300)}


def write(folder: Path, content: bytes) -> Path:
    path = folder / "weights"  # no extension says anything
    path.write_bytes(content)
    return path


def saved(folder: Path, content: Any, legacy: bool = False) -> Path:
    torch.save(content, folder / "weights", _use_new_zipfile_serialization=not legacy)
    return folder / "weights"


def check_torch(source: Source, kind: str = "torch") -> None:
    assert source.kind == kind
    torch.testing.assert_close(dict(source.entries), WEIGHTS, rtol=0, atol=0)


class TestTorch:
    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize(
        "content",
        [
            WEIGHTS,
            collections.OrderedDict(WEIGHTS),
            {"state_dict": WEIGHTS, "epoch": 3, "arch": "resnet50", "best_acc1": 76.1},
            {"model_state": WEIGHTS, "epoch": 3, "optimizer_state": {"lr": 0.1}, "cfg": "TRAIN: ..."},
            {"model": WEIGHTS, "optimizer": {}},
            {"state_dict": {f"module.{name}": value for name, value in WEIGHTS.items()}},
            {**WEIGHTS, "epoch": 4},
        ],
    )
    def test_state_dicts(self, tmp_path: Path, content: Any, legacy: bool) -> None:
        check_torch(read(saved(tmp_path, content, legacy)))

    @pytest.mark.parametrize("padding", [0, 1, 600])
    def test_safetensors(self, tmp_path: Path, padding: int) -> None:
        save_file(WEIGHTS, tmp_path / "weights", metadata={"format": "pt" + "x" * padding})
        check_torch(read(tmp_path / "weights"))
        whole = (tmp_path / "weights").read_bytes()
        for size in range(9, len(whole)):
            with pytest.raises(WeightsError, match="weights: "):
                read(write(tmp_path, whole[:size]))

    def test_checkpoints_of_ours(self, tmp_path: Path) -> None:
        check_torch(read(saved(tmp_path, {"format": 1, "step": 10, "model": WEIGHTS, "optimizer": {}})), "octvideo")

    @pytest.mark.parametrize(
        "content,problem",
        [
            ({**WEIGHTS, "depth": 50}, "'depth' is a int; tensors are read, alone or under model_state"),
            ({"state_dict": {"a": [1.0]}}, "'a' is a list"),
            ({"state_dict": {3: torch.zeros(1)}}, "3 is a Tensor"),
            ({}, "it has no entries"),
            (torch.zeros(3), "holds a Tensor; a state dict is read"),
            (
                {"a": torch.nn.Linear(1, 1)},
                "not a whole PyTorch file of tensors and plain values .* save its state dict alone",
            ),
        ],
    )
    def test_what_is_no_state_dict(self, tmp_path: Path, content: Any, problem: str) -> None:
        with pytest.raises(WeightsError, match=problem):
            read(saved(tmp_path, content))

    def test_code_in_a_file_does_not_run(self, tmp_path: Path) -> None:
        for legacy in (False, True):
            with pytest.raises(WeightsError):
                read(saved(tmp_path, {"a": Attack(os.system, f"touch {tmp_path}/ran")}, legacy))
        assert not (tmp_path / "ran").exists()

    def test_a_flipped_bit_in_the_values(self, tmp_path: Path) -> None:
        path = saved(tmp_path, WEIGHTS)
        content = bytearray(path.read_bytes())
        content[content.index(WEIGHTS["conv.weight"].numpy().tobytes())] ^= 1
        with pytest.raises(WeightsError, match="the checksum of .* does not agree"):
            read(write(tmp_path, bytes(content)))

    def test_another_zip(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "weights", "w") as archive:
            archive.writestr("readme.txt", "nothing")
        with pytest.raises(WeightsError, match="not a whole PyTorch file"):
            read(tmp_path / "weights")

    @pytest.mark.parametrize("legacy", [False, True])
    def test_cut_off_or_damaged_anywhere(self, tmp_path: Path, legacy: bool) -> None:
        damage_everywhere(saved(tmp_path, WEIGHTS, legacy), tries=120)


class Attack:
    """Unpickling it calls a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def global_call(module: str, name: str, args: bytes) -> bytes:
    """{'blobs': {'a': module.name(*args)}}; args: instructions that push a tuple."""
    return b"\x80\x02}U\x05blobs}U\x01ac" + f"{module}\n{name}\n".encode() + args + b"Rss."


class TestCaffe2:
    @pytest.mark.parametrize("protocol", [2, 3, 4])
    @pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
    def test_python3(self, tmp_path: Path, protocol: int, kind: Callable[[Any], Any]) -> None:
        blobs = {
            **BLOBS,
            "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            "big_endian": np.arange(3, dtype=">i4"),
            "none": np.zeros((0, 3)),
            "truth": np.array([True, False]),
            "lr": np.float32(0.5),
        }
        source = read(write(tmp_path, pickle.dumps({"blobs": kind(blobs)}, protocol)))
        assert source.kind == "caffe2"
        assert source.entries.keys() == blobs.keys()
        for name, array in blobs.items():
            assert np.array_equal(source.entries[name].numpy(), array), name
            assert source.entries[name].numpy().dtype == array.dtype.newbyteorder("=")

    def test_python2(self, tmp_path: Path) -> None:
        source = read(write(tmp_path, writer.python2_pickle(BLOBS)))
        assert all(np.array_equal(source.entries[name].numpy(), array) for name, array in BLOBS.items())

    def test_the_writer_of_this_test(self) -> None:
        read_by_pickle = pickle.loads(writer.python2_pickle(BLOBS), encoding="latin1")["blobs"]
        assert all(np.array_equal(read_by_pickle[name], array) for name, array in BLOBS.items())

    def test_an_ordered_dict_of_python2(self, tmp_path: Path) -> None:
        content = writer.python2_pickle(BLOBS)
        blob = content[content.index(b"U\x07conv1_w") : content.index(b"U\x06pred_b")]
        pairs = b"ccollections\nOrderedDict\n]](" + blob + b"ea\x85R"
        entries = read(write(tmp_path, b"\x80\x02}U\x05blobs" + pairs + b"s.")).entries
        assert np.array_equal(entries["conv1_w"].numpy(), BLOBS["conv1_w"])

    def test_bookkeeping_is_left_out(self, tmp_path: Path) -> None:
        source = read(write(tmp_path, pickle.dumps({"blobs": {**BLOBS, "lr": 0.1, "model_iter": 5}}, 2)))
        assert source.entries.keys() == BLOBS.keys()
        with pytest.raises(WeightsError, match="depth is a int, not an array"):
            read(write(tmp_path, pickle.dumps({"blobs": {"depth": 50}}, 2)))

    @pytest.mark.parametrize(
        "function,args",
        [
            (os.system, ("touch ran",)),
            (eval, ("open('ran', 'w')",)),
            (exec, ("open('ran', 'w')",)),
            (getattr, ("a", "b")),
            (bytearray, (1 << 40,)),
            (np.ones, ((1 << 40,),)),
            (np.load, ("ran",)),
        ],
    )
    def test_functions_that_arrays_do_not_need(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for protocol in (2, 4):
            with pytest.raises(WeightsError, match=r"it asks for .*; only NumPy arrays are read"):
                read(write(tmp_path, pickle.dumps({"blobs": {"a": Attack(function, *args)}}, protocol)))
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        "content,problem",
        [
            (global_call("numpy", "ndarray", b"(\x8a\x06\x00\x00\x00\x00\x00\x01t\x85"), "a is a Call, not an array"),
            (
                global_call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftU\x01b\x87"),
                "not an array",
            ),
            (global_call("__builtin__", "bytes", b"J\xff\xff\xff\x7f\x85"), "not an array"),
            (global_call("_codecs", "encode", b"U\x01xU\x07unicode\x86"), "not an array"),
            (
                b"\x80\x02cnumpy\nndarray\n}U\x04nameU\x01xsb.",
                "it sets attributes of a _Global",
            ),  # sets an attribute of a name
            (b"\x80\x02cnumpy\nndarray\n)\x81.", "it uses NEWOBJ"),
            (b"\x80\x02NQ.", "it uses BINPERSID"),
            (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "expected 1099511627776 bytes"),
            (b"\x80\x02T" + struct.pack("<i", 1 << 30) + b"xx.", "expected 1073741824 bytes"),
            (b"\x80\x02}r" + struct.pack("<I", 1 << 31) + b".", "a NoneType where a dict is expected"),
            (b"\x80\x02}N" + b"\x85" * 50_000 + b"K\x01s.", "a tuple as a key"),  # hashing it would end Python
            (b"\x80\x02}N" + b"2\x86" * 60 + b"K\x01s.", "it uses DUP"),
            (b"\x80\x02]q\x00.", "a list where a dict is expected"),
            (pickle.dumps({"blobs": {"a": np.array([object()])}}, 2), "it asks for"),
            (pickle.dumps({"blobs": {"a": np.array([None])}}, 2), "a is not of numbers; dtypes that are read: f2"),
            (pickle.dumps({"blobs": {"a": np.array(["x"])}}, 2), "a is not of numbers"),
            (pickle.dumps({"blobs": {"a": np.zeros(2, "f4,i4")}}, 2), "a is not of numbers"),
            (pickle.dumps({"blobs": 3}, 2), "a int where a dict is expected"),
            (pickle.dumps({"model": {}}, 2), "a NoneType where a dict is expected"),
            (pickle.dumps(BLOBS, 2)[:-30], "expected .* bytes in a .*, but only .* remain"),
        ],
    )
    def test_hostile(self, tmp_path: Path, content: bytes, problem: str) -> None:
        path = write(tmp_path, content)
        tracemalloc.start()
        with pytest.raises(WeightsError, match=rf"(?s){path}: not a whole Caffe2 pickle .*{problem}"):
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100 * len(content) + (1 << 20)

    @pytest.mark.parametrize(
        "shape", [(1 << 40,), (1 << 20, 1 << 20), (-6,), (7,), (1,) * 40 + (6,), (0, 1 << 31, 1 << 31)]
    )
    def test_shapes_without_their_bytes(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        true = pickle.dumps({"blobs": {"a": np.arange(6, dtype=np.float32)}}, 2)
        where = true.index(b"K\x06\x85")
        claimed = pickle.dumps(shape, 2)[2:-1]
        with pytest.raises(WeightsError, match="a is of|reshape"):
            read(write(tmp_path, true[:where] + claimed + true[where + 3 :]))

    def test_one_array_asked_for_many_times(self, tmp_path: Path) -> None:
        array = np.zeros(10_000, np.float32)
        with pytest.raises(WeightsError, match="arrays of more bytes than the file has"):
            read(write(tmp_path, pickle.dumps({"blobs": {str(i): array for i in range(1000)}}, 2)))

    def test_cut_off_or_damaged_anywhere(self, tmp_path: Path) -> None:
        damage_everywhere(write(tmp_path, writer.python2_pickle(BLOBS)), tries=300)


def damage_everywhere(path: Path, tries: int) -> None:
    """Every broken copy is read or is a WeightsError that names the file."""
    whole, draw, errors = path.read_bytes(), random.Random(0), 0
    for index in range(2 * tries):
        content = bytearray(whole[: draw.randrange(len(whole))] if index % 2 else whole)
        for _ in range(draw.choice([1, 3]) * (index % 2 == 0)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            read(path)
        except WeightsError as error:
            assert str(path) in str(error)
            errors += 1
    assert errors > tries  # all that were cut off, and some


class TestOthers:
    def test_mxnet(self, tmp_path: Path) -> None:
        source = read(write(tmp_path, writer.named_params({"arg:a": np.ones(3, np.float32)})))
        assert source.kind == "mxnet"
        assert np.array_equal(source.entries["arg:a"], np.ones(3))

    @pytest.mark.parametrize(
        "content,problem",
        [
            (b"", "it is empty"),
            (
                b"<!DOCTYPE html><html>",
                r"it begins with b'<!DOCTYPE html><'\. Files that are read: PyTorch \(zip or older\)",
            ),
            (b"\x89HDF\r\n\x1a\n", "it begins with"),
        ],
    )
    def test_no_weights(self, tmp_path: Path, content: bytes, problem: str) -> None:
        with pytest.raises(WeightsError, match=f"weights: no weights; {problem}"):
            read(write(tmp_path, content))

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="none: no such file"):
            read(tmp_path / "none")
        with pytest.raises(WeightsError, match="a folder or a device"):
            read(tmp_path)
