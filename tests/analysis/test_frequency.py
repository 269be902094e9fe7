from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from octvideo.analysis.frequency import (
    ALL,
    HIGH,
    LOW,
    LOW_OWN_GRID,
    LayerError,
    Profile,
    _Sum,
    picture,
    space_rings,
    spectra,
    stages,
    time_rings,
    white_power,
)
from octvideo.models import NETWORKS, create, with_octave
from octvideo.octave import Feature, Octave, average_pool
from tests.models.shallow import cut


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(a: np.ndarray) -> np.ndarray:
    """Energy in square rings, bin by bin."""
    height, width = a.shape
    size, power = max(height, width), abs(np.fft.fft2(a) / a.size) ** 2
    rings = np.zeros(size // 2 + 1)
    for y, fy in enumerate(np.fft.fftfreq(height)):
        for x, fx in enumerate(np.fft.fftfreq(width)):
            rings[min(round(max(abs(fy), abs(fx)) * size), size // 2)] += power[y, x]
    return rings


@pytest.mark.parametrize("size", [(16, 16), (7, 7), (5, 8), (9, 6), (2, 2), (1, 1), (28, 28)])
def test_rings_are_numpys_and_their_sum_is_the_mean_square(size: tuple[int, int]) -> None:
    maps = noise(3, *size) + 2
    rings = space_rings(maps)
    np.testing.assert_allclose(rings, [by_hand(a) for a in maps.numpy()], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(rings.sum(1), maps.square().mean((1, 2)))  # Parseval
    torch.testing.assert_close(rings[:, 0], maps.mean((1, 2)).square())


@pytest.mark.parametrize("frames", [8, 7, 4, 2, 1])
def test_rings_in_time(frames: int) -> None:
    series = noise(3, 5, frames) + 1
    rings = time_rings(series)
    torch.testing.assert_close(rings.sum(1), series.square().mean((1, 2)))
    power = (np.abs(np.fft.rfft(series.numpy()) / frames) ** 2).mean(1)
    power[:, 1 : (frames + 1) // 2] *= 2  # f and -f
    np.testing.assert_allclose(rings, power, atol=1e-15)


def test_a_cosine_lands_in_its_ring() -> None:
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    wave = 3 + 2 * torch.cos(2 * torch.pi * (5 * x + 3 * y) / 16)
    expected = torch.zeros(9, dtype=torch.float64)
    expected[0], expected[5] = 9, 2  # the square of the mean, half the square of the amplitude
    torch.testing.assert_close(space_rings(wave[None])[0], expected, rtol=1e-5, atol=1e-9)
    beat = torch.cos(2 * torch.pi * 2 * torch.arange(8.0) / 8)
    torch.testing.assert_close(
        time_rings(beat[None, None])[0], torch.tensor([0, 0, 0.5, 0, 0.0]).double(), atol=1e-9, rtol=0
    )


def profile(maps: Tensor) -> Profile:
    size = tuple(maps.shape[1:])
    summed = _Sum(size, size)
    for part in maps.split(100):
        summed.add(space_rings(part))
    return summed.profile()


@pytest.mark.parametrize("size", [16, 14, 7, 4])
def test_white_noise_is_flat(size: int) -> None:
    found = profile(noise(4000, size, size))
    assert found.energy is not None and found.density is not None
    np.testing.assert_allclose(found.density[1:], 1, atol=0.03)
    assert found.density[0] == found.energy[0] == 0 and sum(found.energy) == pytest.approx(1)
    assert found.frequency == pytest.approx([k / size for k in range(size // 2 + 1)])
    assert found.below_half == pytest.approx(found.white, abs=0.01)
    assert found.white == pytest.approx(0.25, abs=0.02)  # a quarter of all frequencies, whatever the grid
    assert found.mean == pytest.approx(1 / size**2, rel=0.2)


def test_a_blurred_map_is_low_and_a_sharpened_one_high() -> None:
    maps = noise(200, 32, 32)
    blurred = sum(maps.roll((dy, dx), (1, 2)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)) / 9
    low, high = profile(blurred).below_half, profile(maps - blurred).below_half
    gain = (1 + 2 * np.cos(2 * np.pi * np.fft.fftfreq(32))) / 3  # of the blur, in each direction
    ring = np.maximum.outer(*2 * [abs(np.fft.fftfreq(32)) * 32])
    for found, amplitude in (low, np.outer(gain, gain)), (high, 1 - np.outer(gain, gain)):
        power = np.where(ring > 0, amplitude**2, 0)
        assert found == pytest.approx((power * np.clip(8.5 - ring, 0, 1)).sum() / power.sum(), abs=0.01)
    assert low and high and low > 0.8 and high < 0.1


def test_shares_are_of_each_map_s_own_energy() -> None:
    maps = noise(300, 8, 8) + 0.5
    loud = maps * torch.logspace(-6, 6, 300, dtype=torch.float64)[:, None, None]
    assert profile(loud).energy == pytest.approx(profile(maps).energy)
    found = profile(maps)
    assert found.mean is not None and found.below_half is not None
    rings = space_rings(maps)
    shares = (rings[:, 0] + rings[:, 1] + rings[:, 2] / 2) / rings.sum(1)  # ring 2 of 8 lies across a quarter
    assert found.below_half_with_mean == pytest.approx(float(shares.mean()))


def test_even_maps_are_counted_and_left_out() -> None:
    maps = noise(10, 8, 8)
    maps[3], maps[7] = 0, 0.1
    maps[7, 2, 2] = float(torch.tensor(0.1).nextafter(torch.tensor(1.0)))  # what float32 leaves of an even map
    found = profile(maps)
    assert (found.count, found.even) == (10, 2)
    assert found.energy == profile(maps[[0, 1, 2, 4, 5, 6, 8, 9]]).energy
    assert profile(torch.ones(4, 1, 1)).energy is None and profile(torch.ones(4, 1, 1)).even == 4


@pytest.mark.parametrize("own,grid", [(8, 8), (4, 8), (4, 7), (1, 1), (1, 2)])
def test_white_noise_upsampled(own: int, grid: int) -> None:
    spread = noise(40_000, own).repeat_interleave(2 if grid > own else 1, 1)[:, :grid]
    measured = torch.fft.fft(spread, norm="forward").abs().square().mean(0)
    torch.testing.assert_close(white_power(own, grid), measured, rtol=0.05, atol=1e-12)


class Given(nn.Module):
    """A layer that gives what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x: Tensor) -> Feature:
        return self.layer(self.features(x))

    def features(self, x: Tensor) -> Feature:
        return x


class Split(Given):
    def features(self, x: Tensor) -> Feature:
        pool = (2,) * (x.dim() - 2)
        # white on its own grid: the mean of a box has a fraction of the variance
        return Octave(x[:, :2], average_pool(x[:, 2:], pool))


def test_two_frequencies_of_noise() -> None:
    found = spectra(Split().eval(), [noise(8, 4, 16, 16, seed=i) for i in range(40)], layers=["layer"])["layer"]
    assert list(found) == [HIGH, LOW, LOW_OWN_GRID]
    high, low, own = (found[group].space for group in found)
    assert found[LOW].own == (8, 8) and found[LOW].grid == (16, 16) and found[LOW_OWN_GRID].grid == (8, 8)
    assert high.density and low.density and own.density and low.energy
    np.testing.assert_allclose(high.density[1:], 1, atol=0.1)
    # As stored: all of it below half of Nyquist, so in a quarter of the area.
    np.testing.assert_allclose(own.density[1:], 4, atol=0.3)
    assert own.frequency[-1] == pytest.approx(0.25) and high.frequency[-1] == low.frequency[-1] == pytest.approx(0.5)
    # Upsampled: cos^2(pi f) in both directions, so nothing at Nyquist. White noise would be split just so.
    assert low.energy[-1] == pytest.approx(0, abs=1e-12)
    assert low.white == pytest.approx(0.662, abs=0.001) and low.below_half == pytest.approx(low.white, abs=0.01)
    assert own.mean == pytest.approx(low.mean)  # the same planes, whatever the grid
    assert found[HIGH].time is None


def test_time_pooled_too() -> None:
    found = spectra(Split().eval(), [noise(8, 4, 8, 6, 6)], layers=["layer"], per_input=100)["layer"]
    assert found[LOW_OWN_GRID].own == (4, 3, 3) and found[LOW].grid == (8, 6, 6)
    high, low, own = (found[group].time for group in (HIGH, LOW, LOW_OWN_GRID))
    assert high and low and own
    assert own.frequency == pytest.approx([0, 1 / 8, 2 / 8]) and low.frequency == pytest.approx(
        [k / 8 for k in range(5)]
    )
    assert high.count == 8 * 2 and own.count == 8 * 2  # channels
    assert found[HIGH].space.count == 8 * 2 * 8 and found[LOW].space.count == 8 * 2 * 4  # and their frames


def test_odd_sizes_and_no_high_channels() -> None:
    class Low(Given):
        def features(self, x: Tensor) -> Feature:
            return Octave(x[:, :0], average_pool(x, (2, 2)))

    found = spectra(Low().eval(), [noise(30, 4, 7, 7)], layers=["layer"])["layer"]
    assert list(found) == [LOW, LOW_OWN_GRID]
    assert found[LOW].own == (4, 4) and found[LOW].space.frequency == pytest.approx([0, 1 / 7, 2 / 7, 3 / 7])
    assert found[LOW_OWN_GRID].space.frequency == pytest.approx([0, 1 / 8, 2 / 8])
    assert found[LOW].space.below_half == pytest.approx(found[LOW].space.white, abs=0.06)


def test_as_many_maps_as_asked_for_and_no_more_inputs_than_needed() -> None:
    read = []

    def inputs() -> Iterator[Tensor]:
        for index in range(100):
            read.append(index)
            yield noise(1, 5, 4, 8, 8, seed=index)

    found = spectra(Given().eval(), inputs(), layers=["layer"], maps=50, per_input=8)["layer"][ALL]
    assert found.space.count == 50 and len(read) == 7  # 6 x 8 and 2 more
    assert found.time and found.time.count == 6 * 2 + 1  # of 4 frames each
    all_of_it = spectra(Given().eval(), [noise(2, 5, 8, 8)], layers=["layer"])["layer"][ALL]
    assert all_of_it.space.count == 2 * 5
    assert all_of_it.space.energy == pytest.approx(profile(noise(2, 5, 8, 8).flatten(0, 1)).energy)


def test_draws_follow_the_seed() -> None:
    def energy(seed: int) -> list[float] | None:
        x = [noise(2, 40, 8, 8)]
        return spectra(Given().eval(), x, layers=["layer"], maps=20, per_input=10, seed=seed)["layer"][ALL].space.energy

    assert energy(0) == energy(0) != energy(1)


@pytest.mark.parametrize(
    "name,alpha,expected,groups",
    [
        ("i3d_tiny", 0.25, ["stages.res2", "stages.res3", "stages.res4"], 3),
        ("i3d_tiny", 0.0, ["stages.res2", "stages.res3", "stages.res4", "stages.res5"], 1),
        ("resnet_tiny", 0.5, ["stages.res2", "stages.res3", "stages.res4"], 3),
    ],
)
def test_the_stages_of_networks(name: str, alpha: float, expected: list[str], groups: int) -> None:
    torch.manual_seed(0)
    model = create(with_octave(cut(NETWORKS[name](5), 1), alpha)).eval()
    size = (64, 64) if name == "resnet_tiny" else (8, 32, 32)
    found = spectra(model, [noise(1, 3, *size).float()], maps=20)
    assert list(found) == expected and all(len(of_layer) == groups for of_layer in found.values())
    assert not any(module._forward_hooks for module in model.modules())
    one = found[expected[0]]
    assert all(group.space.count == 20 and group.space.below_half is not None for group in one.values())
    assert (next(iter(one.values())).time is None) == (name == "resnet_tiny")
    assert isinstance(picture(found), Image.Image)


def test_layers_by_name() -> None:
    model = create(with_octave(NETWORKS["i3d_tiny"](5), 0.25)).eval()
    x, layers = [noise(1, 3, 8, 32, 32).float()], ["stages.res3", "stages.res5", "stages.res3"]
    found = spectra(model, x, layers=layers)
    assert {name: list(groups) for name, groups in found.items()} == {
        "stages.res3": [HIGH, LOW, LOW_OWN_GRID],
        "stages.res5": [ALL],  # of one frequency, kept since it was asked for
    }
    assert found["stages.res3"][LOW].space.count == 50  # once, though named twice
    assert found["stages.res3"][LOW].time and not found["stages.res3"][LOW_OWN_GRID].time  # it would repeat LOW's


def test_slowfast_has_stages_in_both_pathways() -> None:
    with torch.device("meta"):
        model = create(cut(NETWORKS["slowfast_4x16_r50"](5), 1))
    assert stages(model) == [f"{way}.stages.res{number}" for way in ("slow", "fast") for number in (2, 3, 4, 5)]


def test_what_follows_in_place_does_not_change_what_is_measured() -> None:
    class Rectified(Given):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).relu_()

    x = noise(1, 3, 8, 8)
    found = spectra(Rectified().eval(), [x.clone()], layers=["layer"])["layer"][ALL].space
    assert found.energy == pytest.approx(profile(x[0]).energy)


class Pair(Given):
    def features(self, x: Tensor) -> Feature:
        return (x, x)  # type: ignore[return-value]


class Flat(Given):
    def features(self, x: Tensor) -> Feature:
        return x.mean((2, 3))


@pytest.mark.parametrize(
    "model,layers,inputs,message",
    [
        (Given(), ["layr"], [noise(1, 2, 8, 8)], "no layer 'layr' in Given; did you mean 'layer'"),
        (Flat(), ["layer"], [noise(1, 2, 8, 8)], r"'layer' has no maps of 4 dimensions but \[\(1, 2\)\]"),
        (Given(), ["layer"], [noise(1, 2, 8, 8) / 0], "'layer' gives values that are not finite"),
        (Given(), ["layer"], [noise(1, 2, 8, 8), noise(1, 2, 6, 6)], r"maps of \(8, 8\) and of \(6, 6\)"),
        (nn.ModuleDict({"a": Given(), "b": Given()})["a"], ["layer", "other"], [], "no layer 'other'"),
    ],
)
def test_layers_that_cannot_be_measured(
    model: nn.Module, layers: list[str], inputs: list[Tensor], message: str
) -> None:
    with pytest.raises(LayerError, match=message):
        spectra(model.eval(), inputs, layers=layers)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_that_does_not_run_and_a_model_that_trains() -> None:
    model = Given()
    model.idle = nn.Identity()
    with pytest.raises(LayerError, match="'idle' did not run"):
        spectra(model.eval(), [noise(1, 2, 8, 8)], layers=["idle"])
    with pytest.raises(ValueError, match="training mode"):
        spectra(model.train(), [noise(1, 2, 8, 8)], layers=["layer"])
