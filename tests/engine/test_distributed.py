import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from octvideo.engine import distributed, meeting
from octvideo.engine.distributed import DistributedError, World
from octvideo.files import HOST

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
STEP = {  # as srun gave them to the second task of `srun -N2 -n3`
    "SLURM_JOB_ID": "45678",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in NAMES or name.startswith(("SLURM_", "TORCHELASTIC_")) or name == "LOCAL_WORLD_SIZE":
            monkeypatch.delenv(name)


def setenv(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_alone() -> None:
    world = distributed.world_from_environment()
    assert world == World(0, 1, 0) and world.main
    assert torch.equal(distributed.all_reduce(torch.ones(2)), torch.ones(2))
    assert distributed.gather_objects("a") == ["a"]
    rows = torch.arange(6).view(3, 2)
    assert distributed.gather_rows(rows, torch.device("cpu")) is rows


def test_torchrun_s_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("3", "4", "1", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    world = distributed.world_from_environment()
    assert world == World(3, 4, 1, 4, "localhost", 1) and not world.main
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert distributed.world_from_environment() == World(3, 4, 1, 2, "localhost", 1)


def test_half_an_environment_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistributedError, match="RANK, WORLD_SIZE are set but LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        distributed.world_from_environment()


def test_rank_outside_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("4", "4", "0", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match="RANK is 4 but WORLD_SIZE is 4"):
        distributed.world_from_environment()


def test_device() -> None:
    assert distributed.device_of("cpu", World()) == torch.device("cpu")
    if torch.cuda.is_available():
        assert distributed.device_of("auto", World()) == torch.device("cuda", 0)
    else:
        assert distributed.device_of("auto", World()) == torch.device("cpu")
        with pytest.raises(DistributedError, match="torch sees no GPU"):
            distributed.device_of("cuda", World())


def test_values_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, RANK="0", WORLD_SIZE="two", LOCAL_RANK="0", MASTER_ADDR="a", MASTER_PORT="1")
    with pytest.raises(DistributedError, match="WORLD_SIZE is 'two'; it must be an integer"):
        distributed.world_from_environment()


def test_local_rank_outside_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(
        monkeypatch, RANK="3", WORLD_SIZE="4", LOCAL_RANK="3", MASTER_ADDR="a", MASTER_PORT="1", LOCAL_WORLD_SIZE="2"
    )
    with pytest.raises(DistributedError, match="LOCAL_RANK is 3, LOCAL_WORLD_SIZE 2 and WORLD_SIZE 4"):
        distributed.world_from_environment()


def test_slurm_s_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, **STEP)
    assert distributed.world_from_environment() == World(1, 3, 1, 2, "gpu03", 10000 + 45678 - 2 * 20000)
    setenv(monkeypatch, SLURM_PROCID="2", SLURM_LOCALID="0", SLURM_NODEID="1", MASTER_ADDR="fast", MASTER_PORT="77")
    assert distributed.world_from_environment() == World(2, 3, 0, 1, "fast", 77)


@pytest.mark.parametrize("step", ["4294967291", "4294967290", ""])
def test_the_shell_of_a_job_is_no_rank(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """sbatch's and salloc's have SLURM_NTASKS and SLURM_PROCID 0, and no step, or a number that stands for none."""
    setenv(monkeypatch, **STEP, SLURM_NTASKS="8")
    if step:
        monkeypatch.setenv("SLURM_STEP_ID", step)
    else:
        monkeypatch.delenv("SLURM_STEP_ID")
    assert distributed.world_from_environment() == World()


@pytest.mark.parametrize(
    "values,match",
    [
        ({"SLURM_PROCID": "3"}, "contradict each other: SLURM_PROCID 3, SLURM_STEP_NUM_TASKS 3"),
        ({"SLURM_LOCALID": "2"}, "contradict each other: .*SLURM_LOCALID 2"),
        ({"SLURM_NODEID": "2"}, "contradict each other: .*SLURM_NODEID 2"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "contradict each other: .*SLURM_STEP_TASKS_PER_NODE 2,1"),
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE is 'two'; it must look like 2(x3),1"),
        ({"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is ''"),
        ({"SLURM_PROCID": ""}, "SLURM_PROCID is ''; it must be an integer"),
    ],
)
def test_a_step_that_contradicts_itself(monkeypatch: pytest.MonkeyPatch, values: dict[str, str], match: str) -> None:
    setenv(monkeypatch, **{**STEP, **values})
    with pytest.raises(DistributedError, match=match.replace("(x3)", r"\(x3\)")):
        distributed.world_from_environment()


def test_half_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, SLURM_STEP_ID="0", SLURM_PROCID="0")
    with pytest.raises(DistributedError, match="SLURM_STEP_ID is set but SLURM_STEP_NUM_TASKS, SLURM_LOCALID"):
        distributed.world_from_environment()


@pytest.mark.parametrize(
    "rank,size,local_size,agrees",
    [
        (1, 3, 2, True),  # a person's script: RANK=$SLURM_PROCID
        (5, 12, 4, True),  # one torchrun with 4 processes on each task
        (0, 3, 2, False),  # another rank than SLURM's
        (0, 1, 1, False),  # every task trains alone
        (1, 4, 4, False),  # every task has a torchrun that knows nothing of the others
    ],
)
def test_torchrun_within_a_step(
    monkeypatch: pytest.MonkeyPatch, rank: int, size: int, local_size: int, agrees: bool
) -> None:
    setenv(monkeypatch, **STEP, RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(local_size))
    setenv(monkeypatch, LOCAL_RANK=str(rank % local_size), MASTER_ADDR="a", MASTER_PORT="1")
    if agrees:
        assert distributed.world_from_environment() == World(rank, size, rank % local_size, local_size, "a", 1)
    else:
        with pytest.raises(DistributedError, match="but SLURM started task 1 of 3 here, so several runs would write"):
            distributed.world_from_environment()


@pytest.mark.parametrize(
    "nodes,first",
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-05,9]", "gpu03"),
        ("gpu[7,9]-ib,login", "gpu7-ib"),
        ("rack[1-2]node[3-4]", "rack1node3"),
        ("octnode[1-2]", "octnode1"),
        ("a-b.cluster,c", "a-b.cluster"),
    ],
)
def test_the_first_of_slurm_s_nodes(nodes: str, first: str) -> None:
    assert distributed._first_host(nodes) == first


def test_slurm_s_tasks_per_node() -> None:
    assert distributed._tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert distributed._tasks_per_node("8") == [8]


def test_gpus_of_slurm_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SLURM_STEP_GPUS", "0,1")
    with pytest.raises(DistributedError, match="SLURM gave GPUs 0,1 to this job, but torch sees none"):
        distributed.device_of("auto", World())
    assert distributed.device_of("cpu", World()) == torch.device("cpu")


CPU = torch.device("cpu")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answers_of(work: Any, ranks: int, missing: int | None = None) -> dict[int, Any]:
    """Rank r -> what work(World of rank r) returns, or the message that it raises, in a separate process for each rank.

    missing: a rank that does not answer, and is killed at the end.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    answers = context.Queue()

    def rank_of(rank: int) -> None:
        try:
            answers.put((rank, work(World(rank, ranks, rank, ranks, "127.0.0.1", port))))
        except DistributedError as error:
            answers.put((rank, str(error)))

    processes = [context.Process(target=rank_of, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        return dict(answers.get(timeout=60) for rank in range(ranks) if rank != missing)
    finally:
        if missing is not None:
            processes[missing].kill()
        for process in processes:
            process.join(60)


def test_a_barrier_names_the_rank_that_does_not_join() -> None:
    def work(world: World) -> str:
        distributed.start(world, CPU)
        distributed.barrier("first")
        distributed.barrier("second", timedelta(seconds=30))
        if world.rank == 2:
            time.sleep(4)
        distributed.barrier("third", timedelta(seconds=2))
        return "all joined"

    message = f"third: rank 2 on {HOST} did not join within 2 s (3 ranks in total)"
    answers = answers_of(work, 3)
    assert answers[0].startswith(message) and answers[1].startswith(message), answers
    assert answers[2].startswith("third: "), answers  # it learns of its own lateness, or that rank 0 has left


def test_a_barrier_reports_that_rank_0_is_gone() -> None:
    def work(world: World) -> str:
        distributed.start(world, CPU)
        if world.main:
            distributed.stop()
            return "left"
        distributed.barrier("later", timedelta(seconds=0.2))
        return "all joined"

    answers = answers_of(work, 2)
    assert answers[0] == "left"
    assert answers[1].startswith(f"later: rank 0 on {HOST} is gone, or has not joined within 0.2 s"), answers


def step_of(world: World) -> Callable[[], Any]:
    """A training step, whose gradients are summed in backward()."""
    model = DistributedDataParallel(nn.Linear(4, 4))
    return lambda: model(torch.ones(2, 4)).sum().backward()


COLLECTIVES: dict[str, Callable[[World], Callable[[], Any]]] = {
    "gradients": step_of,
    "all_reduce": lambda world: lambda: distributed.all_reduce(torch.ones(2)),
    "all_reduce_max": lambda world: lambda: distributed.all_reduce_max(torch.ones(2)),
    "gather_objects": lambda world: lambda: distributed.gather_objects("a"),
    "gather_rows": lambda world: lambda: distributed.gather_rows(torch.ones(2, 2), CPU),
    "broadcast_buffers": lambda world: partial(distributed.broadcast_buffers, nn.BatchNorm1d(4)),
    "HostMax": lambda world: partial(lambda largest: [largest(1) for _ in range(3)], distributed.HostMax()),
}


def hang() -> None:
    time.sleep(60)


def fail() -> None:
    raise ValueError("no room")


FATES: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hangs": hang,
    "fails": fail,
}


@pytest.mark.parametrize(
    ("collective", "fate", "missing", "text"),
    [
        ("gradients", "hangs", 2, "did not join the other ranks: "),
        ("all_reduce", "stopped", 0, "no answer from"),
        ("all_reduce_max", "killed", 0, "no answer from"),
        ("gather_objects", "hangs", 0, "did not join the other ranks: "),
        ("gather_objects", "fails", 1, "failed: ValueError: no room"),
        ("gather_rows", "stopped", 1, "no answer from"),
        ("broadcast_buffers", "hangs", 0, "did not join the other ranks: "),
        ("HostMax", "killed", 2, "no answer from"),
    ],
)
def test_whichever_collective_a_rank_does_not_join_it_is_named(
    collective: str, fate: str, missing: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "ANSWER_S", 2.0)

    def work(world: World) -> str:
        distributed.start(world, CPU, timeout=timedelta(seconds=3))
        with distributed.named_ranks():
            call = COLLECTIVES[collective](world)
            call()
            if world.rank == missing:
                FATES[fate]()
            call()
        return "all joined"

    answers = answers_of(work, 3, missing)
    for answer in answers.values():
        assert f"rank {missing} on {HOST}" in answer and text in answer, answers
        assert not any(f"rank {rank} on" in answer for rank in range(3) if rank != missing), answers
        assert ("test_distributed.py" in answer and ", hang)" in answer) == (fate == "hangs"), answers


def test_a_barrier_does_not_wait_without_a_limit_for_a_rank_0_that_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "GRACE_S", 0.5)
    monkeypatch.setattr(meeting, "ANSWER_S", 0.5)

    def work(world: World) -> str:
        distributed.start(world, CPU)
        if world.main:
            os.kill(os.getpid(), signal.SIGSTOP)
        distributed.barrier("save", timedelta(seconds=0.5))
        return "all joined"

    (answer,) = answers_of(work, 2, missing=0).values()
    assert answer.startswith(f"save: rank 0 on {HOST} is gone, or has not joined within 0.5 s"), answer


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="a mistake"), distributed.named_ranks():
        raise RuntimeError("a mistake")


def test_the_hosts_agree_on_the_largest_number_one_call_later() -> None:
    def work(world: World) -> list[int]:
        distributed.start(world, CPU)
        largest = distributed.HostMax()
        seen = [largest(number) for number in ((0, 0, 5, 0, 0) if world.rank == 1 else (0, 2, 0, 0, 0))]
        distributed.barrier("end")
        distributed.stop()
        return seen

    assert answers_of(work, 3) == {rank: [0, 0, 2, 5, 0] for rank in range(3)}
    alone = distributed.HostMax()
    assert [alone(0), alone(3), alone(0)] == [0, 3, 0]


def test_a_start_names_the_ranks_that_do_not_join() -> None:
    def work(world: World) -> str:
        if world.rank in (1, 3):
            return "not here"
        distributed.start(world, CPU, meet_within=timedelta(seconds=1))
        return "started"

    answers = answers_of(work, 4)
    assert answers[0].startswith("start: rank 1, rank 3 did not join within 1 s (4 ranks in total)"), answers
    assert answers[2].startswith("start: "), answers


def test_nobody_listens_where_rank_0_should_be() -> None:
    world = World(1, 2, 1, 2, "127.0.0.1", free_port())
    with pytest.raises(DistributedError, match=r"rank 1 of 2: rank 0 did not answer within 1 s at 127.0.0.1:\d+"):
        distributed.start(world, CPU, meet_within=timedelta(seconds=1))


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        world = World(0, 2, 0, 2, "127.0.0.1", taken.getsockname()[1])
        with pytest.raises(DistributedError, match="rank 0 could not listen at 127.0.0.1"):
            distributed.start(world, CPU, meet_within=timedelta(seconds=1))
