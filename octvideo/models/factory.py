"""Networks of other packages, named in a configuration as package.module:function."""

from __future__ import annotations

import importlib

from torch import nn


def from_factory(factory: str, num_classes: int) -> nn.Module:
    """What the function gives for num_classes=num_classes: a network that takes [N, 3, (T,) H, W] and gives logits [N, K].

    Importing and calling it runs its code, whatever that does.
    Raises ValueError where there is no such function, it fails, or what it gives is no network.
    """
    module, _, function = factory.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
        network = make(num_classes=num_classes)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{factory}: {reason}; give package.module:function, importable here (PYTHONPATH), that takes num_classes"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{factory} gives a {type(network).__name__}, not a torch.nn.Module")
    return network


def takes_images(network: nn.Module) -> bool:
    """By its first convolution: images [N, 3, H, W] or clips [N, 3, T, H, W]. Raises ValueError where it has none."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            return isinstance(module, nn.Conv2d)
    raise ValueError("has no nn.Conv2d and no nn.Conv3d, so whether it takes images or clips cannot be told")
