"""The zoo of real models: name -> how to build it, in a small size and with random weights.

A model tests an idiom of a library, not accuracy. Its builder returns the model in eval mode and a function that makes
inputs of any batch size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[int], Any]


@dataclass(frozen=True)
class Entry:
    """One model of the zoo."""

    name: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    needs: tuple[str, ...] = ()
    """Packages that the model comes from."""
    sample: bool = True
    """True if the tests run it; `make zoo` runs all."""
    double: bool = True
    """False if the model casts to float32, whatever the dtype of its weights."""
    cached_attrs: tuple[str, ...] = ()
    """Attributes that hold the model's state between calls."""

    @property
    def missing(self) -> str:
        """The first package that is needed and not installed, or ""."""
        return next((name for name in self.needs if importlib.util.find_spec(name) is None), "")

    def made(self) -> tuple[nn.Module, Inputs]:
        """The model, alive in every layer, and its inputs. The same at every call."""
        if self.needs:
            from support.torchvision_ops import declare

            declare()
        torch.manual_seed(0)
        model, inputs = self.build()
        start = {name: getattr(model, name) for name in self.cached_attrs}
        alive(model.eval(), inputs)
        for name, value in start.items():
            setattr(model, name, value)
        return model, inputs


def images(*size: int) -> Inputs:
    """Inputs of one image each."""
    return lambda batch: torch.randn(batch, 3, *size)


def alive(model: nn.Module, inputs: Inputs) -> None:
    """Fill what a library initializes to zero, and take the statistics of batch norms from the inputs.

    Residual branches often begin with a gain of 0 or 1e-5, and a head with zeros: quantization errors would vanish
    there.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = parameter.ndim == 1 and not name.endswith("bias")
            if float(parameter.abs().max()) < 1e-3 and (gain or parameter.ndim > 1):
                parameter.uniform_(0.5, 1.5) if gain else parameter.normal_(0, 0.05)
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
            norm.train()
        batches = [inputs(4) for _ in range(2)]
        for batch in batches if norms else []:
            call(model, batch)
    model.eval()


def call(model: nn.Module, inputs: Any) -> Any:
    """Run the model on a tensor, on a tuple of arguments or on keywords."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def entries() -> dict[str, Entry]:
    """All models by name."""
    from zoo_real import own_models, temporal_models, timm_models, torchvision_models, transformers_models

    modules = (timm_models, torchvision_models, transformers_models, own_models, temporal_models)
    return {entry.name: entry for module in modules for entry in module.ENTRIES}
