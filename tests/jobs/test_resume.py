"""What a resumed run takes from its checkpoint and what from the configuration, key by key."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fvcore.common.config import CfgNode

from octvideo import build, config
from octvideo.config import ConfigError
from octvideo.engine import checkpoint
from octvideo.engine.checkpoint import CheckpointError
from octvideo.engine.classes import ClassOrderError
from octvideo.engine.distributed import DistributedError, World
from octvideo.engine.meter import Meter
from octvideo.jobs import resume
from octvideo.jobs.resume import find_start

ROOT = Path(__file__).parents[2]
LISTS = {"train": {"digest": "a", "videos": 9}, "val": {"digest": "b", "videos": 3}}
NETWORK = {"MODEL.NAME", "MODEL.FACTORY", "MODEL.NUM_CLASSES", "MODEL.POOL_PADDING", "MODEL.NONLOCAL_FORM"}
NETWORK |= {"OCTAVE.ALPHA", "OCTAVE.POOL", "OCTAVE.RATIOS", "OCTAVE.ROUND_TO"}
OF_A_START = {"OUTPUT_DIR", "TRAIN.RESUME", "TRAIN.RESTART_EPOCH", "TRAIN.INIT", "TRAIN.NEW_HEAD", "TRAIN.ENABLE"}


@pytest.fixture
def cfg(tmp_path: Path) -> CfgNode:
    more = ["OUTPUT_DIR", str(tmp_path), "TRAIN.RESUME", "auto", "TRAIN.BATCH_SIZE", "4", "MODEL.NAME", "c2d_tiny"]
    return build.load_config(ROOT / "configs/motion/oct_i3d_tiny.yaml", more)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return torch.nn.Linear(2, 2)


def saved(cfg: CfgNode, model: torch.nn.Module, **entries: Any) -> dict[str, Any]:
    """Leave a checkpoint of step 6 in OUTPUT_DIR, within an epoch unless clips_in_epoch is 0."""
    random, meter = {"cpu": torch.get_rng_state()}, Meter(torch.device("cpu"), World()).state_dict()
    state = {
        **{"model": model.state_dict(), "epoch": 1, "clips_in_epoch": 8, "classes": [], "lists": LISTS},
        **{"optimizer": build.optimizer(cfg, model).state_dict(), "scaler": {}, "nonfinite_steps": 0},
        **{"failures": {"counts": {}, "reasons": {}}, "ranks": [{"random": random, "meter": meter}]},
        **{"config": cfg.dump(), "versions": {"octvideo": "0.1.0", "torch": str(torch.__version__)}},
        **entries,
    }
    checkpoint.save(Path(cfg.OUTPUT_DIR), 6, state, keep=1)
    return state


def changed(cfg: CfgNode, key: str) -> CfgNode:
    """The configuration with another value of one key."""
    cfg = cfg.clone()
    cfg.defrost()
    section, name = config._parent(cfg, key)
    value = section[name]
    others = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.5, str: lambda v: v + "x"}
    section[name] = [*value, 1] if isinstance(value, list) else others[type(value)](value)
    return cfg


def kind_of(key: str) -> str:
    if key in NETWORK:
        return "refused"
    if key in OF_A_START or key.startswith("TEST."):
        return "of a start"
    return "refused within an epoch" if key == "SEED" else "applied"


@pytest.mark.parametrize("key", config.key_names())
def test_every_key_is_applied_and_recorded_or_refused(cfg: CfgNode, model: torch.nn.Module, key: str) -> None:
    kind, here = kind_of(key), changed(cfg, key)
    results = {}
    for clips in (8, 0):
        saved(cfg, model, clips_in_epoch=clips)
        if key in ("TRAIN.RESUME", "OUTPUT_DIR"):
            here = cfg  # they say where the checkpoint is
        try:
            start = find_start(here, model, LISTS, [], World())
            results[clips] = [line.split()[0] for line in start.changed]
            assert (start.state["step"], start.clips, start.within) == (6, clips, clips > 0)
        except ConfigError as error:
            assert all(problem.startswith(f"{key} ") for problem in error.problems)
            results[clips] = "refused"
    expected = {
        "refused": {8: "refused", 0: "refused"},
        "of a start": {8: [], 0: []},
        "refused within an epoch": {8: "refused", 0: [key]},
        "applied": {8: [key], 0: [key]},
    }
    assert results == expected[kind]


def test_a_list_that_changed_is_refused_within_an_epoch_and_applied_at_its_end(
    cfg: CfgNode, model: torch.nn.Module
) -> None:
    other = {**LISTS, "train": {"digest": "c", "videos": 8}}
    saved(cfg, model)
    with pytest.raises(ConfigError) as caught:
        find_start(cfg, model, other, [], World())
    (problem,) = caught.value.problems
    assert "DATA.TRAIN_LIST has other contents: 9 entries (here 8)" in problem
    assert "epoch 2, after 8 clips" in problem
    assert "TRAIN.RESTART_EPOCH True" in problem
    again = changed(cfg, "TRAIN.RESTART_EPOCH")
    start = find_start(again, model, other, [], World())
    assert (start.clips, start.within, start.list_changed) == (0, True, True)
    assert "epoch 2 begins again; 8 clips of it" in start.remarks[0]
    saved(cfg, model, clips_in_epoch=0)
    start = find_start(cfg, model, other, [], World())
    assert (start.clips, start.within, start.list_changed) == (0, False, True)
    assert start.changed == ["DATA.TRAIN_LIST has other contents: 9 entries (here 8)"]


def test_another_validation_list_is_applied_within_an_epoch_too(cfg: CfgNode, model: torch.nn.Module) -> None:
    saved(cfg, model)
    start = find_start(cfg, model, {**LISTS, "val": {"digest": "z", "videos": 4}}, [], World())
    assert (start.clips, start.list_changed) == (8, False)
    assert start.changed == ["DATA.VAL_LIST has other contents: 3 entries (here 4)"]
    start = find_start(cfg, model, {"train": LISTS["train"]}, [], World())  # TRAIN.VAL_PERIOD 0 has none
    assert start.changed == []


def test_a_new_seed_at_the_end_of_an_epoch_gives_new_random_states(cfg: CfgNode, model: torch.nn.Module) -> None:
    saved(cfg, model, clips_in_epoch=0)
    assert find_start(changed(cfg, "SEED"), model, LISTS, [], World()).new_seed
    assert not find_start(cfg, model, LISTS, [], World()).new_seed


def test_classes_in_another_order_are_refused(cfg: CfgNode, model: torch.nn.Module) -> None:
    saved(cfg, model, classes=["run", "walk"])
    with pytest.raises(ClassOrderError, match="2 of 2 labels"):
        find_start(cfg, model, LISTS, ["walk", "run"], World())


def test_versions_are_recorded(cfg: CfgNode, model: torch.nn.Module) -> None:
    saved(cfg, model, versions={"octvideo": "0.0", "torch": "1.0"})
    lines = find_start(cfg, model, LISTS, [], World()).changed
    assert lines == ["octvideo '0.0' (here 0.1.0)", f"torch '1.0' (here {torch.__version__})"]


@pytest.mark.parametrize("batch", [4, 6])
def test_a_checkpoint_that_counts_steps_is_read(cfg: CfgNode, model: torch.nn.Module, batch: int) -> None:
    """Format 2 had the steps within the epoch, of the batch size of that run."""
    tree = yaml.safe_load(cfg.dump())
    tree["TRAIN"]["BATCH_SIZE"] = batch
    state = {**saved(cfg, model, config=yaml.safe_dump(tree)), "step_in_epoch": 2, "format": 2}
    state.pop("clips_in_epoch")
    state.pop("lists")
    checkpoint.save(Path(cfg.OUTPUT_DIR), 6, state, keep=1)
    start = find_start(cfg, model, LISTS, [], World())
    assert (start.clips, start.within) == (2 * batch, True)


def test_corrupt_later_checkpoints_are_set_aside(cfg: CfgNode, model: torch.nn.Module) -> None:
    saved(cfg, model)
    later = checkpoint.path_of(Path(cfg.OUTPUT_DIR), 9)
    later.write_bytes(b"corrupt")
    with pytest.warns(UserWarning, match="checkpoint_00000009.pt"):
        start = find_start(cfg, model, LISTS, [], World())
    assert start.state["step"] == 6
    assert "checkpoint_00000009.pt.corrupt" in start.remarks[0]
    assert not later.exists()


def test_ranks_that_see_different_checkpoints_stop(
    cfg: CfgNode, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(cfg, model)
    monkeypatch.setattr(resume, "gather_objects", lambda step: [step, None])
    with pytest.raises(DistributedError, match="rank 0: 6, rank 1: none"):
        find_start(cfg, model, LISTS, [], World())


def test_a_file_to_resume_from(cfg: CfgNode, model: torch.nn.Module, tmp_path: Path) -> None:
    saved(cfg, model)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.TRAIN.RESUME, cfg.OUTPUT_DIR = str(tmp_path / "checkpoint_00000006.pt"), str(tmp_path / "new")
    assert find_start(cfg, model, LISTS, [], World()).path == tmp_path / "checkpoint_00000006.pt"
    checkpoint.save_weights(tmp_path / "weights.pt", model.state_dict())
    cfg.TRAIN.RESUME = str(tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="TRAIN.INIT"):
        find_start(cfg, model, LISTS, [], World())
