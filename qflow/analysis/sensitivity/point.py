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

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qflow.analysis.measures.distances import MERGE, Distances
from qflow.analysis.measures.tables import SensitivityTable
from qflow.analysis.sensitivity.candidates import Candidate, candidates, sample_flops
from qflow.core.errors import DataError
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.replay.captured_ops import Variant
from qflow.quant.replay.replay import borrowed
from qflow.quant.trace.calling import batch_size, call_model, named_tensors
from qflow.quant.trace.order import Order
from qflow.quant.values.fake_quant import FakeQuant

Outputs = dict[str, Tensor]


def gains(
    prepared: QuantizedModel,
    batches: Sequence[Any],
    *,
    rows: Sequence[Candidate] | None = None,
    metric: str = "L1",
    exact: int = 0,
) -> SensitivityTable:
    """Rank the quantizers of a calibrated mix by what the outputs gain without each, on `batches` of model inputs.

    Scores are differences of D, in the units of `metric` merged as in `sensitivity`. `rows` (None: every active
    quantizer at its dtype in the mix) may have other dtypes: q is then the quantizer of the row, and g that of the mix.
    The `exact` rows with the largest absolute gains are measured: D with this quantizer minus D with it off. So are
    those without a finite gradient, as that of a square root at 0. Raises DataError without samples, quantizers or
    outputs that can be compared.
    """
    rows = candidates(prepared) if rows is None else rows
    if not batches or not rows:
        raise DataError("A ranking needs quantizers and bad cases, but got none. Calibrate, and give data.")
    point = _Point(prepared, metric)
    total = sum(batch_size(inputs) for inputs in batches)
    found = [0.0] * len(rows)
    variants = [row.variant for row in rows]
    for inputs in batches:
        share = batch_size(inputs) / total
        found = [a + share * b for a, b in zip(found, point.first_order(inputs, variants), strict=True)]
    made = [row.row(gain, 0.0, {}, exact=False) for row, gain in zip(rows, found, strict=True)]
    steep = [i for i, gain in enumerate(found) if not math.isfinite(gain)]
    largest = sorted({*range(len(rows))} - {*steep}, key=lambda i: -abs(found[i]))[:exact]
    again = [*steep, *largest]
    for i, gain in zip(again, point.measured(batches, [variants[i] for i in again]), strict=True):
        made[i] = replace(made[i], score=gain, exact=True)
    order_of = {n: i for i, node in enumerate(prepared.graph.nodes) for n in (node.name, *node.inner)}
    made.sort(key=lambda r: (-r.score, order_of[r.op_name], r.sensitive_type))
    which = [f"the {len(largest)} largest"] if largest else []
    which += [f"{len(steep)} without a finite gradient"] if steep else []
    measured = f"; {' and '.join(which)} measured by full forwards without that quantizer" if which else ""
    return SensitivityTable(
        metric=metric,
        merge=MERGE,
        samples=total,
        flops=sample_flops(prepared.graph),
        exact=len(again) == len(rows),
        rows=tuple(made),
        method=f"all quantizers on, first order from one backward pass{measured}",
    )


class _Point:
    """The mix that `prepared` holds, compared with its float model in `metric`."""

    def __init__(self, prepared: QuantizedModel, metric: str) -> None:
        self.prepared, self.metric = prepared, metric

    def first_order(self, inputs: Any, variants: Sequence[Variant]) -> list[float]:
        """Return the first-order gain of each variant on one batch."""
        order, plain = self._float(inputs)
        distances = Distances(self.metric, 1)
        distances.reference(plain, batch_size(inputs))
        with torch.enable_grad(), self._recorded(variants) as calls:
            distances.add(0, self._mixed(inputs, order))
        _ = distances.findings  # raises DataError if no output can be compared
        merged = distances.merged(0).mean()
        results = [result for result, _ in calls]
        if not results or not merged.requires_grad:
            return [0.0] * len(variants)
        found = [0.0] * len(variants)
        gradients = torch.autograd.grad(merged, results, allow_unused=True)
        for gradient, (_, errors) in zip(gradients, calls, strict=True):
            for v, error in errors.items() if gradient is not None else ():
                found[v] += float((gradient * error).sum(dtype=torch.float64))
        return found

    @contextmanager
    def _recorded(self, variants: Sequence[Variant]) -> Iterator[list[tuple[Tensor, dict[int, Tensor]]]]:
        """Record of each call of a quantizer its result, which the backward pass reaches, and its variants' errors."""
        calls: list[tuple[Tensor, dict[int, Tensor]]] = []

        def record(own: Sequence[int], x: Tensor, result: Tensor) -> Tensor:
            result = result if result.requires_grad else result.detach().requires_grad_()
            with torch.no_grad():
                errors = {v: torch.nan_to_num_(variants[v].quantizer(x) - x, 0.0, 0.0, 0.0) for v in own}
            calls.append((result, errors))
            return result

        of: dict[FakeQuant, list[int]] = {}
        for v, variant in enumerate(variants):
            of.setdefault(self._own(variant), []).append(v)
        hooks = [
            quantizer.register_forward_hook(lambda _, args, result, own=own: record(own, args[0].detach(), result))
            for quantizer, own in of.items()
        ]
        try:
            yield calls
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def measured(self, batches: Sequence[Any], variants: Sequence[Variant]) -> list[float]:
        """Return the gain of each variant: D with it minus D with its quantizer off."""
        distances = Distances(self.metric, 2 * len(variants))
        for inputs in batches if variants else ():
            order, plain = self._float(inputs)
            distances.reference(plain, batch_size(inputs))
            for v, variant in enumerate(variants):
                own = self._own(variant)
                with borrowed(own, variant.quantizer):
                    distances.add(2 * v, self._mixed(inputs, order))
                distances.add(2 * v + 1, self._mixed(inputs, order, own))
                found = [distances.result(v)[0] for v in range(2 * len(variants))]
        return [_difference(found[2 * v], found[2 * v + 1]) for v in range(len(variants))]

    def _own(self, variant: Variant) -> FakeQuant:
        return (self.prepared.weights if variant.weight else self.prepared.outputs)[variant.name]

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


def _difference(mixed: float, without: float) -> float:
    """Return `mixed` - `without`; 0 if neither is finite, since then no difference is known."""
    return 0.0 if not (math.isfinite(mixed) or math.isfinite(without)) else mixed - without
