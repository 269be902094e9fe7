"""Record what the operators of a step compute and move, and group them into the kernels of a fusing compiler.

A `Recorder` is a dispatch mode: it sees every operator of a real forward and backward pass. On the meta device the pass
needs no memory and no arithmetic. Two lists of kernels follow from the record:

- `separate`: each operator is a kernel, which reads all its inputs and writes all its outputs.
- `fuse`: convolutions and matrix products are kernels. Every other operator joins the kernel that made its largest input,
  if that kernel belongs to the same pass, does not depend on the operator's other inputs, and does not compute a sum
  that the operator needs complete; else it starts a kernel. Nearest upsampling is a view: its readers read the small map.
  A kernel reads once what it did not make, and writes once what another kernel reads later. An operator in place counts
  as if it made a new tensor.
- `fuse` with `joint` layers: the operators of such a layer are one kernel in the forward pass and one in the backward
  pass. For an octave convolution this kernel has all paths and poolings, and in the backward pass all gradients.

A batch norm in training is two operators, the statistics (a reduction) and their application, and so is its gradient. A
gradient of a convolution is one operator each for the input, the weight and the bias. Views and allocations move nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
MATRIX, REDUCTION, UPSAMPLING, OTHER = "matrix", "reduction", "upsampling", "other"
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_, aten.bernoulli_}  # in place, without reading what was there
REDUCTIONS = {aten.mean, aten.sum, aten.amax, aten.var_mean, aten.nll_loss_forward}
UPSAMPLINGS = {aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d}


class Use(NamedTuple):
    """A part of a tensor's storage that an operator reads or writes. region: offset, shape and strides of the part."""

    storage: int
    region: tuple[Any, ...]
    nbytes: int
    storage_nbytes: int


@dataclass(frozen=True)
class Operator:
    """One operator of a step. layer: name of the module. padding: bytes beyond the tensors, of channels that are padded."""

    name: str
    role: str
    layer: str
    phase: str
    flops: int
    padding: int
    reads: tuple[Use, ...]
    writes: tuple[Use, ...]


@dataclass(frozen=True)
class Kernel:
    """FLOPs and bytes of one or more operators that run as one. layer, phase: those of the first operator."""

    name: str
    layer: str
    phase: str
    flops: int
    nbytes: int


class Recorder(TorchDispatchMode):
    """List the operators that run within the context in `operators`.

    align: channels of convolutions of one group count as padded to a multiple of align, in FLOPs and bytes; 1: not padded.
    Set `phase` and `layer` to the labels of the operators that follow; `follow` sets `layer` by the modules of a network.
    """

    def __init__(self, align: int = 1) -> None:
        super().__init__()
        self.align, self.phase, self.layer = align, "forward", ""
        self.operators: list[Operator] = []
        self.kept: set[int] = set()
        self._storages: dict[int, torch.UntypedStorage] = {}  # references, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet is aten.convolution_backward:
            self._convolution_backward(args, out)
        elif packet is aten.native_batch_norm:
            self._batch_norm(args, out)
        elif packet is aten.native_batch_norm_backward:
            self._batch_norm_backward(args, out)
        elif "batch_norm" in str(packet):
            raise NotImplementedError(f"{packet} is not split into statistics and their application")
        elif packet not in ALLOCATIONS:
            self._operator(func, args, kwargs, out)
        return out

    def add(
        self,
        name: str,
        reads: Sequence[Any],
        writes: Sequence[Any],
        *,
        role: str = OTHER,
        flops: int = 0,
        padding: int = 0,
    ) -> None:
        """Append an operator. reads, writes: tensors; everything else in them is left out."""
        uses = (tuple(self._use(x) for x in xs if isinstance(x, Tensor) and x.numel()) for xs in (reads, writes))
        self.operators.append(Operator(name, role, self.layer, self.phase, flops, padding, *uses))

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Count what is written to these tensors, although no recorded operator reads it."""
        self.kept |= {self._use(x).storage for x in tensors}

    def follow(self, model: nn.Module) -> None:
        """Set `layer` to the name of the innermost module that runs, and in the backward pass to that of its gradient.

        The hooks stay on the modules.
        """
        entered: list[str] = []

        def enter(module: nn.Module, args: Any, name: str) -> None:
            self._claim(args, self.layer)
            entered.append(self.layer)
            self.layer = name

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self._claim(out, self.layer)
            self.layer = entered.pop()

        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda module, args, name=name: enter(module, args, name))
            module.register_forward_hook(leave)

    def _claim(self, values: Any, layer: str) -> None:
        """Let the autograd nodes that made `values`, and belong to no layer yet, set `layer` when they run."""

        def select(grads: Any) -> None:
            self.layer = layer

        nodes: list[Any] = [x.grad_fn for x in tree_leaves(values) if isinstance(x, Tensor)]
        while nodes:
            node = nodes.pop()
            if node is not None and "layer" not in node.metadata:
                node.metadata["layer"] = layer
                node.register_prehook(select)
                nodes += [before for before, _ in node.next_functions]

    def _use(self, x: Tensor) -> Use:
        storage = x.untyped_storage()
        key = storage._cdata
        self._storages[key] = storage
        nbytes = min(x.numel() * x.element_size(), storage.nbytes())  # an expanded tensor holds fewer values
        return Use(key, (x.storage_offset(), tuple(x.shape), x.stride()), nbytes, storage.nbytes())

    def _operator(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        storages = {x.untyped_storage()._cdata for x in inputs}
        if not func._schema.is_mutable and all(x.untyped_storage()._cdata in storages for x in outputs):
            return  # a view
        packet, flops, padding, role = func.overloadpacket, 0, 0, OTHER
        if packet in flop_registry:
            role, flops = MATRIX, flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet in REDUCTIONS:
            role = REDUCTION
        elif packet in UPSAMPLINGS:
            role = UPSAMPLING
        if packet is aten.convolution:
            flops, padding = self._padded(flops, args[0], args[1], out, groups=args[8])
        reads = inputs[1:] if packet in OVERWRITES else inputs
        self.add(str(packet), reads, outputs, role=role, flops=flops, padding=padding)

    def _padded(self, flops: int, x: Tensor, weight: Tensor, y: Tensor, groups: int) -> tuple[int, int]:
        """FLOPs, and bytes beyond those of the three tensors, where channels are padded to a multiple of `align`."""
        if groups > 1:
            return flops, 0
        c_in, c_out = x.shape[1], y.shape[1]
        more_in, more_out = (-(-c // self.align) * self.align for c in (c_in, c_out))
        padding = x.nbytes // c_in * more_in + y.nbytes // c_out * more_out - x.nbytes - y.nbytes
        padding += weight.nbytes // (c_in * c_out) * more_in * more_out - weight.nbytes
        return flops // (c_in * c_out) * more_in * more_out, padding

    def _convolution_backward(self, args: Any, out: Any) -> None:
        grad, x, weight, *_, groups, mask = args
        formula = flop_registry[aten.convolution_backward]
        for index, (name, read) in enumerate([("input", weight), ("weight", x)]):
            if mask[index]:
                flops = formula(*args[:-1], [index == 0, index == 1, False], out_val=out)
                if index == 1:
                    flops //= groups  # torch's formula for the weight takes all groups as one
                flops, padding = self._padded(flops, x, weight, grad, groups)
                name = f"aten.convolution_backward ({name})"
                self.add(name, [grad, read], [out[index]], role=MATRIX, flops=flops, padding=padding)
        if mask[2]:
            self.add("aten.convolution_backward (bias)", [grad], [out[2]], role=REDUCTION)

    def _batch_norm(self, args: Any, out: Any) -> None:
        x, weight, bias, *running, training, _, _ = args
        y, *saved = out
        if training:
            self.add("aten.native_batch_norm (statistics)", [x], [*saved, *running], role=REDUCTION)
        self.add("aten.native_batch_norm", [x, weight, bias, *(saved if training else running)], [y])

    def _batch_norm_backward(self, args: Any, out: Any) -> None:
        grad, x, weight, *running, mean, invstd, training, _, _ = args
        grad_x, *sums = out
        vectors = [mean, invstd] if training else running
        self.add("aten.native_batch_norm_backward (sums)", [grad, x, *vectors], sums, role=REDUCTION)
        if grad_x is not None:
            reads = [grad, x, weight, *vectors, *sums] if training else [grad, weight, *vectors]
            self.add("aten.native_batch_norm_backward", reads, [grad_x])


def separate(operators: Iterable[Operator]) -> list[Kernel]:
    """Return one kernel for each operator."""
    kernels = []
    for one in operators:
        moved = sum(_nbytes({use.region: use for use in uses}) for uses in _by_storage(one.reads, one.writes))
        kernels.append(Kernel(one.name, one.layer, one.phase, one.flops, moved + one.padding))
    return kernels


def _by_storage(reads: Iterable[Use], writes: Iterable[Use]) -> Iterable[list[Use]]:
    """Yield the uses of each storage, first of the reads, then of the writes."""
    for side in (reads, writes):
        found = defaultdict(list)
        for use in side:
            found[use.storage].append(use)
        yield from found.values()


def _nbytes(parts: dict[tuple[Any, ...], Use]) -> int:
    """Return the bytes of parts of one storage; parts may overlap."""
    return min(
        sum(use.nbytes for use in parts.values()), max((use.storage_nbytes for use in parts.values()), default=0)
    )


def fuse(operators: Iterable[Operator], kept: Iterable[int] = (), joint: Iterable[str] = ()) -> list[Kernel]:
    """Group operators as the module's docstring defines it.

    kept: storages whose last content is written in any case. joint: names of layers that are one kernel each.
    """
    fusion = _Fusion(joint)
    for one in operators:
        fusion.add(one)
    return fusion.kernels(set(kept))


Parts = dict[int, dict[tuple[Any, ...], Use]]
"""Of each storage, the parts that a kernel reads or writes."""


class _Fusion:
    """Groups of operators, each a kernel, as they grow operator by operator."""

    def __init__(self, joint: Iterable[str]) -> None:
        self.joint: dict[str, dict[str, int]] = {name: {} for name in joint}  # of each layer, its group by phase
        self.groups: list[list[Operator]] = []
        self.before: list[int] = []  # as bits, the groups that each group depends on
        self.read: list[Parts] = []
        self.written: list[Parts] = []
        self.writers: dict[int, list[int]] = defaultdict(list)  # of each storage, the newest last
        self.reduced: set[int] = set()  # storages of what reductions made
        self.wanted: set[tuple[int, int]] = set()  # (group, storage) that another group reads
        self.upsampled: dict[int, Use] = {}  # of each storage of an upsampled map, the small map

    def add(self, one: Operator) -> None:
        reads = [self.upsampled.get(use.storage, use) for use in one.reads]
        if one.role == UPSAMPLING:
            self.upsampled[one.writes[0].storage] = reads[0]
            return
        needed = {group for use in reads for group in self.writers[use.storage]}
        group = self._home(one, reads, needed)
        if group is None:
            group = len(self.groups)
            self.groups.append([])
            self.before.append(0)
            self.read.append(defaultdict(dict))
            self.written.append(defaultdict(dict))
        if one.layer in self.joint:
            self.joint[one.layer].setdefault(one.phase, group)
        self.groups[group].append(one)
        self._depend(group, needed - {group})
        self._note_reads(group, reads)
        for use in one.writes:
            self.upsampled.pop(use.storage, None)
            self.written[group][use.storage][use.region] = use
            if self.writers[use.storage][-1:] != [group]:
                self.writers[use.storage].append(group)
            if one.role == REDUCTION:
                self.reduced.add(use.storage)

    def _home(self, one: Operator, reads: Sequence[Use], needed: set[int]) -> int | None:
        """Return the group that the operator joins, or None if it starts a group."""
        if one.layer in self.joint:
            candidates = [group for phase, group in self.joint[one.layer].items() if phase == one.phase]
        elif one.role == MATRIX:
            candidates = []
        else:
            made = [(use.nbytes, self.writers[use.storage][-1]) for use in reads if self.writers[use.storage]]
            candidates = [group for _, group in sorted(made, reverse=True)]
        sums = {group for use in reads if use.storage in self.reduced for group in self.writers[use.storage]}
        for group in candidates:
            same_pass = self.groups[group][0].phase == one.phase
            if same_pass and group not in sums and not any(self.before[other] >> group & 1 for other in needed):
                return group
        return None

    def _depend(self, group: int, needed: set[int]) -> None:
        before = self.before[group]
        for other in needed:
            before |= self.before[other] | 1 << other
        if before != self.before[group]:
            self.before[group] = before
            for index, others in enumerate(self.before):
                if others >> group & 1:
                    self.before[index] = others | before

    def _note_reads(self, group: int, reads: Iterable[Use]) -> None:
        for use in reads:
            writers = self.writers[use.storage]
            if set(writers) != {group} and use.region not in self.written[group].get(use.storage, {}):
                self.read[group][use.storage][use.region] = use
            self.wanted |= {(writer, use.storage) for writer in writers if writer != group}

    def kernels(self, kept: set[int]) -> list[Kernel]:
        found = []
        for group, members in enumerate(self.groups):
            written = [s for s in self.written[group] if s in kept or (group, s) in self.wanted]
            moved = sum(map(_nbytes, self.read[group].values())) + sum(_nbytes(self.written[group][s]) for s in written)
            moved += sum(one.padding for one in members)
            first = members[0]
            name = " + ".join(one.name.removeprefix("aten.") for one in members)
            found.append(Kernel(name, first.layer, first.phase, sum(one.flops for one in members), moved))
        return found
