"""A model of the least time that a step takes on a card: the roofline (Williams et al., CACM 2009). Not a measurement.

The time of a kernel is max(FLOPs / peak, bytes / bandwidth), and the time of a step is the sum over its kernels, which
traffic.py counts on the meta device. What the model assumes:

- Convolutions and linear layers run in `dtype` as under autocast: their parameters and the clip are float32, and are cast
  once per step in training. For inference the parameters are stored in `dtype`.
- Activations and their gradients have `dtype`. The parameters and statistics of norms, the gradients of all parameters,
  their momenta and the loss are float32. The memory format is channels-last.
- A training step is forward, cross entropy, backward, the gradient's norm (one read of the gradients) and SGD (a read of
  parameters, gradients and momenta, a write of parameters and momenta).
- FLOPs are two per multiply-add of convolutions and matrix products, by torch's formulas. All other arithmetic is free.
- Channels of convolutions of one group count as padded to a multiple of `align`, in FLOPs and bytes, as tensor cores take
  them. Grouped convolutions count as if they ran at the peak.
- Launches, caches, tiles and the time that kernels take to fill the card count nothing.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octvideo.analysis.traffic import MATRIX, Kernel, Recorder, fuse, separate

COMPUTE, MEMORY = "compute", "memory"
CAST, FORWARD, BACKWARD, UPDATE = "cast", "forward", "backward", "update"
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
HALF = (torch.bfloat16, torch.float16)
ALIGN = 8  # channels of two bytes that fill the 16 bytes that a tensor core's load takes


@dataclass(frozen=True)
class Card:
    """A GPU. flops: dense half-precision FLOP/s. bandwidth: bytes/s of its memory. measured: not the vendor's numbers."""

    name: str
    flops: float
    bandwidth: float
    measured: bool = False


CARDS = (
    Card("H100", 990e12, 3.35e12),
    Card("H200", 990e12, 4.8e12),
    Card("H100", 790e12, 3.0e12, measured=True),
    Card("H200", 790e12, 4.3e12, measured=True),
)
"""The SXM cards. Vendor: NVIDIA's data sheets. Measured: large matrix products and copies, the most that was reached."""


def card_named(device_name: str, *, measured: bool = False) -> Card | None:
    """Return the card of a name such as torch.cuda.get_device_name returns, or None if the table has no such card.

    The PCIe and NVL models of a card have lower rates and are not in the table. measured: rates that were measured.
    """
    words = set(re.split(r"\W+", device_name.upper()))
    if words & {"PCIE", "NVL"}:
        return None
    return next((card for card in CARDS if card.name in words and card.measured == measured), None)


@dataclass(frozen=True)
class Layer:
    """One module's kernels in one phase of a step: cast (of parameters), forward, backward or update.

    name: of the module, "" for the network itself. kind: its class. bound: what takes more of its seconds, compute or
    memory; a kernel is bound by the larger of its two times.
    """

    name: str
    kind: str
    phase: str
    flops: int
    bytes: int
    seconds: float
    bound: str


@dataclass(frozen=True)
class Roofline:
    """The model of one step on one card. memory_bound: share of its seconds in kernels that memory bounds."""

    card: Card
    flops: int
    bytes: int
    seconds: float
    memory_bound: float
    layers: tuple[Layer, ...]


def step_roofline(
    model: nn.Module,
    input_size: Sequence[int],
    *,
    batch: int,
    card: Card,
    training: bool,
    dtype: torch.dtype = torch.bfloat16,
    fused: bool = True,
    joint: bool = False,
    align: int = ALIGN,
) -> Roofline:
    """Return the roofline of a step over a batch of clips [batch, *input_size], e.g. (3, 8, 224, 224). `model` is unchanged.

    model: takes the clips and returns logits [batch, K, ...]; eager. training: a training step, else inference.
    fused: kernels of a compiler that fuses all it can (`traffic.fuse`), else one kernel per operator of torch.
    joint: with fused, each convolution with all its paths is one kernel too, in the backward pass with both gradients.
    align: see above; 1 turns the padding off.
    Raises ValueError for an input that is no image or clip, batch or align below 1, joint without fused, and other dtypes
    than half precision.
    """
    if joint and not fused:
        raise ValueError("joint is True, fused is False; joint convolutions are a form of fused kernels")
    if len(input_size) not in (3, 4):
        raise ValueError(f"input_size is {tuple(input_size)}; allowed: (C, H, W) or (C, T, H, W)")
    if batch < 1 or align < 1:
        raise ValueError(f"batch is {batch}, align is {align}; allowed: 1 or more")
    if dtype not in HALF:
        raise ValueError(f"dtype is {dtype}; a card's peak holds for {' and '.join(map(str, HALF))}")
    memory_format = torch.channels_last if len(input_size) == 3 else torch.channels_last_3d
    model = copy.deepcopy(model).to("meta").train(training)
    model.to(memory_format=memory_format)  # type: ignore[call-overload]
    clips = torch.empty(batch, *input_size, device="meta").contiguous(memory_format=memory_format)
    recorder = Recorder(align)
    record = _training_step if training else _inference
    record(recorder, model, clips, dtype)
    names = [name for name, module in model.named_modules() if joint and isinstance(module, nn.modules.conv._ConvNd)]
    kernels = fuse(recorder.operators, recorder.kept, names) if fused else separate(recorder.operators)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    return roofline(kernels, card, kinds)


def _inference(recorder: Recorder, model: nn.Module, clips: Tensor, dtype: torch.dtype) -> None:
    stored = {name: parameter.to(dtype) for name, parameter in _cast_parameters(model)}
    recorder.follow(model)
    with recorder, torch.no_grad():
        recorder.keep([torch.func.functional_call(model, stored, (clips.to(dtype),))])


def _training_step(recorder: Recorder, model: nn.Module, clips: Tensor, dtype: torch.dtype) -> None:
    model.requires_grad_(True)
    recorder.follow(model)
    recorder.keep(model.buffers())
    with recorder, torch.enable_grad():
        # As autocast does: cast once, for all layers and paths that read the parameter.
        cast = {}
        for name, parameter in _cast_parameters(model):
            recorder.phase, recorder.layer = CAST, name.rpartition(".")[0]
            cast[name] = parameter.to(dtype)
        recorder.phase, recorder.layer = FORWARD, ""
        logits = torch.func.functional_call(model, cast, (clips.to(dtype),))
        labels = torch.empty(len(logits), *logits.shape[2:], dtype=torch.long, device="meta")
        loss = F.cross_entropy(logits.float(), labels)
        recorder.phase = BACKWARD
        loss.backward()
    recorder.phase, recorder.layer = UPDATE, ""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters]
    momenta = [torch.empty_like(parameter) for parameter in parameters]
    recorder.keep([*parameters, *momenta])
    # Both read what the complete backward pass has made, so they are kernels by themselves, as matrix products are.
    recorder.add("gradient norm", gradients, [], role=MATRIX)
    recorder.add("SGD", [*parameters, *gradients, *momenta], [*parameters, *momenta], role=MATRIX)


def _cast_parameters(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """All parameters but those of norms: autocast casts them where a convolution or a product reads them."""
    for name, module in model.named_modules():
        if not isinstance(module, NORMS):
            yield from module.named_parameters(prefix=name, recurse=False)


def roofline(kernels: Iterable[Kernel], card: Card, kinds: dict[str, str]) -> Roofline:
    """Sum the kernels' times over each layer and over the step. kinds: the class of each layer by its name."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    costs: dict[tuple[str, str], tuple[int, int]] = {}
    for kernel in kernels:
        compute, memory = kernel.flops / card.flops, kernel.nbytes / card.bandwidth
        key = kernel.layer, kernel.phase
        by_bound = times.setdefault(key, {COMPUTE: 0.0, MEMORY: 0.0})
        by_bound[COMPUTE if compute > memory else MEMORY] += max(compute, memory)
        flops, nbytes = costs.get(key, (0, 0))
        costs[key] = flops + kernel.flops, nbytes + kernel.nbytes
    layers = tuple(
        Layer(
            name, kinds[name], phase, *costs[name, phase], sum(spent.values()), max(spent, key=lambda one: spent[one])
        )
        for (name, phase), spent in times.items()
    )
    seconds = sum(layer.seconds for layer in layers)
    return Roofline(
        card=card,
        flops=sum(layer.flops for layer in layers),
        bytes=sum(layer.bytes for layer in layers),
        seconds=seconds,
        memory_bound=sum(spent[MEMORY] for spent in times.values()) / seconds,
        layers=layers,
    )


def efficiency(vanilla: Roofline, octave: Roofline, macs_ratio: float) -> float:
    """Return the best possible efficiency: the ratio of multiply-adds, octave over vanilla, over the ratio of times.

    Raises ValueError for rooflines of different cards.
    """
    if vanilla.card != octave.card:
        raise ValueError(f"the rooflines are of two cards, {vanilla.card} and {octave.card}")
    return macs_ratio / (octave.seconds / vanilla.seconds)
