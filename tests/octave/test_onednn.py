"""Reference: torch's own one-thread kernel, which computes the same."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octvideo.models import NETWORKS, create, with_octave
from octvideo.octave import Octave, OctConv2d, OctConv3d, fuse, use_onednn
from octvideo.octave.onednn import dilation_for_onednn

ITS_OWN = {"aten::slow_conv3d_forward", "aten::_slow_conv2d_forward", "aten::slow_conv_dilated3d"}


@pytest.mark.parametrize(
    ("shape", "stride", "dilation", "expected"),
    [
        ((64, 64, 1, 1, 1), (1, 1, 1), (1, 1, 1), (2, 2, 2)),
        ((64, 64, 1, 1), (1, 1), (1, 1), (2, 2)),
        ((8, 8, 3, 1, 1), (1, 1, 1), (1, 1, 1), (1, 2, 2)),
        ((32, 32, 1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)),  # too small for a call of oneDNN's
        ((64, 64, 1, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),  # torch gives these to oneDNN by itself
        ((64, 64, 3, 3), (1, 1), (1, 1), (1, 1)),
        ((64, 64, 1, 1), (2, 2), (1, 1), (1, 1)),
        ((64, 64, 3, 1, 1), (1, 1, 1), (2, 1, 1), (2, 1, 1)),
    ],
)
def test_dilated_where_torch_would_go_another_way(shape: Any, stride: Any, dilation: Any, expected: Any) -> None:
    assert dilation_for_onednn(shape, stride, dilation) == expected


LAYERS = {
    "1x1x1": lambda: nn.Conv3d(64, 48, 1),
    "3x1x1": lambda: nn.Conv3d(8, 12, (3, 1, 1), padding=(1, 0, 0), bias=False),
    "3x1x1 strided": lambda: nn.Conv3d(8, 12, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0)),
    "padded": lambda: nn.Conv3d(64, 48, 1, padding=1),
    "same": lambda: nn.Conv3d(8, 8, (3, 1, 1), padding="same"),
    "reflecting": lambda: nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0), padding_mode="reflect"),
    "groups": lambda: nn.Conv2d(128, 128, 1, groups=2),
    "1x1": lambda: nn.Conv2d(64, 48, 1),
    "octave 1x1x1": lambda: OctConv3d(96, 64, 1, alpha_in=0.25, alpha_out=0.5),
    "octave 3x1x1": lambda: OctConv3d(8, 8, (3, 1, 1), padding=(1, 0, 0), alpha_in=0.5, alpha_out=0.25),
    "octave, pooling": lambda: OctConv3d(64, 64, 1, stride=(1, 2, 2), alpha_in=0.25, alpha_out=0.25),
    "octave 1x1": lambda: OctConv2d(64, 64, 1, alpha_out=0.5),
    "one frequency, pooling": lambda: OctConv2d(64, 64, 1, stride=2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_stay(name: str) -> None:
    layer = LAYERS[name]().double()
    maps = given(layer)
    expected = results(layer, maps)
    before = layer.dilation
    use_onednn(layer)
    assert (layer.dilation != before) == (name != "3x1x1 strided")
    for got, right in zip(results(layer, maps), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


def given(layer: Any) -> list[Tensor]:
    size = (4, 6, 6)[-len(layer.kernel_size) :]
    maps = [torch.randn(2, getattr(layer, "in_high", layer.in_channels), *size, dtype=torch.float64)]
    if getattr(layer, "in_low", 0):
        maps.append(torch.randn(2, layer.in_low, *size[:-2], 3, 3, dtype=torch.float64))
    return maps


def results(layer: Any, maps: list[Tensor]) -> list[Tensor]:
    maps = [x.clone().requires_grad_() for x in maps]
    y = layer(Octave(*maps) if len(maps) == 2 else maps[0])
    parts = list(y) if isinstance(y, Octave) else [y]
    wanted = [*maps, *layer.parameters()]
    return [*parts, *torch.autograd.grad(sum(part.square().sum() for part in parts), wanted)]


def operators(step: Any) -> set[str]:
    with torch.profiler.profile() as profile:
        step()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(("name", "alpha"), [("i3d_r50", 0.0), ("i3d_r50", 0.25), ("resnet50", 0.0)])
def test_a_step_goes_by_onednn_alone(name: str, alpha: float) -> None:
    model = create(with_octave(NETWORKS[name](num_classes=4), alpha))
    clips = torch.randn(2, 3, *((2,) if "3d" in name else ()), 64, 64)
    own = {key for key in operators(lambda: model(clips).sum().backward()) if key in ITS_OWN}
    assert own, "torch goes by oneDNN by itself now: this file has had its time"
    use_onednn(model)
    after = operators(lambda: model(clips).sum().backward())
    assert "aten::mkldnn_convolution" in after and not after & ITS_OWN


def test_the_fused_form_goes_by_onednn_as_it_is() -> None:
    network = fuse(create(NETWORKS["resnet50"](num_classes=4)).eval())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert not operators(lambda: network(images)) & ITS_OWN


def test_names_and_weights_stay_and_the_fused_form_too() -> None:
    model = create(with_octave(NETWORKS["i3d_tiny"](num_classes=4), 0.25)).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    clip = torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad():
        expected = model(clip)
        use_onednn(model)
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        torch.testing.assert_close(fuse(model)(clip), expected, rtol=1e-4, atol=1e-5)
