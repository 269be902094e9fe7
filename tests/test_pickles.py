"""A pickle's instructions, followed without any call: what Python's own reader makes of plain values."""

import pickle
from io import BytesIO
from typing import Any

import pytest

from octvideo import pickles

PLAIN = {"a": [1, -2, 2**40, 1.5, None, True, False], "b": (1, (2,), (), (1, 2, 3, 4)), 3: {"c": "ä😀", "d": b"\xff"}}


class Noted:
    """Each name, call, state and identity becomes a tuple."""

    def find(self, module: str, name: str) -> Any:
        return "name", module, name

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        return ["call", function, args]

    def build(self, value: Any, state: Any) -> None:
        value.append(state)

    def load(self, identity: Any) -> Any:
        return "identity", identity


def load(content: bytes, budget: int = 1 << 20) -> Any:
    return pickles.load(BytesIO(content), Noted(), budget)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_values(protocol: int) -> None:
    assert load(pickle.dumps(PLAIN, protocol)) == PLAIN


def test_shared_and_recursive_values() -> None:
    one: list[Any] = [1]
    one.append(one)
    found = load(pickle.dumps([one, one], 2))
    assert found[0] is found[1] is found[0][1]


def test_calls_are_the_makers() -> None:
    content = b"\x80\x02cos\nsystem\nU\x02ls\x85R}U\x01aK\x01sb."
    assert load(content) == ["call", ("name", "os", "system"), ("ls",), {"a": 1}]
    assert load(b"\x80\x04\x8c\x02os\x8c\x06system\x93.") == ("name", "os", "system")
    assert load(b"\x80\x02K\x07Q.") == ("identity", 7)


def test_pickles_one_after_the_other() -> None:
    file = BytesIO(pickle.dumps(1, 2) + pickle.dumps("b", 2) + b"rest")
    assert [pickles.load(file, Noted(), 1 << 20) for _ in range(2)] == [1, "b"] and file.read() == b"rest"


def test_the_budget_is_of_memory() -> None:
    content = pickle.dumps(["x" * 1000], 2)
    assert load(content, budget=2000) == ["x" * 1000]
    with pytest.raises(pickle.UnpicklingError, match="take more than"):
        load(content, budget=1000)
    with pytest.raises(pickle.UnpicklingError, match="take more than"):
        load(b"\x80\x02](" + b"}" * 20_000 + b"e.")


DAMAGED = [b"", b"\x80\x02", b"\x80\x02.", b"\x80\x02e.", b"\x80\x02K\x01a.", b"\x80\x02]K\x01K\x01s.", b"\xff"]
DAMAGED += [
    b"\x80\x02h\x05.",
    b"\x80\x02cos\nsystem\nK\x01R.",
    b"\x80\x04K\x01K\x01\x93.",
    b"\x80\x02]1.",
    b"\x80\x02](e",
]


@pytest.mark.parametrize("content", DAMAGED)
def test_damage_is_one_of_the_promised_errors(content: bytes) -> None:
    with pytest.raises((ValueError, EOFError, LookupError, pickle.UnpicklingError)):
        load(content)
