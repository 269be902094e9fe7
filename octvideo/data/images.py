"""Images for the 2D networks: the list or folder, the reading of a file, and the way to a clip without frames."""

from __future__ import annotations

import math
import os
import struct
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from octvideo.data.augment import check_rand_augment, rand_augment
from octvideo.data.dataset import Sample, failed_sample
from octvideo.data.decode import MAX_PIXELS, DecodeError, out_of_memory, unreadable
from octvideo.data.lists import Columns, ListError, Problems, VideoList, counted, read_list, repeated
from octvideo.data.sampling import seeded_generator
from octvideo.data.transforms import random_flip, random_resized_box, scaled_size, uniform_crops
from octvideo.errors import shown
from octvideo.files import unprintable

ENDINGS = ("jpg", "jpeg", "png", "bmp", "webp", "ppm", "tif", "tiff")
# Named, because of the formats that Pillow tries by itself one (EPS) starts a program. Endings do not decide: there
# is a PNG among the .JPEG files of ImageNet.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
INTERPOLATION = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

# EXIF orientation -> what makes the picture upright; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# What Pillow raises for damaged files: besides OSError, whatever its parsers run into.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error)


def read_images(
    path: str,
    *,
    num_classes: int,
    prefix: str = "",
    separator: str = " ",
    require_all_classes: bool = False,
    check_files: bool = True,
    max_problems: int = 20,
) -> VideoList:
    """Read a list of lines `path label`, as `read_list` does, or a folder with one folder per class (ImageNet).

    Of a folder, the classes are its folders in sorted order (0, 1, ...), their images all files at any depth, sorted;
    hidden files and *.txt are skipped. `prefix`, `separator` and `check_files` are for lists only.
    Errors: ListError naming all problems at once, up to `max_problems`.
    """
    if Path(path).is_dir():
        return _read_folder(path, num_classes, require_all_classes, max_problems)
    return read_list(
        path,
        num_classes=num_classes,
        prefix=prefix,
        separator=separator,
        require_all_classes=require_all_classes,
        check_files=check_files,
        max_problems=max_problems,
    )


def _read_folder(path: str, num_classes: int, require_all_classes: bool, max_problems: int) -> VideoList:
    columns, hashes, walk, problems = Columns(), array("q"), _Walk(path), Problems(max_problems)
    try:
        folders, strays = walk.listing("")
        if len(folders) != num_classes:  # said at once: the wrong folder may be a long walk
            text = f"{len(folders)} class folders, but MODEL.NUM_CLASSES is {num_classes}"
            raise ListError(f"{path}: {text}; correct the number or the path")
        for name, _ in strays:
            problems.add(0, f"{path}/{name}", "lies in no class folder; move it into one")
        for label, folder in enumerate(folders):
            first = len(columns.labels)
            for name, file in sorted(walk.files(folder)):
                if problem := _problem(name):
                    problems.add(label, f"{path}/{name}", problem)
                    continue
                columns.add(name, label, len(columns.labels) + 1)
                hashes.append(file)
            if require_all_classes and len(columns.labels) == first:
                problems.add(label, f"{path}/{folder}", f"no image of class {label}; add some or remove the folder")
    except OSError as error:
        raise ListError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from error
    images = columns.videos(path, path, counted(walk.skipped, "hidden or *.txt file"))
    _check_repeated(images, np.array(hashes, np.int64), problems)
    problems.raise_any(f"in the folder {path}")
    if not len(images):
        raise ListError(f"{path}: no image in any class folder; check the path")
    return images


def _check_repeated(images: VideoList, hashes: np.ndarray, problems: Problems) -> None:
    """Add the files that are in the folder twice, by links."""

    def same(one: int, other: int) -> bool:
        return Path(images.path(one)).samefile(images.path(other))

    for index, earlier in repeated(hashes, same):
        text = f"is the file {shown(images.path(earlier), 300)}; remove one of them"
        problems.add(images.label(index), images.path(index), text)


def _problem(name: str) -> str:
    """What is wrong with the name of a file; "" if nothing is."""
    if problem := unprintable(name):
        return f"its name {problem}; rename it"
    if name.rpartition(".")[2].lower() not in ENDINGS:
        return f"no image by its name; move it away, or save it as one of: {', '.join(ENDINGS)}"
    return ""


class _Walk:
    """The files below a folder. skipped: how many hidden files and folders, and *.txt, were left out."""

    def __init__(self, root: str) -> None:
        self.root, self.skipped = root, 0

    def files(self, folder: str) -> Iterator[tuple[str, int]]:
        """Yield the files in a folder and below it: path from the root, and a hash of device and file number."""
        folders, files = self.listing(folder)
        yield from ((f"{folder}/{name}", file) for name, file in files)
        for name in folders:
            yield from self.files(f"{folder}/{name}")

    def listing(self, folder: str) -> tuple[list[str], list[tuple[str, int]]]:
        """Return the names of the folders, and the files with their hashes, in a folder, sorted."""
        path = f"{self.root}/{folder}"
        device = Path(path).stat().st_dev
        folders, files = [], []
        with os.scandir(path) as entries:  # it knows kind and number of a file without a look at each
            for entry in entries:
                if entry.name.startswith(".") or (entry.name.lower().endswith(".txt") and not entry.is_dir()):
                    self.skipped += 1
                elif entry.is_dir():
                    folders.append(entry.name)
                else:
                    files.append((entry.name, _hash_of(entry, device)))
        return sorted(folders), sorted(files)


def _hash_of(entry: os.DirEntry[str], device: int) -> int:
    if not entry.is_symlink():
        return hash((device, entry.inode()))
    try:
        found = entry.stat()
    except OSError:  # a link that leads nowhere: the reader says so
        return hash(entry.path)
    return hash((found.st_dev, found.st_ino))


def read_image(path: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image file as RGB of 8 bits, upright.

    Turned as its EXIF orientation says; opacity is dropped; of several frames it is the first. The file is closed.
    Errors: DecodeError for a file that is missing, damaged, of another format than FORMATS, or of more than `max_pixels`
    (or twice PIL.Image.MAX_IMAGE_PIXELS), which is not decoded. MachineError where the machine cannot read it.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                text = f"it has {image.width}x{image.height} = {image.width * image.height} pixels; at most {max_pixels} are"
                raise DecodeError(f"{path}: {text} decoded; scale it down, or raise DATA.MAX_PIXELS")
            rgb = _rgb(image)
            turn = _turn(image)
    except FileNotFoundError as error:
        raise DecodeError(f"{path}: no such file; check the list and its prefix") from error
    except UnidentifiedImageError as error:
        raise DecodeError(f"{path}: is no {', '.join(FORMATS)} image; fetch or save it again") from error
    except BOMB as error:
        reason = f"more pixels than twice PIL.Image.MAX_IMAGE_PIXELS {Image.MAX_IMAGE_PIXELS} ({error})"
        raise DecodeError(f"{path}: {reason}; scale it down") from error
    except DecodeError:  # which is one of DAMAGE
        raise
    except OSError as error:
        raise unreadable(path, error, "cannot be read", "fetch or save it again") from error
    except DAMAGE as error:
        raise DecodeError(f"{path}: cannot be read ({error}); fetch or save it again") from error
    except MemoryError:
        raise out_of_memory(path) from None
    return rgb if turn is None else rgb.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "F":
        raise ValueError("its pixels are floats, of no known range")
    if image.mode.startswith("I"):
        # The high byte of 16 bits, which is what Pillow reads of 16 bit colour. Its conversion of grey cuts off at 255.
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P":  # by way of RGBA, or Pillow warns of palettes with opacity
        image = image.convert("RGBA")
    return image.convert("RGB")


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGE:  # to the EXIF data, which says nothing against the picture
        return None


@dataclass(eq=False)
class ImageTrainDataset(Dataset[Sample]):
    """One random view of an image: `dataset[(epoch, index)]`, clips uint8 [V = 1, C, H, W].

    A random box (see transforms.random_resized_box: `crop_area` as shares of the image, `aspect` as W / H) resized to
    `crop` x `crop` with Pillow's `interpolation`, "bilinear" or "bicubic", which averages when shrinking; mirrored in
    every second view with `flip`; then `augment_ops` operations of RandAugment at `augment_magnitude` and `augment_std`
    (see augment.rand_augment). All of it follows from (seed, epoch, index) alone.
    """

    images: VideoList
    _: KW_ONLY
    crop_area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    crop: int
    flip: bool
    augment_ops: int = 0
    augment_magnitude: float = 0.0
    augment_std: float = 0.0
    interpolation: str = "bilinear"
    max_pixels: int = MAX_PIXELS
    seed: int

    def __post_init__(self) -> None:
        _check(self)
        check_rand_augment(self.augment_ops, self.augment_magnitude, self.augment_std)
        for name, limit in (("crop_area", 1.0), ("aspect", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= limit:
                bound = f" <= {limit:g}" if limit < math.inf else ""
                raise ValueError(f"{name} is {(low, high)}; give (low, high) with 0 < low <= high{bound}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        generator = seeded_generator("clip", self.seed, epoch, index)
        try:
            image = read_image(self.images.path(index), max_pixels=self.max_pixels)
        except DecodeError as error:
            return failed_sample(self.images, index, error)
        top, left, height, width = random_resized_box(
            image.height, image.width, area=self.crop_area, aspect=self.aspect, generator=generator
        )
        part = image.crop((left, top, left + width, top + height))
        frames = _frames(part.resize((self.crop, self.crop), INTERPOLATION[self.interpolation]))
        if self.flip:
            frames = random_flip(frames, generator)
        if self.augment_ops:
            frames = rand_augment(
                frames,
                num_ops=self.augment_ops,
                magnitude=self.augment_magnitude,
                std=self.augment_std,
                generator=generator,
            )
        return Sample(_views(frames), self.images.label(index), index)


@dataclass(eq=False)
class ImageEvalDataset(Dataset[Sample]):
    """The central view of an image: `dataset[index]`, clips uint8 [V = 1, C, H, W].

    The short side is resized to `short_side` with Pillow's `interpolation`, "bilinear" or "bicubic", which averages
    when shrinking; the view is the `crop` x `crop` in the middle.
    """

    images: VideoList
    _: KW_ONLY
    short_side: int
    crop: int
    interpolation: str = "bilinear"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        _check(self)
        if self.crop > self.short_side:
            text = f"crop {self.crop} does not fit into short_side {self.short_side}"
            raise ValueError(f"{text}; lower it or raise the short side")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        try:
            image = read_image(self.images.path(index), max_pixels=self.max_pixels)
        except DecodeError as error:
            return failed_sample(self.images, index, error)
        height, width = scaled_size(image.height, image.width, self.short_side)
        if height * width > self.max_pixels:  # a strip of one pixel grows most
            reason = f"{image.width}x{image.height} would grow to {width}x{height}; cut it to a usual shape"
            return failed_sample(self.images, index, DecodeError(f"{self.images.path(index)}: {reason}"))
        frames = _frames(image.resize((width, height), INTERPOLATION[self.interpolation]))
        (centre,) = uniform_crops(frames, self.crop, 1)
        return Sample(_views(centre), self.images.label(index), index)


def _frames(image: Image.Image) -> Tensor:
    """[1, H, W, C], as the functions for videos want it."""
    return torch.from_numpy(np.array(image))[None]


def _views(frames: Tensor) -> Tensor:
    """[1, H, W, C] -> contiguous [V = 1, C, H, W] that owns its memory."""
    return frames.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)


def _check(dataset: ImageTrainDataset | ImageEvalDataset) -> None:
    """What is wrong with the arguments is said before the first sample, not in a worker."""
    if dataset.interpolation not in INTERPOLATION:
        choices = ", ".join(INTERPOLATION)
        raise ValueError(f"interpolation is {dataset.interpolation!r}; choose one of: {choices}")
    for name in ("crop", "max_pixels"):
        if getattr(dataset, name) < 1:
            raise ValueError(f"{name} is {getattr(dataset, name)}; it must be at least 1")
