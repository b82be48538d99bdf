"""The operators with a weight in a prepared model: which of them can be written, and passes that visit them.

A repair writes float parameters of the prepared model, which is a copy of the user's. What it writes has to be loadable
into the user's architecture, so it changes parameters that are there and adds none.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qflow.core.dtype import QDtype
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.weighted import DEAD, ConvTransposeLeaf, LinearLeaf, WeightedLeaf

Skipped = dict[str, str]
"""Weighted operator -> why a step left it as it is."""
FUNCTIONAL = "its weight is an argument of a function, which may compute it anew at every call"
PARAMETRIZED = "its weight is computed from other parameters at every call"


class Run(Protocol):
    """The operator itself, on any weight and bias."""

    def __call__(self, weight: Tensor, bias: Tensor | None, input: Tensor, *rest: Any, **kwargs: Any) -> Tensor: ...


Visit = Callable[[str, Run, Tensor, Tensor | None, Tensor], Tensor]
"""Called with an operator's name, the operator on any weight and bias, and its quantized weight, bias and quantized
input; it returns the operator's result."""


def leaves(prepared: QuantizedModel) -> dict[str, WeightedLeaf]:
    """The modules with a quantized weight by name, from the input to the output."""
    modules = dict(prepared.model.named_modules())
    names = dict.fromkeys(node.weight for node in prepared.graph.weighted if node.weight in prepared.weights)
    found = {name: modules.get(name or "") for name in names}
    return {str(name): leaf for name, leaf in found.items() if isinstance(leaf, WeightedLeaf)}


def int8_leaves(prepared: QuantizedModel) -> tuple[dict[str, WeightedLeaf], Skipped]:
    """The modules with an int8 weight, and the functionals with one, whose weights belong to no module."""
    int8 = {name for name, quantizer in prepared.weights.items() if quantizer.dtype == QDtype.qint8}
    found = {name: leaf for name, leaf in leaves(prepared).items() if name in int8}
    return found, {name: FUNCTIONAL for name in prepared.weights if name in int8 and name not in found}


def users(model: nn.Module) -> Counter[int]:
    """Identity of a parameter -> number of modules that hold it."""
    return Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))


def weight_refused(leaf: WeightedLeaf, held: Mapping[int, int]) -> str:
    """Why the weight of `leaf` cannot be written; empty if it can."""
    weight = leaf._parameters.get("weight")  # type: ignore[attr-defined]
    if weight is None:
        return PARAMETRIZED
    return "another module holds the same weight" if held[id(weight)] > 1 else ""


def writable_leaves(prepared: QuantizedModel) -> tuple[dict[str, WeightedLeaf], Skipped]:
    """The modules whose int8 weight can be written, and why others cannot. int16 weights are in neither."""
    found, skipped = int8_leaves(prepared)
    held = users(prepared.model)
    refused = {name: weight_refused(leaf, held) for name, leaf in found.items()}
    skipped |= {name: why for name, why in refused.items() if why}
    return {name: leaf for name, leaf in found.items() if not refused[name]}, skipped


def bias_of(leaf: WeightedLeaf, held: Mapping[int, int]) -> tuple[Tensor | None, str]:
    """The parameter that shifts the result of `leaf` with its batch norm, and why there is none."""
    norm: Any = leaf.qflow_norm
    own: Any = leaf._parameters.get("bias")  # type: ignore[attr-defined]
    bias = own if norm is None or norm._parameters.get("bias") is None else norm._parameters["bias"]
    if bias is None:
        return None, "neither it nor a batch norm after it has a bias, and a repair adds no parameter"
    return (None, "another module holds the same bias") if held[id(bias)] > 1 else (bias, "")


@torch.no_grad()
def add_to_bias(leaf: WeightedLeaf, bias: Tensor, shift: Tensor) -> None:
    """Shift the result of `leaf`, with its batch norm, by `shift` (one value for each output channel).

    The bias before a batch norm is multiplied by the norm's factor, so it takes shift / factor; the channels that the
    norm has switched off (factor near 0) stay as they are.
    """
    if leaf.qflow_norm is not None and bias is leaf.bias:
        factor = leaf.factor()
        shift = torch.where(factor.abs() < DEAD, torch.zeros_like(shift), shift / factor)
    bias.add_(shift.to(bias))


def channel_axis(leaf: WeightedLeaf) -> int:
    """The axis of the output channels in a result, counted from the end: -1 of a linear layer, -3 of a Conv2d."""
    return -1 if isinstance(leaf, LinearLeaf) else -(leaf.weight.ndim - 1)


def channel_means(leaf: WeightedLeaf, result: Tensor) -> Tensor:
    """Means of a result over all positions: [rows, channels], a row for each entry of the first axis."""
    value = result.detach().movedim(channel_axis(leaf), -1)
    return value.reshape(value.shape[0] if value.ndim > 1 else 1, -1, value.shape[-1]).mean(1)


def along_channels(leaf: WeightedLeaf, shift: Tensor) -> Tensor:
    """`shift`, one value for each output channel, so that it broadcasts over a result of `leaf`."""
    return shift.view(-1, *[1] * (-channel_axis(leaf) - 1))


@contextmanager
def visiting(chosen: Mapping[str, WeightedLeaf], visit: Visit) -> Iterator[None]:
    """In forward passes with quantized weights, `visit` computes the result of these operators.

    It sees the quantized weight with the batch norm folded in, and may give another result, which later operators read.
    """
    for name, leaf in chosen.items():
        object.__setattr__(leaf, "run_with", functools.partial(_visited, name, visit, leaf.run_with))
    try:
        yield
    finally:
        for leaf in chosen.values():
            object.__delattr__(leaf, "run_with")


def _visited(
    name: str, visit: Visit, run: Run, weight: Tensor, bias: Tensor | None, input: Tensor, *rest: Any, **kwargs: Any
) -> Tensor:
    def call(weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
        return run(weight, bias, input, *rest, **kwargs)

    return visit(name, call, weight, bias, input)


def transposed(leaf: WeightedLeaf) -> bool:
    """True for a transposed convolution, whose weight is [input channels, output channels / groups, ...]."""
    return isinstance(leaf, ConvTransposeLeaf)
