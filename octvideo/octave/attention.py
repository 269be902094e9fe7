"""The non-local block and the global reasoning unit over frequencies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octvideo.octave.conv import OctConv2d
from octvideo.octave.feature import Feature, Octave, lift, require_feature, rounded_alpha, split_channels
from octvideo.octave.layers import OctBatchNorm2d, OctBatchNorm3d, max_pool

FORMS = ("softmax", "dot_product")


class NonLocal(nn.Module):
    """x + norm(out(attention(theta(x), phi(x'), g(x')))) over all positions of a clip (Wang et al., arXiv 1711.07971).

    One frequency: [N, C, T, H, W] -> the same; keys and values read x' = the (1, 2, 2) max-pooled map.
    Two frequencies (paper, section 4.4): queries and output on high, keys and values on low, which already has the
    pooled resolution; low passes unchanged. The four kernels keep the vanilla shapes, of which the octave form uses
    the blocks high -> inner high (theta), low -> inner high (phi, g) and inner high -> high (out), so the state dict
    is the vanilla block's at every alpha.

    channels, inner: C and the width of the embedding. form: softmax, softmax(theta phi / sqrt(inner)), or dot_product,
    theta phi / (number of keys). alpha, pool: the split of channels and the factor between the frequencies.
    round_to: see `rounded_alpha`.
    The norm's gamma starts at zero, so that a new block changes nothing.
    """

    def __init__(
        self,
        channels: int,
        inner: int,
        *,
        form: str = "softmax",
        eps: float = 1e-5,
        momentum: float = 0.1,
        alpha: float = 0.0,
        pool: Sequence[int] = (1, 2, 2),
        round_to: int = 1,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; allowed: {', '.join(FORMS)}")
        self.form, self.pool = form, tuple(pool)
        inner_alpha, alpha = rounded_alpha(inner, alpha, round_to), rounded_alpha(channels, alpha, round_to)
        self.high, self.low = split_channels(channels, alpha)
        self.inner = split_channels(inner, inner_alpha)[0]
        if self.low and not (self.high and self.inner):
            raise ValueError(f"alpha {alpha} leaves the non-local block no high channels to query from")
        self.alpha = alpha
        self.theta = nn.Conv3d(channels, inner, 1)
        self.phi = nn.Conv3d(channels, inner, 1)
        self.g = nn.Conv3d(channels, inner, 1)
        self.out = nn.Conv3d(inner, channels, 1)
        self.bn = OctBatchNorm3d(channels, eps, momentum, alpha=alpha)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x: Feature) -> Feature:
        require_feature(x, self.high, self.low, self.pool if self.low else (1, 1, 1), type(self).__name__)
        if isinstance(x, Octave):
            queries, keys = x.high, x.low
            high, low = slice(0, self.high), slice(self.high, None)
        else:
            queries, keys = x, max_pool(x, (1, 2, 2), (1, 2, 2), (0, 0, 0))
            high = low = slice(None)
        theta = self._embed(self.theta, queries, high)
        phi, g = (self._embed(layer, keys, low) for layer in (self.phi, self.g))
        y = self._attend(theta, phi, g)
        # [N, L, inner] -> [N, inner, T, H, W] -> [N, C_high, T, H, W]
        y = y.transpose(1, 2).unflatten(2, queries.shape[2:])
        bias = self.out.bias[high] if self.out.bias is not None else None
        y = F.conv3d(y, self.out.weight[high, : self.inner], bias)
        y = queries + self.bn.normalize_high(y)
        return Octave(y, x.low) if isinstance(x, Octave) else y

    def _embed(self, layer: nn.Conv3d, x: Tensor, columns: slice) -> Tensor:
        """[N, C, T, H, W] -> [N, L, inner], L = T * H * W."""
        bias = layer.bias[: self.inner] if layer.bias is not None else None
        return F.conv3d(x, layer.weight[: self.inner, columns], bias).flatten(2).transpose(1, 2)

    def _attend(self, theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        """theta [N, L, inner], phi and g [N, S, inner] -> [N, L, inner]."""
        if self.form == "softmax":
            # of one head: torch's fast kernels and its ONNX exporter take [N, heads, L, inner] alone
            return F.scaled_dot_product_attention(theta[:, None], phi[:, None], g[:, None])[:, 0]
        # (theta phi^T / S) g, multiplied from the right: S x inner^2 + L x inner^2 instead of 2 L x S x inner
        return theta @ (phi.transpose(1, 2) @ g / phi.shape[1])

    def extra_repr(self) -> str:
        return f"form={self.form}, alpha={self.alpha}, pool={self.pool}"


class GlobalReasoning(nn.Module):
    """x + norm(out(reasoning over a graph)) (GloRe: Chen et al., arXiv 1811.12814), for images.

    One frequency: [N, C, H, W] -> the same. Two frequencies: state and projection merge into one, at high's
    resolution, and out splits again, as the first and last layers of an octave network do; only so do the multiply-adds
    come out as the paper prints them (3.1 G for ResNet-50 with three units at alpha 0.5).

    nodes: N_g of the graph, which has states of 2 * nodes channels. The norm's gamma starts at zero, so that a new
    unit changes nothing.
    """

    def __init__(
        self,
        channels: int,
        nodes: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        alpha: float = 0.0,
        pool: Sequence[int] = (2, 2),
    ) -> None:
        super().__init__()
        states = 2 * nodes
        self.state = OctConv2d(channels, states, 1, alpha_in=alpha, pool=pool)
        self.projection = OctConv2d(channels, nodes, 1, alpha_in=alpha, pool=pool)
        self.node_mix = nn.Conv1d(nodes, nodes, 1)
        self.state_mix = nn.Conv1d(states, states, 1, bias=False)
        self.out = OctConv2d(states, channels, 1, bias=False, alpha_out=alpha, pool=pool)
        self.bn = OctBatchNorm2d(channels, eps, momentum, alpha=alpha)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x: Feature) -> Feature:
        projection = self.projection(x).flatten(2)  # [N, G, H*W], G nodes
        nodes = self.state(x).flatten(2) @ projection.transpose(1, 2)  # [N, S, G], S states
        mixed = nodes + self.node_mix(nodes.transpose(1, 2)).transpose(1, 2)
        y = self.state_mix(mixed.relu()) @ projection  # [N, S, H*W]
        size = (x.high if isinstance(x, Octave) else x).shape[2:]
        return lift(torch.add, x, self.bn(self.out(y.unflatten(2, size))))
