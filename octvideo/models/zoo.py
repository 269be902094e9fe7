"""Named networks, as descriptions. `NETWORKS` lists those that a config may name; `with_octave` makes one octave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import overload

from octvideo.models.spec import NetSpec, Size, SlowFastSpec, Spec, StageSpec, StemSpec

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
NONLOCAL_AFTER = {
    50: {"res3": (1, 3), "res4": (1, 3, 5)},
    101: {"res3": (1, 3), "res4": (6, 13, 20)},
}


def c2d(num_classes: int = 400, *, depth: int = 50, dropout: float = 0.5, pool_padding: int = 1) -> NetSpec:
    """C2D: a ResNet applied per frame, time max-pooled by 2 after res2, then averaged (video-nonlocal-net)."""
    temporal = [(1,) * blocks for blocks in BLOCKS[depth]]
    return _resnet(num_classes, dropout, _stem(64, (1, 7, 7), pool_padding), 64, temporal, pool_time=True)


def i3d(num_classes: int = 400, *, depth: int = 50, dropout: float = 0.5, pool_padding: int = 1) -> NetSpec:
    """I3D: C2D with a 5x7x7 stem and 3x1x1 first convolutions in all of res2 and every other block behind it."""
    res2, res3, res4, res5 = BLOCKS[depth]
    temporal = [(3,) * res2, _alternate(res3, 3), _alternate(res4, 3), _alternate(res5, 1)]
    return _resnet(num_classes, dropout, _stem(64, (5, 7, 7), pool_padding), 64, temporal, pool_time=True)


def i3d_nl(num_classes: int = 400, *, depth: int = 50, dropout: float = 0.5, pool_padding: int = 1) -> NetSpec:
    """I3D with five non-local blocks in res3 and res4."""
    spec = i3d(num_classes, depth=depth, dropout=dropout, pool_padding=pool_padding)
    return with_nonlocal(spec, NONLOCAL_AFTER[depth])


def slow(num_classes: int = 400, *, depth: int = 50, dropout: float = 0.5, pool_padding: int = 1) -> NetSpec:
    """The slow pathway alone: 3x1x1 convolutions in res4 and res5 only, time never pooled."""
    temporal = [(1,) * BLOCKS[depth][0], (1,) * BLOCKS[depth][1], (3,) * BLOCKS[depth][2], (3,) * BLOCKS[depth][3]]
    return _resnet(num_classes, dropout, _stem(64, (1, 7, 7), pool_padding), 64, temporal, pool_time=False)


def slowfast(
    num_classes: int = 400,
    *,
    frame_ratio: int,
    lateral_kernel: int,
    depth: int = 50,
    dropout: float = 0.5,
    pool_padding: int = 1,
) -> SlowFastSpec:
    """SlowFast: `slow` beside a pathway of an eighth of its width with 3x1x1 convolutions in every block."""
    temporal = [(3,) * blocks for blocks in BLOCKS[depth]]
    fast = _resnet(num_classes, dropout, _stem(8, (5, 7, 7), pool_padding), 8, temporal, pool_time=False)
    own = slow(num_classes, depth=depth, dropout=dropout, pool_padding=pool_padding)
    return SlowFastSpec(own, fast, frame_ratio, lateral_kernel)


def c2d_tiny(num_classes: int = 400, *, dropout: float = 0.5, pool_padding: int = 1) -> NetSpec:
    """A C2D of one block per stage and a quarter of the width, for CPUs and small crops."""
    return _resnet(num_classes, dropout, _stem(16, (1, 5, 5), pool_padding), 16, [(1,)] * 4, pool_time=True)


def i3d_tiny(num_classes: int = 400, *, dropout: float = 0.5, pool_padding: int = 1) -> NetSpec:
    """The I3D twin of c2d_tiny: a 3x5x5 stem and a 3x1x1 convolution in every block."""
    return _resnet(num_classes, dropout, _stem(16, (3, 5, 5), pool_padding), 16, [(3,)] * 4, pool_time=True)


NETWORKS: dict[str, Callable[..., Spec]] = {
    "c2d_r50": c2d,
    "c2d_r101": partial(c2d, depth=101),
    "i3d_r50": i3d,
    "i3d_r101": partial(i3d, depth=101),
    "i3d_nl_r50": i3d_nl,
    "i3d_nl_r101": partial(i3d_nl, depth=101),
    "slow_r50": slow,
    "slow_r101": partial(slow, depth=101),
    "slowfast_4x16_r50": partial(slowfast, frame_ratio=8, lateral_kernel=5),
    "slowfast_8x8_r50": partial(slowfast, frame_ratio=4, lateral_kernel=7),
    "slowfast_8x8_r101": partial(slowfast, frame_ratio=4, lateral_kernel=5, depth=101),
    "c2d_tiny": c2d_tiny,
    "i3d_tiny": i3d_tiny,
}


@overload
def with_octave(
    spec: NetSpec, alpha: float, *, pool: Sequence[int] | None = ..., ratios: Sequence[float] | None = ...
) -> NetSpec: ...
@overload
def with_octave(
    spec: SlowFastSpec, alpha: float, *, pool: Sequence[int] | None = ..., ratios: Sequence[float] | None = ...
) -> SlowFastSpec: ...
def with_octave(
    spec: Spec, alpha: float, *, pool: Sequence[int] | None = None, ratios: Sequence[float] | None = None
) -> Spec:
    """The octave twin of a network: the only thing that makes a network octave.

    alpha: share of low-frequency channels, 0 to 1; 0 gives the vanilla network back, strided convolutions and all.
    pool: factor between the frequencies, (1, 2, 2) (default) or (2, 2, 2) for video, (2, 2) for images.
    ratios: alpha of each stage; default [alpha, ..., alpha, 0], the paper's (section 4.1).
    Both pathways of a SlowFast network become octave.
    Raises ValueError for an alpha out of range or ratios of another length than the stages.
    """
    if isinstance(spec, SlowFastSpec):
        slow, fast = (with_octave(pathway, alpha, pool=pool, ratios=ratios) for pathway in (spec.slow, spec.fast))
        return replace(spec, slow=slow, fast=fast)
    ratios = list(ratios) if ratios else [alpha] * (len(spec.stages) - 1) + [0.0]
    if len(ratios) != len(spec.stages):
        raise ValueError(f"{len(ratios)} octave ratios {ratios} for {len(spec.stages)} stages; give one per stage")
    outside = [a for a in [alpha, *ratios] if not 0.0 <= a <= 1.0]
    if outside:
        raise ValueError(f"octave alpha {outside[0]} is out of range; it is a share of channels, from 0 to 1")
    stages = tuple(replace(stage, alpha=a) for stage, a in zip(spec.stages, ratios, strict=True))
    octave_pool = tuple(pool or (1, 2, 2)[-spec.dims :]) if any(ratios) else None
    return replace(spec, stages=stages, octave_pool=octave_pool)


def with_nonlocal(spec: NetSpec, after: Mapping[str, tuple[int, ...]], form: str = "softmax") -> NetSpec:
    """Non-local blocks behind the blocks `after` names: {"res3": (1, 3), "res4": (1, 3, 5)}."""
    unknown = set(after) - {stage.name for stage in spec.stages}
    if unknown:
        raise ValueError(f"no stage {sorted(unknown)}; stages are {[stage.name for stage in spec.stages]}")
    stages = tuple(replace(stage, nonlocal_after=tuple(after.get(stage.name, ()))) for stage in spec.stages)
    return replace(spec, stages=stages, nonlocal_form=form)


def _alternate(blocks: int, first: int) -> tuple[int, ...]:
    """Temporal kernels first, 4 - first, first, ..."""
    return tuple(first if index % 2 == 0 else 4 - first for index in range(blocks))


def _stem(channels: int, kernel: Size, pool_padding: int) -> StemSpec:
    if pool_padding not in (0, 1):
        raise ValueError(f"pool_padding is {pool_padding}; it is 0 (the paper's counts) or 1 (PySlowFast's)")
    return StemSpec(channels, kernel, (1, 2, 2), (1, 3, 3), (1, 2, 2), (0, pool_padding, pool_padding))


def _resnet(
    num_classes: int,
    dropout: float,
    stem: StemSpec,
    width: int,
    temporal: Sequence[tuple[int, ...]],
    *,
    pool_time: bool,
) -> NetSpec:
    """Four stages res2..res5, width doubling, expansion 4. pool_time: max-pool time by 2 behind res2."""
    stages = tuple(
        StageSpec(
            name=f"res{index + 2}",
            width=width << index,
            channels=4 * width << index,
            stride=(1, 1, 1) if index == 0 else (1, 2, 2),
            temporal_kernels=kernels,
            pool_after=(2, 1, 1) if pool_time and index == 0 else None,
        )
        for index, kernels in enumerate(temporal)
    )
    return NetSpec(stem, stages, num_classes, dropout)
