"""The operators of the Triton kernels under dispatch modes, opcheck, torch.compile and torch.export."""

import ast
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from octvideo.analysis.complexity import _POOLS
from octvideo.octave import kernels

from .kernel_maps import CASES, Case, a_low_map, a_map, eager_pool, eager_sum

# --- dispatch modes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_flops_of_pooling_are_those_of_avg_pool2d(case: Case, cpu: str) -> None:
    x = a_map(case[0], cpu).requires_grad_()
    with FlopCounterMode(display=False, custom_mapping=_POOLS) as kernel:
        y = kernels.average_pool(x, case[1])
        y.sum().backward()  # sums are no multiply-adds
    with FlopCounterMode(display=False, custom_mapping=_POOLS) as plain:
        eager_pool(x, case[1])
    assert kernel.get_total_flops() == plain.get_total_flops() > 0
    assert set(kernel.get_flop_counts()["Global"]) == {torch.ops.octvideo.pool}


def test_sums_have_no_flops(cpu: str) -> None:
    y, low = (a_map(CASES[4][0], cpu), a_low_map(CASES[4], cpu))
    with FlopCounterMode(display=False) as counter:
        kernels.add_upsampled(y, low.requires_grad_(), relu=True).sum().backward()
        kernels.average_pool(y, (2, 2, 2), total=True)
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_tensors_have_the_real_shapes_and_strides(case: Case, layout: str, cpu: str) -> None:
    real = a_map(case[0], cpu, layout), a_low_map(case, cpu, layout)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in real]
    assert all(isinstance(x, FakeTensor) for x in fake)

    def results(y: Tensor, low: Tensor) -> list[Tensor]:
        y = y.clone()
        shares = kernels.upsample_shares(low, case[0][2:], case[1])
        return [kernels.average_pool(y, case[1]), kernels.add_upsampled(y, low), kernels.add_upsampled_(y, low), shares]

    for found, expected in zip(results(*fake), results(*real), strict=True):
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_the_meta_device(cpu: str) -> None:
    x = torch.empty(2, 3, 5, 7, device="meta")
    y = kernels.average_pool(x, (2, 2))
    assert y.shape == (2, 3, 3, 4) and y.device.type == "meta"
    assert kernels.add_upsampled(x, y).shape == x.shape
    with pytest.raises(ValueError, match="does not upsample"):
        kernels.add_upsampled(x, y[..., :2])


def test_a_fake_gpu() -> None:
    """Follow a network for GPUs on a machine without one."""
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 5, 7, device="cuda", dtype=torch.bfloat16, memory_format=torch.channels_last_3d)
        y = kernels.average_pool(x, (2, 2, 2))
        assert (y.shape, y.device.type, y.dtype) == ((2, 3, 2, 3, 4), "cuda", torch.bfloat16)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        assert kernels.add_upsampled_(x, y) is x


@pytest.mark.parametrize("name", ["pool", "upsample", "upsample_add", "upsample_add_"])
def test_opcheck(name: str, cpu: str) -> None:
    """Check the schema (what is mutated and aliased), the fake kernel, and AOTAutograd with dynamic shapes."""
    y, low = a_map(CASES[4][0], cpu, "channels last"), a_low_map(CASES[4], cpu)
    arguments = {
        "pool": (y, [2, 2, 2], True, True),
        "upsample": (low, [3, 5, 7], [2, 2, 2], True, False),
        "upsample_add": (y, low, y.clone(), True, False),
        "upsample_add_": (y, low, None, False, True),
    }
    opcheck(getattr(torch.ops.octvideo, name), arguments[name])


# --- compiler and export --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_they_compile_with_their_gradients(backend: str, device: str, launches: Counter[str]) -> None:
    def loss(y: Tensor, low: Tensor) -> Tensor:
        total = kernels.add_upsampled(y, low + kernels.average_pool(y, (2, 2, 2)), shortcut=-y, relu=True)
        return kernels.add_upsampled_(total * 2, low).pow(2).sum()

    maps = [x.requires_grad_() for x in (a_map(CASES[4][0], device), a_low_map(CASES[4], device))]
    expected = torch.autograd.grad(loss(*maps), maps)
    eager = launches.copy()
    launches.clear()
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(compiled(*maps), maps), expected, rtol=1e-5, atol=1e-5)
    assert launches["pool"] == eager["pool"] and launches["upsample_add"] >= 3
    torch.compiler.reset()


class Module(nn.Module):
    def forward(self, y: Tensor, low: Tensor) -> Tensor:
        return kernels.add_upsampled(y, low + kernels.average_pool(y, (2, 2, 2)), relu=True)


@pytest.mark.parametrize("strict", [False, True])
def test_they_export(strict: bool, device: str) -> None:
    y, low = (a_map(CASES[4][0], device), a_low_map(CASES[4], device))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Module(), (y, low), dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    names = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.octvideo.pool.default in names and torch.ops.octvideo.upsample_add.default in names
    more = torch.cat([y, y + 1]), torch.cat([low, low - 1])
    assert torch.equal(program.module()(*more), Module()(*more))


def test_the_operator_in_place_compiles(device: str) -> None:
    y, low = (a_map(CASES[4][0], device), a_low_map(CASES[4], device))
    expected = eager_sum(y, low)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def add(y: Tensor, low: Tensor) -> Tensor:
        torch.ops.octvideo.upsample_add_(y, low, None, False, False)
        return y

    with torch.no_grad():
        assert torch.equal(add(y, low), expected)
    assert torch.equal(y, expected)


def test_the_operator_in_place_raises_the_version(device: str) -> None:
    y, low = (a_map(CASES[4][0], device), a_low_map(CASES[4], device))
    before = y._version
    torch.ops.octvideo.upsample_add_(y, low, None, False, False)
    assert y._version == before + 1


@pytest.mark.parametrize("name", ["kernels", "kernels_library", "resample"])
def test_only_public_functions_of_torch(name: str) -> None:
    """Private functions of torch change without notice."""
    tree = ast.parse((Path(kernels.__file__).parent / f"{name}.py").read_text())
    names = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names += [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    private = [name for name in names if name.startswith("torch.") and any(part[:1] == "_" for part in name.split("."))]
    assert names and private == []
