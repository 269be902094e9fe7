"""Processes and runs on one GPU: DDP with NCCL and gloo, shared statistics, and a run that is resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from datasets import motion
from tests.devices import CUDA_ONLY

from . import norms_worker
from .runs import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def finish(commands: list[list[str]]) -> None:
    """Run the commands at the same time; fail with their output if one of them fails."""
    options = {"cwd": ROOT, "env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([sys.executable, *command], **options) for command in commands]
    try:
        outputs = [process.communicate(timeout=110)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)


@pytest.mark.parametrize("device", CUDA_ONLY)
def test_ddp_and_shared_statistics_equal_one_process(device: str, tmp_path: Path) -> None:
    """NCCL with one rank, beside gloo with two ranks that share the card and their norms' statistics."""
    alone = "nccl" if device == "cuda" else "gloo"
    ranks = [("gloo", rank, 2) for rank in range(2)]
    if alone == "nccl":
        ranks.append(("nccl", 0, 1))
    worker = ["-m", "tests.end_to_end.cuda_worker", str(tmp_path)]
    finish([[*worker, str(rank), str(size), backend, device] for backend, rank, size in ranks])
    net = norms_worker.network(torch.float64).to(device)
    clips, labels = norms_worker.clips(torch.float64).to(device), (torch.arange(6) % 5).to(device)
    expected = norms_worker.train(net, clips, labels)
    assert expected[-1] < 0.9 * expected[0]
    by_backend: dict[str, list[dict]] = {}
    for backend, rank, _ in ranks:
        by_backend.setdefault(backend, []).append(torch.load(tmp_path / f"{backend}_{rank}.pt", weights_only=True))
    for results in by_backend.values():
        means = [sum(step) / len(results) for step in zip(*(one["losses"] for one in results), strict=True)]
        assert means == pytest.approx(expected, rel=1e-6)
        for one in results:
            for name, value in net.state_dict().items():
                torch.testing.assert_close(one["state"][name], value.cpu(), rtol=1e-5, atol=1e-6, msg=name)


DETERMINISTIC = """
import sys, torch
torch.use_deterministic_algorithms(True, warn_only=True)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
from tools import run_net
sys.exit(run_net.main(sys.argv[1:]))
"""


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["event"] == "train"}


@pytest.mark.parametrize("device", CUDA_ONLY)
def test_a_resumed_run_ends_with_equal_losses(device: str, tmp_path: Path) -> None:
    """One epoch and one more, against two. The rate is constant, so the length of the run does not change it."""
    motion.make(tmp_path / "data", motion.Settings(train=4, val=1, size=48), workers=2)
    data = ["DATA.TRAIN_LIST", f"{tmp_path}/data/train.txt", "DATA.VAL_LIST", f"{tmp_path}/data/val.txt"]
    data += ["DATA.PREFIX", f"{tmp_path}/data"]
    small = [
        "DATA.TRAIN_SHORT_SIDE",
        "[36, 40]",
        "DATA.TRAIN_CROP",
        "32",
        "DATA.TEST_CROP",
        "32",
        "DATA.NUM_FRAMES",
        "4",
    ]
    run = ["TRAIN.BATCH_SIZE", "4", "TRAIN.VAL_PERIOD", "0", "TRAIN.LOG_PERIOD", "1", "TEST.ENABLE", "False"]
    run += ["SOLVER.SCHEDULE", "steps", "TRAIN.RESUME", "auto", "DEVICE", device, "DATA.TEST_SHORT_SIDE", "36"]

    def command(name: str, epochs: int) -> list[str]:
        own = ["TRAIN.EPOCHS", str(epochs), "OUTPUT_DIR", str(tmp_path / name)]
        return ["-c", DETERMINISTIC, "--cfg", "configs/motion/oct_i3d_tiny.yaml", *data, *small, *run, *own]

    finish([command("straight", 2), command("resumed", 1)])
    assert len(losses(tmp_path / "resumed")) == 8
    finish([command("resumed", 2)])
    straight, resumed = losses(tmp_path / "straight"), losses(tmp_path / "resumed")
    assert list(resumed) == list(straight) == list(range(1, 17))
    assert list(resumed.values()) == pytest.approx(list(straight.values()), rel=1e-3)
