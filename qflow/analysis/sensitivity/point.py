"""Sensitivity at the point of a mix: what the outputs gain without one quantizer while all others stay on.

The rows of measure.py are errors of one quantizer alone in the float model. Where errors interact, they are not what a
promotion gains: behind an operator that destroys its signal, no other promotion helps. Here every quantizer of the mix
is on. With x what a quantizer reads in the mix, q(x) its result, and g the gradient at q(x) of the outputs' distance D
to float (rounding passes gradients on, clipping stops them),

    gain = g . (q(x) - x)

is, to first order, by how much D falls without this quantizer. One forward and one backward pass give all gains. They
are signed: an error that makes up for another has a negative one. If the network is linear, its weights lie on their
grid, and nothing is clipped, the L1 gains of all quantizers add up to D exactly (Euler's theorem: D is then homogeneous
in the errors).

Where several quantizers in a row destroy the same signal, the first of them has the gain of all, and the others have
none, because they find values on the grid already. Ranked again once the first is promoted, the next one comes first.
Measured gains say what one promotion alone brings, which is nothing for each of such a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qflow.analysis.measures.distances import Distances
from qflow.analysis.measures.tables import SensitivityTable
from qflow.analysis.sensitivity.candidates import candidates
from qflow.analysis.sensitivity.measure import MERGE
from qflow.core.errors import DataError
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import batch_size, call_model, named_tensors
from qflow.quant.trace.order import Order
from qflow.quant.values.fake_quant import FakeQuant

Outputs = dict[str, Tensor]


def gains(
    model: nn.Module, prepared: QuantizedModel, batches: Sequence[Any], *, metric: str = "L1", exact: int = 0
) -> SensitivityTable:
    """Rank the quantizers of a calibrated mix by what the outputs gain without each, on `batches` of model inputs.

    Scores are differences of D, in the units of `metric` merged as in `sensitivity`. The `exact` rows with the largest
    absolute gains are measured, each by a forward pass with its quantizer off. Raises DataError without samples,
    quantizers or outputs that can be compared.
    """
    rows = candidates(prepared)
    if not batches or not rows:
        raise DataError("A ranking needs quantizers and bad cases, but got none. Calibrate, and give data.")
    point = _Point(model, prepared, metric)
    total = sum(batch_size(inputs) for inputs in batches)
    found = [0.0] * len(rows)
    quantizers = [_of(prepared, *row.quantizer) for row in rows]
    for inputs in batches:
        share = batch_size(inputs) / total
        found = [a + share * b for a, b in zip(found, point.first_order(inputs, quantizers), strict=True)]
    made = [row.row(gain, 0.0, {}, exact=False) for row, gain in zip(rows, found, strict=True)]
    largest = sorted(range(len(rows)), key=lambda i: -abs(found[i]))[:exact]
    for i, gain in zip(largest, point.measured(batches, [quantizers[i] for i in largest]), strict=True):
        made[i] = replace(made[i], score=gain, exact=True)
    order_of = {n: i for i, node in enumerate(prepared.graph.nodes) for n in (node.name, *node.inner)}
    made.sort(key=lambda r: (-r.score, order_of[r.op_name], r.sensitive_type))
    measured = f"; the {len(largest)} largest with that quantizer off, full forwards" if largest else ""
    return SensitivityTable(
        metric=metric,
        merge=MERGE,
        samples=total,
        exact=len(largest) == len(rows),
        rows=tuple(made),
        method=f"all quantizers on, first order from one backward pass{measured}",
    )


def _of(prepared: QuantizedModel, name: str, weight: bool) -> FakeQuant:
    return (prepared.weights if weight else prepared.outputs)[name]


class _Point:
    """The mix that `prepared` holds, compared with the float `model` in `metric`."""

    def __init__(self, model: nn.Module, prepared: QuantizedModel, metric: str) -> None:
        self.model, self.prepared, self.metric = model, prepared, metric

    def first_order(self, inputs: Any, quantizers: Sequence[FakeQuant]) -> list[float]:
        """Return the first-order gain of each quantizer on one batch."""
        order, plain = self._float(inputs)
        distances = Distances(self.metric, 1)
        distances.reference(plain, batch_size(inputs))
        with torch.enable_grad(), _recorded(quantizers) as calls:
            distances.add(0, self._mixed(inputs, order))
            assert distances.findings is not None  # raises DataError if no output can be compared
            merged = distances.merged(0).mean()
        every = [call for found in calls for call in found]
        if not every or not merged.requires_grad:
            return [0.0] * len(quantizers)
        gradients = iter(torch.autograd.grad(merged, [result for result, _ in every], allow_unused=True))
        return [
            sum(float((g.double() * error).sum()) for (_, error) in found if (g := next(gradients)) is not None)
            for found in calls
        ]

    @torch.no_grad()
    def measured(self, batches: Sequence[Any], quantizers: Sequence[FakeQuant]) -> list[float]:
        """Return the gain of each quantizer: D of the mix minus D with this quantizer off."""
        distances = Distances(self.metric, 1 + len(quantizers))
        for inputs in batches if quantizers else ():
            order, plain = self._float(inputs)
            distances.reference(plain, batch_size(inputs))
            distances.add(0, self._mixed(inputs, order))
            for position, quantizer in enumerate(quantizers, 1):
                distances.add(position, self._mixed(inputs, order, quantizer))
        whole, *without = (distances.result(position)[0] for position in range(1 + len(quantizers)))
        return [whole - left for left in without]

    def _float(self, inputs: Any) -> tuple[Order, Outputs]:
        """Return the order of topk and the like in the float model, and its outputs."""
        with torch.no_grad(), self.prepared.recording_order() as order:
            return order, dict(named_tensors(call_model(self.prepared, inputs)))

    def _mixed(self, inputs: Any, order: Order, off: FakeQuant | None = None) -> Outputs:
        """Return the outputs with all quantizers on but `off`."""
        with self.prepared.quantized(), self.prepared.following(order):
            if off is not None:
                off.enabled = False
            return dict(named_tensors(call_model(self.prepared, inputs)))


@contextmanager
def _recorded(quantizers: Sequence[FakeQuant]) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
    """Record (result, error) of each call of each quantizer; every result takes part in the backward pass."""
    calls: list[list[tuple[Tensor, Tensor]]] = [[] for _ in quantizers]

    def record(found: list[tuple[Tensor, Tensor]], args: Any, result: Tensor) -> Tensor:
        result = result if result.requires_grad else result.detach().requires_grad_()
        error = torch.nan_to_num(result.detach().double() - args[0].detach().double(), 0.0, 0.0, 0.0)
        found.append((result, error))
        return result

    hooks = [
        quantizer.register_forward_hook(lambda module, args, result, found=found: record(found, args, result))
        for quantizer, found in zip(quantizers, calls, strict=True)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
