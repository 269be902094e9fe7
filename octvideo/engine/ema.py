"""An exponential moving average of the weights, for validation and test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """average = d * average + (1 - d) * weight after each step, d = min(decay, (1 + step) / (10 + step)).

    The second term makes the average forget the random initialization quickly (as TensorFlow's ExponentialMovingAverage
    does). Running statistics of norms, which are averages already, stay the model's.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.average = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self._weights: list[Tensor] = [weight for _, weight in model.named_parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights. step: number of steps taken, including the last one."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), self._weights, share)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the model's state dict with the average in place of the weights."""
        return {**self.model.state_dict(), **self.average}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, average in self.average.items():
            average.copy_(state[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the averaged weights inside the context; restore the weights afterwards."""
        own = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self.model.load_state_dict(self.average, strict=False)
        try:
            yield
        finally:
            self.model.load_state_dict(own, strict=False)
