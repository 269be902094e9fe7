"""Score TEST_LIST with the weights of a checkpoint."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from octvideo import build
from octvideo.data.lists import VideoList
from octvideo.engine import checkpoint
from octvideo.engine.checkpoint import CheckpointError
from octvideo.engine.classes import check_class_order
from octvideo.engine.distributed import World
from octvideo.engine.evaluate import Evaluation, evaluate
from octvideo.engine.log import Log
from octvideo.engine.results import Results, results_of, view_facts
from octvideo.engine.scores import Averaged
from octvideo.engine.stop import StopRequest
from octvideo.files import write_atomic
from octvideo.jobs.provenance import file_digest, list_digest, surroundings
from octvideo.jobs.resume import trained_otherwise


def test(
    cfg: CfgNode, world: World, device: torch.device, stop: StopRequest, *, average: str = "softmax"
) -> Results | None:
    """Score TEST_LIST with TEST.CLIPS x TEST.CROPS views; write scores.npz, test.json, its tables and test_config.yaml.

    Called inside `session`, which gives `stop`; files go to OUTPUT_DIR. A checkpoint with a moving average is tested by
    that. average: see engine.scores.aggregate. Returns the results on the main rank, None on the others. Raises Stopped.
    """
    folder = Path(cfg.OUTPUT_DIR)
    path, state = weights_to_test(cfg, folder)
    videos = build.test_list(cfg)
    classes = _classes_of(state, path, cfg.MODEL.NUM_CLASSES)
    of_data = build.class_names(cfg, videos.source)
    check_class_order(classes, of_data, str(path))
    model = build.network(cfg)
    load_trained(cfg, model, state, path, say=world.main)
    clips = build.eval_loader(cfg, videos, world, device, num_clips=cfg.TEST.CLIPS, num_crops=cfg.TEST.CROPS)
    clips.poll = stop.poll
    result = evaluate(
        build.place(cfg, model, device),
        clips,
        torch.from_numpy(videos.labels),
        num_classes=cfg.MODEL.NUM_CLASSES,
        num_clips=cfg.TEST.CLIPS,
        num_crops=cfg.TEST.CROPS,
        prepare=build.prepare_clips(cfg),
        clips_per_forward=cfg.TEST.BATCH_SIZE,
        device=device,
        world=world,
        title="test",
        average=average,
        poll=partial(stop.check, state["step"]),
    )
    if result.views is None:
        return None
    names = [videos.name(index) for index in range(len(videos))]
    views = replace(
        result.views, names=names, classes=classes or of_data, facts=_facts(cfg, path, state, result, videos, device)
    )
    averaged = Averaged(result.scores, result.scored, complete=result.scored)
    found = results_of(views, averaged, {**view_facts(cfg.TEST.CLIPS, cfg.TEST.CROPS, average), **views.facts})
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "test_config.yaml", cfg.dump().encode())
    views.save(folder / "scores.npz")
    found.write(folder)
    log = Log(folder, main=True)
    log.event("test", state["step"], found.metrics)
    log.say(
        f"test of {path.name}: top-1 {found.metrics['top1']:.2f} %, top-5 {found.metrics['top5']:.2f} %, "
        f"{found.metrics['videos_scored']} of {len(videos)} {'images' if build.takes_images(cfg) else 'videos'} scored with "
        f"{found.facts['views']} view(s) each, "
        f"{found.facts['macs'] / 1e9:.3f} G multiply-adds, {found.facts['params'] / 1e6:.3f} M parameters"
    )
    for video, reason in found.failed:
        log.say(f"  counted as wrong: {found.paths[video]}: {reason}")
    log.close()
    return found


def _facts(
    cfg: CfgNode, path: Path, state: dict[str, Any], result: Evaluation, videos: VideoList, device: torch.device
) -> dict[str, Any]:
    """Return where scores are from, which is kept with them."""
    clip = build.cost(cfg, cfg.DATA.TEST_CROP)
    return {
        "macs": clip.macs.total,
        "params": clip.params,
        "input": list(clip.input),
        "clips_per_s": round(result.clips_per_s, 2),
        "model": build.network_name(cfg),
        "alpha": cfg.OCTAVE.ALPHA,
        "checkpoint": str(path),
        "checkpoint_sha256": file_digest(path),
        "epoch": state["epoch"],
        "list": videos.source,
        "list_sha256": list_digest(videos),
        "policy": cfg.DATA.POLICY,
        "prefix": videos.prefix,
        "tested": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        **{name: value for name, value in surroundings(device).items() if name != "command"},
    }


def _classes_of(state: dict[str, Any], path: Path, num_classes: int) -> list[str]:
    """Return the names of a checkpoint's classes in the order of its labels, [] if it has none."""
    classes = state.get("classes") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) and name.isprintable() for name in classes):
        raise CheckpointError(f"{path}: its classes are no list of names")
    if len(classes) not in (0, num_classes):
        raise CheckpointError(f"{path}: names of {len(classes)} classes, but MODEL.NUM_CLASSES is {num_classes}")
    return classes


def weights_to_test(cfg: CfgNode, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return path and contents of TEST.CHECKPOINT, or else of the newest intact checkpoint in the folder."""
    if cfg.TEST.CHECKPOINT:
        return Path(cfg.TEST.CHECKPOINT), checkpoint.load(Path(cfg.TEST.CHECKPOINT))
    newest = checkpoint.latest(folder)
    if newest is None:
        raise CheckpointError(f"{folder}: no checkpoint to test; train first or give TEST.CHECKPOINT FILE")
    return newest


def load_trained(cfg: CfgNode, model: nn.Module, state: dict[str, Any], path: Path, *, say: bool = True) -> None:
    """Load the weights to predict with from the checkpoint `state`, which was read from `path`, into the model.

    say: print a line on standard error if they were made with other settings.
    """
    checkpoint.load_weights(model, checkpoint.averaged(state), path)
    if say and (remark := trained_otherwise(cfg, state, path)):
        print(remark, file=sys.stderr)
