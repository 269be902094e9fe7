import pytest
from torch import nn

from octvideo.models.factory import from_factory, takes_images


def test_a_function_is_found_by_its_name() -> None:
    network = from_factory(f"{__name__}:make", 5)
    assert isinstance(network, nn.Linear) and network.out_features == 5


def make(num_classes: int) -> nn.Module:
    return nn.Linear(2, num_classes)


def test_what_is_no_network_is_named() -> None:
    with pytest.raises(ValueError, match="octvideo.models.zoo:c2d_tiny gives a ResNetSpec, not a torch.nn.Module"):
        from_factory("octvideo.models.zoo:c2d_tiny", 5)
    with pytest.raises(ValueError, match=r"math:floor: TypeError: .*; give package.module:function, importable here"):
        from_factory("math:floor", 5)


def test_the_first_convolution_tells_images_from_clips() -> None:
    assert takes_images(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv3d(3, 4, 1)))
    assert not takes_images(nn.Sequential(nn.Conv3d(3, 4, 1), nn.Conv2d(3, 4, 1)))
    with pytest.raises(ValueError, match="has no nn.Conv2d and no nn.Conv3d"):
        takes_images(nn.Linear(2, 2))
