"""Networks as data: frozen descriptions that `models.create` builds and `models.zoo` derives from one another.

Sizes, kernels and strides are (T, H, W) for video networks and (H, W) for image networks.
"""

from __future__ import annotations

from dataclasses import dataclass

Size = tuple[int, ...]


@dataclass(frozen=True)
class ConvSpec:
    """A size-preserving convolution (padding kernel // 2) with norm and activation."""

    channels: int
    kernel: Size
    stride: Size


@dataclass(frozen=True)
class PoolSpec:
    """A max-pool."""

    kernel: Size
    stride: Size
    padding: Size


@dataclass(frozen=True)
class StageSpec:
    """A run of bottleneck blocks at one resolution.

    width: channels inside the bottleneck; channels: after it. stride: of the first block, on its conv1, 2 or 3
    (stride_on). temporal_kernels: size in time of each block's first convolution; length = blocks (all 1 in an image
    network). groups: of the 3x3 convolution. squeeze: width of a squeeze-excitation at each block's end, 0 for none.
    input_norm: an affine-free norm on what conv1 and the projection read. pool_after: kernel and stride of a max-pool
    behind the stage. nonlocal_after, glore_after: numbers of the blocks that a non-local block or a global reasoning
    unit follows. alpha: share of low-frequency channels.
    """

    name: str
    width: int
    channels: int
    stride: Size
    temporal_kernels: tuple[int, ...]
    stride_on: int = 2
    groups: int = 1
    squeeze: int = 0
    input_norm: bool = False
    pool_after: Size | None = None
    nonlocal_after: tuple[int, ...] = ()
    glore_after: tuple[int, ...] = ()
    alpha: float = 0.0

    @property
    def blocks(self) -> int:
        return len(self.temporal_kernels)


@dataclass(frozen=True)
class StemSpec:
    """Convolutions on one frequency, then a max-pool and a bottleneck block, where there are such.

    pool.padding: 1 is the padded pool of PySlowFast and pytorchvideo (112 -> 56), 0 the unpadded one that the paper's
    printed counts of video networks need (112 -> 55).
    """

    convs: tuple[ConvSpec, ...]
    pool: PoolSpec | None = None
    bottleneck: StageSpec | None = None

    @property
    def channels(self) -> int:
        return self.bottleneck.channels if self.bottleneck else self.convs[-1].channels


@dataclass(frozen=True, kw_only=True)
class NetSpec:
    """What all networks of one trunk have. octave_pool: factor between the frequencies; None makes it vanilla.

    round_to: low channels of a layer are the multiple of it that is nearest to its alpha; 1 is the paper's rule.
    """

    stem: StemSpec
    num_classes: int
    dropout: float = 0.0
    in_channels: int = 3
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1
    octave_pool: Size | None = None
    round_to: int = 1

    @property
    def dims(self) -> int:
        return len(self.stem.convs[0].kernel)


@dataclass(frozen=True, kw_only=True)
class ResNetSpec(NetSpec):
    """A ResNet. preactivation: norm and ReLU before each convolution (arXiv 1603.05027) instead of behind it."""

    stages: tuple[StageSpec, ...]
    preactivation: bool = False
    nonlocal_form: str = "softmax"


@dataclass(frozen=True)
class MobileStageSpec:
    """Blocks at one resolution. channels: behind each block. stride: of the first. alpha: share of low channels.

    expansion: channels inside an inverted residual block per channel of its input; 0 makes the blocks depthwise
    separable convolutions (MobileNetV1).
    """

    name: str
    channels: tuple[int, ...]
    stride: Size
    expansion: int
    alpha: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MobileNetSpec(NetSpec):
    """MobileNetV1 or V2. tail_channels: of the 1x1 convolution before the head, 0 for none. relu6: ReLU6 for ReLU."""

    stages: tuple[MobileStageSpec, ...]
    tail_channels: int = 0
    relu6: bool = False


@dataclass(frozen=True)
class DenseStageSpec:
    """Dense layers at one resolution. stride: of the transition into it. alpha: share of low channels that layers add."""

    name: str
    layers: int
    stride: Size
    alpha: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DenseNetSpec(NetSpec):
    """A DenseNet. growth: channels that each layer adds; width: of its 1x1 convolution."""

    stages: tuple[DenseStageSpec, ...]
    growth: int = 32
    width: int = 128


@dataclass(frozen=True)
class SlowFastSpec:
    """Two ResNets of the same stages with lateral connections fast -> slow behind stem and stages, the last one excepted.

    frame_ratio: frames of the fast pathway (the whole clip) per frame of the slow one; SlowFast's alpha.
    lateral_kernel: size in time of the lateral convolutions, whose stride in time is frame_ratio; lateral_ratio: their
    output channels per channel of the fast pathway. slow_frames: `strided` takes frames 0, r, 2r, ...; `pyslowfast`
    spreads them to the very end, as PySlowFast does.
    """

    slow: ResNetSpec
    fast: ResNetSpec
    frame_ratio: int
    lateral_kernel: int
    lateral_ratio: int = 2
    slow_frames: str = "strided"

    @property
    def num_classes(self) -> int:
        return self.slow.num_classes


TrunkSpec = ResNetSpec | MobileNetSpec | DenseNetSpec
Spec = TrunkSpec | SlowFastSpec


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


def _sizes(spec: TrunkSpec, size: Size) -> dict[str, Size]:
    stem = spec.stem
    for conv in stem.convs:
        size = _strided(size, conv.stride)
    if stem.pool:
        geometry = zip(size, stem.pool.kernel, stem.pool.stride, stem.pool.padding, strict=True)
        size = tuple((s + 2 * p - k) // stride + 1 for s, k, stride, p in geometry)
    if stem.bottleneck:
        size = _strided(size, stem.bottleneck.stride)
    sizes = {"stem": size}
    for stage in spec.stages:
        size = _strided(size, stage.stride)
        if isinstance(stage, StageSpec) and stage.pool_after:
            size = tuple(s // k for s, k in zip(size, stage.pool_after, strict=True))
        sizes[stage.name] = size
    return sizes


def _strided(size: Size, stride: Size) -> Size:
    return tuple(-(-s // step) for s, step in zip(size, stride, strict=True))


def _smallest_size(spec: TrunkSpec) -> Size:
    def fits(axis: int, length: int) -> bool:
        probe = tuple(length if i == axis else 4096 for i in range(spec.dims))
        return all(min(s) >= 1 for s in _sizes(spec, probe).values())

    return tuple(next(n for n in range(1, 4097) if fits(axis, n)) for axis in range(spec.dims))
