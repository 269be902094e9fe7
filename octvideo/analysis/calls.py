"""Count the operator calls of a training step. In eager mode each one is at least one kernel launch on a GPU.

A small batch on a fast GPU waits for these calls and not for the arithmetic, so their number limits the speed there.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = frozenset(
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
"""Operators that reserve memory and write nothing."""

RESHAPES = frozenset({"aten::_unsafe_view", "aten::_reshape_alias"})
"""Operators that return the memory of their input, but whose schema does not declare it."""


class Calls(NamedTuple):
    """Calls by operator name, such as "aten::add". views: operators that compute nothing (views and allocations)."""

    launches: Counter[str]
    views: Counter[str]


def operator_calls(step: Callable[[], object]) -> Calls:
    """Run `step` once and count the operators that reach the device's backend, in forward and backward passes alike.

    An operator counts once, also where its implementation launches several kernels or copies an argument first: a
    convolution's backward pass launches at least two kernels. The meta device runs steps of any size without arithmetic.
    """
    with _Counter() as counter:
        step()
    return counter.calls


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = Calls(Counter(), Counter())

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        computes = not (func.is_view or name in ALLOCATIONS or name in RESHAPES)
        (self.calls.launches if computes else self.calls.views)[name] += 1
        return func(*args, **(kwargs or {}))


class _Compiled(Exception):
    """Inductor is done, and the graph would run now."""


def compiled_calls(step: Callable[[], object]) -> Counter[str]:
    """Run `step` until Inductor has compiled its first graph for a CPU, and count the kernels that Inductor schedules.

    A network that is one graph is compiled forward and backward by then, so both passes are counted. Neither runs, and the
    C++ compiler is not called. Keys: "generated", kernels that Inductor writes, after fusion; "library", calls of operators
    that it does not write, such as convolutions. On a CPU, Inductor may put several scheduled kernels into one C++ function;
    on a GPU, each one is a launch, or several for a reduction.
    """
    from torch._functorch import config as autograd_config
    from torch._inductor import config, ir
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.output_code import CompiledFxGraph
    from torch._inductor.scheduler import NopKernelSchedulerNode

    counts: Counter[str] = Counter(generated=0, library=0)

    def count(nodes: list[Any]) -> list[Any]:
        for node in nodes:
            # A multi-output is one result of a call that has its own node.
            if not isinstance(node, NopKernelSchedulerNode) and not isinstance(node.node, ir.MultiOutput):
                counts["library" if node.is_extern() else "generated"] += 1
        return nodes

    # Inductor schedules nothing for a graph that it finds in a cache.
    with (
        config.patch(_post_fusion_custom_pass=count, force_disable_caches=True),
        autograd_config.patch(force_non_lazy_backward_lowering=True),
        mock.patch.object(AsyncCompile, "cpp_pybinding"),
        mock.patch.object(CompiledFxGraph, "__call__", side_effect=_Compiled),
        contextlib.suppress(_Compiled),
    ):
        step()
    if not counts.total():
        raise RuntimeError("Inductor compiled nothing in this step: pass a step whose model is not compiled yet")
    return counts
