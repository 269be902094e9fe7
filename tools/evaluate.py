#!/usr/bin/env python
"""Test a checkpoint, or scores that an earlier test left.

python tools/evaluate.py --cfg CONFIG --checkpoint FILE [--clips N] [--crops 1|3] [--average softmax|logits]
        [--out FOLDER] [KEY VALUE ...]
    every video of DATA.TEST_LIST (or VAL_LIST) with N clips x 1 or 3 crops (default: TEST.CLIPS and TEST.CROPS, the 10 x 3
    of Kinetics), alone or under torchrun
python tools/evaluate.py --scores FILE [FILE ...] [--weights W ...] [--clips N] [--crops 1|3] [--average softmax|logits]
        --out FOLDER
    the same from the scores.npz of earlier tests, with no network and no videos: fewer views, the other average, and of
    several files the weighted mean of their probabilities

FOLDER (default: OUTPUT_DIR) gets test.json, test_failed.txt, classes.csv, confusion.csv and, with --cfg, scores.npz.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from octvideo import build, launch
from octvideo.config import ConfigError
from octvideo.data.dataset import ListError
from octvideo.data.decode import DecodeError, MissingDecoderError
from octvideo.data.loader import LoaderError
from octvideo.data.sampling import POLICIES, contained
from octvideo.engine.checkpoint import CheckpointError
from octvideo.engine.classes import ClassOrderError
from octvideo.engine.distributed import DistributedError, World
from octvideo.engine.results import Results, results_of, view_facts
from octvideo.engine.scores import AVERAGES, Averaged, ScoresError, ViewScores, aggregate, combine


class RequestError(ValueError):
    """A command line that asks for what cannot be done."""


MISTAKES = (RequestError, ConfigError, ListError, MissingDecoderError)
FAILURES = (DecodeError, LoaderError, CheckpointError, DistributedError, ClassOrderError, ScoresError, OSError)
KEY = re.compile(r"[A-Z_]+(\.[A-Z_]+)*")


def of_network(options: argparse.Namespace) -> Results | None:
    """Test the checkpoint; None on all ranks but the main one."""
    cfg = build.load_config(options.cfg, [*_flags_as_overrides(options), *options.overrides])

    def job(world: World, device: torch.device) -> Results | None:
        if device.type == "cpu":
            build.use_threads(cfg, world)
        return build.test(cfg, world, device, average=options.average)

    return launch.run(job, cfg.DEVICE)


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
    described = {
        "views": sum(own["views"] for own in facts),
        "average": facts[0]["average"],
        "members": [
            {"scores": source, "weight": weight, **metrics, **own} | metrics
            for source, weight, metrics, own in zip(sources, weights, alone, facts, strict=True)
        ],
    }
    classes = next((member.classes for member in members if member.classes), [])
    return results_of(replace(members[0], classes=classes), together, described)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Raises RequestError where flags do not go together."""
    parser = argparse.ArgumentParser(
        usage="evaluate.py --cfg CONFIG --checkpoint FILE | --scores FILE [FILE ...]  [options] [KEY VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cfg", metavar="CONFIG", help="YAML file of the network and the videos")
    what.add_argument("--scores", type=Path, nargs="+", metavar="FILE", help="scores.npz of earlier tests")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights to test")
    parser.add_argument("--clips", type=int, metavar="N", help="clips in time of each video")
    parser.add_argument("--crops", type=int, choices=(1, 3), help="1, the centre, or 3 along the longer side")
    parser.add_argument("--average", choices=AVERAGES, default=AVERAGES[0], help="over views: of softmax or of logits")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="of the files, in their order; default: equal"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for what is found; default with --cfg: OUTPUT_DIR")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="with --cfg: e.g. DATA.NUM_WORKERS 8")
    options = parser.parse_intermixed_args(arguments)
    if options.out and options.out.exists() and not options.out.is_dir():
        raise RequestError(f"--out {options.out} is a file; give a folder")
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 the evaluation failed, 2 the request was wrong, 130 interrupted."""
    try:
        options = parse(arguments)
        results = of_network(options) if options.cfg else of_scores(options)
        if results:  # the main rank
            print(results.summary())
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FAILURES as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
