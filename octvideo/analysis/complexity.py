"""What a network costs, counted on the meta device: no memory, no arithmetic, a second for a ResNet-50.

The counter is torch's own (torch.utils.flop_counter), which sees the convolutions that really run, so octave layers
need no formula of their own.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from octvideo.octave import NonLocal, Octave

aten = torch.ops.aten
CONV_FC = {aten.convolution, aten.addmm, aten.mm}
ATTENTION = {aten.bmm, aten.baddbmm}
# Layers that are counted one by one; every other cost belongs to the network as a whole.
LAYERS = (nn.Conv2d, nn.Conv3d, nn.Linear, NonLocal)


@dataclass(frozen=True)
class Macs:
    """Multiply-adds: convolutions and linear layers; pooling (one per value in a window); attention products."""

    conv_fc: int
    pool: int
    attention: int

    @property
    def total(self) -> int:
        """What is multiplied: convolutions, linear layers and attention."""
        return self.conv_fc + self.attention


@dataclass(frozen=True)
class Layer:
    """One layer: its name, kind and parameters, its multiply-adds (conv_fc + attention) and the values it puts out.

    The last two are (high, low): multiply-adds by the frequency that they serve, values by the map they stand in.
    """

    name: str
    kind: str
    params: int
    macs: tuple[int, int]
    activations: tuple[int, int]


@dataclass(frozen=True)
class Complexity:
    """activations: values that the layers (convolutions, linear, non-local) put out. input: (C, T, H, W) of one clip."""

    params: int
    macs: Macs
    activations: int
    input: tuple[int, ...]
    layers: tuple[Layer, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the layers."""
        return {k: v for k, v in asdict(self).items() if k != "layers"}


def complexity(model: nn.Module, input_size: Sequence[int]) -> Complexity:
    """Count one forward pass over an input [1, *input_size], e.g. (3, 8, 224, 224). The model is left as it is."""
    model = copy.deepcopy(model).to("meta").eval()
    names = {module: name for name, module in model.named_modules()}
    seen: list[tuple[nn.Module, Any, Any]] = []
    hooks = [
        module.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
        for module in names
        if isinstance(module, LAYERS)
    ]
    counter = FlopCounterMode(display=False, custom_mapping=_POOLS)
    with counter, torch.no_grad():
        model(torch.empty(1, *input_size, device="meta"))
    for hook in hooks:
        hook.remove()
    counts = counter.get_flop_counts()
    root = type(model).__name__
    layers = [_layer(names[module], module, x, y, counts[f"{root}.{names[module]}"]) for module, x, y in seen]
    return Complexity(
        params=sum(p.numel() for p in model.parameters()),
        macs=_macs(counts["Global"]),
        activations=sum(sum(layer.activations) for layer in layers),
        input=tuple(input_size),
        layers=tuple(layers),
    )


def _layer(name: str, module: nn.Module, x: Any, y: Any, counts: dict[Any, int]) -> Layer:
    total = _macs(counts).total
    low = _macs_for_low(module, x, y) if isinstance(y, Octave) and not isinstance(module, NonLocal) else 0
    high_out, low_out = (y.high.numel(), y.low.numel()) if isinstance(y, Octave) else (y.numel(), 0)
    params = sum(p.numel() for p in module.parameters())
    return Layer(name, type(module).__name__, params, (total - low, low), (high_out, low_out))


def _macs_for_low(module: Any, x: Any, y: Octave) -> int:
    """Of an octave convolution, the multiply-adds of H->L and L->L: both are done at the low output's resolution."""
    paths_in = y.low.shape[1] if module.depthwise else module.in_channels
    columns = 1 if module.depthwise else paths_in // module.groups
    return y.low.numel() * columns * math.prod(module.kernel_size)


def _macs(counts: dict[Any, int]) -> Macs:
    kinds: dict[str, int] = defaultdict(int)
    for op, flops in counts.items():
        if op in _POOLS:
            kinds["pool"] += flops // 2
        elif op in CONV_FC:
            kinds["conv_fc"] += flops // 2
        elif op in ATTENTION or "scaled_dot_product" in str(op):
            kinds["attention"] += flops // 2
        else:
            raise NotImplementedError(f"{op} counts neither as convolution, linear layer, pooling nor attention")
    return Macs(kinds["conv_fc"], kinds["pool"], kinds["attention"])


def _pool_flops(x: Sequence[int], kernel: Sequence[int], *args: Any, out_shape: Any, **kwargs: Any) -> int:
    out = out_shape[0] if isinstance(out_shape[0], Sequence | torch.Size) else out_shape  # max-pools give indices too
    return 2 * math.prod(out) * math.prod(kernel)


def _mean_flops(x: Sequence[int], *args: Any, out_shape: Any, **kwargs: Any) -> int:
    return 2 * math.prod(x)


_POOLS: dict[Any, Callable[..., int]] = {
    aten.avg_pool2d: _pool_flops,
    aten.max_pool2d_with_indices: _pool_flops,
    aten.max_pool3d_with_indices: _pool_flops,
    aten.mean: _mean_flops,
}
