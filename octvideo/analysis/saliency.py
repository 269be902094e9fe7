"""Where in a clip a class is seen: Grad-CAM (Selvaraju et al., arXiv 1610.02391) for one frequency or several."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from octvideo.octave import Feature, lift, upsample


class Saliency(NamedTuple):
    """What speaks for a class, and where. Images have no T.

    heat: [N, T, H, W] of the input's size, 0 to 1: `raw` without its negative parts, interpolated linearly, over `peak`.
    peak: [N], what 1 in `heat` stands for; 0 where nothing speaks for the class, and heat is 0 then.
    raw: [N, T', H', W'] of the finest map's size. At the classifier's input its sum is the logit less the bias, if
    every size divides by the factor between the maps.
    classes: int64 [N].
    """

    heat: Tensor
    peak: Tensor
    raw: Tensor
    classes: Tensor


def grad_cam(model: nn.Module, clips: Tensor, classes: Tensor | None = None, layer: str | None = None) -> Saliency:
    """Grad-CAM of `classes` (int64 [N]; None: the one with the highest logit) for network input [N, C, (T,) H, W].

    layer: the name of the module whose output is looked at, e.g. "stages.res4". None is the input of `model.head`, the
    last map there is: behind the last stage and the norm or convolution that may follow it; both pathways of SlowFast,
    whose logits are sums over both.

    Several maps A of a layer (high and low, slow and fast) count as the channels of one: each is upsampled as the
    octave layers do it, low[i // 2], to the finest map's size Z. By the chain rule the gradient at an upsampled value,
    summed over Z, is that at the map itself, summed; so equation 1 becomes a_c = 1 / Z sum dY / dA_c with the same Z
    for all, and equation 2 is sum_c a_c upsample(A_c). Averaging each map's gradient over its own size instead would
    count a low channel 4 times over.

    The network runs in evaluation mode and is left as it was: mode, gradients, hooks.
    Errors: ValueError for a layer that is not there, runs more than once, has another output than maps of the input's
    dimensions, or does not lead to the logits.
    """
    with _as_it_was(model), torch.enable_grad():
        model.eval().requires_grad_(False)  # so that no graph is kept for what lies before the layer
        maps, handle = _watch(model, layer)
        try:
            logits = model(clips)
        finally:
            handle.remove()
        name = layer or "head"
        if not maps:
            raise ValueError(f"layer {name!r} did not run; choose another")
        if any(a.dim() != clips.dim() for a in maps):
            shapes = [tuple(a.shape) for a in maps]
            raise ValueError(f"layer {name!r} has no maps of {clips.dim()} dimensions but {shapes}; choose another")
        if classes is None:
            classes = logits.argmax(dim=1)
        score = logits.gather(1, classes[:, None]).sum()
        if not score.requires_grad:
            raise ValueError(f"layer {name!r} does not lead to the logits; choose another")
        gradients = torch.autograd.grad(score, maps, allow_unused=True)  # unused: a map of no channels
    size = tuple(max(sizes) for sizes in zip(*(a.shape[2:] for a in maps), strict=True))
    raw = sum(_weighted(a.detach(), gradient, size) for a, gradient in zip(maps, gradients, strict=True))
    assert isinstance(raw, Tensor)
    # [N, T', H', W'] -> [N, 1, T', H', W'] -> [N, T, H, W]
    mode = "trilinear" if clips.dim() == 5 else "bilinear"
    heat = F.interpolate(raw.relu()[:, None], size=clips.shape[2:], mode=mode, align_corners=False)[:, 0]
    peak = heat.flatten(1).amax(dim=1)
    scale = torch.where(peak > 0, peak, 1.0).reshape(-1, *[1] * (heat.dim() - 1))
    return Saliency(heat / scale, peak, raw, classes)


def _weighted(a: Tensor, gradient: Tensor | None, size: tuple[int, ...]) -> Tensor:
    """[N, C, ...] -> [N, *size]: the sum over channels, each weighted by its gradient's sum over the finest map's size."""
    if gradient is None or a.shape[1] == 0:
        return a.new_zeros(a.shape[0], *size)
    weights = gradient.flatten(2).sum(2) / torch.Size(size).numel()  # [N, C]
    return upsample(torch.einsum("nc,nc...->n...", weights, a)[:, None], size)[:, 0]


def _watch(model: nn.Module, layer: str | None) -> tuple[list[Tensor], RemovableHandle]:
    """A hook that collects the layer's maps, the leaves of the graph. What follows gets copies: a ReLU may be in place."""
    maps: list[Tensor] = []

    def leaf(a: Tensor) -> Tensor:
        maps.append(a.detach().requires_grad_())
        return maps[-1].clone()

    if layer is None:

        def before(head: nn.Module, features: tuple[Feature, ...]) -> tuple[Feature, ...]:
            return tuple(lift(leaf, feature) for feature in features)

        return maps, model.get_submodule("head").register_forward_pre_hook(before)

    def behind(module: nn.Module, inputs: tuple[Feature, ...], output: Feature) -> Feature:
        if maps:
            raise ValueError(f"layer {layer!r} runs more than once; choose another")
        return lift(leaf, output)

    modules = dict(model.named_modules())
    if layer not in modules or not layer:
        close = difflib.get_close_matches(layer, modules, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "named_modules() has the names"
        raise ValueError(f"no layer {layer!r} in {type(model).__name__}; {hint}")
    return maps, modules[layer].register_forward_hook(behind)


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back, whatever happens, which modules train and which parameters ask for gradients."""
    training = [(module, module.training) for module in model.modules()]
    asking = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, wanted in asking:
            parameter.requires_grad_(wanted)
