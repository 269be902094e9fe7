"""`tools/analyze.py roofline`: print the model of octvideo/analysis/roofline.py for a network at several alphas."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import torch
from fvcore.common.config import CfgNode
from tabulate import tabulate
from torch import nn

from octvideo import build
from octvideo.analysis.roofline import CARDS, Card, Roofline, card_named, efficiency, step_roofline
from octvideo.errors import UserError

FORMS: dict[str, dict[str, Any]] = {
    "operators": {"fused": False},
    "fused": {"fused": True},
    "joint": {"fused": True, "joint": True},
}
NOTE = """A model, not a measurement. efficiency: ratio of multiply-adds over ratio of roofline times, the best that kernels
of this form can reach. memory-bound: share of the time in kernels that wait for memory. Assumptions: docs/gpu.md."""


class CardError(UserError, ValueError):
    """A card that the table does not have, or rates that are incomplete."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(dict.fromkeys(card.name for card in CARDS))
    parser.add_argument("--cfg", required=True, metavar="CONFIG")
    parser.add_argument("--batch", type=_positive, required=True, metavar="N", help="clips or images of a step")
    parser.add_argument(
        "--card", default="h100", metavar="CARD", help=f"{known} (default h100), or a name with --flops"
    )
    parser.add_argument("--measured", action="store_true", help="the rates that were measured on the card")
    parser.add_argument("--flops", type=_rate, metavar="F", help="half-precision FLOP/s of another card, e.g. 312e12")
    parser.add_argument("--bandwidth", type=_rate, metavar="B", help="bytes/s of its memory, e.g. 2.0e12")
    parser.add_argument("--alphas", type=_alphas, default=".125,.25,.5", metavar="A,B", help="default .125,.25,.5")
    parser.add_argument("--mode", choices=("training", "inference"), default="training", help="default training")
    parser.add_argument("--form", choices=tuple(FORMS), default="fused", help="which operators share a kernel")
    parser.add_argument("--per-layer", action="store_true", help="the layers of the config's network as well")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE")


def roofline(options: argparse.Namespace) -> None:
    card = _card(options)
    cfg = build.load_config(options.cfg, options.overrides)
    size = " x ".join(map(str, build.clip_size(cfg, cfg.DATA.TRAIN_CROP)[1:]))
    print(
        f"{build.network_name(cfg)}, {size}, batch {options.batch}, bfloat16: {options.mode}, form {options.form}; "
        f"{card.name}, {'measured' if card.measured else 'nominal'} {card.flops / 1e12:g} TFLOP/s and "
        f"{card.bandwidth / 1e12:g} TB/s\n\n{_networks(options, card)}\n\n{NOTE}"
    )
    if options.per_layer:
        print(f"\n{_layers(_model(cfg, options, card))}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 1 or more")
    return int(text)


def _rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 such as 312e12")


def _alphas(text: str) -> list[float]:
    with contextlib.suppress(ValueError):
        alphas = [float(alpha) for alpha in text.split(",")]
        if all(0 < alpha <= 1 for alpha in alphas):
            return alphas
    raise argparse.ArgumentTypeError(f"{text!r} is not a list of alphas above 0 and up to 1 such as .125,.25")


def _card(options: argparse.Namespace) -> Card:
    if options.flops and options.bandwidth:
        return Card(options.card, options.flops, options.bandwidth, options.measured)
    if options.flops or options.bandwidth:
        raise CardError("--flops and --bandwidth describe a card together: give both or neither")
    card = card_named(options.card, measured=options.measured)
    if card is None:
        known = ", ".join(dict.fromkeys(card.name for card in CARDS))
        raise CardError(f"--card is {options.card}; known: {known}; for another card give --flops and --bandwidth")
    return card


def _networks(options: argparse.Namespace, card: Card) -> str:
    rows = [("vanilla", 0.0, 1)]
    rows += [(f"alpha {alpha:g}", alpha, 1) for alpha in options.alphas]
    rows += [(f"alpha {alpha:g}, ROUND_TO 8", alpha, 8) for alpha in options.alphas]
    cells, vanilla, vanilla_macs = [], None, 0
    for name, alpha, round_to in rows:
        octave = ["OCTAVE.ALPHA", f"{alpha:g}", "OCTAVE.RATIOS", "[]", "OCTAVE.ROUND_TO", str(round_to)]
        cfg = build.load_config(options.cfg, [*options.overrides, *octave])
        macs, model = build.cost(cfg, cfg.DATA.TRAIN_CROP).macs.total, _model(cfg, options, card)
        vanilla, vanilla_macs = vanilla or model, vanilla_macs or macs
        ratio = macs / vanilla_macs
        cells.append(
            [
                name,
                f"{macs / 1e9:.3f}",
                f"{ratio:.3f}",
                f"{model.flops / 1e12:.3f}",
                f"{model.bytes / 1e9:.2f}",
                f"{1e3 * model.seconds:.2f}",
                f"{100 * model.memory_bound:.0f} %",
                f"{model.seconds / vanilla.seconds:.3f}",
                f"{efficiency(vanilla, model, ratio):.2f}",
            ]
        )
    header = ["model", "G macs", "ratio", "TFLOP", "GB", "roofline ms", "memory-bound", "time ratio", "efficiency"]
    return _table(cells, header, left=1)


def _model(cfg: CfgNode, options: argparse.Namespace, card: Card) -> Roofline:
    clip = build.clip_size(cfg, cfg.DATA.TRAIN_CROP)
    training = options.mode == "training"
    return step_roofline(_network(cfg), clip, batch=options.batch, card=card, training=training, **FORMS[options.form])


def _network(cfg: CfgNode) -> nn.Module:
    """The network without weights; one of another package may not be built so."""
    with contextlib.nullcontext() if cfg.MODEL.FACTORY else torch.device("meta"):
        return build.network(cfg)


def _layers(model: Roofline) -> str:
    cells = [
        [
            layer.name or "(network)",
            layer.kind,
            layer.phase,
            f"{layer.flops / 1e9:.2f}",
            f"{layer.bytes / 1e6:.2f}",
            f"{1e6 * layer.seconds:.1f}",
            layer.bound,
        ]
        for layer in model.layers
    ]
    return _table(cells, ["layer (model)", "kind", "phase", "GFLOP", "MB", "roofline us", "bound"], left=3)


def _table(cells: list[list[str]], header: list[str], left: int) -> str:
    align = ("left",) * left + ("right",) * (len(header) - left)
    return tabulate(cells, header, tablefmt="github", disable_numparse=True, colalign=align)
