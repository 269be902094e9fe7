"""Training steps on a GPU: precision, compiling, CUDA graphs, memory."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from octvideo import build
from octvideo.benchmark.speed import saved_bytes
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
    stepper = Stepper(device, "MODEL.COMPILE", "True")
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
