from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from octvideo.data import augment
from octvideo.data.augment import GREY, OPERATIONS, PER_FRAME, operate, rand_augment
from octvideo.data.sampling import seeded_generator


def noise(frames: int, height: int, width: int, low: int = 0, high: int = 256) -> Tensor:
    pixels = np.random.default_rng(0).integers(low, high, (frames, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels)


def worst(ours: Tensor, reference: np.ndarray | Tensor) -> float:
    return float(np.abs(ours.numpy().astype(float) - np.asarray(reference, dtype=float)).max())


# ---- the operations


def test_the_operations_are_the_paper_s() -> None:
    enhance = ["color", "contrast", "brightness", "sharpness"]
    geometry = ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"]
    names = ["identity", "autocontrast", "equalize", "solarize", "posterize", *enhance, *geometry]
    assert [*OPERATIONS] == names
    assert len(names) == 14


@pytest.mark.usefixtures("importable_torchvision")
@pytest.mark.parametrize(
    ("name", "call", "levels"),
    [
        ("autocontrast", lambda f, x, level: f.autocontrast(x), 1),  # both cut off fractions, of other floats
        ("equalize", lambda f, x, level: f.equalize(x), 0),
        ("solarize", lambda f, x, level: f.solarize(x, 256 - round(256 * level)), 0),
        ("posterize", lambda f, x, level: f.posterize(x, 8 - round(4 * level)), 0),
        ("brightness", lambda f, x, level: f.adjust_brightness(x, 1 + 0.9 * level), 0),
        (
            "color",
            lambda f, x, level: f.adjust_saturation(x, 1 + 0.9 * level),
            1,
        ),  # Pillow rounds the grey, torchvision cuts off
        (
            "contrast",
            lambda f, x, level: f.adjust_contrast(x, 1 + 0.9 * level),
            1,
        ),  # the same, and Pillow rounds the mean
        ("sharpness", lambda f, x, level: f.adjust_sharpness(x, 1 + 0.9 * level), 1),  # the smoothed picture in floats
    ],
)
@pytest.mark.parametrize("level", [0.1, 0.5, 0.9, 1.0])
def test_single_frames_against_torchvision(
    name: str, call: Callable[[object, Tensor, float], Tensor], levels: int, level: float
) -> None:
    functional = pytest.importorskip("torchvision.transforms._functional_tensor")
    frames = noise(1, 40, 56, 20, 231)
    for signed in (level, -level) if name in ("brightness", "color", "contrast", "sharpness") else (level,):
        reference = call(functional, frames.permute(0, 3, 1, 2), signed).permute(0, 2, 3, 1)
        assert worst(operate(frames, [(name, signed)]), reference) <= levels


def affine(frames: Tensor, matrix: list[list[float]]) -> np.ndarray:
    """Output (x, y) is input matrix @ (x, y, 1), between pixel centres; edges repeated for half a pixel, then GREY."""
    pixels = frames.numpy().astype(float)
    height, width = pixels.shape[1:3]
    y, x = np.mgrid[:height, :width] + 0.5
    source_x, source_y = np.einsum("ij,jyx->iyx", matrix, np.stack([x, y, np.ones_like(x)]))
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    low_x, low_y = np.floor(source_x - 0.5).astype(int), np.floor(source_y - 0.5).astype(int)
    part_x, part_y = (source_x - 0.5 - low_x)[None, ..., None], (source_y - 0.5 - low_y)[None, ..., None]

    def at(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return pixels[:, rows.clip(0, height - 1), columns.clip(0, width - 1)]

    upper = at(low_y, low_x) * (1 - part_x) + at(low_y, low_x + 1) * part_x
    lower = at(low_y + 1, low_x) * (1 - part_x) + at(low_y + 1, low_x + 1) * part_x
    return np.where(inside[None, ..., None], upper * (1 - part_y) + lower * part_y, GREY)


@pytest.mark.parametrize("level", [1.0, 0.37, -0.8])
def test_geometry_against_the_definition(level: float) -> None:
    """Every frame alike; off by less than a grey level, which Pillow rounds by."""
    frames = noise(3, 31, 47)
    cos, sin = np.cos(np.radians(30 * level)), np.sin(np.radians(30 * level))
    middle_x, middle_y = 47 / 2, 31 / 2
    matrices = {
        "shear_x": [[1, 0.3 * level, 0], [0, 1, 0]],
        "shear_y": [[1, 0, 0], [0.3 * level, 1, 0]],
        "rotate": [
            [cos, -sin, middle_x - cos * middle_x + sin * middle_y],
            [sin, cos, middle_y - sin * middle_x - cos * middle_y],
        ],
        "translate_x": [[1, 0, round(150 / 331 * 47 * level)], [0, 1, 0]],
        "translate_y": [[1, 0, 0], [0, 1, round(150 / 331 * 31 * level)]],
    }
    assert set(matrices) == PER_FRAME - {"sharpness"} | {"translate_x"}
    for name, matrix in matrices.items():
        difference = np.abs(operate(frames, [(name, level)]).numpy() - affine(frames, matrix)).max(axis=(0, 3))
        assert (difference > 1).sum() <= (4 if name == "rotate" else 0), name  # pixels right on the border


def test_which_way_things_move() -> None:
    frames = torch.zeros(1, 40, 40, 3, dtype=torch.uint8)
    frames[0, 20, 30] = 255  # on the right, at half height

    def place(name: str, level: float) -> list[int]:
        moved = operate(frames, [(name, level)])[0, :, :, 0].float()
        moved[moved == GREY[0]] = 0
        return [int(moved.argmax()) // 40, int(moved.argmax()) % 40]

    assert place("translate_x", 0.5) == [20, 30 - 9]
    assert place("translate_y", 0.5) == [20 - 9, 30]
    assert place("translate_y", -0.5) == [20 + 9, 30]
    assert place("shear_x", 1.0) == [20, 30 - 6]
    assert place("shear_y", -1.0) == [20 + 9, 30]
    assert place("rotate", 1.0) == [20 - 5, 29]  # to the left: what is on the right goes up
    assert {tuple(place(name, 0.9)) for name in ("identity", "posterize", "autocontrast", "sharpness")} == {(20, 30)}


# ---- one clip, not so many frames


def test_levels_follow_from_the_whole_clip_s_histogram() -> None:
    """Straight from the definitions, per channel over all frames."""
    clip = noise(3, 24, 30, 40, 200)
    clip[1] = clip[1] // 3  # one dark frame
    clip[..., 2] = clip[..., 2] // 2 + 9
    pixels = clip.numpy().astype(float)
    low, high = pixels.min(axis=(0, 1, 2)), pixels.max(axis=(0, 1, 2))
    assert worst(operate(clip, [("autocontrast", 1)]), (pixels - low) * 255 / (high - low)) <= 1
    for values, equal in zip(
        *(np.moveaxis(c.numpy(), -1, 0) for c in (clip, operate(clip, [("equalize", 1)]))), strict=True
    ):
        rank = np.searchsorted(np.sort(values.ravel()), values)  # pixels of the clip that are darker
        step = (values.size - (values == values.max()).sum()) // 255  # whole pixels per level, as the field has it
        np.testing.assert_array_equal(equal, ((step // 2 + rank) // step).clip(0, 255))
    mean = (pixels @ [0.299, 0.587, 0.114]).mean()
    for level in (1.0, -1.0):
        reference = (mean + (1 + 0.9 * level) * (pixels - mean)).clip(0, 255)
        assert worst(operate(clip, [("contrast", level)]), reference) <= 1.5


@pytest.mark.parametrize("name", [*OPERATIONS])
def test_what_stands_still_stays_still(name: str) -> None:
    """Half of the picture changes from frame to frame; what is made of the other half does not. Frame by frame it would."""
    clip = noise(4, 40, 60, 60, 180)
    clip[:, :20] = clip[0, :20]
    for frame in range(4):
        clip[frame, 20:] = clip[frame, 20:] // (frame + 1)
    same = operate(clip, [(name, 0.1)])[:, :10]
    assert torch.equal(same, same[:1].expand_as(same))
    alone = torch.cat([operate(frame[None], [(name, 0.1)]) for frame in clip])[:, :10]
    assert torch.equal(alone, same) == (name not in ("autocontrast", "equalize", "contrast"))


def test_frames_do_not_run_into_each_other() -> None:
    clip = noise(3, 20, 24)
    for name in set(OPERATIONS) - {"autocontrast", "equalize", "contrast"}:
        for level in (0.9, -0.9):
            whole = operate(clip, [(name, level)])
            for frame in range(3):
                assert torch.equal(operate(clip[frame : frame + 1], [(name, level)])[0], whole[frame]), name


def test_level_0_changes_nothing_but_where_there_is_no_level() -> None:
    clip = noise(2, 20, 24, 30, 200)
    changed = {name for name in OPERATIONS if not torch.equal(operate(clip, [(name, 0.0)]), clip)}
    assert changed == {"autocontrast", "equalize"}


def test_one_colour_is_no_problem() -> None:
    black = torch.zeros(2, 8, 9, 3, dtype=torch.uint8)
    for name in OPERATIONS:
        assert operate(black, [(name, 0.5)]).shape == (2, 8, 9, 3)
    assert torch.equal(operate(black, [("equalize", 1), ("autocontrast", 1), ("contrast", 1)]), black)


def test_operations_come_one_after_another_and_make_new_frames() -> None:
    clip = noise(2, 30, 40)[:, 3:23, 5:29].flip(2)  # not contiguous, as crops are not
    kept = clip.clone()
    steps = [("rotate", 0.4), ("equalize", 0.4), ("translate_x", -0.7)]
    once = clip
    for step in steps:
        once = operate(once, [step])
    assert torch.equal(operate(clip, steps), once)
    assert torch.equal(clip, kept)
    same = operate(clip, [])
    assert torch.equal(same, clip)
    assert (same.dtype, same.shape, same.is_contiguous()) == (torch.uint8, (2, 20, 24, 3), True)
    same.zero_()
    assert torch.equal(clip, kept)


# ---- what is drawn


def drawn(monkeypatch: pytest.MonkeyPatch, times: int, **options: float) -> list[tuple[str, float]]:
    """The operations of `times` calls, each with its level."""
    asked: list[tuple[str, float]] = []
    monkeypatch.setattr(augment, "operate", lambda frames, operations: asked.extend(operations) or frames)
    generator = seeded_generator(0)
    for _ in range(times):
        rand_augment(torch.empty(0), **{"num_ops": 2, "magnitude": 9, **options}, generator=generator)
    return asked


def test_operations_and_signs_are_equally_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = drawn(monkeypatch, 1400)
    assert len(asked) == 2800
    counts = Counter(name for name, _ in asked)
    assert len(counts) == 14
    assert 150 < min(counts.values()) <= max(counts.values()) < 250  # 200 expected, deviation 14
    assert Counter(level for _, level in asked).keys() == {0.9, -0.9}
    assert 1300 < sum(level > 0 for _, level in asked) < 1500
    assert 70 < sum(a[0] == b[0] for a, b in zip(asked[::2], asked[1::2], strict=True)) < 130  # 100: drawn with return


def test_the_magnitude_may_be_drawn_too(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = np.abs([level for _, level in drawn(monkeypatch, 1000, magnitude=7, std=0.5)]) * 10
    assert sizes.mean() == pytest.approx(7, abs=0.05)
    assert sizes.std() == pytest.approx(0.5, rel=0.08)
    cut = np.abs([level for _, level in drawn(monkeypatch, 300, magnitude=10, std=5)])
    assert cut.max() == 1.0
    assert 0.4 < (cut == 1.0).mean() < 0.6


def test_all_frames_get_the_same() -> None:
    clip = noise(1, 24, 32).expand(4, -1, -1, -1)
    generator = seeded_generator(0)
    for _ in range(60):
        out = rand_augment(clip, num_ops=3, magnitude=9, std=0.5, generator=generator)
        assert torch.equal(out, out[:1].expand_as(out))


def test_clips_repeat_vary_and_leave_the_global_generator_alone() -> None:
    clip = noise(2, 24, 32)

    def draw(key: int) -> bytes:
        out = rand_augment(clip, num_ops=2, magnitude=7, std=0.5, generator=seeded_generator(key))
        return out.numpy().tobytes()

    before = torch.get_rng_state()
    clips = [draw(key) for key in range(40)]
    assert draw(7) == clips[7]
    assert len(set(clips)) > 35  # twice identity, and the like, come out the same
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_ops": -1}, "RandAugment's number of operations is -1; it must be 0"),
        ({"magnitude": 10.5}, "RandAugment's magnitude is 10.5; it must be 0 to 10"),
        ({"magnitude": float("nan")}, "RandAugment's magnitude is nan"),
        ({"std": -0.5}, "RandAugment's deviation of the magnitude is -0.5; it must be 0"),
    ],
)
def test_numbers_outside_their_range(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rand_augment(noise(1, 8, 8), **{"num_ops": 2, "magnitude": 9, **change}, generator=seeded_generator(0))
