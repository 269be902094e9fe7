import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import motion
from octvideo import build
from octvideo.analysis.contact import LINE, MARGIN
from octvideo.analysis.frequency import spectra
from octvideo.analysis.paper import IMAGES, PRINTED, allowed_difference
from octvideo.data.encode import write_mp4
from octvideo.engine import checkpoint
from tools import analyze

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/golden/complexity.json").read_text())
ACCEPT = "accept the change with: python tools/analyze.py golden --write tests/golden/complexity.json"


def say(*arguments: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert analyze.main(arguments) == 0
    return out.getvalue()


@pytest.mark.parametrize("name", analyze.configs())
def test_counts_of_every_config(name: str) -> None:
    cost = json.loads(json.dumps(analyze.cost_of(name).as_dict()))
    assert cost == GOLDEN.get(name), f"{name} counts otherwise than in tests/golden/complexity.json; {ACCEPT}"
    if name in PRINTED:
        assert cost["macs"]["conv_fc"] / 1e9 == pytest.approx(PRINTED[name].gmacs, abs=allowed_difference(name))
    row = IMAGES.get(name.removeprefix("imagenet/"))
    if row:
        digits = 0.1 if "152" in name else 1  # the rows of ResNet-152 are known to one digit less
        assert cost["macs"]["conv_fc"] / 1e6 == pytest.approx(row.mmacs, abs=0.00501 / digits)
        assert cost["params"] / 1e6 == pytest.approx(row.params, abs=0.00005001 / digits)


def test_golden_names_no_config_that_is_gone() -> None:
    assert set(GOLDEN) == set(analyze.configs()), ACCEPT
    assert set(PRINTED) | {f"imagenet/{name}" for name in IMAGES} <= set(GOLDEN)


def test_the_zoo_table_is_the_one_in_the_repository() -> None:
    assert say("zoo") == (ROOT / "configs/README.md").read_text(), (
        "run: python tools/analyze.py zoo --write configs/README.md"
    )


def test_complexity_as_json() -> None:
    cost = json.loads(
        say("complexity", "--json", "--cfg", str(ROOT / "configs/kinetics400/oct_i3d_nl_r50_8x8_a0.1.yaml"))
    )
    assert list(cost) == ["params", "macs", "activations", "input"]
    assert cost["input"] == [3, 8, 224, 224]
    assert list(cost["macs"]) == ["conv_fc", "pool", "attention"]
    assert cost["macs"]["conv_fc"] / 1e9 == pytest.approx(28.96, abs=0.01)
    assert cost["params"] == 35401936


def test_complexity_per_layer_and_overrides() -> None:
    cfg = str(ROOT / "configs/motion/oct_i3d_tiny.yaml")
    text = say("complexity", "--per-layer", "--cfg", cfg, "OCTAVE.ALPHA", "0.5")
    assert "stages.res2.0.conv1" in text and "OctConv3d" in text and "parameters" in text
    layers = json.loads(say("complexity", "--json", "--per-layer", "--cfg", cfg))["layers"]
    total = json.loads(say("complexity", "--json", "--cfg", cfg))["macs"]["conv_fc"]
    assert sum(sum(layer["macs"]) for layer in layers) == total


def test_a_typo_is_one_message() -> None:
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert analyze.main(["complexity", "--cfg", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in err.getvalue()


def test_a_picture_of_what_the_network_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    motion.make(tmp_path / "motion", motion.Settings(train=1, val=1), workers=1)
    lists = ["DATA.TRAIN_LIST", f"{tmp_path}/motion/train.txt", "DATA.VAL_LIST", f"{tmp_path}/motion/val.txt"]
    lists += ["DATA.PREFIX", f"{tmp_path}/motion", "TEST.CLIPS", "2"]
    cfg_path = str(ROOT / "configs/motion/oct_i3d_tiny.yaml")
    out = str(tmp_path / "sheet.png")
    said = say("clip", "--cfg", cfg_path, "--index", "5", "--out", out, "--epochs", "2", *lists)
    assert "8 views of 8 x 64 x 64" in said  # 2 draws, 2 clips x 3 crops
    sheet = np.asarray(Image.open(out))
    cfg = build.load_config(cfg_path, lists)
    clip = build.train_samples(cfg, build.video_list(cfg, cfg.DATA.TRAIN_LIST, training=False))[1, 5].clips[0]
    row = 2 * MARGIN + 64 + 2 * LINE  # the second one
    for t in range(8):
        left = MARGIN + t * (64 + MARGIN)
        np.testing.assert_array_equal(sheet[row : row + 64, left : left + 64], clip[:, t].permute(1, 2, 0).numpy())
    again = say("clip", "--cfg", cfg_path, "--index", "5", "--out", out, "--epochs", "2", *lists)
    assert again.startswith(f"replaced {out}\n")
    monkeypatch.chdir(tmp_path / "motion")
    before = sorted(Path().iterdir())
    said = say("clip", "--cfg", cfg_path, "--index", "5", *lists, "OUTPUT_DIR", str(tmp_path / "run"))
    assert "replaced" not in said and (tmp_path / "run/clip_5.png").exists() and sorted(Path().iterdir()) == before
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert analyze.main(["clip", "--cfg", cfg_path, "--index", "5", "--out", "train.txt", *lists]) == 2
    assert "train.txt is there, and not an earlier output" in err.getvalue()
    with contextlib.redirect_stderr(err):
        assert analyze.main(["clip", "--cfg", cfg_path, "--index", "8", *lists]) == 2
    assert "train.txt: --index 8 is outside 0..7" in err.getvalue()


OCTAVE, VANILLA = (str(ROOT / f"configs/motion/{name}.yaml") for name in ("oct_i3d_tiny", "i3d_tiny"))
SMALL = ["DATA.SAMPLING_RATE", "1", "DATA.NUM_FRAMES", "4", "DATA.TEST_SHORT_SIDE", "36", "DATA.TEST_CROP", "32"]


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of noise, a list of them, and an image; weights of i3d_tiny and of resnet_tiny."""
    folder = tmp_path_factory.mktemp("noisy")
    rng = np.random.default_rng(0)
    for name in "ab":
        with (folder / f"{name}.mp4").open("wb") as file:
            write_mp4(file, iter(rng.integers(0, 256, (8, 48, 48, 3), dtype=np.uint8)), 15.0)
    (folder / "list.txt").write_text("a.mp4 0\nb.mp4 1\n")
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / "c.png")
    (folder / "images.txt").write_text("c.png 0\n")
    for name, cfg in ("video", OCTAVE), ("image", str(ROOT / "configs/stills/oct_resnet_tiny.yaml")):
        state = build.network(build.load_config(cfg)).state_dict()
        checkpoint.save_weights(folder / f"{name}.pt", state)
    ema = {name: value + 0.01 for name, value in checkpoint.load(folder / "video.pt")["model"].items()}
    checkpoint.save_weights(folder / "ema.pt", {"of": torch.zeros(1)}, ema=ema)
    return folder


def frequency(folder: Path, *words: str) -> tuple[str, ...]:
    files = ("--list", str(folder / "list.txt"), "--checkpoint", str(folder / "video.pt"))
    outputs = ("--out", str(folder / "f.png"), "--json", str(folder / "f.json"))
    return ("frequency", "--cfg", OCTAVE, *files, *outputs, *words, *SMALL, "DATA.PREFIX", str(folder))


def test_frequencies_beside_the_vanilla_twin(noisy: Path) -> None:
    against = ("--against-cfg", VANILLA, "--against-checkpoint", str(noisy / "video.pt"))
    said = say(*frequency(noisy, *against, "--maps", "150"), "OCTAVE.ALPHA", "0.5")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| stages")
    ]
    found = json.loads((noisy / "f.json").read_text())
    assert list(found) == ["stages.res2", "stages.res3", "stages.res4"]
    assert list(found["stages.res2"]) == ["vanilla", "high", "low", "low, own grid"]
    assert [row[:4] for row in rows[:4]] == [
        ["stages.res2", "vanilla", "2 x 8 x 8", "150"],
        ["stages.res2", "high", "2 x 8 x 8", "128"],  # of 2 videos with 32 channels and 2 frames
        ["stages.res2", "low", "2 x 4 x 4", "128"],
        ["stages.res2", "low, own grid", "2 x 4 x 4", "128"],
    ]
    for row in rows:
        space = found[row[0]][row[1]]["space"]
        if row[2].endswith(" 1 x 1"):
            assert row[5:9] == ["-"] * 4 and space["energy"] is None and space["even"] == space["count"]
            continue
        assert row[5] == f"{100 * space['below_half']:.1f}" and row[6] == f"{100 * space['white']:.1f}"
        assert sum(space["energy"]) == pytest.approx(1)
    # The same as asked of the network itself, which both videos were read for.
    lists = [*SMALL, "DATA.PREFIX", str(noisy), "OCTAVE.ALPHA", "0.5"]
    cfg = build.load_config(OCTAVE, lists)
    samples = build.eval_samples(cfg, build.video_list(cfg, str(noisy / "list.txt"), training=False), 1, 1)
    model = build.network(cfg)
    checkpoint.load_weights(model, checkpoint.load(noisy / "video.pt")["model"], noisy)
    inputs = [build.prepare_clips(cfg)(samples[index].clips) for index in (0, 1)]
    energy = spectra(model.eval(), inputs, layers=["stages.res3"], per_input=1000)["stages.res3"]["low"].space.energy
    few = say(*frequency(noisy, "--layers", "stages.res3"), "OCTAVE.ALPHA", "0.5")
    assert json.loads((noisy / "f.json").read_text())["stages.res3"]["low"]["space"]["energy"] == pytest.approx(energy)
    assert "vanilla" not in few and Image.open(noisy / "f.png").size[1] > 400  # space and time


def test_frequencies_of_images_and_of_a_moving_average(noisy: Path) -> None:
    cfg = str(ROOT / "configs/stills/oct_resnet_tiny.yaml")
    words = [
        "--checkpoint",
        str(noisy / "image.pt"),
        "--list",
        str(noisy / "images.txt"),
        "--out",
        str(noisy / "i.png"),
    ]
    said = say("frequency", "--cfg", cfg, *words, "DATA.PREFIX", str(noisy))
    assert "stages.res4" in said and "in time %" not in said
    assert Image.open(noisy / "i.png").size[1] < 400
    assert "150" in say(*frequency(noisy, "--maps", "150", "--checkpoint", str(noisy / "ema.pt"))).split()


@pytest.mark.parametrize(
    "words,message",
    [
        (["--maps", "0"], "--maps is 0; allowed: 1 or more"),
        (["--against-cfg", VANILLA], "go together"),
        (["--against-cfg", OCTAVE, "--against-checkpoint", "video.pt"], "is octave; give the vanilla twin"),
        (["--against-cfg", "configs/stills/resnet_tiny.yaml", "--against-checkpoint", "image.pt"], "takes images"),
        (["--layers", "stages.res2,stages.re3"], "no layer 'stages.re3' in ResNet; did you mean 'stages.res3'?"),
        (["--layers", "head"], "'head' has no maps of 5 dimensions"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
        (["--list", "nowhere.txt"], "nowhere.txt"),
        (["--out", "nowhere/f.png"], "nowhere"),
    ],
)
def test_frequency_s_wrong_requests_are_one_message(noisy: Path, words: list[str], message: str) -> None:
    full = [str(noisy / word) if (noisy / word).is_file() else word for word in words]
    full = [str(ROOT / word) if word.startswith("configs/") else word for word in full]
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        status = analyze.main(frequency(noisy, *full))
    assert status == (1 if message.endswith("no such checkpoint") else 2)  # a file, or the request
    assert message in err.getvalue() and err.getvalue().startswith("error: ")
