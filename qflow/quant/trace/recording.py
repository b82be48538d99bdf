"""The growing tape of one trace: operators, the producer of each tensor, constants, and writes.

Tensors are identified by `id` through weak references, so tracing keeps no activation alive. A write changes all live
tensors that share the memory (aliases.py): views and the tensors that they view.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qflow.core.graph import TRANSPARENT_KINDS, OpKind
from qflow.quant.trace.aliases import Aliases
from qflow.quant.trace.call_names import CallNames
from qflow.quant.trace.ops import WEIGHT_ARGUMENT
from qflow.quant.trace.sites import user_line
from qflow.quant.trace.tape import Call, Op, Weight, tensors_in


class Recording(CallNames):
    """The operators recorded so far."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.notes: list[str] = []
        self.read_by_python: set[int] = set()
        """Ops from whose result a Python value was taken, which the code after it may depend on."""
        self.scopes: list[str] = [""]
        self.fingerprints: dict[str, tuple[str, tuple[float, ...]]] = {}
        self.producers: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.named_views: list[Tensor] = []  # kept alive, so that the ids in `state` stay unique
        self.aliases = Aliases()
        self.call: Call | None = None
        state = [*model.named_parameters(), *model.named_buffers()]
        self.state = {id(tensor): name for name, tensor in state}
        self.whole = {id(tensor): name for name, tensor in state}
        """Names of tensors that can have a weight quantizer: parameters, and the parts of a parameter that is split."""
        self.weights: dict[str, tuple[tuple[int, ...], int]] = {}

    def producer(self, tensor: Any) -> int | None:
        """Index of the op whose result is `tensor`, or None."""
        reference, index = self.producers.get(id(tensor), (None, 0))
        return index if reference is not None and reference() is tensor else None

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
        statistics: str | None = None,
        inner: tuple[str, ...] = (),
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
            statistics=statistics,
            inner=inner,
            call=self.call,
            complex=outputs[0].is_complex(),
        )
        self.ops.append(op)
        for tensor in outputs:
            self.producers[id(tensor)] = (weakref.ref(tensor), op.index)
            self.aliases.add(tensor)

    def record_write(self, target: Tensor, value: Any, place: Any = ()) -> None:
        """Record `target[place] = value` as an op with all three as inputs, so that none of their producers is lost."""
        tensors = [target, *tensors_in(place), *tensors_in(value)]
        sources = [(i, t) for i, t in enumerate(tensors) if self.producer(t) is not None]
        if sources:
            self.record(
                self.unique(f"{self.scopes[-1]}[setitem]"), OpKind.move, "torch.setitem", None, sources, [target]
            )

    def spread(self, written: Tensor) -> None:
        """Record that a write to `written` changes all live tensors that share its memory: its base and other views."""
        index = self.producer(written)
        others = self.aliases.overlapping(written) if index is not None else []
        if not others:
            return
        root = max(others, key=lambda t: t.numel())
        if root.numel() > written.numel():
            self.call = None  # no call of the model returns the root: a capture finds its own (replay/capture.py)
            self.record_write(root, written)
            index = self.producer(root)
        for other in others:
            if self.producer(other) is None:  # a view of a tensor that was constant until now
                self.call = None
                self.record_write(other, written)
            elif index is not None:
                self.producers[id(other)] = (weakref.ref(other), index)

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

    def keep_fingerprint(self, name: str, reader: str, tensor: Tensor) -> None:
        if isinstance(tensor, nn.Parameter):
            return  # it is not computed
        values = tensor.detach().double().nan_to_num(posinf=0.0, neginf=0.0)
        places = torch.linspace(1.0, 2.0, values.numel(), dtype=values.dtype, device=values.device)
        order = float(values.flatten() @ places)  # equal values in another order give another fingerprint
        sums = (float(values.sum()), float(values.abs().sum()), float(values.square().sum()), order)
        self.fingerprints.setdefault(name, (reader, (*map(float, tensor.shape), *sums)))

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

    def note_site(self, what: str) -> None:
        """Note `what` with the innermost line of the user's code."""
        note = f"{self.scopes[-1] or 'model'}: {what}{user_line()}"
        if note not in self.notes:
            self.notes.append(note)
