import pytest
import torch

from octvideo.engine import distributed
from octvideo.engine.distributed import DistributedError, World

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


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
    assert world == World(3, 4, 1) and not world.main


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
