"""Tracing: the unchanged model runs once, and every operator call is recorded on the tape.

Leaf modules (one operator each) are recorded in their forward, functionals by a TorchFunctionMode. Tensors are followed
by identity, so Python loops, branches on shapes and modules that are called several times need no special care. Where
tracing cannot follow (Python values from tensors, writes), a note names the line in the user's code. A value that is
computed outside of torch operators (NumPy, TorchScript) looks like a constant; its fingerprint changes with the inputs,
and `prepare` refuses the model. A write changes all live tensors that share the memory (aliases.py): views and the
tensors that they view.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qflow.core.graph import TRANSPARENT_KINDS, OpKind
from qflow.quant.trace.aliases import Aliases
from qflow.quant.trace.arguments import value_slots
from qflow.quant.trace.call_names import CallNames
from qflow.quant.trace.decompose import decomposition
from qflow.quant.trace.ops import (
    CONSTANTS,
    DATA_DEPENDENT,
    FILLS,
    FUNCTION_KINDS,
    VALUE_ARGUMENTS,
    WEIGHT_ARGUMENT,
    function_name,
    is_operator,
)
from qflow.quant.trace.sites import user_line
from qflow.quant.trace.tape import Call, Op, Weight, function_attrs, operands, tensors_in


class Tracer(CallNames, TorchFunctionMode):
    """One trace. Tensors are identified by `id` through weak references, so tracing keeps no activation alive."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.notes: list[str] = []
        self.scopes: list[str] = [""]
        self.leaf_depth = 0
        self.decomposed: set[str] = set()
        self.fingerprints: dict[str, tuple[str, tuple[float, ...]]] = {}
        self.producers: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.named_views: list[Tensor] = []  # kept alive, so that the ids in `state` stay unique
        self.aliases = Aliases()
        self.call: Call | None = None
        self.modules = dict(model.named_modules())
        self.attention = {path for path, module in self.modules.items() if type(module) is nn.MultiheadAttention}
        state = [*model.named_parameters(), *model.named_buffers()]
        self.state = {id(tensor): name for name, tensor in state}
        self.whole = {id(tensor): name for name, tensor in state}
        """Names of tensors that can have a weight quantizer: parameters, and the parts of a parameter that is split."""
        self.weights: dict[str, tuple[tuple[int, ...], int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.leaf_depth:
            return func(*args, **kwargs)
        parts = decomposition(func, args, kwargs)
        if parts is not None:
            self.decomposed.add(function_name(func))
            with self:
                out = parts(*args, **kwargs)
            if func is F.multi_head_attention_forward and self.scopes[-1] in self.attention:
                self.mark_attention(out[0])
            return out
        name = function_name(func)
        self.call = self.calling(func, args, kwargs)
        sources = tensors_in((args, kwargs))
        versions = [(t, _version(t)) for t in sources]
        out = func(*args, **kwargs)
        self.note_writes(name, args, out, [(t, v) for t, v in versions if self.producer(t) is not None])
        if name == "setitem" and len(args) == 3:
            self.record_write(args[0], args[2])
        if is_operator(out):
            unique = self.called(f"{self.scopes[-1]}[{name}]")
            if name not in CONSTANTS:
                self.record_function(unique, func, sources, args, kwargs, out)
            for tensor in tensors_in(out):
                self.aliases.add(tensor)
        changed = [t for t, v in versions if _version(t) != v]  # the written tensor and all that share its memory
        given = tensors_in(args[0] if name == "setitem" else out)
        for tensor in [t for t in changed if any(t is g for g in given)] or changed:
            self.spread(tensor)
        return out

    def producer(self, tensor: Any) -> int | None:
        """Index of the op whose result is `tensor`, or None."""
        reference, index = self.producers.get(id(tensor), (None, 0))
        return index if reference is not None and reference() is tensor else None

    def calling(self, function: Any, args: Any, kwargs: Any) -> Call | None:
        """The call that the next op keeps in a capture (quant/replay/capture.py); None if only structure is traced."""
        return None

    def leaving(self, name: str, tensor: Tensor) -> None:
        """Called for each output of the model; only a capture keeps it."""

    def is_value(self, value: Any) -> bool:
        """True for a constant other than zero, which would need a quantizer on the device."""
        return any(t.is_floating_point() and self.producer(t) is None and bool(t.any()) for t in tensors_in(value))

    def note_writes(self, name: str, args: Any, out: Any, versions: list[tuple[Tensor, int]]) -> None:
        if name in DATA_DEPENDENT and not isinstance(out, Tensor) and versions:
            self.note_site(f"a Python value is taken from a tensor by {name}")
        by_mask = name == "getitem" and any(t.dtype == torch.bool for t in tensors_in(args[1:]))
        if by_mask or name == "masked_select":
            self.note_site(f"{name} with a boolean mask gives a size that depends on the data")
        if name == "setitem" and args[2:] and self.is_value(args[2]):
            self.note_site("setitem writes a constant that has no quantizer")
        if name in ("setitem", *FILLS) or (not tensors_in(out) and any(t._version != v for t, v in versions)):
            self.note_site(f"{name} writes into a tensor and is left in float")

    def record_function(self, unique: str, func: Any, sources: list[Tensor], args: Any, kwargs: Any, out: Any) -> None:
        name = function_name(func)
        kind = FUNCTION_KINDS.get(name, OpKind.other)
        if name in ("max", "min", "pow") and len([t for t in sources if t is not kwargs.get("out")]) > 1:
            kind = OpKind.arithmetic  # element-wise maximum of two tensors, x to the power of a tensor
        if all(self.producer(t) is None for t in sources):
            self.inherit_name(kind, sources, out)
            return
        border = kwargs.get("value", args[3] if len(args) > 3 else None) if name == "pad" else None
        if border:
            self.note_site(f"pad brings in {border:g}, which has no quantizer")
        ordered = value_slots(func, args, kwargs)
        weight = self.functional_weight(unique, kind, ordered, args, kwargs)
        outputs = tensors_in(out)
        # a tensor that an operator writes into is its result, not one of its constants
        fresh = bool(args) and outputs[0] is args[0] and self.producer(outputs[0]) is None
        count = 1 if weight is not None else VALUE_ARGUMENTS.get(kind, len(ordered))
        values = [t for _, t in ordered]
        read = [(s, t) for i, (s, t) in enumerate(ordered) if i < count or self.producer(t) is not None]
        self.record(
            unique,
            kind,
            f"torch.{name}",
            None,
            [(slot, t) for slot, t in read if not (fresh and t is outputs[0])],
            outputs,
            weight=weight,
            attrs=function_attrs(kind, values, args, kwargs),
            operands=operands(kind, name, args, kwargs),
        )

    def mark_attention(self, out: Tensor) -> None:
        """Mark the last projection of an nn.MultiheadAttention: in the plugin its output is int8 only."""
        index = self.producer(out)
        while index is not None and self.ops[index].kind == OpKind.move and self.ops[index].inputs:
            index = self.ops[index].inputs[0]
        if index is not None and self.ops[index].kind == OpKind.linear:
            self.ops[index].attrs["attention_output"] = 1

    def spread(self, written: Tensor) -> None:
        """Record that a write to `written` changes all live tensors that share its memory: its base and other views."""
        index = self.producer(written)
        others = self.aliases.overlapping(written) if index is not None else []
        if not others:
            return
        root = max(others, key=lambda t: t.numel())
        if root.numel() > written.numel():
            self.call = None  # no single call returns the root, so a capture cannot replay this write
            self.record_write(root, written)
            index = self.producer(root)
        for other in others:
            if self.producer(other) is None:  # a view of a tensor that was constant until now
                self.call = None
                self.record_write(other, written)
            elif index is not None:
                self.producers[id(other)] = (weakref.ref(other), index)

    def inherit_name(self, kind: OpKind, sources: list[Tensor], out: Any) -> None:
        """Give a view of a parameter (`cls_token.expand(...)`) the name of the parameter."""
        named = next((self.state[id(t)] for t in sources if id(t) in self.state), None)
        if named is not None and kind in TRANSPARENT_KINDS:
            parts = tensors_in(out)
            for i, tensor in enumerate(parts):
                part = named if len(parts) == 1 else f"{named}:{i}"
                self.state[id(tensor)] = part
                if len(parts) > 1 and named in self.whole.values():
                    self.whole[id(tensor)] = part
                self.named_views.append(tensor)

    def functional_weight(
        self, unique: str, kind: OpKind, ordered: list[tuple[int, Tensor]], args: Any, kwargs: Any
    ) -> Weight | None:
        """The weight of a functional such as `F.conv2d(x, w)`; None if `w` is computed from the inputs.

        A parameter has one quantizer for all its readers. A view of it (a slice, the transposed) has other channels, so
        its quantizer is named after the reader.
        """
        if kind not in WEIGHT_ARGUMENT:
            return None
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        if not isinstance(weight, Tensor) or self.producer(weight) is not None:
            return None
        slot = next(i for i, t in ordered if t is weight)
        self.keep_fingerprint(f"weight of {unique}", unique, weight)
        axis = 1 if kind == OpKind.conv_transpose else 0
        name, shape = self.whole.get(id(weight), unique), tuple(weight.shape)
        if self.weights.setdefault(name, (shape, axis)) != (shape, axis):
            name = unique  # split in another way, or a weight that conv and transposed conv both read
        return Weight(name, slot, axis, shape)

    def keep_fingerprint(self, name: str, reader: str, tensor: Tensor) -> None:
        values = tensor.detach().double().nan_to_num(posinf=0.0, neginf=0.0)
        places = torch.linspace(1.0, 2.0, values.numel(), dtype=values.dtype, device=values.device)
        order = float(values.flatten() @ places)  # equal values in another order give another fingerprint
        sums = (float(values.sum()), float(values.abs().sum()), float(values.square().sum()), order)
        self.fingerprints.setdefault(name, (reader, (*map(float, tensor.shape), *sums)))

    def record_write(self, target: Tensor, value: Any) -> None:
        """Record `target[...] = value` as an op with both as inputs, so that the producer of `value` is not lost."""
        sources = [(i, t) for i, t in enumerate([target, *tensors_in(value)]) if self.producer(t) is not None]
        if sources:
            self.record(
                self.unique(f"{self.scopes[-1]}[setitem]"), OpKind.move, "torch.setitem", None, sources, [target]
            )

    def note_site(self, what: str) -> None:
        """Note `what` with the innermost line of the user's code."""
        note = f"{self.scopes[-1] or 'model'}: {what}{user_line()}"
        if note not in self.notes:
            self.notes.append(note)

    def constant(self, tensor: Tensor, reader: str) -> int | None:
        """Index of the op of a constant; None for indices, masks, zeros and single numbers."""
        own = self.state.get(id(tensor))
        if not tensor.is_floating_point() or tensor.numel() < 2:
            if own is not None and tensor.is_floating_point():
                self.notes.append(f"{reader}: reads {own}, one number without a quantizer")
            return None
        if own is None and not bool(tensor.any()):
            self.keep_fingerprint(f"zeros read by {reader}", reader, tensor)
            return None  # zeros are exact on every grid
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
            known = self.producer(tensor)
            # inside an unknown operator nothing is quantized, so its weights and biases are not constants here
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
            call=self.call,
            complex=outputs[0].is_complex(),
        )
        self.ops.append(op)
        for tensor in outputs:
            self.producers[id(tensor)] = (weakref.ref(tensor), op.index)
            self.aliases.add(tensor)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors have no version
