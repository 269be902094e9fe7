import pytest

from octvideo.models import NETWORKS, with_octave
from octvideo.models.spec import feature_sizes


@pytest.mark.parametrize(
    "size,padding,expected",
    [
        ((8, 224, 224), 1, [(8, 56, 56), (4, 56, 56), (4, 28, 28), (4, 14, 14), (4, 7, 7)]),
        ((8, 224, 224), 0, [(8, 55, 55), (4, 55, 55), (4, 28, 28), (4, 14, 14), (4, 7, 7)]),
        ((8, 256, 320), 1, [(8, 64, 80), (4, 64, 80), (4, 32, 40), (4, 16, 20), (4, 8, 10)]),
        ((5, 161, 200), 1, [(5, 41, 50), (2, 41, 50), (2, 21, 25), (2, 11, 13), (2, 6, 7)]),
    ],
)
def test_feature_sizes(size: tuple[int, ...], padding: int, expected: list[tuple[int, ...]]) -> None:
    sizes = feature_sizes(NETWORKS["i3d_r50"](pool_padding=padding), size)
    assert list(sizes) == ["stem", "res2", "res3", "res4", "res5"]
    assert list(sizes.values()) == expected


def test_a_size_that_the_strides_do_not_admit_names_those_that_they_do() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 3\) leaves nothing at stem .* admit \(2, 5, 5\)"):
        feature_sizes(NETWORKS["i3d_r50"](pool_padding=0), (1, 3, 3))
    with pytest.raises(ValueError, match=r"leaves nothing at res2 .* admit \(2, 1, 1\)"):
        feature_sizes(NETWORKS["i3d_tiny"](), (1, 64, 64))


def test_with_octave() -> None:
    spec = NETWORKS["i3d_r50"]()
    assert [s.alpha for s in with_octave(spec, 0.125).stages] == [0.125, 0.125, 0.125, 0.0]
    assert with_octave(spec, 0.125).octave_pool == (1, 2, 2)
    assert with_octave(spec, 0.125, pool=(2, 2, 2)).octave_pool == (2, 2, 2)
    assert [s.alpha for s in with_octave(spec, 0.5, ratios=[0, 0.5, 0.25, 0]).stages] == [0, 0.5, 0.25, 0]
    assert with_octave(spec, 0.0, pool=(2, 2, 2)) == spec


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha {alpha} is out of range"):
        with_octave(NETWORKS["i3d_r50"](), alpha)


def test_ratios_of_another_length() -> None:
    with pytest.raises(ValueError, match="2 octave ratios .* for 4 stages"):
        with_octave(NETWORKS["i3d_r50"](), 0.5, ratios=[0.5, 0.5])
