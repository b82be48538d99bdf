"""Bad cases: the samples on which the calibrated model differs most from float."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qflow.analysis.metrics import distance, worst_first
from qflow.analysis.tables import BadcaseTable, text_table
from qflow.core.errors import DataError
from qflow.core.settings import COMPARISONS
from qflow.quant.calling import call_model, named_tensors
from qflow.quant.quantized_model import QuantizedModel


def find_badcases(
    model: nn.Module,
    prepared: QuantizedModel,
    batches: Iterable[tuple[Any, int]],
    *,
    metric: str = "L1",
    count: int = 16,
    on_step: Callable[[int], None] = lambda step: None,
) -> BadcaseTable:
    """Compare float and calibrated outputs over `batches` of (model inputs, size); keeps numbers, not tensors.

    The `count` chosen samples are those with the largest distance summed over outputs, each output divided by its
    mean distance. Raises DataError if there is no data or no floating output to compare.
    """
    found: dict[str, dict[str, list[Tensor]]] = {}
    samples, compared = 0, None
    with torch.no_grad(), prepared.quantized():
        for step, (inputs, size) in enumerate(batches, 1):
            reference = named_tensors(call_model(model, inputs))
            quantized = dict(named_tensors(call_model(prepared, inputs)))
            if compared is None:  # indices and per-batch values cannot be laid to one sample
                compared = {n for n, x in reference if x.is_floating_point() and x.ndim > 0 and len(x) == size}
            for name, x in reference:
                if name not in compared:
                    continue
                columns = found.setdefault(name, {m: [] for m in COMPARISONS})
                for m in COMPARISONS:
                    columns[m].append(distance(m, x, quantized[name]).cpu())
            samples += size
            on_step(step)
    if not found:
        raise DataError("Bad cases are found by comparing float outputs per sample, but got none. Check the outputs.")
    values = {name: {m: torch.cat(v) for m, v in columns.items()} for name, columns in found.items()}
    index = {n: {m: int(worst_first(m, v)[0]) for m, v in c.items()} for n, c in values.items()}
    value = {n: {m: float(v[index[n][m]]) for m, v in c.items()} for n, c in values.items()}
    merged = {m: _merged(m, [c[m] for c in values.values()]) for m in COMPARISONS}
    return BadcaseTable(
        samples=samples,
        index=index,
        value=value,
        worst={m: int(merged[m].argmax()) for m in COMPARISONS},
        metric=metric,
        chosen=tuple(int(i) for i in worst_first("L1", merged[metric])[:count]),
    )


def _merged(metric: str, columns: list[Tensor]) -> Tensor:
    """Badness of each sample over all outputs: larger is worse, outputs made comparable by their mean."""
    total = torch.zeros_like(columns[0])
    for column in columns:
        bad = {"Cosine": lambda v: 1.0 - v, "SQNR": lambda v: 10.0 ** (-v / 20.0)}.get(metric, lambda v: v)(column)
        total = total + bad / bad.mean().clamp_min(1e-30)
    return total


def badcase_text(table: BadcaseTable) -> str:
    """The guide's three tables."""
    shown = [m for m in COMPARISONS if m != "Atol"]
    index = [[n, *(str(row[m]) for m in shown)] for n, row in table.index.items()]
    value = [[n, *(f"{row[m]:.6g}" for m in shown)] for n, row in table.value.items()]
    worst = [[m, str(table.worst[m])] for m in shown]
    return "\n".join(
        [
            "The bad case input index of each output:",
            text_table(["Name/Index", *shown], index),
            "The metric results of each badcase:",
            text_table(["Name/Index", *shown], value),
            "The bad case input index of the worst output:",
            text_table(["metric", "dataloader index"], worst),
        ]
    )
