"""An image network inflated to video sees, in every frame of a still clip, what it saw in the image."""

import pytest
import torch
from torch import Tensor, nn

from octvideo.models import NETWORKS, create, with_octave
from octvideo.models.zoo import resnet2d
from octvideo.octave import Octave
from octvideo.weights.inflate import centre, image_shape, inflate, mean


def randomized(model: nn.Module) -> nn.Module:
    """Weights under which every layer matters; the fresh network's zero gammas would hide most of them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def features(model: nn.Module, x: Tensor) -> dict[str, Tensor | Octave]:
    """What the stem and each stage give."""
    seen = {}
    for name, module in [("stem", model.stem), *model.stages.named_children()]:
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        model(x)
    return seen


def frequencies(x: Tensor | Octave) -> tuple[Tensor, ...]:
    return tuple(x) if isinstance(x, Octave) else (x,)


@pytest.mark.parametrize("how", ["mean", "centre"])
@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("image_alpha", [0.0, 0.25])
@pytest.mark.parametrize("name", ["c2d_tiny", "i3d_tiny"])
def test_the_middle_of_a_still_clip_is_the_image(name: str, image_alpha: float, alpha: float, how: str) -> None:
    torch.manual_seed(0)
    image_net = randomized(create(with_octave(NETWORKS["resnet_tiny"](8), image_alpha)))
    video_net = create(with_octave(NETWORKS[name](8), alpha)).eval()
    own = {key: value.shape for key, value in video_net.state_dict().items()}
    weights, inflated = inflate(image_net.state_dict(), own, how)
    video_net.load_state_dict(weights)
    assert len(inflated) == 17  # every kernel; those of one frame too
    same = create(with_octave(NETWORKS["resnet_tiny"](8), alpha)).eval()  # the image network at the video's alpha
    same.load_state_dict(image_net.state_dict())
    image = torch.randn(1, 3, 64, 64)
    expected = features(same, image)
    got = features(video_net, image[:, :, None].expand(-1, -1, 32, -1, -1))
    for place, x in got.items():
        for still, moving in zip(frequencies(expected[place]), frequencies(x), strict=True):
            middle = moving.shape[2] // 2  # further from either end than the network looks: 8 frames of 32
            difference = (moving[:, :, middle] - still).abs().max() / still.abs().max()
            assert difference < 1e-5, place


def test_time_kernels() -> None:
    kernel = torch.arange(12.0).reshape(2, 3, 1, 2)
    assert mean(kernel, 3).shape == (2, 3, 3, 1, 2)
    torch.testing.assert_close(mean(kernel, 3).sum(2), kernel)
    torch.testing.assert_close(mean(kernel, 3)[:, :, 0], kernel / 3)
    assert torch.equal(centre(kernel, 5)[:, :, 2], kernel)
    assert centre(kernel, 5).abs().sum() == kernel.sum()
    assert torch.equal(mean(kernel, 1)[:, :, 0], kernel) and torch.equal(centre(kernel, 1)[:, :, 0], kernel)


def test_an_image_network_has_the_shapes_that_inflation_asks_for() -> None:
    with torch.device("meta"):
        video = create(NETWORKS["i3d_r50"](1000)).state_dict()
        image = create(resnet2d(1000, blocks=(3, 4, 6, 3))).state_dict()
    assert {name: tuple(value.shape) for name, value in image.items()} == {
        name: image_shape(value.shape) for name, value in video.items()
    }


def test_an_unknown_way() -> None:
    with pytest.raises(ValueError, match="how is 'max'; allowed: mean, centre"):
        inflate({}, {}, "max")
