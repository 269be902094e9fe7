from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from octvideo.octave import kernels, kernels_library

from .kernel_maps import copy_of_programs


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Maps here are tiny: waking a thread pool costs more than the arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def interpreted() -> ModuleType:
    """The Triton programs, run by Triton's interpreter on the CPU."""
    pytest.importorskip("triton", reason="Triton is not installed; tests/peers.txt lists it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read where a program is defined
        return copy_of_programs("kernels_interpreted")


@pytest.fixture
def cpu(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU as a device that runs the kernels, and passed the first try."""
    monkeypatch.setattr(kernels, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(kernels_library, "_programs", lambda: interpreted)
    assert kernels._works(torch.device("cpu"))
    return "cpu"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        return str(request.getfixturevalue("cpu"))
    pytest.importorskip("triton")
    assert kernels._works(torch.zeros(0, device="cuda").device)
    return "cuda"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each program is launched."""
    counts: Counter[str] = Counter()

    def counted(name: str, launch: Callable[..., None]) -> Callable[..., None]:
        def count(*args: object, **options: object) -> None:
            counts[name] += 1
            launch(*args, **options)

        return count

    for name in ("pool", "upsample_add"):
        launch = f"_launch_{name}"
        monkeypatch.setattr(kernels_library, launch, counted(name, getattr(kernels_library, launch)))
    return counts
