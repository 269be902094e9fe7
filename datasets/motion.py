#!/usr/bin/env python
"""The embedded data set: a few hundred short h264 clips whose class is given ONLY by the motion.

    python datasets/motion.py --out data/motion

A bright textured sprite moves over a darker textured background that drifts slowly. Eight classes, in four pairs
that are each other's time reversal: left/right, up/down, clockwise/anticlockwise, zoom_in/zoom_out.

**A single frame tells nothing.** The sprite's state is a point on a torus of four circles: place across, place
down, orientation, logarithm of the size. A scene draws its start uniformly on that torus; a class shifts one of
the four coordinates at constant speed. A shift leaves the uniform distribution as it is, so at every frame of
every class the state is uniform, and independent of textures, colours and drift. The price is that coordinates
wrap around: a sprite that leaves on the left enters on the right, and one that has grown to the largest size
fades into the smallest (a sprite of constant size that lies in the fade shows the same blend).
Each scene is shown once in each class, so remembering scenes does not help either.

**At most 50 % without the order of frames.** `render(c ^ 1, seed)` is exactly `render(c, seed)[::-1]`, and the
lists hold each clip together with this twin, under the partner's class. A model that is blind to the order of
frames sees the same set of frames twice and answers the same twice: at most one of the two answers is right.
(h264 is lossy and encodes forwards in time, and each twin is encoded on its own, so that the decoded twins differ
by a few grey levels.) A flip of the image changes classes: turn flips off when training on this data.
"""

from __future__ import annotations

if __name__ == "__main__":
    import octvideo.starting  # noqa: F401  # first: importing the others takes seconds

import argparse
import json
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from octvideo import command
from octvideo.errors import UserError
from octvideo.files import path_argument, write_atomic

Floats = NDArray[np.floating]

VERSION = 1  # of the clips that given settings make: raise it with every change that shows in them
CLASSES = ("left", "right", "up", "down", "clockwise", "anticlockwise", "zoom_in", "zoom_out")
SPLITS = ("train", "val")

PERIOD = 16  # frames for which speeds are stated: what a clip of 8 frames at stride 2 spans
# The coordinate of the state (across, down, orientation, log size) that the first class of each pair shifts, the
# sign, and the range of the shift per PERIOD in turns of the coordinate's circle. Rows count downwards and
# orientation runs from across to down, so that a positive turn looks clockwise.
SHIFTS = (
    (0, -1, (0.20, 0.45)),
    (1, -1, (0.20, 0.45)),
    (2, +1, (75 / 360, 150 / 360)),
    (3, +1, (0.50, 0.80)),
)
RADIUS = (0.22, 0.50)  # smallest and largest, in frame sides
FADE = 0.1  # the end of the size's circle, in which the largest sprite fades into the smallest
DRIFT = 0.08  # greatest shift of the background per PERIOD, in frame sides
TEXELS = 64  # side of a texture


@dataclass(frozen=True)
class Scene:
    """What a clip shows, whatever its class.

    background [S, S, 3]: RGB, 0 to 255; repeats without a seam. sprite [S, S, 4]: RGB and opacity (0 to 1).
    start [4]: the sprite's state in the middle of the clip, in turns. speed: where in the class's range, 0 to 1.
    drift [2]: of the background, across and down, in frame sides per frame.
    """

    background: Floats
    sprite: Floats
    start: Floats
    speed: float
    drift: Floats


def partner(label: int) -> int:
    """The class that a clip of class `label` shows when it is played backwards."""
    return label ^ 1


def draw_scene(seed: int | Sequence[int]) -> Scene:
    """The scene of a seed, for any class.

    The sprite is always brighter than the background, so that a moving edge has one sign: with either sign a
    network of 1 M parameters does not find the motion in minutes on two cores.
    """
    rng = np.random.default_rng(seed)
    tint = rng.standard_normal(3)
    tint -= tint.mean()
    tint *= rng.uniform(20, 50) / np.linalg.norm(tint)
    background = 80 + tint + rng.uniform(10, 25) * noise(rng, finest=4)
    colours = 165 - tint + rng.uniform(40, 55) * noise(rng, finest=3)
    sprite = np.concatenate((np.clip(colours, 0, 255), opacity(rng)), axis=-1)
    heading, speed = rng.uniform(0, 2 * math.pi), rng.uniform(0, DRIFT) / PERIOD
    return Scene(
        background=np.clip(background, 0, 255).astype(np.float32),
        sprite=sprite.astype(np.float32),
        start=rng.random(4),
        speed=rng.random(),
        drift=speed * np.array((math.cos(heading), math.sin(heading))),
    )


def noise(rng: np.random.Generator, finest: float) -> Floats:
    """Smooth periodic texture [S, S, 3], mean 0 and deviation 1: frequencies up to about `finest` cycles per side.

    Few cycles, because a texture that moves by half a cycle between two sampled frames has no visible direction.
    Most of the signal is common to the channels, because h264 halves the resolution of colour.
    """
    frequency = TEXELS * np.hypot(np.fft.fftfreq(TEXELS)[:, None], np.fft.rfftfreq(TEXELS))
    gain = np.where(frequency > 0, np.exp(-((frequency / finest) ** 2)), 0)
    white = rng.standard_normal((TEXELS, TEXELS, 1)) + 0.5 * rng.standard_normal((TEXELS, TEXELS, 3))
    texture = np.fft.irfft2(np.fft.rfft2(white, axes=(0, 1)) * gain[..., None], (TEXELS, TEXELS), axes=(0, 1))
    return texture / texture.std(axis=(0, 1))


def opacity(rng: np.random.Generator) -> Floats:
    """Opacity [S, S, 1] of an irregular blob with a soft edge, inside the circle that the square encloses."""
    axis = (np.arange(TEXELS) + 0.5) / TEXELS * 2 - 1
    y, x = axis[:, None], axis[None, :]
    angle, distance = np.arctan2(y, x), np.hypot(y, x)
    waves = [rng.uniform(0, 0.5 / k) * np.cos(k * angle + rng.uniform(0, 2 * math.pi)) for k in range(2, 5)]
    edge = np.exp(sum(waves))
    return np.clip((0.95 * edge / edge.max() - distance) / 0.06 + 0.5, 0, 1)[..., None]


def instants(frames: int) -> Floats:
    """Times of the frames, in frames, symmetric about 0: [T]."""
    return np.arange(frames) - (frames - 1) / 2


def states(scene: Scene, label: int, frames: int) -> Floats:
    """The sprite's state (across, down, orientation, log size) in each frame: [T, 4], in turns, 0 to 1."""
    coordinate, sign, (slowest, fastest) = SHIFTS[label // 2]
    shift = np.zeros(4)
    shift[coordinate] = sign * (slowest + scene.speed * (fastest - slowest)) / PERIOD
    forwards = (scene.start + instants(frames)[:, None] * shift) % 1
    return forwards[::-1] if label % 2 else forwards


def render(label: int, seed: int | Sequence[int], frames: int = 32, size: int = 80) -> NDArray[np.uint8]:
    """The clip of a class and a seed: RGB uint8 [T, H, W, 3], H = W = size.

    `render(partner(label), seed)` is its exact time reversal. ValueError where label is no class.
    """
    return film(draw_scene(seed), label, frames, size)


def film(scene: Scene, label: int, frames: int, size: int) -> NDArray[np.uint8]:
    """A scene with the motion of a class: RGB uint8 [T, H, W, 3], H = W = size."""
    if not 0 <= label < len(CLASSES):
        raise ValueError(f"label {label} is none of the {len(CLASSES)} classes: give 0 to {len(CLASSES) - 1}")
    if label % 2:
        return film(scene, partner(label), frames, size)[::-1]
    clip = np.empty((frames, size, size, 3), np.uint8)
    for frame, instant, state in zip(clip, instants(frames), states(scene, label, frames), strict=True):
        canvas = shifted(scene.background, scene.drift * instant, size)
        faded = max(0.0, (state[3] - 1) / FADE + 1)
        paint(canvas, scene.sprite, state, 1 - faded)
        if faded:
            paint(canvas, scene.sprite, state - (0, 0, 0, 1), faded)
        frame[...] = np.rint(canvas)
    return clip


def shifted(background: Floats, shift: Floats, size: int) -> Floats:
    """The background moved by shift (across, down; in sides), as a frame [H, W, 3]."""
    grid = (np.arange(size) + 0.5) / size
    return interpolate(interpolate(background, grid - shift[1], axis=0), grid - shift[0], axis=1)


def interpolate(texture: Floats, position: Floats, axis: int) -> Floats:
    """Linear interpolation of a periodic texture along an axis, at positions given in sides."""
    place = position * TEXELS - 0.5
    before = np.floor(place).astype(np.intp)
    weight = np.expand_dims((place - before).astype(np.float32), (1 - axis, 2))
    first, second = (texture.take(index % TEXELS, axis) for index in (before, before + 1))
    return first + weight * (second - first)


def paint(canvas: Floats, sprite: Floats, state: Floats, strength: float) -> None:
    """Lays the sprite over canvas [H, W, 3], in place, at its state and with its opacity times strength."""
    across, down, turn, growth = state
    radius = RADIUS[0] * (RADIUS[1] / RADIUS[0]) ** growth
    grid = (np.arange(len(canvas)) + 0.5) / len(canvas)
    # The frame is a torus to the sprite: distances are to its nearest copy.
    y, x = (((grid - centre + 0.5) % 1 - 0.5) / radius for centre in (down, across))
    rows, columns = np.flatnonzero(abs(y) < 1), np.flatnonzero(abs(x) < 1)
    y, x = y[rows, None], x[None, columns]
    cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    rgba = bilinear(sprite, cos * y - sin * x, cos * x + sin * y)
    under = canvas[rows[:, None], columns]
    canvas[rows[:, None], columns] = under + strength * rgba[..., 3:] * (rgba[..., :3] - under)


def bilinear(texture: Floats, y: Floats, x: Floats) -> Floats:
    """Samples texture [S, S, C] at y and x (-1 to 1 from edge to edge, held at the edge beyond): [..., C]."""
    rows, columns = (np.clip((v + 1) / 2 * TEXELS - 0.5, 0, TEXELS - 1.001) for v in (y, x))
    top, left = rows.astype(np.intp), columns.astype(np.intp)
    lower, right = ((v - np.floor(v)).astype(np.float32)[..., None] for v in (rows, columns))
    corner = top * TEXELS + left
    texels = texture.reshape(-1, texture.shape[-1])
    a, b, c, d = (texels.take(corner + step, axis=0) for step in (0, 1, TEXELS, TEXELS + 1))
    above, below = a + right * (b - a), c + right * (d - c)
    return above + lower * (below - above)


def write_video(path: Path | str, frames: NDArray[np.uint8], fps: int) -> None:
    """Writes RGB uint8 [T, H, W, 3] as an h264 mp4 (yuv420p, H and W even), whole or not at all.

    The bytes depend on the frames and the library versions only: the encoder has one thread.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.part")
    # A keyframe in mid-clip, so that to read a window means to seek, as in longer videos. Without cpu-independent,
    # x264's bytes change with the machine, and now and then from one call to the next.
    options = {"crf": "18", "preset": "veryfast", "g": "16", "x264-params": "cpu-independent=1"}
    with av.open(str(unfinished), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    unfinished.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all. Raises WriteError."""
    write_atomic(path, text.encode())


class SettingsError(UserError, ValueError):
    """Settings that make no data set, or not in this folder."""


@dataclass(frozen=True)
class Settings:
    """What decides every byte of the data set. train and val: clips per class; size: H and W in pixels."""

    seed: int = 0
    train: int = 48
    val: int = 16
    size: int = 80
    frames: int = 32
    fps: int = 15
    version: int = VERSION

    def check(self) -> None:
        """Raises SettingsError that names every problem."""
        least = {"seed": 0, "train": 1, "val": 1, "size": 16, "frames": 2, "fps": 1}
        problems = [
            f"{name} is {getattr(self, name)}: give {minimum} or more"
            for name, minimum in least.items()
            if getattr(self, name) < minimum
        ]
        if self.size % 2:
            problems.append(f"size is {self.size}: h264 takes even sizes only, give {self.size + 1}")
        if problems:
            raise SettingsError("; ".join(problems))


@dataclass(frozen=True)
class Pair:
    """One unit of work: a scene with the motion of a class (label even) and its twin, played backwards."""

    split: str
    index: int
    label: int

    def files(self) -> tuple[str, str]:
        """Paths of the clip and its twin, relative to the data set's folder."""
        names = CLASSES[self.label], CLASSES[partner(self.label)]
        first, second = (f"{self.split}/{name}/{name}_{self.index:04d}.mp4" for name in names)
        return first, second

    def write(self, out: Path, settings: Settings) -> int:
        """Writes those of the two files that are missing and returns their number."""
        seed = (settings.seed, SPLITS.index(self.split), self.index)
        clip = render(self.label, seed, settings.frames, settings.size)
        missing = [
            (file, twin)
            for file, twin in zip(self.files(), (clip, clip[::-1]), strict=True)
            if not (out / file).exists()
        ]
        for file, frames in missing:
            write_video(out / file, frames, settings.fps)
        return len(missing)


def claim(out: Path, record_name: str, settings: dict[str, Any], outputs: Sequence[str]) -> None:
    """Marks a folder as made with these settings; SettingsError where it holds something else.

    outputs: patterns of the files that nobody else may have made.
    """
    record = out / record_name
    if not record.exists():
        foreign = sorted(path.name for pattern in outputs for path in out.glob(pattern))
        if foreign:
            some = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
            raise SettingsError(f"{out} holds {some} but no {record_name}, so another tool made it: give another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps(settings, indent=2) + "\n")
        return
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SettingsError(f"{record} is damaged: remove the folder {out}, then run again")
    names = [name for name in {**settings, **found} if settings.get(name) != found.get(name)]
    if names:
        differences = ", ".join(f"{name} {found.get(name)}, not {settings.get(name)}" for name in names)
        remedy = "give the same settings, another --out, or remove the folder"
        raise SettingsError(f"{out} was made with {differences}: {remedy}")


def work(pairs: Sequence[Pair], out: Path, settings: Settings, workers: int) -> Iterator[int]:
    """Writes the pairs, in `workers` processes, and yields the number of files written with each."""
    if workers == 1:
        yield from (pair.write(out, settings) for pair in pairs)
        return
    # The parent alone answers ctrl-C, by cancelling what has not begun.
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            for done in as_completed([pool.submit(pair.write, out, settings) for pair in pairs]):
                yield done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def make(out: Path | str, settings: Settings = Settings(), workers: int = 2) -> int:
    """Makes the data set in folder `out`, or what is missing of it, and returns the number of clips written.

    Writes {train,val}/<class>/<class>_<scene>.mp4, then train.txt and val.txt (lines `path label`, paths relative to
    out) and labels.txt (class names in the order of their labels); motion.json keeps the settings. The twin of
    left_0007.mp4 is right_0007.mp4. SettingsError for bad settings or a folder that holds something else.
    """
    out = Path(out)
    settings.check()
    if workers < 1:
        raise SettingsError(f"workers is {workers}: give 1 or more")
    claim(out, "motion.json", asdict(settings), (*SPLITS, *map("{}.txt".format, SPLITS), "labels.txt"))
    for split in SPLITS:
        for name in CLASSES:
            (out / split / name).mkdir(parents=True, exist_ok=True)
    pairs = {
        split: [Pair(split, index, label) for label in range(0, len(CLASSES), 2) for index in range(count)]
        for split, count in zip(SPLITS, (settings.train, settings.val), strict=True)
    }
    missing = [
        pair for split in SPLITS for pair in pairs[split] if not all((out / file).exists() for file in pair.files())
    ]
    total = 2 * sum(map(len, pairs.values()))
    written = 0
    with tqdm(total=total, initial=total - 2 * len(missing), unit="clip", desc=str(out)) as progress:
        for count in work(missing, out, settings, workers):
            written += count
            progress.update(2)
    for split in SPLITS:
        lines = [
            f"{file} {label}\n"
            for pair in pairs[split]
            for file, label in zip(pair.files(), (pair.label, partner(pair.label)), strict=True)
        ]
        write_text(out / f"{split}.txt", "".join(lines))
    write_text(out / "labels.txt", "".join(f"{name}\n" for name in CLASSES))
    return written


@command.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Makes the embedded motion data set.")
    parser.add_argument("--out", type=path_argument, required=True, help="folder to make, such as data/motion")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="another seed, other clips")
    parser.add_argument("--train", type=int, default=Settings.train, help="clips per class in train.txt")
    parser.add_argument("--val", type=int, default=Settings.val, help="clips per class in val.txt")
    parser.add_argument("--size", type=int, default=Settings.size, help="height and width in pixels, even")
    parser.add_argument("--frames", type=int, default=Settings.frames, help="frames per clip")
    parser.add_argument("--fps", type=int, default=Settings.fps, help="frames per second")
    parser.add_argument("--workers", type=int, default=2, help="processes; the bytes do not depend on it")
    given = vars(parser.parse_args(arguments))
    out, workers = given.pop("out"), given.pop("workers")
    try:
        written = make(out, Settings(**given), workers)
    except SettingsError as error:
        parser.error(str(error))
    except (OSError, av.error.FFmpegError, BrokenProcessPool) as error:
        parser.error(f"cannot write the data set to {out}: {error}")
    except KeyboardInterrupt:
        print(f"\ninterrupted: run the same command again to go on with {out}", file=sys.stderr)
        return 130
    print(f"{out}: {written} clips written; lists train.txt and val.txt, classes labels.txt, prefix {out}")
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
