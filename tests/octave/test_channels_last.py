import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octvideo.octave import Octave, OctConv2d, octavize
from octvideo.octave.channels_last import OctLinear
from octvideo.octave.rewrite import OCTAVE


@pytest.mark.parametrize("parts", [((8, 0),), ((5, 3),), ((0, 8),), ((2, 1), (3, 2))])
@pytest.mark.parametrize("alpha_out", [0.0, 0.25, 1.0])
def test_a_linear_layer_is_a_1x1_octave_convolution(parts: tuple[tuple[int, int], ...], alpha_out: float) -> None:
    assert OCTAVE[nn.Linear] is OctLinear
    linear = OctLinear(8, 12).double()
    linear._split(alpha_out, parts, (2, 2))
    conv = OctConv2d(8, 12, 1, in_parts=parts, alpha_out=alpha_out).double()
    conv.load_state_dict({"weight": linear.weight[..., None, None], "bias": linear.bias})
    low = sum(part[1] for part in parts)
    high = torch.randn(2, 8 - low, 5, 6, dtype=torch.float64)
    x = Octave(high, torch.randn(2, low, 3, 3, dtype=torch.float64)) if low else high
    torch.testing.assert_close(linear(x), conv(x))


class Block(nn.Module):
    """ConvNeXt's, in both ways of writing it."""

    def __init__(self, method: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="replicate")
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x)
        if self.method:
            y = F.layer_norm(y.permute(0, 2, 3, 1), (8,), self.norm.weight, self.norm.bias)
            return x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        y = self.norm(torch.permute(y, [0, 2, 3, 1]))
        return x + torch.permute(self.down(F.gelu(self.up(y))), (0, -1, 1, 2))


def network(method: bool) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), Block(method), Block(method), nn.Conv2d(8, 4, 1)).double().eval()


@pytest.mark.parametrize("method", [True, False])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_blocks_of_convnext_become_octave(alpha: float, method: bool) -> None:
    vanilla = network(method)
    constant = torch.randn(3, 3, 1, 1, dtype=torch.float64).expand(3, 3, 16, 16).clone()
    converted = octavize(vanilla, alpha, constant)
    torch.testing.assert_close(converted(constant), vanilla(constant))
    rows = {row.name: row for row in converted.report.rows}
    law = 1 - 0.75 * alpha * (2 - alpha)
    assert rows["2.up"].macs_before == 16 * 16 * 8 * 16 and rows["2.up"].macs_after == law * rows["2.up"].macs_before
    assert list(converted.state_dict()) == list(vanilla.state_dict())
    converted.float()(torch.randn(2, 3, 20, 18)).sum().backward()
    assert all(p.grad is not None for p in converted.parameters())


@pytest.mark.parametrize("method", [True, False])
def test_at_alpha_0_they_are_bit_for_bit_the_same(method: bool) -> None:
    vanilla, x = network(method), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert torch.equal(octavize(vanilla, 0.0, x)(x), vanilla(x))


def test_what_does_more_between_the_permutations_is_merged() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.qkv(x.permute(0, 2, 3, 1))
            return (y.softmax(2) * y).permute(0, 3, 1, 2)

    vanilla = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), Attention(), nn.Conv2d(8, 4, 1))
    converted = octavize(vanilla, 0.5, torch.randn(1, 3, 16, 16))
    assert [(note.what, note.name) for note in converted.report.notes] == [("merge", "permute in 2")]
    assert converted(torch.randn(1, 3, 16, 16)).shape == (1, 4, 16, 16)
