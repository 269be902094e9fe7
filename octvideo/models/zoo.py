"""Named networks, as descriptions. `NETWORKS` lists those that a config may name; `with_octave` makes one octave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from octvideo.models.spec import NetSpec, Size, StageSpec, StemSpec

R50_BLOCKS = (3, 4, 6, 3)


def c2d_r50(num_classes: int = 400, *, dropout: float = 0.5, pool_padding: int = 1) -> NetSpec:
    """C2D: a ResNet-50 applied per frame, time max-pooled by 2 after res2, then averaged (video-nonlocal-net)."""
    return _resnet(num_classes, dropout, _stem(64, (1, 7, 7), pool_padding), 64, [(1,) * n for n in R50_BLOCKS])


def i3d_r50(num_classes: int = 400, *, dropout: float = 0.5, pool_padding: int = 1) -> NetSpec:
    """I3D ResNet-50: C2D with a 5x7x7 stem and 3x1x1 first convolutions in about every other block."""
    temporal = [(3, 3, 3), (3, 1, 3, 1), (3, 1, 3, 1, 3, 1), (1, 3, 1)]
    return _resnet(num_classes, dropout, _stem(64, (5, 7, 7), pool_padding), 64, temporal)


def c2d_tiny(num_classes: int = 400, *, dropout: float = 0.5, pool_padding: int = 1) -> NetSpec:
    """A C2D of one block per stage and a quarter of the width, for CPUs and small crops."""
    return _resnet(num_classes, dropout, _stem(16, (1, 5, 5), pool_padding), 16, [(1,)] * 4)


def i3d_tiny(num_classes: int = 400, *, dropout: float = 0.5, pool_padding: int = 1) -> NetSpec:
    """The I3D twin of c2d_tiny: a 3x5x5 stem and a 3x1x1 convolution in every block."""
    return _resnet(num_classes, dropout, _stem(16, (3, 5, 5), pool_padding), 16, [(3,)] * 4)


NETWORKS: dict[str, Callable[..., NetSpec]] = {
    "c2d_r50": c2d_r50,
    "i3d_r50": i3d_r50,
    "c2d_tiny": c2d_tiny,
    "i3d_tiny": i3d_tiny,
}


def with_octave(
    spec: NetSpec, alpha: float, *, pool: Sequence[int] | None = None, ratios: Sequence[float] | None = None
) -> NetSpec:
    """The octave twin of a network: the only thing that makes a network octave.

    alpha: share of low-frequency channels, 0 to 1; 0 gives the vanilla network back, strided convolutions and all.
    pool: factor between the frequencies, (1, 2, 2) (default) or (2, 2, 2) for video, (2, 2) for images.
    ratios: alpha of each stage; default [alpha, ..., alpha, 0], the paper's (section 4.1).
    Raises ValueError for an alpha out of range or ratios of another length than the stages.
    """
    ratios = list(ratios) if ratios else [alpha] * (len(spec.stages) - 1) + [0.0]
    if len(ratios) != len(spec.stages):
        raise ValueError(f"{len(ratios)} octave ratios {ratios} for {len(spec.stages)} stages; give one per stage")
    outside = [a for a in [alpha, *ratios] if not 0.0 <= a <= 1.0]
    if outside:
        raise ValueError(f"octave alpha {outside[0]} is out of range; it is a share of channels, from 0 to 1")
    stages = tuple(replace(stage, alpha=a) for stage, a in zip(spec.stages, ratios, strict=True))
    octave_pool = tuple(pool or (1, 2, 2)[-spec.dims :]) if any(ratios) else None
    return replace(spec, stages=stages, octave_pool=octave_pool)


def _stem(channels: int, kernel: Size, pool_padding: int) -> StemSpec:
    if pool_padding not in (0, 1):
        raise ValueError(f"pool_padding is {pool_padding}; it is 0 (the paper's counts) or 1 (PySlowFast's)")
    return StemSpec(channels, kernel, (1, 2, 2), (1, 3, 3), (1, 2, 2), (0, pool_padding, pool_padding))


def _resnet(
    num_classes: int, dropout: float, stem: StemSpec, width: int, temporal: Sequence[tuple[int, ...]]
) -> NetSpec:
    """Four stages res2..res5, width doubling, expansion 4; time max-pooled by 2 after res2."""
    stages = tuple(
        StageSpec(
            name=f"res{index + 2}",
            width=width << index,
            channels=4 * width << index,
            stride=(1, 1, 1) if index == 0 else (1, 2, 2),
            temporal_kernels=kernels,
            pool_after=(2, 1, 1) if index == 0 else None,
        )
        for index, kernels in enumerate(temporal)
    )
    return NetSpec(stem, stages, num_classes, dropout)
