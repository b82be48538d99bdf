"""The tape: an example-driven record of the torch-level operators of one forward pass, with the user's names.

The model runs as it is. Leaf modules (one operator each) are seen by forward hooks, functionals by a
TorchFunctionMode, and tensors are followed by identity, so plain Python loops, branches on shapes and
modules called several times need no special care. What the tape cannot see through is written down as a
note: Python values taken out of tensors, unknown operators, writes into views.

Names: a module call is its path, `conv(1)` the second call; a functional is `scope[add]`, its second call
`scope[add](1)`; an input is `quant[x]` after the argument of `forward`.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from qflow.core.graph import OpKind
from qflow.quant.calling import copied, input_tensors, named_tensors, run_model
from qflow.quant.ops import (
    CONSTANTS,
    DATA_DEPENDENT,
    FILLS,
    FUNCTION_KINDS,
    function_name,
    is_leaf,
    is_operator,
    module_kind,
)


@dataclass
class Op:
    """One recorded operator call. `inputs` are indices of producing ops on the tape, in argument order."""

    index: int
    name: str
    kind: OpKind
    op_type: str
    module: str | None
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    floating: bool
    constants: int = 0
    attrs: dict[str, int] = field(default_factory=dict)


@dataclass
class Tape:
    """All operator calls in order, the named model outputs, and how often each leaf module was called."""

    ops: list[Op]
    outputs: list[tuple[str, int]]
    calls: dict[str, int]
    notes: list[str]
    names: frozenset[str]
    """Names of all calls, those that do not depend on the inputs included."""


class _Tracer(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.notes: list[str] = []
        self.scopes: list[str] = [""]
        self.leaf_depth = 0
        self.counts: Counter[str] = Counter()
        self.names: set[str] = set()
        self.producer: dict[int, int] = {}
        self.alive: list[Tensor] = []  # keeps ids unique while tracing

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.leaf_depth:
            return func(*args, **kwargs)
        name = function_name(func)
        versions = [(t, t._version) for t in _tensors((args, kwargs)) if id(t) in self.producer]
        out = func(*args, **kwargs)
        if name in DATA_DEPENDENT and not isinstance(out, Tensor):
            self.note_site(f"a Python value is taken from a tensor by {name}")
        if name in ("setitem", *FILLS) or (not _tensors(out) and any(t._version != v for t, v in versions)):
            self.note_site(f"{name} writes into a tensor and is left in float")
        if name == "setitem" and len(args) == 3:
            self.record_write(args[0], args[2])
        if not is_operator(out):
            return out
        unique = self.unique(f"{self.scopes[-1]}[{name}]")
        tensors, sources = _tensors(out), _tensors((args, kwargs))
        if name not in CONSTANTS and any(id(t) in self.producer for t in sources):
            kind = FUNCTION_KINDS.get(name, OpKind.other)
            if name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
                kind = OpKind.arithmetic  # element-wise maximum of two tensors
            self.record(unique, kind, f"torch.{name}", None, sources, tensors, function_attrs(kind, sources))
        return out

    def record_write(self, target: Tensor, value: Any) -> None:
        """`target[...] = value`: the target now carries both, so that what wrote it is not lost."""
        sources = [t for t in (target, *_tensors(value)) if id(t) in self.producer]
        if sources:
            name = self.unique(f"{self.scopes[-1]}[setitem]")
            self.record(name, OpKind.move, "torch.setitem", None, sources, [target])

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

    def record(
        self,
        name: str,
        kind: OpKind,
        op_type: str,
        module: str | None,
        sources: Sequence[Tensor],
        outputs: Sequence[Tensor],
        attrs: dict[str, int] | None = None,
    ) -> None:
        """Append one op and make it the producer of its outputs."""
        floating = [t for t in sources if t.is_floating_point()]
        known = [self.producer[id(t)] for t in sources if id(t) in self.producer]
        constants = sum(id(t) not in self.producer for t in floating) if module is None else 0
        op = Op(
            index=len(self.ops),
            name=name,
            kind=kind,
            op_type=op_type,
            module=module,
            inputs=tuple(known),
            shape=tuple(outputs[0].shape),
            floating=outputs[0].is_floating_point(),
            constants=constants,
            attrs=attrs or {},
        )
        self.ops.append(op)
        for tensor in outputs:
            self.producer[id(tensor)] = op.index
            self.alive.append(tensor)


def _tensors(structure: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(structure)[0] if isinstance(leaf, Tensor)]


def function_attrs(kind: OpKind, sources: Sequence[Tensor]) -> dict[str, int]:
    """Integers that a cost model needs from a functional: the inner dimension of a matmul, weights of F.conv2d."""
    if kind == OpKind.matmul and len(sources) > 1:
        return {"inner": int(sources[0].shape[-1])}
    if kind in (OpKind.conv, OpKind.linear) and len(sources) > 1:
        weight = sources[1]
        return weight_attrs(tuple(weight.shape), groups=1, transposed=False)
    return {}


def weight_attrs(shape: tuple[int, ...], groups: int, transposed: bool) -> dict[str, int]:
    """Channels, groups, kernel and weight elements of a weighted operator from its weight shape."""
    out_channels, in_channels = (shape[1] * groups, shape[0]) if transposed else (shape[0], shape[1] * groups)
    kernel = 1
    for size in shape[2:]:
        kernel *= size
    total = kernel * shape[0] * shape[1]
    return {"in": in_channels, "out": out_channels, "groups": groups, "kernel": kernel, "weights": total}


def module_attrs(module: nn.Module, sources: Sequence[Tensor]) -> dict[str, int]:
    """Cost attributes of a leaf module; empty for one without weights."""
    if isinstance(module, nn.modules.conv._ConvNd):
        attrs = weight_attrs(tuple(module.weight.shape), module.groups, module.transposed)
        if module.transposed:  # each input position meets the whole kernel
            attrs["positions"] = sources[0].numel() // module.in_channels
        return attrs
    if isinstance(module, nn.Linear):
        return weight_attrs(tuple(module.weight.shape), 1, transposed=False)
    return {}


@contextmanager
def _hooks(model: nn.Module, tracer: _Tracer) -> Iterator[None]:
    handles = []

    def enter_leaf(module: nn.Module, args: Any, kwargs: Any) -> None:
        tracer.leaf_depth += 1

    def leave_leaf(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            tracer.leaf_depth -= 1
            if tracer.leaf_depth == 0:
                kind = module_kind(module) or OpKind.other
                op_type = f"{type(module).__module__}.{type(module).__qualname__}"
                sources = _tensors((args, kwargs))
                tracer.record(
                    tracer.unique(path), kind, op_type, path, sources, _tensors(out), module_attrs(module, sources)
                )

        return hook

    def enter_scope(path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            tracer.scopes.append(path)

        return hook

    def leave_scope(module: nn.Module, args: Any, out: Any) -> None:
        tracer.scopes.pop()

    for path, module in model.named_modules():
        if is_leaf(module):
            handles.append(module.register_forward_pre_hook(enter_leaf, with_kwargs=True))
            handles.append(module.register_forward_hook(leave_leaf(path), with_kwargs=True))
        elif path:
            handles.append(module.register_forward_pre_hook(enter_scope(path)))
            handles.append(module.register_forward_hook(leave_scope, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trace(model: nn.Module, inputs: Any) -> Tape:
    """Record one forward pass of `model` on `inputs` (a tensor, a tuple to splat, or a dict of keywords).

    The model is neither copied nor changed; it runs under no_grad in the mode it is in.
    """
    tracer = _Tracer()
    inputs = copied(inputs)
    for name, tensor in input_tensors(model, inputs):
        tracer.record(tracer.unique(f"quant[{name}]"), OpKind.input, "QuantStub", None, [], [tensor])
    with torch.no_grad(), _hooks(model, tracer), tracer:
        outputs = run_model(model, inputs)
    named = []
    for name, tensor in named_tensors(outputs):
        if id(tensor) in tracer.producer:
            named.append((name, tracer.producer[id(tensor)]))
        else:
            tracer.notes.append(f"output {name} does not depend on the inputs as far as tracing can see")
    calls = {path: tracer.counts[path] for path, module in model.named_modules() if is_leaf(module)}
    return Tape(ops=tracer.ops, outputs=named, calls=calls, notes=tracer.notes, names=frozenset(tracer.names))
