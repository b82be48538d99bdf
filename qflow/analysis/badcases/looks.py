"""One look of a search for bad cases: both models run on a batch, and how far apart they are, sample by sample."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qflow.analysis.measures.metrics import Custom, distances
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.temporal_state import at_start
from qflow.quant.trace.calling import call_model, named_tensors
from qflow.quant.trace.order import Order, may_change_order

INPUT = "the input"


@dataclass(frozen=True)
class Seen:
    """What a look at one batch gives."""

    size: int
    """Number of samples."""
    rows: Mapping[str, Tensor]
    """Output -> its distances, float64 [metrics, samples], on the CPU."""
    refused: Mapping[str, str]
    """Output -> why it cannot be compared sample by sample."""
    nan: Mapping[str, list[int]]
    """Where the float model has NaN (the input, "output 0") -> in which samples of the batch."""
    followed: tuple[str, ...] = ()
    """Operators that change the order of values and have used that of the float model, in this look or an earlier."""
    strayed: tuple[str, ...] = ()
    """Operators that could not."""

    def plain(self) -> dict[str, Any]:
        """Return it as plain data, for another process."""
        rows = {name: tensor.tolist() for name, tensor in self.rows.items()}
        return {**vars(self), "rows": rows, "followed": list(self.followed), "strayed": list(self.strayed)}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Seen:
        """Return what `plain` was made of."""
        rows = {name: torch.tensor(values, dtype=torch.float64) for name, values in data["rows"].items()}
        orders = {name: tuple(data[name]) for name in ("followed", "strayed")}
        return cls(data["size"], rows, data["refused"], data["nan"], **orders)


@dataclass
class Looks:
    """Runs both models on one batch after the other. Use it inside `torch.no_grad()` and `prepared.quantized()`."""

    model: nn.Module
    prepared: QuantizedModel
    custom: Custom | None = None
    order: Order = field(default_factory=Order, init=False)
    floating: QuantizedModel | None = field(default=None, init=False)
    """The model that gives the float outputs and the order of values, if operators change that order."""
    other_weights: bool = field(default=False, init=False)
    """Whether they change that order, but the float model has other parameters, so that nothing follows its order."""

    def __post_init__(self) -> None:
        if may_change_order(self.prepared.plan.known):
            self.floating = _same_weights(self.model, self.prepared)
            self.other_weights = self.floating is None

    def look(self, batch: Any, size: int) -> Seen:
        """Run both models on a batch of so many samples."""
        reference, quantized = self.outputs(batch)
        refused = {name: why for name, x in reference.items() if (why := refusal(x, quantized.get(name), size))}
        there = [name for name in reference if name not in refused]
        rows = {name: distances(reference[name], quantized[name], self.custom).cpu() for name in there}
        order = tuple(sorted(self.order.followed)), tuple(sorted(self.order.strayed))
        return Seen(size, rows, refused, _nan_samples(batch, {name: reference[name] for name in there}, size), *order)

    def outputs(self, batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Float and quantized outputs by name; in the quantized model topk, sort, ... use the float model's order."""
        if self.floating is None:
            reference = dict(named_tensors(call_model(self.model, batch)))
            return reference, dict(named_tensors(call_model(self.prepared, batch)))
        with self.floating.recording_order() as order:
            reference = dict(named_tensors(call_model(self.floating, batch)))
        with self.prepared.following(order):
            quantized = dict(named_tensors(call_model(self.prepared, batch)))
        self.order.followed |= order.followed
        self.order.strayed |= order.strayed
        return reference, quantized


def refusal(x: Tensor | None, y: Tensor | None, size: int) -> str:
    """Return why a float output and the quantized one cannot be compared sample by sample; "" if they can."""
    if x is not None and y is not None and not (x.is_floating_point() and y.is_floating_point()):
        return f"{str(x.dtype).removeprefix('torch.')} values have no distance"
    if x is None or y is None or x.shape != y.shape:
        shapes = [None if t is None else list(t.shape) for t in (x, y)]
        return f"float gives the shape {shapes[0]}, quantized {shapes[1]}"
    if not x.numel():
        return "it holds no values"
    if not x.ndim or len(x) != size:
        return f"its shape {list(x.shape)} does not hold one row for each of the {size} samples of the batch"
    return ""


def _nan_samples(batch: Any, reference: Mapping[str, Tensor], size: int) -> dict[str, list[int]]:
    """Return the samples whose inputs contain NaN, and for each output the others in which it does."""
    given = [_nan(t, size) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.is_floating_point()]
    rows = torch.stack(given).any(0) if given else torch.zeros(size, dtype=torch.bool)
    made = {f"output {name}": _nan(tensor, size) & ~rows for name, tensor in reference.items()}
    found = {what: where.nonzero().flatten().tolist() for what, where in {INPUT: rows, **made}.items()}
    return {what: samples for what, samples in found.items() if samples}


def _nan(tensor: Tensor, size: int) -> Tensor:
    """Which of the samples contain NaN [size], on the CPU; all or none if the tensor has no sample axis."""
    found = tensor.isnan()
    if not found.ndim or len(found) != size:
        return found.any().cpu().expand(size)
    return found.reshape(size, -1).any(1).cpu()


def _same_weights(model: nn.Module, prepared: QuantizedModel) -> QuantizedModel | None:
    """`prepared`, or a copy of it if its weights were trained, with the weights of `model`; None if they do not fit."""
    with at_start(model, prepared.cached):
        state = copy.deepcopy(model.state_dict())
    wanted, own = _tensors(state), _tensors(prepared.float_state_dict())
    if wanted.keys() != own.keys() or any(wanted[k].shape != own[k].shape for k in own):
        return None
    if all(torch.equal(wanted[k], own[k]) for k in own):
        return prepared
    twin = copy.deepcopy(prepared)
    twin.load_float_state_dict(state)
    return twin


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}  # without extra states
