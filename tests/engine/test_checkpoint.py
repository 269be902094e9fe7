import copy
import errno
import os
import pickle
import resource
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from octvideo import torch_file
from octvideo.engine import checkpoint
from octvideo.engine.checkpoint import CheckpointError, DamagedError
from octvideo.engine.distributed import World
from octvideo.engine.meter import Meter
from octvideo.engine.optim import sgd
from octvideo.files import WriteError

from ..memory import peak_memory


def state(value: float = 1.0) -> dict:
    return {"model": {"w": torch.full((3,), value)}, "epoch": 2, "random": [{"cpu": torch.get_rng_state()}]}


def test_round_trip_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 20, 100):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert [p.name for p in checkpoint.found(tmp_path)] == ["checkpoint_00000020.pt", "checkpoint_00000100.pt"]
    path, loaded = checkpoint.latest(tmp_path)
    assert path.name == "checkpoint_00000100.pt"
    assert (loaded["step"], loaded["epoch"]) == (100, 2)
    assert torch.equal(loaded["model"]["w"], torch.full((3,), 100.0))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage", "bits"])
def test_a_broken_newest_one_is_skipped_by_name(tmp_path: Path, damage: str) -> None:
    checkpoint.save(tmp_path, 1, state(1), keep=5)
    newest = checkpoint.save(tmp_path, 2, {**state(2), "big": torch.randn(5000)}, keep=5)
    content = bytearray(newest.read_bytes())
    if damage == "bits":
        content[len(content) // 2] ^= 0xFF  # inside the tensor, which torch.load alone would not notice
    newest.write_bytes(
        {"truncate": content[: len(content) // 2], "empty": b"", "garbage": b"<html>" * 100, "bits": content}[damage]
    )
    with pytest.warns(UserWarning, match="skipped a broken checkpoint.*checkpoint_00000002.pt"):
        path, loaded = checkpoint.latest(tmp_path)
    assert path.name == "checkpoint_00000001.pt" and loaded["step"] == 1


def test_all_broken_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 1, state(), keep=1).write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"all 1 checkpoints are broken[^\n]*\n  .*checkpoint_00000001.pt: not an intact"
    ):
        checkpoint.latest(tmp_path)  # one message: no warning repeats it


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("pwned",)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    torch.save({"format": 1, "model": Evil()}, path)
    with pytest.raises(CheckpointError, match="evil.pt: not an intact checkpoint of tensors .*it asks for posix.mkdir"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="evil.pt: not an intact"):
        checkpoint.load(path)
    assert not Path("pwned").exists()


def test_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "none.pt")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of octvideo"):
        checkpoint.load(tmp_path / "other.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as file:
        file.writestr("a", "b")
    with pytest.raises(CheckpointError, match="zip.pt: not an intact checkpoint"):
        checkpoint.load(tmp_path / "zip.pt")


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: the write stops half-way with an OS error."""
    checkpoint.save(tmp_path, 1, state(), keep=1)
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(WriteError, match="checkpoint_00000002.pt: cannot be written"):
            checkpoint.save(tmp_path, 2, {"model": {"w": torch.zeros(100_000)}}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_00000001.pt"]
    assert checkpoint.latest(tmp_path)[1]["step"] == 1


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_new_checkpoint_is_never_removed_and_corrupt_ones_do_not_count(tmp_path: Path, keep: int) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, state(step), keep=3)
    for step in (2, 9, 10, 11):
        checkpoint.path_of(tmp_path, step).write_bytes(b"corrupt")
    checkpoint.save(tmp_path, 8, state(8), keep=keep)
    left = [checkpoint.step_of(path) for path in checkpoint.found(tmp_path)]
    assert left == [*{1: [2], 2: [2, 3], 3: [1, 2, 3]}[keep], 8, 9, 10, 11]
    with pytest.warns(UserWarning):
        assert checkpoint.latest(tmp_path)[1]["step"] == 8
    moved = checkpoint.set_aside(tmp_path, 8)
    assert [path.name for path in moved] == [f"checkpoint_{step:08d}.pt.corrupt" for step in (9, 10, 11)]
    checkpoint.save(tmp_path, 9, state(9), keep=1)
    assert [checkpoint.step_of(path) for path in checkpoint.found(tmp_path)] == [2, 9]


class Net(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Module()
        self.head.fc = nn.Linear(4, classes)


def test_load_weights() -> None:
    source, target = Net(5), Net(5)
    checkpoint.load_weights(target, source.state_dict(), Path("a.pt"))
    assert torch.equal(target.head.fc.weight, source.head.fc.weight)


def test_another_class_count_is_an_error_with_the_remedy_unless_a_new_head_is_asked_for() -> None:
    source, target = Net(5), Net(6)
    with pytest.raises(CheckpointError, match="2 of 4 entries") as caught:
        checkpoint.load_weights(target, source.state_dict(), Path("a.pt"))
    assert "head.fc.weight: (5, 4) in the file, (6, 4) in the network" in str(caught.value)
    assert "TRAIN.NEW_HEAD True" in str(caught.value)
    checkpoint.load_weights(target, source.state_dict(), Path("a.pt"), new_head=True)
    assert torch.equal(target.body.weight, source.body.weight)


@pytest.mark.parametrize("new_head", [False, True])
def test_anything_else_missing_or_unexpected_is_an_error(new_head: bool) -> None:
    weights = Net(5).state_dict()
    weights["body.scale"] = weights.pop("body.bias")
    with pytest.raises(CheckpointError, match="2 of 4 entries") as caught:
        checkpoint.load_weights(Net(5), weights, Path("a.pt"), new_head=new_head)
    assert "missing     body.bias (4,)" in str(caught.value)
    assert "unexpected  body.scale (4,)" in str(caught.value)
    assert "NEW_HEAD" not in str(caught.value)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return sgd(model, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, weight_decay_norm=0.0)


def run_state() -> dict[str, Any]:
    """A run's checkpoint, of the parts that a run saves."""
    model = Net(5)
    optimizer = optimizer_of(model)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    meter = Meter(torch.device("cpu"), World())
    return {
        **{"format": checkpoint.FORMAT, "step": 3, "epoch": 1, "clips_in_epoch": 4, "nonfinite_steps": 0},
        "model": model.state_dict(),
        "ema": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "classes": ["a", "b"],
        "failures": {"counts": {5: 2}, "reasons": {5: "list.txt:6: a.mp4: damaged"}},
        "ranks": [{"random": {"cpu": torch.get_rng_state()}, "meter": meter.state_dict()}],
        "config": "SEED: 0",
        "versions": {"octvideo": "1", "torch": "2"},
    }


def put(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set an entry: "a.0.b" is state["a"][0]["b"]."""

    def change(state: Any) -> None:
        *path, last = (int(key) if key.isdigit() else key for key in place.split("."))
        for key in path:
            state = state[key]
        state[last] = value

    return change


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.pop(name)


NESTED: list[Any] = []
for _ in range(60):
    NESTED = [NESTED, NESTED]

WRONG: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (put("format", 1), "not a checkpoint of octvideo .formats 2, 3"),
    (put("format", torch.zeros(2)), "not a checkpoint of octvideo .formats 2, 3"),
    (drop("model"), "not a checkpoint of octvideo"),
    (drop("step"), "step is missing"),
    (drop("epoch"), "epoch is missing"),
    (put("step", -1), "step is -1; allowed: an integer, 0 or more"),
    (put("step", "3"), "step is text '3'; allowed: an integer"),
    (put("step", 3.5), "step is 3.5; allowed"),
    (put("step", torch.tensor(3)), r"step is a tensor of \(\); allowed"),
    (put("epoch", "1"), "epoch is text '1'; allowed: an integer"),
    (put("epoch", None), "epoch is None; allowed"),
    (put("clips_in_epoch", [1]), "clips_in_epoch is a list of 1; allowed"),
    (put("lists", {"train": {"digest": 1, "videos": 2}}), "lists.train.digest is 1; allowed"),
    (put("nonfinite_steps", float("nan")), "nonfinite_steps is nan; allowed"),
    (put("model", None), "model is None; allowed: a dict"),
    (put("model", torch.zeros(3)), r"model is a tensor of \(3,\); allowed: a dict"),
    (put("model", [("w", torch.zeros(3))]), "model is a list of 1; allowed: a dict"),
    (put("model", {1: torch.zeros(3)}), "model has the key 1; allowed: text"),
    (put("model", {"w": [1.0]}), r"model\['w'\] is a list of 1; allowed: a tensor"),
    (put("ema", None), "ema is None; allowed: a dict"),
    (put("ema", {"w": torch.zeros(3)}), "5 entries of ema are not those of model, such as 'body.bias'"),
    (put("optimizer", []), "optimizer is a list of 0; allowed: a dict with state, param_groups"),
    (put("optimizer", {}), "optimizer.state is missing"),
    (put("optimizer.state", None), "optimizer.state is None; allowed: a dict"),
    (put("optimizer.state.0", 3), r"optimizer.state\[0\] is 3; allowed: a dict"),
    (
        put("optimizer.state.0.momentum_buffer", "x"),
        r"optimizer.state\[0\].momentum_buffer is text 'x'; allowed: a",
    ),
    (put("optimizer.param_groups", {}), "optimizer.param_groups is a dict of 0; allowed: a list"),
    (put("optimizer.param_groups.0", None), r"optimizer.param_groups\[0\] is None"),
    (put("optimizer.param_groups.0.params", [None]), r"param_groups\[0\].params\[0\] is None; allowed"),
    (put("optimizer.param_groups.0.momentum", NESTED), r"param_groups\[0\].momentum is a list of 2; allowed: a number"),
    (put("scaler", None), "scaler is None; allowed: an empty dict, or the state"),
    (put("scaler", {"scale": 0.0}), "scaler is a dict of 1; allowed: an empty dict, or"),
    (put("classes", torch.zeros(2)), r"classes is a tensor of \(2,\); allowed: a list"),
    (put("classes", "ab"), "classes is text 'ab'; allowed: a list"),
    (put("failures", []), "failures is a list of 0; allowed: a dict with counts, reasons"),
    (put("failures.counts", {"a": 1}), r"failures.counts has the key text 'a'; allowed: integers"),
    (put("failures.counts", {1: "a"}), r"failures.counts\[1\] is text 'a'"),
    (put("failures.reasons", {1: 2}), r"failures.reasons\[1\] is 2; allowed: text"),
    (put("ranks", {}), "ranks is a dict of 0; allowed: a list of 1 or more"),
    (put("ranks", []), "ranks is a list of 0; allowed: a list of 1 or more"),
    (put("ranks.0", 1), r"ranks\[0\] is 1; allowed: a dict with random, meter"),
    (put("ranks.0.random", {}), r"ranks\[0\].random.cpu is missing"),
    (put("ranks.0.random.cpu", torch.zeros(3)), r"random.cpu is a tensor of \(3,\); allowed: the state of a torch.Gen"),
    (put("ranks.0.random.cpu", torch.zeros(5056, dtype=torch.uint8)), "allowed: the state of a torch.Generator"),
    (put("ranks.0.random.cuda", [1]), r"random.cuda is a list of 1; allowed: a tensor of bytes"),
    (put("ranks.0.meter", {}), r"ranks\[0\].meter.loss is missing"),
    (put("ranks.0.meter.loss.total", None), r"meter.loss.total is None; allowed: a number"),
    (put("ranks.0.meter.part_loss.count", float("inf")), r"meter.part_loss.count is inf; allowed: an integer"),
    (put("config", ["SEED: 0"]), "config is a list of 1; allowed: text"),
    (put("versions", None), "versions is None; allowed: a dict with octvideo, torch"),
    (put("versions", {"torch": "2"}), "versions.octvideo is missing"),
    (put("versions.torch", 2), "versions.torch is 2; allowed: text"),
]


@pytest.fixture(scope="module")
def saved_run() -> dict[str, Any]:
    return run_state()


@pytest.mark.parametrize("change,problem", WRONG)
def test_entries_of_a_wrong_kind(
    tmp_path: Path, saved_run: dict[str, Any], change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    state = copy.deepcopy(saved_run)
    change(state)
    path = tmp_path / "checkpoint_00000003.pt"
    torch.save(state, path)
    with pytest.raises(DamagedError, match=f"^{path}: .*{problem}") as error:
        checkpoint.load(path, run=True)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match=f"all 1 checkpoints .*\n  .*{problem}"):
        checkpoint.latest(tmp_path, run=True)


def test_an_intact_run_and_entries_that_are_not_known(tmp_path: Path, saved_run: dict[str, Any]) -> None:
    torch.save({**saved_run, "scaler": {}, "data": {"digest": "0f"}}, tmp_path / "a.pt")
    assert checkpoint.load(tmp_path / "a.pt", run=True)["data"] == {"digest": "0f"}


@pytest.mark.parametrize("name", checkpoint.RUN_ENTRIES)
def test_what_lacks_an_entry_of_a_run_holds_weights(tmp_path: Path, saved_run: dict[str, Any], name: str) -> None:
    torch.save({key: value for key, value in saved_run.items() if key != name}, tmp_path / "a.pt")
    assert "model" in checkpoint.load(tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=f"holds weights, not a run .*TRAIN.INIT {tmp_path}/a.pt .it has no {name}"
    ):
        checkpoint.load(tmp_path / "a.pt", run=True)


def test_momenta_fit_the_weights(saved_run: dict[str, Any]) -> None:
    fitting, file = saved_run["optimizer"], Path("a.pt")
    optimizer = optimizer_of(Net(5))
    checkpoint.require_fit(fitting, optimizer, file)
    for change, problem in (
        (
            put("state.0.momentum_buffer", torch.zeros(4, 2)),
            r"state\[0\].momentum_buffer is \(4, 2\); its weight is \(4, 3\)",
        ),
        (
            put("state.3.momentum_buffer", torch.tensor([0, 1, 2, 3, torch.inf])),
            r"state\[3\].momentum_buffer is not finite",
        ),
        (put("param_groups.0.params", [0]), r"groups of \[1, 2\] weights; this run has \[2, 2\]"),
    ):
        state = copy.deepcopy(fitting)
        change(state)
        with pytest.raises(CheckpointError, match=f"^a.pt: optimizer.*{problem}"):
            checkpoint.require_fit(state, optimizer, file)


class Bomb:
    def __reduce__(self) -> tuple:
        return bytearray, (3 << 30,)


def test_a_claim_of_memory_is_refused(tmp_path: Path) -> None:
    torch.save({"format": 2, "step": 0, "epoch": 0, "model": {}, "x": Bomb()}, tmp_path / "bomb.pt")
    with peak_memory() as peak, pytest.raises(CheckpointError, match="bomb.pt: .*asks for __builtin__.bytearray"):
        checkpoint.load(tmp_path / "bomb.pt")
    assert peak[0] < 50 << 20


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error"), OSError(errno.EMFILE, "Too many open files"), MemoryError("9 bytes")],
)
def test_a_fault_of_the_machine_does_not_skip_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """An older checkpoint in its place would lose the work since then."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step), keep=5)

    def fails(path: Path) -> Any:
        raise error

    monkeypatch.setattr(torch_file, "read", fails)
    reason = str(error.args[-1])
    with pytest.raises(CheckpointError, match=f"checkpoint_00000002.pt: .*{reason}"):
        checkpoint.latest(tmp_path)


def test_a_network_that_refuses_weights_is_a_message() -> None:
    class Picky(Net):
        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            raise AttributeError("no scale")

    with pytest.raises(
        CheckpointError, match="a.pt: the network does not take these weights .AttributeError: no scale"
    ):
        checkpoint.load_weights(Picky(5), Net(5).state_dict(), Path("a.pt"))
