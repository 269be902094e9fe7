"""Training steps on a GPU: precision, compiling, CUDA graphs, memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from octvideo import build
from octvideo.benchmark.speed import saved_bytes
from octvideo.engine.distributed import World
from octvideo.engine.failures import FailureBudget
from octvideo.engine.log import Log
from octvideo.engine.meter import Meter
from octvideo.engine.nonfinite import NonFinite
from octvideo.engine.train import Progress, fit
from octvideo.engine.unread import UnreadSteps
from tests.devices import CUDA_ONLY, DEVICES, exact_float32  # noqa: F401  # exact_float32 is a fixture

from .stepping import Stepper


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("name", ["i3d_tiny", "oct_i3d_tiny"])
@pytest.mark.parametrize("device", CUDA_ONLY)
def test_losses_are_those_of_the_cpu(device: str, name: str) -> None:
    expected = Stepper("cpu", name=name).trained(4).losses
    assert expected[-1] < 0.95 * expected[0]
    assert Stepper(device, name=name).trained(4).losses == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("device", CUDA_ONLY)
def test_half_precision_trains_to_finite_weights(device: str, dtype: str) -> None:
    """float16 has a scaler, which may skip the first steps until it has found its scale."""
    stepper = Stepper(device, "TRAIN.DTYPE", dtype)
    assert (stepper.precision.scaler is not None) == (dtype == "float16")
    trained = stepper.trained(12)
    assert trained.losses[-1] < 0.9 * trained.losses[0]
    for name, value in trained.model.state_dict().items():
        assert value.isfinite().all(), name
        assert value.dtype == trained.before[name].dtype, name
    weight = trained.model.get_parameter("head.fc.weight")
    assert not torch.equal(weight.cpu(), trained.before["head.fc.weight"])


@pytest.mark.usefixtures("exact_float32", "fresh_compiler")
@pytest.mark.parametrize("device", CUDA_ONLY)
def test_a_compiled_step_has_no_graph_break_and_compiles_once(device: str) -> None:
    expected = Stepper(device).trained(4).losses
    stepper = Stepper(device, "MODEL.COMPILE", "default")
    first = float(stepper.step())
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = [first, *stepper.trained(3).losses]
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == graphs > 0
    assert losses == pytest.approx(expected, rel=1e-3)


@pytest.mark.usefixtures("exact_float32", "fresh_compiler")
@pytest.mark.parametrize("device", CUDA_ONLY)
def test_steps_in_cuda_graphs_equal_eager_steps(device: str) -> None:
    """Six steps: the first ones run and record, the later ones replay."""
    expected = Stepper(device).trained(6).losses
    stepper = Stepper(device, "MODEL.COMPILE", "graphs")
    assert stepper.trained(6).losses == pytest.approx(expected, rel=1e-3)
    assert not counters["graph_break"], dict(counters["graph_break"])


@dataclass
class Batch:
    clips: Tensor
    labels: Tensor
    videos: Tensor
    errors: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


class Steps:
    """A loader of `count` equal batches in pinned memory, and its batch sampler."""

    def __init__(self, count: int, pinned: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        clips = torch.randint(256, (4, 1, 3, 4, 32, 32), dtype=torch.uint8, generator=generator)
        labels = torch.arange(4)
        clips, labels = (x.pin_memory() if pinned else x for x in (clips, labels))
        self.batches, self.batch_sampler = [Batch(clips, labels, torch.arange(4))] * count, self

    global_batch = 4

    def set_epoch(self, epoch: int, start_clip: int = 0) -> None:
        assert (epoch, start_clip) == (0, 0)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


@pytest.fixture
def default_sync_mode() -> Iterator[None]:
    """Restore the mode, also after a failure within the steps that may not wait."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("default_sync_mode")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", CUDA_ONLY)
def test_twenty_steps_of_fit_never_wait_for_the_device(device: str, dtype: str, tmp_path: Path) -> None:
    """After two steps, and before the line of the log at the epoch's end, which reads the device."""
    stepper = Stepper(device, "TRAIN.DTYPE", dtype)
    log, progress, modes = Log(tmp_path, main=True, step=0), Progress(), []
    meter = Meter(stepper.device, World())

    def after_step() -> None:
        if progress.step in (2, 22):
            torch.cuda.set_sync_debug_mode("error" if progress.step == 2 else "default")
        modes.append(torch.cuda.get_sync_debug_mode())

    fit(
        stepper.model,
        stepper.optimizer,
        Steps(24, pinned=device == "cuda"),
        progress=progress,
        meter=meter,
        epochs=1,
        lr_at=lambda epoch: 0.02 * (1 - epoch / 2),
        prepare=build.prepare_clips(stepper.cfg),
        mix=build.mix(stepper.cfg, World()),
        loss=F.cross_entropy,
        precision=stepper.precision,
        freeze_norm_stats=False,
        failures=FailureBudget(0, log, tmp_path / "failed.txt"),
        unread=UnreadSteps(meter, NonFinite(0, tmp_path, str, log)),
        device=stepper.device,
        world=World(),
        log=log,
        log_period=1000,
        after_step=after_step,
        after_epoch=lambda values: None,
    )
    assert progress.step == 24 and modes == [0] * 1 + [2] * 20 + [0] * 3


@pytest.mark.parametrize("channels_last", ["True", "False"])
@pytest.mark.parametrize("device", DEVICES)
def test_saved_activations_shrink_as_the_layers_outputs(device: str, channels_last: str) -> None:
    """Octave layers put out 1 - 3/4 alpha of the vanilla values. The clip and the stem's indices do not shrink: 7 %."""
    overrides = ("MODEL.CHANNELS_LAST", channels_last, "DATA.TRAIN_CROP", "64", "DATA.TEST_CROP", "64")

    def saved(alpha: str) -> tuple[int, int]:
        stepper = Stepper(device, *overrides, "OCTAVE.ALPHA", alpha, batch=16)
        forward = lambda: F.cross_entropy(stepper.model(stepper.clips), stepper.labels)  # noqa: E731
        return saved_bytes(forward, stepper.model), build.cost(stepper.cfg, 64).activations

    vanilla, outputs = saved("0.0")
    for alpha in ("0.125", "0.25", "0.5"):
        octave, octave_outputs = saved(alpha)
        assert octave / vanilla == pytest.approx(octave_outputs / outputs, rel=0.07), alpha
