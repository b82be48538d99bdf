"""`trace` runs one forward pass of a model under a `Tracer`, and wraps leaf modules and scopes for it.

The forward of a leaf module is wrapped instead of hooked. So the user's hooks on the leaf are outside the operator, as
in a prepared model, and `self.conv.forward(x)` is the same operator as `self.conv(x)`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qflow.core.graph import TRANSPARENT_KINDS, OpKind
from qflow.quant.trace.calling import (
    all_tensors,
    copied,
    fresh_state,
    input_tensors,
    named_tensors,
    run_model,
    state_tensors,
)
from qflow.quant.trace.compounds import inner_names
from qflow.quant.trace.ops import is_leaf, module_kind
from qflow.quant.trace.state import Frame, FrameOutputs, without
from qflow.quant.trace.tape import Tape, module_attrs
from qflow.quant.trace.tracer import Tracer, version


class _Hooks:
    """The wrapped forwards and hooks of one trace; each module path in `skip` runs as one float operator."""

    def __init__(self, tracer: Tracer, skip: Collection[str]) -> None:
        self.tracer = tracer
        self.skip = skip
        self.versions: dict[int, int] = {}
        """Versions of the arguments of the current leaf when it was entered."""
        self.leaves = {path: module for path, module in tracer.modules.items() if path not in skip and is_leaf(module)}

    def wrapped(self, path: str, module: nn.Module) -> Any:
        """A forward for the leaf that records one op on the tape."""
        forward = module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            self.enter_leaf(module, args, kwargs)
            try:
                with torch._C.DisableTorchFunction():  # there is no user code in here (model/leaf.py)
                    out = forward(*args, **kwargs)
                self.record(path, module, args, kwargs, out)
            finally:
                self.tracer.leaf_depth -= 1
            return out

        return run

    def enter_leaf(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.tracer.leaf_depth:
            self.tracer.call = self.tracer.calling(module, args, kwargs)
        self.tracer.leaf_depth += 1
        if self.tracer.leaf_depth == 1:
            self.versions = {id(t): version(t) for t in all_tensors((args, kwargs))}

    def record(self, path: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        tracer, outputs = self.tracer, all_tensors(out)
        if tracer.leaf_depth > 1 or not outputs:
            return
        skipped = path in self.skip
        kind = OpKind.skipped if skipped else module_kind(module) or OpKind.other
        op_type = f"{type(module).__module__}.{type(module).__qualname__}"
        sources = list(enumerate(all_tensors((args, kwargs))))
        attrs = {} if skipped else module_attrs(module, [t for _, t in sources])
        inner = () if skipped else inner_names(module, args, kwargs)
        tracer.record(tracer.unique(path), kind, op_type, path, sources, outputs, attrs=attrs, inner=inner)
        for tensor in outputs:  # relu(inplace=True) writes into its argument, nn.Identity only gives it back
            unseen = tensor.is_inference() and getattr(module, "inplace", False)  # such a tensor has no version
            if unseen or self.versions.get(id(tensor), version(tensor)) != version(tensor):
                tracer.spread(tensor)

    def leave_leaf(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            self.record(path, module, args, kwargs, out)
            self.tracer.leaf_depth -= 1

        return hook

    def enter_scope(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.tracer.scopes.append(path)

        return hook

    def leave_scope(self, module: nn.Module, args: Any, out: Any) -> None:
        self.tracer.scopes.pop()

    @contextmanager
    def on(self) -> Iterator[None]:
        handles, leaves = [], []  # `leaves` holds the forward that the user has set on the module itself, if any
        for path, module in self.tracer.modules.items():
            if path in self.leaves:
                leaves.append((module, module.__dict__.get("forward")))
                module.__dict__["forward"] = self.wrapped(path, module)  # nn.Module's own way takes ten times as long
            elif path in self.skip:
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
            for leaf, own in leaves:
                del leaf.__dict__["forward"]
                if own is not None:
                    leaf.__dict__["forward"] = own


def trace(model: nn.Module, inputs: Any, skip: Collection[str] = (), tracer: Tracer | None = None) -> Tape:
    """Record one forward pass of `model` on `inputs` (a tensor, a tuple to splat, a dict of keywords, or a `Frame`).

    `skip` are paths of modules that stay float; each is one operator on the tape. The model is neither copied nor
    changed; it runs under no_grad in its current mode. `tracer` is by default a new `Tracer`.
    """
    tracer = tracer or Tracer(model)
    inputs = copied(inputs)
    shown = Frame(inputs.inputs, without(inputs.state, skip)) if isinstance(inputs, Frame) else inputs
    for name, tensor in input_tensors(model, shown):
        tracer.record(tracer.unique(f"quant[{name}]"), OpKind.input, "QuantStub", None, [], [tensor])
    hooks = _Hooks(tracer, skip)
    with torch.no_grad(), hooks.on(), tracer:
        outputs = run_model(model, inputs)
    named = []
    for name, tensor in _leaving(tracer, inputs, outputs, skip):
        index = tracer.producer(tensor)
        if index is not None:
            named.append((name, index))
            tracer.leaving(name, tensor)
        else:
            tracer.keep_fingerprint(f"output {name}", f"output {name}", tensor)
            tracer.notes.append(f"output {name} does not depend on the inputs as far as tracing can see")
    calls = {
        path: tracer.counts[path]
        for path in hooks.leaves
        if not skip or not any(path.startswith(f"{s}.") for s in skip)
    }
    read = Counter(op.weight.name for op in tracer.ops if op.weight is not None)
    for path in [p for p, count in calls.items() if count == 0]:
        calls[path] = read[f"{path}.weight"]  # used by functionals, as attention does with out_proj
        if not calls[path] and module_kind(tracer.modules[path]) in TRANSPARENT_KINDS:
            del calls[path]  # it would only pass values on, as a dropout does in eval mode: nothing is left float
    return Tape(
        ops=tracer.ops,
        outputs=named,
        calls=calls,
        notes=tracer.notes,
        names=frozenset(tracer.names),
        sites=tracer.sites,
        decomposed=frozenset(tracer.decomposed),
        read_by_python=frozenset(tracer.read_by_python),
        fingerprints=tracer.fingerprints,
        state=[i for _, t in _state(outputs) if (i := tracer.producer(t)) is not None],
    )


def _state(outputs: Any) -> list[tuple[str, Tensor]]:
    return state_tensors(outputs.after) if isinstance(outputs, FrameOutputs) else []


def _leaving(tracer: Tracer, inputs: Any, outputs: Any, skip: Collection[str]) -> list[tuple[str, Tensor]]:
    """The named outputs. A state tensor that the model returns too, or only moves on, is no output of its own."""
    if not isinstance(outputs, FrameOutputs) or inputs.outputs is not None:
        return named_tensors(outputs)

    def moved(tensor: Tensor) -> bool:
        index = tracer.producer(tensor)
        return index is not None and tracer.ops[index].kind == OpKind.input

    fresh = fresh_state(replace(outputs, after=without(outputs.after, skip)), moved)
    return [*named_tensors(outputs.outputs), *((name, tensor) for _, name, tensor in fresh)]


class _Kept(Tracer):
    """A tracer that keeps copies of the outputs: a later call may write into them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.results: dict[str, Tensor] = {}

    def leaving(self, name: str, tensor: Tensor) -> None:
        """Keep a copy."""
        self.results[name] = tensor.clone()


def trace_filled(
    model: nn.Module,
    inputs: Any,
    skip: Collection[str] = (),
    given: Mapping[tuple[str, str, int, int], str] | None = None,
    others: Sequence[Any] = (),
) -> tuple[Tape, Tape | None]:
    """As `trace`, with caches filled. What fills them is known, because train() or eval() may empty them again.

    Names are those of the filled model. `given` are names by call site from an earlier trace (call_names.py). `others`
    are the same inputs with other values. The first of them that runs is traced too, if the first tape holds constants;
    its tape, which also shows whether caches were filled, is returned. Without caches, that makes two passes.
    """

    def traced(inputs: Any) -> Tape:
        tracer = _Kept(model)
        tracer.given = given
        return replace(trace(model, inputs, skip, tracer), results=tracer.results)

    buffers = {name for name, _ in model.named_buffers()}
    first, other = traced(inputs), None
    whole = first.names == {op.name for op in first.ops}  # every call depends on the inputs
    if first.fingerprints or not whole:
        other = _first_running(traced, others)

    def unfilled(tape: Tape) -> bool:
        return first.names == tape.names and buffers.issuperset(name for name, _ in model.named_buffers())

    if whole or (other is not None and unfilled(other)):
        return first, other
    second = traced(inputs)
    if unfilled(second):
        return first, other
    filling = {site: f"{name} for a cache" for site, name in first.sites.items() if site not in second.sites}
    return replace(second, names=second.names.union(filling.values()), sites={**second.sites, **filling}), other


def _first_running(traced: Callable[[Any], Tape], others: Sequence[Any]) -> Tape | None:
    """The tape of the first inputs that run: integers such as lengths may be valid for their own sample only."""
    for inputs in others[:-1]:
        with suppress(Exception):
            return traced(inputs)
    return traced(others[-1]) if others else None
