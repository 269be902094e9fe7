import errno
import io
import os
import pickle
import tracemalloc
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from octvideo.data import images as images_module
from octvideo.data.augment import rand_augment
from octvideo.data.dataset import Batch
from octvideo.data.decode import DecodeError, MachineError
from octvideo.data.images import ImageEvalDataset, ImageTrainDataset, read_image, read_images
from octvideo.data.lists import ListError, VideoList
from octvideo.data.loader import EvalBatches, Loader, TrainBatches
from octvideo.data.sampling import seeded_generator
from octvideo.data.transforms import random_resized_box

TRAIN: dict[str, Any] = {"crop": 16, "flip": True, "seed": 0}
EVAL: dict[str, Any] = {"short_side": 24, "crop": 16}


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> Tensor:
    """[C, H, W]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def listed(folder: Path, *names: str) -> VideoList:
    (folder / "list.txt").write_text("".join(f"{folder}/{name} {label}\n" for label, name in enumerate(names)))
    return read_images(str(folder / "list.txt"), num_classes=len(names), check_files=False)


def saved(path: Path, image: Image.Image, **options: Any) -> VideoList:
    image.save(path, **options)
    return listed(path.parent, path.name)


# ---- the folder and the list


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "train"
    files = ["n02/b.JPEG", "n02/a.jpg", "n01/z.png", "n01/deep/er/y.Tiff", "n01/x.webp", "n10/ü 1.bmp"]
    ignored = ["labels.txt", ".DS_Store", "n01/NOTES.TXT", "n01/.x.jpg.part", ".cache/x.jpg", "n02/.git/HEAD"]
    for name in (*files, *ignored):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_folders_are_classes_in_sorted_order(folder: Path) -> None:
    images = read_images(str(folder), num_classes=3, require_all_classes=True)
    names = ["n01/deep/er/y.Tiff", "n01/x.webp", "n01/z.png", "n02/a.jpg", "n02/b.JPEG", "n10/ü 1.bmp"]
    assert [images.name(i) for i in range(len(images))] == names
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert images.path(3) == f"{folder}/n02/a.jpg"
    assert images.place(3) == f"{folder}:4"
    assert images.left_out == "6 hidden or *.txt files"
    assert (images.ends.dtype, images.labels.dtype, images.lines.dtype) == (np.int64, np.int64, np.int32)


def test_another_number_of_classes_names_both(folder: Path) -> None:
    with pytest.raises(ListError, match="3 class folders, but MODEL.NUM_CLASSES is 1000; correct the number or the"):
        read_images(str(folder), num_classes=1000)


def test_all_problems_of_a_folder_at_once(folder: Path) -> None:
    (folder / "empty").mkdir()
    for name in ("stray.jpg", "n01/clip.mp4", "n01/jpg", "n02/archive.tar.gz"):
        (folder / name).touch()
    with pytest.raises(ListError) as caught:
        read_images(str(folder), num_classes=4, require_all_classes=True)
    reason = "no image by its name; move it away, or save it as one of: jpg, jpeg, png, bmp, webp, ppm, tif, tiff"
    assert str(caught.value).splitlines() == [
        f"5 problem(s) in the folder {folder}",
        f"{folder}/stray.jpg: lies in no class folder; move it into one",
        f"{folder}/empty: no image of class 0; add some or remove the folder",
        f"{folder}/n01/clip.mp4: {reason}",
        f"{folder}/n01/jpg: {reason}",
        f"{folder}/n02/archive.tar.gz: {reason}",
    ]
    with pytest.raises(ListError) as cut:
        read_images(str(folder), num_classes=4, max_problems=2)
    assert len(str(cut.value).splitlines()) == 4
    assert str(cut.value).endswith("... and 2 more")


def test_an_empty_class_is_allowed_where_not_all_are_required(folder: Path) -> None:
    (folder / "empty").mkdir()
    assert read_images(str(folder), num_classes=4).labels.min() == 1


def test_folders_without_images(tmp_path: Path) -> None:
    (tmp_path / "n01").mkdir()
    with pytest.raises(ListError, match="no image in any class folder; check the path"):
        read_images(str(tmp_path), num_classes=1)


def test_names_that_are_no_text(folder: Path) -> None:
    try:
        Path(bytes(folder / "n01").decode() + "/\udcff.jpg").touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(ListError, match=r"n01/\\udcff.jpg: its name contains the undecodable character '\\udcff'"):
        read_images(str(folder), num_classes=3)


def test_links_that_go_in_circles_end_in_an_error(folder: Path) -> None:
    (folder / "n01" / "again").symlink_to(folder / "n01")
    with pytest.raises(ListError, match="cannot be read"):
        read_images(str(folder), num_classes=3)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_file_that_is_in_two_classes_by_a_link(folder: Path, link: Callable[[Path, Path], None]) -> None:
    link(folder / "n02" / "a.jpg", folder / "n10" / "other.jpg")
    with pytest.raises(ListError, match=r"1 problem.*\n.*/n10/other.jpg: is the file '.*/n02/a.jpg'; remove one"):
        read_images(str(folder), num_classes=3)


def test_images_whose_names_would_end_a_line(folder: Path) -> None:
    (folder / "n01" / "a\nb.jpg").touch()
    with pytest.raises(ListError, match=r"/n01/a\\nb.jpg: its name contains the control character '\\n'"):
        read_images(str(folder), num_classes=3)


def test_a_file_is_a_list(tmp_path: Path) -> None:
    path = tmp_path / "val.txt"
    path.write_text("ILSVRC2012_val_00000001.JPEG 65\nILSVRC2012_val_00000002.JPEG 970\n")
    images = read_images(str(path), num_classes=1000, prefix="/data/val", check_files=False)
    assert images.path(1) == "/data/val/ILSVRC2012_val_00000002.JPEG"
    assert images.labels.tolist() == [65, 970]
    with pytest.raises(ListError, match="no file '/data/val/ILSVRC2012_val_00000001.JPEG'"):
        read_images(str(path), num_classes=1000, prefix="/data/val")
    with pytest.raises(ListError, match="the list names 2 classes: no video for 0, 1"):
        read_images(str(path), num_classes=1000, check_files=False, require_all_classes=True)
    with pytest.raises(ListError, match="gone: the list cannot be read"):
        read_images(str(tmp_path / "gone"), num_classes=1000)


def test_a_large_folder_is_compact(tmp_path: Path) -> None:
    """20 bytes an image and the text of its name."""
    for label in range(4):
        (tmp_path / f"n{label}").mkdir()
        for index in range(500):
            (tmp_path / f"n{label}" / f"{index:04d}.JPEG").touch()
    read_images(str(tmp_path), num_classes=4)  # Python keeps the tuples of the first call for others
    tracemalloc.start()
    images = read_images(str(tmp_path), num_classes=4)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len({images.name(i) for i in range(2000)}) == len(images) == 2000
    assert kept < 2000 * (20 + 12) + 8000


# ---- reading


@pytest.mark.parametrize("ending", ["jpg", "tif", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int, ending: str, tmp_path: Path) -> None:
    """Stored rows and columns 0 are what the EXIF standard says, Orientation (0x0112): (row, column) for 1 to 8."""
    sides = ["top left", "top right", "bottom right", "bottom left", "left top", "right top", "right bottom"]
    row, column = [*sides, "left bottom"][orientation - 1].split()
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = upright if row in ("top", "bottom") else upright.transpose(1, 0, 2)
    if row in ("bottom", "right"):
        stored = stored[::-1]
    if column in ("bottom", "right"):
        stored = stored[:, ::-1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(ending, {})
    Image.fromarray(stored).save(tmp_path / f"a.{ending}", exif=exif, **options)
    image = read_image(f"{tmp_path}/a.{ending}")
    assert image.size == (48, 32)
    assert np.abs(np.array(image).astype(int) - upright).max() < 12


def test_damaged_exif_data_do_not_condemn_the_picture(tmp_path: Path) -> None:
    image = noise(8, 8)
    image.save(tmp_path / "a.png", exif=b"Exif\0\0no such thing")
    assert np.array_equal(np.array(read_image(f"{tmp_path}/a.png")), np.array(image))


def test_pixels_of_every_mode_become_rgb(tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        red.convert(mode).save(tmp_path / f"{mode}.png")
    red.convert("P").save(tmp_path / "transparent.png", transparency=bytes([0, 128]))
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    red.convert("P").save(tmp_path / "gif.jpg", format="GIF")  # endings do not decide
    for path in tmp_path.iterdir():
        image = read_image(str(path))
        assert image.mode == "RGB"
        grey = path.stem in ("1", "L", "LA")
        colours = np.array(image).reshape(-1, 3)
        if grey:
            assert (colours[:, 0] == colours[:, 1]).all()
        else:
            assert np.abs(colours - np.array([255, 0, 0])).max() < 6, path


def test_sixteen_bits_become_their_high_bytes(tmp_path: Path) -> None:
    levels = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    Image.fromarray(levels).save(tmp_path / "a.tif")
    (tmp_path / "a.ppm").write_bytes(b"P5 8 8 65535\n" + levels.astype(">u2").tobytes())
    for path in sorted(tmp_path.iterdir()):
        assert np.array_equal(np.array(read_image(str(path)))[..., 1], levels >> 8), path
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DecodeError, match=r"float.tif: cannot be read \(its pixels are floats, of no known range\);"):
        read_image(f"{tmp_path}/float.tif")


def jpeg() -> bytes:
    data = io.BytesIO()
    noise(40, 60).save(data, "JPEG")
    return data.getvalue()


def png_with_a_wrong_checksum() -> bytes:
    data = io.BytesIO()
    noise(40, 60).save(data, "PNG")
    whole = bytearray(data.getvalue())
    whole[len(whole) // 2] ^= 255
    return bytes(whole)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JPEG, PNG, BMP, WEBP, PPM, TIFF, GIF image; fetch or save it again"),
        (b"just a text\n", "is no JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is no JPEG"),
        (
            jpeg()[:1500],
            r"cannot be read \(image file is truncated \(\d+ bytes not processed\)\); fetch or save it again",
        ),
        (png_with_a_wrong_checksum(), "cannot be read"),
        (None, "no such file; check the list and its prefix"),
    ],
    ids=["empty", "text", "postscript", "cut short", "checksum", "missing"],
)
def test_files_that_cannot_be_read_become_failed_samples(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    images = listed(tmp_path, "a.jpg")
    with pytest.raises(DecodeError, match=f"^{tmp_path}/a.jpg: {message}"):
        read_image(images.path(0))
    for sample in (ImageTrainDataset(images, **TRAIN)[(0, 0)], ImageEvalDataset(images, **EVAL)[0]):
        assert (sample.clips.numel(), sample.label, sample.video) == (0, 0, 0)
        assert sample.error.startswith(f"{tmp_path}/list.txt:1: {tmp_path}/a.jpg: ")


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match=r"cannot be read \(Is a directory\)"):
        read_image(str(tmp_path))


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(40, 60).save(tmp_path / "a.png")
    assert read_image(f"{tmp_path}/a.png", max_pixels=2400).size == (60, 40)
    with pytest.raises(DecodeError, match=r"a.png: it has 60x40 = 2400 pixels; at most 2399 .* DATA.MAX_PIXELS"):
        read_image(f"{tmp_path}/a.png", max_pixels=2399)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice its limit
    with pytest.raises(DecodeError, match=r"more pixels than twice PIL.Image.MAX_IMAGE_PIXELS 1000 \(.*\); scale it"):
        read_image(f"{tmp_path}/a.png")


@pytest.mark.parametrize("kind", [ImageTrainDataset, ImageEvalDataset])
def test_the_limit_of_pixels_is_that_of_the_dataset(kind: type, tmp_path: Path) -> None:
    noise(40, 60).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png 0\n")
    images = read_images(str(tmp_path / "list.txt"), num_classes=1, prefix=str(tmp_path))
    more: dict[str, Any] = {"flip": False, "seed": 0} if kind is ImageTrainDataset else {"short_side": 24}
    for limit, failed in ((2400, False), (2399, True)):
        sample = kind(images, crop=16, max_pixels=limit, **more)[(0, 0) if kind is ImageTrainDataset else 0]
        assert ("at most 2399 are decoded" in sample.error) == failed
    with pytest.raises(ValueError, match="max_pixels is 0; it must be at least 1"):
        kind(images, crop=16, max_pixels=0, **more)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE])
def test_a_fault_of_the_machine_is_not_one_of_the_image(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(
        MachineError, match=rf"a.png: cannot be read \({os.strerror(code)}\); not a fault of the file: "
    ):
        read_image("a.png")


def test_an_image_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(DecodeError, match=r"a.png: cannot be read \(Permission denied\); allow this user to read it"):
        read_image("a.png")


def test_an_image_for_which_there_is_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    noise(4, 6).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", fails)
    with pytest.raises(MachineError, match="a.png: there is not enough memory to decode it; not a fault of the file"):
        read_image(f"{tmp_path}/a.png")


@pytest.mark.filterwarnings("ignore")
def test_a_strip_that_would_grow_beyond_the_limit(tmp_path: Path) -> None:
    Image.new("RGB", (60000, 1)).save(tmp_path / "strip.png")
    (tmp_path / "list.txt").write_text("strip.png 0\n")
    views = ImageEvalDataset(
        read_images(str(tmp_path / "list.txt"), num_classes=1, prefix=str(tmp_path)), short_side=256, crop=224
    )
    assert "strip.png: 60000x1 would grow to 15360000x256; cut it" in views[0].error


def test_no_other_error_escapes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    failed = 0
    for ending in ("jpg", "png", "webp", "gif", "bmp"):
        noise(40, 60).save(tmp_path / f"a.{ending}")
        whole = np.frombuffer((tmp_path / f"a.{ending}").read_bytes(), np.uint8)
        for _ in range(40):
            data = whole.copy()
            data[rng.integers(2, len(data), 3)] = rng.integers(0, 256, 3)
            data[rng.integers(2, 200)] = rng.integers(0, 256)
            (tmp_path / "damaged.jpg").write_bytes(data.tobytes())
            try:
                read_image(f"{tmp_path}/damaged.jpg")
            except DecodeError:
                failed += 1
    assert failed > 40


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted through Linux's /proc")
def test_files_are_closed(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:150])
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept = [read_image(f"{tmp_path}/a.png") for _ in range(3)]
    with pytest.raises(DecodeError) as caught:
        read_image(f"{tmp_path}/b.png")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert (len(kept), caught.type) == (3, DecodeError)


# ---- training


def test_training_views_are_the_box_resized_by_pillow(tmp_path: Path) -> None:
    """And mirrored where the next number drawn says so."""
    image = noise(50, 70)
    images = saved(tmp_path / "a.png", image)
    flips = set()
    for name, resampling in images_module.INTERPOLATION.items():
        train = ImageTrainDataset(images, **TRAIN, interpolation=name)
        for epoch in range(8):
            generator = seeded_generator("clip", 0, epoch, 0)
            top, left, height, width = random_resized_box(
                50, 70, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3), generator=generator
            )
            expected = image.crop((left, top, left + width, top + height)).resize((16, 16), resampling)
            flips.add(flip := bool(torch.rand((), generator=generator) < 0.5))
            sample = train[(epoch, 0)]
            assert (sample.clips.shape, sample.label, sample.video, sample.error) == ((1, 3, 16, 16), 0, 0, "")
            assert torch.equal(sample.clips[0], pixels(ImageOps.mirror(expected) if flip else expected))
    assert flips == {False, True}


def test_crop_area_aspect_and_flip_are_heeded(tmp_path: Path) -> None:
    image = noise(40, 40)
    train = ImageTrainDataset(
        saved(tmp_path / "a.png", image), crop_area=(1, 1), aspect=(1, 1), crop=40, flip=False, seed=0
    )
    assert all(torch.equal(train[(epoch, 0)].clips[0], pixels(image)) for epoch in range(10))


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    images = saved(tmp_path / "a.png", noise(50, 70))
    train = ImageTrainDataset(images, **TRAIN)
    first = train[(3, 0)].clips
    assert torch.equal(pickle.loads(pickle.dumps(train))[(3, 0)].clips, first)  # what a spawned worker gets
    others = [train[(4, 0)], ImageTrainDataset(images, **{**TRAIN, "seed": 1})[(3, 0)]]
    assert not any(torch.equal(other.clips, first) for other in others)
    assert torch.equal(train[(3, 0)].clips, first)
    assert torch.equal(torch.get_rng_state(), before)


def test_rand_augment_comes_last_and_goes_on_with_the_generator(tmp_path: Path) -> None:
    images = saved(tmp_path / "a.png", noise(50, 70))
    train = ImageTrainDataset(images, **TRAIN, augment_ops=2, augment_magnitude=7, augment_std=0.5)
    for epoch in range(4):
        generator = seeded_generator("clip", 0, epoch, 0)
        random_resized_box(50, 70, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3), generator=generator)
        torch.rand((), generator=generator)  # the flip
        plain = ImageTrainDataset(images, **TRAIN)[(epoch, 0)].clips.permute(0, 2, 3, 1)
        expected = rand_augment(plain, num_ops=2, magnitude=7, std=0.5, generator=generator)
        assert torch.equal(train[(epoch, 0)].clips.permute(0, 2, 3, 1), expected)
    with pytest.raises(ValueError, match="RandAugment's number of operations is -1; it must be 0"):
        ImageTrainDataset(images, **TRAIN, augment_ops=-1)


# ---- evaluation


def test_the_middle_of_a_picture_that_fits(tmp_path: Path) -> None:
    rows, columns = np.meshgrid(np.arange(24), np.arange(30), indexing="ij")
    places = np.stack([rows, columns, rows + columns], axis=-1).astype(np.uint8)
    clips = ImageEvalDataset(saved(tmp_path / "a.png", Image.fromarray(places)), **EVAL)[0].clips
    assert torch.equal(clips[0], torch.from_numpy(places[4:20, 7:23]).permute(2, 0, 1))


@pytest.mark.parametrize(("size", "scaled"), [((60, 90), (24, 36)), ((90, 61), (35, 24)), ((12, 15), (24, 30))])
@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_the_short_side_is_resized_by_pillow(
    name: str, size: tuple[int, int], scaled: tuple[int, int], tmp_path: Path
) -> None:
    image = noise(*size)
    sample = ImageEvalDataset(saved(tmp_path / "a.png", image), **EVAL, interpolation=name)[0]
    whole = pixels(image.resize(scaled[::-1], Image.Resampling[name.upper()]))
    top, left = (scaled[0] - 15) // 2, (scaled[1] - 15) // 2
    assert (sample.clips.shape, sample.label, sample.video, sample.error) == ((1, 3, 16, 16), 0, 0, "")
    assert torch.equal(sample.clips[0], whole[:, top : top + 16, left : left + 16])


def test_views_are_contiguous_and_own_their_bytes(tmp_path: Path) -> None:
    images = saved(tmp_path / "a.jpg", noise(50, 70))
    for sample in (ImageTrainDataset(images, **TRAIN)[(0, 0)], ImageEvalDataset(images, **EVAL)[0]):
        assert sample.clips.dtype == torch.uint8
        assert sample.clips.is_contiguous()
        assert sample.clips.untyped_storage().nbytes() == sample.clips.numel() == 3 * 16 * 16


def test_programming_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = saved(tmp_path / "a.png", noise(50, 70))
    with pytest.raises(IndexError):
        ImageEvalDataset(images, **EVAL)[1]
    monkeypatch.setattr(images_module, "_views", lambda frames: frames.no_such_thing)
    with pytest.raises(AttributeError):
        ImageTrainDataset(images, **TRAIN)[(0, 0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": 0}, "crop is 0; it must be at least 1"),
        ({"interpolation": "nearest"}, "interpolation is 'nearest'; choose one of: bilinear, bicubic"),
        ({"crop_area": (0.0, 1.0)}, r"crop_area is \(0.0, 1.0\); give \(low, high\) with 0 < low <= high <= 1$"),
        ({"crop_area": (0.5, 1.5)}, r"crop_area is \(0.5, 1.5\)"),
        ({"crop_area": (0.5, 0.2)}, r"crop_area is \(0.5, 0.2\)"),
        ({"aspect": (2, 1)}, r"aspect is \(2, 1\); give \(low, high\) with 0 < low <= high$"),
        ({"aspect": (-1, 1)}, r"aspect is \(-1, 1\)"),
        ({"short_side": 15}, "crop 16 does not fit into short_side 15; lower it or raise the short side"),
    ],
)
def test_arguments_are_checked_before_the_first_sample(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    images = listed(tmp_path, "a.png")
    if "short_side" not in change:
        with pytest.raises(ValueError, match=message):
            ImageTrainDataset(images, **{**TRAIN, **change})
    if not {"crop_area", "aspect"} & set(change):
        with pytest.raises(ValueError, match=message):
            ImageEvalDataset(images, **{**EVAL, **change})


# ---- the loader


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> VideoList:
    """Seven images, the fifth of which is none."""
    folder = tmp_path_factory.mktemp("seven")
    for label in range(7):
        noise(30 + label, 40, seed=label).save(folder / f"{label}.jpg")
    (folder / "4.jpg").write_bytes(b"no image")
    return listed(folder, *(f"{label}.jpg" for label in range(7)))


def two_epochs(images: VideoList, num_workers: int) -> list[Batch]:
    batches = TrainBatches(len(images), global_batch=2, seed=0)
    loader = Loader(ImageTrainDataset(images, **TRAIN), batches, path_of=images.path, num_workers=num_workers)
    first = list(loader)
    batches.set_epoch(1)
    return [*first, *loader, *evaluation(images, num_workers)]


def evaluation(images: VideoList, num_workers: int) -> list[Batch]:
    batches = EvalBatches(len(images), batch_size=3)
    return list(Loader(ImageEvalDataset(images, **EVAL), batches, path_of=images.path, num_workers=num_workers))


def test_batches_are_the_same_for_any_number_of_workers(seven: VideoList) -> None:
    alone = two_epochs(seven, 0)
    assert [len(batch.clips) + len(batch.errors) for batch in alone] == [2] * 6 + [3, 3, 1]
    for ours, theirs in zip(alone, two_epochs(seven, 2), strict=True):
        assert torch.equal(ours.clips, theirs.clips)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.videos, theirs.videos)
        assert ours.errors == theirs.errors
    assert alone[0].clips.shape[1:] == (1, 3, 16, 16)
    last = alone[6:]
    assert [*chain(*(batch.videos.tolist() for batch in last))] == [0, 1, 2, 3, 5, 6]
    assert last[1].failed_videos.tolist() == [4]
    assert "4.jpg: is no JPEG" in last[1].errors[0]
