#!/usr/bin/env python
"""Test a checkpoint, or scores that an earlier test left.

python tools/evaluate.py --cfg CONFIG --checkpoint FILE [--clips N] [--crops 1|3] [--average softmax|logits]
        [--out FOLDER] [--report FILE.html] [KEY VALUE ...]
    every video of DATA.TEST_LIST (or VAL_LIST) with N clips x 1 or 3 crops (default: TEST.CLIPS and TEST.CROPS, the 10 x 3
    of Kinetics), alone, under torchrun, with --local N, or as a job of SLURM's with --slurm
python tools/evaluate.py --scores FILE [FILE ...] [--weights W ...] [--clips N] [--crops 1|3] [--average softmax|logits]
        --out FOLDER [--report FILE.html]
    the same from the scores.npz of earlier tests, with no network and no videos: fewer views, the other average, and of
    several files the weighted mean of their probabilities

FOLDER (default: OUTPUT_DIR) gets test.json, test_failed.txt, classes.csv, confusion.csv and, with --cfg, scores.npz.
FILE.html shows them on one page that needs nothing else, with the curves of the training and frames of the worst videos.
"""

from __future__ import annotations

if __name__ == "__main__":
    import octvideo.starting  # noqa: F401  # first: importing the others takes seconds

import argparse
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate

from octvideo import build, command, jobs, launch, preflight
from octvideo.analysis.report import WorstVideo, report_html, spread, thumbnail
from octvideo.data.decode import DecodeError, MachineError, member_of, open_video
from octvideo.data.images import read_image
from octvideo.data.sampling import POLICIES, contained
from octvideo.engine.distributed import World
from octvideo.engine.log import training_history
from octvideo.engine.metrics import most_confused
from octvideo.engine.results import RESULT_FILES, Results, results_of, view_facts
from octvideo.engine.scores import AVERAGES, Averaged, ViewScores, aggregate, combine
from octvideo.errors import UserError
from octvideo.files import path_argument
from octvideo.launch import Job, Request


class RequestError(UserError, ValueError):
    """A command line that asks for what cannot be done."""


KEY = re.compile(r"[A-Z_]+(\.[A-Z_]+)*")
WORST, PAIRS = 12, 15  # wrong videos, and pairs of classes, on the page
# Facts in the page's order and words; of a number: how many of the fact's own units its unit is.
WORDS = {
    **{key: (key, 1.0, "") for key in ("model", "alpha", "checkpoint")},
    "epoch": ("epoch of the checkpoint", 1.0, ""),
    **{key: (key, 1.0, "") for key in ("views", "clips", "crops", "average")},
    "policy": ("policy of the clips", 1.0, ""),
    "input": ("size of a view", 1.0, ""),
    "macs": ("multiply-adds of a view", 1e9, " G"),
    "params": ("parameters", 1e6, " M"),
    "clips_per_s": ("speed of the test", 1.0, " clips/s"),
    "prefix": ("folder of the videos", 1.0, ""),
}


def of_network(options: argparse.Namespace) -> tuple[Results | None, Path, list[str]]:
    """Test the checkpoint. Return the results (None on all ranks but the main one), OUTPUT_DIR, and the files of an earlier
    test there that were replaced."""
    cfg = build.load_config(options.cfg, [*_flags_as_overrides(options), *options.overrides])

    def job(world: World, device: torch.device) -> Results | None:
        if device.type == "cpu":
            build.use_threads(cfg, world)
        with jobs.session(cfg, world) as stop:
            return jobs.test(cfg, world, device, stop, average=options.average)

    replaced = _earlier_results(Path(cfg.OUTPUT_DIR))
    return launch.run(job, cfg.DEVICE), Path(cfg.OUTPUT_DIR), replaced


def _earlier_results(folder: Path) -> list[str]:
    return [name for name in (*RESULT_FILES, "scores.npz") if (folder / name).exists()]


def _jobs(options: argparse.Namespace, request: Request) -> list[Job]:
    """The same in other processes; a line of a sweep may give another TEST.CHECKPOINT."""
    if not options.cfg:
        raise RequestError("--slurm and --local go with --cfg; scores are averaged here, in seconds")
    cfgs = preflight.tasks(request, options.cfg, [*_flags_as_overrides(options), *options.overrides])
    if options.report and len(cfgs) > 1:
        raise RequestError(f"--report {options.report}: {len(cfgs)} tests would write to that one page")
    more = ["--average", options.average, *(["--report", str(options.report)] if options.report else [])]
    return [Job(Path(cfg.OUTPUT_DIR), cfg.dump(), ["--checkpoint", cfg.TEST.CHECKPOINT, *more]) for cfg in cfgs]


def _flags_as_overrides(options: argparse.Namespace) -> list[str]:
    flags = {
        "TEST.CHECKPOINT": ("--checkpoint", options.checkpoint),
        "TEST.CLIPS": ("--clips", options.clips),
        "TEST.CROPS": ("--crops", options.crops),
        "OUTPUT_DIR": ("--out", options.out),
    }
    keys = options.overrides[0::2]
    for key, (flag, value) in flags.items():
        if value is not None and key in keys:
            raise RequestError(f"{flag} and {key} are both given and mean the same: leave one out")
    given = [text for key, (_, value) in flags.items() if value is not None for text in (key, str(value))]
    return [*given, "TRAIN.ENABLE", "False", "TEST.ENABLE", "True"]


def of_scores(options: argparse.Namespace) -> Results:
    """Average what earlier tests left."""
    weights = options.weights or [1.0] * len(options.scores)
    if len(weights) != len(options.scores) or not all(0 < weight < math.inf for weight in weights):
        raise RequestError(
            f"--weights {' '.join(f'{weight:g}' for weight in weights)} for {len(options.scores)} file(s); "
            "allowed: one number above 0 for each"
        )
    members, averaged, facts = [], [], []
    for path in options.scores:
        scores = ViewScores.load(path)
        clips, crops = _clips(scores, path, options.clips), _crops(scores, path, options.crops)
        seen = view_facts(len(clips), len(crops), options.average)
        averaged.append(aggregate(scores, options.average, clips, crops))
        facts.append({**seen, **scores.facts, **seen})
        members.append(scores.without_views())
        del scores  # the views of one network are in memory at a time
    if len(members) == 1:
        results = results_of(members[0], averaged[0], facts[0])
    else:
        results = _ensemble(members, averaged, facts, weights, [str(path) for path in options.scores])
    results.write(options.out)
    return results


def _clips(scores: ViewScores, path: Path, wanted: int | None) -> list[int]:
    """The clips to use, and a word on where fewer than all of them lie."""
    saved = scores.num_clips
    if wanted is None or wanted == saved:
        return list(range(saved))
    if not 0 < wanted < saved:
        raise RequestError(f"--clips is {wanted}, but {path} holds {saved}; allowed: 1 to {saved}")
    policy = str(scores.facts.get("policy"))
    exact = contained(wanted, saved, policy) if policy in POLICIES else None
    step = (saved - 1) / max(wanted - 1, 1)
    chosen = exact or ([(saved - 1) // 2] if wanted == 1 else [math.floor(i * step + 0.5) for i in range(wanted)])
    numbers = ", ".join(str(clip) for clip in chosen)
    if exact:
        print(f"{path}: clips {numbers} of 0 to {saved - 1}, which are the {wanted} of the protocol ({policy})")
    else:
        print(
            f"{path}: clips {numbers} of 0 to {saved - 1}: a subset of those {saved}, NOT the positions that the protocol "
            f"takes for {wanted}; for those, test with --cfg and --clips {wanted}"
        )
    return chosen


def _crops(scores: ViewScores, path: Path, wanted: int | None) -> list[int]:
    saved = scores.num_crops
    if wanted is None or wanted == saved:
        return list(range(saved))
    if (wanted, saved) != (1, 3):
        raise RequestError(f"--crops is {wanted}, but {path} holds {saved}; allowed: {'1, 3' if saved == 3 else saved}")
    return [1]  # transforms.uniform_crops: the single one is the second of three, the centre


def _ensemble(
    members: list[ViewScores],
    averaged: list[Averaged],
    facts: list[dict[str, Any]],
    weights: list[float],
    sources: list[str],
) -> Results:
    """The mean of several networks; test.json and a table say which is which."""
    together = combine(members, averaged, weights, sources)
    alone = [results_of(*each).metrics for each in zip(members, averaged, facts, strict=True)]
    rows = [
        [source, f"{weight:g}", own.get("model", "-"), own.get("alpha", "-"), own["views"], f"{metrics['top1']:.2f}"]
        for source, weight, own, metrics in zip(sources, weights, facts, alone, strict=True)
    ]
    print(tabulate(rows, ["scores", "weight", "model", "alpha", "views", "top-1 %"], tablefmt="github"), end="\n\n")
    told = [
        {"scores": source, "weight": weight, **metrics}
        for source, weight, metrics in zip(sources, weights, alone, strict=True)
    ]
    described = {
        "views": sum(own["views"] for own in facts),
        "average": facts[0]["average"],
        "members": [{**ours, **own, **ours} for ours, own in zip(told, facts, strict=True)],  # a file overrules nothing
    }
    classes = next((member.classes for member in members if member.classes), [])
    return results_of(replace(members[0], classes=classes), together, described)


def page(results: Results, sources: Sequence[Path], folder: Path) -> str:
    """Results as HTML. sources: the files of scores they are from, if any. folder: where the history may lie too."""
    m, ensemble = results.metrics, len(sources) > 1
    networks = results.facts["members"] if ensemble else [results.facts]
    what = f"an ensemble of {len(sources)} networks" if ensemble else networks[0].get("model", "a network")
    beside = [Path(str(own["checkpoint"])).parent for own in networks if "checkpoint" in own]
    events, history = ([], "an ensemble has none of its own.") if ensemble else training_history([*beside, folder])
    shares = {"top-1": m["top1"], "top-5": m["top5"], "mean class accuracy": m["mean_class_accuracy"]}
    shares["calibration error"] = m["calibration_error"]
    size = networks[0].get("input")  # of a view; an image has no T
    images = isinstance(size, list) and len(size) == 3
    return report_html(
        title=f"Test of {what}",
        headline={
            **{name: "-" if share is None else f"{share:.2f} %" for name, share in shares.items()},
            "scored": f"{m['videos_scored']} of {m['videos_listed']}",
        },
        facts=_ensemble_facts(results) if ensemble else _facts(results, sources),
        events=events,
        classes=[results.name(label) for label in range(len(results.confusion))],
        confusion=results.confusion.numpy(),
        rows=results.class_rows,
        pairs=most_confused(results.confusion, PAIRS),
        bins=results.calibration_bins.numpy(),
        calibration_error=m["calibration_error"],
        failed=[(results.paths[video], reason) for video, reason in results.failed],
        worst=[_worst(results, *mistake, images=images) for mistake in results.worst(WORST)],
        history=history,
    )


def _facts(results: Results, sources: Sequence[Path]) -> dict[str, str]:
    """In words. Those of a file of scores may be anything plain."""
    facts = {}
    for key in dict.fromkeys([*WORDS, *results.facts]):
        value = results.facts.get(key, "-")
        words, factor, unit = WORDS.get(key, (key, 1.0, ""))
        if isinstance(value, int | float) and abs(value) < 1e300:  # an integer may be too large for any float
            facts[words] = f"{value / factor:,.3f}{unit}" if factor > 1 else f"{value:,.6g}{unit}"
        else:
            facts[words] = " x ".join(map(str, value)) if isinstance(value, list) else str(value)
    facts["videos that lack views"] = str(results.metrics["videos_incomplete"])
    return facts | ({"scores": str(sources[0])} if sources else {})


def _ensemble_facts(results: Results) -> dict[str, str]:
    facts = {"views": str(results.facts["views"]), "average": results.facts["average"]}
    facts["videos that lack views"] = str(results.metrics["videos_incomplete"])
    for number, own in enumerate(results.facts["members"], 1):
        facts[f"network {number}"] = (
            f"{own.get('model', '-')}, alpha {own.get('alpha', '-')}, {own['views']} views, weight {own['weight']:g}: "
            f"top-1 {own['top1']:.2f} %, {own['scores']}"
        )
    return facts


def _worst(results: Results, video: int, taken: int, probability: float, *, images: bool) -> WorstVideo:
    path, label = results.paths[video], int(results.labels[video])
    try:
        return WorstVideo(path, label, taken, probability, _frames(path, images=images))
    except (DecodeError, MachineError, OSError) as error:  # it may have gone since the test; what was found stays true
        return WorstVideo(path, label, taken, probability, np.zeros((0, 1, 1, 3), np.uint8), str(error))


def _frames(path: str, *, images: bool) -> NDArray[np.uint8]:
    """uint8 [T, H, W, 3], small, evenly spread over a video; one frame at a time is held at full size."""
    member = member_of(path)
    if not Path(member.tar if member else path).is_file():  # a device or a pipe would be waited for
        raise DecodeError(f"{path}: there is no such file now")
    if images:
        return thumbnail(np.asarray(read_image(path)))[None]
    with open_video(path) as video:
        pictures = [thumbnail(video.frames([number])[0].numpy()) for number in spread(video.num_frames)]
    if len({picture.shape for picture in pictures}) > 1:
        raise DecodeError(f"{path}: its frames are of different sizes")
    return np.stack(pictures)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Raises RequestError where flags do not go together."""
    parser = argparse.ArgumentParser(
        usage="evaluate.py --cfg CONFIG --checkpoint FILE | --scores FILE [FILE ...]  [options] [KEY VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cfg", metavar="CONFIG", help="YAML file of the network and the videos")
    what.add_argument("--scores", type=path_argument, nargs="+", metavar="FILE", help="scores.npz of earlier tests")
    parser.add_argument("--checkpoint", type=path_argument, metavar="FILE", help="weights to test")
    parser.add_argument("--clips", type=int, metavar="N", help="clips in time of each video")
    parser.add_argument("--crops", type=int, choices=(1, 3), help="1, the centre, or 3 along the longer side")
    parser.add_argument("--average", choices=AVERAGES, default=AVERAGES[0], help="over views: of softmax or of logits")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="of the files, in their order; default: equal"
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="FOLDER", help="for what is found; default with --cfg: OUTPUT_DIR"
    )
    parser.add_argument("--report", type=path_argument, metavar="FILE.html", help="what is found, on one page")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="with --cfg: e.g. DATA.NUM_WORKERS 8")
    launch.add_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    if options.out and options.out.exists() and not options.out.is_dir():
        raise RequestError(f"--out {options.out} is a file; give a folder")
    if options.report:
        _check_report(options.report)
    if options.cfg:
        if options.checkpoint is None:
            raise RequestError("--cfg needs --checkpoint FILE, the weights to test")
        if options.weights:
            raise RequestError("--weights goes with --scores FILE FILE ...")
        return options
    if options.checkpoint:
        raise RequestError("--checkpoint goes with --cfg; with --scores no network runs")
    if options.out is None:
        raise RequestError("--scores needs --out FOLDER")
    keys = [text for text in map(str, (*options.overrides, *options.scores)) if KEY.fullmatch(text)]
    if options.overrides or (keys and not Path(keys[0]).exists()):
        raise RequestError(f"{(keys or options.overrides)[0]}: KEY VALUE goes with --cfg; scores are as they are")
    return options


def _check_report(path: Path) -> None:
    """Before a test of hours, and so that no other file is replaced by a page."""
    if path.suffix not in (".html", ".htm") or path.is_dir():
        raise RequestError(f"--report {path}: give the name of a file that ends in .html")
    command.check_output(path, b"<!doctype html>")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise RequestError(f"--report {path}: {there} is a file; give a folder")


@command.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 the evaluation failed, 2 the request was wrong, 130 interrupted."""
    options = parse(arguments)
    request = Request.of(options)
    if request.elsewhere:
        return launch.start(request, __file__, _jobs(options, request))
    if options.cfg:
        results, folder, replaced = of_network(options)
    else:
        replaced, folder = [name for name in _earlier_results(options.out) if name in RESULT_FILES], options.out
        results = of_scores(options)
    if results:  # the main rank
        print(results.summary())
        if replaced:
            print(f"\nreplaced in {folder}: {', '.join(replaced)}")
        if options.report:
            history = options.scores[0].parent if options.scores else folder
            command.write_output(options.report, page(results, options.scores or [], history).encode())
            print(f"\nthe page: {options.report}")
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, keyboard_interrupt=False))
