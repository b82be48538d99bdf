"""Quantization sensitivity: one quantizer on at a time, outputs against float, on bad cases.

Exact: every row is measured by running the prepared model with that quantizer alone switched on. Outputs are
merged by the sum over outputs of distance / mean |float output|, so that outputs of different size count alike
(for Cosine and SQNR the badness 1 - cosine and |noise| / |signal|). The reference is the float model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qflow.analysis.metrics import distance
from qflow.analysis.tables import SensitivityRow, SensitivityTable
from qflow.quant.calling import call_model, named_tensors
from qflow.quant.quantized_model import QuantizedModel

MERGE = "sum over outputs of distance / mean |float output|"


def sensitivity(
    model: nn.Module,
    prepared: QuantizedModel,
    batches: Sequence[Any],
    *,
    metric: str = "L1",
    on_row: Callable[[int], None] = lambda done: None,
) -> SensitivityTable:
    """Measure every active quantizer of a calibrated model on `batches` of bad cases (model inputs each)."""
    with torch.no_grad():
        references = [dict(named_tensors(call_model(model, inputs))) for inputs in batches]
    jobs = [("activation", n, prepared.outputs[n.quantizer].dtype) for n in prepared.graph.quantized if n.quantizer]
    jobs += [("weight", n, prepared.weights[n.weight].dtype) for n in prepared.graph.weighted if n.weight]
    jobs = [(kind, node, dtype) for kind, node, dtype in jobs if dtype is not None and dtype.is_integer]
    rows = []
    for done, (kind, node, dtype) in enumerate(jobs, 1):
        names = {"outputs": [node.quantizer]} if kind == "activation" else {"weights": [node.weight]}
        score = 0.0
        with torch.no_grad(), prepared.only(**names):  # type: ignore[arg-type]
            for inputs, reference in zip(batches, references, strict=True):
                got = dict(named_tensors(call_model(prepared, inputs)))
                score += _merged(metric, reference, got) / len(batches)
        rows.append(
            SensitivityRow(
                node.name,
                kind,
                node.op_type,
                score,
                str(dtype),
                2 * node.macs // max(node.shape[0] if node.shape else 1, 1),
            )
        )
        on_row(done)
    order = {node.name: i for i, node in enumerate(prepared.graph.nodes)}
    rows.sort(key=lambda r: (-r.score, order[r.op_name], r.sensitive_type))
    samples = sum(_size(inputs) for inputs in batches)
    return SensitivityTable(metric=metric, merge=MERGE, samples=samples, exact=True, rows=tuple(rows))


def _merged(metric: str, reference: dict[str, Tensor], got: dict[str, Tensor]) -> float:
    total = 0.0
    for name, x in reference.items():
        if not x.is_floating_point():
            continue
        x, y = (x, got[name]) if x.ndim else (x[None], got[name][None])
        value = distance(metric, x, y)
        if metric == "Cosine":
            total += float((1.0 - value).mean())
        elif metric == "SQNR":
            total += float((10.0 ** (-value / 20.0)).mean())
        elif metric == "KL":
            total += float(value.mean())
        else:
            size = float(x.double().abs().mean())
            total += float(value.mean()) / ((size**2 if metric == "MSE" else size) or 1.0)
    return total


def _size(inputs: Any) -> int:
    tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs.values() if isinstance(inputs, dict) else inputs)
    return int(next((t.shape[0] for t in tensors if isinstance(t, Tensor) and t.ndim), 1))
