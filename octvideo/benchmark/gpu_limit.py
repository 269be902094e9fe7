"""The roofline model of the networks that the GPU suite measures: a limit to show beside a measurement, not one itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from octvideo import build
from octvideo.analysis.roofline import Card, Roofline, card_named, efficiency, step_roofline
from octvideo.benchmark.gpu_networks import ALPHAS, I3D_SIZE, TOY_SIZE, Size, network_config

FORMS = (("training", "compiled"), ("training", "eager"), ("inference", "compiled"))
"""Mode and backend. Inference in eager mode has octvideo's fused form, for which the model has no kernels."""


def emit_limits(emit: Callable[[dict[str, Any]], None], toy: bool) -> None:
    """Emit the modelled efficiency of each octave network in each form; nothing for a card without known rates."""
    name, size = ("H100", TOY_SIZE) if toy else (torch.cuda.get_device_name(0), I3D_SIZE)
    card = card_named(name)
    if card is None:
        print(f"{name}: the model has no peak rate and bandwidth of this card, so the report has no limits")
        return
    for mode, backend in FORMS:
        vanilla, macs = _roofline(size, 0.0, mode, backend, card)
        for alpha in ALPHAS[:1] if toy else ALPHAS:
            octave, octave_macs = _roofline(size, alpha, mode, backend, card)
            best = efficiency(vanilla, octave, octave_macs / macs)
            emit({"mode": mode, "backend": backend, "alpha": alpha, "seconds": octave.seconds, "efficiency": best})
            print(f"{mode}, {backend}, alpha {alpha:g}: modelled efficiency {best:.2f}", flush=True)


def _roofline(size: Size, alpha: float, mode: str, backend: str, card: Card) -> tuple[Roofline, int]:
    """Return the roofline of a step and the multiply-adds of one clip."""
    cfg = network_config(size, alpha)
    crop = cfg.DATA.TRAIN_CROP
    modelled = step_roofline(
        build.network(cfg),
        build.clip_size(cfg, crop),
        batch=size.batch,
        card=card,
        training=mode == "training",
        dtype=torch.bfloat16,
        fused=backend == "compiled",
    )
    return modelled, build.cost(cfg, crop).macs.total
