"""Bias correction: take back by how much quantization has shifted the mean of an operator's output.

Quantized weights and clipped inputs shift the mean of each output channel, and a shift adds up from operator to
operator where noise averages out. For output channel c of one operator, over the calibration samples i,

    measured    d_i = mean over positions of (W x_i + b) - (W_q x_q,i + b), the float operator on float inputs against
                the quantized one on quantized inputs
    analytic    d_i = mean over positions of (W - W_q) x_q,i, the mean input times the error of the weight: what the
                weight alone has shifted, without a float pass

    b_c  <-  b_c + d max(0, 1 - s^2 / d^2),   d = mean of d_i,   s^2 = variance of d_i / number of samples

The first is the empirical, the second the analytic correction of Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction" (ICCV 2019, arXiv 1906.04721, section 4.2), whose analytic form takes the mean input
from batch norms instead of samples. The last factor is the positive-part shrinkage of James and Stein (1961): a shift
that a few samples do not tell from zero is left alone.

Operators are corrected in the order in which they run, and a later one sees the earlier corrections: in the pass over
the quantized model each batch is corrected by its own shift as it goes, and the bias gets that of all batches. With one
batch this is the correction operator by operator, with several it differs in the spread between batches. It takes one
quantized pass, and one float pass before it if it is measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.weighted import WeightedLeaf
from qflow.quant.trace.calling import call_model
from qflow.quant.trace.order import Order
from qflow.repair.base.operators import (
    Run,
    Skipped,
    add_to_bias,
    along_channels,
    bias_of,
    channel_means,
    int8_leaves,
    leaves,
    users,
    visiting,
)


class Target(ABC):
    """What the outputs of the quantized operators are compared with: the float model, as it was when it was taken."""

    passes: ClassVar[int]
    """Passes over the samples that `of` takes."""

    @classmethod
    @abstractmethod
    def of(cls, prepared: QuantizedModel, batches: Sequence[Any]) -> Target:
        """Take it from the float model that `prepared` holds now, in eval mode; `batches` are model inputs."""

    def order(self, batch: int) -> Order:
        """The order of topk and sort that the quantized pass over this batch follows."""
        return Order()

    @abstractmethod
    def shift(self, call: Call) -> Tensor | None:
        """d_i of the module docstring, [rows, channels]; None if this call cannot be compared."""


@dataclass(frozen=True)
class Call:
    """One call of a weighted operator in the pass over the quantized model."""

    name: str
    leaf: WeightedLeaf
    batch: int
    number: int
    """How many calls of the operator came before it in the same batch."""
    run: Run
    weight: Tensor
    input: Tensor
    result: Tensor


@dataclass(frozen=True)
class FloatOutputs(Target):
    """The measured correction: what the float operators give on the same samples, rows times channels numbers each."""

    passes = 1
    means: list[dict[str, list[Tensor]]]
    """Batch -> operator -> for each of its calls the means of its output (`channel_means`)."""
    orders: list[Order]

    @classmethod
    @torch.no_grad()
    def of(cls, prepared: QuantizedModel, batches: Sequence[Any]) -> FloatOutputs:
        chosen, place = leaves(prepared), _results(prepared)
        found, before = cls([], []), prepared.watch

        def watch(call: str, value: Tensor) -> None:
            name = place.get(call) or place.get(call.rpartition("(")[0])
            if name is not None:
                found.means[-1].setdefault(name, []).append(channel_means(chosen[name], value))

        prepared.watch = watch
        try:
            for inputs in batches:
                found.means.append({})
                with prepared.recording_order() as order:
                    call_model(prepared, inputs)
                found.orders.append(order)
        finally:
            prepared.watch = before
        return found

    def order(self, batch: int) -> Order:
        return self.orders[batch]

    def shift(self, call: Call) -> Tensor | None:
        expected, found = self.means[call.batch].get(call.name, []), channel_means(call.leaf, call.result)
        if call.number >= len(expected) or expected[call.number].shape != found.shape:
            return None  # the user's code has taken another way than in float
        return expected[call.number] - found


@dataclass(frozen=True)
class FloatWeights(Target):
    """The analytic correction: the float weights with the batch norms folded in, a copy of each."""

    passes = 0
    weights: dict[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, prepared: QuantizedModel, batches: Sequence[Any]) -> FloatWeights:
        return cls({name: leaf.folded()[0].detach().clone() for name, leaf in leaves(prepared).items()})

    def shift(self, call: Call) -> Tensor | None:
        return channel_means(call.leaf, call.run(self.weights[call.name] - call.weight, None, call.input))


def _results(prepared: QuantizedModel) -> dict[str, str]:
    """Operator call that gives the result of a weighted operator, with its batch norm -> the weighted operator."""
    functional = {norm: call for call, norm in prepared.plan.functional_norms.items()}
    norms = {name: functional.get(norm, norm) for name, norm in prepared.plan.folds.items()}
    return {norms.get(name, name): name for name in leaves(prepared)}


def correctable(prepared: QuantizedModel) -> tuple[dict[str, WeightedLeaf], Skipped]:
    """The operators with an int8 weight whose output can be shifted, and why others cannot."""
    found, skipped = int8_leaves(prepared)
    held = users(prepared.model)
    refused = {name: bias_of(leaf, held)[1] for name, leaf in found.items()}
    skipped |= {name: why for name, why in refused.items() if why}
    return {name: leaf for name, leaf in found.items() if not refused[name]}, skipped


@dataclass
class _Shift:
    """Sums of d_i over the samples of all batches."""

    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        self.count += rows.shape[0]
        self.total = self.total + rows.double().sum(0)
        self.squares = self.squares + rows.double().square().sum(0)

    def shrunk(self) -> Tensor:
        """The shift of each channel (module docstring)."""
        mean = torch.as_tensor(self.total) / self.count
        if self.count < 2:
            return torch.zeros_like(mean)  # one sample tells nothing of its spread
        variance = (torch.as_tensor(self.squares) / self.count - mean.square()).clamp_min(0.0)
        noise = variance / (self.count - 1)
        kept = torch.where(mean == 0, torch.zeros_like(mean), 1 - noise / mean.square())
        return mean * kept.clamp(0.0, 1.0)


@dataclass
class _Pass:
    """The pass over the quantized model: it compares each call of an operator, and corrects it at once."""

    chosen: Mapping[str, WeightedLeaf]
    target: Target
    batch: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    shifts: dict[str, _Shift] = field(default_factory=lambda: defaultdict(_Shift))

    def visit(self, name: str, run: Run, weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
        result, number = run(weight, bias, input), self.calls.get(name, 0)
        self.calls[name] = number + 1
        leaf = self.chosen[name]
        rows = self.target.shift(Call(name, leaf, self.batch, number, run, weight, input, result))
        if rows is None or not bool(torch.isfinite(rows).all()):
            return result
        here = _Shift()
        here.add(rows)
        self.shifts[name].add(rows)
        return result + along_channels(leaf, here.shrunk().to(result))


@torch.no_grad()
def correct_biases(
    prepared: QuantizedModel, batches: Sequence[Any], target: Target, only: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Correct the biases of the operators with an int8 weight, from the input to the output, and write them.

    `batches` are the model inputs that `target` was taken on. `only` are names out of `correctable`, by default all.
    All other quantizers act as they are configured; the model is calibrated and in eval mode. Returns what was added to
    each channel of an operator's output, without the operators that stay as they are.
    """
    held = users(prepared.model)
    chosen = {name: leaf for name, leaf in correctable(prepared)[0].items() if only is None or name in only}
    walk = _Pass(chosen, target)
    with visiting(chosen, walk.visit):
        for walk.batch, inputs in enumerate(batches):
            walk.calls = {}
            with prepared.quantized(), prepared.following(target.order(walk.batch)):
                call_model(prepared, inputs)
    shifts = {name: shift.shrunk().float() for name, shift in walk.shifts.items()}
    for name, shift in shifts.items():
        bias = bias_of(chosen[name], held)[0]
        assert bias is not None
        add_to_bias(chosen[name], bias, shift)
    return {name: shift for name, shift in shifts.items() if bool(shift.any())}
