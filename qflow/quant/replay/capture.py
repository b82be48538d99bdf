"""Capture: record one forward pass with the call of each operator, so that operators can be replayed (replay.py).

The float model runs once on the batch that will be replayed, so that shapes and branches are those of that batch.
Values become single-assignment: an op that writes in place is kept as a call on a copy of the tensor it writes into,
and a write that other tensors see gives them all anew (views.py). A Python value that no quantizer can change (from an
integer mask) is the same in every replay. Rather than replay a batch wrongly, a capture refuses it: a value whose
version has changed since it was recorded was written by something that tracing does not see, and a Python value from
any other tensor would not change with the quantizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qflow.core.errors import ModelError, QflowError
from qflow.core.graph import TRANSPARENT_KINDS, WEIGHTED_KINDS, OpKind
from qflow.core.stored_text import one_line
from qflow.quant.model.plan import Plan
from qflow.quant.model.runtime import writes_first
from qflow.quant.replay.views import Views, rewritten, seen_anew, zeroed
from qflow.quant.trace.calling import all_tensors, input_tensors
from qflow.quant.trace.ops import FILLS, function_name
from qflow.quant.trace.order import INDEX_ONLY, ORDER_CHANGING
from qflow.quant.trace.state import Frame, without
from qflow.quant.trace.tape import Call, Op, Ref, Tape, references, tensors_in
from qflow.quant.trace.trace import trace
from qflow.quant.trace.tracer import Tracer

METADATA = frozenset(
    ["shape", "dtype", "device", "ndim", "size", "dim", "numel", "stride", "is_cuda", "requires_grad"]
    + ["is_floating_point", "is_contiguous", "layout", "names"]
)
"""Functions and attributes that read a property of a tensor and return no tensor."""

TAKES_VALUE = frozenset(
    ["item", "bool", "int", "float", "tolist", "numpy", "array", "index", "is_nonzero"]
    + ["contains", "equal", "allclose"]
)
"""Functions that make a Python value from tensors."""
_CASTS = (Tensor.float, Tensor.int, Tensor.bool)
"""Tensor methods with the same names that return another tensor."""


class ReplayError(ModelError):
    """A captured batch cannot be replayed op by op; the caller can use full forward passes instead."""

    def __init__(self, reason: str) -> None:
        way_out = "Run full forward passes instead."
        super().__init__(f"A replay runs the captured operators one by one, but got: {reason}. {way_out}")
        self.reason = reason


def reason_of(error: Exception) -> str:
    """Why a replay was given up, in one line: an operator may raise anything when it is run alone.

    Raises the other errors of qflow again, because full forward passes meet them too.
    """
    if isinstance(error, QflowError) and not isinstance(error, ReplayError):
        raise error
    text = error.reason if isinstance(error, ReplayError) else f"{type(error).__name__}: {error}"
    return one_line(text)


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
        self.aliases = self.views = Views()
        self.refs: dict[int, Ref] = {}
        self.versions: dict[int, int] = {}
        self.fresh: set[int] = set()
        """Tensors (ids) that an op has given since the last write."""
        self.moved: set[Ref] = set()
        """Results that quantizers change."""
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
        if name in TAKES_VALUE and function not in _CASTS:
            self._frozen(name, tensors_in((args, kwargs)))
        first = args[0] if args else None
        if module is not None:
            in_place = bool(getattr(function, "inplace", False))
        else:
            in_place = name in ("setitem", *FILLS) or writes_first(function, args, kwargs)
            kwargs = {key: value for key, value in kwargs.items() if key != "out"}  # the result is a tensor of its own
        call = Call(
            None if module is not None else function,
            module,
            _mapped(lambda v: self._reference(v, in_place and v is first), tuple(args)),
            _mapped(lambda v: self._reference(v, False), dict(kwargs)) if kwargs else {},
            in_place and isinstance(first, Tensor),
        )
        tensors = tensors_in((args, kwargs))
        if module in self.plan.skipped:  # its forward is the user's: it may take objects, and its results have no paths
            if any(self.producer(t) is not None for t in all_tensors((args, kwargs))[len(tensors) :]):
                self.give_up(f"{module} takes tensors inside an object")
            tensors = []
        self.views.called(call, None if module is None else function, tensors)
        return call

    def _frozen(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Refuse a Python value from tensors that quantizers change: in a replay it would not change with them."""
        found = [ref.op for t in tensors if (ref := self._ref(t)) in self.moved and ref is not None]
        if found:
            self.give_up(f"a Python value is taken from {self.ops[found[0]].name} by {name}")

    def _ref(self, tensor: Tensor) -> Ref | None:
        """Which result of which op `tensor` holds at present; None for a constant."""
        return self.refs[id(tensor)] if self.producer(tensor) is not None else None

    def _reference(self, value: Any, written: bool) -> Any:
        if isinstance(value, slice):
            self._frozen("slice", tensors_in((value.start, value.stop, value.step)))
        if not isinstance(value, Tensor):
            return tuple(value) if isinstance(value, torch.Size) else value  # so that its integers are seen one by one
        ref = self._ref(value)
        for tensor in self.views.sharing(value) if written else [value]:
            own = self._ref(tensor)
            if own is not None and tensor._version != self.versions[id(tensor)]:
                self.give_up(f"{self.ops[own.op].name} is changed by a write that tracing does not see")
        return ref if ref is not None else value.clone() if written else value

    def leaving(self, name: str, tensor: Tensor) -> None:
        """Record which result of which op this output is."""
        reference = self._reference(tensor, False)
        if isinstance(reference, Ref):
            self.left.append((name, reference))

    def give_up(self, reason: str) -> None:
        """Note that this batch cannot be replayed; the first reason is kept."""
        self.reason = self.reason or reason

    def record_write(self, target: Tensor, value: Any, place: Any = ()) -> None:
        """As in Tracer; a write that is not `target[...] = value` itself went to another tensor in this memory."""
        if self.call is None:
            self.call = self._anew(value, [target])
        super().record_write(target, value, place)

    def spread(self, written: Tensor) -> None:
        """As in Tracer; what Tracer only marks as changed is computed anew by one more op."""
        with torch._C.DisableTorchFunction():
            if self._ref(written) is None or self.versions[id(written)] != written._version:
                return  # no op has recorded this write: whoever reads the tensor is refused
            self.fresh = {id(written)}
            others = self.views.overlapping(written)
            super().spread(written)
            stale = [t for t in others if id(t) not in self.fresh]
            if stale:
                self.call = self._anew(written, stale)
                name, sources = f"{self.ops[-1].name} seen by its views", [(0, written)]
                self.record(name, OpKind.move, "torch.setitem", None, sources, stale)
            for tensor in self.views.sharing(written):
                self.versions[id(tensor)] = tensor._version

    def _anew(self, written: Tensor, targets: Sequence[Tensor]) -> Call | None:
        """The call that gives `targets` after the write to `written`; None, and no replay, if their paths are unknown.

        It reads the tensor that the others are views of: as it was written, or as it was before.
        """
        known = [written, *self.views.overlapping(written)]
        for base in sorted(known, key=lambda t: id(t) not in self.fresh):
            wanted = [self.views.path(base, t) for t in targets]
            path = self.views.path(base, written)
            if path is None or None in wanted:
                continue
            if id(base) in self.fresh:
                return Call(seen_anew, None, (self._ref(base), tuple(wanted)), {}, False)
            whole: Any = self._ref(base)
            if whole is None:  # a constant until now
                whole = zeroed(base, path)
            return Call(rewritten, None, (whole, self._ref(written), path, tuple(wanted)), {}, False)
        self.give_up(f"{self.ops[-1].name} writes into memory that other tensors share in an unknown way")
        return None

    def record(self, name: str, kind: OpKind, *rest: Any, **more: Any) -> None:
        """As in Tracer, and keep the op's values."""
        outputs: Sequence[Tensor] = rest[3]
        with torch._C.DisableTorchFunction():
            super().record(name, kind, *rest, **more)
            op = self.ops[-1]
            for position, tensor in enumerate(outputs):
                self.refs[id(tensor)], self.versions[id(tensor)] = Ref(op.index, position), tensor._version
                self.fresh.add(id(tensor))
            self.moved.update(Ref(op.index, i) for i in range(len(outputs)) if self._moves(op, i))
            self._keep(op, tuple(outputs))

    def _moves(self, op: Op, position: int) -> bool:
        """True if a quantizer can change this result. Indices of order-changing ops follow the float order."""
        call = op.call
        function = function_name(call.function) if call is not None and call.function is not None else ""
        if function in INDEX_ONLY or (function in ORDER_CHANGING and position == 1):
            return False
        own = op.kind in WEIGHTED_KINDS or any(
            op.name in at for at in (self.plan.output_at, self.plan.constants_at, self.plan.weights_at)
        )
        return own or (call is not None and not self.moved.isdisjoint(references((call.args, call.kwargs))))

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


def _not_as_in_float(op: Op) -> bool:
    """True if a prepared model does not simply run this call in float, although it was not traced.

    A further call of a module has the quantizers of its last traced call, and a hook of the whole model that sorts does
    not follow the float order.
    """
    name = function_name(op.call.function) if op.call is not None and op.call.function is not None else ""
    return op.module is not None or name in ORDER_CHANGING


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
        named = {op.name for op in tape.ops} if isinstance(inputs, Frame) else tape.names
        if named & tape.names <= plan.known:
            break
    strange = [op.name for op in tape.ops if op.name not in plan.known and _not_as_in_float(op)]
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
