import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octvideo.data.sampling import seeded_generator
from octvideo.data.transforms import (
    _beta,
    cutmix,
    mixup,
    normalize,
    random_crop,
    random_flip,
    random_resized_box,
    random_short_side,
    scale_short_side,
    scaled_size,
    to_clip,
    uniform_crops,
)


def noise(frames: int, height: int, width: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8))


def places(height: int, width: int) -> Tensor:
    """[1, H, W, 2]: every pixel holds its own row and column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns], dim=-1)[None].to(torch.uint8)


def bilinear(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Between pixel centres, edges repeated, in float64: straight from the definition."""

    def weights(old: int, new: int) -> np.ndarray:
        matrix = np.zeros((new, old))
        for target in range(new):
            source = min(max((target + 0.5) * old / new - 0.5, 0), old - 1)
            low = int(source)
            matrix[target, low] += 1 - (source - low)
            matrix[target, min(low + 1, old - 1)] += source - low
        return matrix

    return np.einsum("yh,thwc,xw->tyxc", weights(frames.shape[1], height), frames, weights(frames.shape[2], width))


@pytest.mark.parametrize(("height", "width", "short"), [(31, 47, 53), (48, 36, 29), (64, 85, 64 + 7), (33, 33, 17)])
def test_bilinear_against_the_definition(height: int, width: int, short: int) -> None:
    frames = noise(2, height, width)
    scaled = scale_short_side(frames, short)
    assert scaled.dtype == torch.uint8
    difference = np.abs(scaled.numpy() - bilinear(frames.numpy().astype(float), *scaled.shape[1:3]))
    assert difference.max() <= 1.0  # uint8 arithmetic rounds twice, once per direction
    assert difference.mean() < 0.5


def test_size_that_fits_is_left_alone() -> None:
    frames = noise(1, 24, 40)
    assert scale_short_side(frames, 24) is frames


@pytest.mark.parametrize(
    ("size", "short", "expected"),
    [
        ((256, 340), 256, (256, 340)),
        ((256, 340), 320, (320, 425)),
        ((240, 320), 256, (256, 341)),  # 341.3
        ((320, 240), 256, (341, 256)),
        ((1080, 1920), 256, (256, 455)),  # 455.1
        ((101, 101), 57, (57, 57)),
        ((3, 5), 6, (6, 10)),
        ((2, 3), 3, (3, 5)),  # 4.5, half up
    ],
)
def test_scaled_size_keeps_proportions(size: tuple[int, int], short: int, expected: tuple[int, int]) -> None:
    assert scaled_size(*size, short) == expected


def test_random_short_side_covers_both_ends_evenly() -> None:
    generator = seeded_generator(0)
    drawn = torch.tensor([random_short_side(256, 260, generator) for _ in range(2000)])
    counts = torch.bincount(drawn - 256)
    assert len(counts) == 5
    assert counts.min() > 340  # of 400 expected
    assert random_short_side(256, 256, generator) == 256


def test_random_crop_is_uniform_over_all_places() -> None:
    frames = places(7, 9)
    generator = seeded_generator(0)
    corners = torch.zeros(3, 5, dtype=torch.int64)
    for _ in range(3000):
        crop = random_crop(frames, 5, generator)
        assert crop.shape == (1, 5, 5, 2)
        top, left = crop[0, 0, 0].tolist()
        assert crop[0, -1, -1].tolist() == [top + 4, left + 4]
        corners[top, left] += 1
    assert corners.min() > 150  # of 200 expected


@pytest.mark.parametrize(
    ("size", "crop", "expected"),
    [
        ((4, 9), 4, [(0, 0), (0, 3), (0, 5)]),  # left, centre (2.5 rounded up, as PySlowFast), right
        ((9, 4), 4, [(0, 0), (3, 0), (5, 0)]),  # top, centre, bottom
        ((6, 9), 4, [(1, 0), (1, 3), (1, 5)]),
        ((5, 5), 5, [(0, 0)] * 3),
    ],
)
def test_three_crops_along_the_longer_side(size: tuple[int, int], crop: int, expected: list[tuple[int, int]]) -> None:
    crops = uniform_crops(places(*size), crop, 3)
    assert [tuple(each[0, 0, 0].tolist()) for each in crops] == expected
    assert {each.shape for each in crops} == {(1, crop, crop, 2)}
    (centre,) = uniform_crops(places(*size), crop, 1)
    assert torch.equal(centre, crops[1])


def test_crops_that_do_not_fit() -> None:
    frames = noise(1, 20, 30)
    for call in (lambda: random_crop(frames, 21, seeded_generator(0)), lambda: uniform_crops(frames, 21, 3)):
        with pytest.raises(ValueError, match="a crop of 21 does not fit into frames of 30x20; make the short side at"):
            call()
    with pytest.raises(ValueError, match="num_crops is 2; it must be 1"):
        uniform_crops(frames, 10, 2)


def test_flip_mirrors_columns_in_half_of_the_clips() -> None:
    frames = noise(2, 4, 6)
    mirrored = torch.from_numpy(frames.numpy()[:, :, ::-1].copy())
    generator = seeded_generator(0)
    flipped = 0
    for _ in range(400):
        clip = random_flip(frames, generator)
        assert torch.equal(clip, frames) or torch.equal(clip, mirrored)
        flipped += torch.equal(clip, mirrored)
    assert 160 < flipped < 240


def test_clip_is_planar_contiguous_and_owns_its_bytes() -> None:
    frames = noise(4, 8, 10)
    clip = to_clip(frames[:, 2:6, 3:7])
    assert clip.shape == (3, 4, 4, 4)
    assert clip.is_contiguous()
    assert clip.untyped_storage().nbytes() == clip.numel()
    assert np.array_equal(clip.numpy(), frames.numpy()[:, 2:6, 3:7].transpose(3, 0, 1, 2))
    alone = to_clip(frames[:1, :1, :1])  # already in order: still a copy
    assert alone.untyped_storage().nbytes() == 3


def test_random_transforms_repeat_vary_and_leave_the_global_generator_alone() -> None:
    frames = noise(1, 40, 60)

    def draw(key: int) -> list[int]:
        generator = seeded_generator(key)
        crop = random_flip(random_crop(frames, 16, generator), generator)
        return [random_short_side(256, 320, generator), int(crop.sum())]

    before = torch.get_rng_state()
    draws = [draw(key) for key in range(20)]
    assert draw(7) == draws[7]
    assert len({tuple(each) for each in draws}) == 20
    assert torch.equal(torch.get_rng_state(), before)


def test_normalize_per_channel_and_by_one_value() -> None:
    clips = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1, 1).expand(2, 3, 4, 5, 6)
    out = normalize(clips, [0.0, 0.1, 0.5], [1.0, 0.5, 0.25])
    assert (out.dtype, out.shape) == (torch.float32, (2, 3, 4, 5, 6))
    assert out[1, :, 3, 4, 5].tolist() == pytest.approx([0, 0.2, 2])
    single = normalize(clips, 0.45, 0.225)
    assert single[0, :, 0, 0, 0].tolist() == pytest.approx([-2, -0.25 / 0.225, 0.55 / 0.225], rel=1e-6)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5, 6), (2, 3, 4, 5, 6), (2, 3, 2, 2, 2, 2)])
def test_channels_are_the_second_dimension(shape: tuple[int, ...]) -> None:
    """Of batches of images [N, C, H, W] as of clips [N, C, T, H, W]."""
    clips = torch.full(shape, 51, dtype=torch.uint8)
    out = normalize(clips, [0.0, 0.1, 0.2], [1.0, 0.5, 0.25])
    assert out.shape == shape
    for channel, value in enumerate((0.2, 0.2, 0.0)):
        torch.testing.assert_close(out[:, channel], torch.full_like(out[:, channel], value), rtol=0, atol=1e-7)


def test_normalize_leaves_its_input_alone_and_checks_channels() -> None:
    clips = torch.full((1, 3, 1, 2, 2), 10.0)
    normalize(clips, 0.45, 0.225)
    assert (clips == 10).all()
    with pytest.raises(ValueError, match="mean has 2 values; give 1, or 3: one per channel"):
        normalize(clips, [0.4, 0.5], 0.225)


# ---- random boxes

RECIPE: dict[str, Any] = {"area": (0.08, 1.0), "aspect": (3 / 4, 4 / 3)}


def test_boxes_have_the_shares_ratios_and_places_asked_for() -> None:
    generator = seeded_generator(0)
    boxes = np.array([random_resized_box(4000, 4000, **RECIPE, generator=generator) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 4000
    shares, ratios = height * width / 4000**2, width / height
    assert 0.0799 < shares.min() < 0.085
    assert 0.96 < shares.max() <= 1.0001
    assert 0.7499 < ratios.min() < 0.755
    assert 1.325 < ratios.max() < 1.3335
    small = shares < 0.5  # they always fit, so here the draws are seen as they were made
    assert shares[small].mean() == pytest.approx((0.08 + 0.5) / 2, abs=0.01)
    assert np.log(ratios[small]).mean() == pytest.approx(0, abs=0.012)
    assert np.log(ratios[small]).std() == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), rel=0.04)
    for start, length in ((top, height), (left, width)):  # uniform over all places: mean 1/2, variance 1/12
        place = start[small] / (4000 - length[small])
        assert place.mean() == pytest.approx(0.5, abs=0.02)
        assert place.var() == pytest.approx(1 / 12, rel=0.05)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((10, 200), (0, 93, 10, 13)),  # 13.3 = 10 * 4/3
        ((200, 10), (93, 0, 13, 10)),
        ((1, 1000), (0, 499, 1, 1)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_images_that_no_draw_fits_give_the_largest_box_in_the_middle(
    size: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    box = random_resized_box(*size, area=(1.0, 1.0), aspect=RECIPE["aspect"], generator=seeded_generator(0))
    assert box == expected


def test_the_whole_image_where_its_ratio_is_allowed() -> None:
    """The draws ask for more than the image has, so that each of them fails."""
    box = random_resized_box(300, 330, area=(1.5, 2.0), aspect=RECIPE["aspect"], generator=seeded_generator(0))
    assert box == (0, 0, 300, 330)


def test_boxes_follow_from_the_generator_alone() -> None:
    def boxes(seed: int) -> list[tuple[int, ...]]:
        generator = seeded_generator(seed)
        return [random_resized_box(300, 400, **RECIPE, generator=generator) for _ in range(20)]

    before = torch.get_rng_state()
    assert boxes(3) == boxes(3)
    assert len(set(boxes(3) + boxes(4))) == 40
    assert torch.equal(torch.get_rng_state(), before)


# ---- mixup


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5), (6, 3, 2, 4, 5)])
def test_mixup_against_numpy(shape: tuple[int, ...]) -> None:
    clips = torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    labels = torch.tensor([4, 0, 1, 3, 2, 4])
    kept = clips.clone(), labels.clone()
    mixed, targets = mixup(clips, labels, num_classes=5, alpha=0.4, generator=seeded_generator(1))
    assert torch.equal(clips, kept[0])
    assert torch.equal(labels, kept[1])
    generator = seeded_generator(1)
    weight = _beta(0.4, generator)
    other = torch.randperm(6, generator=generator).numpy()
    x, onehot = clips.double().numpy(), np.eye(5)[labels.numpy()]
    assert 0.01 < weight < 0.99
    np.testing.assert_allclose(mixed, weight * x + (1 - weight) * x[other], rtol=0, atol=1e-6)
    np.testing.assert_allclose(targets, weight * onehot + (1 - weight) * onehot[other], rtol=0, atol=1e-6)
    assert (mixed.dtype, targets.dtype, targets.shape) == (torch.float32, torch.float32, (6, 5))


def test_mixup_follows_from_the_generator_alone_and_keeps_the_memory_format() -> None:
    clips = torch.arange(9 * 3 * 2 * 2.0).reshape(9, 3, 2, 2).contiguous(memory_format=torch.channels_last)

    def mix(seed: int) -> Tensor:
        return mixup(clips, torch.arange(9), num_classes=9, alpha=1, generator=seeded_generator(seed))[0]

    before = torch.get_rng_state()
    assert torch.equal(mix(0), mix(0))
    assert len({tuple(mix(seed).flatten().tolist()) for seed in range(20)}) == 20
    assert mix(0).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_the_weight_is_a_beta_variate(alpha: float) -> None:
    """Mean 1/2, variance 1 / (4 (2 alpha + 1)), and the fourth central moment."""
    generator = seeded_generator(0)
    weights = np.array([_beta(alpha, generator) for _ in range(8000)])
    assert 0 <= weights.min() <= weights.max() <= 1
    variance = 1 / (4 * (2 * alpha + 1))
    kurtosis = 3 - 6 / (2 * alpha + 3)
    assert weights.mean() == pytest.approx(0.5, abs=4 * math.sqrt(variance / 8000))
    assert weights.var() == pytest.approx(variance, rel=0.05)
    assert ((weights - 0.5) ** 4).mean() == pytest.approx(kurtosis * variance**2, rel=0.08)


def test_a_tiny_alpha_leaves_clips_as_they_are_and_a_huge_one_blends_evenly() -> None:
    generator = seeded_generator(0)
    tiny = np.array([_beta(1e-4, generator) for _ in range(200)])
    assert np.minimum(tiny, 1 - tiny).mean() < 0.01
    assert 0.35 < tiny.mean() < 0.65
    assert _beta(1e6, generator) == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_mixup_wants_a_positive_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha is (0.0|-1.0|nan); it must be positive \(leave mixup out"):
        mixup(torch.zeros(2, 3), torch.tensor([0, 1]), num_classes=2, alpha=alpha, generator=seeded_generator(0))


# ---- cutmix


@pytest.mark.parametrize("shape", [(6, 3, 20, 28), (6, 3, 2, 20, 28)])
def test_cutmix_against_numpy(shape: tuple[int, ...]) -> None:
    """Step by step as algorithm 1 of the paper, with the draws in their order; some boxes are cut off, some not."""
    clips = torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    labels = torch.tensor([4, 0, 1, 3, 2, 4])
    kept = clips.clone(), labels.clone()
    cut_off = 0
    for seed in range(12):
        mixed, targets = cutmix(clips, labels, num_classes=5, alpha=1.0, generator=seeded_generator(seed))
        generator = seeded_generator(seed)
        weight = _beta(1.0, generator)
        other = torch.randperm(6, generator=generator).numpy()
        y, x = (int(torch.randint(length, (), generator=generator)) for length in (20, 28))
        height, width = int(20 * np.sqrt(1 - weight)), int(28 * np.sqrt(1 - weight))
        top, bottom = np.clip([y - height // 2, y + height // 2], 0, 20)
        left, right = np.clip([x - width // 2, x + width // 2], 0, 28)
        expected = clips.numpy().copy()
        expected[..., top:bottom, left:right] = clips.numpy()[other][..., top:bottom, left:right]
        np.testing.assert_array_equal(mixed, expected)
        weight = 1 - (bottom - top) * (right - left) / (20 * 28)
        onehot = np.eye(5)[labels.numpy()]
        np.testing.assert_allclose(targets, weight * onehot + (1 - weight) * onehot[other], rtol=0, atol=1e-6)
        assert (mixed.dtype, targets.dtype, targets.shape) == (torch.float32, torch.float32, (6, 5))
        cut_off += bool(bottom - top < height - 1 or right - left < width - 1)
    assert 2 < cut_off < 12
    assert torch.equal(clips, kept[0])
    assert torch.equal(labels, kept[1])


def test_cutmix_targets_are_the_pixels_and_the_box_is_a_tube() -> None:
    """Each clip is its number, and each a class of its own: so the pixels can be counted."""
    clips = torch.arange(5.0)[:, None, None, None, None].expand(5, 3, 4, 17, 23)
    generator = seeded_generator(0)
    shares = []
    for _ in range(300):
        mixed, targets = cutmix(clips, torch.arange(5), num_classes=5, alpha=1.0, generator=generator)
        counted = torch.stack([(mixed == k).flatten(1).float().mean(1) for k in range(5)], dim=1)
        torch.testing.assert_close(targets, counted, rtol=0, atol=1e-6)
        assert torch.equal(mixed, mixed[:, :1, :1].expand_as(mixed))
        if not torch.equal(mixed, clips):
            shares.append(1 - float(targets.diagonal().min()))
    assert 0 < min(shares) < 0.02
    assert max(shares) > 0.6  # what lies outside is cut off, so large boxes are rare


def test_cutmix_follows_from_the_generator_alone_and_keeps_the_memory_format() -> None:
    clips = torch.arange(9 * 3 * 8 * 8.0).reshape(9, 3, 8, 8).contiguous(memory_format=torch.channels_last)

    def mix(seed: int) -> Tensor:
        return cutmix(clips, torch.arange(9), num_classes=9, alpha=1, generator=seeded_generator(seed))[0]

    before = torch.get_rng_state()
    assert torch.equal(mix(0), mix(0))
    assert len({tuple(mix(seed).flatten().tolist()) for seed in range(20)}) > 14  # boxes of no pixel are the same
    assert mix(0).is_contiguous(memory_format=torch.channels_last)
    assert mix(0).data_ptr() != clips.data_ptr()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_of_nothing_stays_one() -> None:
    for way in (mixup, cutmix):
        mixed, targets = way(
            torch.zeros(0, 3, 2, 8, 8),
            torch.zeros(0, dtype=torch.int64),
            num_classes=4,
            alpha=1.0,
            generator=seeded_generator(0),
        )
        assert (mixed.shape, targets.shape) == ((0, 3, 2, 8, 8), (0, 4))


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_cutmix_wants_a_positive_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha is (0.0|-1.0|nan); it must be positive \(leave cutmix out"):
        cutmix(torch.zeros(2, 3, 4, 4), torch.arange(2), num_classes=2, alpha=alpha, generator=seeded_generator(0))
