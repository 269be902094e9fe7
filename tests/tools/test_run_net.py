"""The main job end to end on small videos made here: train, validate, test, resume, two processes, and bad input."""

import contextlib
import csv
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from octvideo import build
from octvideo.data.decode import BACKENDS, MissingDecoderError
from octvideo.engine import checkpoint
from octvideo.engine.metrics import topk_correct
from octvideo.engine.scores import ViewScores, aggregate
from octvideo.jobs import training
from tools import run_net

ROOT = Path(__file__).parents[2]
SMALL = [
    "NUM_THREADS",
    "1",
    "DATA.NUM_WORKERS",
    "0",
    "DATA.SAMPLING_RATE",
    "1",
    "DATA.NUM_FRAMES",
    "4",
    "SOLVER.WARMUP_EPOCHS",
    "1",
]
SMALL += ["DATA.TRAIN_SHORT_SIDE", "[36, 40]", "DATA.TRAIN_CROP", "32", "DATA.TEST_SHORT_SIDE", "36"]
SMALL += ["DATA.TEST_CROP", "32", "TRAIN.BATCH_SIZE", "4", "TRAIN.VAL_PERIOD", "1", "TRAIN.CHECKPOINT_PERIOD", "1"]
SMALL += ["MODEL.NUM_CLASSES", "2", "TEST.CLIPS", "2", "DEVICE", "cpu", "TRAIN.EPOCHS", "2"]


def write_video(path: Path, rng: np.random.Generator, bright: bool) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=15, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 48, 40, "yuv420p"
        for _ in range(8):
            low, high = (150, 255) if bright else (0, 105)
            frame = np.kron(rng.integers(low, high, (5, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos to train and five to test on, bright or dark; one path has a space."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5)):
        lines = []
        for index in range(count):
            name = f"{split} {index}.mp4" if index == 0 else f"{split}_{index}.mp4"
            write_video(folder / name, rng, bright=index % 2 == 1)
            lines.append(f"{name} {index % 2}")
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


def arguments(videos: Path, out: Path, *more: str) -> list[str]:
    lists = ["DATA.TRAIN_LIST", f"{videos}/train.txt", "DATA.VAL_LIST", f"{videos}/val.txt", "DATA.PREFIX", str(videos)]
    cfg = ["--cfg", str(ROOT / "configs/motion/oct_i3d_tiny.yaml")]
    return [*cfg, "OUTPUT_DIR", str(out), *lists, *SMALL, *more]


def run(command: list[str], status: int = 0) -> tuple[str, str]:
    """What run_net.py says on standard output and standard error, called in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = run_net.main(command)
    assert got == status, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


def run_processes(command: list[str], *launcher: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = [str(ROOT / "tools/run_net.py"), *command]
    done = subprocess.run(
        [sys.executable, *launcher, *script], capture_output=True, text=True, env=env, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("runs") / "one"
    return out, run(arguments(videos, out))[0]


def events(out: Path, kind: str) -> list[dict]:
    return [e for e in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if e["event"] == kind]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return checkpoint.latest(out)[1]["model"]


def test_what_a_run_leaves(trained: tuple[Path, str]) -> None:
    out, said = trained
    assert [p.name for p in checkpoint.found(out)] == ["checkpoint_00000002.pt", "checkpoint_00000004.pt"]
    assert "learning rate 0.1 at 32 clips -> 0.0125 at 4" in said
    assert "8 videos in batches of 4 clips" in said and "2 steps an epoch, 4 in total" in said
    assert [e["step"] for e in events(out, "epoch")] == [2, 4]
    assert len(events(out, "val")) == 2 and events(out, "val")[0]["videos_listed"] == 5
    assert [e["step"] for e in events(out, "train")] == [2, 4]
    test = json.loads((out / "test.json").read_text())
    assert (test["videos_scored"], test["videos_listed"], test["views"]) == (5, 5, 6)
    assert test["input"] == [3, 4, 32, 32] and test["epoch"] == 2 and test["failed"] == []
    assert test["params"] == 595186 and 0 <= test["top1"] <= test["top5"] == 100.0
    assert not [p for p in out.iterdir() if p.name.endswith(".tmp")]
    assert "OCTAVE" in (out / "config.yaml").read_text()


def test_resumed_after_the_first_epoch_it_ends_with_the_same_bits(
    videos: Path, trained: tuple[Path, str], tmp_path: Path
) -> None:
    out, _ = trained
    tmp_path.joinpath("run").mkdir()
    shutil.copy(out / "checkpoint_00000002.pt", tmp_path / "run")
    said = run(arguments(videos, tmp_path / "run", "TRAIN.RESUME", "auto", "TEST.ENABLE", "False"))[0]
    assert "step 2, after epoch 1\n" in said and "changed since then" not in said
    expected = weights(out)
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "run").items())


def test_a_signal_in_a_validation_stops_it_and_it_comes_again(
    videos: Path, trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, out = training.evaluate, tmp_path / "run"

    def signalled(*given, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", signalled)
        said, error = run(arguments(videos, out, "TEST.ENABLE", "False"), status=128 + signal.SIGTERM)
    assert (
        f"stopped by SIGTERM at step 2; saved {out}/checkpoint_00000002.pt; TRAIN.RESUME auto" in error
        and "val top-1" not in said
    )
    assert not events(out, "val") and checkpoint.latest(out)[1]["clips_in_epoch"] == 8
    said = run(arguments(videos, out, "TRAIN.RESUME", "auto", "TEST.ENABLE", "False"))[0]
    assert "step 2, after epoch 0 and 8 clips of the next\n" in said
    expected = weights(trained[0])
    assert all(torch.equal(value, expected[name]) for name, value in weights(out).items())
    for kind in ("train", "epoch", "val"):
        here, there = ([(e["step"], e.get("loss"), e.get("top1")) for e in events(o, kind)] for o in (out, trained[0]))
        assert here == there and len(here) == 2


def test_precise_statistics_are_those_of_the_training_clips_at_the_weights_of_now(videos: Path, tmp_path: Path) -> None:
    """The stem's norm reads what its convolution makes of the normalized clips: mean and variance by hand."""
    out, more = tmp_path / "out", ["TRAIN.PRECISE_NORM_BATCHES", "2", "TEST.ENABLE", "False"]
    run(arguments(videos, out, *more))
    state = checkpoint.latest(out)[1]["model"]
    cfg = build.load_config(arguments(videos, out)[1], arguments(videos, out)[2:])
    samples = build.train_samples(cfg, build.video_list(cfg, cfg.DATA.TRAIN_LIST, training=True))
    clips = build.prepare_clips(cfg)(torch.cat([samples[0, index].clips for index in range(8)]))
    model = build.network(cfg)
    model.load_state_dict(state)
    read = model.stem.conv(clips).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(state["stem.bn.running_mean"].double(), read.mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state["stem.bn.running_var"].double(), read.var(1), rtol=1e-4, atol=1e-6)


def test_settings_that_change_are_printed_applied_and_recorded(
    videos: Path, trained: tuple[Path, str], tmp_path: Path
) -> None:
    state = checkpoint.load(trained[0] / "checkpoint_00000002.pt")
    state["versions"]["torch"] = "1.0"
    torch.save(state, tmp_path / "checkpoint_00000002.pt")
    changed = ["TRAIN.RESUME", "auto", "TEST.ENABLE", "False", "SOLVER.BASE_LR", "0.05", "SOLVER.WEIGHT_DECAY", "0.9"]
    said = run(arguments(videos, tmp_path, *changed))[0]
    expected = ["SOLVER.BASE_LR 0.1 (here 0.05)", "SOLVER.WEIGHT_DECAY 0.0001 (here 0.9)"]
    expected.append(f"torch '1.0' (here {torch.__version__})")
    assert [line for line in said.splitlines() if "changed since then" in line] == [
        f"  changed since then, and used from now on: {line}" for line in expected
    ]
    (event,) = events(tmp_path, "run")
    assert (event["step"], event["changed"], event["config"]["SOLVER"]["WEIGHT_DECAY"]) == (2, expected, 0.9)
    groups = checkpoint.latest(tmp_path)[1]["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.9, 0.0]


def test_going_back_in_a_folder_with_later_checkpoints_is_refused(videos: Path, trained: tuple[Path, str]) -> None:
    first = trained[0] / "checkpoint_00000002.pt"
    error = run(arguments(videos, trained[0], "TRAIN.RESUME", str(first)), status=1)[1]
    assert "holds checkpoint_00000004.pt, later than" in error and "give another OUTPUT_DIR" in error
    assert len(checkpoint.found(trained[0])) == 2


def test_weights_alone_are_no_run_to_go_on_with(videos: Path, trained: tuple[Path, str], tmp_path: Path) -> None:
    checkpoint.save_weights(tmp_path / "inflated.pt", weights(trained[0]))
    error = run(arguments(videos, tmp_path / "out", "TRAIN.RESUME", str(tmp_path / "inflated.pt")), status=1)[1]
    assert f"inflated.pt: holds weights, not a run to resume; start from them with TRAIN.INIT {tmp_path}" in error
    assert not (tmp_path / "out").exists()


def test_a_folder_with_checkpoints_is_not_overwritten(videos: Path, trained: tuple[Path, str]) -> None:
    before = sorted(p.stat().st_mtime_ns for p in trained[0].glob("*.pt"))
    error = run(arguments(videos, trained[0]), status=1)[1]
    assert "holds checkpoints of an earlier run; resume it with TRAIN.RESUME auto" in error
    assert sorted(p.stat().st_mtime_ns for p in trained[0].glob("*.pt")) == before


def test_a_finished_run_goes_straight_to_the_test(videos: Path, trained: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(trained[0], out)
    said = run(arguments(videos, out, "TRAIN.RESUME", "auto"))[0]
    assert "epoch 1/2" not in said and "top-1" in said
    assert len(events(out, "test")) == 1  # the earlier one was repeated


def test_vanilla_tests_the_octave_checkpoint_since_the_state_dict_is_the_same(
    videos: Path, trained: tuple[Path, str], tmp_path: Path
) -> None:
    newest = checkpoint.found(trained[0])[-1]
    only_test = ["TRAIN.ENABLE", "False", "TEST.CHECKPOINT", str(newest)]
    remark = run(arguments(videos, tmp_path, *only_test, "OCTAVE.ALPHA", "0"))[1]
    assert f"{newest}: its weights were made with OCTAVE.ALPHA 0.25 (here 0.0)\n" in remark
    test = json.loads((tmp_path / "test.json").read_text())
    assert test["macs"] > json.loads((trained[0] / "test.json").read_text())["macs"]


def test_fine_tuning_takes_all_but_the_head(videos: Path, trained: tuple[Path, str], tmp_path: Path) -> None:
    newest = str(checkpoint.found(trained[0])[-1])
    three = ["MODEL.NUM_CLASSES", "3", "TRAIN.INIT", newest, "TEST.ENABLE", "False", "TRAIN.EPOCHS", "2"]
    lists = tmp_path / "three.txt"
    lists.write_text("train_1.mp4 0\ntrain_2.mp4 1\ntrain_3.mp4 2\ntrain_4.mp4 0\n")
    three += ["DATA.TRAIN_LIST", str(lists)]
    error = run(arguments(videos, tmp_path / "a", *three), status=1)[1]
    assert "head.fc.weight: (2, 512) in the file, (3, 512) in the network" in error
    assert "TRAIN.NEW_HEAD True" in error
    run(arguments(videos, tmp_path / "b", *three, "TRAIN.NEW_HEAD", "True"))
    assert weights(tmp_path / "b")["head.fc.weight"].shape == (3, 512)


def test_two_processes_train_and_test_each_video_once(videos: Path, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    out = tmp_path / "two"
    said = run_processes(arguments(videos, out), *torchrun)
    assert "(2 on each of 2 process(es), cpu)" in said
    assert said.count("epoch 1/2") == 1
    test = json.loads((out / "test.json").read_text())
    assert (test["videos_scored"], test["videos_listed"]) == (5, 5)
    assert len(events(out, "test")) == 1
    scores = ViewScores.load(out / "scores.npz")  # the rows of rank 0's videos 0, 2, 4, then of rank 1's 1, 3
    assert [v for i, v in enumerate(scores.video.tolist()) if i % 6 == 0] == [0, 2, 4, 1, 3]
    views = zip(scores.video.tolist(), scores.clip.tolist(), scores.crop.tolist(), strict=True)
    assert sorted(views) == [(v, clip, crop) for v in range(5) for clip in range(2) for crop in range(3)]
    top = topk_correct(aggregate(scores).probabilities, scores.labels, 1)
    assert 100 * top.double().mean().item() == pytest.approx(test["top1"])


def test_evaluation_counts_a_broken_video_as_wrong_and_names_it(
    videos: Path, trained: tuple[Path, str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes((videos / "val_1.mp4").read_bytes()[:300])
    (tmp_path / "list.txt").write_text(f"{broken} 1\nval_2.mp4 0\n")
    more = ["TRAIN.ENABLE", "False", "DATA.TEST_LIST", str(tmp_path / "list.txt")]
    more += ["TEST.CHECKPOINT", str(checkpoint.found(trained[0])[-1])]
    said = run(arguments(videos, tmp_path / "out", *more))[0]
    test = json.loads((tmp_path / "out/test.json").read_text())
    assert (test["videos_scored"], test["videos_listed"]) == (1, 2)
    assert test["top1"] <= 50.0
    assert test["failed"][0]["path"] == str(broken) and "counted as wrong" in said


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("damage", ["empty", "truncated", "audio only"])
def test_training_on_a_bad_file_is_one_message(videos: Path, tmp_path: Path, damage: str) -> None:
    bad = tmp_path / "bad.mp4"
    if damage == "audio only":
        audio_only(bad)
    else:
        bad.write_bytes((videos / "train_1.mp4").read_bytes()[: 300 if damage == "truncated" else 0])
    lines = [f"{bad} 1", *(f"train_{i}.mp4 {i % 2}" for i in range(2, 5))]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    more = ["DATA.TRAIN_LIST", str(tmp_path / "list.txt")]
    error = run(arguments(videos, tmp_path / "out", *more), status=1)[1]
    assert error.startswith("error: ") and str(bad) in error and "list.txt:1" in error
    assert not list((tmp_path / "out").glob("*.pt"))


def test_a_rate_that_explodes_ends_with_a_report(videos: Path, tmp_path: Path) -> None:
    more = ["SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_LR", "1e30", "TRAIN.EPOCHS", "9"]
    error = run(arguments(videos, tmp_path / "out", *more), status=1)[1]
    assert "was skipped: loss" in error and "TRAIN.MAX_NONFINITE allows 0; lower SOLVER.BASE_LR" in error
    (report,) = (tmp_path / "out").glob("nonfinite_*.json")
    assert len(json.loads(report.read_text())["paths"]) == 4


def test_parts_of_a_batch_and_clipping_from_the_command_line(videos: Path, tmp_path: Path) -> None:
    more = ["TRAIN.ACCUMULATE", "2", "SOLVER.CLIP_NORM", "1.0", "TRAIN.LOG_PERIOD", "1"]
    run(arguments(videos, tmp_path / "out", *more, "TEST.ENABLE", "False"))
    assert all(event["grad_norm"] > 0 for event in events(tmp_path / "out", "train"))


def test_a_run_of_iterations_ends_at_its_last_step(videos: Path, tmp_path: Path) -> None:
    more = [
        *("SOLVER.WARMUP_EPOCHS", "0"),
        "SOLVER.SCHEDULE",
        "iterations",
        "SOLVER.ITERATIONS",
        "[2, 1]",
        "SOLVER.BASE_BATCH",
        "4",
        "TRAIN.LOG_PERIOD",
        "1",
    ]
    said = run(arguments(videos, tmp_path / "out", *more, "TEST.ENABLE", "False"))[0]
    assert "steps at each rate [2, 1] of 4 clips -> 2 + 1 of 4" in said and "2 steps an epoch, 3 in total" in said
    assert [(e["step"], e["lr"]) for e in events(tmp_path / "out", "train")] == [
        (1, 0.1),
        (2, 0.1),
        (3, pytest.approx(0.01)),
    ]
    assert [e["step"] for e in events(tmp_path / "out", "val")] == [2, 3]
    assert checkpoint.latest(tmp_path / "out")[1]["step"] == 3
    error = run(arguments(videos, tmp_path / "no", "SOLVER.ITERATIONS", "[2, 1]"), status=2)[1]
    assert "SOLVER.ITERATIONS is [2, 1]; allowed: counts of steps where SCHEDULE is iterations, else []" in error


def test_float16_trains_on_a_cpu_and_keeps_its_scale(videos: Path, tmp_path: Path) -> None:
    run(arguments(videos, tmp_path / "out", "TRAIN.DTYPE", "float16", "TEST.ENABLE", "False", "TRAIN.LOG_PERIOD", "1"))
    state = checkpoint.latest(tmp_path / "out")[1]
    assert state["scaler"]["scale"] == 65536.0 / 2 ** len(events(tmp_path / "out", "overflow"))
    assert events(tmp_path / "out", "train")[-1]["scale"] == state["scaler"]["scale"]


def test_class_names_are_those_beside_the_list_and_go_into_the_checkpoint(videos: Path, tmp_path: Path) -> None:
    shutil.copytree(videos, tmp_path / "videos")
    names = tmp_path / "videos/labels.txt"
    names.write_text("dark\nbright\n")
    run(
        arguments(
            tmp_path / "videos",
            tmp_path / "out",
            "TRAIN.EPOCHS",
            "1",
            "SOLVER.WARMUP_EPOCHS",
            "0",
            "TEST.ENABLE",
            "False",
        )
    )
    assert checkpoint.latest(tmp_path / "out")[1]["classes"] == ["dark", "bright"]
    names.write_text("dark\nbright\nthird\n")
    error = run(arguments(tmp_path / "videos", tmp_path / "no"), status=2)[1]
    assert f"class names in {names}: 1 problem(s)\n  3 names, 3 of them different, for MODEL.NUM_CLASSES 2" in error
    error = run(arguments(videos, tmp_path / "no", "DATA.CLASS_NAMES", str(tmp_path / "gone.txt")), status=2)[1]
    assert "gone.txt: the file of class names cannot be read (No such file or directory)" in error
    assert not (tmp_path / "no").exists()


def test_a_profile_of_steps(videos: Path, tmp_path: Path) -> None:
    more = ["TRAIN.EPOCHS", "4", "TRAIN.VAL_PERIOD", "0", "TRAIN.PROFILE_STEPS", "2", "TEST.ENABLE", "False"]
    said = run(arguments(videos, tmp_path / "out", *more))[0]
    assert "profile: " in said
    with gzip.open(tmp_path / "out/profile/rank_0.json.gz") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]
    assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#5", "ProfilerStep#6"}
    assert "aten::avg_pool2d" in names  # the table has but the 30 operators that took longest on this machine
    assert "aten::convolution_backward" in (tmp_path / "out/profile/rank_0.txt").read_text()
    assert sorted(p.name for p in (tmp_path / "out/profile").iterdir()) == ["rank_0.json.gz", "rank_0.txt"]


@pytest.mark.slow
def test_compiled_it_trains_to_the_same_numbers(videos: Path, tmp_path: Path) -> None:
    for name, more in (("eager", ()), ("compiled", ("MODEL.COMPILE", "default"))):
        run(
            arguments(videos, tmp_path / name, "TRAIN.LOG_PERIOD", "1", "MODEL.DROPOUT", "0.0", *more)
        )  # it draws otherwise
    eager, compiled = ([e["loss"] for e in events(tmp_path / name, "train")] for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-3)
    assert weights(tmp_path / "eager").keys() == weights(tmp_path / "compiled").keys()


def test_compiling_without_a_compiler(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    error = run(arguments(videos, tmp_path / "no", "MODEL.COMPILE", "True"), status=2)[1]
    assert "MODEL.COMPILE is default" in error and "'no-such-compiler'" in error and "CXX" in error
    assert not (tmp_path / "no").exists()


def test_cuda_graphs_need_a_cuda_device(videos: Path, tmp_path: Path) -> None:
    error = run(arguments(videos, tmp_path / "no", "MODEL.COMPILE", "graphs", "DEVICE", "cpu"), status=2)[1]
    assert "MODEL.COMPILE is graphs, but the device is cpu" in error and "MODEL.COMPILE default" in error
    more = ["TRAIN.CHECKPOINT_ACTIVATIONS", "True", "TRAIN.ACCUMULATE", "2", "TRAIN.SYNC_NORM", "True"]
    error = run(arguments(videos, tmp_path / "no", "MODEL.COMPILE", "graphs", *more), status=2)[1]
    for key, value in zip(more[::2], more[1::2], strict=True):
        assert f"{key} is {value}" in error
    assert error.count("MODEL.COMPILE graphs") == 3


def test_recomputed_activations_change_no_bit_and_one_process_has_none_to_share_with(
    videos: Path, trained: tuple[Path, str], tmp_path: Path
) -> None:
    more = ["TRAIN.CHECKPOINT_ACTIVATIONS", "True", "TRAIN.SYNC_NORM", "True", "TEST.ENABLE", "False"]
    run(arguments(videos, tmp_path / "out", *more))
    expected = weights(trained[0])
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "out").items())


def test_a_moving_average_is_what_is_tested(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tested, load_weights = [], checkpoint.load_weights

    def noting(model: torch.nn.Module, weights: dict[str, torch.Tensor], source: Path, **more: bool) -> None:
        tested.append(weights["head.fc.weight"])
        load_weights(model, weights, source, **more)

    monkeypatch.setattr(checkpoint, "load_weights", noting)
    run(arguments(videos, tmp_path / "out", "TRAIN.EMA_DECAY", "0.999"))
    state = checkpoint.latest(tmp_path / "out")[1]
    assert not torch.equal(state["ema"]["head.fc.weight"], state["model"]["head.fc.weight"])
    (head,) = tested
    assert torch.equal(head, state["ema"]["head.fc.weight"])


def test_bfloat16_is_for_gpus(videos: Path, tmp_path: Path) -> None:
    error = run(arguments(videos, tmp_path / "no", "TRAIN.DTYPE", "bfloat16"), status=2)[1]
    assert "TRAIN.DTYPE is bfloat16" in error and "float32 or float16, or use a GPU" in error
    assert not (tmp_path / "no").exists()
    error = run(arguments(videos, tmp_path / "no", "TRAIN.DTYPE", "float8"), status=2)[1]
    assert "TRAIN.DTYPE is 'float8'; allowed: float32, float16, bfloat16" in error


def with_a_bad_file(videos: Path, folder: Path) -> list[str]:
    """A list of eight, one of them empty."""
    (folder / "bad.mp4").write_bytes(b"")
    lines = [f"{folder / 'bad.mp4'} 1", *(f"train_{i}.mp4 {i % 2}" for i in range(1, 8))]
    (folder / "list.txt").write_text("\n".join(lines) + "\n")
    return ["DATA.TRAIN_LIST", str(folder / "list.txt")]


def test_training_replaces_within_its_budget_and_says_so(videos: Path, tmp_path: Path) -> None:
    more = [*with_a_bad_file(videos, tmp_path), "DATA.MAX_FAILED_FRACTION", "0.2", "TRAIN.EPOCHS", "3"]
    out = run(arguments(videos, tmp_path / "out", *more))[0]
    assert out.count("replaced a clip that cannot be decoded") == 1 and "Traceback" not in out and "bad.mp4" in out
    failed = (tmp_path / "out" / "failed.txt").read_text()
    assert failed.startswith(f"{tmp_path}/list.txt:1: {tmp_path}/bad.mp4: ") and "\n  Traceback" in failed
    assert [e["video"] for e in events(tmp_path / "out", "failed")] == [0]
    assert len(checkpoint.found(tmp_path / "out")) == 3


def test_a_budget_that_is_spent_ends_the_training(videos: Path, tmp_path: Path) -> None:
    more = [*with_a_bad_file(videos, tmp_path), "DATA.MAX_FAILED_FRACTION", "0.05"]
    error = run(arguments(videos, tmp_path / "out", *more), status=1)[1]
    assert "1 clips of this epoch could not be decoded" in error and "allows 0. Most often:" in error
    assert "bad.mp4" in error and "(1 x)" in error


def test_a_decoder_that_is_not_installed(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str, max_pixels: int) -> None:
        raise MissingDecoderError("the decoder torchcodec cannot be loaded; pip install torchcodec==0.13.0")

    monkeypatch.setitem(BACKENDS, "torchcodec", missing)
    error = run(arguments(videos, tmp_path / "out", "DATA.DECODER", "torchcodec"), status=2)[1]
    assert error == "error: the decoder torchcodec cannot be loaded; pip install torchcodec==0.13.0\n"


def test_an_evaluation_never_replaces(videos: Path, tmp_path: Path, trained: tuple[Path, str]) -> None:
    shutil.copytree(trained[0], tmp_path / "out")
    bad = with_a_bad_file(videos, tmp_path)[1]
    more = ["TRAIN.ENABLE", "False", "DATA.TEST_LIST", bad, "DATA.MAX_FAILED_FRACTION", "0.9"]
    out = run(arguments(videos, tmp_path / "out", *more))[0]
    assert "7 of 8 videos scored" in out and "counted as wrong" in out
    assert (tmp_path / "out" / "test_failed.txt").read_text().startswith(f"{tmp_path}/bad.mp4\t{tmp_path}/list.txt:1: ")


@pytest.mark.parametrize(
    "text,message",
    [
        ("none.mp4 0\ntrain_1.mp4 1\n", "list.txt:1"),
        ("train_1.mp4\ntrain_2.mp4 0\n", "list.txt:1"),
        ("train_1.mp4 1\ntrain_2.mp4 2\n", "list.txt:2"),
        ("train_1.mp4 0\ntrain_2.mp4 0\ntrain_3.mp4 0\ntrain_4.mp4 0\n", "MODEL.NUM_CLASSES"),
        ("", "list.txt"),
        ("train_1.mp4 1\ntrain_2.mp4 0\n", "4"),
    ],
)
def test_bad_lists_stop_before_anything_is_written(videos: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    error = run(arguments(videos, tmp_path / "out", "DATA.TRAIN_LIST", str(tmp_path / "list.txt")), status=2)[1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


def test_a_bad_test_list_stops_before_the_training(videos: Path, tmp_path: Path) -> None:
    error = run(arguments(videos, tmp_path / "out", "DATA.TEST_LIST", str(tmp_path / "none.txt")), status=2)[1]
    assert "none.txt" in error and not (tmp_path / "out").exists()


def test_bad_configs(videos: Path, tmp_path: Path) -> None:
    error = run(arguments(videos, tmp_path, "DATA.NUM_FRAMES", "1", "TEST.CLIPS", "0"), status=2)[1]
    assert "TEST.CLIPS is 0; allowed: 1 or more" in error
    error = run(arguments(videos, tmp_path, "DATA.NUM_FRAMES", "1"), status=2)[1]
    assert "anything larger" in error
    error = run(arguments(videos, tmp_path, "MODEL.NAM", "x"), status=2)[1]
    assert "did you mean MODEL.NAME?" in error
    error = run(["--cfg", "configs/none.yaml"], status=2)[1]
    assert "configs/none.yaml" in error and "no such file" in error
    assert list(tmp_path.iterdir()) == []


def test_testing_without_a_checkpoint(videos: Path, tmp_path: Path) -> None:
    error = run(arguments(videos, tmp_path / "out", "TRAIN.ENABLE", "False"), status=1)[1]
    assert "no checkpoint to test; train first or give TEST.CHECKPOINT FILE" in error


def test_a_test_list_of_classes_in_another_order_stops_before_the_training(videos: Path, tmp_path: Path) -> None:
    for name, names in (("train", "dark\nbright"), ("test", "bright\ndark")):
        (tmp_path / name).mkdir()
        shutil.copy(videos / ("train.txt" if name == "train" else "val.txt"), tmp_path / name / "list.txt")
        (tmp_path / name / "labels.txt").write_text(names)
    train, test = (str(tmp_path / name / "list.txt") for name in ("train", "test"))
    more = ["DATA.TRAIN_LIST", train, "DATA.TEST_LIST", test]
    error = run(arguments(videos, tmp_path / "out", *more), status=1)[1]
    assert error.startswith(f"error: {test}: 2 of 2 labels mean something else in {train} than in {test}")
    assert not (tmp_path / "out").exists()


def test_what_a_test_leaves_is_what_evaluate_leaves(trained: tuple[Path, str]) -> None:
    out = trained[0]
    test = json.loads((out / "test.json").read_text())
    assert (test["average"], test["videos_incomplete"]) == ("softmax", 0) and 0 <= test["calibration_error"] <= 100
    assert test["mean_class_accuracy"] == pytest.approx(np.mean([100 * c / n for c, n in correct_of_classes(out)]))
    assert (out / "confusion.csv").read_text().startswith("label,0,1,not scored\n0,")
    assert len(ViewScores.load(out / "scores.npz").logits) == 5 * 6


def correct_of_classes(out: Path) -> list[tuple[int, int]]:
    rows = csv.DictReader(io.StringIO((out / "classes.csv").read_text()))
    return [(int(row["correct"]), int(row["videos"])) for row in rows]


THEIRS = """
from torch import nn

def network(num_classes):
    conv, norm = nn.Conv3d, nn.BatchNorm3d
    layers = [conv(3, 8, 3, padding=1), norm(8), nn.ReLU(inplace=True), conv(8, 8, 3, padding=1), norm(8), nn.SiLU()]
    layers += [conv(8, 16, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, num_classes))

def wide(num_classes):
    return network(7)

def by_value(num_classes):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network(num_classes)
        def forward(self, x):
            return self.net(x) if x.mean() > 0 else self.net(-x)
    return Odd()

nothing = 3
"""


@pytest.fixture
def their_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "their_networks.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "their_networks"


def test_a_network_of_another_package_trains_octave(videos: Path, tmp_path: Path, their_module: str) -> None:
    out = tmp_path / "run"
    factory = ["MODEL.FACTORY", f"{their_module}:network"]
    said, _ = run(arguments(videos, out, *factory))
    assert "their_networks:network (octave alpha 0.25, pool (1, 2, 2)): 0.006 M parameters" in said
    test = json.loads((out / "test.json").read_text())
    assert test["videos_scored"] == 5 and test["params"] == 5930 and test["model"] == "their_networks:network"
    octave, vanilla = (
        build.load_config(ROOT / "configs/motion/oct_i3d_tiny.yaml", [*arguments(videos, out, *factory)[2:], *more])
        for more in ([], ["OCTAVE.ALPHA", "0.0"])
    )
    assert weights(out).keys() == build.network(vanilla).state_dict().keys()
    assert test["macs"] < build.cost(vanilla, 32).macs.total  # 32 x 32 maps: the two layers behind the first
    assert build.cost(octave, 32).macs.total == test["macs"]


WRONG_FACTORIES = {
    "no_such_module:network": "MODEL.FACTORY is no_such_module:network: ModuleNotFoundError",
    "their_networks:missing": "AttributeError: module 'their_networks' has no attribute 'missing'",
    "their_networks:nothing": "TypeError: 'int' object is not callable; give package.module:function",
    "their_networks:wide": "its network gives (1, 7) for one clip, not logits (1, 2)",
    "their_networks:by_value": "`keep` takes parts of a network; this line must change",
    "network": "MODEL.FACTORY is 'network'; allowed: package.module:function",
}


@pytest.mark.parametrize("name", WRONG_FACTORIES)
def test_a_factory_that_gives_no_such_network_is_named(
    videos: Path, tmp_path: Path, their_module: str, name: str
) -> None:
    _, error = run(arguments(videos, tmp_path / "run", "MODEL.FACTORY", name), status=2)
    assert error.startswith("error: ") and WRONG_FACTORIES[name] in error
    assert not (tmp_path / "run").exists()


def test_what_a_factory_s_network_cannot_do_is_said(videos: Path, tmp_path: Path, their_module: str) -> None:
    asked = ["MODEL.FACTORY", f"{their_module}:network", "TRAIN.CHECKPOINT_ACTIVATIONS", "True", "OCTAVE.ALPHA", "0.0"]
    _, error = run(arguments(videos, tmp_path / "run", *asked, "TRAIN.SYNC_NORM", "True"), status=2)
    assert "TRAIN.CHECKPOINT_ACTIVATIONS is True; allowed: False with MODEL.FACTORY" in error
    assert "TRAIN.SYNC_NORM is True; allowed: False with MODEL.FACTORY unless OCTAVE.ALPHA" in error
