#!/usr/bin/env python
"""A trained network as a file that runs without octvideo.

python tools/export.py --cfg CONFIG --out FILE.onnx|FILE.pt2|FILE.xml [--checkpoint FILE] [--no-fuse] [KEY VALUE ...]

.onnx for ONNX Runtime and others, .pt2 for torch, .xml (with a .bin) for OpenVINO. Takes clips of DATA.NUM_FRAMES frames of
DATA.TEST_CROP pixels, any number at a time, and holds what to know of them. The file is run before it is kept. How to use
it: docs/deployment.md.
"""

from __future__ import annotations

if __name__ == "__main__":
    import octvideo.starting  # first: importing the others takes seconds

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from tabulate import tabulate
from torch import Tensor, nn

import octvideo
from octvideo import build, command, deploy, jobs
from octvideo.deploy import ExportError
from octvideo.engine import checkpoint
from octvideo.engine.checkpoint import CheckpointError
from octvideo.engine.distributed import World
from octvideo.errors import UserError
from octvideo.files import path_argument
from octvideo.octave import fuse

LIMIT = 1e-4  # of the largest logit
UNTRAINED = "RANDOM WEIGHTS: this says nothing"
USE = {
    ".onnx": "onnxruntime.InferenceSession({file!r}).run(['logits'], {{'clip': clips}})",
    ".pt2": "torch.export.load({file!r}).module()(clips)",
    ".xml": "openvino.Core().compile_model({file!r}, 'CPU')({{'clip': clips}})['logits']",
}


class RequestError(UserError, ValueError):
    """A command line that cannot be carried out."""


def load_network(cfg: CfgNode, *, random_weights: bool) -> tuple[nn.Module, dict[str, str]]:
    """The network of TEST.CHECKPOINT, or of the newest checkpoint, of its moving average where it has one; what to tell
    whoever runs it."""
    model = build.network(cfg)
    if random_weights:
        return model, facts(cfg, UNTRAINED, [])
    folder = Path(cfg.OUTPUT_DIR)
    if not cfg.TEST.CHECKPOINT and not checkpoint.found(folder):
        remedy = "train first or give --checkpoint FILE; --random-weights goes on without any"
        raise CheckpointError(f"{folder}: no checkpoint to export; {remedy}")
    path, state = jobs.weights_to_test(cfg, folder)
    jobs.load_trained(cfg, model, state, path)
    average = ", moving average" if "ema" in state else ""
    weights = f"{path} (epoch {state.get('epoch')}, step {state.get('step')}{average})"
    return model, facts(cfg, weights, class_names(cfg, state, path))


def class_names(cfg: CfgNode, state: dict[str, Any], path: Path) -> list[str]:
    """Those of the checkpoint, else of DATA.CLASS_NAMES; none where neither has some."""
    classes = state.get("classes") or []
    if not isinstance(classes, list) or len(classes) not in (0, cfg.MODEL.NUM_CLASSES):
        raise CheckpointError(f"{path}: its classes are no list of {cfg.MODEL.NUM_CLASSES} names; it is of no use")
    if not classes and cfg.DATA.CLASS_NAMES:
        return build.class_names(cfg, cfg.DATA.CLASS_NAMES)
    return [str(name) for name in classes]


def facts(cfg: CfgNode, weights: str, classes: list[str]) -> dict[str, str]:
    """What a file holds beside the network. Lists are JSON. It is all ASCII: class names may be anything."""
    told: dict[str, Any] = {
        "octvideo": octvideo.__version__,
        "network": build.network_name(cfg),
        "alpha": cfg.OCTAVE.ALPHA,
        "weights": weights,
        "short_side": cfg.DATA.TEST_SHORT_SIDE,
        "crop": cfg.DATA.TEST_CROP,
        "mean": list(cfg.DATA.MEAN),
        "std": list(cfg.DATA.STD),
    }
    if not build.takes_images(cfg):
        told |= {key.lower(): cfg.DATA[key] for key in ("NUM_FRAMES", "SAMPLING_RATE", "TARGET_FPS", "POLICY")}
    if classes:
        told["classes"] = classes
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in told.items()}


def example(cfg: CfgNode) -> Tensor:
    """One clip of noise, as the network is given it: the same for each run."""
    size = (1, *build.clip_size(cfg, cfg.DATA.TEST_CROP))
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return build.prepare_clips(cfg)(pixels).contiguous()


def fused(model: nn.Module) -> nn.Module:
    try:
        return fuse(model)
    except Exception as error:  # torch.fx's have no common base
        raise RequestError(f"this network cannot be fused ({error}); --no-fuse exports it as it is") from error


def relative_error(model: nn.Module, clip: Tensor, path: Path) -> float:
    """The largest difference between the file's logits and the network's, over the network's largest one."""
    with torch.no_grad():
        expected = model.eval()(clip)
    found = deploy.load(path, threads=torch.get_num_threads())(clip)
    return float((found - expected).abs().max() / expected.abs().max())


def check_earlier(out: Path) -> None:
    """Raise RequestError if `out`, or the .bin that goes with an .xml, is there and cannot be an earlier export."""
    if out.suffix != ".xml":
        return
    head = out.read_bytes()[:1000] if out.is_file() else b""
    if (head and b"<net " not in head) or (not head and out.with_suffix(".bin").exists()):
        raise RequestError(
            f"--out {out}: {out.stem}.xml or {out.stem}.bin is there, and not a network; give another name"
        )


def export(options: argparse.Namespace) -> None:
    deploy.check_format(options.out)
    if options.out.is_dir():
        raise RequestError(f"--out {options.out} is a folder; give the name of a file in it")
    check_earlier(options.out)
    if options.random_weights and options.checkpoint:
        raise RequestError("--random-weights and --checkpoint contradict each other; give one of them")
    chosen = ["TEST.CHECKPOINT", options.checkpoint] if options.checkpoint else []
    cfg = build.load_config(options.cfg, [*options.overrides, *chosen])
    build.use_threads(cfg, World())
    model, metadata = load_network(cfg, random_weights=options.random_weights)
    clip = example(cfg)
    errors: list[float] = []

    def check(path: Path) -> None:
        errors.append(relative_error(model, clip, path))
        if not errors[0] <= LIMIT:
            reason = f"differs from the network by {errors[0]:.2g} of the largest logit, and {LIMIT:g} is allowed"
            raise ExportError(f"{options.out} {reason}; it was not kept")

    form = model if options.no_fuse else fused(model)
    earlier = {path for path in (options.out, options.out.with_suffix(".bin")) if path.exists()}
    files = deploy.export(form, clip, options.out, metadata=metadata, check=check)
    for path in earlier.intersection(files):
        print(f"replaced {path}")
    print(summary(cfg, metadata, files, errors[0], options))


def summary(
    cfg: CfgNode, metadata: dict[str, str], files: list[Path], error: float, options: argparse.Namespace
) -> str:
    sizes = ", ".join(f"{file} ({file.stat().st_size / 2**20:.2f} MiB)" for file in files)
    clip = " x ".join(map(str, build.clip_size(cfg, cfg.DATA.TEST_CROP)))
    mean, std = metadata["mean"], metadata["std"]
    names = "with names" if "classes" in metadata else "without names"
    rows = [
        ["network", f"{metadata['network']}, alpha {metadata['alpha']}{'' if options.no_fuse else ', fused'}"],
        ["weights", metadata["weights"]],
        ["written", sizes],
        ["clip", f"float32 N x {clip}, (RGB / 255 - {mean}) / {std}"],
        ["logits", f"float32 N x {cfg.MODEL.NUM_CLASSES}, classes {names}"],
        ["error", f"{error:.1e} of the largest logit, on one clip of noise"],
        ["use", USE[options.out.suffix].format(file=str(options.out))],
    ]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


@command.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 the export failed, 2 the request was wrong, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, metavar="CONFIG", help="YAML file that the network was trained with")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights (default: the newest whole one in OUTPUT_DIR)")
    parser.add_argument("--random-weights", action="store_true", help="go on without trained weights, and say so")
    parser.add_argument("--out", type=path_argument, required=True, metavar="FILE", help="ends in .onnx, .pt2 or .xml")
    parser.add_argument("--no-fuse", action="store_true", help="as it was trained, not in its inference form")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="e.g. DATA.TEST_CROP 224")
    options = parser.parse_intermixed_args(arguments)  # so that KEY VALUE may stand between the flags
    export(options)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
