"""What any network computes, as a torch.fx graph in which every node knows what its value looks like.

torch.fx alone gives up where a forward asks for a size ("if x.shape[2] > 1", "for i in range(frames)", "a, b = x.shape").
Here each node is also computed, on the meta device: no memory, no arithmetic. Python gets its number from there, and what
stays symbolic (x.view(x.shape[0], -1)) goes on to work for other sizes. torch.export was not taken: it lowers modules to
functions, and with them go the names that an octave network shares with the vanilla one.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import operator
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from octvideo.octave.attention import GlobalReasoning, NonLocal
from octvideo.octave.layers import SqueezeExcite, _OctBatchNorm, _OctMaxPool

# Stochastic depth reads `self.training` on its way; as a whole it goes on to do so.
STOCHASTIC_DEPTH = ("DropPath", "StochasticDepth")


class ConversionError(ValueError):
    """A network that cannot be converted: the operation, the line and what to pass in `keep`."""


def trace(model: nn.Module, example_input: Any, keep: tuple[str, ...] = ()) -> fx.Graph:
    """The graph of model(example_input). Node meta: value (meta tensors, numbers), module (name), line (source), opaque.

    keep: names of modules (shell patterns) that stay one node each. Convolutions, norms and torch's own layers do too.
    Where training and evaluation differ in a flag (F.dropout(training=...)), the graph reads the network's own.
    Raises ConversionError where forward cannot be followed, or takes other steps in training than in evaluation.
    """
    shape = _on_meta(model)
    try:
        evaluation, training = (_trace(model, shape, example_input, keep, mode) for mode in (False, True))
    except ConversionError as error:
        _refuse_input(model, example_input)
        raise error
    _follow_training(evaluation, training)
    return evaluation


def kept(name: str, keep: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in keep)


def _on_meta(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = b.detach().to("meta")
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        module._forward_hooks.clear()  # they wait for numbers; hooks before a forward may make its weights
    return twin


def _trace(
    original: nn.Module, model: nn.Module, example_input: Any, keep: tuple[str, ...], training: bool
) -> fx.Graph:
    model.train(training)
    tracer = _Tracer(original, example_input, keep)
    arguments = None
    if not isinstance(example_input, Tensor):
        first = next(iter(inspect.signature(model.forward).parameters))
        arguments = {first: pytree.tree_map(lambda _: fx.PH, example_input)}
    try:
        return tracer.trace(model, arguments)
    except Exception as error:
        module = tracer.failed or ""
        raise ConversionError(_complaint(_raised(error), module, _line_of(error), model)) from error


def _refuse_input(model: nn.Module, example_input: Any) -> None:
    """Where the network fails on the example by itself, no module is to be blamed."""
    try:
        with torch.no_grad():
            copy.deepcopy(model).eval()(copy.deepcopy(example_input))
    except Exception as own:
        raise ConversionError(f"the network itself fails on example_input: {_raised(own)} ({_line_of(own)})") from own


def _raised(error: Exception) -> str:
    """Return an exception's type and the first line of its text."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _complaint(what: str, module: str, line: str, model: nn.Module) -> str:
    if not module:
        return (
            f"{what}\n  in the network's own forward, {line}\n  `keep` takes parts of a network; this line must change"
        )
    kind = type(model.get_submodule(module)).__name__
    return f"{what}\n  in {module} ({kind}), {line}\n  pass keep=[{module!r}] to leave this module as it is"


def _follow_training(evaluation: fx.Graph, training: fx.Graph) -> None:
    """Flags that follow `self.training` read it from the network."""
    pairs = list(zip(evaluation.nodes, training.nodes, strict=False))
    for here, there in pairs:
        same = (here.op, str(here.target)) == (there.op, str(there.target))
        if not same or len(pytree.tree_leaves(here.args)) != len(pytree.tree_leaves(there.args)):
            raise ConversionError(_two_ways(here, there))
    for here, there in pairs:
        leaves, spec = pytree.tree_flatten((here.args, here.kwargs))
        others = pytree.tree_leaves((there.args, there.kwargs))
        flags = [a is False and b is True for a, b in zip(leaves, others, strict=True)]
        if any(flags):
            with evaluation.inserting_before(here):
                mode = evaluation.create_node("get_attr", "training")
            mode.meta = {**here.meta, "value": False}
            leaves = [mode if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
            here.args, here.kwargs = pytree.tree_unflatten(leaves, spec)


def _two_ways(here: fx.Node, there: fx.Node) -> str:
    # The module whose forward decides is the innermost one around both steps.
    paths = (str(node.meta.get("module", "")).split(".") for node in (here, there))
    name = ".".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*paths, strict=False)))
    line = here.meta.get("line", "")
    where = f"in {name}" if name else "in the network's own forward"
    advice = (
        f"pass keep=[{name!r}] to leave this module as it is" if name else "`keep` takes parts of a network; change it"
    )
    return (
        f"forward takes other steps in training than in evaluation\n  {where}: {there.name} in training, "
        f"{here.name} in evaluation, {line}\n  {advice}"
    )


class _Tracer(fx.Tracer):
    def __init__(self, original: nn.Module, example_input: Any, keep: tuple[str, ...]) -> None:
        # No module of Python's is wrapped: math.ceil has the example's number, and torch.compile, should it load in the
        # meantime, does not take the wrapper for the function.
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self.original = original
        self.keep = keep
        self.inputs = iter(pytree.tree_map(_to_meta, pytree.tree_leaves(example_input)))
        self.path: list[str] = []
        self.failed: str | None = None
        self.evaluating = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own_forward = type(m).forward
        return (
            kept(module_qualified_name, self.keep)
            or super().is_leaf_module(m, module_qualified_name)
            or isinstance(m, _OctBatchNorm | _OctMaxPool | SqueezeExcite | NonLocal | GlobalReasoning)
            or (isinstance(m, _ConvNd) and own_forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward))
            or (isinstance(m, _BatchNorm) and (own_forward is _BatchNorm.forward or norm_with_activation(m)))
            or type(m).__name__ in STOCHASTIC_DEPTH
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.evaluating:
            return forward(*args, **kwargs)
        if type(m) is nn.Identity:
            return args[0]  # whatever it is: pytorchvideo passes lists of pathways
        self.path.append(self.path_of_module(m))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.path[-1] if self.failed is None else self.failed
            raise
        finally:
            self.path.pop()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        node.meta["module"] = self.path[-1] if self.path else ""
        node.meta["line"] = _user_line(inspect.currentframe())
        node.meta["opaque"] = kind == "call_module" and kept(str(target), self.keep)
        node.meta["value"] = None if kind == "output" else self._value(node)
        return node

    @torch.no_grad()
    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return next(self.inputs, node.args[0] if node.args else None)
        args: Any
        kwargs: Any
        args, kwargs = (fx.node.map_arg(a, lambda n: n.meta["value"]) for a in (node.args, node.kwargs))
        self.evaluating = True
        try:
            if node.op == "get_attr":
                return _to_meta(operator.attrgetter(str(node.target))(self.root))
            if node.op == "call_function":
                return node.target(*args, **kwargs)  # type: ignore[operator]
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            if node.meta["opaque"]:
                return self._kept_value(str(node.target), args, kwargs)
            # In evaluation: the shapes are the same, and a norm takes a batch of one.
            module = self.root.get_submodule(str(node.target))
            training = module.training
            value = module.eval()(*args, **kwargs)
            module.train(training)
            return value
        finally:
            self.evaluating = False

    def _kept_value(self, name: str, args: Any, kwargs: Any) -> Any:
        """A kept module may need numbers, which the meta device has not: it gets random ones."""
        module = copy.deepcopy(self.original.get_submodule(name)).eval()
        device = next((t.device for t in (*self.original.parameters(), *self.original.buffers())), torch.device("cpu"))

        def filled(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            random = torch.rand(value.shape, device=device)
            return random.to(value.dtype)

        with torch.random.fork_rng(devices=[]):
            out = module(*pytree.tree_map(filled, args), **pytree.tree_map(filled, kwargs))
        return pytree.tree_map(_to_meta, out)


class _Proxy(fx.Proxy):
    """A value that a forward computes; where Python itself wants a number from it, it has the example's."""

    def __getattr__(self, k: str) -> Any:
        if callable(getattr(self.node.meta["value"], k)):
            return Attribute(self, k)  # a method
        return self.tracer.create_proxy("call_function", getattr, (self, k), {})

    def __bool__(self) -> bool:
        return bool(self.node.meta["value"])

    def __len__(self) -> int:
        return len(self.node.meta["value"])

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, i) for i in range(len(self))])

    def __index__(self) -> int:
        return operator.index(self.node.meta["value"])

    def __int__(self) -> int:
        return int(self.node.meta["value"])

    def __float__(self) -> float:
        return float(self.node.meta["value"])


def norm_with_activation(module: nn.Module) -> bool:
    """timm's BatchNormAct2d: a norm with `drop` and `act` behind it."""
    return type(module).__name__ == "BatchNormAct2d" and hasattr(module, "drop") and hasattr(module, "act")


def _to_meta(value: Any) -> Any:
    return value.detach().to("meta") if isinstance(value, Tensor) else value


_TORCH = str(Path(torch.__file__).parent / "_")[:-1]


def _described(filename: str, number: int) -> str:
    return f"{filename}:{number}: {linecache.getline(filename, number).strip()}"


def _user_line(frame: Any) -> str:
    """The line that runs: the innermost one outside torch and this file."""
    while frame is not None and frame.f_code is not _trace.__code__:
        filename = frame.f_code.co_filename
        if not filename.startswith(_TORCH) and filename != __file__:
            return _described(filename, frame.f_lineno)
        frame = frame.f_back
    return "in torch"


def _line_of(error: BaseException) -> str:
    lines, walk = [], error.__traceback__
    while walk is not None:
        filename = walk.tb_frame.f_code.co_filename
        if not filename.startswith(_TORCH) and filename != __file__:
            lines.append(_described(filename, walk.tb_lineno))
        walk = walk.tb_next
    return lines[-1] if lines else "in torch"
