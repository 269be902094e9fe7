import pytest
import torch
from torch import nn

from octvideo.analysis.complexity import complexity
from octvideo.models import NETWORKS, ResNet, with_octave


@pytest.mark.parametrize(
    "name,alpha,pool,printed",
    [
        # paper, Table 8: multiply-adds in G at 8 x 224 x 224
        ("c2d_r50", 0.0, (1, 2, 2), 19.3),
        ("c2d_r50", 0.1, (1, 2, 2), 17.4),
        ("i3d_r50", 0.0, (1, 2, 2), 28.1),
        ("i3d_r50", 0.1, (1, 2, 2), 25.6),
        ("i3d_r50", 0.2, (2, 2, 2), 22.1),
        ("i3d_r50", 0.5, (2, 2, 2), 15.3),
    ],
)
def test_the_paper_s_video_rows(name: str, alpha: float, pool: tuple[int, ...], printed: float) -> None:
    with torch.device("meta"):
        net = ResNet(with_octave(NETWORKS[name](400, pool_padding=0), alpha, pool=pool))
    cost = complexity(net, (3, 8, 224, 224))
    assert cost.macs / 1e9 == pytest.approx(printed, abs=0.1)
    assert cost.params / 1e6 == pytest.approx({"c2d_r50": 24.33, "i3d_r50": 28.04}[name], abs=0.005)


@pytest.mark.parametrize("name,counted", [("c2d_r50", 19.49), ("i3d_r50", 28.41)])
def test_the_padded_pool_counts_as_in_pytorchvideo(name: str, counted: float) -> None:
    with torch.device("meta"):
        net = ResNet(NETWORKS[name](400))
    assert complexity(net, (3, 8, 224, 224)).macs / 1e9 == pytest.approx(counted, abs=0.005)


def test_a_count_by_hand_and_the_model_left_alone() -> None:
    net = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 2 * 5 * 5, 7)).train()
    cost = complexity(net, (3, 2, 5, 5))
    assert cost.macs == 3 * 4 * 27 * 2 * 25 + 200 * 7
    assert cost.params == 3 * 4 * 27 + 4 + 200 * 7 + 7
    assert net.training and all(p.device.type == "cpu" for p in net.parameters())
