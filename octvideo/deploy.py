"""Networks on CPUs: one function of clips for each back end, and files for programs that have no octvideo.

`runner` turns a network into a function of one fixed input size. `export` writes a file of any batch size, `load` runs one.
All three are at their best with what `octvideo.octave.fuse` returned, and take any network.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from octvideo.errors import RunError, UserError
from octvideo.octave.onednn import use_onednn
from octvideo.octave.resample import frames_as_channels

BACKENDS = ("eager", "compile", "onnxruntime", "openvino")
DTYPES = (torch.float32, torch.bfloat16)
FORMATS = (".onnx", ".pt2", ".xml")
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the dimensions of a tensor
METADATA = "metadata.json"  # in a .pt2
RT_INFO = "octvideo"  # in an .xml
CPU_INFO = Path("/proc/cpuinfo")

Run = Callable[[Tensor], Tensor]


class BackendError(UserError, RuntimeError):
    """What a back end, this machine or what is installed on it cannot do; the message says what can be done."""


class ExportError(RunError, RuntimeError):
    """A network that cannot be exported, or a file that cannot be written or read; the message says which and why."""


def runner(
    model: nn.Module, clip: Tensor, backend: str, *, threads: int, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor], Tensor]:
    """The network as a function: float32 clips of the shape of `clip` -> float32 logits [N, K].

    model: left as it is; what runs is a copy for inference. clip: an example, [N, C, T, H, W] or [N, C, H, W].
    threads: of each call, whatever the rest of the process uses. dtype: of weights and maps inside.
    With "compile" this takes up to minutes, in which C++ is compiled.
    Raises BackendError for an unknown back end, one that is not installed, or a dtype that it or this CPU lacks.
    """
    _check(backend, threads, dtype)
    make = {"eager": _eager, "compile": _compile, "onnxruntime": _onnxruntime, "openvino": _openvino}[backend]
    run, shape = make(model, clip, threads, dtype), clip.shape

    def checked(clips: Tensor) -> Tensor:
        if clips.shape != shape or clips.dtype != torch.float32:
            raise ValueError(
                f"this runner was made for float32 clips {list(shape)}, but got {clips.dtype} {list(clips.shape)}; "
                "make another one"
            )
        return run(clips)

    return checked


def export(
    model: nn.Module,
    clip: Tensor,
    path: Path,
    *,
    metadata: Mapping[str, str] = MappingProxyType({}),
    check: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Write the network as FILE.onnx, FILE.pt2 (torch.export) or FILE.xml with FILE.bin (OpenVINO); the files written.

    clip: an example, [N, C, T, H, W] or [N, C, H, W]; every size but N becomes part of the file. In .onnx and .xml the input
    is named `clip`, the output `logits`. metadata: text by name, for whoever runs the file. check: is given the file before
    it takes its place, and raises where it is of no use.
    Files are whole or not there: an old .xml and a new .bin never lie side by side.
    Raises BackendError for another suffix or what is not installed, ExportError for a network that no exporter can follow
    or where nothing can be written.
    """
    check_format(path)
    save = {".onnx": _save_onnx, ".pt2": _save_pt2, ".xml": _save_xml}[path.suffix]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            save(model, clip, unfinished, metadata)
            if check:
                check(unfinished)
            return _put(sorted(Path(folder).iterdir()), path)
    except OSError as error:
        raise ExportError(f"{path}: could not be written ({error.strerror or error})") from error


def load(path: Path, *, threads: int) -> Callable[[Tensor], Tensor]:
    """What `export` wrote as a function: float32 clips of its size, any number of them -> float32 logits [N, K].

    Of other people's files, read only .onnx and .xml: torch does not promise that a .pt2 is harmless.
    Raises BackendError for another suffix or what is not installed, ExportError for a file that is none or not whole.
    """
    check_format(path)
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    read = {".onnx": _load_onnx, ".pt2": _load_pt2, ".xml": _load_xml}[path.suffix]
    return read(path, threads)


def check_format(path: Path) -> None:
    """Raises BackendError for a suffix that is none of FORMATS."""
    if path.suffix not in FORMATS:
        raise BackendError(f"{path}: no format is known for {path.suffix!r}; choose from {', '.join(FORMATS)}")


def has_bfloat16() -> bool:
    """Has this CPU instructions for bfloat16? Without them it is emulated, slower than float32. Known on Linux alone."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return False
    words = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def _check(backend: str, threads: int, dtype: torch.dtype) -> None:
    if backend not in BACKENDS:
        raise BackendError(f"unknown back end {backend!r}; choose from {', '.join(BACKENDS)}")
    if threads < 1:
        raise BackendError(f"{threads} threads; give 1 or more")
    if dtype not in DTYPES:
        raise BackendError(f"{dtype} on a CPU; choose from {', '.join(map(str, DTYPES))}")
    if dtype == torch.bfloat16:
        if backend == "onnxruntime":
            raise BackendError("onnxruntime has no bfloat16 on CPUs; take openvino or compile, or float32")
        if not has_bfloat16():
            raise BackendError(
                f"this CPU has no bfloat16 (no avx512_bf16, amx_bf16, ARM bf16 in {CPU_INFO}); take float32"
            )


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendError(f"{extra} needs the package {name} ({error}); pip install 'octvideo[{extra}]'") from None


# torch ------------------------------------------------------------------------------------------------------------


def _eager(model: nn.Module, clip: Tensor, threads: int, dtype: torch.dtype) -> Run:
    model = _channels_last(model, dtype)
    if threads == 1:
        use_onednn(model)
    return _in_torch(model, threads, dtype)


def _compile(model: nn.Module, clip: Tensor, threads: int, dtype: torch.dtype) -> Run:
    compiler = inductor_config.cpp.cxx[1]
    if not shutil.which(compiler):
        raise BackendError(f"compile needs a C++ compiler, and there is no {compiler!r} here; name one in CXX")
    compiled = torch.compile(_channels_last(model, dtype), dynamic=False)

    def frozen(clips: Tensor) -> Tensor:
        # Weights become constants in the layout that the convolutions want. As an option of torch.compile it would come
        # too late: they would be inputs already. A call that compiles reads it; any may, e.g. in inference mode.
        with inductor_config.patch(freezing=True):
            return compiled(clips)

    run = _in_torch(frozen, threads, dtype)
    run(clip)
    return run


def _channels_last(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy for inference."""
    model = copy.deepcopy(model).eval().requires_grad_(False).to(dtype)
    for weight in model.parameters():
        if weight.dim() in LAYOUTS:
            weight.data = weight.data.contiguous(memory_format=LAYOUTS[weight.dim()])
    return model


def _in_torch(network: Run, threads: int, dtype: torch.dtype) -> Run:
    def run(clips: Tensor) -> Tensor:
        with torch.no_grad(), _torch_threads(threads):
            return network(clips.to(dtype, memory_format=LAYOUTS[clips.dim()])).float()

    return run


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _program(model: nn.Module, clip: Tensor, *, any_batch: bool) -> torch.export.ExportedProgram:
    shapes = None
    if any_batch:
        clip = torch.cat([clip[:1]] * 2)  # a batch of 1 would be taken for a constant
        shapes = ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad(), _exporting("torch.export"):
        program = torch.export.export(copy.deepcopy(model).eval().requires_grad_(False), (clip,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names files of this machine
    return program


@contextlib.contextmanager
def _exporting(exporter: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the exporters' own have no other common base
        reason: BaseException = error
        while reason.__cause__:  # the first error has the reason, those around it advice
            reason = reason.__cause__
        raise ExportError(f"{exporter} cannot export this network ({_brief(reason)})") from error


def _save_pt2(model: nn.Module, clip: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    content = io.BytesIO()  # given a path, torch ends the process where the disk is full
    extra_files = {METADATA: json.dumps(dict(metadata), ensure_ascii=False)}
    torch.export.save(_program(model, clip, any_batch=True), content, extra_files=extra_files)
    path.write_bytes(content.getbuffer())


def _load_pt2(path: Path, threads: int) -> Run:
    def read() -> nn.Module:
        with zipfile.ZipFile(path) as archive:  # torch itself compares no checksums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged} does not agree")
        return torch.export.load(path).module()

    module = _reading(path, read)

    def run(clips: Tensor) -> Tensor:
        with torch.no_grad(), _torch_threads(threads):
            return module(clips)

    return run


# ONNX -------------------------------------------------------------------------------------------------------------


def _onnx(model: nn.Module, clip: Tensor, extra: str, *, any_batch: bool) -> Any:
    """onnx's ModelProto."""
    for name in ("onnx", "onnxscript"):
        _package(name, extra)
    # ONNX Runtime pools and upsamples images much faster than clips, OpenVINO the other way round.
    with frames_as_channels() if extra == "onnxruntime" else contextlib.nullcontext():
        traced = _program(model, clip, any_batch=any_batch)
    with _quiet(), _exporting("torch.onnx"):
        program = torch.onnx.export(
            traced,
            dynamo=True,
            input_names=["clip"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},) if any_batch else None,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of itself."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _onnxruntime(model: nn.Module, clip: Tensor, threads: int, dtype: torch.dtype) -> Run:
    _package("onnxruntime", "onnxruntime")
    return _session(_onnx(model, clip, "onnxruntime", any_batch=False).SerializeToString(), threads)


def _session(source: bytes | str, threads: int) -> Run:
    onnxruntime = _package("onnxruntime", "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def run(clips: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"clip": clips.detach().contiguous().numpy()})
        return torch.from_numpy(logits)

    return run


def _save_onnx(model: nn.Module, clip: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    proto = _onnx(model, clip, "onnxruntime", any_batch=True)
    for name, text in metadata.items():
        proto.metadata_props.add(key=name, value=text)
    path.write_bytes(proto.SerializeToString())


def _load_onnx(path: Path, threads: int) -> Run:
    return _reading(path, lambda: _session(str(path), threads))


# OpenVINO ---------------------------------------------------------------------------------------------------------


def _openvino(model: nn.Module, clip: Tensor, threads: int, dtype: torch.dtype) -> Run:
    core = _package("openvino", "openvino").Core()
    return _compiled_model(
        core.read_model(_onnx(model, clip, "openvino", any_batch=False).SerializeToString()), threads, dtype
    )


def _compiled_model(source: Any, threads: int, dtype: torch.dtype) -> Run:
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],  # its default is the fastest
        "ENABLE_CPU_PINNING": False,  # pinned, several processes of one thread each would all lie on the first core
    }
    compiled = _package("openvino", "openvino").Core().compile_model(source, "CPU", hints)

    def run(clips: Tensor) -> Tensor:
        return torch.from_numpy(compiled({"clip": clips.detach().contiguous().numpy()})["logits"])

    return run


def _save_xml(model: nn.Module, clip: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    openvino = _package("openvino", "openvino")
    core = openvino.Core()
    network = core.read_model(_onnx(model, clip, "openvino", any_batch=True).SerializeToString())
    for name, text in metadata.items():
        network.set_rt_info(text, [RT_INFO, name])
    try:
        openvino.serialize(network, str(path), str(path.with_suffix(".bin")))
        core.read_model(path)  # where the disk is full, versions before 2026 write half a file and say nothing
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _load_xml(path: Path, threads: int) -> Run:
    openvino = _package("openvino", "openvino")
    return _compiled_model(_reading(path, lambda: openvino.Core().read_model(path)), threads, torch.float32)


# Files ------------------------------------------------------------------------------------------------------------


def _put(files: list[Path], path: Path) -> list[Path]:
    """Move files to their places beside `path`. A .bin comes before its .xml, and an old .xml goes before both."""
    for file in files:
        with file.open("rb") as content:
            os.fsync(content.fileno())
    if len(files) > 1:
        path.unlink(missing_ok=True)
    return [file.replace(path.with_name(file.name)) for file in files]


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # those of three packages have no other common base
        raise ExportError(f"{path}: not a whole file of its format ({_brief(error)})") from error


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
