"""Norms of two processes: synchronized, measured, computed again; each against one process with all the clips."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from . import norms_worker as worker

ROOT = Path(__file__).parents[2]
Results = list[dict[str, Any]]
each_dtype = pytest.mark.parametrize("kind", worker.DTYPES)
TOLERANCE = {"float64": {"rtol": 1e-10, "atol": 1e-10}, "float32": {"rtol": 1e-5, "atol": 1e-5}}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What either of the two processes left."""
    folder = tmp_path_factory.mktemp("ranks")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("norms_worker.py")), str(folder)]
    both = [
        subprocess.Popen([*command, str(rank)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@each_dtype
@pytest.mark.parametrize("name", worker.NORMS)
def test_a_norm_s_outputs_gradients_and_statistics_are_those_of_the_whole_batch(
    ranks: Results, name: str, kind: str
) -> None:
    whole = worker.norm_results(name, worker.DTYPES[kind], slice(0, 5))
    first, second = (rank[f"{name} {kind}"] for rank in ranks)
    for of in whole.keys() & {"y", "dx", "evaluated"}:
        joined = [torch.cat(parts) for parts in zip(first[of], second[of], strict=True)]
        torch.testing.assert_close(joined, whole[of], **TOLERANCE[kind], msg=lambda text, of=of: f"{of}: {text}")
    summed = [sum(parts) for parts in zip(first["dw"], second["dw"], strict=True)]
    torch.testing.assert_close(summed, whole["dw"], **TOLERANCE[kind])
    torch.testing.assert_close(first["state"], whole["state"], **TOLERANCE[kind])
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "rel"), [("float64", 1e-10), ("float32", 1e-5)])
def test_a_network_s_losses_are_those_of_one_process(ranks: Results, kind: str, rel: float) -> None:
    dtype = worker.DTYPES[kind]
    net = worker.network(dtype)
    losses = worker.train(net, worker.clips(dtype), torch.arange(6) % 5)
    both = [rank[f"network {kind} False"] for rank in ranks]
    assert losses[-1] < 0.9 * losses[0]
    means = [sum(step) / 2 for step in zip(*(one["losses"] for one in both), strict=True)]
    assert means == pytest.approx(losses, rel=rel)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(both[0]["state"][name], value, rtol=100 * rel, atol=10 * rel, msg=name)
        assert torch.equal(both[0]["state"][name], both[1]["state"][name]), name


@each_dtype
def test_recomputed_blocks_change_no_bit_in_processes_that_share_statistics(ranks: Results, kind: str) -> None:
    for rank in ranks:
        kept, recomputed = rank[f"network {kind} False"], rank[f"network {kind} True"]
        assert kept["losses"] == recomputed["losses"]
        torch.testing.assert_close(recomputed["gradients"], kept["gradients"], rtol=0, atol=0)
        torch.testing.assert_close(recomputed["state"], kept["state"], rtol=0, atol=0)


@pytest.mark.parametrize("synchronized", [False, True])
def test_precise_statistics_are_those_of_all_ranks_batches(ranks: Results, synchronized: bool) -> None:
    a, b, c = worker.clips(torch.float64).split(2)
    # synchronized: the ranks' n-th batches are normalized as one
    batches = [torch.cat([a, c]), torch.cat([b, a[:1]])] if synchronized else [a, b, c, a[:1]]
    alone = worker.measured(batches, synchronized=False)
    for rank in ranks:
        torch.testing.assert_close(rank[f"measured {synchronized}"], alone, rtol=1e-9, atol=1e-9)
