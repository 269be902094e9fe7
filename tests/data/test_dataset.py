import pickle
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from octvideo.data import dataset as dataset_module
from octvideo.data import decode as decode_module
from octvideo.data.dataset import Batch, EvalDataset, Replacing, Sample, TrainDataset, collate
from octvideo.data.decode import MachineError, open_video
from octvideo.data.decode_pyav import PyAVVideo
from octvideo.data.lists import VideoList, read_list
from octvideo.data.loader import EvalBatches, Loader, TrainBatches
from octvideo.errors import RunError

TRAIN: dict[str, Any] = {
    "num_frames": 3,
    "sampling_rate": 5,
    "target_fps": 30,
    "short_side": (96, 96),
    "crop": 96,
    "flip": True,
    "seed": 0,
}
EVAL: dict[str, Any] = {
    "num_frames": 3,
    "sampling_rate": 5,
    "target_fps": 30,
    "num_clips": 2,
    "num_crops": 3,
    "short_side": 96,
    "crop": 96,
}


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.fixture
def videos(clip_file: Callable[[str], str], tmp_path: Path) -> VideoList:
    """A good video, one that is none, and another good one."""
    broken = write(tmp_path / "broken.mp4", b"no video")
    lines = [f"{clip_file('h264, gop 12')} 4", f"{broken} 1", f"{clip_file('mpeg4')} 2"]
    return read_list(write(tmp_path / "list.txt", "\n".join(lines)), num_classes=5)


# ---- training


def stored(video: str) -> Tensor:
    with open_video(video) as opened:
        return opened.frames(range(opened.num_frames))


def where(clip: Tensor, frames: Tensor) -> tuple[int, int, bool]:
    """First frame, left edge and mirroring of a [C, T, 96, 96] clip of every fifth of 60 frames; by trying all."""
    found = []
    for flipped in (False, True):
        plain = (clip.flip(3) if flipped else clip).permute(1, 2, 3, 0)
        for left in range(160 - 96 + 1):
            columns = frames[:, :, left : left + 96]
            starts = [s for s in range(50) if torch.equal(columns[s, ::16], plain[0, ::16])]
            found += [(s, left, flipped) for s in starts if torch.equal(columns[s : s + 11 : 5], plain)]
    assert len(found) == 1
    return found[0]


def test_training_clips_are_frames_of_the_video(tmp_path: Path) -> None:
    """At the source's own size a clip is a cut-out: found again by trying all places."""
    rng = np.random.default_rng(0)
    frames = torch.from_numpy(rng.integers(0, 256, (60, 96, 160, 3), dtype=np.uint8))

    class FromMemory:
        path, num_frames, fps, pixels = "a.mp4", 60, 30.0, 96 * 160

        def __enter__(self) -> "FromMemory":
            return self

        def __exit__(self, *exc_info: object) -> None: ...

        def frames(self, indices: list[int]) -> Tensor:
            return frames[indices]

    videos = read_list(write(tmp_path / "l.txt", "a.mp4 3"), num_classes=5, check_files=False)
    train = TrainDataset(videos, **TRAIN)
    places = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_module, "open_video", lambda path, decoder, max_pixels: FromMemory())
        for epoch in range(12):
            sample = train[(epoch, 0)]
            assert (sample.clips.shape, sample.label, sample.video, sample.error) == ((1, 3, 3, 96, 96), 3, 0, "")
            places.append(where(sample.clips[0], frames))
    starts, lefts, flips = zip(*places, strict=True)
    assert len(set(starts)) > 8
    assert len(set(lefts)) > 8
    assert set(flips) == {False, True}


def test_clips_longer_than_the_video(videos: VideoList, clip_file: Callable[[str], str], tmp_path: Path) -> None:
    """Frames 0, 29, 58 and 87 of 60: the last one is 27 by looping, 59 by clamping. And a video of one frame."""
    frames = stored(videos.path(0))
    for short, expected in ((None, [0, 29, 58, 27]), ("clamp", [0, 29, 58, 59])):
        change = {"num_frames": 4, "sampling_rate": 29, "flip": False, "short": short}
        clip = TrainDataset(videos, **{**TRAIN, **change})[(0, 0)].clips[0].permute(1, 2, 3, 0)
        assert any(torch.equal(clip, frames[expected, :, left : left + 96]) for left in range(65))
        views = EvalDataset(videos, **{**EVAL, "num_frames": 4, "sampling_rate": 29, "short": short})[0].clips
        assert torch.equal(views[4].permute(1, 2, 3, 0), frames[expected, :, 32:128])
    one = read_list(write(tmp_path / "one.txt", f"{clip_file('h264, one frame')} 0"), num_classes=1)
    clip = TrainDataset(one, **TRAIN)[(0, 0)].clips
    assert clip.shape == (1, 3, 3, 96, 96)
    assert torch.equal(clip[:, :, 0], clip[:, :, 2])


def test_a_sample_depends_on_seed_epoch_and_index_alone(videos: VideoList) -> None:
    before = torch.get_rng_state()
    train = TrainDataset(videos, **{**TRAIN, "short_side": (100, 120)})
    first = train[(3, 0)]
    train[(0, 2)], train[(3, 2)]
    assert torch.equal(train[(3, 0)].clips, first.clips)
    again = pickle.loads(pickle.dumps(train))  # what a spawned worker gets
    assert torch.equal(again[(3, 0)].clips, first.clips)
    others = [train[(4, 0)], TrainDataset(videos, **{**TRAIN, "short_side": (100, 120), "seed": 1})[(3, 0)]]
    assert not any(torch.equal(other.clips, first.clips) for other in others)
    assert torch.equal(torch.get_rng_state(), before)


def test_flip_off_and_short_side_jitter(videos: VideoList, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []
    scale = dataset_module.scale_short_side
    monkeypatch.setattr(dataset_module, "scale_short_side", lambda f, s: sides.append(s) or scale(f, s))
    monkeypatch.setattr(dataset_module, "random_flip", lambda *args: pytest.fail("flipped"))
    train = TrainDataset(videos, **{**TRAIN, "short_side": (98, 104), "flip": False})
    for epoch in range(25):
        assert train[(epoch, 2)].clips.shape == (1, 3, 3, 96, 96)
    assert set(sides) <= set(range(98, 105))
    assert len(set(sides)) > 4


def test_rand_augment_comes_last_and_changes_no_earlier_draw(
    videos: VideoList, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TrainDataset(videos, **{**TRAIN, "short_side": (98, 104)})
    train = TrainDataset(
        videos, **{**TRAIN, "short_side": (98, 104)}, augment_ops=2, augment_magnitude=7, augment_std=0.5
    )
    assert len({train[(epoch, 0)].clips.numpy().tobytes() for epoch in (0, 0, 1, 2, 3)}) == 4
    asked = []

    def identity(frames: Tensor, **options: Any) -> Tensor:
        asked.append({key: value for key, value in options.items() if key != "generator"})
        return frames

    monkeypatch.setattr(dataset_module, "rand_augment", identity)
    for epoch in range(4):
        assert torch.equal(train[(epoch, 0)].clips, plain[(epoch, 0)].clips)
    assert asked == [{"num_ops": 2, "magnitude": 7, "std": 0.5}] * 4
    with pytest.raises(ValueError, match="RandAugment's magnitude is 11; it must be 0 to 10"):
        TrainDataset(videos, **TRAIN, augment_ops=1, augment_magnitude=11)


# ---- evaluation


def test_views_cover_the_video_in_time_and_space(videos: VideoList, read_codes: Callable[[Tensor], list[int]]) -> None:
    """Clips of 3 frames at stride 5 from 0 and 49; left and right crop side by side are the whole picture."""
    sample = EvalDataset(videos, **EVAL)[0]
    assert (sample.clips.shape, sample.label, sample.video, sample.error) == ((6, 3, 3, 96, 96), 4, 0, "")
    frames = stored(videos.path(0))
    for clip, expected in enumerate(([0, 5, 10], [49, 54, 59])):
        left, centre, right = sample.clips[3 * clip : 3 * clip + 3].permute(0, 2, 3, 4, 1)
        whole = torch.cat([left[:, :, :64], right], dim=2)
        assert read_codes(whole) == expected
        assert torch.equal(whole, frames[expected])
        assert torch.equal(centre, frames[expected, :, 32:128])


def test_one_central_view_of_a_crop_smaller_than_the_short_side(videos: VideoList) -> None:
    sample = EvalDataset(videos, **{**EVAL, "num_clips": 1, "num_crops": 1, "crop": 64})[0]
    frames = stored(videos.path(0))[[24, 29, 34]]
    assert torch.equal(sample.clips[0].permute(1, 2, 3, 0), frames[:, 16:80, 48:112])


def test_a_video_is_opened_once_and_every_frame_read_once(videos: VideoList, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    read: list[int] = []

    def counting(path: str, decoder: str, max_pixels: int) -> Any:
        video = open_video(path, decoder, max_pixels=max_pixels)
        frames = video.frames
        video.frames = lambda indices: read.extend(indices) or frames(indices)  # type: ignore[method-assign]
        opened.append(path)
        return video

    monkeypatch.setattr(dataset_module, "open_video", counting)
    clips = EvalDataset(videos, **{**EVAL, "num_frames": 8, "sampling_rate": 2, "num_clips": 10})[0].clips
    assert clips.shape == (30, 3, 8, 96, 96)
    assert opened == [videos.path(0)]
    assert read == sorted(set(read))
    assert (read[0], read[-1]) == (0, 59)


@pytest.mark.parametrize("chunk_bytes", [1, 3 * 96 * 160 * 7])
def test_frames_held_at_a_time_are_bounded_in_bytes(
    videos: VideoList, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    """1 or 7 frames at a time: the same clips as 32 at a time."""
    expected = EvalDataset(videos, **{**EVAL, "num_frames": 8})[0].clips
    asked: list[int] = []
    frames = PyAVVideo.frames
    monkeypatch.setattr(PyAVVideo, "frames", lambda self, numbers: asked.append(len(numbers)) or frames(self, numbers))
    monkeypatch.setattr(decode_module, "CHUNK_BYTES", chunk_bytes)
    assert torch.equal(EvalDataset(videos, **{**EVAL, "num_frames": 8})[0].clips, expected)
    assert max(asked) == (1 if chunk_bytes == 1 else 7) and sum(asked) == 16


def test_a_strip_that_would_grow_without_limit(tmp_path: Path, write_clip: Callable[..., str]) -> None:
    """64 x 2048 scaled to a short side of 320 would have 320 x 10240 pixels in each frame."""
    list_file = write(tmp_path / "l.txt", f"{write_clip(tmp_path / 'strip.mp4', 2, size=(64, 2048))} 0")
    sample = EvalDataset(read_list(list_file, num_classes=1), **EVAL)[0]
    assert "strip.mp4: its frames are 2048x64; one side may be 16 times the other; cut it to" in sample.error


def test_clips_are_contiguous_and_own_their_bytes(videos: VideoList) -> None:
    for sample in (TrainDataset(videos, **TRAIN)[(0, 0)], EvalDataset(videos, **EVAL)[2]):
        assert sample.clips.dtype == torch.uint8
        assert sample.clips.is_contiguous()
        assert sample.clips.untyped_storage().nbytes() == sample.clips.numel()


# ---- faults


def test_larger_frames_than_allowed_are_not_decoded(videos: VideoList) -> None:
    for kind, arguments, key in ((TrainDataset, TRAIN, (0, 0)), (EvalDataset, EVAL, 0)):
        assert kind(videos, **arguments, max_pixels=96 * 160)[key].error == ""
        error = kind(videos, **arguments, max_pixels=96 * 160 - 1)[key].error
        assert (
            "its frames have 160x96 = 15360 pixels; at most 15359 are decoded" in error and "DATA.MAX_PIXELS" in error
        )
    with pytest.raises(ValueError, match="max_pixels is 0; it must be at least 1"):
        TrainDataset(videos, **TRAIN, max_pixels=0)


@contextmanager
def no_descriptors() -> Iterator[None]:
    """The system opens no further file for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_fault_of_the_machine_is_not_a_failed_sample(videos: VideoList) -> None:
    """It would be counted as wrong in a test, and replaced within the budget in training."""
    for kind, arguments, key in ((TrainDataset, TRAIN, (0, 0)), (EvalDataset, EVAL, 0)):
        samples = Replacing(kind(videos, **arguments), 0) if kind is TrainDataset else kind(videos, **arguments)
        with (
            no_descriptors(),
            pytest.raises(
                MachineError, match="Too many open files.*not a fault of the file: raise the limit of open files"
            ),
        ):
            samples[key]


def test_no_memory_for_the_frames(videos: VideoList, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(dataset_module, "scale_short_side", fails)
    with pytest.raises(MachineError, match="not enough memory to decode it; not a fault of the file"):
        EvalDataset(videos, **EVAL)[0]


class Failing(Dataset[Sample]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Sample:
        raise MachineError("a.mp4: cannot be opened (Too many open files); raise the limit")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_fault_of_the_machine_in_a_worker(num_workers: int) -> None:
    batches = EvalBatches(2, batch_size=1)
    loader = Loader(Failing(), batches, path_of=str, num_workers=num_workers, timeout_s=20)
    with pytest.raises(MachineError, match=r"a.mp4: cannot be opened .Too many open files.; raise the limit") as error:
        next(iter(loader))
    assert isinstance(error.value, RunError)


def test_a_video_that_does_not_decode_is_a_sample_with_an_error(videos: VideoList) -> None:
    for sample in (TrainDataset(videos, **TRAIN)[(0, 1)], EvalDataset(videos, **EVAL)[1]):
        assert (sample.clips.numel(), sample.label, sample.video) == (0, 1, 1)
        assert sample.error.startswith(f"{videos.source}:2: {videos.path(1)}: cannot be opened (Invalid data")


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_no_decoder_error_escapes(decoder: str, videos: VideoList) -> None:
    if decoder == "decord":
        pytest.importorskip("decord", reason="decord has no wheels for this platform")
    whole = Path(videos.path(0)).read_bytes()
    rng = np.random.default_rng(0)
    failed = 0
    for trial in range(12):
        data = np.frombuffer(whole, np.uint8).copy()
        data[rng.integers(48, len(data), 200)] = rng.integers(0, 256, 200)
        write(Path(videos.path(1)), data.tobytes())
        failed += bool(TrainDataset(videos, **TRAIN, decoder=decoder)[(trial, 1)].error)
    assert failed > 0


def test_programming_errors_are_raised(videos: VideoList, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IndexError):
        EvalDataset(videos, **EVAL)[3]
    monkeypatch.setattr(dataset_module, "to_clip", lambda frames: frames.no_such_thing)
    with pytest.raises(AttributeError):
        TrainDataset(videos, **TRAIN)[(0, 0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "dense"}, "policy is 'dense'; choose one of: strided, pyslowfast"),
        ({"short": "mirror"}, "short is 'mirror'; choose one of: None, loop, clamp"),
        ({"decoder": "opencv"}, "decoder is 'opencv'; choose one of: auto, pyav, decord"),
        ({"short_side": (120, 100)}, r"short_side is \(120, 100\); give \(low, high\)"),
        ({"crop": 97}, "crop 97 does not fit into short_side 96; lower it or raise the short side"),
        ({"num_frames": 0}, "num_frames is 0; it must be at least 1"),
        ({"sampling_rate": 0}, "sampling_rate is 0; it must be at least 1"),
        ({"target_fps": -1}, "target_fps is -1; it must be 0"),
    ],
)
def test_arguments_are_checked_before_the_first_sample(change: dict[str, Any], message: str, videos: VideoList) -> None:
    with pytest.raises(ValueError, match=message):
        TrainDataset(videos, **{**TRAIN, **change})
    if "short_side" not in change:
        with pytest.raises(ValueError, match=message):
            EvalDataset(videos, **{**EVAL, **change})


def test_number_of_views_is_checked(videos: VideoList) -> None:
    with pytest.raises(ValueError, match="num_crops is 2; it must be 1"):
        EvalDataset(videos, **{**EVAL, "num_crops": 2})
    with pytest.raises(ValueError, match="num_clips is 0; it must be at least 1"):
        EvalDataset(videos, **{**EVAL, "num_clips": 0})


# ---- batches


def sample(video: int, label: int, error: str = "") -> Sample:
    clips = torch.empty(0, dtype=torch.uint8) if error else torch.full((2, 3, 4, 5, 5), video, dtype=torch.uint8)
    return Sample(clips, label, video, error)


def test_collate_keeps_failed_samples_apart() -> None:
    batch = collate([sample(7, 1), sample(8, 2, "l:9: a.mp4: gone; fetch it"), sample(9, 3)])
    assert batch.clips.shape == (2, 2, 3, 4, 5, 5)
    assert batch.clips[:, 0, 0, 0, 0, 0].tolist() == [7, 9]
    assert (batch.labels.tolist(), batch.videos.tolist()) == ([1, 3], [7, 9])
    assert {t.dtype for t in (batch.labels, batch.videos, batch.failed_videos)} == {torch.int64}
    assert (batch.errors, batch.failed_videos.tolist()) == (["l:9: a.mp4: gone; fetch it"], [8])


def test_a_batch_of_failures_is_empty() -> None:
    batch = collate([sample(8, 2, "gone")])
    assert (len(batch.clips), batch.clips.ndim, len(batch.labels), batch.errors) == (0, 6, 0, ["gone"])


def test_a_batch_prints_shapes_not_pixels() -> None:
    text = repr(collate([sample(7, 1), sample(8, 2, "gone")]))
    assert text == "Batch(clips=uint8 [1, 2, 3, 4, 5, 5], labels=[1], videos=[7], failed_videos=[8])"
    assert isinstance(collate([]), Batch)
    assert re.search(r"\[0, 0, 0, 0, 0, 0\]", repr(collate([])))


# ---- memory over many files


class Resident(torch.utils.data.Dataset[Sample]):
    """A training set that tells the process's resident MiB, times 16, as its label."""

    def __init__(self, samples: TrainDataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        sample = self.samples[key[0], key[1] % len(self.samples)]
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return Sample(sample.clips[:, :, :1, :1, :1].clone(), pages * 4096 * 16 // 2**20, key[1])


def soak(paths: list[str], tmp_path: Path, opens: int) -> float:
    """MiB by which a worker grows over `opens` videos, after the first quarter of them."""
    listed = write(tmp_path / "soak.txt", "".join(f"{path} 0\n" for path in paths))
    videos = read_list(listed, num_classes=1)
    samples = TrainDataset(
        videos, num_frames=4, sampling_rate=2, target_fps=30, short_side=(64, 72), crop=56, flip=True, seed=0
    )
    batches = TrainBatches(len(videos), global_batch=len(videos), seed=0)
    resident = []
    loader = Loader(Resident(samples), batches, path_of=videos.path, num_workers=1)
    for epoch in range(opens // len(videos)):
        batches.set_epoch(epoch)
        resident += [label / 16 for batch in loader for label in batch.labels.tolist()]
    quarter = len(resident) // 4
    return max(resident[-quarter:]) - max(resident[:quarter])


SOAK = ("h264, gop 12, B frames", "hevc, open gop", "vp9", "mpeg4", "h264, variable frame rate")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_a_worker_does_not_grow_with_the_videos_it_opens(clip_file: Callable[[str], str], tmp_path: Path) -> None:
    assert soak([clip_file(name) for name in SOAK], tmp_path, opens=300) < 12


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_many_thousand_opens(clip_file: Callable[[str], str], tmp_path: Path) -> None:
    assert soak([clip_file(name) for name in SOAK], tmp_path, opens=12_000) < 12


@pytest.mark.slow
def test_a_million_lines_load_in_seconds_and_cost_tens_of_megabytes(tmp_path: Path) -> None:
    path = write(
        tmp_path / "l.txt", "".join(f"class_{i % 400}/video_{i:07d}.mp4 {i % 400}\n" for i in range(1_000_000))
    )
    started = time.process_time()
    videos = read_list(path, num_classes=400, require_all_classes=True, check_files=False)
    seconds = time.process_time() - started
    held = len(videos.names) + videos.ends.nbytes + videos.labels.nbytes + videos.lines.nbytes
    assert len(videos) == 1_000_000 and videos.path(999_999) == "class_399/video_0999999.mp4"
    assert held < 60e6 and seconds < 20
