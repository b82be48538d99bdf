"""Capture: record one forward pass with the call of each operator, so that operators can be replayed (replay.py).

The float model runs once on the batch that will be replayed, so that shapes and branches are those of that batch.
Values become single-assignment: an op that writes in place is kept as a call on a copy of the tensor it writes into.
Rather than replay a batch wrongly, a capture refuses it: a write through a view changes other values than its own, a
value whose version has changed since it was recorded was written by something that tracing does not see, and a Python
number from a tensor would not change with the quantizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qflow.core.errors import ModelError
from qflow.core.graph import TRANSPARENT_KINDS, OpKind
from qflow.quant.model.plan import Plan
from qflow.quant.model.runtime import writes_first
from qflow.quant.trace.calling import input_tensors
from qflow.quant.trace.ops import FILLS, function_name
from qflow.quant.trace.state import Frame, without
from qflow.quant.trace.tape import Call, Op, Ref, Tape
from qflow.quant.trace.trace import trace
from qflow.quant.trace.tracer import Tracer

METADATA = frozenset(
    ["shape", "dtype", "device", "ndim", "size", "dim", "numel", "stride", "is_cuda", "requires_grad"]
    + ["is_floating_point", "is_contiguous", "layout", "names"]
)
"""Functions and attributes that read a property of a tensor and return no tensor."""


TAKES_VALUE = frozenset(["item", "bool", "int", "float", "tolist", "numpy", "index"])
"""Functions that make a Python value from a tensor."""
_CASTS = (Tensor.float, Tensor.int, Tensor.bool)
"""Tensor methods with the same names that return another tensor."""


class ReplayError(ModelError):
    """A captured batch cannot be replayed op by op; the caller can use full forward passes instead."""

    def __init__(self, reason: str) -> None:
        way_out = "Write into a copy, or skip the module that does so."
        super().__init__(f"A replay runs the captured operators one by one, but got: {reason}. {way_out}")
        self.reason = reason


@dataclass
class Captured:
    """The calls of one batch and, as far as they were kept, its float values (op index -> the op's results)."""

    tape: Tape
    outputs: tuple[tuple[str, Ref], ...]
    inputs: dict[int, Tensor]
    values: dict[int, tuple[Tensor, ...]]
    """Only values that nothing has overwritten since."""
    complete: bool
    """False if `values` were dropped because they exceed the memory limit."""


class Capture(Tracer):
    """A tracer that keeps each op's call, and the values if they fit into `memory` bytes."""

    def __init__(self, model: nn.Module, plan: Plan, memory: float, inner: bool) -> None:
        super().__init__(model)
        self.plan, self.keeps_inner = plan, inner
        self.paths = {id(module): path for path, module in self.modules.items()}
        self.positions: dict[int, int] = {}
        self.versions: dict[int, int] = {}
        self.values: dict[int, tuple[tuple[Tensor, int], ...]] = {}
        self.left: list[tuple[str, Ref]] = []
        self.memory = memory
        self.complete = True
        self.reason = ""

    def calling(self, function: Any, args: Any, kwargs: Any) -> Call | None:
        """The call, with `Ref`s in place of results of ops."""
        if function_name(function) in METADATA:
            return None
        with torch._C.DisableTorchFunction():  # user hooks run under the mode, which would trace the accesses here
            return self._call(function, args, kwargs)

    def _call(self, function: Any, args: Any, kwargs: Any) -> Call:
        module = self.paths.get(id(function)) if isinstance(function, nn.Module) else None
        name = "" if module is not None else function_name(function)
        if name in TAKES_VALUE and function not in _CASTS and isinstance(args[0] if args else None, Tensor):
            self._frozen(name, args[0])
        kwargs = {key: value for key, value in kwargs.items() if key != "out"}  # a replay needs the result alone
        first = args[0] if args else None
        if module is not None:
            in_place = bool(getattr(function, "inplace", False))
        else:
            in_place = name in ("setitem", *FILLS) or writes_first(function, args, kwargs)
        return Call(
            None if module is not None else function,
            module,
            _mapped(lambda v: self._reference(v, in_place and v is first), tuple(args)),
            _mapped(lambda v: self._reference(v, False), dict(kwargs)) if kwargs else {},
            in_place and isinstance(first, Tensor),
        )

    def _frozen(self, name: str, tensor: Tensor) -> None:
        """Refuse a Python number from a tensor: in a replay it would not change with the quantizers."""
        index = self.producer(tensor)
        if index is not None and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            self.give_up(f"a Python value is taken from {self.ops[index].name} by {name}")

    def _reference(self, value: Any, written: bool) -> Any:
        if not isinstance(value, Tensor):
            return tuple(value) if isinstance(value, torch.Size) else value  # so that its integers are seen one by one
        index = self.producer(value)
        if index is None:
            return value.clone() if written else value
        if value._version != self.versions[id(value)]:
            self.give_up(f"{self.ops[index].name} is changed by a write that tracing does not see")
        return Ref(index, self.positions[id(value)])

    def leaving(self, name: str, tensor: Tensor) -> None:
        """Record which result of which op this output is."""
        reference = self._reference(tensor, False)
        if isinstance(reference, Ref):
            self.left.append((name, reference))

    def give_up(self, reason: str) -> None:
        """Note that this batch cannot be replayed; the first reason is kept."""
        self.reason = self.reason or reason

    def record_write(self, target: Tensor, value: Any, place: Any = ()) -> None:
        """As in Tracer; a write that is not `target[...] = value` itself went through a view of the target."""
        if self.call is None or function_name(self.call.function) != "setitem":
            self.give_up(f"{self.ops[-1].name} writes into a view")
        super().record_write(target, value, place)

    def record(self, name: str, kind: OpKind, *rest: Any, **more: Any) -> None:
        """As in Tracer, and keep the op's values."""
        outputs: Sequence[Tensor] = rest[3]
        with torch._C.DisableTorchFunction():
            super().record(name, kind, *rest, **more)
            for position, tensor in enumerate(outputs):
                self.positions[id(tensor)], self.versions[id(tensor)] = position, tensor._version
            self._keep(self.ops[-1], tuple(outputs))

    def _keep(self, op: Op, outputs: tuple[Tensor, ...]) -> None:
        if _within(op, self.plan) and not self.keeps_inner:
            return  # a replay computes it together with the rest of the group
        self.memory -= sum(t.numel() * t.element_size() for t in outputs if t._base is None)
        if self.memory < 0:
            self.values.clear()
            self.complete = False
        if self.complete:
            self.values[op.index] = tuple((t.detach(), t._version) for t in outputs)


def _within(op: Op, plan: Plan) -> bool:
    """True for an op inside a fused group: it has no output quantizer."""
    return op.floating and op.kind not in TRANSPARENT_KINDS and op.name not in plan.output_at


def without_inner(captured: Captured, plan: Plan) -> Captured:
    """The same batch with only those values that a capture without `inner` keeps."""
    values = {i: tensors for i, tensors in captured.values.items() if not _within(captured.tape.ops[i], plan)}
    return replace(captured, values=values)


def _mapped(function: Callable[[Any], Any], structure: Any) -> Any:
    """As tree_map, but cheaper for flat arguments."""
    if type(structure) is tuple and all(type(v) not in (tuple, list, dict) for v in structure):
        return tuple([function(v) for v in structure])
    return tree_map(function, structure)


def capture(model: nn.Module, plan: Plan, inputs: Any, memory: float, inner: bool = False) -> Captured:
    """Run `model` on `inputs` and record each op's call; values are kept if they fit into `memory` bytes.

    With `inner`, values inside fused groups are kept too. Raises ReplayError if the batch cannot be replayed.
    """
    if isinstance(inputs, Frame):
        own = sorted(inputs.state.keys() - without(inputs.state, plan.skipped).keys())
        if own:
            raise ReplayError(f"a skipped module keeps the state {own[0]}")
    for _ in range(2):  # the first pass may have filled a cache
        tracer = Capture(model, plan, memory, inner)
        tracer.given = plan.sites  # functionals get the same names as in the prepared model
        tape = trace(model, inputs, plan.skipped, tracer)
        # before the first frame of a sequence, constants of its own may fill the state
        names = {op.name for op in tape.ops} if isinstance(inputs, Frame) else tape.names
        strange = sorted(names - plan.known)
        if not strange:
            break
    if tracer.reason or strange:
        raise ReplayError(tracer.reason or f"{strange[0]} was not seen when the model was prepared")
    tensors = [tensor for _, tensor in input_tensors(model, inputs)]
    given = [op for op in tape.ops if op.kind == OpKind.input]
    inputs_at = {op.index: t for op, t in zip(given, tensors, strict=True)}
    values = {
        index: tuple(t for t, _ in pairs)
        for index, pairs in tracer.values.items()
        if all(t._version == version for t, version in pairs)
    }
    return Captured(tape, tuple(tracer.left), inputs_at, values, tracer.complete)
