"""Every back end and every file against the network itself; what they cannot do; files that are whole or not there."""

import copy
import importlib.util
import json
import re
import resource
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octvideo import deploy
from octvideo.deploy import BackendError, ExportError
from octvideo.models import NETWORKS, SlowFastSpec, with_octave
from octvideo.octave import OctBatchNorm2d, OctBatchNorm3d, OctConv2d, OctConv3d, fuse, global_average_pool, lift

from .models.shallow import cut
from .models.test_fuse import KINDS, network

ROOT = Path(__file__).parents[1]


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


ORT = pytest.param("onnxruntime", marks=needs("onnxruntime", "onnxscript"))
OPENVINO = pytest.param("openvino", marks=needs("openvino", "onnxscript"))
BFLOAT16 = pytest.mark.skipif(not deploy.has_bfloat16(), reason="this CPU has no bfloat16")
CLIP, IMAGE = (3, 5, 13, 11), (3, 13, 11)  # odd in every dimension


class Small(nn.Module):
    """Two frequencies, a shortcut, a stride, norms in front of and behind an activation."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv, norm = (OctConv3d, OctBatchNorm3d) if dims == 3 else (OctConv2d, OctBatchNorm2d)
        self.conv1, self.bn1 = conv(3, 8, 3, padding=1, alpha_out=0.25), norm(8, alpha=0.25)
        self.conv2, self.bn2 = conv(8, 8, 3, padding=1, alpha_in=0.25, alpha_out=0.25), norm(8, alpha=0.25)
        self.conv3 = conv(8, 12, 1, 2, alpha_in=0.25)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = lift(self.relu, self.bn1(self.conv1(x)))
        y = lift(self.relu, lift(torch.add, self.bn2(self.conv2(y)), y))
        return self.fc(global_average_pool(self.conv3(y)))


def small(dims: int) -> nn.Module:
    torch.manual_seed(dims)
    model = Small(dims)
    for norm in (model.bn1, model.bn2):
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return fuse(model)


@pytest.fixture(scope="module")
def exports() -> dict[Any, Any]:
    return {}


@pytest.fixture
def shared(exports: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An export to ONNX takes a second: one for each `small` network and size, whatever runs it."""
    export = deploy._onnx

    def once(model: nn.Module, clip: Tensor, extra: str, *, any_batch: bool) -> Any:
        key = (*clip.shape, any_batch)
        if key not in exports:
            exports[key] = export(model, clip, extra, any_batch=any_batch)
        return copy.deepcopy(exports[key])

    monkeypatch.setattr(deploy, "_onnx", once)


def clips(count: int, *size: int) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(count))


def difference(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> float:
    """Of the logits, relative to the network's largest one."""
    with torch.no_grad():
        expected = model(x)
    found = run(x)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("size", [CLIP, IMAGE], ids=["clip", "image"])
@pytest.mark.parametrize("backend", ["eager", ORT, OPENVINO])
def test_a_back_end_gives_the_networks_logits(backend: str, size: tuple[int, ...]) -> None:
    model, x = small(len(size) - 1), clips(2, *size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = deploy.runner(model, x, backend, threads=2)
    assert difference(run, model, x) < 1e-4
    assert difference(run, model, x + 1) < 1e-4  # not the example's answer
    assert difference(run, model, x.movedim(1, -1).contiguous().movedim(-1, 1)) < 1e-4  # channels last
    after = model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert all(value.stride() == before[name].stride() for name, value in after.items())
    assert torch.get_num_threads() == 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [CLIP, IMAGE], ids=["clip", "image"])
def test_compiled_code_gives_the_networks_logits(size: tuple[int, ...]) -> None:
    model, x = small(len(size) - 1), clips(2, *size)
    run = deploy.runner(model, x, "compile", threads=1)
    assert difference(run, model, x) < 1e-4
    with torch.inference_mode():
        assert difference(run, model, x + 1) < 1e-4
    assert torch.get_num_threads() == 1 and not deploy.inductor_config.freezing


@pytest.mark.slow
def test_compiled_weights_are_constants() -> None:
    """In the code that inductor writes, the clip is the only argument, and kernels are packed."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        _, (code,) = run_and_get_code(lambda: deploy.runner(small(2), clips(2, *IMAGE), "compile", threads=1))
    assert re.search(r"^ +arg\d+_1, = args$", code, re.M) and "_frozen_param" in code
    assert "torch.ops.mkldnn._convolution_pointwise" in code


@BFLOAT16
@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("backend", ["eager", pytest.param("compile", marks=pytest.mark.slow), OPENVINO])
def test_bfloat16_is_near(backend: str) -> None:
    model, x = small(3), clips(2, *CLIP)
    run = deploy.runner(model, x, backend, threads=1, dtype=torch.bfloat16)
    assert 1e-5 < difference(run, model, x) < 2e-2  # above: it is really bfloat16


@pytest.mark.parametrize(
    ("backend", "options", "text"),
    [
        ("tensorrt", {}, "unknown back end 'tensorrt'; choose from eager, compile, onnxruntime, openvino"),
        ("eager", {"threads": 0}, "0 threads; give 1 or more"),
        ("openvino", {"dtype": torch.float16}, "torch.float16 on a CPU; choose from torch.float32, torch.bfloat16"),
        ("onnxruntime", {"dtype": torch.bfloat16}, "onnxruntime has no bfloat16 on CPUs; take openvino or compile"),
    ],
)
def test_what_no_back_end_can_do(backend: str, options: dict, text: str) -> None:
    with pytest.raises(BackendError, match=text):
        deploy.runner(small(2), clips(1, *IMAGE), backend, **{"threads": 1, **options})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 xsave", True),
        ("flags\t\t: fpu amx_bf16 amx_tile", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", False),
        ("Features\t: fp asimd i8mm bf16", True),
        ("Features\t: fp asimd", False),
        ("", False),
    ],
)
def test_bfloat16_of_a_cpu(line: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "CPU_INFO", tmp_path / "cpuinfo")
    assert not deploy.has_bfloat16()  # no such file
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: with bf16 in its name\n{line}\n")
    assert deploy.has_bfloat16() is expected
    if not expected:
        with pytest.raises(BackendError, match="this CPU has no bfloat16 .*; take float32"):
            deploy.runner(small(2), clips(1, *IMAGE), "openvino", threads=1, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("package", "backend"),
    [("onnxruntime", "onnxruntime"), ("openvino", "openvino"), ("onnxscript", "openvino"), ("onnx", "openvino")],
)
def test_a_missing_package(package: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if package.startswith("onnx") and backend == "openvino":
        pytest.importorskip("openvino")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match=rf"needs the package {package} .*pip install 'octvideo\[{backend}\]'"):
        deploy.runner(small(2), clips(1, *IMAGE), backend, threads=1)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy.shutil, "which", lambda name: None)
    with pytest.raises(BackendError, match="compile needs a C\\+\\+ compiler.*name one in CXX"):
        deploy.runner(small(2), clips(1, *IMAGE), "compile", threads=1)


def test_another_input_than_the_runner_was_made_for() -> None:
    run = deploy.runner(small(2), clips(2, *IMAGE), "eager", threads=1)
    for x in (clips(1, *IMAGE), clips(2, 3, 12, 11), clips(2, *IMAGE).double(), clips(2, *IMAGE).byte()):
        with pytest.raises(ValueError, match=r"made for float32 clips \[2, 3, 13, 11\], but got"):
            run(x)


# Files ------------------------------------------------------------------------------------------------------------

FACTS = {"classes": json.dumps(["jump", "<b>&\"'", "ä\n"]), "num_frames": "5", "plain": "größe"}
FORMATS = [
    pytest.param(".onnx", marks=needs("onnxruntime", "onnxscript")),
    ".pt2",
    pytest.param(".xml", marks=needs("openvino", "onnxscript")),
]


def facts_of(path: Path) -> dict[str, str]:
    """As a user reads them, without octvideo."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        assert [i.name for i in session.get_inputs()] == ["clip"] and [o.name for o in session.get_outputs()] == [
            "logits"
        ]
        assert session.get_inputs()[0].shape == ["batch", *CLIP] and session.get_outputs()[0].shape == ["batch", 5]
        facts = session.get_modelmeta().custom_metadata_map
        return {name: text for name, text in facts.items() if not name.startswith("pkg.torch")}
    if path.suffix == ".pt2":
        files = {"metadata.json": ""}
        torch.export.load(path, extra_files=files)
        return json.loads(files["metadata.json"])
    import openvino

    network = openvino.Core().read_model(path)
    assert network.input("clip").partial_shape.to_string() == "[?,3,5,13,11]"
    assert network.output("logits").partial_shape.to_string() == "[?,5]"
    return dict(network.get_rt_info(["octvideo"]).value)


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_of_any_number_of_clips(suffix: str, tmp_path: Path) -> None:
    model = small(3)
    path = tmp_path / "new folder" / f"net{suffix}"
    files = deploy.export(model, clips(1, *CLIP), path, metadata=FACTS)
    assert sorted(path.parent.iterdir()) == sorted(files) and files[-1] == path
    assert [file.suffix for file in files] == ([".bin", ".xml"] if suffix == ".xml" else [suffix])
    run = deploy.load(path, threads=1)
    for count in (1, 2, 3):
        assert difference(run, model, clips(count, *CLIP)) < 1e-4
    assert facts_of(path) == FACTS
    contents = [file.read_bytes() for file in files]
    if suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:
            contents = [archive.read(name) for name in archive.namelist()]
    assert not any(str(ROOT).encode() in content for content in contents)  # no path of this machine


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 4 * 4, 300)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """As on a full disk: writes beyond it fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_failed_write_leaves_what_was_there(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{suffix}"
    before = {file: f"{file.name} of before" for file in {path, path.with_suffix(".bin")}}
    for file, text in before.items():
        file.write_text(text)

    def refuse(unfinished: Path) -> None:
        assert difference(deploy.load(unfinished, threads=1), tiny, clips(3, 3, 4, 4)) < 1e-4
        raise ExportError("not good enough")

    tiny = Tiny()
    with no_file_above(20_000), pytest.raises(ExportError, match=rf"net\{suffix}: could not be written"):
        deploy.export(tiny, clips(1, 3, 4, 4), path)
    if suffix == ".pt2":  # of each exporter once is enough
        with pytest.raises(ExportError, match="not good enough"):
            deploy.export(tiny, clips(1, 3, 4, 4), path, check=refuse)
    assert {file: file.read_text() for file in tmp_path.iterdir()} == before


def test_a_pair_never_mixes_two_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted between the two: there is no .xml, rather than an old one beside a new .bin."""
    path, new = tmp_path / "net.xml", tmp_path / "new"
    new.mkdir()
    for folder in (tmp_path, new):
        for suffix in (".bin", ".xml"):
            (folder / f"net{suffix}").write_text(folder.name)
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if self.suffix == ".xml":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deploy._put(sorted(new.iterdir()), path)
    assert not path.exists() and path.with_suffix(".bin").read_text() == "new"


def test_formats_that_are_none(tmp_path: Path) -> None:
    for name in ("net.trt", "net"):
        with pytest.raises(BackendError, match=r"no format is known for .*; choose from \.onnx, \.pt2, \.xml"):
            deploy.export(small(2), clips(1, *IMAGE), tmp_path / name)
    with pytest.raises(BackendError, match=r"choose from \.onnx, \.pt2, \.xml"):
        deploy.load(tmp_path / "net.pt", threads=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", FORMATS)
def test_files_that_are_no_networks(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{suffix}"
    with pytest.raises(ExportError, match="no such file"):
        deploy.load(path, threads=1)
    for content in (b"", b"\x08\x0a\x12\x07pytorch" * 40):
        path.write_bytes(content)
        with pytest.raises(ExportError, match="not a whole file of its format"):
            deploy.load(path, threads=1)


class Branches(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_a_network_that_no_exporter_can_follow(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="torch.export cannot export this network \\(.*data-dependent"):
        deploy.export(Branches(), clips(1, 3, 4, 4), tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs("onnxruntime", "openvino", "onnxscript")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_network_in_onnx_runtime_and_openvino(name: str, tmp_path: Path) -> None:
    spec = with_octave(cut(NETWORKS[name](8), keep=1), 0.25)
    model = network(spec)
    video = isinstance(spec, SlowFastSpec) or spec.dims == 3
    size = (3, 8, 38, 46) if video else (3, 70, 54)
    deploy.export(fuse(model), clips(1, *size), tmp_path / "net.onnx")
    openvino = importlib.import_module("openvino").Core().read_model(tmp_path / "net.onnx")
    for run in (
        deploy.load(tmp_path / "net.onnx", threads=1),
        deploy._compiled_model(openvino, 1, torch.float32),
    ):
        for count in (1, 3):
            assert difference(run, model, clips(count, *size)) < 1e-4
