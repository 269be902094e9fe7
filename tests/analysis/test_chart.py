import numpy as np
import pytest
from numpy.typing import NDArray

from octvideo.analysis.chart import BOTTOM, HEIGHT, LEFT, LEGEND, RIGHT, TOP, WIDTH, Line, Panel, _values, draw

RED, BLUE = "#ff0000", "#0000ff"


def panel(*lines: Line) -> Panel:
    return Panel("title", "across", lines, end=0.5, upright=0.25, level=1.0)


def places(picture: NDArray[np.uint8], channel: int) -> NDArray[np.int64]:
    """(row, column) of pixels of one pure colour."""
    others = [other for other in range(3) if other != channel]
    return np.argwhere((picture[..., channel] > 200) & (picture[..., others] < 40).all(axis=-1))


def test_a_line_lies_where_its_values_are() -> None:
    lines = Line("falling", RED, [(0.0, 10.0), (0.5, 0.1)]), Line("even", BLUE, [(0.1, 1.0), (0.4, 1.0)])
    picture = np.asarray(draw([[panel(*lines)]], "note"))
    assert picture.shape == (HEIGHT + 2 * LEGEND, WIDTH, 3)
    red = places(picture[:HEIGHT], 0)
    assert abs(red.min(axis=0) - [TOP, LEFT]).max() <= 2 and abs(red.max(axis=0) - [BOTTOM, RIGHT]).max() <= 2
    slope = (red[:, 0] - TOP) / (BOTTOM - TOP) - (red[:, 1] - LEFT) / (RIGHT - LEFT)
    assert abs(slope).max() < 0.03
    blue = places(picture[:HEIGHT], 2)
    assert abs(blue[:, 0] - (TOP + BOTTOM) / 2).max() <= 3  # 1 is the middle of 0.1 to 10
    assert abs(blue[:, 1].min() - (LEFT + 0.2 * (RIGHT - LEFT))) <= 3
    assert len(places(picture[HEIGHT:], 0)) and len(places(picture[HEIGHT:], 2))  # the legend


def test_dashes_and_single_points() -> None:
    def drawn(line: Line) -> int:
        return len(places(np.asarray(draw([[panel(line)]], ""))[:HEIGHT], 0))

    ends = [(0.0, 2.0), (0.5, 2.0)]
    assert 0.3 < drawn(Line("a", RED, ends, dashed=True)) / drawn(Line("a", RED, ends)) < 0.7
    assert 5 < drawn(Line("a", RED, [(0.25, 2.0)])) < 30


@pytest.mark.parametrize(
    "values,expected",
    [
        ([15, 0.11], [0.1, 0.2, 0.5, 1, 2, 5, 10, 20]),
        ([1], [1, 2]),
        ([0.6, 1.2], [0.5, 1, 2]),
        ([500, 0.02], [0.01, 0.1, 1, 10, 100, 1000]),
        ([10, 0, 1e-33], [1, 2, 5, 10]),  # no value to draw
    ],
)
def test_the_axis_is_of_round_numbers(values: list[float], expected: list[float]) -> None:
    found = _values(panel(Line("a", RED, [(0.1, value) for value in values])))
    assert found == pytest.approx(expected)


def test_what_is_too_low_is_not_drawn() -> None:
    picture = np.asarray(draw([[panel(Line("a", RED, [(0.1, 10.0), (0.2, 1.0), (0.5, 1e-33)]))]], ""))
    assert places(picture[:HEIGHT], 0)[:, 1].max() <= LEFT + 0.4 * (RIGHT - LEFT) + 3


def test_panels_lie_side_by_side_and_the_legend_has_room() -> None:
    one = panel(Line("a", RED, [(0.1, 1.0)]))
    assert draw([[one, one, one], [one, one, one]], "").size == (3 * WIDTH, 2 * HEIGHT + 2 * LEGEND)
    assert draw([[one]], "a note longer than a panel is wide, so that the picture is wider").width > WIDTH
    assert draw([[panel()]], "").size == (WIDTH, HEIGHT + 2 * LEGEND)  # nothing to draw
