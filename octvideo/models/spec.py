"""Networks as data: frozen descriptions that `models.resnet` builds and `models.zoo` derives from one another.

Sizes, kernels and strides are (T, H, W) for video networks and (H, W) for image networks.
"""

from __future__ import annotations

from dataclasses import dataclass

Size = tuple[int, ...]


@dataclass(frozen=True)
class StemSpec:
    """Convolution, norm, ReLU, max-pool on one frequency.

    pool_padding: 1 is the padded pool of PySlowFast and pytorchvideo (112 -> 56), 0 the unpadded one that the paper's
    printed counts need (112 -> 55).
    """

    channels: int
    kernel: Size
    stride: Size
    pool_kernel: Size
    pool_stride: Size
    pool_padding: Size


@dataclass(frozen=True)
class StageSpec:
    """A run of bottleneck blocks at one resolution.

    width: channels inside the bottleneck; channels: after it. stride: of the first block (on its 3x3 convolution).
    temporal_kernels: size in time of each block's first convolution; length = blocks (all 1 in an image network).
    pool_after: kernel and stride of a max-pool behind the stage. nonlocal_after: numbers of the blocks that a non-local
    block follows. alpha: share of low-frequency channels.
    """

    name: str
    width: int
    channels: int
    stride: Size
    temporal_kernels: tuple[int, ...]
    pool_after: Size | None = None
    nonlocal_after: tuple[int, ...] = ()
    alpha: float = 0.0

    @property
    def blocks(self) -> int:
        return len(self.temporal_kernels)


@dataclass(frozen=True)
class NetSpec:
    """A ResNet. octave_pool: factor between the frequencies per dimension; None makes every layer vanilla."""

    stem: StemSpec
    stages: tuple[StageSpec, ...]
    num_classes: int
    dropout: float = 0.5
    in_channels: int = 3
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1
    nonlocal_form: str = "softmax"
    octave_pool: Size | None = None

    @property
    def dims(self) -> int:
        return len(self.stem.kernel)


@dataclass(frozen=True)
class SlowFastSpec:
    """Two ResNets of the same stages with lateral connections fast -> slow behind stem and stages, the last one excepted.

    frame_ratio: frames of the fast pathway (the whole clip) per frame of the slow one; SlowFast's alpha.
    lateral_kernel: size in time of the lateral convolutions, whose stride in time is frame_ratio; lateral_ratio: their
    output channels per channel of the fast pathway. slow_frames: `strided` takes frames 0, r, 2r, ...; `pyslowfast`
    spreads them to the very end, as PySlowFast does.
    """

    slow: NetSpec
    fast: NetSpec
    frame_ratio: int
    lateral_kernel: int
    lateral_ratio: int = 2
    slow_frames: str = "strided"

    @property
    def num_classes(self) -> int:
        return self.slow.num_classes


Spec = NetSpec | SlowFastSpec


def feature_sizes(spec: Spec, size: Size) -> dict[str, Size]:
    """Size of the (high-frequency) map behind the stem and each stage for an input of `size`; in SlowFast, the slow one's.

    Raises ValueError where a map would vanish, with the smallest input that the strides admit; every larger one works,
    since convolutions round up and the head pools whatever is left.
    """
    if isinstance(spec, SlowFastSpec):
        frames, *space = size
        if frames % spec.frame_ratio:
            raise ValueError(
                f"{frames} frames do not divide by {spec.frame_ratio}, the frames of the fast pathway per frame of the "
                f"slow one; give a multiple of {spec.frame_ratio}"
            )
        feature_sizes(spec.fast, size)
        return feature_sizes(spec.slow, (frames // spec.frame_ratio, *space))
    sizes = _sizes(spec, size)
    vanished = [name for name, s in sizes.items() if min(s) < 1]
    if vanished:
        smallest = _smallest_size(spec)
        raise ValueError(
            f"an input of size {size} leaves nothing at {vanished[0]} (size {sizes[vanished[0]]}); "
            f"the strides of this network admit {smallest} and anything larger"
        )
    return sizes


def _sizes(spec: NetSpec, size: Size) -> dict[str, Size]:
    stem = spec.stem
    size = tuple(-(-s // stride) for s, stride in zip(size, stem.stride, strict=True))
    size = tuple(
        (s + 2 * p - k) // stride + 1
        for s, k, stride, p in zip(size, stem.pool_kernel, stem.pool_stride, stem.pool_padding, strict=True)
    )
    sizes = {"stem": size}
    for stage in spec.stages:
        size = tuple(-(-s // stride) for s, stride in zip(size, stage.stride, strict=True))
        if stage.pool_after:
            size = tuple(s // k for s, k in zip(size, stage.pool_after, strict=True))
        sizes[stage.name] = size
    return sizes


def _smallest_size(spec: NetSpec) -> Size:
    def fits(axis: int, length: int) -> bool:
        probe = tuple(length if i == axis else 4096 for i in range(spec.dims))
        return all(min(s) >= 1 for s in _sizes(spec, probe).values())

    return tuple(next(n for n in range(1, 4097) if fits(axis, n)) for axis in range(spec.dims))
