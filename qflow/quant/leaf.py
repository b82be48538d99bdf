"""Leaf modules in a prepared model: the user's own class with `Leaf` mixed in before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qflow.quant.run import Run, current_run


class Leaf:
    """Mixed in before a leaf module's own class; `qflow_path` is the module's path in the model."""

    qflow_path: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward with its quantizers."""
        run = current_run()
        if run is None or run.depth:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        name = run.name(self.qflow_path)
        if name in run.arguments:
            args, kwargs = run.quantize_arguments(name, args, kwargs)
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
