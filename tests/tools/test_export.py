"""Files of trained networks, run without octvideo; what is refused; nothing is kept that does not agree."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from octvideo import build
from octvideo.engine import checkpoint
from tools import export, predict

from .test_predict import write_video

ROOT = Path(__file__).parents[2]
VIDEO, IMAGES = (str(ROOT / f"configs/{name}.yaml") for name in ("motion/oct_i3d_tiny", "stills/oct_resnet_tiny"))
SMALL = ["NUM_THREADS", "1", "DATA.TEST_SHORT_SIDE", "36", "DATA.TEST_CROP", "32", "MODEL.NUM_CLASSES", "3"]
VANILLA = ["OCTAVE.ALPHA", "0"]  # where it does not matter: fewer steps to export
CLASSES = ["jump", "<b>&\"'", "rückwärts\nlaufen"]


def trained(folder: Path, cfg_path: str, **more: Any) -> Path:
    model = build.network(build.load_config(cfg_path, SMALL))
    return checkpoint.save(folder, 7, {"model": model.state_dict(), "epoch": 2, **more}, keep=1)


def average_of(cfg_path: str) -> dict[str, torch.Tensor]:
    """Other weights than `trained` has."""
    return build.network(build.load_config(cfg_path, [*SMALL, "SEED", "5"])).state_dict()


def run(*words: str | Path, status: int = 0, cfg: str = IMAGES) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = export.main(["--cfg", cfg, *map(str, words), *SMALL])
    assert got == status, out.getvalue() + err.getvalue()
    assert "Traceback" not in err.getvalue()
    assert bool(err.getvalue()) == bool(status)
    return out.getvalue(), err.getvalue()


def pixels(*size: int) -> torch.Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_the_moving_average_of_a_checkpoint_in_torch(tmp_path: Path) -> None:
    average = average_of(VIDEO)
    path = trained(tmp_path / "run", VIDEO, classes=CLASSES, ema=average)
    out, _ = run("--checkpoint", path, "--out", tmp_path / "net.pt2", "DATA.NUM_FRAMES", "5", *VANILLA, cfg=VIDEO)
    for text in (
        "i3d_tiny, alpha 0.0, fused",
        f"{path} (epoch 2, step 7, moving average)",
        f"{tmp_path}/net.pt2 (",
        "float32 N x 3 x 5 x 32 x 32, (RGB / 255 - [0.45, 0.45, 0.45]) / [0.225, 0.225, 0.225]",
        "float32 N x 3, classes with names",
        "e-07 of the largest logit",
        f"torch.export.load('{tmp_path}/net.pt2').module()(clips)",
    ):
        assert text in out

    cfg = build.load_config(VIDEO, [*SMALL, *VANILLA, "DATA.NUM_FRAMES", "5"])
    model = build.network(cfg).eval()
    model.load_state_dict(average)
    clips = build.prepare_clips(cfg)(pixels(2, 3, 5, 32, 32))
    files = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=files)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(clips), model(clips), rtol=1e-4, atol=1e-5)
    facts = json.loads(files["metadata.json"])
    assert json.loads(facts.pop("classes")) == CLASSES
    assert facts == {
        "octvideo": "0.1.0",
        "network": "i3d_tiny",
        "alpha": "0.0",
        "weights": f"{path} (epoch 2, step 7, moving average)",
        "short_side": "36",
        "crop": "32",
        "mean": "[0.45, 0.45, 0.45]",
        "std": "[0.225, 0.225, 0.225]",
        "num_frames": "5",
        "sampling_rate": "2",
        "target_fps": "0.0",
        "policy": "strided",
    }


def test_an_image_network_in_onnx_runtime(tmp_path: Path) -> None:
    """With what the file holds and NumPy alone."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import numpy as np

    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    trained(tmp_path / "run", IMAGES)
    names = ["DATA.CLASS_NAMES", tmp_path / "names.txt"]
    out, _ = run("--out", tmp_path / "net.onnx", *VANILLA, *names, "OUTPUT_DIR", tmp_path / "run")  # the newest one
    assert "resnet_tiny, alpha 0.0, fused" in out and "(epoch 2, step 7)" in out

    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == ["a", "b", "c"] and "num_frames" not in facts
    images = pixels(3, 3, 32, 32)
    mean, std = (np.array(json.loads(facts[key]), np.float32).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    (logits,) = session.run(["logits"], {"clip": (images.numpy() / np.float32(255) - mean) / std})

    cfg = build.load_config(IMAGES, [*SMALL, *VANILLA])
    with torch.no_grad():
        expected = build.network(cfg).eval()(build.prepare_clips(cfg)(images))
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_weights_of_another_alpha_are_remarked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = build.load_config(VIDEO, [*SMALL, "OCTAVE.ALPHA", "0.5"])
    path = trained(tmp_path / "run", VIDEO, config=cfg.dump())
    words = ["--cfg", VIDEO, "--checkpoint", str(path), "--out", str(tmp_path / "net.pt2"), *SMALL]
    assert export.main([*words, *VANILLA]) == 0
    assert capsys.readouterr().err == f"{path}: its weights were made with OCTAVE.ALPHA 0.5 (here 0.0)\n"
    assert export.main([*words, "OCTAVE.ALPHA", "0.5"]) == 0
    assert capsys.readouterr().err == ""
    path = trained(tmp_path / "run", VIDEO, config="[1]")
    assert export.main(words) == 0
    said = f"{path}: its weights were made with a configuration that cannot be read (not a mapping of sections"
    assert capsys.readouterr().err.startswith(said)


def test_what_is_replaced(tmp_path: Path) -> None:
    run("--random-weights", "--out", tmp_path / "net.pt2")
    out, _ = run("--random-weights", "--out", tmp_path / "net.pt2")
    assert f"replaced {tmp_path}/net.pt2\n" in out
    (tmp_path / "data.bin").write_bytes(b"mine")
    (tmp_path / "pom.xml").write_text("<project>")
    for name in ("data", "pom"):
        _, err = run("--random-weights", "--out", tmp_path / f"{name}.xml", status=2)
        assert f"{name}.bin is there, and not a network" in err
    assert (tmp_path / "data.bin").read_bytes() == b"mine" and (tmp_path / "pom.xml").read_text() == "<project>"


def test_what_does_not_agree_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "net.pt2"
    out.write_text("of before")
    monkeypatch.setattr(export, "fuse", lambda model: torch.nn.Sequential(model.eval(), torch.nn.Hardtanh(-1e-3, 1e-3)))
    _, err = run("--random-weights", "--out", out, *VANILLA, status=1)
    assert "net.pt2 differs from the network by " in err and "0.0001 is allowed; it was not kept" in err
    monkeypatch.setattr(export, "relative_error", lambda *_: float("nan"))
    monkeypatch.setattr(export.deploy, "export", lambda model, clip, path, metadata, check: check(path))
    run("--random-weights", "--out", out, *VANILLA, status=1)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("net.pt2", "of before")]


def test_an_untrained_network_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ["OUTPUT_DIR", tmp_path / "run"]
    _, err = run("--out", tmp_path / "net.pt2", *folder, status=1)
    assert "no checkpoint to export; train first or give --checkpoint FILE; --random-weights goes on without any" in err
    monkeypatch.setattr(export, "fuse", None)  # which --no-fuse does not call
    out, _ = run("--random-weights", "--no-fuse", "--out", tmp_path / "net.pt2", *VANILLA, *folder)
    assert "RANDOM WEIGHTS" in out and "alpha 0.0\n" in out and "classes without names" in out
    _, err = run("--out", tmp_path / "other.pt2", "--random-weights", status=2)
    assert "this network cannot be fused" in err and "--no-fuse exports it as it is" in err


def test_wrong_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = tmp_path / "net.pt2"
    for words, text in (
        (["--out", tmp_path / "net.trt"], "no format is known for '.trt'; choose from .onnx, .pt2, .xml"),
        (["--out", net, "--random-weights", "--checkpoint", "x.pt"], "contradict each other"),
        (["--out", net, "--random-weights", "DATA.TEST_CORP", "64"], "did you mean DATA.TEST_CROP"),
        (["--out", net, "DATA.TEST_CROP"], "DATA.TEST_CROP"),
    ):
        _, err = run(*words, status=2)
        assert text in err
    (tmp_path / "folder.pt2").mkdir()
    _, err = run("--random-weights", "--out", tmp_path / "folder.pt2", status=2)
    assert "is a folder; give the name of a file in it" in err
    _, err = run("--random-weights", "--out", net, cfg=str(tmp_path / "no.yaml"), status=2)
    assert "no.yaml" in err
    monkeypatch.setitem(sys.modules, "openvino", None)
    _, err = run("--random-weights", "--out", tmp_path / "net.xml", status=2)
    assert "pip install 'octvideo[openvino]'" in err
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        export.main(["--cfg", IMAGES])
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pt2"]


def test_failed_runs(tmp_path: Path) -> None:
    net = tmp_path / "net.pt2"
    _, err = run("--checkpoint", tmp_path / "no.pt", "--out", net, status=1)
    assert "no such checkpoint" in err
    path = trained(tmp_path / "run", IMAGES, classes=["one", "two"])
    _, err = run("--checkpoint", path, "--out", net, status=1)
    assert "its classes are no list of 3 names" in err
    _, err = run("--checkpoint", path, "--out", net, cfg=VIDEO, status=1)
    assert "entries do not fit" in err
    (tmp_path / "file").touch()
    _, err = run("--random-weights", "--out", tmp_path / "file" / "net.pt2", status=1)
    assert "could not be written" in err


@pytest.mark.slow
@pytest.mark.parametrize("frames", [20, 3])
def test_the_programs_of_the_document_say_what_predict_says(frames: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    reader, *programs = re.findall(r"```python\n(.*?)```", (ROOT / "docs/deployment.md").read_text(), re.S)[:3]
    (tmp_path / "clip.py").write_text(reader)
    write_video(tmp_path / "wide.mp4", 52, 36, frames)
    path = trained(tmp_path / "run", VIDEO, classes=["a", "b", "c"])
    state = checkpoint.load(path)
    torch.nn.init.normal_(state["model"]["head.fc.weight"], std=0.3)  # classes that are far apart
    checkpoint.save(tmp_path / "run", 8, state, keep=1)
    words = ["--clips", "1", "--crops", "1", "--out", str(tmp_path), "OUTPUT_DIR", str(tmp_path / "run"), *SMALL]
    assert predict.main([str(tmp_path / "wide.mp4"), "--cfg", VIDEO, *words]) == 0
    (video,) = json.loads((tmp_path / "predictions.json").read_text())["videos"]
    best = video["average"][0]
    for program, suffix in zip(programs, (".onnx", ".xml"), strict=True):
        (tmp_path / "classify.py").write_text(program)
        run("--out", tmp_path / f"net{suffix}", "OUTPUT_DIR", tmp_path / "run", cfg=VIDEO)
        words = [sys.executable, "classify.py", f"net{suffix}", "wide.mp4"]
        said = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        name, percent, _ = said.split()
        assert name == best["name"] and float(percent) == pytest.approx(100 * best["probability"], abs=0.06)
