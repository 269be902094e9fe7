"""The .params format, well-formed and hostile, and OctConv's names in both of its layouts."""

import gzip
import io
import random
import re
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from octvideo.models import NETWORKS, create, with_octave
from octvideo.octave import OctBatchNorm2d, OctConv2d
from octvideo.weights.coverage import WeightsError
from octvideo.weights.mxnet import Place, gluon_place, layout_of, read_params, symbol_place, to_octvideo

from ..models.shallow import cut
from . import writer

RNG = np.random.default_rng(0)


def write(folder: Path, content: bytes, name: str = "net-0000.params") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


class TestFormat:
    @pytest.mark.parametrize("version", [0, 1, 2, 3])
    @pytest.mark.parametrize("dtype", writer.CODES)
    def test_round_trip(self, tmp_path: Path, version: int, dtype: str) -> None:
        arrays = {"arg:a": (RNG.normal(size=(2, 3, 4)) * 3).astype(dtype), "aux:ü": np.ones(5, dtype)}
        read = read_params(write(tmp_path, writer.named_params(arrays, version)))
        assert list(read) == list(arrays)
        for name, array in arrays.items():
            assert read[name].dtype == array.dtype
            assert np.array_equal(read[name], array)

    def test_bfloat16(self, tmp_path: Path) -> None:
        values = torch.tensor([[1.0, -2.5], [3e38, 0.0]]).bfloat16()
        raw = values.view(torch.int16).numpy()
        read = read_params(write(tmp_path, writer.params([writer.record(raw, code=writer.BFLOAT16)])))
        assert read["0"].dtype == np.float32
        assert np.array_equal(read["0"], values.float().numpy())

    def test_no_dimensions_are_nothing_until_version_3(self, tmp_path: Path) -> None:
        records = [writer.record(np.array(2.5, np.float32), version) for version in (0, 1, 2, 3)]
        read = read_params(write(tmp_path, writer.params(records)))
        assert [array.shape for array in read.values()] == [(0,), (0,), (0,), ()]
        assert read["3"] == 2.5

    def test_no_values(self, tmp_path: Path) -> None:
        read = read_params(write(tmp_path, writer.named_params({"a": np.zeros((0, 64), np.float32)})))
        assert read["a"].shape == (0, 64)

    def test_written_by_mxnet(self, mxnet_data: Path) -> None:
        legacy = read_params(mxnet_data / "legacy_ndarray.v0")
        assert list(legacy) == ["0", "1", "2", "3", "4", "5"]
        assert all(np.array_equal(array, np.arange(128)) for array in legacy.values())
        shapes = {name: array.shape for name, array in read_params(mxnet_data / "small-0000.params").items()}
        assert shapes == {
            "arg:conv_weight": (1, 1, 3, 3),
            "arg:conv_bias": (1,),
            "arg:fc_weight": (1, 9),
            "arg:fc_bias": (1,),
        }


SMALL = writer.params(
    [
        writer.record(np.arange(6, dtype=np.float32).reshape(2, 3), version=0),
        writer.record(np.arange(4, dtype=np.float16), version=2),
        writer.record(np.array(7, np.int64), version=3),
    ],
    ["arg:a", "arg:b", "aux:c"],
)


class TestHostileFiles:
    def test_cut_off_anywhere(self, tmp_path: Path) -> None:
        for size in range(len(SMALL)):
            with pytest.raises(WeightsError, match=r"cut.params: not a whole MXNet .params file: at byte \d+, "):
                read_params(write(tmp_path, SMALL[:size], "cut.params"))

    def test_damaged_anywhere(self, tmp_path: Path) -> None:
        """Either arrays come out or an error; and never more memory than a few times the file."""
        draw, errors = random.Random(0), 0
        tracemalloc.start()
        for _ in range(600):
            content = bytearray(SMALL)
            for _ in range(draw.choice([1, 1, 2, 8])):
                content[draw.randrange(len(content))] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
            path = write(tmp_path, bytes(content))
            try:
                read_params(path)
            except WeightsError as error:
                assert str(path) in str(error)
                errors += 1
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 100 < errors < 600
        assert peak < 1 << 20

    @pytest.mark.parametrize(
        "record,problem",
        [
            (struct.pack("<IiIqq", 0xF993FAC9, 0, 2, 1 << 40, 1 << 40), r"shape \(1099511627776, 1099511627776\)"),
            (struct.pack("<IiIqq", 0xF993FAC9, 0, 2, 0, 1 << 62), r"shape \(0, 4611686018427387904\)"),
            (struct.pack("<IiIqq", 0xF993FAC9, 0, 2, -3, -4), r"shape \(-3, -4\)"),
            (
                struct.pack("<IiIqq", 0xF993FAC9, 0, 2, 3, 1 << 20),
                r"an array of shape \(3, 1048576\) takes 12582912 bytes",
            ),
            (struct.pack("<Iii", 0xF993FAC9, 0, -1), "an array of -1 dimensions"),
            (struct.pack("<Iii", 0xF993FACA, 0, -1), "an array of -1 dimensions"),
            (struct.pack("<I", 0xF993FAC7), "an array of 4187224775 dimensions; 0 to 32"),
            (struct.pack("<Iii", 0xF993FAC9, 1, 1), "storage type 1, sparse"),
        ],
    )
    def test_impossible_arrays(self, tmp_path: Path, record: bytes, problem: str) -> None:
        path = write(tmp_path, struct.pack("<QQQ", 0x112, 0, 1) + record + struct.pack("<iii", 1, 0, 0) + bytes(64))
        with pytest.raises(WeightsError, match=problem):
            read_params(path)

    @pytest.mark.parametrize("code", [-1, 13, 1 << 30])
    def test_an_unknown_dtype(self, tmp_path: Path, code: int) -> None:
        content = writer.params([writer.record(np.zeros(2, np.float32), code=code)])
        with pytest.raises(WeightsError, match=f"at byte 24, an array of dtype {code}; 0 to 12 are read"):
            read_params(write(tmp_path, content))

    @pytest.mark.parametrize(
        "content,problem",
        [
            (struct.pack("<QQQ", 0x112, 0, 1 << 60) + bytes(400), "at byte 16, 1152921504606846976 arrays where 400"),
            (struct.pack("<QQQQ", 0x112, 0, 0, 1 << 60), "1152921504606846976 names where 0"),
            (struct.pack("<QQQ", 0x112, 0, 1 << 17) + bytes(1 << 20), "at most 65536"),
            (struct.pack("<QQQQQ", 0x112, 0, 0, 1, 1 << 62), "a name takes 4611686018427387904 bytes"),
            (writer.params([writer.record(np.zeros(1))] * 2, ["a", "a"]), "several arrays are named 'a'"),
            (writer.params([writer.record(np.zeros(1))] * 2, ["a"]), "1 names for 2 arrays"),
            (writer.params([writer.record(np.zeros(1))], [b"\xff\xfe"]), r"the name b'\\xff\\xfe' is not UTF-8"),
            (SMALL + b"!", "1 bytes too many"),
            (b"\x13" + SMALL[1:], r"at byte 0, it starts with b'\\x13"),
            (b"", "at byte 0, it starts with b''"),
        ],
    )
    def test_impossible_files(self, tmp_path: Path, content: bytes, problem: str) -> None:
        with pytest.raises(WeightsError, match=problem):
            read_params(write(tmp_path, content))


def archive(members: dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


class TestArchives:
    @pytest.mark.parametrize("mode", ["w", "w:gz"])
    def test_the_only_params_member(self, tmp_path: Path, mode: str) -> None:
        members = {
            "net/net-symbol.json": b"{}",
            "net/checkpoint-0-0000.params": SMALL,
            "net/._checkpoint-0-0000.params": b"mac",
        }
        assert read_params(write(tmp_path, archive(members, mode), "net.tar")).keys() == {"arg:a", "arg:b", "aux:c"}

    def test_none_or_several(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="one .params file; it holds none"):
            read_params(write(tmp_path, archive({"net/net-symbol.json": b"{}"})))
        with pytest.raises(WeightsError, match="it holds 'a.params', 'b.params'"):
            read_params(write(tmp_path, archive({"a.params": SMALL, "b.params": SMALL})))

    @pytest.mark.parametrize(
        "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE]
    )
    def test_a_member_that_is_no_regular_file(self, tmp_path: Path, kind: bytes) -> None:
        info = tarfile.TarInfo("a.params")
        info.type, info.linkname = kind, "/etc/passwd"
        content = info.tobuf() + bytes(1024)
        with pytest.raises(WeightsError, match="'a.params' is not a regular file"):
            read_params(write(tmp_path, content))

    def test_a_broken_member_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match=r"net.tar:a.params: not a whole MXNet .params file: at byte"):
            read_params(write(tmp_path, archive({"a.params": SMALL[:-1]}), "net.tar"))

    def test_a_member_larger_than_the_archive(self, tmp_path: Path) -> None:
        content = bytearray(archive({"a.params": SMALL}))
        info = tarfile.TarInfo("a.params")
        info.size = 1 << 32
        content[:512] = info.tobuf()
        with pytest.raises(WeightsError):
            read_params(write(tmp_path, bytes(content)))

    def test_what_unpacks_to_much_more(self, tmp_path: Path) -> None:
        path = write(tmp_path, gzip.compress(bytes(20 << 20)))
        with pytest.raises(WeightsError, match="unpacks to more than 10 times its size"):
            read_params(path)

    def test_an_archive_of_very_many_members(self, tmp_path: Path) -> None:
        path = write(tmp_path, archive({f"{number}.json": b"" for number in range(1001)}))
        with pytest.raises(WeightsError, match="more than 1000 members"):
            read_params(path)

    def test_damaged_anywhere(self, tmp_path: Path) -> None:
        draw = random.Random(0)
        for whole in (archive({"a.params": SMALL}), archive({"a.params": SMALL}, "w:gz")):
            for _ in range(150):
                content = bytearray(whole)
                for _ in range(draw.choice([1, 4])):
                    content[draw.randrange(min(len(content), 1200))] = draw.randrange(256)
                path = write(tmp_path, bytes(content[: draw.choice([len(content), draw.randrange(len(content))])]))
                try:
                    read_params(path)
                except WeightsError as error:
                    assert str(path) in str(error)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="could not be read"):
            read_params(tmp_path / "none.params")
        with pytest.raises(WeightsError, match="could not be read"):
            read_params(tmp_path)


class Synthetic:
    """A file in their layout and what must come of it: whole weights are drawn, and their blocks cut out."""

    def __init__(self) -> None:
        self.entries: dict[str, np.ndarray] = {}
        self.ours: dict[str, np.ndarray] = {}

    def plain(self, ours: str, theirs: str, *shape: int, stored: tuple[int, ...] | None = None) -> None:
        self.ours[ours] = RNG.normal(size=shape).astype(np.float32)
        self.entries[theirs] = self.ours[ours].reshape(stored or shape)

    def rows(
        self, ours: str, theirs: str, split: tuple[int, int], *rest: int, paths: tuple[str, str] = ("h", "l")
    ) -> None:
        """theirs: with {} for the frequency."""
        whole = RNG.normal(size=(sum(split), *rest)).astype(np.float32)
        self.ours[ours] = whole
        for path, block in zip(paths, (whole[: split[0]], whole[split[0] :]), strict=True):
            if len(block):
                self.entries[theirs.format(path)] = block

    def conv(self, ours: str, theirs: str, out: tuple[int, int], low: np.ndarray, kernel: int = 1) -> None:
        """low: of each input channel, in our order, whether it is low-frequency."""
        whole = RNG.normal(size=(sum(out), len(low), kernel, kernel)).astype(np.float32)
        self.ours[ours] = whole
        for frequency, rows in (("h", whole[: out[0]]), ("l", whole[out[0] :])):
            for source, block in (("h", rows[:, ~low]), ("l", rows[:, low])):
                if block.shape[0] and block.shape[1]:
                    self.entries[theirs.format(f"{source}2{frequency}")] = block

    def norm(
        self,
        ours: str,
        theirs: str,
        low: np.ndarray,
        mean: str = "moving_mean",
        var: str = "moving_var",
        dot: str = "_",
    ) -> None:
        names = {"weight": "gamma", "bias": "beta", "running_mean": mean, "running_var": var}
        for value, other in names.items():
            whole = RNG.normal(size=len(low)).astype(np.float32)
            self.ours[f"{ours}.{value}"] = whole
            for frequency, block in (("h", whole[~low]), ("l", whole[low])):
                if len(block):
                    self.entries[f"{theirs.format(frequency)}{dot}{other}"] = block

    def check(self, layout: str) -> None:
        """Everything is taken, and to the last bit what was drawn."""
        own: dict[str, tuple[int, ...]] = {name: array.shape for name, array in self.ours.items()}
        own |= {
            f"{name.removesuffix('running_var')}num_batches_tracked": () for name in own if name.endswith("running_var")
        }
        assert layout_of(self.entries) == layout
        weights, coverage = to_octvideo(self.entries, own)
        assert coverage.complete, coverage.table()
        assert weights.keys() == self.ours.keys()
        for name, array in self.ours.items():
            assert weights[name].dtype == torch.float32
            assert np.array_equal(weights[name].numpy(), array), name


def low(*parts: tuple[int, int]) -> np.ndarray:
    """Of each channel of a concatenation of (high, low) parts, in our order, whether it is low-frequency."""
    return np.concatenate([np.repeat([False, True], part) for part in parts])


HIGH = (8, 0)
MIXED = (5, 3)


def symbol_block(
    file: Synthetic, prefix: str, theirs: str, first: bool, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """A pre-activation bottleneck."""
    splits = [before, after, after, after]
    for number, kernel in ((1, 1), (2, 3), (3, 1)):
        file.norm(f"{prefix}.bn{number}", f"arg:{theirs}_conv{number}_bn-{{}}", low(splits[number - 1]))
        path = f"arg:{theirs}_conv{number}_conv-{{}}_weight"
        file.conv(f"{prefix}.conv{number}.weight", path, splits[number], low(splits[number - 1]), kernel)
    if first:
        file.norm(f"{prefix}.projection_bn", f"arg:{theirs}_conv4_bn-{{}}", low(before))
        file.conv(f"{prefix}.projection.weight", f"arg:{theirs}_conv4_conv-{{}}_weight", after, low(before))


def symbol_ends(file: Synthetic, channels: int) -> None:
    file.plain("stem.conv.weight", "arg:conv1_conv_weight", 8, 3, 7, 7)
    file.norm("stem.bn", "arg:conv1_bn", low(HIGH))
    file.norm("tail_bn", "arg:tail_bn", low((channels, 0)))
    file.plain("head.fc.weight", "arg:classifier_weight", 10, channels)
    file.plain("head.fc.bias", "arg:classifier_bias", 10)


class TestSymbolNames:
    def test_octave_resnet_with_squeeze(self) -> None:
        file = Synthetic()
        symbol_ends(file, 8)
        splits = [HIGH, MIXED, MIXED, HIGH]
        blocks = [
            ("stages.res2.0", "L2_B01", True),
            ("stages.res2.1", "L2_B02", False),
            ("stages.res5.0", "L5_B01", True),
        ]
        for (ours, theirs, first), before, after in zip(blocks, splits[:-1], splits[1:], strict=True):
            symbol_block(file, ours, theirs, first, before, after)
            # fully connected layers have the same four paths; what joins the frequencies carries one bias
            squeeze = RNG.normal(size=(4, 8)).astype(np.float32)
            file.ours[f"{ours}.se.fc1.weight"] = squeeze
            file.entries[f"arg:{theirs}_se_fc1-h2h_weight"] = squeeze[:, : after[0]]
            if after[1]:
                file.entries[f"arg:{theirs}_se_fc1-l2h_weight"] = squeeze[:, after[0] :]
            file.plain(f"{ours}.se.fc1.bias", f"arg:{theirs}_se_fc1-h2h_bias", 4)
            file.rows(f"{ours}.se.fc2.weight", f"arg:{theirs}_se_fc2-{{}}_weight", after, 4, paths=("h2h", "h2l"))
            file.rows(f"{ours}.se.fc2.bias", f"arg:{theirs}_se_fc2-{{}}_bias", after, paths=("h2h", "h2l"))
        file.check("symbol")

    def test_vanilla_resnet(self) -> None:
        file = Synthetic()
        symbol_ends(file, 8)
        symbol_block(file, "stages.res2.0", "L2_B01", True, HIGH, HIGH)
        symbol_block(file, "stages.res4.11", "L4_B12", False, HIGH, HIGH)
        file.plain("stages.res2.0.se.fc1.weight", "arg:L2_B01_se_fc1_weight", 4, 8)
        file.plain("stages.res2.0.se.fc2.bias", "arg:L2_B01_se_fc2_bias", 8)
        # vanilla files name no frequency, and moving statistics are auxiliary
        file.entries = {re.sub(r"-(h2h|h)_", "_", name): array for name, array in file.entries.items()}
        file.entries = {re.sub("^arg(.*_moving)", r"aux\1", name): array for name, array in file.entries.items()}
        assert "aux:L2_B01_conv4_bn_moving_mean" in file.entries
        file.check("symbol")

    def test_grouped_convolutions(self) -> None:
        """A path of a grouped convolution has in / groups columns of its own input."""
        file = Synthetic()
        file.plain("stem.conv.weight", "arg:conv1_conv_weight", 8, 3, 7, 7)
        file.conv("stages.res2.0.conv2.weight", "arg:L2_B01_conv2_conv-{}_weight", (12, 4), low((3, 1)), kernel=3)
        file.check("symbol")

    def test_all_low(self) -> None:
        file = Synthetic()
        file.conv("stages.res2.1.conv2.weight", "arg:L2_B02_conv2_conv-{}_weight", (0, 6), low((0, 4)), kernel=3)
        assert list(file.entries) == ["arg:L2_B02_conv2_conv-l2l_weight"]
        file.check("symbol")

    def test_octave_densenet(self) -> None:
        """The columns of a concatenation: ours part by part, theirs all highs before all lows."""
        file, stem, grown, moved = Synthetic(), (8, 0), (3, 1), (7, 2)
        symbol_ends(file, 15)
        parts = [stem]
        for stage, prefix, growth in ((2, "res2", grown), (3, "res3", grown), (5, "res5", (4, 0))):
            if stage > 2:
                after = moved if stage == 3 else (9, 0)
                file.norm(f"transitions.{prefix}.bn", f"arg:L{stage}_Trans_conv_bn-{{}}", low(*parts))
                name = f"arg:L{stage}_Trans_conv_conv-{{}}_weight"
                file.conv(f"transitions.{prefix}.conv.weight", name, after, low(*parts))
                parts = [after]
            for block in range(2 if stage < 5 else 1):
                ours, theirs = f"stages.{prefix}.{block}", f"arg:L{stage}_B{block + 1:02d}"
                middle = (growth[0] * 4, growth[1] * 4)
                file.norm(f"{ours}.bn1", f"{theirs}_conv1_bn-{{}}", low(*parts))
                file.conv(f"{ours}.conv1.weight", f"{theirs}_conv1_conv-{{}}_weight", middle, low(*parts))
                file.norm(f"{ours}.bn2", f"{theirs}_conv2_bn-{{}}", low(middle))
                file.conv(f"{ours}.conv2.weight", f"{theirs}_conv2_conv-{{}}_weight", growth, low(middle), kernel=3)
                parts = [*parts, growth]
        channels = sum(map(sum, parts))
        for value in ("gamma", "beta", "moving_mean", "moving_var"):
            del file.entries[f"arg:tail_bn_{value}"]
        file.norm("tail_bn", "arg:tail_bn", low((channels, 0)))
        file.plain("head.fc.weight", "arg:classifier_weight", 10, channels)
        assert file.entries["arg:L3_Trans_conv_conv-l2h_weight"].shape[1] == 2  # of two blocks, behind one another
        file.check("symbol")

    def test_a_densenet_of_other_blocks(self) -> None:
        entries = {
            "arg:conv1_conv_weight": np.zeros((8, 3, 7, 7), np.float32),
            "arg:L2_B01_conv1_conv_weight": np.zeros((4, 9, 1, 1), np.float32),
        }
        own = {
            "stem.conv.weight": (8, 3, 7, 7),
            "stages.res2.0.conv1.weight": (4, 9, 1, 1),
            "transitions.res3.bn.bias": (9,),
        }
        own["stages.res2.0.conv2.weight"] = (1, 4, 3, 3)
        with pytest.raises(WeightsError, match=r"stages.res2.0.conv1.weight is \(4, 9, 1, 1\) .* give 8 channels"):
            to_octvideo(entries, own)

    @pytest.mark.parametrize(
        "blocks",
        [
            {"h2h": (4, 5), "l2h": (3, 3)},  # rows
            {"h2h": (4, 5), "h2l": (2, 6)},  # columns
            {"h2h": (4, 5), "l2h": (4, 3), "h2l": (2, 3), "l2l": (2, 5)},  # columns that add up
            {"h2h": (4, 5), "l2h": (4, 3), "h2l": (2, 5)},  # a missing block
            {"h2h": (), "l2h": (4, 3)},
        ],
    )
    def test_blocks_that_do_not_fit(self, blocks: dict[str, tuple[int, ...]]) -> None:
        entries = {
            f"arg:L2_B01_conv1_conv-{path}_weight": np.zeros(shape, np.float32) for path, shape in blocks.items()
        }
        with pytest.raises(WeightsError, match=r"do not fit together: L2_B01_conv1_conv-h2h_weight \("):
            to_octvideo(entries, {"stages.res2.0.conv1.weight": (6, 8)})

    def test_the_authors_network(self, mxnet_data: Path) -> None:
        """All of an octave ResNet-50 that MXNet wrote, under names and shapes that the test makes from the file's itself."""
        entries = read_params(mxnet_data / "octresnet50_a0.125_w0.25-0000.params")
        assert (sum(n.startswith("arg:") for n in entries), sum(n.startswith("aux:") for n in entries)) == (371, 192)
        own = own_shapes(entries)
        weights, coverage = to_octvideo(entries, own)
        assert coverage.complete, coverage.table()
        assert len(weights) == len(coverage.matched) == len(own) == 271
        weight = weights["stages.res3.1.conv2.weight"].numpy()
        blocks = {path: entries[f"arg:L3_B02_conv2_conv-{path}_weight"] for path in ("h2h", "l2h", "h2l", "l2l")}
        assert np.array_equal(weight, four(blocks))

    def test_the_authors_logits(self, mxnet_data: Path) -> None:
        """The network of that file, built here, gives what MXNet computed with it."""
        entries = read_params(mxnet_data / "octresnet50_a0.125_w0.25-0000.params")
        spec = with_octave(NETWORKS["resnet50"](num_classes=1000), 0.125)
        narrow = tuple(replace(stage, width=stage.width // 4) for stage in spec.stages)
        network = create(replace(spec, stages=narrow)).eval()
        weights, coverage = to_octvideo(entries, {name: value.shape for name, value in network.state_dict().items()})
        assert coverage.complete, coverage.table()
        network.load_state_dict(weights, strict=False)
        with np.load(mxnet_data / "octresnet50_a0.125_w0.25_io.npz") as io, torch.no_grad():
            x, y = io["x"], io["y"]
            error = np.abs(network(torch.from_numpy(x)).numpy() - y).max() / np.abs(y).max()
        assert error < 1e-5


def four(blocks: dict[str, np.ndarray]) -> np.ndarray:
    high, width = blocks["h2h"].shape[:2]
    out, into = high + len(blocks["l2l"]), width + blocks["l2l"].shape[1]
    whole = np.empty((out, into, *blocks["h2h"].shape[2:]), np.float32)
    whole[:high, :width], whole[:high, width:] = blocks["h2h"], blocks["l2h"]
    whole[high:, :width], whole[high:, width:] = blocks["h2l"], blocks["l2l"]
    return whole


def own_shapes(entries: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Our names and shapes of a symbol ResNet: rows of all that goes to a frequency, columns of all that comes from one."""
    values = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}
    layers = {"conv4_conv": "projection", "conv4_bn": "projection_bn"}
    rows: dict[str, dict[str, int]] = {}
    columns: dict[str, dict[str, int]] = {}
    rest: dict[str, tuple[int, ...]] = {}
    for name, array in entries.items():
        name = name.split(":")[1]
        if match := re.fullmatch(r"L(\d)_B(\d\d)_(conv(\d)_(conv|bn))-(\w)(?:2(\w))?_(\w+)", name):
            layer = layers.get(match[3], f"{match[5]}{match[4]}")
            name = f"stages.res{match[1]}.{int(match[2]) - 1}.{layer}.{values.get(match[8], match[8])}"
            source, target = (match[6], match[7]) if match[7] else ("", match[6])
        else:
            layer, value = re.fullmatch(r"(conv1_conv|conv1_bn|tail_bn|classifier)_(\w+)", name).groups()
            layer = {"conv1_conv": "stem.conv", "conv1_bn": "stem.bn", "classifier": "head.fc"}.get(layer, layer)
            name, source, target = f"{layer}.{values.get(value, value)}", "", ""
        rows.setdefault(name, {})[target] = array.shape[0]
        columns.setdefault(name, {})[source] = array.shape[1] if array.ndim > 1 else 0
        rest[name] = array.shape[2:]
    return {
        name: (sum(rows[name].values()), *([total] if (total := sum(columns[name].values())) else []), *rest[name])
        for name in rows
    }


def gluon_norm(file: Synthetic, ours: str, theirs: str, channels: np.ndarray) -> None:
    file.norm(ours, theirs, channels, "running_mean", "running_var", ".")


def gluon_classifier(file: Synthetic, channels: int) -> None:
    file.plain("head.fc.weight", "classifer.weight", 10, channels, stored=(10, channels, 1, 1))
    file.plain("head.fc.bias", "classifer.bias", 10)


def gluon_stem(file: Synthetic, *places: str) -> None:
    """places: where the convolutions stand, 'conv1.0' and so on; their norms follow at once."""
    for index, place in enumerate(places, start=1):
        suffix = "" if index == 1 else str(index)
        block, number = place.split(".")
        file.plain(f"stem.conv{suffix}.weight", f"{place}.weight", 8, 3 if index == 1 else 8, 3, 3)
        gluon_norm(file, f"stem.bn{suffix}", f"{block}.{int(number) + 1}", low(HIGH))


def gluon_block(file: Synthetic, ours: str, theirs: str, splits: list[tuple[int, int]], first: bool = True) -> None:
    for number in (1, 2, 3):
        kernel = 3 if number == 2 else 1
        path = f"{theirs}.conv{number}.conv_{{}}.weight"
        file.conv(f"{ours}.conv{number}.weight", path, splits[number], low(splits[number - 1]), kernel)
        gluon_norm(file, f"{ours}.bn{number}", f"{theirs}.bn{number}.bn_{{}}", low(splits[number]))
    if first:
        file.conv(f"{ours}.projection.weight", f"{theirs}.conv4.conv_{{}}.weight", splits[3], low(splits[0]))
        gluon_norm(file, f"{ours}.projection_bn", f"{theirs}.bn4.bn_{{}}", low(splits[3]))


class TestGluonNames:
    def test_v1b(self) -> None:
        file = Synthetic()
        gluon_stem(file, "conv1.0")
        gluon_block(file, "stages.res2.0", "L1_B0", [HIGH, MIXED, MIXED, MIXED])
        gluon_block(file, "stages.res4.12", "L3_B12", [MIXED, MIXED, MIXED, MIXED], first=False)
        gluon_block(file, "stages.res5.0", "L4_B0", [MIXED, HIGH, HIGH, HIGH])
        gluon_classifier(file, 8)
        file.check("gluon")

    def test_vanilla_v1b_without_a_frequency(self) -> None:
        file = Synthetic()
        gluon_stem(file, "conv1.0")
        gluon_block(file, "stages.res2.0", "L1_B0", [HIGH] * 4)
        gluon_classifier(file, 8)
        file.entries = {name.replace(".conv_h2h", "").replace(".bn_h", ""): a for name, a in file.entries.items()}
        assert {"L1_B0.conv1.weight", "L1_B0.bn1.gamma"} <= file.entries.keys()
        file.check("gluon")

    def test_v1e_with_squeeze_and_input_norms(self) -> None:
        file = Synthetic()
        gluon_stem(file, "conv1.0", "conv1.3", "conv1.6")
        for ours, theirs, before in (("stages.res2.0", "L1_B0", HIGH), ("stages.res3.0", "L2_B0", MIXED)):
            gluon_block(file, ours, theirs, [before, MIXED, MIXED, MIXED])
            file.plain(f"{ours}.se.fc1.weight", f"{theirs}.se_block.conv1.weight", 2, 8, stored=(2, 8, 1, 1))
            file.plain(f"{ours}.se.fc1.bias", f"{theirs}.se_block.conv1.bias", 2)
            file.rows(f"{ours}.se.fc2.weight", f"{theirs}.se_block.conv2_{{}}.weight", MIXED, 2)
            file.rows(f"{ours}.se.fc2.bias", f"{theirs}.se_block.conv2_{{}}.bias", MIXED)
            for name, other in (("input_bn", "bn1a"), ("projection_input_bn", "bn4a")):
                gluon_norm(file, f"{ours}.{name}", f"{theirs}.{other}.bn_{{}}", low(before))
                # scale and shift are stored, but fixed, and we have none
                del file.ours[f"{ours}.{name}.weight"], file.ours[f"{ours}.{name}.bias"]
        gluon_classifier(file, 8)
        file.entries = {n: a[..., None, None] if "conv2_" in n and a.ndim == 2 else a for n, a in file.entries.items()}
        file.check("gluon")

    def test_v1f_stem(self) -> None:
        file = Synthetic()
        gluon_stem(file, "conv1.0", "conv1.3", "conv1.6")
        for number, (conv, norm) in enumerate(
            [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("projection", "projection_bn")]
        ):
            file.plain(f"stem.bottleneck.{conv}.weight", f"conv2.conv{number + 1}.weight", 8, 8, 1, 1)
            gluon_norm(file, f"stem.bottleneck.{norm}", f"conv2.bn{number + 1}", low(HIGH))
        gluon_block(file, "stages.res2.0", "L1_B0", [HIGH] * 4)
        file.check("gluon")

    @pytest.mark.parametrize("places", [("conv1.0", "conv2.0"), ("conv1.0", "conv1.3", "conv1.6", "conv2.0")])
    def test_a_convolution_in_the_place_of_the_pool(self, places: tuple[str, ...]) -> None:
        file = Synthetic()
        gluon_stem(file, *places)
        file.check("gluon")

    def test_half_precision(self) -> None:
        file = Synthetic()
        gluon_stem(file, "conv1.0")
        file.entries = {name: array.astype(np.float16) for name, array in file.entries.items()}
        file.ours = {name: array.astype(np.float16).astype(np.float32) for name, array in file.ours.items()}
        file.check("gluon")

    def test_mobilenet_v1(self) -> None:
        """Their first stage counts its blocks from 1, the others from 0."""
        file = Synthetic()
        gluon_stem(file, "conv1.0")
        blocks = [
            ("stages.res1.0", "L1_B1", HIGH, MIXED),
            ("stages.res2.0", "L2_B0", MIXED, MIXED),
            ("stages.res4.5", "L4_B5", MIXED, HIGH),
        ]
        for ours, theirs, before, after in blocks:
            file.rows(f"{ours}.conv1.weight", f"{theirs}.conv1.conv_{{}}.weight", before, 1, 3, 3, paths=("h2h", "l2l"))
            gluon_norm(file, f"{ours}.bn1", f"{theirs}.bn1.bn_{{}}", low(before))
            file.conv(f"{ours}.conv2.weight", f"{theirs}.conv2.conv_{{}}.weight", after, low(before))
            gluon_norm(file, f"{ours}.bn2", f"{theirs}.bn2.bn_{{}}", low(after))
        gluon_classifier(file, 8)
        file.check("gluon")

    def test_mobilenet_v2(self) -> None:
        file = Synthetic()
        gluon_stem(file, "conv1.0")
        inner = (12, 4)
        for ours, theirs in (("stages.res1.0", "L1_B1"), ("stages.res2.0", "L2_B0"), ("stages.res4.6", "L4_B6")):
            file.conv(f"{ours}.conv1.weight", f"{theirs}.conv1.conv_{{}}.weight", inner, low(HIGH))
            gluon_norm(file, f"{ours}.bn1", f"{theirs}.bn1.bn_{{}}", low(inner))
            file.rows(f"{ours}.conv2.weight", f"{theirs}.conv2.conv_{{}}.weight", inner, 1, 3, 3, paths=("h2h", "l2l"))
            gluon_norm(file, f"{ours}.bn2", f"{theirs}.bn2.bn_{{}}", low(inner))
            file.conv(f"{ours}.conv3.weight", f"{theirs}.conv3.conv_{{}}.weight", HIGH, low(inner))
            gluon_norm(file, f"{ours}.bn3", f"{theirs}.bn3.bn_{{}}", low(HIGH))
        file.plain("tail.conv.weight", "tail.0.weight", 8, 8, 1, 1)
        gluon_norm(file, "tail.bn", "tail.1", low(HIGH))
        gluon_classifier(file, 8)
        file.check("gluon")


def test_what_a_file_does_not_give_and_what_nobody_takes() -> None:
    entries = {"arg:conv1_conv_weight": np.zeros((8, 3, 7, 7)), "arg:L2_B01_conv5_conv_weight": np.zeros(1)}
    coverage = to_octvideo(entries, {"stem.conv.weight": (8, 3, 3, 3), "stages.res3.nonlocal1.theta.bias": (4,)})[1]
    assert coverage.mismatched == (("stem.conv.weight", (8, 3, 7, 7), (8, 3, 3, 3)),)
    assert coverage.missing == ("stages.res3.nonlocal1.theta.bias",)
    assert coverage.unexpected == ("arg:L2_B01_conv5_conv_weight",)


def test_an_unknown_layout() -> None:
    with pytest.raises(WeightsError, match=r"unknown layout \(0, 1, ...\); known are OctConv's"):
        to_octvideo({"0": np.zeros(1), "1": np.zeros(1)}, {})


SYMBOL = ("resnet26", "resnext50_32x4d", "se_resnet50", "densenet121")
GLUON = (
    "resnet50_v1b",
    "resnet152_v1f",
    "se_resnet152_v1e",
    "mobilenet_v1_0.75",
    "mobilenet_v2_1.125",
    "resnext50_32x4d_bl",
)


def released(network: nn.Module, place_of: Callable[[str], Place | None]) -> dict[str, np.ndarray]:
    """A network's weights as the authors' code would have written them, by what each layer says of its channels."""
    entries = {}
    modules = dict(network.named_modules())
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        place = place_of(name)
        assert place, name
        template, grid = place
        if not name.startswith(("stages", "transitions")):  # outside them no frequency is named
            entries[template.format("")] = value.numpy()
            continue
        array, rows, columns, depthwise = split(name, value.numpy(), modules)
        for r, part in enumerate(np.split(array, [rows])):
            if len(grid) == 1:
                cells = {grid[0][0]: array}
            elif depthwise:
                cells = {grid[r][r]: part}
            elif columns is not None:
                cells = dict(zip(grid[r], np.split(part, [columns], axis=1), strict=True))
            else:
                cells = {grid[r][0]: part}
            entries.update({template.format(path): cell for path, cell in cells.items() if cell.size})
    return entries


def split(name: str, array: np.ndarray, modules: dict[str, nn.Module]) -> tuple[np.ndarray, int, int | None, bool]:
    """The array in the order of the files, its rows and columns of high frequency, and whether it is depthwise."""
    module = modules[name.rpartition(".")[0]]
    if isinstance(module, OctConv2d):
        array = array if module.in_order is None else array[:, module.in_order]
        return array, module.out_high, module.in_high // module.groups, module.depthwise
    if isinstance(module, OctBatchNorm2d):
        return array if module.order is None else array[module.order], module.high, None, False
    high = modules[name.split(".se.")[0]].conv3.out_high
    return array, high if ".fc2." in name else len(array), high if name.endswith("fc1.weight") else None, False


@pytest.mark.parametrize("name", [*SYMBOL, *GLUON])
@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_every_kind_of_network_there_and_back(name: str, alpha: float) -> None:
    torch.manual_seed(0)
    network = create(with_octave(cut(NETWORKS[name](7)), alpha))
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.normal_()
    stem_convs = sum(key.startswith("stem.conv") for key in network.state_dict())
    place_of = symbol_place if name in SYMBOL else partial(gluon_place, mobile="mobile" in name, stem_convs=stem_convs)
    entries = released(network, place_of)
    assert layout_of(entries) == ("symbol" if name in SYMBOL else "gluon")
    weights, coverage = to_octvideo(entries, {key: value.shape for key, value in network.state_dict().items()})
    assert coverage.complete, coverage.table()
    for key, value in network.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(weights[key], value), key
