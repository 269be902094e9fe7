"""What a run prints when it starts: the numbers that follow from its configuration, and what differs from its checkpoint."""

from __future__ import annotations

from typing import Any

import torch
import yaml
from fvcore.common.config import CfgNode

from octvideo import build
from octvideo.data.lists import VideoList
from octvideo.engine.distributed import World
from octvideo.engine.log import Log
from octvideo.engine.train import Progress
from octvideo.jobs.provenance import surroundings
from octvideo.jobs.resume import Start


def announce(
    cfg: CfgNode,
    start: Start,
    progress: Progress,
    log: Log,
    world: World,
    device: torch.device,
    *,
    videos: VideoList,
    epochs: float,
) -> None:
    """Print derived numbers and write the event "run". videos: the training list. epochs: length of the run."""
    clip = build.cost(cfg, cfg.DATA.TRAIN_CROP)
    steps = len(videos) // cfg.TRAIN.BATCH_SIZE
    octave = f"octave alpha {cfg.OCTAVE.ALPHA:g}, pool {build.octave_pool(cfg)}" if cfg.OCTAVE.ALPHA else "vanilla"
    octave += f", low channels in {cfg.OCTAVE.ROUND_TO}s" if cfg.OCTAVE.ALPHA and cfg.OCTAVE.ROUND_TO > 1 else ""
    kind, unit = ("images", "images") if build.takes_images(cfg) else ("videos", "clips")
    batch, size = cfg.TRAIN.BATCH_SIZE, " x ".join(map(str, clip.input[1:]))
    log.say(
        f"{build.network_name(cfg)} ({octave}): {clip.params / 1e6:.3f} M parameters, "
        f"{clip.macs.total / 1e9:.3f} G multiply-adds"
    )
    log.say(
        f"{len(videos)} {kind} in batches of {batch} {unit} ({batch // world.size} on each of {world.size} process(es), "
        f"{device.type}), {size}: {steps} steps an epoch, {round(steps * epochs)} in total"
    )
    left_out = [f"{videos.source}: {videos.left_out} left out"] if videos.left_out else []
    for line in [
        *left_out,
        *build.unused(cfg),
        *_rates(cfg, steps),
        *start.remarks,
        *_resumption(cfg, start, progress, world),
    ]:
        log.say(line)
    facts: dict[str, Any] = {"params": clip.params, "macs": clip.macs.total, "world_size": world.size}
    facts |= {
        "videos": len(videos),
        "steps": steps,
        "resumed": str(start.path) if start.path else None,
        "changed": start.changed,
    }
    facts |= {**surroundings(device), "config": yaml.safe_load(cfg.dump())}
    log.event("run", progress.step, facts)


def _rates(cfg: CfgNode, steps: int) -> list[str]:
    """Return lines on the learning rate. steps: of an epoch."""
    batch, lr = cfg.TRAIN.BATCH_SIZE, build.learning_rate(cfg, steps)
    lines = [
        f"learning rate {cfg.SOLVER.BASE_LR:g} at {cfg.SOLVER.BASE_BATCH} clips -> "
        f"{cfg.SOLVER.BASE_LR * batch / cfg.SOLVER.BASE_BATCH:.4g} at {batch}; "
        f"{cfg.SOLVER.SCHEDULE}, starting at {lr(0):.4g}"
    ]
    if cfg.SOLVER.ITERATIONS:
        held = " + ".join(str(round(count)) for count in build.iterations(cfg))
        lines.append(
            f"steps at each rate {cfg.SOLVER.ITERATIONS} of {cfg.SOLVER.BASE_BATCH} clips -> {held} of {batch}"
        )
    if cfg.MODEL.COMPILE == "graphs":
        lines.append(
            "MODEL.COMPILE graphs: training steps replay CUDA graphs; validation runs eagerly, as its shapes differ"
        )
    return lines


def _resumption(cfg: CfgNode, start: Start, progress: Progress, world: World) -> list[str]:
    if start.state is None:
        return []
    within = f" and {progress.clips_in_epoch} clips of the next" if progress.clips_in_epoch else ""
    lines = [f"resuming {start.path}: step {progress.step}, after epoch {progress.epoch}{within}"]
    lines += [f"  changed since then, and used from now on: {line}" for line in start.changed]
    processes = len(start.state["ranks"])
    if processes != world.size:
        lines.append(
            f"  changed since then: {processes} process(es) (here {world.size}); clips, their order and the learning rate "
            "stay the same; dropout, mixup and cutmix use other random numbers, and norms see other shares of a batch"
        )
    return lines
