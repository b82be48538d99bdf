"""Leaf modules in a prepared model: the user's own class with `Leaf` mixed in before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qflow.quant.model.run import Run, current_run


class Leaf:
    """Mixed in before a leaf module's own class; `qflow_path` is the module's path in the model."""

    qflow_path: str
    inplace = False
    """For modules that have no such switch: looked up in vain it would cost as much as a small operator."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward with its quantizers."""
        run = current_run()
        if run is None or run.depth:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        name = run.leaf_call(self.qflow_path)
        if name in run.arguments:
            args, kwargs = run.quantize_arguments(name, args, kwargs)
        first: Any = args[0] if args else None
        # Training, relu(inplace=True) keeps its result for the backward pass: it works on a copy, and what the
        # user's tensor becomes is the quantized result.
        inplace = self.inplace and isinstance(first, Tensor)
        apart = inplace and torch.is_grad_enabled()
        run.depth += 1
        try:
            # Nothing in here is the user's: the mode would only pass each call on, which at batch 1 costs as much as
            # the operators themselves.
            with torch._C.DisableTorchFunction():
                if apart:
                    return first.copy_(self.result(run, name, None, first.clone(), *args[1:], **kwargs))
                return self.result(run, name, first if inplace else None, *args, **kwargs)
        finally:
            run.depth -= 1

    def compute(self, run: Run, name: str, *args: Any, **kwargs: Any) -> Any:
        """The operator without its output quantizer."""
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def result(self, run: Run, name: str, written: Any, *args: Any, **kwargs: Any) -> Any:
        """The operator through its output quantizer; `written` is the tensor that it writes into, or None."""
        return run.finish(name, self.compute(run, name, *args, **kwargs), written)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as "mixin and own class": the class itself is made at run time and no other process has it."""
        made: Any = super().__reduce_ex__(protocol)
        if not isinstance(made, tuple) or made[1][:1] != (type(self),):
            return made  # the user's own class has its own way
        mixin, own = type(self).__bases__
        return (_made_again, (mixin, own), *made[2:])


class ReluLeaf(Leaf):
    """ReLU and ReLU6. Without gradients the quantizer behind them clamps for them: one pass less, the same numbers."""

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
    """`own` with `mixin` before it; made once a pair, so that `type(a) is type(b)` holds for copies."""
    key = (mixin, own)
    if key not in _LEAF_CLASSES:
        _LEAF_CLASSES[key] = type(f"Q{own.__name__}", key, {"__module__": __name__})
    return _LEAF_CLASSES[key]


def _made_again(mixin: type, own: type) -> Any:
    made = leaf_type(mixin, own)
    return object.__new__(made)
