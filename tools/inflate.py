#!/usr/bin/env python
"""Weights of other files and other networks -> a checkpoint to start from (TRAIN.INIT) or to test (TEST.CHECKPOINT).

python tools/inflate.py --from FILE --cfg CONFIG --out FILE [--how mean|centre] [--new-head] [KEY VALUE ...]

FILE, recognized by its content: a checkpoint of octvideo; a PyTorch file in the names of octvideo, torchvision, timm,
PySlowFast or pytorchvideo; a Caffe2 pickle of blobs; an MXNet .params of the octave networks, or the .tar of one.
Weights of an image network are inflated where CONFIG's network takes videos. alpha may differ: it is not in the weights.
The classifier is kept where the class counts agree; where they do not, --new-head, or TRAIN.NEW_HEAD True in CONFIG,
leaves it out.
"""

from __future__ import annotations

if __name__ == "__main__":
    import octvideo.starting  # noqa: F401  # first: importing the others takes seconds

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from tabulate import tabulate
from torch import Tensor

from octvideo import build, command
from octvideo.engine import checkpoint
from octvideo.engine.checkpoint import CheckpointError
from octvideo.errors import UserError
from octvideo.files import path_argument
from octvideo.weights import files, mxnet, names
from octvideo.weights.coverage import Coverage, WeightsError, is_counter
from octvideo.weights.inflate import HOW, image_shape, inflate


class RequestError(UserError, ValueError):
    """A command line that cannot be carried out."""


def convert(options: argparse.Namespace) -> None:
    cfg = build.load_config(options.cfg, options.overrides)
    replaces = _may_replace(options.out, options.source)
    model = build.network(cfg)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    source = files.read(options.source)
    from_images = not any(len(value.shape) == 5 for value in source.entries.values())
    if build.takes_images(cfg) and not from_images:
        raise WeightsError(f"{options.source}: weights of a video network, but {cfg.MODEL.NAME} takes images")
    shapes = {name: image_shape(shape) for name, shape in own.items()} if from_images else own
    to_octvideo = mxnet.to_octvideo if source.kind == "mxnet" else names.to_octvideo
    try:
        weights, coverage = to_octvideo(source.entries, shapes)
    except WeightsError as error:
        raise WeightsError(f"{options.source}: {error}") from None
    # a new non-local block is the identity, so a network may start with it
    expected = [name for name in coverage.missing if from_images and ".nonlocal" in name]
    if options.new_head or cfg.TRAIN.NEW_HEAD:
        expected += [name for name in own if name.startswith("head.")]
    _require_fit(options.source, cfg.MODEL.NAME, coverage, expected)
    inflated: list[str] = []
    if from_images:
        weights, inflated = inflate(weights, own, options.how)
    state = {name: value for name, value in model.state_dict().items() if name not in expected or ".nonlocal" in name}
    notes = {"source": str(options.source), "config": cfg.dump()}
    checkpoint.save_weights(options.out, {**state, **weights}, **notes)
    parameters = {name: value.numel() for name, value in model.named_parameters()}
    if replaces:
        print(f"replaced {options.out}")
    print(f"{options.source} ({source.kind}) -> {options.out}, {cfg.MODEL.NAME}")
    print(_table(parameters, weights, inflated, options.how, set(own) - set(weights)))


def _may_replace(out: Path, source: Path) -> bool:
    """True if `out` is a file of this tool. Raises RequestError if it is another file, such as a checkpoint of a run."""
    if not out.exists():
        return False
    remedy = "give another --out, or remove it first"
    if out.resolve() == source.resolve():
        raise RequestError(f"--out {out} is the file to read; {remedy}")
    try:
        state = checkpoint.load(out)
    except CheckpointError:
        state = {}
    if state.get("step") != 0 or "source" not in state:
        raise RequestError(f"--out {out} exists and was not written by this tool; {remedy}")
    return True


def _require_fit(path: Path, network: str, coverage: Coverage, expected: Collection[str]) -> None:
    strange = [name for name in coverage.missing if name not in expected]
    strange += [name for name, *_ in coverage.mismatched if name not in expected]
    if not strange and not coverage.unexpected:
        return
    only_head = not coverage.unexpected and all(name.startswith("head.") for name in strange)
    hint = "--new-head leaves the classifier out" if only_head else "name a configuration of the network that it is of"
    raise WeightsError(f"{path} does not fit {network}; {hint}\n{coverage.table()}")


def _table(
    parameters: Mapping[str, int], weights: Mapping[str, Tensor], inflated: list[str], how: str, left: set[str]
) -> str:
    """How each entry of the network came about, with numbers of entries and of parameters."""
    groups = {
        f"inflated ({how})": inflated,
        "copied": [name for name in weights if name not in inflated and not is_counter(name)],
        "initialized": [name for name in left if not is_counter(name) and not name.startswith("head.")],
        "left out: the classifier": [name for name in left if name.startswith("head.")],
    }
    rows = [
        [title, f"{len(members)}", f"{sum(parameters.get(name, 0) for name in members):,}"]
        for title, members in groups.items()
        if members
    ]
    taken = sum(parameters.get(name, 0) for name in weights)
    entries = sum(not is_counter(name) for name in weights)
    rows.append(["from the file, of all", f"{entries}", f"{taken:,} of {sum(parameters.values()):,}"])
    return tabulate(
        rows,
        ["", "entries", "parameters"],
        tablefmt="github",
        disable_numparse=True,
        colalign=("left", "right", "right"),
    )


@command.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 the file does not do, 2 the request was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--from", dest="source", type=path_argument, required=True, metavar="FILE", help="weights to read"
    )
    parser.add_argument("--cfg", required=True, metavar="CONFIG", help="the network that is to take them")
    parser.add_argument("--out", type=path_argument, required=True, metavar="FILE", help="checkpoint to write")
    parser.add_argument(
        "--how", choices=sorted(HOW), default="mean", help="share over time, or all at the middle frame"
    )
    parser.add_argument("--new-head", action="store_true", help="leave a classifier of other classes out")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE")
    options = parser.parse_args(arguments)
    convert(options)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
