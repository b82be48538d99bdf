"""Tracing: the unchanged model runs once, and every operator call is recorded on the tape.

Leaf modules (one operator each) are recorded in their forward, functionals by a TorchFunctionMode. Tensors are followed
by identity, so Python loops, branches on shapes and modules that are called several times need no special care. Where
tracing cannot follow (Python values from tensors, writes), a note names the line in the user's code. A value that is
computed outside of torch operators (NumPy, TorchScript) looks like a constant; its fingerprint changes with the inputs,
and `prepare` refuses the model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qflow.core.graph import OpKind
from qflow.quant.trace.arguments import value_slots
from qflow.quant.trace.compounds import inner_names
from qflow.quant.trace.decompose import decomposition
from qflow.quant.trace.ops import (
    CONSTANTS,
    DATA_DEPENDENT,
    FILLS,
    FUNCTION_KINDS,
    VALUE_ARGUMENTS,
    function_name,
    is_operator,
)
from qflow.quant.trace.recording import Recording
from qflow.quant.trace.tape import Call, function_attrs, operands, tensors_in

PYTHON_VALUE = "a Python value is taken from a tensor"
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


class Tracer(Recording, TorchFunctionMode):
    """One trace."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.leaf_depth = 0
        self.decomposed: set[str] = set()
        self.modules = dict(model.named_modules())
        self.attention = {path for path, module in self.modules.items() if type(module) is nn.MultiheadAttention}

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
        versions = [(t, version(t)) for t in sources]
        out = func(*args, **kwargs)
        self.note_writes(name, args, out, [(t, v) for t, v in versions if self.producer(t) is not None])
        if name == "setitem" and len(args) == 3:
            self.record_write(args[0], args[2], args[1])
        if is_operator(out):
            unique = self.called(f"{self.scopes[-1]}[{name}]")
            if name not in CONSTANTS:
                self.record_function(unique, func, sources, args, kwargs, out)
            for tensor in tensors_in(out):
                self.aliases.add(tensor)
        changed = [t for t, v in versions if version(t) != v]  # the written tensor and all that share its memory
        given = tensors_in(args[0] if name == "setitem" else out)
        for tensor in [t for t in changed if any(t is g for g in given)] or changed:
            self.spread(tensor)
        return out

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
            self.note_site(f"{PYTHON_VALUE} by {name}")
            self.read_by_python.update(i for i in (self.producer(t) for t, _ in versions) if i is not None)
        chosen = tensors_in(args[1:]) if args else [t for t, _ in versions]
        masks = [t for t in chosen if t.dtype == torch.bool and self.producer(t) is not None]
        if name in ("getitem", "masked_select") and masks:
            self.note_site(f"{name} with a boolean mask gives a size that depends on the data")
        if name == "setitem" and args[2:] and self.is_value(args[2]):
            self.note_site("setitem writes a constant that has no quantizer")
        if name in ("setitem", *FILLS) or (not tensors_in(out) and any(version(t) != v for t, v in versions)):
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
            statistics=self.statistics_of(args, kwargs) if func is F.batch_norm else None,
            inner=inner_names(func, args, kwargs),
        )

    def statistics_of(self, args: Any, kwargs: Any) -> str | None:
        """The module that holds all tensors of this call of `F.batch_norm`, in eval mode; None if there is none."""
        given = {**dict(zip(_BATCH_NORM, args, strict=False)), **kwargs}
        path = self.state.get(id(given.get("running_mean")), "").rpartition(".")[0]
        module = self.modules[path] if path else None
        if module is None or given.get("training") or given.get("eps", 1e-5) != getattr(module, "eps", None):
            return None
        own = all(getattr(module, name, None) is given.get(name) for name in _BATCH_NORM[1:5])
        return path if own and not isinstance(module, nn.modules.instancenorm._InstanceNorm) else None

    def mark_attention(self, out: Tensor) -> None:
        """Mark the last projection of an nn.MultiheadAttention: in the plugin its output is int8 only."""
        index = self.producer(out)
        while index is not None and self.ops[index].kind == OpKind.move and self.ops[index].inputs:
            index = self.ops[index].inputs[0]
        if index is not None and self.ops[index].kind == OpKind.linear:
            self.ops[index].attrs["attention_output"] = 1


def version(tensor: Tensor) -> int:
    """Number of writes into the memory of a tensor."""
    return 0 if tensor.is_inference() else tensor._version  # inference tensors have no version
