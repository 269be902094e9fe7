"""Batches moved to the device while the step before them is running."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def on_device(batches: Iterable[Any], device: torch.device) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Yield (batch, clips, labels) with clips [N, V, C, (T,) H, W] and labels [N] on the device.

    On a GPU the copies run on a separate stream. The host has launched the step before and does not wait for it, so
    they overlap with it. Batches must be in pinned memory, or the copy waits.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch, batch.clips.to(device), batch.labels.to(device)
        return
    copying = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            clips, labels = (x.to(device, non_blocking=True) for x in (batch.clips, batch.labels))
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        for x in (clips, labels):
            x.record_stream(computing)  # or their memory could be used for the next copy too early
        yield batch, clips, labels
