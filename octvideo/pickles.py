"""Pickles read as data: their instructions are followed here, and nothing that a pickle names is imported or called.

pickle.Unpickler with another find_class would not do: it allocates memory for sizes that a file merely claims, and
hashes keys nested deep enough to overflow the C stack.
"""

from __future__ import annotations

import pickle
import pickletools
import sys
from collections.abc import Callable, Sequence
from typing import IO, Any, Protocol

INSTRUCTION = 100  # bytes of memory that an instruction may come to need: an object, its place in a list, its number
CALL = 600  # the same for an instruction that makes an object of another kind, such as a tensor

_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING"}
_LITERALS |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_INT64 = 1 << 63


class Maker(Protocol):
    """What a pickle's names, calls, states and persistent identities mean. Each may raise pickle.UnpicklingError."""

    def find(self, module: str, name: str) -> Any: ...

    def call(self, function: Any, args: tuple[Any, ...]) -> Any: ...

    def build(self, value: Any, state: Any) -> None: ...

    def load(self, identity: Any) -> Any: ...


def load(file: IO[bytes], maker: Maker, budget: int) -> Any:
    """Return what a pickle describes, of dicts, lists, tuples, plain values, and what `maker` gives.

    The file is left after the pickle. Its reads must not allocate for more than is left in it (BytesIO and
    claims.BoundedFile do not). Keys are text and integers of 64 bits. Bytes of Python 2 strings become characters (latin1).
    budget: bytes of memory that the objects may come to take, by an estimate.
    Errors: ValueError, EOFError, LookupError, pickle.UnpicklingError.
    """
    return _Reader(maker, budget).load(file)


class _Reader:
    def __init__(self, maker: Maker, budget: int) -> None:
        self.maker, self.budget, self.left = maker, budget, budget
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def load(self, file: IO[bytes]) -> Any:
        for opcode, argument, _ in pickletools.genops(file):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            self._charge(name, argument)
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif not self._collect(name) and not self._remember(name, argument):
                self._make(name, argument)
        raise EOFError("it has no end")

    def _charge(self, name: str, argument: Any) -> None:
        self.left -= CALL if name in ("REDUCE", "BINPERSID") else INSTRUCTION
        if isinstance(argument, (str, bytes)):
            self.left -= sys.getsizeof(argument)
        if self.left < 0:
            raise pickle.UnpicklingError(f"its objects take more than {self.budget >> 20} MB of memory")

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _collect(self, name: str) -> bool:
        """Follow an instruction that fills a tuple, list or dict; False for any other."""
        match name:
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                self.stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = _TUPLES[name]
                self.stack[-count:] = [tuple(self.stack[-count:])]
            case "APPEND":
                value = self.stack.pop()
                _list(self.stack[-1]).append(value)
            case "APPENDS":
                values = self._since_mark()
                _list(self.stack[-1]).extend(values)
            case "SETITEM":
                value, key = self.stack.pop(), self.stack.pop()
                update(self.stack[-1], [key], [value])
            case "SETITEMS":
                values = self._since_mark()
                update(self.stack[-1], values[::2], values[1::2])
            case _:
                return False
        return True

    def _remember(self, name: str, argument: Any) -> bool:
        """Follow an instruction about the memo, or one without effect; False for any other."""
        match name:
            case "PROTO" | "FRAME":
                pass
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case _:
                return False
        return True

    def _make(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "GLOBAL":
                stack.append(self.maker.find(*str(argument).split(" ", 1)))
            case "STACK_GLOBAL":
                global_name, module = stack.pop(), stack.pop()
                if not (isinstance(module, str) and isinstance(global_name, str)):
                    raise pickle.UnpicklingError("it asks for what is no name")
                stack.append(self.maker.find(module, global_name))
            case "REDUCE":
                args, function = stack.pop(), stack.pop()
                if not isinstance(args, tuple):
                    raise pickle.UnpicklingError(f"it calls with a {type(args).__name__}")
                stack.append(self.maker.call(function, args))
            case "BUILD":
                state = stack.pop()
                self.maker.build(stack[-1], state)
            case "BINPERSID":
                stack.append(self.maker.load(stack.pop()))
            case _:
                raise pickle.UnpicklingError(f"it uses {name}, which no weights need")


def update(target: Any, keys: Sequence[Any], values: Sequence[Any]) -> None:
    """Add items to a dict. Keys of other kinds may be nested too deep to be hashed, or be chosen to have one hash."""
    if not isinstance(target, dict):
        raise pickle.UnpicklingError(f"items for a {type(target).__name__}, which is no dict")
    for key in keys:
        if not isinstance(key, str) and not (isinstance(key, int) and -_INT64 <= key < _INT64):
            raise pickle.UnpicklingError(f"a {type(key).__name__} as a key; text and integers of 64 bits are read")
    target.update(zip(keys, values, strict=True))


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise pickle.UnpicklingError(f"a {type(value).__name__} where a list is expected")
    return value
