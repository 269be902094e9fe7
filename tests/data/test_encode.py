import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from octvideo.data.decode import open_video
from octvideo.data.encode import EncodeError, write_mp4


def film(count: int, height: int, width: int) -> Iterator[NDArray[np.uint8]]:
    """Each frame of a brightness of its own, with a brighter lower right corner."""
    for number in range(count):
        frame = np.full((height, width, 3), 10 + 5 * number, np.uint8)
        frame[height // 2 :, width // 2 :] += 60
        yield frame


@pytest.mark.parametrize("size,even", [((32, 48), (32, 48)), ((33, 47), (34, 48)), ((2, 2), (2, 2)), ((1, 1), (2, 2))])
@pytest.mark.parametrize("fps", [15.0, 30000 / 1001, 29.892186607852576])
def test_frames_come_back(tmp_path: Path, size: tuple[int, int], even: tuple[int, int], fps: float) -> None:
    path = tmp_path / "a.mp4"
    with path.open("wb") as file:
        write_mp4(file, film(20, *size), fps)
    with open_video(str(path)) as video:
        assert video.num_frames == 20 and video.fps == pytest.approx(fps, rel=1e-5)
        frames = video.frames(range(20)).numpy()
    assert frames.shape == (20, *even, 3)
    expected = np.stack(
        [np.pad(f, [(0, even[0] - size[0]), (0, even[1] - size[1]), (0, 0)], "edge") for f in film(20, *size)]
    )
    assert abs(frames.astype(int) - expected).mean() < 3


def test_one_frame_is_a_video(tmp_path: Path) -> None:
    with (tmp_path / "a.mp4").open("wb") as file:
        write_mp4(file, film(1, 16, 16), 25)
    with open_video(str(tmp_path / "a.mp4")) as video:
        assert (video.num_frames, video.fps) == (1, 25)


def test_frames_are_asked_for_one_at_a_time() -> None:
    """The encoder looks ahead, but not without end: 300 frames are not held at once."""
    alive, most = set(), 0

    class Frame(np.ndarray):
        def __del__(self) -> None:
            alive.discard(id(self))

    def frames() -> Iterator[NDArray[np.uint8]]:
        nonlocal most
        for one in film(300 // 10, 16, 16):
            frame = one.view(Frame)
            alive.add(id(frame))
            most = max(most, len(alive))
            yield frame

    write_mp4(io.BytesIO(), frames(), 25)
    assert most <= 3


def test_what_cannot_be_encoded() -> None:
    with pytest.raises(ValueError, match="no frame was given"):
        write_mp4(io.BytesIO(), iter(()), 25)
    with pytest.raises(EncodeError, match="frame 1 is 8x16, the first one 16x16"):
        write_mp4(io.BytesIO(), iter([np.zeros((16, 16, 3), np.uint8), np.zeros((16, 8, 3), np.uint8)]), 25)
    with pytest.raises(EncodeError, match="frame 0 of 40000x2 cannot be encoded"):
        write_mp4(io.BytesIO(), iter([np.zeros((2, 40000, 3), np.uint8)]), 25)
    with pytest.raises(KeyError):

        def failing() -> Iterator[NDArray[np.uint8]]:
            yield from film(3, 16, 16)
            raise KeyError("from the frames")

        write_mp4(io.BytesIO(), failing(), 25)
