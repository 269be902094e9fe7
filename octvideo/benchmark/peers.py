"""Other people's packages as their users call them, beside which `benchmark.py` measures.

Readers of clips: decord's and pytorchvideo's. Networks: pytorchvideo's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from octvideo import build
from octvideo.benchmark.speed import BenchmarkError
from octvideo.models import ResNetSpec, SlowFastSpec, feature_sizes
from octvideo.weights.names import from_octvideo

PathReader = Callable[[str, int, CfgNode], object]
PYTORCHVIDEO_NEEDS = ("pytorchvideo", "torchvision")
TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")


def _declare_torchvision() -> None:
    """torchvision's operators do not come with every build of torch; declared, its Python part imports."""
    for schema in ("nms(Tensor dets, Tensor scores, float t) -> Tensor", "qnms(Tensor d, Tensor s, float t) -> Tensor"):
        with contextlib.suppress(RuntimeError):
            TORCHVISION.define(schema)


def is_installed(*packages: str) -> bool:
    """Return whether all of these packages can be imported."""
    return all(importlib.util.find_spec(package) for package in packages)


def _start(num_frames: int, cfg: CfgNode, turn: int, path: str) -> int:
    span = (cfg.DATA.NUM_FRAMES - 1) * cfg.DATA.SAMPLING_RATE + 1
    return random.Random(f"{path} {turn}").randrange(max(num_frames - span, 0) + 1)


def indices(num_frames: int, cfg: CfgNode, turn: int, path: str) -> list[int]:
    start, rate = _start(num_frames, cfg, turn, path), cfg.DATA.SAMPLING_RATE
    return [min(start + i * rate, num_frames - 1) for i in range(cfg.DATA.NUM_FRAMES)]


def _scale_and_crop(clip: Tensor, cfg: CfgNode, turn: int) -> Tensor:
    """float [C, T, H, W]: a random short side by bilinear interpolation, then a random crop, as the field does it."""
    rng = random.Random(turn)
    side, crop = rng.randint(*cfg.DATA.TRAIN_SHORT_SIDE), cfg.DATA.TRAIN_CROP
    height, width = clip.shape[2:]
    scale = side / min(height, width)
    clip = F.interpolate(clip, size=(round(height * scale), round(width * scale)), mode="bilinear")
    top, left = (rng.randrange(size - crop + 1) for size in clip.shape[2:])
    return clip[:, :, top : top + crop, left : left + crop].contiguous()


def readers() -> dict[str, PathReader]:
    """Other people's readers, called as their users call them; those that are installed."""
    found: dict[str, PathReader] = {}
    if is_installed("decord"):
        found["decord, get_batch"] = _decord_get_batch
    if is_installed(*PYTORCHVIDEO_NEEDS):
        found["pytorchvideo, EncodedVideo"] = _encoded_video
    return found


def _decord_get_batch(path: str, turn: int, cfg: CfgNode) -> Tensor:
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    frames = torch.from_numpy(reader.get_batch(indices(len(reader), cfg, turn, path)).asnumpy())
    return _scale_and_crop(frames.permute(3, 0, 1, 2).float(), cfg, turn)


def _encoded_video(path: str, turn: int, cfg: CfgNode) -> Tensor:
    """A clip by its time: every frame of the span is decoded and kept, then a few are taken."""
    _declare_torchvision()
    from pytorchvideo.data.encoded_video import EncodedVideo

    video = EncodedVideo.from_path(path, decode_audio=False, decoder="pyav")
    span = cfg.DATA.NUM_FRAMES * cfg.DATA.SAMPLING_RATE / (cfg.DATA.TARGET_FPS or 30.0)
    start = random.Random(f"{path} {turn}").uniform(0, max(float(video.duration) - span, 0))
    clip = video.get_clip(start, start + span)["video"]
    chosen = torch.linspace(0, clip.shape[1] - 1, cfg.DATA.NUM_FRAMES).long()
    return _scale_and_crop(clip[:, chosen], cfg, turn)


NETWORKS = tuple(f"{kind}_r{depth}" for kind in ("c2d", "i3d", "slow") for depth in (50, 101))
SLOWFAST = ("slowfast_4x16_r50", "slowfast_8x8_r50", "slowfast_8x8_r101")


def network(cfg: CfgNode) -> nn.Module:
    """pytorchvideo's network of the same layers at alpha 0, with the weights of ours: a clip has the same logits.

    It takes our clips, and this config's frames and crop alone. Raises BenchmarkError where there is none.
    """
    name = build.network_name(cfg)
    if name not in NETWORKS + SLOWFAST:
        raise BenchmarkError(f"pytorchvideo has no {name} to measure against; it has {', '.join(NETWORKS + SLOWFAST)}")
    if not is_installed(*PYTORCHVIDEO_NEEDS):
        raise BenchmarkError(
            "--against pytorchvideo needs pytorchvideo and torchvision: pip install --no-deps -r tests/peers.txt"
        )
    if cfg.MODEL.POOL_PADDING != 1 or (name in SLOWFAST and cfg.DATA.POLICY != "strided"):
        raise BenchmarkError(
            f"pytorchvideo's {name} pads the stem's max-pool and strides through the frames; give MODEL.POOL_PADDING 1"
            + (" DATA.POLICY strided" if name in SLOWFAST else "")
        )
    _declare_torchvision()
    spec, size = build.network_spec(cfg), build.clip_size(cfg, cfg.DATA.TRAIN_CROP)[1:]
    weights = build.network(cfg).state_dict()
    if isinstance(spec, SlowFastSpec):
        pathways = _plain(_slowfast(spec, size))
        pathways.load_state_dict(from_octvideo(weights, "pytorchvideo"), strict=True)
        return _OneClip(pathways, spec.frame_ratio)
    assert isinstance(spec, ResNetSpec)
    theirs, pooled = _plain(_resnet(spec, size)), spec.stages[0].pool_after is not None
    theirs.load_state_dict(from_octvideo(weights, "pytorchvideo", pool_block=pooled), strict=True)
    return theirs


def _plain(theirs: nn.Module) -> nn.Module:
    """Strides of projections are NumPy's integers there, over which torch.compile stumbles at every block."""
    for module in theirs.modules():
        if isinstance(module, nn.Conv3d):
            module.stride = tuple(int(step) for step in module.stride)
    return theirs


def _depth(spec: ResNetSpec) -> int:
    return 2 + 3 * sum(stage.blocks for stage in spec.stages)


def _resnet(spec: ResNetSpec, size: tuple[int, ...]) -> nn.Module:
    from pytorchvideo.models.resnet import create_resnet

    return create_resnet(
        model_depth=_depth(spec),
        model_num_class=spec.num_classes,
        dropout_rate=spec.dropout,
        stem_conv_kernel_size=spec.stem.convs[0].kernel,
        stage_conv_a_kernel_size=tuple(tuple((k, 1, 1) for k in stage.temporal_kernels) for stage in spec.stages),
        stage1_pool=nn.MaxPool3d if spec.stages[0].pool_after else None,
        head_pool_kernel_size=feature_sizes(spec, size)["res5"],
    )


def _slowfast(spec: SlowFastSpec, size: tuple[int, ...]) -> nn.Module:
    from pytorchvideo.models.slowfast import create_slowfast

    return create_slowfast(
        slowfast_fusion_conv_kernel_size=(spec.lateral_kernel, 1, 1),
        slowfast_fusion_conv_stride=(spec.frame_ratio, 1, 1),
        model_depth=_depth(spec.slow),
        model_num_class=spec.num_classes,
        dropout_rate=spec.slow.dropout,
        head_pool_kernel_sizes=(feature_sizes(spec, size)["res5"], feature_sizes(spec.fast, size)["res5"]),
    )


class _OneClip(nn.Module):
    """Takes the clip apart, as pytorchvideo's users do in their transforms."""

    def __init__(self, pathways: nn.Module, ratio: int) -> None:
        super().__init__()
        self.pathways, self.ratio = pathways, ratio

    def forward(self, clip: Tensor) -> Tensor:
        return self.pathways([clip[:, :, :: self.ratio], clip])
