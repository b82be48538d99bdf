"""Leaf modules in a prepared model: the user's own class with `Leaf` mixed in before it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qflow.quant.model.run import Run, current_run


class Leaf:
    """Mixin, placed before a leaf module's own class in the MRO; `qflow_path` is the module's path in the model."""

    qflow_path: str
    inplace = False
    """For modules without this switch: a failing attribute look-up in nn.Module costs as much as a small operator."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward with its quantizers."""
        run = current_run()
        if run is None or run.depth:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        name = run.leaf_call(self.qflow_path)
        if name in run.arguments:
            args, kwargs = run.quantize_arguments(name, args, kwargs)
        first: Any = args[0] if args else None
        # With gradients, relu(inplace=True) saves its own result for the backward pass. So it runs on a copy, and the
        # quantized result is written into the user's tensor.
        inplace = self.inplace and isinstance(first, Tensor)
        on_copy = inplace and torch.is_grad_enabled()
        run.depth += 1
        try:
            # There is no user code in here: the mode would only pass each call on, and at batch 1 that costs as much
            # as the operators themselves.
            with torch._C.DisableTorchFunction():
                if on_copy:
                    return first.copy_(self.result(run, name, None, first.clone(), *args[1:], **kwargs))
                return self.result(run, name, first if inplace else None, *args, **kwargs)
        finally:
            run.depth -= 1

    def compute(self, run: Run, name: str, *args: Any, **kwargs: Any) -> Any:
        """The operator without its output quantizer."""
        return run.inside(name, self, super().forward, args, kwargs)  # type: ignore[misc]

    def result(self, run: Run, name: str, written: Any, *args: Any, **kwargs: Any) -> Any:
        """The operator through its output quantizer; `written` is the tensor that it writes into, or None."""
        return run.finish(name, self.compute(run, name, *args, **kwargs), written)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the mixin and the own class: the combined class is created at run time and cannot be imported."""
        reduced: Any = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or reduced[1][:1] != (type(self),):
            return reduced  # the user's class defines its own pickling
        mixin, own = type(self).__bases__
        return (_rebuild_leaf, (mixin, own), *reduced[2:])


class ReluLeaf(Leaf):
    """ReLU and ReLU6. Without gradients their quantizer does the clamping: the same numbers with one kernel less."""

    def result(self, run: Run, name: str, written: Any, *args: Any, **kwargs: Any) -> Any:
        """The operator through its output quantizer."""
        if not args or not self._clamps(run, name, args[0]):
            return super().result(run, name, written, *args, **kwargs)
        quantizer = run.outputs[run.plan.output_at[name]]
        run.ran.add(quantizer.name)
        return quantizer.clamped(args[0], 6.0 if isinstance(self, nn.ReLU6) else None, written is not None)

    def _clamps(self, run: Run, name: str, x: Any) -> bool:
        if not run.plain or torch.is_grad_enabled() or x.dtype != torch.float32 or not run.quantizes(name):
            return False
        return run.outputs[run.plan.output_at[name]].clamps


_LEAF_CLASSES: dict[tuple[type, type], type] = {}


def leaf_type(mixin: type, own: type) -> type:
    """`own` with `mixin` before it. Each pair gets one class, so that `type(a) is type(b)` holds for copies."""
    key = (mixin, own)
    if key not in _LEAF_CLASSES:
        _LEAF_CLASSES[key] = type(f"Q{own.__name__}", key, {"__module__": __name__})
    return _LEAF_CLASSES[key]


@contextmanager
def own_classes(model: nn.Module) -> Iterator[None]:
    """The leaf modules of a prepared model are of the user's own classes again, so that it can be traced."""
    swapped = [(module, type(module)) for module in model.modules() if isinstance(module, Leaf)]
    try:
        for module, cls in swapped:
            module.__class__ = cls.__bases__[1]
        yield
    finally:
        for module, cls in swapped:
            module.__class__ = cls


def float_copy(model: nn.Module) -> nn.Module:
    """A copy of the model inside a prepared one with the user's own classes: the float model with these weights."""
    with own_classes(model):
        return copy.deepcopy(model)


def _rebuild_leaf(mixin: type, own: type) -> Any:
    return object.__new__(leaf_type(mixin, own))
