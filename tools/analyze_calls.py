"""Operator calls of a training step: a network at several alphas and in the naive form, beside its vanilla counterpart."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from tabulate import tabulate
from torch import Tensor, nn

from octvideo import build
from octvideo.analysis.calls import compiled_calls, operator_calls
from octvideo.analysis.naive import naive
from octvideo.config import ConfigError

BATCH = 2  # the number of calls does not depend on it
NOTE = """
Calls of one training step: forward pass, loss and backward pass, without the optimizer, whose calls do not depend on alpha.
ratio: over the first line."""
EAGER = """calls: operators that compute something; views: views and allocations. A call counts once, also where it launches
several kernels. Counted on the meta device, where torch's operators replace the Triton kernels."""
COMPILED = """generated: kernels that Inductor writes for a CPU, after fusion. library: operators that it calls, such as
convolutions. Counted while it compiles."""


class Row(NamedTuple):
    """Calls of one network. columns: number of calls by heading, of which `total` is the sum of all but the views."""

    name: str
    columns: dict[str, int]
    by_operator: Counter[str]
    total: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg", required=True, metavar="CONFIG")
    parser.add_argument("--alphas", type=_alphas, metavar="A,B", help="a network for each (default: the config's)")
    parser.add_argument("--compiled", action="store_true", help="kernels of torch.compile in place of operators")
    parser.add_argument("--operators", action="store_true", help="calls of each operator too")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE")


def _alphas(text: str) -> list[float]:
    try:
        alphas = [float(alpha) for alpha in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of alphas such as .125,.25") from None
    if wrong := [alpha for alpha in alphas if not 0 < alpha <= 1]:
        raise argparse.ArgumentTypeError(f"alpha {wrong[0]:g} is not above 0 and at most 1")
    return alphas


def calls(options: argparse.Namespace) -> None:
    count = _compiled if options.compiled else _eager
    alphas = options.alphas or [build.load_config(options.cfg, options.overrides).OCTAVE.ALPHA]
    if 0.0 in alphas:
        raise ConfigError(
            str(options.cfg), ["OCTAVE.ALPHA is 0, the vanilla network; give --alphas above 0, such as .25"]
        )
    vanilla = _load(options, 0.0)
    rows = [count("vanilla", vanilla, build.network(vanilla))]
    for alpha in alphas:
        cfg = _load(options, alpha)
        rows.append(count(f"alpha {alpha:g}", cfg, build.network(cfg)))
        rows.append(count(f"alpha {alpha:g}, naive", cfg, naive(build.network(cfg))))
    print(_table(rows))
    if options.operators:
        print(f"\n{_operators(rows)}")
    print(NOTE, COMPILED if options.compiled else EAGER, sep="\n")


def _load(options: argparse.Namespace, alpha: float) -> CfgNode:
    fixed = ["OCTAVE.ALPHA", f"{alpha:g}", "OCTAVE.RATIOS", "[]", "MODEL.COMPILE", "False"]
    return build.load_config(options.cfg, [*options.overrides, *fixed])


def _forward(cfg: CfgNode, model: nn.Module, device: str) -> Callable[[], Tensor]:
    """Return what computes the loss of a batch on `device`."""
    layout = build.memory_format(cfg)
    model.to(device).to(memory_format=layout).train()  # type: ignore[call-overload]
    clips = torch.zeros(BATCH, *build.clip_size(cfg, cfg.DATA.TRAIN_CROP), device=device).contiguous(
        memory_format=layout
    )
    labels = torch.zeros(BATCH, dtype=torch.int64, device=device)
    return lambda: F.cross_entropy(model(clips), labels)


def _eager(name: str, cfg: CfgNode, model: nn.Module) -> Row:
    loss = _forward(cfg, model, "meta")
    values: list[Tensor] = []
    forward = operator_calls(lambda: values.append(loss()))
    backward = operator_calls(values[0].backward)
    columns = {"forward": forward.launches.total(), "backward": backward.launches.total()}
    views = forward.views.total() + backward.views.total()
    by_operator = forward.launches + backward.launches
    return Row(name, {**columns, "views": views}, by_operator, by_operator.total())


def _compiled(name: str, cfg: CfgNode, model: nn.Module) -> Row:
    model.compile(dynamic=False, fullgraph=True)
    loss = _forward(cfg, model, "cpu")
    found = compiled_calls(lambda: loss().backward())
    return Row(name, dict(found), found, found.total())


def _table(rows: list[Row]) -> str:
    cells = [[row.name, *row.columns.values(), row.total, f"{row.total / rows[0].total:.2f}"] for row in rows]
    return tabulate(cells, ["training step", *rows[0].columns, "calls", "ratio"], "github", disable_numparse=True)


def _operators(rows: list[Row]) -> str:
    names = sorted({name for row in rows for name in row.by_operator})
    cells = [[name.removeprefix("aten::"), *(row.by_operator[name] for row in rows)] for name in names]
    return tabulate(cells, ["calls", *(row.name for row in rows)], "github", disable_numparse=True)
