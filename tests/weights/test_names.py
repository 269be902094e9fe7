"""Each layout there and back, and against the real networks whose names they are. Needs tests/peers.txt for the latter."""

import importlib.util

import pytest
import torch
from torch import Tensor

from octvideo.models import NETWORKS, create
from octvideo.weights.coverage import WeightsError
from octvideo.weights.names import LAYOUTS, from_octvideo, layout_of, to_octvideo

MISSING = [name for name in ("torchvision", "pytorchvideo") if importlib.util.find_spec(name) is None]
with_peers = pytest.mark.skipif(
    bool(MISSING), reason=f"{MISSING} not installed: pip install --no-deps -r tests/peers.txt"
)
SPEAKERS = {
    "octvideo": ("c2d_tiny", "i3d_nl_r50", "slowfast_4x16_r50"),
    "torchvision": ("c2d_tiny", "c2d_r101"),
    "pyslowfast": ("c2d_tiny", "i3d_nl_r50", "slowfast_4x16_r50", "slowfast_8x8_r101"),
    "caffe2": ("c2d_tiny", "i3d_nl_r101", "slowfast_4x16_r50", "slowfast_8x8_r101"),
    "pytorchvideo": ("c2d_tiny", "i3d_r50", "slowfast_4x16_r50"),
}
PAIRS = [(layout, network) for layout, networks in SPEAKERS.items() for network in networks]


def state_dict(network: str) -> dict[str, Tensor]:
    """Names and shapes of a network, without values."""
    with torch.device("meta"):
        return create(NETWORKS[network]()).state_dict()


def shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items()}


@pytest.mark.parametrize("layout,network", PAIRS)
def test_there_and_back(layout: str, network: str) -> None:
    ours = state_dict(network)
    theirs = from_octvideo(ours, layout)
    assert layout_of(theirs) == layout
    back, coverage = to_octvideo(theirs, shapes(ours))
    assert coverage.complete, coverage.table()
    counters = layout == "caffe2"  # which has none
    assert len(theirs) == len(back) == len(ours) - counters * sum(name.endswith("tracked") for name in ours)
    assert all(back[name] is ours[name] for name in back)


def test_values_arrive_where_they_belong() -> None:
    own = {"stem.conv.weight": (2, 3, 1, 7, 7), "stages.res2.0.projection_bn.running_var": (4,), "head.fc.bias": (5,)}
    blobs = {
        "conv1_w": torch.randn(2, 3, 1, 7, 7, generator=torch.Generator().manual_seed(0)),
        "res2_0_branch1_bn_riv": torch.arange(4.0),
        "pred_b": torch.arange(5.0).half(),
        "pred_b_momentum": torch.zeros(5),
        "lr": torch.tensor(0.1),
        "model_iter": torch.tensor(1),
        "spurious": torch.tensor(1),
    }
    weights, coverage = to_octvideo(blobs, own)
    assert coverage.unexpected == ("spurious",)
    expected = dict(zip(own, [blobs["conv1_w"], torch.arange(4.0), torch.arange(5.0)], strict=True))
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


# facts: lines of PySlowFast's logs of a conversion of SLOWFAST_8x8_R101 and of its comments in c2_model_loading.py
CAFFE2 = {
    "laterals.stem.conv.weight": ("t_pool1_subsample_w", "s1_fuse.conv_f2s.weight"),
    "laterals.stem.bn.running_mean": ("t_pool1_subsample_bn_rm", "s1_fuse.bn.running_mean"),
    "laterals.res2.conv.weight": ("t_res2_2_branch2c_bn_subsample_w", "s2_fuse.conv_f2s.weight"),
    "laterals.res4.conv.weight": ("t_res4_22_branch2c_bn_subsample_w", "s4_fuse.conv_f2s.weight"),
    "laterals.res4.bn.running_var": ("t_res4_22_branch2c_bn_subsample_bn_riv", "s4_fuse.bn.running_var"),
    "slow.stages.res4.12.bn2.running_mean": ("res4_12_branch2b_bn_rm", "s4.pathway0_res12.branch2.b_bn.running_mean"),
    "fast.stages.res4.20.bn2.bias": ("t_res4_20_branch2b_bn_b", "s4.pathway1_res20.branch2.b_bn.bias"),
    "fast.stages.res4.7.conv2.weight": ("t_res4_7_branch2b_w", "s4.pathway1_res7.branch2.b.weight"),
    "slow.stages.res4.0.projection.weight": ("res4_0_branch1_w", "s4.pathway0_res0.branch1.weight"),
    "slow.stem.bn.weight": ("res_conv1_bn_s", "s1.pathway0_stem.bn.weight"),
    "fast.stem.bn.weight": ("t_res_conv1_bn_s", "s1.pathway1_stem.bn.weight"),
    "fast.stem.conv.weight": ("t_conv1_w", "s1.pathway1_stem.conv.weight"),
    "head.fc.weight": ("pred_w", "head.projection.weight"),
}


@pytest.mark.parametrize("index,layout", [(0, "caffe2"), (1, "pyslowfast")])
def test_slowfast_names_of_the_model_zoo(index: int, layout: str) -> None:
    ours = state_dict("slowfast_8x8_r101")
    names = {id(value): name for name, value in from_octvideo(ours, layout).items()}
    assert {name: names[id(ours[name])] for name in CAFFE2} == {name: theirs[index] for name, theirs in CAFFE2.items()}


@pytest.mark.parametrize(
    "layout,expected",
    [
        ("caffe2", {"theta.weight": "nonlocal_conv3_1_theta_w", "bn.weight": "nonlocal_conv3_1_bn_s"}),
        (
            "pyslowfast",
            {"theta.weight": "s3.pathway0_nonlocal1.conv_theta.weight", "bn.weight": "s3.pathway0_nonlocal1.bn.weight"},
        ),
    ],
)
def test_nonlocal_names(layout: str, expected: dict[str, str]) -> None:
    ours = {f"stages.res3.nonlocal1.{value}": torch.zeros(1) for value in expected}
    assert list(from_octvideo(ours, layout)) == list(expected.values())


def test_a_layer_without_a_name_in_the_layout() -> None:
    with pytest.raises(WeightsError, match=r"layout torchvision has no name for 60 of 385.*stages.res3.nonlocal1"):
        from_octvideo(state_dict("i3d_nl_r50"), "torchvision")
    with pytest.raises(WeightsError, match="layout torchvision has no name for"):
        from_octvideo({"stages.res1.0.conv1.weight": torch.zeros(1)}, "torchvision")


def test_unknown_layouts() -> None:
    with pytest.raises(WeightsError, match=r"unknown layout \(features.0.weight, .*known are octvideo, torchvision"):
        layout_of(["features.0.weight"])
    with pytest.raises(WeightsError, match="no entries"):
        layout_of([])
    with pytest.raises(WeightsError, match="layout is 'keras'; known are"):
        from_octvideo({}, "keras")


def test_a_network_of_another_depth() -> None:
    coverage = to_octvideo(from_octvideo(state_dict("c2d_r101"), "torchvision"), shapes(state_dict("c2d_r50")))[1]
    assert not coverage.missing and not coverage.mismatched
    assert len(coverage.unexpected) == 17 * 15
    assert "layer3.6.conv1.weight" in coverage.unexpected


def test_the_visible_layouts() -> None:
    assert set(LAYOUTS) == set(SPEAKERS)


@with_peers
@pytest.mark.usefixtures("importable_torchvision")
def test_torchvisions_resnet50() -> None:
    from torchvision.models import resnet50

    with torch.device("meta"):
        theirs = resnet50(num_classes=400).state_dict()
    assert theirs.keys() == from_octvideo(state_dict("c2d_r50"), "torchvision").keys()


@with_peers
@pytest.mark.usefixtures("importable_torchvision")
@pytest.mark.parametrize(
    "network,stem,pool_block", [("c2d_r50", 1, True), ("i3d_r50", 5, True), ("slow_r50", 1, False)]
)
def test_pytorchvideos_resnets(network: str, stem: int, pool_block: bool) -> None:
    from pytorchvideo.models.resnet import create_resnet

    temporal = {
        "c2d_r50": ((1, 1, 1),) * 4,
        "i3d_r50": (
            ((3, 1, 1),),
            ((3, 1, 1), (1, 1, 1)),
            ((3, 1, 1), (1, 1, 1)),
            ((1, 1, 1), (3, 1, 1)),
        ),
        "slow_r50": ((1, 1, 1), (1, 1, 1), (3, 1, 1), (3, 1, 1)),
    }
    with torch.device("meta"):
        theirs = create_resnet(
            stem_conv_kernel_size=(stem, 7, 7),
            stage_conv_a_kernel_size=temporal[network],
            stage1_pool=torch.nn.MaxPool3d if pool_block else None,
        ).state_dict()
    check_pytorchvideo(network, theirs, 320, pool_block)


@with_peers
@pytest.mark.usefixtures("importable_torchvision")
def test_pytorchvideos_slowfast() -> None:
    from pytorchvideo.models.slowfast import create_slowfast

    with torch.device("meta"):
        theirs = create_slowfast(
            slowfast_fusion_conv_kernel_size=(5, 1, 1), slowfast_fusion_conv_stride=(8, 1, 1)
        ).state_dict()
    check_pytorchvideo("slowfast_4x16_r50", theirs, 662, pool_block=False)


def check_pytorchvideo(network: str, theirs: dict[str, Tensor], tensors: int, pool_block: bool) -> None:
    ours = state_dict(network)
    exported = from_octvideo(ours, "pytorchvideo", pool_block=pool_block)
    assert len(exported) == tensors
    assert shapes(exported) == shapes(theirs)
    imported, coverage = to_octvideo(theirs, shapes(ours))
    assert coverage.complete, coverage.table()
    assert len(imported) == tensors
