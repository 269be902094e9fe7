import random
from pathlib import Path

import pytest

from octvideo.engine.classes import ClassOrderError, check_class_order

MAPS = Path(__file__).parents[3] / "shared/data/kinetics"


def kinetics(classes: int) -> list[str]:
    path = MAPS / f"label_map_{classes}.txt"
    if not path.is_file():
        pytest.skip(f"no {path}: the label maps of Kinetics are not part of the project")
    return path.read_text(encoding="utf-8").splitlines()


def refusal(of_checkpoint: list[str], of_data: list[str]) -> str:
    with pytest.raises(ClassOrderError) as error:
        check_class_order(of_checkpoint, of_data, "a.pt")
    return str(error.value)


def test_spelling_does_not_matter_and_nothing_is_compared_with_nothing() -> None:
    check_class_order(["Air_Drumming", "rock scissors paper"], ["air drumming", '"rock-scissors-paper"'], "a.pt")
    check_class_order([], ["a", "b"], "a.pt")
    check_class_order(["a", "b"], [], "a.pt")


def test_another_order_is_named() -> None:
    message = refusal(["a", "b", "c", "d", "e", "f"], ["a", "c", "b", "e", "f", "d"])
    assert message.startswith("a.pt: 5 of 6 labels mean something else in the checkpoint than in the data\n")
    assert "label 1: 'b' in the checkpoint, 'c' in the data\n  label 2: 'c' in the checkpoint, 'b' in" in message
    assert "label 4" not in message and "the same classes in another order" in message


def test_other_classes_are_named() -> None:
    message = refusal(["a", "b"], ["a", "x"])
    assert "label 1: 'b' in the checkpoint, 'x' in the data" in message
    assert "other classes: only the checkpoint has 'b'; only the data has 'x'" in message
    message = refusal(["a"], ["a", "b", "c", "d", "e"])
    assert "1 classes in the checkpoint, 5 in the data" in message
    assert "only the checkpoint has none of its own; only the data has 'b', 'c', 'd' and 1 more" in message
    assert "other classes" in refusal(["a", "a", "b"], ["a", "b", "b"])  # not the same number of times


def test_kinetics_400_shuffled() -> None:
    names = kinetics(400)
    assert len(names) == 400
    check_class_order(names, [name.replace(" ", "_").upper() for name in names], "a.pt")
    swapped = [*names]
    swapped[17], swapped[18] = names[18], names[17]
    message = refusal(names, swapped)
    assert "2 of 400 labels" in message
    assert f"label 17: {names[17]!r} in the checkpoint, {names[18]!r} in the data" in message
    shuffled = random.Random(0).sample(names, 400)
    assert "the same classes in another order" in refusal(names, shuffled)


def test_kinetics_400_is_not_kinetics_600() -> None:
    message = refusal(kinetics(400), kinetics(600))
    assert "400 classes in the checkpoint, 600 in the data" in message and "other classes" in message
    assert "only the data has" in message and "more" in message
