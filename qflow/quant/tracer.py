"""Tracing: the model runs as it is, and every operator call is written on the tape.

Leaf modules (one operator each) are seen by forward hooks, functionals by a TorchFunctionMode, and tensors are
followed by identity, so plain Python loops, branches on shapes and modules called several times need no special
care. What cannot be seen through is written down as a note with the user's line: Python values taken out of
tensors, unknown operators, writes. A value that reaches an operator by a way that tracing does not see (NumPy,
TorchScript) looks like a constant; its fingerprint changes with the inputs, and prepare refuses it.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qflow.core.graph import TRANSPARENT_KINDS, OpKind
from qflow.quant.calling import copied, input_tensors, named_tensors, run_model
from qflow.quant.decompose import decomposition
from qflow.quant.ops import (
    CONSTANTS,
    DATA_DEPENDENT,
    FILLS,
    FUNCTION_KINDS,
    VALUE_ARGUMENTS,
    WEIGHT_ARGUMENT,
    function_name,
    is_leaf,
    is_operator,
    module_kind,
)
from qflow.quant.tape import Op, Tape, Weight, function_attrs, module_attrs, tensors_in


class _Tracer(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.notes: list[str] = []
        self.scopes: list[str] = [""]
        self.leaf_depth = 0
        self.counts: Counter[str] = Counter()
        self.names: set[str] = set()
        self.decomposed: set[str] = set()
        self.fingerprints: dict[str, tuple[str, tuple[float, ...]]] = {}
        self.producer: dict[int, int] = {}
        self.alive: list[Tensor] = []  # keeps ids unique while tracing
        state = [*model.named_parameters(), *model.named_buffers()]
        self.state = {id(tensor): name for name, tensor in state}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.leaf_depth:
            return func(*args, **kwargs)
        parts = decomposition(func, args, kwargs)
        if parts is not None:
            self.decomposed.add(function_name(func))
            with self:
                return parts(*args, **kwargs)
        name = function_name(func)
        sources = tensors_in((args, kwargs))
        versions = [(t, t._version) for t in sources if id(t) in self.producer]
        out = func(*args, **kwargs)
        self.note_writes(name, out, versions)
        if name == "setitem" and len(args) == 3:
            self.record_write(args[0], args[2])
        if is_operator(out):
            unique = self.unique(f"{self.scopes[-1]}[{name}]")
            if name not in CONSTANTS:
                self.record_function(unique, name, sources, args, kwargs, out)
        return out

    def note_writes(self, name: str, out: Any, versions: list[tuple[Tensor, int]]) -> None:
        if name in DATA_DEPENDENT and not isinstance(out, Tensor) and versions:
            self.note_site(f"a Python value is taken from a tensor by {name}")
        if name in ("getitem", "masked_select") and any(t.dtype == torch.bool for t, _ in versions):
            self.note_site(f"{name} with a boolean mask gives a size that depends on the data")
        if name in ("setitem", *FILLS) or (not tensors_in(out) and any(t._version != v for t, v in versions)):
            self.note_site(f"{name} writes into a tensor and is left in float")

    def record_function(self, unique: str, name: str, sources: list[Tensor], args: Any, kwargs: Any, out: Any) -> None:
        kind = FUNCTION_KINDS.get(name, OpKind.other)
        if name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
            kind = OpKind.arithmetic  # element-wise maximum of two tensors
        if not any(id(t) in self.producer for t in sources):
            self.inherit_name(kind, sources, out)
            return
        weight = self.functional_weight(unique, kind, sources, args, kwargs)
        slots = range(VALUE_ARGUMENTS.get(kind, len(sources)))
        if weight is not None:
            slots = range(1)
        outputs = tensors_in(out)
        first = args[0] if args else None
        in_place = outputs[0] is first
        self.record(
            unique,
            kind,
            f"torch.{name}",
            None,
            # what an operator writes into is its result, not one of its constants
            [(i, sources[i]) for i in slots if i < len(sources) and (i or not in_place or id(first) in self.producer)],
            outputs,
            weight=weight,
            attrs=function_attrs(kind, sources, args, kwargs),
            operands=_operands(kind, name, args, kwargs),
        )
        base = outputs[0]._base if in_place else None
        if base is not None and id(base) in self.producer:
            self.record_write(base, outputs[0])  # an in-place operator on a view changes what it views

    def inherit_name(self, kind: OpKind, sources: list[Tensor], out: Any) -> None:
        """A view of a parameter (`cls_token.expand(...)`) goes by the parameter's name."""
        named = next((self.state[id(t)] for t in sources if id(t) in self.state), None)
        if named is not None and kind in TRANSPARENT_KINDS:
            for i, tensor in enumerate(tensors_in(out)):
                self.state[id(tensor)] = named if len(tensors_in(out)) == 1 else f"{named}:{i}"
                self.alive.append(tensor)

    def functional_weight(
        self, unique: str, kind: OpKind, sources: list[Tensor], args: Any, kwargs: Any
    ) -> Weight | None:
        """Where `F.conv2d(x, w)` takes a constant weight from; None if `w` is computed from the inputs."""
        if kind not in WEIGHT_ARGUMENT:
            return None
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        if not isinstance(weight, Tensor) or id(weight) in self.producer:
            return None
        slot = next(i for i, t in enumerate(sources) if t is weight)
        self.keep_fingerprint(f"weight of {unique}", unique, weight)
        axis = 1 if kind == OpKind.conv_transpose else 0
        return Weight(self.state.get(id(weight), unique), slot, axis, tuple(weight.shape))

    def keep_fingerprint(self, name: str, reader: str, tensor: Tensor) -> None:
        values = tensor.detach().double().nan_to_num(posinf=0.0, neginf=0.0)
        sums = (float(values.sum()), float(values.abs().sum()), float(values.square().sum()))
        self.fingerprints.setdefault(name, (reader, (*map(float, tensor.shape), *sums)))

    def record_write(self, target: Tensor, value: Any) -> None:
        """`target[...] = value`: the target now carries both, so that what wrote it is not lost."""
        sources = [(i, t) for i, t in enumerate([target, *tensors_in(value)]) if id(t) in self.producer]
        if sources:
            self.record(
                self.unique(f"{self.scopes[-1]}[setitem]"), OpKind.move, "torch.setitem", None, sources, [target]
            )

    def unique(self, base: str) -> str:
        """`base`, or `base(n)` for its n-th repetition."""
        n = self.counts[base]
        self.counts[base] += 1
        name = base if n == 0 else f"{base}({n})"
        self.names.add(name)
        return name

    def note_site(self, what: str) -> None:
        """Write down `what` with the innermost line of the user's code."""
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        site = f" at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else ""
        note = f"{self.scopes[-1] or 'model'}: {what}{site}"
        if note not in self.notes:
            self.notes.append(note)

    def constant(self, tensor: Tensor, reader: str) -> int | None:
        """Index of the op that stands for a constant; None for indices, masks and single numbers."""
        if not tensor.is_floating_point() or tensor.numel() < 2:
            return None
        own = self.state.get(id(tensor))
        if own is None and not bool(tensor.any()):
            self.keep_fingerprint(f"zeros read by {reader}", reader, tensor)
            return None  # fresh zeros are exact on every grid
        name = f"const[{own or reader}]"
        known = next((op.index for op in self.ops if op.kind == OpKind.constant and op.name == name), None)
        if known is not None and own is not None:
            return known
        name = self.unique(name)
        self.keep_fingerprint(name, reader, tensor)
        op = Op(len(self.ops), name, OpKind.constant, "constant", None, "", (), (), tuple(tensor.shape), True)
        self.ops.append(op)
        return op.index

    def record(
        self,
        name: str,
        kind: OpKind,
        op_type: str,
        module: str | None,
        sources: Sequence[tuple[int, Tensor]],
        outputs: Sequence[Tensor],
        *,
        weight: Weight | None = None,
        attrs: dict[str, int] | None = None,
        operands: tuple[float | None, ...] = (),
    ) -> None:
        """Append one op and make it the producer of its outputs. `sources` pair a slot with its tensor."""
        found: list[tuple[int, int]] = []
        for slot, tensor in sources:
            known = self.producer.get(id(tensor))
            # what is unknown stays as it is inside: its weights and biases are no values of the device's
            index = known if known is not None or kind == OpKind.other else self.constant(tensor, name)
            if index is not None:
                found.append((slot, index))
        op = Op(
            index=len(self.ops),
            name=name,
            kind=kind,
            op_type=op_type,
            module=module,
            scope=self.scopes[-1],
            inputs=tuple(index for _, index in found),
            slots=tuple(slot for slot, _ in found),
            shape=tuple(outputs[0].shape),
            floating=outputs[0].is_floating_point(),
            single=len(outputs) == 1,
            weight=weight,
            attrs=attrs or {},
            operands=operands,
        )
        self.ops.append(op)
        for tensor in outputs:
            self.producer[id(tensor)] = op.index
            self.alive.append(tensor)


def _operands(kind: OpKind, name: str, args: Any, kwargs: Any) -> tuple[float | None, ...]:
    """Positional arguments of an element-wise functional: the number, or None for a tensor (or an open bound)."""
    if kind not in (OpKind.add, OpKind.mul, OpKind.arithmetic, OpKind.lut, OpKind.relu):
        return ()
    values = list(args)
    if name in ("clamp", "clip", "hardtanh", "threshold"):
        low, high = kwargs.get("min", kwargs.get("min_val")), kwargs.get("max", kwargs.get("max_val"))
        values = [*values, *[None] * (3 - len(values))][:3]
        values = [values[0], values[1] if low is None else low, values[2] if high is None else high]
    elif len(values) < 2 and "other" in kwargs:
        values.append(kwargs["other"])
    if kwargs.get("alpha", 1) != 1 or kwargs.get("rounding_mode"):
        values.append(None)  # one operand more than the function has: its result is not the plain one
    return tuple(float(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else None for v in values)


class _Hooks:
    """Forward hooks of one trace; `skip` are module paths that run as one float operator."""

    def __init__(self, tracer: _Tracer, skip: Collection[str]) -> None:
        self.tracer = tracer
        self.skip = skip

    def enter_leaf(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.tracer.leaf_depth += 1

    def leave_leaf(self, path: str) -> Any:
        tracer = self.tracer

        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            tracer.leaf_depth -= 1
            outputs = tensors_in(out)
            if tracer.leaf_depth or not outputs:
                return
            skipped = path in self.skip
            kind = OpKind.skipped if skipped else module_kind(module) or OpKind.other
            op_type = f"{type(module).__module__}.{type(module).__qualname__}"
            sources = list(enumerate(tensors_in((args, kwargs))))
            attrs = {} if skipped else module_attrs(module, [t for _, t in sources])
            tracer.record(tracer.unique(path), kind, op_type, path, sources, outputs, attrs=attrs)

        return hook

    def enter_scope(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.tracer.scopes.append(path)

        return hook

    def leave_scope(self, module: nn.Module, args: Any, out: Any) -> None:
        self.tracer.scopes.pop()

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for path, module in model.named_modules():
            if path in self.skip or is_leaf(module):
                handles.append(module.register_forward_pre_hook(self.enter_leaf, with_kwargs=True))
                handles.append(module.register_forward_hook(self.leave_leaf(path), with_kwargs=True))
            elif path:
                handles.append(module.register_forward_pre_hook(self.enter_scope(path)))
                handles.append(module.register_forward_hook(self.leave_scope, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def trace(model: nn.Module, inputs: Any, skip: Collection[str] = ()) -> Tape:
    """Record one forward pass of `model` on `inputs` (a tensor, a tuple to splat, or a dict of keywords).

    `skip` are paths of modules that stay float, each one operator on the tape. The model is neither copied nor
    changed; it runs under no_grad in the mode it is in.
    """
    tracer = _Tracer(model)
    inputs = copied(inputs)
    for name, tensor in input_tensors(model, inputs):
        tracer.record(tracer.unique(f"quant[{name}]"), OpKind.input, "QuantStub", None, [], [tensor])
    with torch.no_grad(), _Hooks(tracer, skip).on(model), tracer:
        outputs = run_model(model, inputs)
    named = []
    for name, tensor in named_tensors(outputs):
        if id(tensor) in tracer.producer:
            named.append((name, tracer.producer[id(tensor)]))
        else:
            tracer.keep_fingerprint(f"output {name}", f"output {name}", tensor)
            tracer.notes.append(f"output {name} does not depend on the inputs as far as tracing can see")
    calls = {
        path: tracer.counts[path]
        for path, module in model.named_modules()
        if is_leaf(module) and not any(path == s or path.startswith(f"{s}.") for s in skip)
    }
    read = {op.weight.name for op in tracer.ops if op.weight is not None}
    for path in [p for p, count in calls.items() if count == 0 and f"{p}.weight" in read]:
        calls[path] = 1  # its weight was used by a functional, as attention does with out_proj
    return Tape(
        ops=tracer.ops,
        outputs=named,
        calls=calls,
        notes=tracer.notes,
        names=frozenset(tracer.names),
        decomposed=frozenset(tracer.decomposed),
        fingerprints=tracer.fingerprints,
    )
