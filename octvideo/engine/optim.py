"""SGD that the device can skip, its parameter groups, and the learning rate as a pure function of progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.sgd import sgd as update_weights


class SGD(torch.optim.SGD):
    """torch.optim.SGD by the fused kernel, with a step that is skipped on the device.

    found_inf: float32 [] on the device of the weights. Where it is 1, `step` changes neither weights nor momentum, and
    the host does not read it (torch.amp.GradScaler sets the attribute of the same name). None: no step is skipped.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient. closure: must be None."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            grads = [_in_layout_of(weight, weight.grad) for weight in weights]
            momenta = [self._momentum(weight) for weight in weights] if group["momentum"] else []
            weight_vectors, grad_vectors, momentum_vectors = (
                [_whole_vectors(tensor) for tensor in tensors] for tensors in (weights, grads, momenta)
            )
            update_weights(
                weight_vectors,
                grad_vectors,
                [*momentum_vectors] or [None] * len(weights),
                fused=True,
                found_inf=self.found_inf,
                **{name: group[name] for name in _SETTINGS},
            )
            for tensor, vector in zip([*weights, *momenta], weight_vectors + momentum_vectors, strict=True):
                if vector is not tensor:
                    tensor.copy_(vector[: tensor.numel()].view_as(tensor))

    def _momentum(self, weight: Tensor) -> Tensor:
        """Return the buffer, of zeros before the first step: torch's own is without values if that step is skipped."""
        state = self.state[weight]
        buffer = state.get("momentum_buffer")
        state["momentum_buffer"] = torch.zeros_like(weight) if buffer is None else _in_layout_of(weight, buffer)
        return state["momentum_buffer"]


_SETTINGS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


def _in_layout_of(weight: Tensor, tensor: Tensor | None) -> Tensor:
    """Return `tensor` in the memory order of the weight: the fused kernel on CPUs takes it for granted.

    They differ for a momentum of a checkpoint that was made in another memory format.
    """
    assert tensor is not None
    if tensor.stride() == weight.stride():
        return tensor
    same = all(a == b or n == 1 for a, b, n in zip(tensor.stride(), weight.stride(), weight.shape, strict=True))
    return tensor if same else torch.empty_like(weight).copy_(tensor)


def _whole_vectors(tensor: Tensor) -> Tensor:
    """On a CPU, pad the values to a multiple of 16, the width of its vectors.

    The fused kernel rounds the values after the last full vector in another way than torch's other SGD. Padded, the
    results of all are bit-identical.
    """
    if tensor.device.type != "cpu" or tensor.numel() % 16 == 0:
        return tensor
    return F.pad(tensor.reshape(-1), (0, -tensor.numel() % 16))


def sgd(
    model: nn.Module,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    weight_decay_norm: float,
) -> SGD:
    """Return an SGD with `weight_decay` on kernels (2 dimensions and more) and `weight_decay_norm` on norms and biases."""
    kernels = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [
        {"params": kernels, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": weight_decay_norm},
    ]
    return SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def load_momenta(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the momenta of a checkpoint. Weight decay, momentum and all other settings stay those of the optimizer.

    The learning rate becomes that of the checkpoint's last step; each step sets its rate.
    """
    of_state = ("params", "lr")
    settings = [
        {name: value for name, value in group.items() if name not in of_state} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def cosine(epoch: float, *, epochs: int, base_lr: float) -> float:
    """Half a cosine from base_lr to 0 over `epochs`. epoch: progress, with fractions, so the rate changes at every step."""
    return base_lr * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))


def steps(epoch: float, *, base_lr: float, milestones: Sequence[float], factor: float = 0.1) -> float:
    """base_lr, multiplied by `factor` at each milestone passed. milestones: epochs, e.g. (44, 88) of 118.

    A milestone that is a number of steps, and so a fraction of an epoch, is met at that step despite rounding.
    """
    return base_lr * factor ** sum(epoch >= milestone - 1e-9 for milestone in milestones)


def warmed_up(epoch: float, *, schedule: Callable[[float], float], warmup_epochs: float, warmup_lr: float) -> float:
    """Return the schedule's rate; before `warmup_epochs` a line from warmup_lr to the schedule's rate there.

    Source: PySlowFast's Kinetics recipes; cosine from 0.1, 196 epochs, 34 of warm-up from 0.01 give 0.01, 0.0514, 0.0928,
    0.05 at epochs 0, 17, 34, 98.
    """
    if epoch >= warmup_epochs:
        return schedule(epoch)
    return warmup_lr + (schedule(warmup_epochs) - warmup_lr) * epoch / warmup_epochs


def milestones_of(iterations: Sequence[float], steps_per_epoch: int) -> tuple[float, ...]:
    """Steps that each rate is held for -> where they end, in epochs; the last one is the length of the run.

    (150_000, 100_000, 50_000), the paper's, at 3666 steps an epoch: 40.92, 68.19 and 81.83 epochs.
    """
    return tuple(total / steps_per_epoch for total in accumulate(iterations))
