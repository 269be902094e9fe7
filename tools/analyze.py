#!/usr/bin/env python
"""Questions asked of a network.

python tools/analyze.py complexity --cfg CONFIG [--json] [--per-layer] [KEY VALUE ...]
    parameters, multiply-adds and activations of one training clip
python tools/analyze.py clip --cfg CONFIG --index I [--out FILE] [--epochs N] [KEY VALUE ...]
    a picture of exactly what the network is shown of entry I: as training draws it in N epochs, and every test view
python tools/analyze.py frequency --cfg CONFIG --checkpoint FILE [--against-cfg CONFIG --against-checkpoint FILE]
        [--list LIST] [--layers A,B] [--maps N] [--out FILE] [--json FILE] [KEY VALUE ...]
    which frequencies the maps of its stages hold, high and low group apart, beside those of its vanilla twin
python tools/analyze.py roofline --cfg CONFIG --batch N [--card CARD] [--measured] [--flops F --bandwidth B]
        [--alphas .125,.25,.5] [--mode training|inference] [--form operators|fused|joint] [--per-layer] [KEY VALUE ...]
    a model, not a measurement: the least time of a step on a card, and the best possible efficiency of octave networks
python tools/analyze.py zoo [--write FILE]
    the table of all Kinetics and ImageNet configurations beside the paper's printed numbers
python tools/analyze.py calls --cfg CONFIG [--alphas A,B] [--compiled] [--operators] [KEY VALUE ...]
    operator calls of a training step: vanilla, octave and naive form, eager or compiled
python tools/analyze.py golden --write FILE
    the counts of every configuration, for tests/golden/complexity.json
"""

from __future__ import annotations

if __name__ == "__main__":
    import octvideo.starting  # noqa: F401  # first: importing the others takes seconds

import argparse
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fvcore.common.config import CfgNode
from PIL import Image
from tabulate import tabulate
from torch import Tensor

from octvideo import build, command, jobs
from octvideo.analysis.complexity import Complexity
from octvideo.analysis.contact import contact_sheet
from octvideo.analysis.frequency import ALL, LOW, LOW_OWN_GRID, VANILLA, Spectra, picture, spectra
from octvideo.analysis.paper import IMAGES, PRINTED, allowed_difference
from octvideo.data.dataset import Sample
from octvideo.data.lists import ListError, VideoList
from octvideo.engine import checkpoint
from octvideo.engine.distributed import World, device_of
from octvideo.errors import UserError
from octvideo.files import path_argument

if TYPE_CHECKING or __package__:
    from tools import analyze_calls, analyze_roofline
else:  # run as a script, which has this folder on its path
    import analyze_calls
    import analyze_roofline

PNG = b"\x89PNG"  # what such a file begins with
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class RequestError(UserError, ValueError):
    """A command line that asks for what cannot be done."""


def configs() -> dict[str, Path]:
    """Every experiment by its name, folder/file."""
    paths = (path for path in CONFIGS.glob("*/*.yaml") if not path.parent.name.startswith("_"))
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(paths)}


def clip_cost(cfg: CfgNode) -> Complexity:
    return build.cost(cfg, cfg.DATA.TRAIN_CROP)


@cache
def cost_of(name: str) -> Complexity:
    """What the configuration of this name costs; counted once."""
    return clip_cost(build.load_config(configs()[name]))


def complexity(options: argparse.Namespace) -> None:
    cost = clip_cost(build.load_config(options.cfg, options.overrides))
    if options.json:
        content: dict[str, Any] = cost.as_dict()
        if options.per_layer:
            content["layers"] = [asdict(layer) for layer in cost.layers]
        print(json.dumps(content, indent=2))
        return
    if options.per_layer:
        rows = [
            [
                layer.name,
                layer.kind,
                f"{layer.params:,}",
                *(f"{v / 1e6:.2f}" for v in (*layer.macs, *layer.activations)),
            ]
            for layer in cost.layers
        ]
        header = ["layer", "kind", "parameters", "M macs high", "low", "M values high", "low"]
        print(
            tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=("left", "left", *["right"] * 5))
        )
        print()
    macs = cost.macs
    rows = [
        ["input of one clip or image", " x ".join(str(size) for size in cost.input)],
        ["parameters", f"{cost.params / 1e6:.3f} M"],
        ["multiply-adds, convolution + FC", f"{macs.conv_fc / 1e9:.3f} G"],
        ["multiply-adds, pooling windows", f"{macs.pool / 1e9:.3f} G"],
        ["multiply-adds, attention", f"{macs.attention / 1e9:.3f} G"],
        ["activations (layer outputs)", f"{cost.activations / 1e6:.3f} M values"],
    ]
    print(tabulate(rows, tablefmt="github", disable_numparse=True, colalign=("left", "right")))


def clip(options: argparse.Namespace) -> None:
    cfg = build.load_config(options.cfg, options.overrides)
    out = options.out or Path(cfg.OUTPUT_DIR, f"clip_{options.index}.png")
    command.check_output(out, PNG)
    rows: list[tuple[str, Tensor]] = []
    if cfg.TRAIN.ENABLE:
        videos = build.video_list(cfg, cfg.DATA.TRAIN_LIST, training=False)
        samples, name = build.train_samples(cfg, videos), _entry(videos, options.index)
        for epoch in range(options.epochs):
            rows.append((f"training, epoch {epoch}: {name}", _views(samples[epoch, options.index])[0]))
    if cfg.TEST.ENABLE:
        videos, crops = build.test_list(cfg), cfg.TEST.CROPS
        views, name = build.eval_samples(cfg, videos, cfg.TEST.CLIPS, crops), _entry(videos, options.index)
        for number, view in enumerate(_views(views[options.index])):
            rows.append((f"test, clip {number // crops}, crop {number % crops}: {name}", view))
    content = io.BytesIO()
    contact_sheet(rows).save(content, "PNG")
    command.write_output(out, content.getvalue())
    shown = " x ".join(str(size) for size in rows[0][1].shape[1:])
    print(f"{out}: {len(rows)} views of {shown}, before mean and standard deviation are taken off")


def _entry(videos: VideoList, index: int) -> str:
    if not 0 <= index < len(videos):
        raise ListError(f"{videos.source}: --index {index} is outside 0..{len(videos) - 1}")
    return f"{videos.path(index)} (label {videos.label(index)})"


def _views(sample: Sample) -> Tensor:
    if sample.error:
        raise ListError(sample.error)
    return sample.clips


def frequency(options: argparse.Namespace) -> None:
    if bool(options.against_cfg) != bool(options.against_checkpoint):
        raise RequestError("--against-cfg and --against-checkpoint go together: give both or neither")
    if options.maps < 1:
        raise RequestError(f"--maps is {options.maps}; allowed: 1 or more")
    for path in filter(None, (options.out, options.json)):
        if not path.parent.is_dir():
            raise RequestError(f"{path}: no folder {path.parent} to write to; make it or give another")
    cfg = build.load_config(options.cfg, [*options.overrides, *EAGER])
    out = options.out or Path(cfg.OUTPUT_DIR, "frequency.png")
    command.check_output(out, PNG)
    if options.json:
        command.check_output(options.json, b"{")
    videos = build.video_list(cfg, options.list, training=False) if options.list else build.test_list(cfg)
    layers = options.layers.split(",") if options.layers else None
    found = _spectra(cfg, options.checkpoint, videos, layers, options.maps)
    if options.against_cfg:
        twin = build.load_config(options.against_cfg, [*_not_of_the_network(options.overrides), *EAGER])
        if twin.OCTAVE.ALPHA:
            raise RequestError(f"--against-cfg {options.against_cfg} is octave; give the vanilla twin")
        if build.takes_images(twin) != build.takes_images(cfg):
            raise RequestError(f"--against-cfg {options.against_cfg}: one network takes images, the other videos")
        for layer, groups in _spectra(twin, options.against_checkpoint, videos, list(found), options.maps).items():
            found[layer] = {VANILLA: groups[ALL], **found[layer]}
    if options.json:
        numbers = {layer: {group: asdict(one) for group, one in groups.items()} for layer, groups in found.items()}
        command.write_output(options.json, (json.dumps(numbers, indent=1) + "\n").encode())
    content = io.BytesIO()
    picture(found).quantize(256, Image.Quantize.FASTOCTREE).save(content, "PNG", optimize=True)
    command.write_output(out, content.getvalue())
    print(_frequency_table(found))
    print(f"{out}: energy over frequency of {', '.join(found)}")


def _not_of_the_network(overrides: Sequence[str]) -> list[str]:
    """What holds for the vanilla twin too: where videos are and how they are read, but not what the network is."""
    pairs = zip(overrides[0::2], overrides[1::2], strict=True)
    return [text for key, value in pairs if not key.startswith(("MODEL.", "OCTAVE.")) for text in (key, value)]


def _spectra(cfg: CfgNode, path: Path, videos: VideoList, layers: Sequence[str] | None, maps: int) -> Spectra:
    """Of the middle clip and crop of videos in random order, the same for every network with the same SEED."""
    device = device_of(cfg.DEVICE, World())
    if device.type == "cpu":
        build.use_threads(cfg, World())
    model, state = build.network(cfg), checkpoint.load(path)
    jobs.load_trained(cfg, model, state, path)
    build.place(cfg, model, device).eval()
    samples, prepare = build.eval_samples(cfg, videos, 1, 1), build.prepare_clips(cfg)
    order = torch.randperm(len(videos), generator=torch.Generator().manual_seed(cfg.SEED)).tolist()
    inputs = (prepare(_views(samples[index]).to(device)) for index in order)
    per_input = max(MAPS_PER_CLIP, math.ceil(maps / len(videos)))
    return spectra(model, inputs, layers=layers, maps=maps, per_input=per_input, seed=cfg.SEED)


def _frequency_table(found: Spectra) -> str:
    rows = []
    for layer, groups in found.items():
        for group, one in groups.items():
            space, time = one.space, one.time
            row = [layer, group, " x ".join(map(str, one.own)), f"{space.count:,}", f"{space.even:,}"]
            row += map(_percent, (space.below_half, space.white, space.mean, space.below_half_with_mean))
            rows.append(row + ([_percent(time.below_half), _percent(time.white)] if time else []))
    header = ["layer", "group", "map", "maps", "even", "below half %", "white noise %", "mean %", "with it %"]
    header += ["in time %", "white noise %"] if len(rows[0]) > len(header) else []
    align = ("left", "left", *["right"] * (len(header) - 2))
    return tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=align) + FREQUENCY_NOTE


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


EAGER = ("MODEL.COMPILE", "off")  # its layers are listened to
MAPS_PER_CLIP = 50  # at least, so that a long list is not read to its end
FREQUENCY_NOTE = f"""

Below half: the share of what varies in a map that is below half of Nyquist; in time: the same along frames. White noise:
the same of noise. Mean: its share of a map's energy; with it: the share below half with the mean counted.
{LOW}: upsampled to the high map, as the network adds it there. {LOW_OWN_GRID}: as it is stored, below half of its OWN
Nyquist. All are means over maps, each over its own energy; even maps are left out."""


def zoo(options: argparse.Namespace) -> None:
    if options.write:
        command.check_output(options.write, ZOO_INTRODUCTION[:16].encode())
    text = ZOO_INTRODUCTION + _video_table() + ZOO_IMAGES + _image_table()
    if options.write:
        command.write_output(options.write, text.encode())
    else:
        print(text, end="")


def _video_table() -> str:
    rows = []
    for name, path in configs().items():
        if not name.startswith("kinetics"):
            continue
        cfg = build.load_config(path)
        cost, printed = cost_of(name), PRINTED.get(name)
        counted = cost.macs.conv_fc / 1e9
        difference = f"{counted - printed.gmacs:+.2f}" if printed else ""
        if printed and abs(counted - printed.gmacs) > allowed_difference(name):
            difference += " MISSES"
        rows.append(
            [
                f"[{name}]({name}.yaml)",
                f"{cfg.OCTAVE.ALPHA:g}" if cfg.OCTAVE.ALPHA else "-",
                POOLINGS[tuple(cfg.OCTAVE.POOL)] if cfg.OCTAVE.ALPHA else "-",
                f"{cost.params / 1e6:.2f}",
                f"{counted:.2f}",
                f"{printed.gmacs:.1f}" if printed else "",
                difference,
                f"{printed.top1:.1f}" if printed else "",
            ]
        )
    header = ["row", "alpha", "pooling", "params M", "counted G", "printed G", "difference", "paper's top-1 %"]
    return _table(rows, header)


def _image_table() -> str:
    rows = []
    for name, path in configs().items():
        if not name.startswith("imagenet/"):
            continue
        cfg, cost, row = build.load_config(path), cost_of(name), IMAGES.get(path.stem)
        rows.append(
            [
                f"[{path.stem}]({name}.yaml)",
                f"{cfg.OCTAVE.ALPHA:g}" if cfg.OCTAVE.ALPHA else "-",
                f"{cost.params / 1e6:.4f}",
                f"{cost.macs.conv_fc / 1e6:.2f}",
                f"{row.mmacs:.2f}" if row else "",
                f"{row.top1:.1f}" if row and row.top1 else "",
                f"{row.top5:.1f}" if row and row.top5 else "",
            ]
        )
    return _table(rows, ["network", "alpha", "params M", "counted M", "authors' M", "their top-1 %", "top-5 %"])


def _table(rows: list[list[str]], header: list[str]) -> str:
    align = ("left", *["right"] * (len(header) - 1))
    return tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=align) + "\n"


POOLINGS = {(1, 2, 2): "spatial", (2, 2, 2): "temporal-spatial"}
ZOO_INTRODUCTION = """# Configurations

Written by `python tools/analyze.py zoo --write configs/README.md`. `_base/` holds what several share (`_BASE_`); every
other file is one experiment, run by `python tools/run_net.py --cfg configs/FOLDER/FILE.yaml`.

## Video
Counted: multiply-adds of convolutions and linear layers for one 224 x 224 clip, pooling windows and attention products
apart (`tools/analyze.py complexity`). Printed, and the top-1: the paper's (Table 8), NOT measured with this code. Blank:
not a row of the paper. `_padded` pads the stem's pool as pytorchvideo and PySlowFast do, the rows of the paper do not.
`_in1k` fine-tunes from ImageNet weights, inflated to video, that it expects in TRAIN.INIT: `tools/inflate.py` makes them
(docs/weights.md).

"""
ZOO_IMAGES = """
## Images
For one 224 x 224 image. The authors' multiply-adds were counted on their code, and the accuracies are those of their
weights, NOT measured with this code; blank: not published. Input as theirs: `_base/imagenet_symbol.yaml` (the ablation
networks, with pre-activation) or `_base/imagenet_gluon.yaml` (the others).

"""


def golden(options: argparse.Namespace) -> None:
    command.check_output(options.write, b"{")
    counts = {name: cost_of(name).as_dict() for name in configs()}
    command.write_output(options.write, (json.dumps(counts, indent=1) + "\n").encode())


@command.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("complexity", help="what one network costs")
    one.add_argument("--cfg", required=True, metavar="CONFIG")
    one.add_argument("--json", action="store_true", help="one JSON object")
    one.add_argument("--per-layer", action="store_true", help="every layer, per frequency")
    one.add_argument("overrides", nargs="*", metavar="KEY VALUE")
    one.set_defaults(run=complexity)
    shown = commands.add_parser("clip", help="what the network is shown")
    shown.add_argument("--cfg", required=True, metavar="CONFIG")
    shown.add_argument("--index", type=int, required=True, metavar="I", help="entry of the list, from 0")
    shown.add_argument("--out", type=path_argument, metavar="FILE", help="PNG to write (default OUTPUT_DIR/clip_I.png)")
    shown.add_argument("--epochs", type=int, default=3, metavar="N", help="training draws to show (default 3)")
    shown.add_argument("overrides", nargs="*", metavar="KEY VALUE")
    shown.set_defaults(run=clip)
    spectrum = commands.add_parser("frequency", help="which frequencies activation maps hold")
    spectrum.add_argument("--cfg", required=True, metavar="CONFIG")
    spectrum.add_argument("--checkpoint", type=path_argument, required=True, metavar="FILE", help="its weights")
    spectrum.add_argument("--against-cfg", metavar="CONFIG", help="the vanilla twin, shown beside it")
    spectrum.add_argument("--against-checkpoint", type=path_argument, metavar="FILE", help="the twin's weights")
    spectrum.add_argument("--list", metavar="LIST", help="videos or images (default: DATA.TEST_LIST, else VAL_LIST)")
    spectrum.add_argument("--layers", metavar="A,B", help="names of modules (default: stages of two frequencies)")
    spectrum.add_argument(
        "--maps", type=int, default=10_000, metavar="N", help="of each group and layer (default 10000)"
    )
    spectrum.add_argument(
        "--out", type=path_argument, metavar="FILE", help="PNG to write (default OUTPUT_DIR/frequency.png)"
    )
    spectrum.add_argument("--json", type=path_argument, metavar="FILE", help="for all numbers")
    spectrum.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="MODEL. and OCTAVE. keys not of the twin")
    spectrum.set_defaults(run=frequency)
    limit = commands.add_parser("roofline", help="a model of the least time of a step on a card")
    analyze_roofline.add_arguments(limit)
    limit.set_defaults(run=analyze_roofline.roofline)
    table = commands.add_parser("zoo", help="the table of configurations")
    table.add_argument("--write", type=path_argument, metavar="FILE")
    table.set_defaults(run=zoo)
    counted = commands.add_parser("calls", help="operator calls of a training step")
    analyze_calls.add_arguments(counted)
    counted.set_defaults(run=analyze_calls.calls)
    counts = commands.add_parser("golden", help="the counts of every configuration")
    counts.add_argument("--write", type=path_argument, metavar="FILE", required=True)
    counts.set_defaults(run=golden)
    options = parser.parse_args(arguments)
    options.run(options)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
