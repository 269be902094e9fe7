#!/usr/bin/env python
"""The embedded image set: small PNG stills with the sprites of motion.py, in ImageNet's folders.

    python datasets/stills.py --out data/stills

Eight classes: the quarter of the frame that the sprite is in, and whether it is small or large. Its place in the
quarter, orientation, shape, texture and colours are random, and so is the background; no sprite leaves its quarter.
Each scene is shown once in each class, so remembering scenes does not help. A flip of the image changes classes, and
so does a crop to a small part of it: turn flips off and keep crops large for it (DATA.FLIP, DATA.TRAIN_AREA).
"""

from __future__ import annotations

if __name__ == "__main__":
    import octvideo.starting  # noqa: F401  # first: importing the others takes seconds

import argparse
import math
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from octvideo import command
from octvideo.files import path_argument

if TYPE_CHECKING or __package__:
    from datasets import motion
else:  # run as a script, which has this folder on its path
    import motion

VERSION = 1  # of the stills that given settings make: raise it with every change that shows in them
DOWN = {"top": 0.25, "bottom": 0.75}  # the middle of the quarter, in frame sides
ACROSS = {"left": 0.25, "right": 0.75}
RADIUS = {"small": (0.10, 0.12), "large": (0.20, 0.24)}  # in frame sides
# Sorted, so that a reader of the folders counts the classes as the list does.
CLASSES = tuple(sorted(f"{down}_{across}_{size}" for down in DOWN for across in ACROSS for size in RADIUS))


@dataclass(frozen=True)
class Settings:
    """What decides every byte of the data set. train and val: stills per class; size: H and W in pixels."""

    seed: int = 0
    train: int = 64
    val: int = 16
    size: int = 80
    version: int = VERSION

    def check(self) -> None:
        """Raises SettingsError that names every problem."""
        least = {"seed": 0, "train": 1, "val": 1, "size": 16}
        problems = [f"{k} is {getattr(self, k)}: give {v} or more" for k, v in least.items() if getattr(self, k) < v]
        if problems:
            raise motion.SettingsError("; ".join(problems))


def render(label: int, seed: int | Sequence[int], size: int = 80) -> NDArray[np.uint8]:
    """The still of a class and a seed: RGB uint8 [H, W, 3], H = W = size."""
    scene = motion.draw_scene(seed)
    down, across, extent = CLASSES[label].split("_")
    smallest, largest = RADIUS[extent]
    radius = smallest + scene.start[3] * (largest - smallest)
    x, y = np.array((ACROSS[across], DOWN[down])) + (2 * scene.start[:2] - 1) * (0.25 - radius)
    growth = math.log(radius / motion.RADIUS[0]) / math.log(motion.RADIUS[1] / motion.RADIUS[0])
    canvas = motion.shifted(scene.background, np.zeros(2), size)
    motion.paint(canvas, scene.sprite, np.array((x, y, scene.start[2], growth)), strength=1)
    return np.rint(canvas).astype(np.uint8)


@dataclass(frozen=True)
class Still:
    """One unit of work, as motion.work asks of it."""

    split: str
    index: int
    label: int

    def file(self) -> str:
        """Path relative to the data set's folder."""
        name = CLASSES[self.label]
        return f"{self.split}/{name}/{name}_{self.index:04d}.png"

    def write(self, out: Path, settings: Settings) -> int:
        """Writes the file, whole or not at all, and returns 1."""
        path = out / self.file()
        unfinished = path.with_name(f".{path.name}.part")
        seed = (settings.seed, motion.SPLITS.index(self.split), self.index)
        Image.fromarray(render(self.label, seed, settings.size)).save(unfinished, "PNG")
        unfinished.replace(path)
        return 1


def make(out: Path | str, settings: Settings = Settings(), workers: int = 2) -> int:
    """Makes the data set in folder `out`, or what is missing of it, and returns the number of stills written.

    Writes {train,val}/<class>/<class>_<scene>.png, then val.txt (lines `path label`, paths relative to out) and
    labels.txt (class names in the order of their labels); stills.json keeps the settings. SettingsError for bad
    settings or a folder that holds something else.
    """
    out = Path(out)
    settings.check()
    if workers < 1:
        raise motion.SettingsError(f"workers is {workers}: give 1 or more")
    motion.claim(out, "stills.json", asdict(settings), (*motion.SPLITS, "val.txt", "labels.txt"))
    counts = zip(motion.SPLITS, (settings.train, settings.val), strict=True)
    stills = [
        Still(split, index, label) for split, count in counts for label in range(len(CLASSES)) for index in range(count)
    ]
    for folder in {(out / still.file()).parent for still in stills}:
        folder.mkdir(parents=True, exist_ok=True)
    missing = [still for still in stills if not (out / still.file()).exists()]
    work = motion.work(missing, out, settings, workers)  # type: ignore[arg-type]  # it only calls their `write`
    written = sum(tqdm(work, total=len(stills), initial=len(stills) - len(missing), unit="still", desc=str(out)))
    val = [f"{still.file()} {still.label}\n" for still in stills if still.split == "val"]
    motion.write_text(out / "val.txt", "".join(val))
    motion.write_text(out / "labels.txt", "".join(f"{name}\n" for name in CLASSES))
    return written


@command.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Makes the embedded image set.")
    parser.add_argument("--out", type=path_argument, required=True, help="folder to make, such as data/stills")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="another seed, other stills")
    parser.add_argument("--train", type=int, default=Settings.train, help="stills per class in train/")
    parser.add_argument("--val", type=int, default=Settings.val, help="stills per class in val/")
    parser.add_argument("--size", type=int, default=Settings.size, help="height and width in pixels")
    parser.add_argument("--workers", type=int, default=2, help="processes; the bytes do not depend on it")
    given = vars(parser.parse_args(arguments))
    out, workers = given.pop("out"), given.pop("workers")
    try:
        written = make(out, Settings(**given), workers)
    except motion.SettingsError as error:
        parser.error(str(error))
    except (OSError, BrokenProcessPool) as error:
        parser.error(f"cannot write the data set to {out}: {error}")
    except KeyboardInterrupt:
        print(f"\ninterrupted: run the same command again to go on with {out}", file=sys.stderr)
        return 130
    print(f"{out}: {written} stills written; folders train and val, list val.txt, classes labels.txt, prefix {out}")
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
