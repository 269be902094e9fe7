"""Compare the Triton programs with torch's operators and NumPy, in Triton's interpreter and on a GPU if there is one."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from octvideo.octave import feature, kernels, kernels_library

from . import reference
from .kernel_maps import (
    CASES,
    LAYOUTS,
    Case,
    a_low_map,
    a_map,
    close,
    copy_of_programs,
    double,
    eager_pool,
    eager_sum,
)

# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_average_pool(case: Case, layout: str, device: str) -> None:
    shape, kernel = case
    x = a_map(shape, device, layout)
    y = kernels.average_pool(x, kernel)
    assert torch.equal(y, eager_pool(x, kernel))  # bit for bit
    np.testing.assert_allclose(double(y), reference.average_pool(double(x), kernel), rtol=0, atol=1e-6)
    assert y.is_contiguous(memory_format=LAYOUTS[layout][x.dim()])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_add_upsampled(case: Case, layout: str, device: str) -> None:
    y, low = a_map(case[0], device, layout), a_low_map(case, device, layout)
    before = y.clone()
    total = kernels.add_upsampled(y, low)
    assert torch.equal(y, before)
    assert torch.equal(total, eager_sum(y, low))
    up = reference.upsample(double(low), case[1], case[0][2:])
    np.testing.assert_allclose(double(total), double(y) + up, rtol=0, atol=1e-6)
    assert total.is_contiguous(memory_format=LAYOUTS[layout][y.dim()])
    assert kernels.add_upsampled_(y, low) is y
    assert torch.equal(y, total)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision(dtype: torch.dtype, layout: str, device: str) -> None:
    for case in (CASES[0], CASES[4]):
        x, low = a_map(case[0], device, layout, dtype), a_low_map(case, device, layout, dtype)
        y = kernels.average_pool(x, case[1])
        close(y, eager_pool(x.float(), case[1]))
        assert y.dtype == dtype and y.is_contiguous(memory_format=LAYOUTS[layout][x.dim()])
        total = kernels.add_upsampled(x, low, shortcut=x, relu=True)
        close(total, torch.relu(eager_sum(x.float(), low.float()) + x.float()))
        assert total.dtype == dtype


@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_options_of_the_sum(with_shortcut: bool, relu: bool, mean: bool, device: str) -> None:
    shape, kernel = CASES[4]
    y, low, shortcut = (a_map(shape, device), a_low_map(CASES[4], device, "channels last"), a_map(shape, device))
    shortcut = shortcut.contiguous(memory_format=torch.channels_last_3d)  # need not have y's layout
    values = F.avg_pool3d(
        torch.ones(shape, device=device), kernel, ceil_mode=True, divisor_override=1
    )  # in each window
    expected = eager_sum(y, low / values if mean else low)
    expected = expected + shortcut if with_shortcut else expected
    expected = torch.relu(expected) if relu else expected
    given = shortcut if with_shortcut else None
    total = kernels.add_upsampled(y, low, shortcut=given, relu=relu, mean=mean)
    assert torch.equal(total, expected)
    assert torch.equal(kernels.add_upsampled_(y, low, shortcut=given, relu=relu, mean=mean), total)


def test_relu_lets_nan_through(device: str) -> None:
    y = torch.tensor([float("nan"), -1.0, 2.0, float("-inf")], device=device).reshape(1, 1, 2, 2)
    total = kernels.add_upsampled(y, torch.zeros(1, 1, 1, 1, device=device), relu=True).flatten().tolist()
    assert np.isnan(total[0]) and total[1:] == [0.0, 2.0, 0.0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_tiles_and_offsets_of_64_bits(layout: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of 64 cuts rows as well as columns; what large maps need gives the same for small ones."""
    for case in (CASES[4], CASES[9]):
        y, low = a_map(case[0], device, layout), a_low_map(case, device, layout)
        expected = kernels.average_pool(y, case[1]), kernels.add_upsampled(y, low, shortcut=y, relu=True)
        for name, value in (("TILE", 64), ("LARGE", 0)):
            with monkeypatch.context() as patch:
                patch.setattr(kernels_library, name, value)
                found = kernels.average_pool(y, case[1]), kernels.add_upsampled(y, low, shortcut=y, relu=True)
            assert all(map(torch.equal, found, expected))


def test_int64_offsets_begin_where_int32_would_end() -> None:
    near = torch.empty(1, device="meta").expand(1, 1, 2**15, 2**15 - 1)
    maps = [near.as_strided((1, 1, 2**15, w), (0, 0, w, 1)) for w in (2**15 - 1, 2**15)]
    assert [kernels_library._tiles(x, False, x)[1][2] for x in maps] == [False, True]
    # a slice of few channels reaches as far as the map that it is cut from
    part = near.as_strided((2, 1, 4, 4), (2**30, 16, 4, 1))
    assert kernels_library._tiles(part, False, part)[1][2]


def test_offsets_beyond_32_bits(cpu: str) -> None:
    """Channels 1.5 GB apart, of which only what is used is ever given memory: int32 would wrap around at the last one."""
    apart = 3 * 2**28
    x = torch.empty(3 * apart + 16, dtype=torch.float16).as_strided((1, 4, 3, 4), (0, apart, 4, 1))
    x.copy_(torch.randn(x.shape))
    y = kernels.average_pool(x, (2, 2))
    assert torch.equal(y, eager_pool(x.contiguous(), (2, 2)))
    expected = eager_sum(x, y)
    assert torch.equal(kernels.add_upsampled(x, y), expected)
    assert torch.equal(kernels.add_upsampled_(x, y), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(layout: str, device: str) -> None:
    x = a_map((2, 8, 3, 5, 6), device, layout)
    for view in (x[:, 2:5], x[:, ::2], x.transpose(2, 4), x[:1, :, :, 1:, ::2], x.movedim(1, 4)):
        kernel = (2, 2, 2)
        assert torch.equal(kernels.average_pool(view, kernel), eager_pool(view, kernel))
        low = a_map((*view.shape[:2], *feature.low_size(view.shape[2:], kernel)), device)
        assert torch.equal(kernels.add_upsampled(view, low), eager_sum(view, low))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_slice_of_channels_is_written_alone(layout: str, device: str) -> None:
    x = a_map((2, 8, 3, 5, 6), device, layout)
    low = a_map((2, 6, 3, 3, 3), device, layout)[:, 1:5]
    expected = x.clone()
    expected[:, 2:6] += feature.upsample(low, (3, 5, 6))
    kernels.add_upsampled_(x[:, 2:6], low)
    assert torch.equal(x, expected)


def test_no_values(device: str) -> None:
    for shape in [(2, 0, 3, 5, 7), (0, 2, 3, 5, 7)]:
        x = torch.empty(shape, device=device, requires_grad=True)
        y = kernels.average_pool(x, (1, 2, 2))
        assert y.shape == (*shape[:2], 3, 3, 4)
        assert kernels.add_upsampled(x.detach(), y.detach()).shape == shape
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == shape


def test_a_window_of_one_value_is_the_map_itself(device: str) -> None:
    x = a_map((1, 2, 3, 4), device)
    assert kernels.average_pool(x, (1, 1)) is x
    assert torch.equal(kernels.add_upsampled(x, x), x + x)


# --- what a GPU would run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "capability", "dtype"),
    [("contiguous", 80, torch.bfloat16), ("channels last", 90, torch.float32), ("channels last", 90, torch.bfloat16)],
    ids=str,
)
def test_launches_compile_for_gpus(
    layout: str, capability: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a launch but its last step, down to machine code, which needs no device."""
    programs = copy_of_programs("kernels_compiled")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class NoDevice:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    found: list[tuple[str, str]] = []

    class Program:
        def __init__(self, name: str) -> None:
            self.name, self.program = name, getattr(programs, name)

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def compile_it(*args: object) -> None:
                compiled = self.program.warmup(*args, grid=grid)
                assert compiled.asm["cubin"]
                found.append((self.name, compiled.asm["ptx"]))

            return compile_it

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        kernels_library,
        "_programs",
        lambda: SimpleNamespace(pool=Program("pool"), upsample_add=Program("upsample_add")),
    )
    monkeypatch.setattr(driver, "_active", NoDevice())
    case = ((8, 64, 4, 56, 56), (2, 2, 2))
    x, low = a_map(case[0], "cpu", layout, dtype), a_low_map(case, "cpu", layout, dtype)
    kernels.average_pool(x, case[1])
    kernels.add_upsampled(x, low, shortcut=x, relu=True)
    low.requires_grad_()
    torch.autograd.grad(kernels.add_upsampled(x, low), low, x.clone())
    assert [name for name, _ in found] == ["pool", "upsample_add", "upsample_add", "pool"]
    for name, code in found:
        # 16 bytes at a time, but for the contiguous windows, whose values lie one beside the other
        assert "st.global.v4.b32" in code
        assert ("ld.global.v4.b32" in code) == (name == "upsample_add" or layout == "channels last")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [((8, 256, 8, 56, 56), (1, 2, 2)), ((2, 1000, 4, 7, 7), (2, 2, 2)), ((16, 64, 113, 111), (2, 2))],
    ids=str,
)
def test_real_sizes_on_cuda(case: Case, layout: str, dtype: torch.dtype) -> None:
    x, low = a_map(case[0], "cuda", layout, dtype), a_low_map(case, "cuda", layout, dtype)
    pooled = kernels.average_pool(x, case[1])
    close(pooled, eager_pool(x.float(), case[1]))
    close(
        kernels.add_upsampled(x, low, shortcut=x, relu=True), torch.relu(eager_sum(x.float(), low.float()) + x.float())
    )
    assert torch.equal(kernels.add_upsampled(x, low), eager_sum(x, low))  # one rounding in either
    x.requires_grad_()
    (grad,) = torch.autograd.grad(kernels.average_pool(x, case[1]), x, low)
    close(grad, torch.autograd.grad(eager_pool(x, case[1]), x, low)[0])


@pytest.mark.cuda
def test_more_elements_than_int32_counts_on_cuda() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 16e9:
        pytest.skip("needs 16 GB of GPU memory")
    y = torch.zeros(1, 2, 2**15 + 2, 2**15 + 2, dtype=torch.float16, device="cuda")  # 2^31 + 2^18 + 8 elements
    assert y.numel() > 2**31
    y[0, 1, -2:, -2:] = torch.tensor([[1.0, 2.0], [3.0, 6.0]], device="cuda")
    low = kernels.average_pool(y, (2, 2))
    assert low[0, 1, -1, -1].item() == 3.0 and low.count_nonzero().item() == 1
    kernels.add_upsampled_(y, low)
    assert y[0, 1, -2:, -2:].flatten().tolist() == [4.0, 5.0, 6.0, 9.0] and y.count_nonzero().item() == 4


@pytest.mark.cuda
def test_another_device_than_the_current_one_on_cuda() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device on this machine")
    x = torch.randn(1, 2, 5, 5, device="cuda:1")
    with torch.cuda.device(0):
        assert torch.equal(kernels.average_pool(x, (2, 2)), eager_pool(x, (2, 2)))
