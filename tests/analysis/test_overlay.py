from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from octvideo.analysis import overlay
from octvideo.analysis.overlay import (
    COLOURS,
    OPAQUE,
    choose_font,
    draw_panel,
    heat_over,
    lacking,
    legible,
    shortened,
)

FONT = ImageFont.load_default(12)  # of ASCII only, and the same on every machine
WHITE = np.full((120, 200, 3), 255, np.uint8)


def lightness(rgb: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB 0 to 255 (IEC 61966-2-1)."""
    linear = np.where(rgb / 255 <= 0.04045, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    y = linear @ (0.2126, 0.7152, 0.0722)
    return np.where(y > (6 / 29) ** 3, 116 * np.cbrt(y) - 16, y * (29 / 3) ** 3)


def test_the_colours_grow_evenly_lighter() -> None:
    steps = np.diff(lightness(COLOURS))
    assert COLOURS.shape == (256, 3) and (steps > 0).all()
    assert steps[16:-16].max() < 1.6 * steps.mean() and steps[16:-16].min() > 0.6 * steps.mean()


def test_heat_is_laid_on_in_proportion() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    heat = np.zeros((2, 4, 5), np.float32)
    heat[1, 2] = (1.0, 0.5, 0.25, 2.0, -1.0)  # what lies outside 0 to 1 is held there
    hot = heat_over(frames, heat)
    np.testing.assert_array_equal(hot[heat <= 0], frames[heat <= 0])
    for column, (value, place) in enumerate([(1.0, 255), (0.5, 128), (0.25, 64), (1.0, 255)]):
        expected = frames[1, 2, column] * (1 - OPAQUE * value) + COLOURS[place] * OPAQUE * value
        np.testing.assert_allclose(hot[1, 2, column], expected, atol=0.51)
    assert hot.dtype == np.uint8 and heat_over(frames[0, 0], heat[0, 0]).shape == (5, 3)


def test_bars_are_as_long_as_the_shares() -> None:
    panel = draw_panel(WHITE, "0.00 s", [("", 1.0), ("", 0.5), ("", 0.0)], FONT)
    pad, line = 4, 17
    left, right = 2 * pad, 200 - 2 * pad
    for row, share in enumerate((1.0, 0.5, 0.0)):
        # the upper edge of the row, which no letter reaches
        edge = panel[2 * pad + line * (1 + row) + 1, left:right].astype(int)
        blue = (edge[:, 2] - edge[:, 0]) > 50
        assert blue.sum() == pytest.approx(share * (right - left), abs=2)
        assert not blue[round(share * (right - left)) + 1 :].any()
    assert (panel[:pad] == 255).all() and (panel[-30:] == 255).all() and (panel[:, :pad] == 255).all()
    assert (WHITE == 255).all()  # the frame itself is left alone


def test_the_panel_leaves_the_lower_part_free_and_has_a_row_at_least() -> None:
    rows = [(f"class {label}", 0.01) for label in range(40)]
    covered = (draw_panel(WHITE, "title", rows, FONT) != 255).any((1, 2)).nonzero()[0]
    assert 50 < covered.max() < 72
    tiny = draw_panel(WHITE[:40], "title", rows, FONT, mark="careful")
    assert (tiny != 255).any()
    narrow = WHITE[:, :95]
    assert draw_panel(narrow, "title", rows, FONT) is narrow
    more = (draw_panel(WHITE, "title", rows, FONT, most=0.9) != 255).any((1, 2)).nonzero()[0]
    assert 90 < more.max() < 108


def test_a_mark_stands_out() -> None:
    marked = draw_panel(WHITE, "title", [], FONT, mark="RANDOM")
    orange = (marked[..., 0] > 200) & (marked[..., 2] < 120)
    assert orange.sum() > 20 and not ((WHITE[..., 0] > 200) & (WHITE[..., 2] < 120)).any()


def test_names_that_are_too_long_end_in_dots() -> None:
    name = "playing squash or racquetball"
    assert shortened(name, FONT, FONT.getlength(name)) == name
    short = shortened(name, FONT, 100)
    assert short.endswith("...") and name.startswith(short[:-3]) and FONT.getlength(short) <= 100
    assert FONT.getlength(short[:-3] + name[len(short) - 3] + "...") > 90  # no shorter than need be
    assert shortened(name, FONT, 0) == "..."


def test_what_a_font_lacks_is_written_otherwise() -> None:
    assert lacking("rückwärts 日本", FONT) == ["ä", "ü", "日", "本"]
    assert legible("rückwärts 日本", FONT) == "ruckwarts ??"
    assert lacking("plain ASCII ~!", FONT) == [] and legible("plain", FONT) == "plain"


def test_the_font_that_has_the_names_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(overlay, "SYSTEM_FONTS", ("NoSuchFont.ttf",))
    own = choose_font(14, ["left"])
    assert own.size == 14 and lacking("ü", own) == ["ü"]
    monkeypatch.undo()
    try:
        ImageFont.truetype("DejaVuSans.ttf", 14)
    except OSError:
        pytest.skip("DejaVuSans.ttf is not on this machine")
    assert lacking("üщ", choose_font(14, ["rückwärts", "щёлкать"])) == []


def test_a_font_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.ttf").write_bytes(b"no font")
    for name in ("a.ttf", "none.ttf"):
        with pytest.raises(OSError):
            choose_font(12, [], str(tmp_path / name))
