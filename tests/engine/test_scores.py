import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from octvideo.engine.classes import ClassOrderError
from octvideo.engine.scores import Averaged, ScoresError, ViewScores, aggregate, combine

M, CLIPS, CROPS, K = 6, 4, 3, 5


def drawn(seed: int = 0) -> ViewScores:
    """Every view of six videos, in the order of videos, clips and crops."""
    generator = torch.Generator().manual_seed(seed)
    video, clip, crop = (
        axis.flatten() for axis in torch.meshgrid(*map(torch.arange, (M, CLIPS, CROPS)), indexing="ij")
    )
    return ViewScores(
        logits=3 * torch.randn(M * CLIPS * CROPS, K, generator=generator),
        video=video,
        clip=clip,
        crop=crop,
        labels=torch.tensor([0, 4, 1, 1, 3, 0]),
        num_clips=CLIPS,
        num_crops=CROPS,
        names=[f"jump/ä {index}.mp4" for index in range(M)],
        classes=["jump", "run", "sit", "wave", "clap"],
        facts={"model": "i3d_tiny", "alpha": 0.25, "input": [3, 8, 64, 64], "policy": "strided"},
    )


def rows(scores: ViewScores, which: torch.Tensor) -> ViewScores:
    chosen = {name: getattr(scores, name)[which] for name in ("logits", "video", "clip", "crop")}
    return replace(scores, **chosen)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_averages_against_numpy() -> None:
    scores = drawn()
    views = scores.logits.double().numpy().reshape(M, CLIPS, CROPS, K)
    of_softmax, of_logits = aggregate(scores), aggregate(scores, "logits")
    np.testing.assert_allclose(of_softmax.probabilities, softmax(views).mean((1, 2)), rtol=1e-12)
    np.testing.assert_allclose(of_logits.probabilities, softmax(views.mean((1, 2))), rtol=1e-12)
    assert of_softmax.scored.all() and of_softmax.complete.all() and of_softmax.incomplete == 0
    few = aggregate(scores, clips=[0, 3], crops=[1])
    np.testing.assert_allclose(few.probabilities, softmax(views[:, [0, 3], 1]).mean(1), rtol=1e-12)
    with pytest.raises(ScoresError, match="average is 'max'; allowed: softmax, logits"):
        aggregate(scores, "max")


@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_shuffled_and_repeated_rows_give_the_same_bits(average: str) -> None:
    scores = drawn()
    expected = aggregate(scores, average).probabilities
    order = torch.randperm(len(scores.logits), generator=torch.Generator().manual_seed(1))
    assert torch.equal(aggregate(rows(scores, order), average).probabilities, expected)
    twice = torch.cat([order, order[:7], order[:3]])
    again = aggregate(rows(scores, twice), average)
    assert torch.equal(again.probabilities, expected) and again.incomplete == 0


def test_a_view_twice_with_different_logits_is_named() -> None:
    scores = rows(drawn(), torch.cat([torch.arange(M * CLIPS * CROPS), torch.tensor([17])]))
    scores.logits[-1, 2] += 0.5
    with pytest.raises(ScoresError, match=r"^jump/ä 1.mp4: clip 1, crop 2 is there twice, with different logits"):
        aggregate(scores)
    assert aggregate(scores, crops=[0, 1]).incomplete == 0  # not among those


def test_missing_views_and_videos() -> None:
    scores = drawn()
    there = (
        (scores.video != 2) & ~((scores.video == 4) & (scores.clip > 0)) & ~((scores.video == 5) & (scores.crop == 1))
    )
    result = aggregate(rows(scores, there.nonzero().flatten()))
    views = scores.logits.double().numpy().reshape(M, CLIPS, CROPS, K)
    assert result.scored.tolist() == [True, True, False, True, True, True]
    assert result.complete.tolist() == [True, True, False, True, False, False] and result.incomplete == 2
    np.testing.assert_allclose(result.probabilities[4], softmax(views[4, 0]).mean(0), rtol=1e-12)
    np.testing.assert_allclose(result.probabilities[5], softmax(views[5][:, [0, 2]]).mean((0, 1)), rtol=1e-12)
    assert (result.probabilities[2] == 0).all()
    assert aggregate(rows(scores, there.nonzero().flatten()), "logits").probabilities[2].tolist() == [0] * K
    centre = aggregate(rows(scores, there.nonzero().flatten()), crops=[1])
    assert centre.scored.tolist() == [True, True, False, True, True, False]


def ensemble(*members: ViewScores, weights: tuple[float, ...] = (1.0, 1.0)) -> Averaged:
    return combine(
        members, [aggregate(each) for each in members], weights, [f"{'ab'[i]}.npz" for i in range(len(members))]
    )


def relisted(scores: ViewScores, order: list[int]) -> ViewScores:
    """The same scores by a list in another order: its video i is the old one order[i]."""
    place = torch.tensor(order).argsort()
    names = [scores.names[video] for video in order]
    return replace(scores, video=place[scores.video], labels=scores.labels[order], names=names)


def test_an_ensemble_matches_videos_by_name() -> None:
    a, b = drawn(0), drawn(1)
    expected = (3 * aggregate(a).probabilities + aggregate(b).probabilities) / 4
    result = ensemble(a, relisted(b, [3, 0, 5, 1, 4, 2]), weights=(3.0, 1.0))
    torch.testing.assert_close(result.probabilities, expected, rtol=1e-12, atol=0)
    assert result.scored.all() and result.incomplete == 0


def test_an_ensemble_leaves_out_the_network_that_has_not_scored_a_video() -> None:
    a, b = drawn(0), drawn(1)
    a, b = rows(a, (a.video % 3 != 0).nonzero().flatten()), rows(b, (b.video < 3).nonzero().flatten())
    result = ensemble(a, b, weights=(1.0, 2.0))
    of_a, of_b = aggregate(a).probabilities, aggregate(b).probabilities
    torch.testing.assert_close(
        result.probabilities[[0, 1, 2, 4]], torch.stack([of_b[0], *(of_a / 3 + of_b * 2 / 3)[1:3], of_a[4]])
    )
    assert result.scored.tolist() == [True, True, True, False, True, True]
    assert result.incomplete == 3 and (result.probabilities[3] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": [f"jump/ä {i}.mp4" for i in (0, 1, 7, 3, 4, 5)]}, "only a.npz has .jump/ä 2.mp4.; only b.npz has"),
        ({"labels": torch.tensor([0, 4, 1, 2, 3, 3])}, "2 videos have another label than in a.npz: 'jump/ä 3.mp4' is 2"),
        ({"logits": torch.zeros(M * CLIPS * CROPS, 7), "classes": []}, "b.npz: scores of 7 classes, but a.npz has 5"),
    ],
)  # fmt: skip
def test_an_ensemble_of_different_things_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ScoresError, match=message):
        ensemble(drawn(), replace(drawn(), **change))


def test_an_ensemble_of_classes_in_another_order_is_refused() -> None:
    with pytest.raises(ClassOrderError, match="b.npz: 2 of 5 labels mean something else in b.npz than in a.npz"):
        ensemble(drawn(), replace(drawn(), classes=["run", "jump", "sit", "wave", "clap"]))
    ensemble(drawn(), replace(drawn(), classes=[]))


def test_saved_and_loaded(tmp_path: Path) -> None:
    scores = replace(drawn(), failed=[(3, "list.txt:4: no\nframes"), (5, "prefix \udcff")])
    scores.save(tmp_path / "scores.npz")
    again = ViewScores.load(tmp_path / "scores.npz")
    for name in ("logits", "video", "clip", "crop", "labels"):
        assert torch.equal(getattr(again, name), getattr(scores, name)), name
    assert (again.names, again.classes, again.facts) == (scores.names, scores.classes, scores.facts)
    assert again.failed == [(3, "list.txt:4: no\nframes"), (5, "prefix \\udcff")]
    assert (again.num_clips, again.num_crops) == (CLIPS, CROPS)
    assert list(tmp_path.iterdir()) == [tmp_path / "scores.npz"]
    with np.load(tmp_path / "scores.npz", allow_pickle=False) as plain:  # for anyone with NumPy
        assert plain["names"][1] == "jump/ä 1.mp4" and plain["grid"].tolist() == [CLIPS, CROPS]
    empty = rows(replace(scores, classes=[], failed=[], facts={}), torch.zeros(0, dtype=torch.int64))
    empty.save(tmp_path / "empty.npz")
    assert not aggregate(ViewScores.load(tmp_path / "empty.npz")).scored.any()


def test_what_load_would_refuse_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ScoresError, match="scores.npz: 5 names for 6 labels"):
        replace(drawn(), names=drawn().names[:5]).save(tmp_path / "scores.npz")
    assert list(tmp_path.iterdir()) == []


def changed(path: Path, **arrays: np.ndarray | None) -> None:
    """The file again with other arrays; None leaves one out."""
    with np.load(path, allow_pickle=False) as file:
        content = {**file, **arrays}
    np.savez(path, **{name: array for name, array in content.items() if array is not None})


BAD = {
    "logits missing": ({"logits": None}, "not a file of scores: logits missing"),
    "float64": ({"logits": np.zeros((72, 5))}, r"logits is float64 \[72, 5\]; allowed: float32 with 2 axes"),
    "one axis": ({"logits": np.zeros(72, np.float32)}, r"logits is float32 \[72\]; allowed"),
    "rows": ({"logits": np.zeros((71, 5), np.float32)}, "video has 72 rows, logits 71"),
    "int32": ({"video": np.zeros(72, np.int32)}, r"video is int32 \[72\]; allowed: int64 with 1 axes"),
    "NaN": ({"logits": np.full((72, 5), np.nan, np.float32)}, r"logits of row 0 \('jump/ä 0.mp4'\) are not finite"),
    "inf": ({"logits": np.full((72, 5), np.inf, np.float32)}, "are not finite"),
    "label 5": ({"labels": np.array([0, 1, 2, 3, 4, 5])}, "labels holds 5; allowed: 0 to 4"),
    "label -1": ({"labels": np.array([0, 1, 2, 3, -1, 4])}, "labels holds -1; allowed: 0 to 4"),
    "video": ({"video": np.full(72, 6)}, "video holds 6; allowed: 0 to 5"),
    "clip": ({"clip": np.full(72, 4)}, "clip holds 4; allowed: 0 to 3"),
    "crop": ({"crop": np.full(72, -3)}, "crop holds -3; allowed: 0 to 2"),
    "grid of one": ({"grid": np.array([10])}, "grid has 1 numbers; allowed: 2"),
    "grid": ({"grid": np.array([0, 3])}, "a grid of 0 x 3 views; allowed"),
    "vast grid": ({"grid": np.array([2**62, 3])}, "views; allowed: 1 x 1 to 10000 in all"),
    "names": ({"names": np.array(["a.mp4"] * 6)}, "two videos have the same name"),
    "bytes": ({"names": np.array([b"a"] * 6)}, r"names is \|S1 \[6\]; allowed: text"),
    "surrogate": ({"names": np.array([*"abcde", "\ud800"])}, "cannot be written as UTF-8"),
    "no unicode": ({"names": np.full(6, 0x7FFFFFFF, np.uint32).view("<U1")}, r"names is <U1 \[6\]; allowed: text"),
    "classes": ({"classes": np.array(["a", "b"])}, "2 class names for 5 classes"),
    "failed": ({"failed_videos": np.array([0])}, "1 failed_videos, but 0 failed_reasons"),
    "failed 9": ({"failed_videos": np.array([9]), "failed_reasons": np.array(["?"])}, "failed_videos holds 9"),
    "facts": ({"facts": np.array("{")}, "facts is not JSON text"),
    "facts NaN": ({"facts": np.array('{"a": NaN}')}, "facts is not JSON text .NaN is no number"),
    "deep facts": ({"facts": np.array("[" * 100_000)}, "facts is not JSON text"),
    "nested facts": ({"facts": np.array('{"a": {"b": 1}}')}, "facts is not a mapping of names to text, numbers and lists"),
    "facts list": ({"facts": np.array("[1]")}, "facts is not a mapping"),
    "format": ({"format": np.array(2)}, "scores of format 2; this version reads format 1"),
    "no videos": ({"labels": np.zeros(0, np.int64), "names": np.zeros(0, "U1")}, "0 videos and 5 classes"),
    "vast": ({"logits": np.zeros((0, 10**8), np.float32)}, "100000000 classes are too many for one table"),
    "pickle": ({"names": np.array([{}] * 6, object)}, "names.npy holds Python objects"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_refused(tmp_path: Path, case: str) -> None:
    arrays, message = BAD[case]
    path = tmp_path / "scores.npz"
    drawn().save(path)
    changed(path, **arrays)
    with pytest.raises(ScoresError, match=message) as error:
        ViewScores.load(path)
    assert str(error.value).startswith(f"{path}: ")


def member(name: str, content: bytes) -> Callable[[Path], None]:
    """One member of the file replaced."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path) as old:
            members = {entry: old.read(entry) for entry in old.namelist()} | {f"{name}.npy": content}
        with zipfile.ZipFile(path, "w") as new:
            for entry, data in members.items():
                new.writestr(entry, data)

    return write


def claiming(shape: str) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(8)


def compressed(path: Path) -> None:
    with np.load(path) as file:
        content = dict(file)
    np.savez_compressed(path, **content)


def one_array(path: Path) -> None:
    content = io.BytesIO()
    np.save(content, np.zeros(3))
    path.write_bytes(content.getvalue())


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("clip 1"),
    "gone": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "one array": one_array,
    "compressed": compressed,
    "not an array": member("logits", b"no array"),
    "a vast claim": member("logits", claiming("(4000000000000000, 5)")),
    "a claim": member("logits", claiming("(72, 5)")),
    "no header": member("logits", b"\x93NUMPY\x01\x00\xff\xff{"),
    "bad header": member("logits", claiming("(72, 5")),
    "code": member("logits", claiming("__import__('os').getpid()")),
    "json": lambda path: path.write_text(json.dumps({})),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_named(tmp_path: Path, case: str) -> None:
    path = tmp_path / "scores.npz"
    drawn().save(path)
    DAMAGE[case](path)
    with pytest.raises(ScoresError, match=r"not a (whole )?file of scores|no such file|logits is no array") as error:
        ViewScores.load(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_cut_off_or_flipped_anywhere_it_is_the_same_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "scores.npz"
    drawn().save(path)
    content, expected = path.read_bytes(), aggregate(drawn()).probabilities
    rng = np.random.default_rng(0)
    for end in rng.integers(0, len(content), 40).tolist():
        path.write_bytes(content[:end])
        with pytest.raises(ScoresError):
            ViewScores.load(path)
    refused = 0
    for place in rng.integers(0, len(content), 300).tolist():
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            assert torch.equal(aggregate(ViewScores.load(path)).probabilities, expected)  # a bit that says nothing
        except ScoresError:
            refused += 1
    assert refused > 200
