"""What build.py decides by itself. What it puts together is tested by running it: tests/tools, tests/end_to_end."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from octvideo import build
from octvideo.config import ConfigError
from octvideo.data.decode import MAX_PIXELS
from octvideo.data.lists import read_list
from octvideo.data.sampling import seeded_generator
from octvideo.data.transforms import cutmix, mixup
from octvideo.engine.distributed import World

KINDS: list[type[Exception]] = [
    AssertionError,
    KeyError,
    TypeError,
    AttributeError,
    ZeroDivisionError,
    StopIteration,
    MemoryError,
]
TINY = Path(__file__).parents[1] / "configs/motion/i3d_tiny.yaml"


def mixed(clips: Tensor, step: int, *overrides: str, rank: int = 0) -> tuple[Tensor, Tensor]:
    cfg = build.load_config(TINY, ["MODEL.NUM_CLASSES", "4", "SEED", "3", *overrides])
    return build.mix(cfg, World(rank, 2))(clips, torch.arange(4), step)


CLIPS = torch.arange(4.0)[:, None, None, None, None].expand(4, 3, 2, 12, 16)


def test_clips_are_mixed_only_where_asked() -> None:
    clips, targets = mixed(CLIPS, 0)
    assert clips is CLIPS
    assert torch.equal(targets, torch.arange(4))


@pytest.mark.parametrize(("way", "key"), [(mixup, "TRAIN.MIXUP"), (cutmix, "TRAIN.CUTMIX")])
def test_one_way_of_mixing_draws_from_seed_step_and_rank(way: Callable[..., tuple[Tensor, Tensor]], key: str) -> None:
    for step, rank in ((0, 0), (7, 0), (7, 1)):
        generator = seeded_generator("mixup", 3, step, rank)
        expected = way(CLIPS, torch.arange(4), num_classes=4, alpha=0.4, generator=generator)
        for ours, theirs in zip(mixed(CLIPS, step, key, "0.4", rank=rank), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_of_two_ways_each_step_takes_one_at_random() -> None:
    both = ["TRAIN.MIXUP", "8.0", "TRAIN.CUTMIX", "1.0"]
    cfg = build.load_config(TINY, ["MODEL.NUM_CLASSES", "4", *both])
    mix = build.mix(cfg, World())
    whole = [bool((clips == clips.round()).all()) for clips, _ in (mix(CLIPS, torch.arange(4), n) for n in range(400))]
    assert 160 < sum(whole) < 250  # a cut clip holds whole numbers; a blend does where it is of itself alone, 1 in 24
    assert torch.equal(mix(CLIPS, torch.arange(4), 5)[0], mix(CLIPS, torch.arange(4), 5)[0])


def test_rand_augment_reaches_the_training_clips(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.mp4 0\n")
    videos = read_list(str(tmp_path / "list.txt"), num_classes=4, check_files=False)
    changes = ["DATA.RANDAUGMENT_OPS", "2", "DATA.RANDAUGMENT_MAGNITUDE", "7", "DATA.RANDAUGMENT_STD", "0.5"]
    for config in (TINY, TINY.parents[1] / "stills/resnet_tiny.yaml"):
        samples = build.train_samples(build.load_config(config, changes), videos)
        assert (samples.augment_ops, samples.augment_magnitude, samples.augment_std) == (2, 7.0, 0.5)


@pytest.mark.parametrize("config", [TINY, TINY.parents[1] / "stills/resnet_tiny.yaml"], ids=["videos", "images"])
def test_the_limit_of_pixels_reaches_the_readers(config: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.mp4 0\n")
    videos = read_list(str(tmp_path / "list.txt"), num_classes=4, check_files=False)
    assert build.load_config(config).DATA.MAX_PIXELS == MAX_PIXELS
    cfg = build.load_config(config, ["DATA.MAX_PIXELS", "9"])
    assert build.train_samples(cfg, videos).max_pixels == build.eval_samples(cfg, videos, 1, 1).max_pixels == 9
    with pytest.raises(ConfigError, match="DATA.MAX_PIXELS is 0; allowed: 1"):
        build.load_config(config, ["DATA.MAX_PIXELS", "0"])


@pytest.mark.parametrize("threads", [1, 2])
def test_on_one_thread_convolutions_go_by_onednn(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = build.load_config(TINY)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model = build.place(cfg, build.network(cfg), torch.device("cpu"))
    dilation = model.get_submodule("stages.res2.0.conv1").dilation  # 3 x 1 x 1
    assert dilation == ((1, 2, 2) if threads == 1 else (1, 1, 1))


def test_bfloat16_on_a_card_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, card = build.load_config(TINY, ["TRAIN.DTYPE", "bfloat16"]), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(
        ConfigError, match=r"TRAIN.DTYPE is bfloat16, but Tesla V100 \(compute capability 7.0\)"
    ) as caught:
        build.check_device(cfg, card, training=True)
    assert "TRAIN.DTYPE float16 or float32" in str(caught.value)
    build.check_device(cfg, card, training=False)  # an evaluation computes in float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    build.check_device(cfg, card, training=True)


def class_names(folder: Path, content: bytes, count: int = 2) -> list[str]:
    (folder / "labels.txt").write_bytes(content)
    return build.class_names(build.load_config(TINY, ["MODEL.NUM_CLASSES", str(count)]), f"{folder}/train.txt")


def test_class_names_are_lines(tmp_path: Path) -> None:
    assert class_names(tmp_path, "\ufeffgrüßen \r\n\tb c\n\n".encode()) == ["grüßen", "b c"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a\nb\xff\n", "labels.txt:2: byte 0xff is not UTF-8 text"),
        (b"a\rb\n", r"'a\\rb' contains the control character '\\r'; rename it"),
        (b"a\n" + b"b" * 100_000, "labels.txt:2: the line is longer than 65536 bytes"),
        (b"a\n", "1 names, 1 of them different, for MODEL.NUM_CLASSES 2"),
    ],
)
def test_class_names_that_are_none(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        class_names(tmp_path, content)


def test_more_workers_than_cores_are_noted_once_by_the_main_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "_cores", lambda: 2)
    build._note_cores.cache_clear()
    files = [tmp_path / f"{label}.mp4" for label in range(8)]
    for file in files:
        file.touch()
    (tmp_path / "list.txt").write_text("".join(f"{file} {label}\n" for label, file in enumerate(files)))
    for workers in (2, 3):
        overrides = ["DATA.NUM_WORKERS", str(workers), "TRAIN.BATCH_SIZE", "8"]
        cfg = build.load_config(TINY, overrides)
        videos = read_list(str(tmp_path / "list.txt"), num_classes=cfg.MODEL.NUM_CLASSES)
        for world in (World(1, 2, 1, 2), World(), World()):
            build.train_loader(cfg, videos, world, torch.device("cpu"))
    (line,) = capsys.readouterr().err.splitlines()
    assert "DATA.NUM_WORKERS is 3," in line and "2 cores" in line


class Raising(nn.Module):
    """A network of another package. `raised`: what its forward raises; None: it gives logits."""

    raised: Exception | None = None

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        convolutions = (nn.Conv3d(channels, 8, 3, padding=1) for channels in (3, 8, 8))
        self.conv, self.fc = nn.Sequential(*convolutions), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.raised:
            raise self.raised
        return self.fc(self.conv(x).mean((2, 3, 4)))


def raising(num_classes: int) -> nn.Module:
    return Raising(num_classes)


@pytest.mark.parametrize("alpha", ["0.0", "0.25"])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_network_of_another_package_raises_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], alpha: str
) -> None:
    overrides = ["MODEL.NUM_CLASSES", "4", "MODEL.FACTORY", f"{__name__}:raising", "OCTAVE.ALPHA", alpha]
    build.load_config(TINY, overrides)
    monkeypatch.setattr(Raising, "raised", kind("the first line\nand more"))
    with pytest.raises(ConfigError) as caught:
        build.load_config(TINY, overrides)
    lines = caught.value.problems
    assert all(f"{__name__}:raising" in line and "the first line" in line and "\n" not in line for line in lines)
    assert [line.split()[0] for line in lines] in (["DATA.TRAIN_CROP", "DATA.TEST_CROP"], ["MODEL.FACTORY"])
    monkeypatch.setattr(Raising, "raised", kind())
    with pytest.raises(ConfigError, match=kind.__name__):
        build.load_config(TINY, overrides)
