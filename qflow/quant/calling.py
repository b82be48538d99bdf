"""How a model is called on what a batch offers, and the names of what goes in and comes out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Run `model` on a copy of `inputs`: a tuple or list is splatted, a dict becomes keyword arguments.

    A copy, because a model may write into its input, and the next reader of the batch must not see that.
    """
    return run_model(model, copied(inputs))


def copied(inputs: Any) -> Any:
    """The same structure with its tensors cloned."""
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)


def run_model(model: nn.Module, inputs: Any) -> Any:
    """`call_model` on `inputs` themselves."""
    # torch's fused encoder layer computes otherwise than its parts and switches itself off while it is traced
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def named_tensors(structure: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    """Tensors of nested outputs with the plugin's names: positions and keys joined by `-` (`0-1`, `p3-cls`)."""
    if isinstance(structure, Tensor):
        return [(prefix or "0", structure)]
    if isinstance(structure, Mapping):
        return [
            pair
            for key, value in structure.items()
            for pair in named_tensors(value, f"{prefix}-{key}" if prefix else str(key))
        ]
    if isinstance(structure, (tuple, list)):
        return [
            pair
            for i, value in enumerate(structure)
            for pair in named_tensors(value, f"{prefix}-{i}" if prefix else str(i))
        ]
    if hasattr(structure, "__dataclass_fields__"):
        return named_tensors({key: getattr(structure, key) for key in structure.__dataclass_fields__}, prefix)
    return []


@functools.lru_cache(maxsize=64)
def _argument_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """Positional arguments of `forward`; kept, because a signature takes longer to read than a small operator."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind != p.VAR_KEYWORD)


def input_tensors(model: nn.Module, inputs: Any) -> list[tuple[str, Tensor]]:
    """Input tensors with the names of `forward`'s arguments (`x`, or `x-0` inside a nested argument)."""
    if isinstance(inputs, Mapping):
        arguments: dict[str, Any] = dict(inputs)
    else:
        values = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
        names = list(_argument_names(type(model)))  # type: ignore[arg-type]
        names += [str(i) for i in range(len(names), len(values))]
        arguments = dict(zip(names, values, strict=False))
    found = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found.append((name, value))
        else:
            found.extend((f"{name}-{inner}", tensor) for inner, tensor in named_tensors(value))
    return found
