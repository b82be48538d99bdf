"""A float model with a QuantStub at each of its float inputs and a DeQuantStub at each of its float outputs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qflow.quant.trace.calling import call_model, input_tensors, named_tensors

STUB = "QuantStub"


class Stubbed(nn.Module):
    """The model as `model`, between stubs; it is called like the model."""

    def __init__(
        self, model: nn.Module, example: Any, quant: Callable[[], nn.Module], dequant: Callable[[], nn.Module]
    ):
        super().__init__()
        self.model = model
        self.stubs: dict[str, str] = {}
        """Name of a float input -> path of its QuantStub."""
        for name, value in input_tensors(model, example):
            if value.is_floating_point():
                self.stubs[name] = f"quant_{re.sub(r'[^0-9A-Za-z]+', '_', name)}"
                self.add_module(self.stubs[name], quant())
        with torch.no_grad():
            outputs = call_model(model, example)
        count = sum(value.is_floating_point() for _, value in named_tensors(outputs))
        self.dequants = nn.ModuleList(dequant() for _ in range(count))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model between its stubs."""
        found = {id(value): self.stubs.get(name) for name, value in input_tensors(self.model, kwargs or args)}

        def enter(value: Any) -> Any:
            stub = found.get(id(value)) if isinstance(value, Tensor) else None
            return self.get_submodule(stub)(value) if stub else value

        dequants = iter(self.dequants)

        def leave(value: Any) -> Any:
            return next(dequants)(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        args, kwargs = tree_map(enter, args), tree_map(enter, kwargs)
        return tree_map(leave, self.model(*args, **kwargs))


def has_stubs(model: nn.Module) -> bool:
    """Return whether the user has placed stubs, by which the plugin knows what to quantize."""
    return any(type(module).__name__ == STUB for module in model.modules())
