"""Tables of entries: the first entry that is something else is named, with what it is and what is allowed."""

from typing import Any

import pytest
import torch

from octvideo.engine.structure import (
    count,
    dict_of,
    either,
    flag,
    list_of,
    number,
    positive,
    problem_of,
    record,
    tensor,
    text,
)

TABLE = {
    "step": count,
    "weights": dict_of(str, tensor),
    "groups": list_of(record({"lr": number, "on": flag}, {"name": text}), shortest=1),
    "scale": either(positive, record({})),
}
GOOD: dict[str, Any] = {
    "step": 0,
    "weights": {"a": torch.zeros(2)},
    "groups": [{"lr": 0.1, "on": False}, {"lr": 1, "on": True, "name": "x", "more": object()}],
    "scale": 2.0,
    "unknown": object(),
}


def test_what_fits() -> None:
    assert problem_of(GOOD, TABLE, {}) == ""
    assert problem_of({**GOOD, "scale": {}}, TABLE, {}) == ""


@pytest.mark.parametrize(
    "changed,problem",
    [
        ({"step": -1}, "step is -1; allowed: an integer, 0 or more"),
        ({"step": True}, "step is True; allowed: an integer"),
        ({"step": 1.0}, "step is 1.0; allowed: an integer"),
        ({"step": 1 << 70}, "step is 1180591620717411303424; allowed"),
        ({"step": "a" * 100}, f"step is text '{'a' * 40}'; allowed"),
        ({"weights": None}, "weights is None; allowed: a dict"),
        ({"weights": [1]}, "weights is a list of 1; allowed: a dict"),
        ({"weights": {3: torch.zeros(1)}}, "weights has the key 3; allowed: text"),
        ({"weights": {"ä": [1]}}, r"weights['\xe4'] is a list of 1; allowed: a tensor"),
        ({"groups": []}, "groups is a list of 0; allowed: a list of 1 or more"),
        ({"groups": ()}, "groups is a tuple of 0; allowed: a list of 1 or more"),
        ({"groups": [{"lr": 0.1}]}, "groups[0].on is missing"),
        ({"groups": [GOOD["groups"][0], 3]}, "groups[1] is 3; allowed: a dict with lr, on"),
        ({"groups": [{"lr": torch.zeros(2, 3), "on": True}]}, "groups[0].lr is a tensor of (2, 3); allowed: a number"),
        ({"groups": [{"lr": 1, "on": True, "name": b"x"}]}, "groups[0].name is a bytes; allowed: text"),
        ({"scale": float("inf")}, "scale is inf; allowed: a dict"),
    ],
)
def test_the_first_problem(changed: dict[str, Any], problem: str) -> None:
    assert problem_of({**GOOD, **changed}, TABLE, {}).startswith(problem)


def test_missing_and_optional_entries() -> None:
    assert problem_of({"b": 1}, {"a": count}, {"b": text}) == "a is missing"
    assert problem_of({"a": 1, "b": 1}, {"a": count}, {"b": text}) == "b is 1; allowed: text"
    assert problem_of({"a": 1}, {"a": count}, {"b": text}) == ""


def test_a_message_is_short_whatever_a_value_holds() -> None:
    nested: list[Any] = []
    for _ in range(100):
        nested = [nested, nested]  # 2**100 lists if it were printed
    assert problem_of({"a": nested}, {"a": count}, {}) == "a is a list of 2; allowed: an integer, 0 or more"
