"""How a prepared model runs: leaf modules of swapped class, functionals under a mode, one run at a time.

The user's Python code runs as it is. A leaf module (`Leaf` mixed into its own class) and the mode ask the
current `Run` for the operator's name (its call count decides) and pass the result through that operator's
quantizer. A convolution whose weight quantizer is on computes with the batch norm folded into the weight, and
the batch norm that follows lets the value through; with the quantizer off both run as in the float model, so
that a prepared model with all quantizers off is the float model bit for bit.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qflow.quant.fake_quant import FakeQuant
from qflow.quant.observer import Histogram
from qflow.quant.ops import function_name, is_operator
from qflow.quant.plan import Plan


@dataclass
class Run:
    """One forward pass: operator call counts, and what is read or collected on the way."""

    plan: Plan
    outputs: Mapping[str, FakeQuant]
    weights: Mapping[str, FakeQuant]
    collect: dict[str, Histogram] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    scopes: list[str] = field(default_factory=lambda: [""])
    depth: int = 0
    folded: set[str] = field(default_factory=set)
    ran: set[str] = field(default_factory=set)
    unseen: set[str] = field(default_factory=set)

    def name(self, base: str) -> str:
        """Name of this call of `base`."""
        n = self.counts[base]
        self.counts[base] += 1
        return base if n == 0 else f"{base}({n})"

    def finish(self, name: str, out: Any, first: Any) -> Any:
        """Pass the result of operator `name` through its quantizer; an in-place result is written in place."""
        quantizer_name = self.plan.output_at.get(name)
        if quantizer_name is None:
            if name not in self.plan.known:
                self.unseen.add(name)
            return out
        value = out if isinstance(out, Tensor) else next(t for t in out if isinstance(t, Tensor))
        quantizer = self.outputs[quantizer_name]
        self.depth += 1  # the quantizer's own arithmetic is not the user's
        try:
            if self.collect is not None:
                self.collect.setdefault(quantizer_name, Histogram()).update(value, name)
            if not quantizer.active:
                return out
            self.ran.add(quantizer_name)
            quantized = quantizer(value)
            if value is first:  # relu(inplace=True): others may hold the same tensor and must see the result
                value.copy_(quantized)
                return out
        finally:
            self.depth -= 1
        if isinstance(out, Tensor):
            return quantized
        return type(out)(quantized if t is value else t for t in out)


_current = threading.local()


def current_run() -> Run | None:
    """The run of this thread, or None outside a prepared model's forward."""
    return getattr(_current, "run", None)


def set_current_run(run: Run | None) -> Run | None:
    """Make `run` current; returns the one before it."""
    before = current_run()
    _current.run = run
    return before


class Mode(TorchFunctionMode):
    """Sees functionals in the user's code; inside a leaf module it only passes calls on."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        run = self.run
        if run.depth:
            return out
        name = _NAMES.get(func)
        if name is None:
            name = _NAMES[func] = function_name(func)
        if not is_operator(out):
            return out
        first = args[0] if args else None
        return run.finish(run.name(f"{run.scopes[-1]}[{name}]"), out, first)


_NAMES: dict[Any, str] = {}


class Leaf:
    """Mixed in before a leaf module's own class; `qflow_path` is the module's path in the model."""

    qflow_path: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward with its quantizers."""
        run = current_run()
        if run is None or run.depth:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        name = run.name(self.qflow_path)
        first: Any = args[0] if args else None
        # Training, relu(inplace=True) keeps its result for the backward pass: it works on a copy, and what the
        # user's tensor becomes is the quantized result.
        apart = isinstance(first, Tensor) and getattr(self, "inplace", False) and torch.is_grad_enabled()
        run.depth += 1
        try:
            out = self.compute(run, name, *((first.clone(), *args[1:]) if apart else args), **kwargs)
            result = run.finish(name, out, None if apart else first)
            return first.copy_(result) if apart else result
        finally:
            run.depth -= 1

    def compute(self, run: Run, name: str, *args: Any, **kwargs: Any) -> Any:
        """The operator without its output quantizer."""
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class NormLeaf(Leaf):
    """A batch norm: the identity where the operator before it has already folded it in."""

    def compute(self, run: Run, name: str, *args: Any, **kwargs: Any) -> Any:
        if self.qflow_path in run.folded:
            run.folded.discard(self.qflow_path)
            return args[0] if args else kwargs["input"]
        return super().compute(run, name, *args, **kwargs)


class WeightedLeaf(Leaf):
    """A convolution or linear layer: fake-quantizes its weight, batch norm folded in."""

    weight: Tensor
    bias: Tensor | None
    qflow_norm: nn.Module | None
    qflow_norm_path: str | None

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the batch norm's running statistics folded in (plain ones without a norm)."""
        norm = self.qflow_norm
        if norm is None:
            return self.weight, self.bias
        mean, var, eps = norm.running_mean, norm.running_var, norm.eps
        gamma = norm.weight if norm.weight is not None else torch.ones_like(var)  # type: ignore[arg-type]
        beta = norm.bias if norm.bias is not None else torch.zeros_like(mean)  # type: ignore[arg-type]
        factor = gamma * torch.rsqrt(var + eps)  # type: ignore[operator]
        weight = self.weight * self._along_output(factor)
        bias = beta - mean * factor if self.bias is None else beta + (self.bias - mean) * factor  # type: ignore[operator]
        return weight, bias

    def _along_output(self, vector: Tensor) -> Tensor:
        if getattr(self, "transposed", False):
            groups = int(getattr(self, "groups", 1))
            per_group = vector.view(groups, 1, -1).expand(groups, self.weight.shape[0] // groups, -1)
            return per_group.reshape(self.weight.shape[0], -1, *[1] * (self.weight.ndim - 2))
        return vector.view(-1, *[1] * (self.weight.ndim - 1))

    def compute(self, run: Run, name: str, *args: Any, **kwargs: Any) -> Any:
        quantizer = run.weights.get(self.qflow_path)
        if quantizer is None or not quantizer.active:  # None: no output depends on it
            return super().compute(run, name, *args, **kwargs)
        weight, bias = self.folded()
        if self.qflow_norm_path is not None:
            run.folded.add(self.qflow_norm_path)
        run.ran.add(quantizer.name)
        return self.run_with(quantizer(weight), bias, *args, **kwargs)

    def run_with(self, weight: Tensor, bias: Tensor | None, input: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        """The operator with another weight and bias."""
        raise AssertionError("every weighted leaf class defines run_with")


class ConvLeaf(WeightedLeaf):
    """Conv1d, Conv2d, Conv3d."""

    def run_with(self, weight: Tensor, bias: Tensor | None, input: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        return self._conv_forward(input, weight, bias)  # type: ignore[attr-defined, no-any-return]


class LinearLeaf(WeightedLeaf):
    """Linear."""

    def run_with(self, weight: Tensor, bias: Tensor | None, input: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        return F.linear(input, weight, bias)


class ConvTransposeLeaf(WeightedLeaf):
    """ConvTranspose1d, 2d, 3d."""

    def run_with(
        self, weight: Tensor, bias: Tensor | None, input: Tensor, *rest: Any, output_size: Any = None, **kwargs: Any
    ) -> Tensor:
        me: Any = self
        output_size = rest[0] if rest else output_size
        spatial = weight.ndim - 2
        padding = me._output_padding(input, output_size, me.stride, me.padding, me.kernel_size, spatial, me.dilation)
        convolve = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[spatial]
        return convolve(input, weight, bias, me.stride, me.padding, padding, me.groups, me.dilation)


def leaf_class(module: nn.Module) -> type[nn.Module]:
    """The module's class with the right `Leaf` mixed in; made once a class and kept here, so that it pickles."""
    own = type(module)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        mixin: type = ConvTransposeLeaf
    elif isinstance(module, nn.modules.conv._ConvNd):
        mixin = ConvLeaf
    elif isinstance(module, nn.Linear):
        mixin = LinearLeaf
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        mixin = NormLeaf
    else:
        mixin = Leaf
    name = f"Q_{own.__module__}_{own.__qualname__}".replace(".", "_")
    while name in globals() and globals()[name].__mro__[2] is not own:
        name += "_"  # another class of the same name, as notebooks make them
    if name not in globals():
        globals()[name] = type(name, (mixin, own), {"__module__": __name__, "__qualname__": name})
    made: type[nn.Module] = globals()[name]
    return made


@dataclass(frozen=True)
class EnterScope:
    """Forward pre-hook of a container: functionals called next belong to `path`."""

    path: str

    def __call__(self, module: nn.Module, args: Any) -> None:
        run = current_run()
        if run is not None:
            run.scopes.append(self.path)


def leave_scope(module: nn.Module, args: Any, out: Any) -> None:
    """Forward hook of a container, called even when its forward raised."""
    run = current_run()
    if run is not None and len(run.scopes) > 1:
        run.scopes.pop()
