"""Named networks, as descriptions. `NETWORKS` lists those that a config may name; `with_octave` makes one octave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from octvideo.models.spec import (
    ConvSpec,
    DenseNetSpec,
    DenseStageSpec,
    MobileNetSpec,
    MobileStageSpec,
    PoolSpec,
    ResNetSpec,
    Size,
    SlowFastSpec,
    Spec,
    StageSpec,
    StemSpec,
)

BLOCKS = {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}
NONLOCAL_AFTER = {
    50: {"res3": (1, 3), "res4": (1, 3, 5)},
    101: {"res3": (1, 3), "res4": (6, 13, 20)},
}


def _convs(*convs: tuple[int, int, int]) -> tuple[ConvSpec, ...]:
    """(channels, kernel, stride) of image convolutions."""
    return tuple(ConvSpec(channels, (kernel, kernel), (stride, stride)) for channels, kernel, stride in convs)


# In place of the max-pool: 64 -> 32 -> 32, stride 2 -> 64, with a strided projection (Big-Little Net, arXiv 1807.03848).
BOTTLENECK_131 = StageSpec("bottleneck", 32, 64, (2, 2), (1,))
DEEP_STEM = StemSpec(_convs((32, 3, 2), (32, 3, 1), (64, 3, 1)), pool=PoolSpec((3, 3), (2, 2), (1, 1)))
DEEP_STEM_131 = StemSpec(_convs((8, 3, 1), (32, 3, 2), (64, 3, 1)), bottleneck=BOTTLENECK_131)
DEEP_STEM_3X3 = StemSpec(_convs((8, 3, 1), (32, 3, 2), (64, 3, 1), (64, 3, 2)))
STEM_131 = StemSpec(_convs((64, 7, 2)), bottleneck=BOTTLENECK_131)
STEM_3X3 = StemSpec(_convs((64, 7, 2), (64, 3, 2)))


def c2d(num_classes: int = 400, *, depth: int = 50, dropout: float = 0.5) -> ResNetSpec:
    """C2D: a ResNet applied per frame, time max-pooled by 2 after res2, then averaged (video-nonlocal-net)."""
    temporal = [(1,) * blocks for blocks in BLOCKS[depth]]
    return _resnet(num_classes, dropout, _stem(64, (1, 7, 7)), 64, temporal, pool_time=True)


def i3d(num_classes: int = 400, *, depth: int = 50, dropout: float = 0.5) -> ResNetSpec:
    """I3D: C2D with a 5x7x7 stem and 3x1x1 first convolutions in all of res2 and every other block behind it."""
    res2, res3, res4, res5 = BLOCKS[depth]
    temporal = [(3,) * res2, _alternate(res3, 3), _alternate(res4, 3), _alternate(res5, 1)]
    return _resnet(num_classes, dropout, _stem(64, (5, 7, 7)), 64, temporal, pool_time=True)


def i3d_nl(num_classes: int = 400, *, depth: int = 50, dropout: float = 0.5) -> ResNetSpec:
    """I3D with five non-local blocks in res3 and res4."""
    spec = i3d(num_classes, depth=depth, dropout=dropout)
    return with_nonlocal(spec, NONLOCAL_AFTER[depth])


def slow(num_classes: int = 400, *, depth: int = 50, dropout: float = 0.5) -> ResNetSpec:
    """The slow pathway alone: 3x1x1 convolutions in res4 and res5 only, time never pooled."""
    temporal = [(1,) * BLOCKS[depth][0], (1,) * BLOCKS[depth][1], (3,) * BLOCKS[depth][2], (3,) * BLOCKS[depth][3]]
    return _resnet(num_classes, dropout, _stem(64, (1, 7, 7)), 64, temporal, pool_time=False)


def slowfast(
    num_classes: int = 400,
    *,
    frame_ratio: int,
    lateral_kernel: int,
    depth: int = 50,
    dropout: float = 0.5,
) -> SlowFastSpec:
    """SlowFast: `slow` beside a pathway of an eighth of its width with 3x1x1 convolutions in every block."""
    temporal = [(3,) * blocks for blocks in BLOCKS[depth]]
    fast = _resnet(num_classes, dropout, _stem(8, (5, 7, 7)), 8, temporal, pool_time=False)
    own = slow(num_classes, depth=depth, dropout=dropout)
    return SlowFastSpec(own, fast, frame_ratio, lateral_kernel)


def c2d_tiny(num_classes: int = 400, *, dropout: float = 0.5) -> ResNetSpec:
    """A C2D of one block per stage and a quarter of the width, for CPUs and small crops."""
    return _resnet(num_classes, dropout, _stem(16, (1, 5, 5)), 16, [(1,)] * 4, pool_time=True)


def i3d_tiny(num_classes: int = 400, *, dropout: float = 0.5) -> ResNetSpec:
    """The I3D twin of c2d_tiny: a 3x5x5 stem and a 3x1x1 convolution in every block."""
    return _resnet(num_classes, dropout, _stem(16, (3, 5, 5)), 16, [(3,)] * 4, pool_time=True)


def resnet2d(
    num_classes: int = 1000,
    *,
    blocks: Sequence[int],
    dropout: float = 0.0,
    width: int = 64,
    expansion: int = 4,
    stem: StemSpec | None = None,
    preactivation: bool = False,
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.1,
    **stage_fields: Any,
) -> ResNetSpec:
    """An image ResNet of four stages res2..res5, its width doubling; the 7x7 stem with max-pool unless another is given.

    expansion: channels behind a block per channel inside it. stage_fields: of every StageSpec (groups, stride_on, ...);
    squeeze is a share here, channels behind the block per channel of the squeeze.
    """
    squeeze = stage_fields.pop("squeeze", 0)
    stages = tuple(
        StageSpec(
            name=f"res{index + 2}",
            width=width << index,
            channels=expansion * width << index,
            stride=(1, 1) if index == 0 else (2, 2),
            temporal_kernels=(1,) * count,
            squeeze=(expansion * width << index) // squeeze if squeeze else 0,
            **stage_fields,
        )
        for index, count in enumerate(blocks)
    )
    return ResNetSpec(
        stem=stem or _stem(64, (7, 7)),
        stages=stages,
        num_classes=num_classes,
        dropout=dropout,
        preactivation=preactivation,
        norm_eps=norm_eps,
        norm_momentum=norm_momentum,
    )


# The authors' ablation networks ("symbol"); their norm's eps and momentum differ from the others' ("gluon").
symbol = partial(resnet2d, preactivation=True, norm_eps=1e-4, norm_momentum=0.08)
resnext: dict[str, Any] = {"groups": 32, "width": 128, "expansion": 2}


def resnet50_glore(num_classes: int = 1000, *, dropout: float = 0.0) -> ResNetSpec:
    """ResNet-50 v1b with three global reasoning units in res4, behind blocks 1, 3 and 5."""
    spec = resnet2d(num_classes, blocks=BLOCKS[50], dropout=dropout)
    stages = tuple(replace(part, glore_after=(1, 3, 5) if part.name == "res4" else ()) for part in spec.stages)
    return replace(spec, stages=stages)


def resnet_tiny(num_classes: int = 1000, *, dropout: float = 0.0) -> ResNetSpec:
    """The image network to inflate to c2d_tiny and i3d_tiny: one post-activation block per stage, a quarter of the width."""
    stem = _stem(16, (5, 5))
    return resnet2d(num_classes, blocks=(1,) * 4, dropout=dropout, width=16, stem=stem)


def mobilenet_v1(num_classes: int = 1000, *, multiplier: float, dropout: float = 0.0) -> MobileNetSpec:
    """MobileNetV1 (arXiv 1704.04861). multiplier: of all widths, rounded down."""

    def stage(name: str, width: int, blocks: int, step: int) -> MobileStageSpec:
        return MobileStageSpec(name, (int(width * multiplier),) * blocks, (step, step), expansion=0)

    return MobileNetSpec(
        stem=_mobile_stem(multiplier),
        stages=(
            stage("res1", 64, 1, 1),
            stage("res2", 128, 2, 2),
            stage("res3", 256, 2, 2),
            stage("res4", 512, 6, 2),
            stage("res5", 1024, 2, 2),
        ),
        num_classes=num_classes,
        dropout=dropout,
    )


def mobilenet_v2(num_classes: int = 1000, *, multiplier: float, dropout: float = 0.0) -> MobileNetSpec:
    """MobileNetV2 (arXiv 1801.04381). multiplier: of all widths, rounded down; the last layer's only if above 1."""

    def stage(name: str, widths: Sequence[int], step: int, expansion: int = 6) -> MobileStageSpec:
        return MobileStageSpec(name, tuple(int(w * multiplier) for w in widths), (step, step), expansion)

    return MobileNetSpec(
        stem=_mobile_stem(multiplier),
        stages=(
            stage("res1", [16], 1, expansion=1),
            stage("res2", [24] * 2, 2),
            stage("res3", [32] * 3, 2),
            stage("res4", [64] * 4 + [96] * 3, 2),
            stage("res5", [160] * 3 + [320], 2),
        ),
        num_classes=num_classes,
        dropout=dropout,
        tail_channels=int(1280 * max(multiplier, 1.0)),
        relu6=True,
    )


def densenet121(num_classes: int = 1000, *, dropout: float = 0.0) -> DenseNetSpec:
    """DenseNet-121 (arXiv 1608.06993)."""
    layers = {"res2": 6, "res3": 12, "res4": 24, "res5": 16}
    return DenseNetSpec(
        stem=_stem(64, (7, 7)),
        stages=tuple(
            DenseStageSpec(name, count, (1, 1) if name == "res2" else (2, 2)) for name, count in layers.items()
        ),
        num_classes=num_classes,
        dropout=dropout,
        norm_eps=1e-4,
        norm_momentum=0.08,
    )


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
    # images: the authors' ablation networks
    "resnet26": partial(symbol, blocks=BLOCKS[26]),
    "resnet50": partial(symbol, blocks=BLOCKS[50]),
    "resnet101": partial(symbol, blocks=BLOCKS[101]),
    "resnet152": partial(symbol, blocks=BLOCKS[152]),
    "resnet200": partial(symbol, blocks=BLOCKS[200]),
    "resnext50_32x4d": partial(symbol, blocks=BLOCKS[50], **resnext),
    "resnext101_32x4d": partial(symbol, blocks=BLOCKS[101], **resnext),
    "se_resnet50": partial(symbol, blocks=BLOCKS[50], squeeze=16),
    "densenet121": densenet121,
    # images: the other rows
    "mobilenet_v1_0.75": partial(mobilenet_v1, multiplier=0.75),
    "mobilenet_v1_1.0": partial(mobilenet_v1, multiplier=1.0),
    "mobilenet_v2_1.0": partial(mobilenet_v2, multiplier=1.0),
    "mobilenet_v2_1.125": partial(mobilenet_v2, multiplier=1.125),
    "resnet50_v1b": partial(resnet2d, blocks=BLOCKS[50]),
    "resnet152_v1f": partial(resnet2d, blocks=BLOCKS[152], stem=DEEP_STEM_131, stride_on=3),
    "se_resnet152_v1e": partial(resnet2d, blocks=BLOCKS[152], stem=DEEP_STEM, stride_on=3, squeeze=16, input_norm=True),
    "resnet50_glore": resnet50_glore,
    "resnet_tiny": resnet_tiny,
    # images: candidates for the rows of Table 6 that have no released code (a bL-Net stem in place of the max-pool)
    "resnet50_bl": partial(resnet2d, blocks=BLOCKS[50], stem=STEM_131),
    "resnext50_32x4d_bl": partial(resnet2d, blocks=BLOCKS[50], stem=DEEP_STEM_3X3, **resnext),
    "resnext101_32x4d_bl": partial(resnet2d, blocks=BLOCKS[101], stem=STEM_3X3, **resnext),
    "resnext101_32x4d_bl_balanced": partial(resnet2d, blocks=(4, 8, 18, 3), stem=STEM_3X3, **resnext),
}


AnySpec = TypeVar("AnySpec", bound=Spec)


def with_octave(
    spec: AnySpec,
    alpha: float,
    *,
    pool: Sequence[int] | None = None,
    ratios: Sequence[float] | None = None,
    round_to: int = 1,
) -> AnySpec:
    """The octave twin of a network: the only thing that makes a network octave.

    alpha: share of low-frequency channels, 0 to 1; 0 gives the vanilla network back, strided convolutions and all.
    pool: factor between the frequencies, (1, 2, 2) (default) or (2, 2, 2) for video, (2, 2) for images.
    ratios: alpha of each stage; default [alpha, ..., alpha, 0], the paper's (section 4.1).
    round_to: low channels of each layer are the nearest multiple of it, one multiple at least (`octave.rounded_alpha`).
    Both pathways of a SlowFast network become octave.
    Raises ValueError for an alpha out of range, ratios of another length than the stages, or a round_to below 1.
    """
    if isinstance(spec, SlowFastSpec):
        slow, fast = (
            with_octave(pathway, alpha, pool=pool, ratios=ratios, round_to=round_to)
            for pathway in (spec.slow, spec.fast)
        )
        return replace(spec, slow=slow, fast=fast)
    if round_to < 1:
        raise ValueError(f"octave round_to is {round_to}; low channels come in multiples of 1 or more")
    ratios = list(ratios) if ratios else [alpha] * (len(spec.stages) - 1) + [0.0]
    if len(ratios) != len(spec.stages):
        raise ValueError(f"{len(ratios)} octave ratios {ratios} for {len(spec.stages)} stages; give one per stage")
    outside = [a for a in [alpha, *ratios] if not 0.0 <= a <= 1.0]
    if outside:
        raise ValueError(f"octave alpha {outside[0]} is out of range; it is a share of channels, from 0 to 1")
    stages = tuple(replace(stage, alpha=a) for stage, a in zip(spec.stages, ratios, strict=True))  # type: ignore[type-var]
    octave_pool = tuple(pool or (1, 2, 2)[-spec.dims :]) if any(ratios) else None
    return replace(spec, stages=stages, octave_pool=octave_pool, round_to=round_to if octave_pool else 1)  # type: ignore[arg-type]


def with_pool_padding(spec: AnySpec, padding: int) -> AnySpec:
    """The stem's max-pool padded by 1 (PySlowFast, pytorchvideo and every image network) or 0 (the paper's video counts).

    Raises ValueError for 0 where the stem has no max-pool.
    """
    if isinstance(spec, SlowFastSpec):
        slow, fast = (with_pool_padding(pathway, padding) for pathway in (spec.slow, spec.fast))
        return replace(spec, slow=slow, fast=fast)
    if padding not in (0, 1):
        raise ValueError(f"pool_padding is {padding}; it is 0 (the paper's counts) or 1 (PySlowFast's)")
    if spec.stem.pool is None:
        if padding != 1:
            raise ValueError("pool_padding is 0, but this network's stem has no max-pool; leave it at 1")
        return spec
    pool = replace(spec.stem.pool, padding=(0, padding, padding)[-spec.dims :])
    return replace(spec, stem=replace(spec.stem, pool=pool))


def with_nonlocal(spec: ResNetSpec, after: Mapping[str, tuple[int, ...]], form: str = "softmax") -> ResNetSpec:
    """Non-local blocks behind the blocks `after` names: {"res3": (1, 3), "res4": (1, 3, 5)}."""
    unknown = set(after) - {stage.name for stage in spec.stages}
    if unknown:
        raise ValueError(f"no stage {sorted(unknown)}; stages are {[stage.name for stage in spec.stages]}")
    stages = tuple(replace(stage, nonlocal_after=tuple(after.get(stage.name, ()))) for stage in spec.stages)
    return replace(spec, stages=stages, nonlocal_form=form)


def _alternate(blocks: int, first: int) -> tuple[int, ...]:
    """Temporal kernels first, 4 - first, first, ..."""
    return tuple(first if index % 2 == 0 else 4 - first for index in range(blocks))


def _stem(channels: int, kernel: Size) -> StemSpec:
    """One convolution and a padded max-pool, both of stride 2 in space."""
    dims = len(kernel)
    pool = PoolSpec((1, 3, 3)[-dims:], (1, 2, 2)[-dims:], (0, 1, 1)[-dims:])
    return StemSpec((ConvSpec(channels, kernel, (1, 2, 2)[-dims:]),), pool)


def _mobile_stem(multiplier: float) -> StemSpec:
    return StemSpec(_convs((int(32 * multiplier), 3, 2)))


def _resnet(
    num_classes: int,
    dropout: float,
    stem: StemSpec,
    width: int,
    temporal: Sequence[tuple[int, ...]],
    *,
    pool_time: bool,
) -> ResNetSpec:
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
    return ResNetSpec(stem=stem, stages=stages, num_classes=num_classes, dropout=dropout)
