"""Every channel that equalization may scale gets a random factor: what the float function does then, and the groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import call_model, map_named, named_tensors
from qflow.repair.equalization.channel_groups import groups
from qflow.repair.equalization.channels import Channels


@dataclass(frozen=True)
class Forced:
    """What factors on all channels of a model have done."""

    variables: int
    """Factors that may differ from 1."""
    groups: tuple[str, ...]
    pairs: int
    """Products of two activations with a factor and its inverse."""
    reasons: Counter[str]
    """Why producers keep all their channels as they are."""
    moved: float
    """The largest relative difference of a float output."""


def powers_of_two(count: int, seed: int = 7) -> Tensor:
    """Factors from 1/64 to 64."""
    return 2.0 ** torch.randint(-6, 7, (count,), generator=torch.Generator().manual_seed(seed))


def any_factors(count: int, seed: int = 7) -> Tensor:
    """Factors from 1/100 to 100."""
    return 10 ** (torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 4 - 2)


def like(_: str, tensor: Tensor) -> Tensor:
    """Other values of the same shape; integers and masks stay."""
    return torch.randn_like(tensor) if tensor.is_floating_point() else tensor


def arguments(inputs: Any) -> Any:
    """Inputs as a tuple of arguments or a mapping of keywords."""
    return (inputs,) if isinstance(inputs, Tensor) else inputs


def forced(prepared: QuantizedModel, inputs: Any, factors_of: Callable[[int], Tensor] = powers_of_two) -> Forced:
    """Scale `prepared` in place by `factors_of(number of variables)`; compare it with itself on other inputs."""
    inputs = arguments(inputs)
    torch.manual_seed(3)
    other = map_named(like, inputs)
    before = _outputs(prepared, other)
    channels = Channels(prepared, inputs)
    variables = channels.variables
    free = variables.free_roots(torch.arange(len(variables)))
    values = torch.ones(len(variables), dtype=torch.float64)
    values[free] = factors_of(len(variables)).double()[free]
    for producer in channels.producers.values():
        producer.holds.scale_rows(channels.factors(producer.ids, values))
    for consumer in channels.consumers.values():
        consumer.holds.scale_columns(1 / channels.factors(consumer.ids, values))
    pairs = [_moved(a, b) for a, b in zip(before, _outputs(prepared, other), strict=True)]
    fixed = [p for p in channels.producers.values() if not variables.free(p.ids)]
    return Forced(
        len(free),
        tuple(group.name for group in groups(channels)),
        sum(variables.free(pair.ids) for pair in channels.pairs),
        Counter(variables.reason(float(producer.ids[0])) for producer in fixed),
        max(pairs, default=0.0),
    )


@torch.no_grad()
def _outputs(prepared: QuantizedModel, inputs: Any) -> list[Tensor]:
    return [t.clone() for _, t in named_tensors(call_model(prepared, inputs)) if t.is_floating_point()]


def _moved(a: Tensor, b: Tensor) -> float:
    a, b = (t.double().nan_to_num() for t in (a, b))
    return float((b - a).norm() / a.norm().clamp(min=1e-30))
