"""The flags of a request and their errors; sweeps."""

from pathlib import Path

import pytest

from octvideo import build
from tests.end_to_end.runs import ROOT
from tests.launch.requests import CONFIG, error_of


@pytest.mark.parametrize(
    "flags,text",
    [
        (["--slurm", "--local", "2"], "--slurm and --local ask for two places; give one"),
        (["--nodes", "2"], "--nodes is for --slurm; give that too"),
        (["--local", "2", "--wait", "--array-overrides", "x"], "--array-overrides is for --slurm"),
        (["--local", "-1"], "--local is -1; allowed: 0 or more"),
        (["--slurm", "--nodes", "0"], "--nodes is 0; allowed: 1 or more"),
        (["--slurm", "--gpus-per-node", "-1"], "--gpus-per-node is -1; allowed: 0 or more"),
        (["--slurm", "--mem-gb", "0"], "--mem-gb is 0; allowed: 0.001 to 999999 (leave it out"),
        (["--slurm", "--mem-gb", "nan"], "--mem-gb is nan; allowed"),
        (["--slurm", "--time-min", "0"], "--time-min is 0; allowed: 1 or more"),
        (["--slurm", "--time-min", "2"], "--signal-delay-s is 120; allowed: below --time-min's 2 min"),
        (["--slurm", "--partition", "a\n#SBATCH --uid=0"], r"--partition is 'a\n#SBATCH --uid=0'; give a name"),
        (["--slurm", "--nodes", "0", "--cpus-per-task", "0"], "2 problem(s) with where to run"),
        (["--slurm", "--mem-gb", "0.0001"], "--mem-gb is 0.0001; allowed: 0.001 to 999999"),  # 0 MB would mean all
        (["--slurm", "--time-min", "1000000"], "--time-min is 1000000; allowed: at most 527040"),
        (["--slurm", "--signal-delay-s", "70000"], "--signal-delay-s is 70000; allowed: at most 65535"),
        (["--slurm", "--array-overrides", "/nowhere"], "--array-overrides /nowhere: cannot be read"),
    ],
)
def test_wrong_flags_are_one_message(capsys: pytest.CaptureFixture[str], flags: list[str], text: str) -> None:
    assert text in error_of(capsys, *flags)


def test_without_slurm_here_the_message_says_so(
    lists: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = error_of(capsys, "--slurm", *lists, "OUTPUT_DIR", str(tmp_path / "run"))
    assert error == "error: --slurm needs sbatch, which is not on PATH; log in to a node of the cluster\n"
    assert not (tmp_path / "run").exists()


def test_ranks_do_not_start_ranks(
    lists: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert "this is already rank 1 of 2 processes" in error_of(capsys, "--slurm", *lists)


def test_every_line_of_a_sweep_is_checked_before_anything_is_submitted(
    lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("SEED 1 # fine\n\nSEED -1\nTRAIN.EPOCH 3\nSEED\nOUTPUT_DIR same\nOUTPUT_DIR ./same\n")
    error = error_of(capsys, "--slurm", "--array-overrides", str(sweep), *lists)
    for text in (
        "line 3: SEED is -1; allowed: 0 or more",
        "line 4: unknown key TRAIN.EPOCH",
        "line 5: override 'SEED' has no value",
        f"line 7: OUTPUT_DIR ./same is that of {sweep}, line 6 already",
    ):
        assert text in error, error
    sweep.write_text("SEED '1\n")
    assert "line 1: No closing quotation" in error_of(capsys, "--slurm", "--array-overrides", str(sweep), *lists)
    sweep.write_text("# nothing\n")
    assert "no line with KEY VALUE pairs" in error_of(capsys, "--slurm", "--array-overrides", str(sweep), *lists)


def test_lines_of_a_sweep_get_folders_of_their_own(lists: list[str]) -> None:
    lines = [("a, line 1", ["SEED", "1"]), ("a, line 2", ["OUTPUT_DIR", "b"]), ("a, line 3", [])]
    cfgs = build.load_sweep(CONFIG, [*lists, "OUTPUT_DIR", "runs/x"], lines)
    assert [(cfg.OUTPUT_DIR, cfg.SEED) for cfg in cfgs] == [("runs/x/0", 1), ("b", 0), ("runs/x/2", 0)]


@pytest.mark.parametrize("name", ["motion/oct_i3d_tiny", "kinetics400/oct_slowfast_r50_4x16_a0.1", "imagenet/resnet50"])
def test_the_text_that_a_job_is_given_is_the_same_configuration(name: str, lists: list[str], tmp_path: Path) -> None:
    cfg = build.load_config(ROOT / f"configs/{name}.yaml", [*lists, "SOLVER.BASE_LR", "1e-05"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert build.load_config(tmp_path / "config.yaml") == cfg
