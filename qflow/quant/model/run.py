"""One forward pass of a prepared model: it names each operator call, and quantizes, watches or collects its values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from qflow.core.errors import ModelError
from qflow.core.settings import CalibrationSettings
from qflow.quant.model.plan import Plan
from qflow.quant.trace.calling import all_tensors, map_named
from qflow.quant.trace.compounds import written_out
from qflow.quant.trace.order import Ordering
from qflow.quant.trace.sites import call_site
from qflow.quant.values.fake_quant import FakeQuant
from qflow.quant.values.observer import Histogram

Needed = Mapping[str, frozenset[str]]
"""Scope -> some of its functionals (`head[mul]`)."""


@dataclass
class Collected:
    """Calibration statistics of float forward passes."""

    sampling: int = CalibrationSettings.sampling
    """Every n-th value enters the bins (values/observer.py)."""
    by_batch: bool = False
    """Whether each batch keeps its own statistics, for moving averages."""
    histograms: dict[str, Histogram] = field(default_factory=dict)
    """Output quantizer -> its histogram over all its calls."""
    calls: dict[str, dict[str, Histogram]] = field(default_factory=dict)
    """Quantizer that several calls share -> a histogram for each call."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Weights of functionals, as last used."""

    def update(self, quantizer: str, value: Tensor, name: str, shared: bool) -> None:
        """Add the result `value` of the operator call `name`."""
        self._of(self.histograms, quantizer).update(value, name)
        if shared:
            self._of(self.calls.setdefault(quantizer, {}), name).update(value, name)

    def _of(self, kept: dict[str, Histogram], name: str) -> Histogram:
        if name not in kept:
            kept[name] = Histogram(self.sampling, by_batch=self.by_batch)
        return kept[name]


@dataclass
class Run:
    """The state of one forward pass: the number of calls so far, the current scope, and what is collected."""

    plan: Plan
    outputs: Mapping[str, FakeQuant]
    weights: Mapping[str, FakeQuant]
    arguments: Mapping[str, Mapping[int, FakeQuant]] = field(default_factory=dict)
    """Operator call -> slot -> quantizer of that tensor argument: constants, weights of functionals, requants."""
    collect: Collected | None = None
    counts: dict[Any, int] = field(default_factory=dict)
    scopes: list[str] = field(default_factory=lambda: [""])
    depth: int = 0
    """Above 0, operators are not the user's (inside a leaf module, a skipped module or a quantizer) and are ignored."""
    sited: bool = True
    """False in compiled code: functionals are counted by name, not found by call site (trace/sites.py)."""
    folded: set[str] = field(default_factory=set)
    """Batch norms whose weighted operator has run with them folded in, and which have not run themselves yet."""
    ran: set[str] = field(default_factory=set)
    unseen: set[str] = field(default_factory=set)
    used: dict[str, Any] | None = None
    """Scales, factors and call names that a recomputation reuses; None until part of this pass is checkpointed."""
    recomputing: bool = False
    """True while activation checkpointing recomputes part of this pass in backward."""
    watch: Callable[[str, Tensor], None] | None = None
    """Called with every operator's name and its result before its quantizer."""
    order: Ordering | None = None
    """Records the order that operators such as topk return, or makes them follow a recorded one."""

    needed: Needed | None = None
    """The functionals on which an active quantizer acts; the others only run. None: all are followed."""

    @property
    def plain(self) -> bool:
        """True if the value between an operator and its quantizer is not needed."""
        return self.collect is None and self.watch is None and self.used is None

    def leaf_call(self, path: str) -> str:
        """Name of this call of a leaf module; a call beyond the traced ones gets the name of the last traced call."""
        n = self.counts.get(path, 0)
        self.counts[path] = n + 1
        if n == 0:
            return path
        name = f"{path}({n})"
        return name if name in self.plan.known else self.plan.last_call.get(path, name)

    def locate(self, base: str) -> tuple[Any, str]:
        """Key and name of this call of the functional `base`; the name is empty where the call site was not traced."""
        n = self.counts.get(base, 0)
        if not self.sited:
            return base, base if n == 0 else f"{base}({n})"
        if self.recomputing:  # backward calls it from other frames, so the call site cannot be found
            return base, str((self.used or {}).get(f"{base} {n}", ""))
        key = (base, *call_site())
        return key, self.plan.sites.get((*key, self.counts.get(key, 0)), "")

    def advance(self, key: Any, base: str, call: str) -> None:
        """Count the call that `locate` returned."""
        self.counts[key] = self.counts.get(key, 0) + 1
        if self.used is not None and key != base:
            n = self.counts.get(base, 0)
            self.used[f"{base} {n}"] = call
            self.counts[base] = n + 1

    def stay_float(self, call: str, out: Any, missed: bool) -> None:
        """Handle an operator that was not traced; `missed` is True if it would have had a quantizer."""
        if missed:
            self.unseen.add(call)
        self._show(call, out)

    def _show(self, call: str, out: Any) -> None:
        if self.watch is not None:
            for tensor in (out,) if isinstance(out, Tensor) else all_tensors(out):
                self.watch(call, tensor.detach())

    def quantizes(self, name: str) -> bool:
        """True if the result of operator `name` has an active quantizer."""
        quantizer_name = self.plan.output_at.get(name)
        return quantizer_name is not None and self.outputs[quantizer_name].active

    def kept(self, key: str, make: Callable[[], Any]) -> Any:
        """`make()`; in a recomputation, what it returned in the first pass."""
        if self.used is None:
            return make()
        if not self.recomputing:
            self.used[key] = make()
        return self.used[key]

    def quantize(self, key: str, quantizer: FakeQuant, value: Tensor) -> Tensor:
        """`value` quantized. The scale may move after the first pass, so a recomputation takes the one of that pass."""
        self.ran.add(quantizer.name)
        if self.used is None or quantizer.dtype is None or not quantizer.dtype.is_integer:
            quantized: Tensor = quantizer(value)
            return quantized
        quantized = quantizer(value, self.kept(f"{key}.scale", lambda: quantizer.scale_for(value)))
        return quantized

    def quantize_arguments(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The call's arguments with its constants, the weight of a functional and requantized inputs quantized."""
        leaves, spec = tree_flatten((args, kwargs))
        slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.depth += 1
        try:
            for slot, quantizer in self.arguments[name].items():
                place = slots[slot]
                if self.collect is not None:
                    if quantizer.per_channel:
                        self.collect.weights[quantizer.name] = leaves[place].detach()
                    elif quantizer.name in self.outputs:
                        self.collect.update(quantizer.name, leaves[place], name, shared=False)
                if quantizer.active:
                    leaves[place] = self.quantize(f"{name}:{slot}", quantizer, leaves[place])
        finally:
            self.depth -= 1
        args, kwargs = tree_unflatten(leaves, spec)
        return args, kwargs

    def require_norms(self) -> None:
        """Raise ModelError if a batch norm that is folded into the operator before it has not run after it."""
        if self.folded:
            raise ModelError(
                "A batch norm that is folded into the operator before it runs after it, but got "
                f"{min(self.folded)} left out of this forward pass. Take the same path for all inputs, or put "
                "nn.Identity before the norm, so that it is not folded."
            )

    def inside(self, name: str, target: Any, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result of operator `name`, a call of the module or function `target`, before its quantizer.

        `plain` computes it in float. A norm or softmax goes by its formula if one of its inner quantizers is active.
        """
        inner = self.plan.inner_at.get(name)
        written = written_out(target, args, kwargs) if inner else None
        if inner is None or written is None:
            return plain(*args, **kwargs)
        self.depth += 1
        try:
            if self.collect is not None:
                with torch.no_grad():
                    written.run(lambda step, value: self._collected(name, step, inner[step], value))
            if any(self.outputs[quantizer].active for quantizer in inner.values()):
                return written.run(lambda step, value: self._inner(f"{name}.{step}", inner[step], value))
        finally:
            self.depth -= 1
        return plain(*args, **kwargs)

    def _collected(self, call: str, step: str, quantizer_name: str, value: Tensor) -> Tensor:
        assert self.collect is not None
        self.collect.update(quantizer_name, value, f"{call}.{step}", self.plan.output_at[call] in self.plan.shared)
        return value

    def _inner(self, key: str, quantizer_name: str, value: Tensor) -> Tensor:
        quantizer = self.outputs[quantizer_name]
        if not quantizer.active:
            return value
        if self.used is not None or torch.is_grad_enabled():
            return self.quantize(key, quantizer, value)
        self.ran.add(quantizer_name)
        quantizer.write(value)  # a formula gives tensors of its own
        return value

    def finish(self, name: str, out: Any, first: Any) -> Any:
        """Quantize the result `out` of operator `name`; if it is `first` (an in-place operator), in place."""
        if self.watch is not None:
            self._show(name, out)
        quantizer_name = self.plan.output_at.get(name)
        if quantizer_name is None:
            if name not in self.plan.known and any(t.is_floating_point() for t in all_tensors(out)):
                self.unseen.add(name)
            return out
        value = out if isinstance(out, Tensor) else all_tensors(out)[0]
        quantizer = self.outputs[quantizer_name]
        self.depth += 1  # the arithmetic of the quantizer itself must not count as operators
        try:
            if self.collect is not None:
                self.collect.update(quantizer_name, value, name, quantizer_name in self.plan.shared)
            if not quantizer.active:
                return out
            if value is first and self.used is None and not torch.is_grad_enabled():
                self.ran.add(quantizer_name)
                quantizer.write(value)  # relu(inplace=True): others that hold the same tensor must see the result
                return out
            quantized = self.quantize(name, quantizer, value)
            if value is first:
                value.copy_(quantized)
                return out
        finally:
            self.depth -= 1
        if isinstance(out, Tensor):
            return quantized
        return map_named(lambda _, t: quantized if t is value else t, out)


def functionals_of(plan: Plan, outputs: Collection[str], weights: Collection[str]) -> Needed:
    """The functionals that give or read what these quantizers quantize, and norms folded into these weights."""
    norms = {plan.folds.get(name) for name in weights}
    calls = {call for call, name in plan.output_at.items() if name in outputs}
    calls |= {call for call, slots in plan.constants_at.items() if not set(slots.values()).isdisjoint(outputs)}
    calls |= {call for call, inner in plan.inner_at.items() if not set(inner.values()).isdisjoint(outputs)}
    calls |= {call for call, weight in plan.weights_at.items() if weight.name in weights}
    calls |= {call for call, norm in plan.functional_norms.items() if norm in norms}
    found: dict[str, set[str]] = {}
    for (base, *_), call in plan.sites.items():
        if call in calls:
            found.setdefault(base.rpartition("[")[0], set()).add(base)
    return {scope: frozenset(bases) for scope, bases in found.items()}


_current = threading.local()


def current_run() -> Run | None:
    """The run of this thread, or None outside the forward of a prepared model."""
    return getattr(_current, "run", None)


def set_current_run(run: Run | None) -> Run | None:
    """Make `run` the current one and return the previous one."""
    before = current_run()
    _current.run = run
    return before
