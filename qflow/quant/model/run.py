"""One forward pass of a prepared model: operator call counts, and what is quantized, read or collected on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from qflow.core.settings import CalibrationSettings
from qflow.quant.model.plan import Plan
from qflow.quant.trace.order import Ordering
from qflow.quant.trace.sites import Site, call_site
from qflow.quant.trace.tape import tensors_in
from qflow.quant.values.fake_quant import FakeQuant
from qflow.quant.values.observer import Histogram


@dataclass
class Collected:
    """Statistics of float forward passes."""

    sampling: int = CalibrationSettings.sampling
    """Every n-th value enters the bins (observer.py)."""
    histograms: dict[str, Histogram] = field(default_factory=dict)
    """Of every output quantizer, over all its calls."""
    calls: dict[str, dict[str, Histogram]] = field(default_factory=dict)
    """Of each call apart, where several calls share one quantizer."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Weights of functionals as they were last used."""

    def update(self, quantizer: str, value: Tensor, name: str, shared: bool) -> None:
        """Take in what the operator call `name` gave."""
        self._of(self.histograms, quantizer).update(value, name)
        if shared:
            self._of(self.calls.setdefault(quantizer, {}), name).update(value, name)

    def _of(self, kept: dict[str, Histogram], name: str) -> Histogram:
        if name not in kept:
            kept[name] = Histogram(self.sampling)
        return kept[name]


@dataclass
class Run:
    """One forward pass: operator call counts, and what is read or collected on the way."""

    plan: Plan
    outputs: Mapping[str, FakeQuant]
    weights: Mapping[str, FakeQuant]
    arguments: Mapping[str, Mapping[int, FakeQuant]] = field(default_factory=dict)
    """Operator call -> which of its tensors is quantized before the call: constants, functional weights, requants."""
    collect: Collected | None = None
    counts: dict[Any, int] = field(default_factory=dict)
    scopes: list[str] = field(default_factory=lambda: [""])
    depth: int = 0
    sited: bool = True
    """False in compiled code: functionals are counted by name, not found by call site (sites.py)."""
    site: Site | None = None
    """Call site of what is written out in parts just now (decompose.py): theirs too."""
    folded: set[str] = field(default_factory=set)
    ran: set[str] = field(default_factory=set)
    unseen: set[str] = field(default_factory=set)
    used: dict[str, Any] | None = None
    """What a recomputation must find again (scales, factors), once something of this pass is checkpointed."""
    again: bool = False
    """True in such a recomputation."""
    watch: Callable[[str, Tensor], None] | None = None
    """Told every operator's result before its quantizer."""
    order: Ordering | None = None
    """Records the order that operators such as topk give, or makes them follow a recorded one."""

    @property
    def plain(self) -> bool:
        """True if nobody looks at what lies between operator and quantizer."""
        return self.collect is None and self.watch is None and self.used is None

    def leaf_call(self, path: str) -> str:
        """Name of this call of a leaf module; a call more than tracing saw goes by the last one."""
        n = self.counts.get(path, 0)
        self.counts[path] = n + 1
        if n == 0:
            return path
        name = f"{path}({n})"
        return name if name in self.plan.known else self.plan.last_call.get(path, name)

    def locate(self, base: str) -> tuple[Any, str]:
        """Key and name of this call of the functional `base`; no name where tracing did not see the call site."""
        n = self.counts.get(base, 0)
        if not self.sited:
            return base, base if n == 0 else f"{base}({n})"
        if self.again:  # run from the backward pass, below other frames
            return base, str((self.used or {}).get(f"{base} {n}", ""))
        key = (base, *(self.site or call_site()))
        return key, self.plan.sites.get((*key, self.counts.get(key, 0)), "")

    def advance(self, key: Any, base: str, call: str) -> None:
        """Count the call that `locate` named."""
        self.counts[key] = self.counts.get(key, 0) + 1
        if self.used is not None and key != base:
            n = self.counts.get(base, 0)
            self.used[f"{base} {n}"] = call
            self.counts[base] = n + 1

    def stay_float(self, call: str, out: Any, missed: bool) -> None:
        """Note an operator that tracing did not see; `missed` if it would have had a quantizer."""
        if missed:
            self.unseen.add(call)
        self._show(call, out)

    def _show(self, call: str, out: Any) -> None:
        if self.watch is not None:
            for tensor in (out,) if isinstance(out, Tensor) else tensors_in(out):
                self.watch(call, tensor.detach())

    def quantizes(self, name: str) -> bool:
        """True if the result of operator `name` passes a quantizer that is on."""
        quantizer_name = self.plan.output_at.get(name)
        return quantizer_name is not None and self.outputs[quantizer_name].active

    def kept(self, key: str, make: Callable[[], Any]) -> Any:
        """`make()`, or what it gave in the pass that is being recomputed."""
        if self.used is None:
            return make()
        if not self.again:
            self.used[key] = make()
        return self.used[key]

    def quantize(self, key: str, quantizer: FakeQuant, value: Tensor) -> Tensor:
        """`value` through `quantizer`; a recomputation takes the scale of the first pass, which has moved since."""
        self.ran.add(quantizer.name)
        if self.used is None or quantizer.dtype is None or not quantizer.dtype.is_integer:
            quantized: Tensor = quantizer(value)
            return quantized
        quantized = quantizer(value, self.kept(f"{key}.scale", lambda: quantizer.scale_for(value)))
        return quantized

    def quantize_arguments(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The call's arguments with its constants, functional weight and requantized inputs on their grids."""
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

    def finish(self, name: str, out: Any, first: Any) -> Any:
        """Pass the result of operator `name` through its quantizer; an in-place result is written in place."""
        if self.watch is not None:
            self._show(name, out)
        quantizer_name = self.plan.output_at.get(name)
        if quantizer_name is None:
            if name not in self.plan.known and any(t.is_floating_point() for t in tensors_in(out)):
                self.unseen.add(name)
            return out
        value = out if isinstance(out, Tensor) else tensors_in(out)[0]
        quantizer = self.outputs[quantizer_name]
        self.depth += 1  # the quantizer's own arithmetic is not the user's
        try:
            if self.collect is not None:
                self.collect.update(quantizer_name, value, name, quantizer_name in self.plan.shared)
            if not quantizer.active:
                return out
            if value is first and self.used is None and not torch.is_grad_enabled():
                self.ran.add(quantizer_name)
                quantizer.write(value)  # relu(inplace=True): others may hold the same tensor and must see the result
                return out
            quantized = self.quantize(name, quantizer, value)
            if value is first:
                value.copy_(quantized)
                return out
        finally:
            self.depth -= 1
        if isinstance(out, Tensor):
            return quantized
        return tree_map(lambda t: quantized if t is value else t, out)


_current = threading.local()


def current_run() -> Run | None:
    """The run of this thread, or None outside a prepared model's forward."""
    return getattr(_current, "run", None)


def set_current_run(run: Run | None) -> Run | None:
    """Make `run` current; returns the one before it."""
    before = current_run()
    _current.run = run
    return before
