"""Other people's names of ResNets' and SlowFast networks' weights, to ours and back.

A layout is one rule from our name to theirs; reading a file asks it for the name of each of ours.
Sources: torchvision's resnet.py; PySlowFast's resnet_helper.py, video_model_builder.py and c2_model_loading.py;
pytorchvideo's resnet.py and slowfast.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octvideo.weights.coverage import Coverage, WeightsError, compare, is_counter


@dataclass(frozen=True)
class Network:
    """What a layout has to know of the whole network to name one entry of it.

    slowfast: it has two pathways. last_block: of each stage, its last block's number (in the fast pathway).
    pool_block: pytorchvideo's C2D and I3D, in which the pool behind res2 counts as a block.
    """

    slowfast: bool
    last_block: Mapping[str, int]
    pool_block: bool = False

    @classmethod
    def of(cls, own: Collection[str], pool_block: bool = False) -> Network:
        """From our names."""
        last: dict[str, int] = {}
        for name in own:
            if match := re.match(r"(?:fast\.)?stages\.(\w+)\.(\d+)\.", name):
                last[match[1]] = max(int(match[2]), last.get(match[1], 0))
        return cls(any(name.startswith("fast.") for name in own), last, pool_block)


def octvideo(name: str, network: Network) -> str | None:
    return name


def _in_block(conv: str, bn: str, projection: str, projection_bn: str, places: str = "abc") -> dict[str, str]:
    """The layers of a bottleneck: ours -> theirs. conv and bn are templates for the place of a convolution."""
    layers = {"projection": projection, "projection_bn": projection_bn}
    for number, place in enumerate(places, start=1):
        layers |= {f"conv{number}": conv.format(place), f"bn{number}": bn.format(place)}
    return layers


_TORCHVISION = _in_block("conv{}", "bn{}", "downsample.0", "downsample.1", places="123")


def torchvision(name: str, network: Network) -> str | None:
    """torchvision's ResNet, and timm's: layer1 is our res2."""
    match name.split("."):
        case ["stem", ("conv" | "bn") as layer, value]:
            return f"{layer}1.{value}"
        case ["stages", stage, block, layer, value] if _is_block(stage, block) and layer in _TORCHVISION:
            return f"layer{_number(stage) - 1}.{block}.{_TORCHVISION[layer]}.{value}"
        case ["head", "fc", value]:
            return f"fc.{value}"
    return None


_PYSLOWFAST = _in_block("branch2.{}", "branch2.{}_bn", "branch1", "branch1_bn")


def pyslowfast(name: str, network: Network) -> str | None:
    """PySlowFast: pathway0 is the only one or the slow one, pathway1 the fast one; s1 is the stem, s2 our res2."""
    pathway, rest = _pathway(name)
    match rest.split("."):
        case ["stem", ("conv" | "bn") as layer, value]:
            return f"s1.pathway{pathway}_stem.{layer}.{value}"
        case ["stages", stage, block, layer, value] if _is_block(stage, block) and layer in _PYSLOWFAST:
            return f"s{_number(stage)}.pathway{pathway}_res{block}.{_PYSLOWFAST[layer]}.{value}"
        case ["stages", stage, block, layer, value] if block.startswith("nonlocal"):
            theirs = "bn" if layer == "bn" else f"conv_{layer}"
            return f"s{_number(stage)}.pathway{pathway}_{block}.{theirs}.{value}"
        case ["laterals", place, layer, value]:
            theirs = "bn" if layer == "bn" else "conv_f2s"
            return f"s{_number(place)}_fuse.{theirs}.{value}"
        case ["head", "fc", value]:
            return f"head.projection.{value}"
    return None


_CAFFE2 = _in_block("branch2{}", "branch2{}_bn", "branch1", "branch1_bn")
_CAFFE2_VALUES = {"weight": "w", "bias": "b"}
_CAFFE2_NORM_VALUES = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}


def caffe2(name: str, network: Network) -> str | None:
    """The Caffe2 blobs of the video-nonlocal-net and SlowFast model zoos; what is fast begins with t_."""
    layer, _, value = name.rpartition(".")
    values = _CAFFE2_NORM_VALUES if is_norm(layer) else _CAFFE2_VALUES
    blob = _caffe2_layer(layer, network)
    return f"{blob}_{values[value]}" if blob and value in values else None


def _caffe2_layer(layer: str, network: Network) -> str | None:
    pathway, rest = _pathway(layer)
    prefix = "t_" if pathway else ""
    match rest.split("."):
        case ["stem", "conv"]:
            return f"{prefix}conv1"
        case ["stem", "bn"]:
            return f"{prefix}res_conv1_bn"
        case ["stages", stage, block, inner] if _is_block(stage, block) and inner in _CAFFE2:
            return f"{prefix}{stage}_{block}_{_CAFFE2[inner]}"
        case ["stages", stage, block, inner] if block.startswith("nonlocal"):
            return f"{prefix}nonlocal_conv{_number(stage)}_{block.removeprefix('nonlocal')}_{inner}"
        case ["laterals", place, inner]:
            source = "t_pool1" if place == "stem" else f"t_{place}_{network.last_block.get(place)}_branch2c_bn"
            return f"{source}_subsample{'_bn' if inner == 'bn' else ''}"
        case ["head", "fc"]:
            return "pred"
    return None


_PYTORCHVIDEO = _in_block("branch2.conv_{}", "branch2.norm_{}", "branch1_conv", "branch1_norm")


def pytorchvideo(name: str, network: Network) -> str | None:
    """pytorchvideo's create_resnet and create_slowfast: blocks.0 is the stem, blocks.1 our res2."""
    pathway, rest = _pathway(name)
    inside = f".multipathway_blocks.{pathway}" if network.slowfast else ""
    match rest.split("."):
        case ["stem", ("conv" | "bn") as layer, value]:
            return f"blocks.0{inside}.{'norm' if layer == 'bn' else 'conv'}.{value}"
        case ["stages", stage, block, layer, value] if _is_block(stage, block) and layer in _PYTORCHVIDEO:
            index = _number(stage) - 1 + (network.pool_block and stage != "res2")
            return f"blocks.{index}{inside}.res_blocks.{block}.{_PYTORCHVIDEO[layer]}.{value}"
        case ["laterals", place, layer, value]:
            theirs = "norm" if layer == "bn" else "conv_fast_to_slow"
            return f"blocks.{_number(place) - 1}.multipathway_fusion.{theirs}.{value}"
        case ["head", "fc", value]:
            return f"blocks.{6 if network.slowfast or network.pool_block else 5}.proj.{value}"
    return None


LAYOUTS: dict[str, Callable[[str, Network], str | None]] = {
    "octvideo": octvideo,
    "torchvision": torchvision,
    "pyslowfast": pyslowfast,
    "caffe2": caffe2,
    "pytorchvideo": pytorchvideo,
}
"""Our name -> theirs; None where a layout has no such layer."""

_SIGNS = {
    "octvideo": r"(slow\.)?stages\.",
    "torchvision": r"layer1\.0\.",
    "pyslowfast": r"s[1-5]\.pathway0_",
    "caffe2": r"res_conv1_bn_|res2_0_branch",
    "pytorchvideo": r"blocks\.\d\.(multipathway_blocks\.\d\.)?res_blocks\.",
}


def layout_of(names: Iterable[str]) -> str:
    """Which layout a file's names are in. Raises WeightsError for none of them."""
    seen = list(names)
    for layout, sign in _SIGNS.items():
        if any(re.match(sign, name) for name in seen):
            return layout
    shown = ", ".join(seen[:5]) or "no entries at all"
    raise WeightsError(f"weights in an unknown layout ({shown}, ...); known are {', '.join(LAYOUTS)}")


def to_octvideo(
    entries: Mapping[str, Tensor], own: Mapping[str, Sequence[int]], layout: str | None = None
) -> tuple[dict[str, Tensor], Coverage]:
    """A file's state dict -> ours, and what it covers.

    entries: under their names. own: the shapes of the target network's state dict, under our names.
    layout: one of LAYOUTS; by default recognized from the names. Raises WeightsError where that fails.
    """
    rule = _rule(layout or layout_of(entries))
    network = Network.of(own, pool_block=any(name.startswith("blocks.5.res_blocks.") for name in entries))
    theirs = {name: rule(name, network) for name in own}
    found = {name: torch.as_tensor(entries[other]) for name, other in theirs.items() if other and other in entries}
    taken = set(theirs.values())
    return compare(found, own, [name for name in entries if name not in taken and not _is_bookkeeping(name)])


def from_octvideo(weights: Mapping[str, Tensor], layout: str, *, pool_block: bool = False) -> dict[str, Tensor]:
    """Our state dict -> theirs.

    layout: one of LAYOUTS. pool_block: for pytorchvideo's networks with a pool behind res2 (C2D, I3D).
    Raises WeightsError for a layer that the layout has no name for.
    """
    rule, network = _rule(layout), Network.of(weights, pool_block)
    theirs = {name: rule(name, network) for name in weights}
    if nameless := [name for name, other in theirs.items() if other is None and not is_counter(name)]:
        raise WeightsError(
            f"layout {layout} has no name for {len(nameless)} of {len(theirs)} entries, first {nameless[0]}"
        )
    return {other: weights[name] for name, other in theirs.items() if other is not None}


def _rule(layout: str) -> Callable[[str, Network], str | None]:
    if layout not in LAYOUTS:
        raise WeightsError(f"layout is {layout!r}; known are {', '.join(LAYOUTS)}")
    return LAYOUTS[layout]


def _is_bookkeeping(name: str) -> bool:
    """Of a Caffe2 workspace: the optimizer's state and counters."""
    return name.endswith("_momentum") or name in ("lr", "model_iter")


def is_norm(layer: str) -> bool:
    """Our names of norms: stem.bn, bn3, projection_bn, tail_bn, ..."""
    return re.search(r"(^|[._])bn\d?$", layer) is not None


def _pathway(name: str) -> tuple[int, str]:
    """'fast.stem.conv' -> (1, 'stem.conv')"""
    for number, pathway in enumerate(("slow.", "fast.")):
        if name.startswith(pathway):
            return number, name.removeprefix(pathway)
    return 0, name


def _is_block(stage: str, block: str) -> bool:
    """A block of a ResNet; other networks have a res1 too."""
    return stage in ("res2", "res3", "res4", "res5") and block.isdigit()


def _number(place: str) -> int:
    """'stem' -> 1, 'res2' -> 2"""
    return 1 if place == "stem" else int(place.removeprefix("res"))
