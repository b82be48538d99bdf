"""Quantization sensitivity: switches on one quantizer at a time and compares the outputs with float, on bad cases.

Exact rows are measured by replay or by full forward passes (exact.py). Estimated rows are second order (estimate.py).
With the method `point` all other quantizers are on instead (point.py).

Outputs are merged by the sum over outputs of distance / mean |float output| (MSE: its square), so that outputs of
different size count alike; for Cosine and SQNR by the sum of the badness, 1 - cosine and |noise| / |signal|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qflow.analysis.measures.distances import MERGE
from qflow.analysis.measures.tables import Finding, SensitivityRow, SensitivityTable
from qflow.analysis.sensitivity.candidates import Candidate, candidates, sample_flops
from qflow.analysis.sensitivity.captures import Captures
from qflow.analysis.sensitivity.chunks import sample_bytes
from qflow.analysis.sensitivity.estimate import estimable, estimate, in_one_unit, passes
from qflow.analysis.sensitivity.exact import Exact
from qflow.analysis.sensitivity.health import health
from qflow.analysis.sensitivity.point import gains
from qflow.core.errors import DataError
from qflow.core.settings import SensitivitySettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.replay.capture import reason_of
from qflow.quant.trace.calling import batch_size

DOUBT = 1.5  # factor by which an estimate may be wrong
ESTIMATE_HOLDS = 5.0  # memory of an estimate over that of the kept values: also values inside groups, and gradients
PROOF = 8  # samples of the first chunk, on which a replay is compared with full forward passes
PROVING = 1.0  # cost of this comparison in float forward passes, for any number of rows


def sensitivity(
    model: nn.Module,
    prepared: QuantizedModel,
    batches: Sequence[Any],
    *,
    settings: SensitivitySettings | None = None,
    rows: Sequence[Candidate] | None = None,
    on_row: Callable[[int], None] = lambda done: None,
) -> SensitivityTable:
    """Rank `rows` (None: every active quantizer of a calibrated model) on `batches` of bad cases (model inputs each).

    `settings.method` is exact, screened (all estimated, the top share measured), estimate, or point (point.py: all
    other quantizers are on, at their present dtypes; a gain below zero counts as 0, because what cancels another error
    here does not elsewhere). `on_row` is called with the number of rows that are done. Raises DataError without samples
    or quantizers.
    """
    settings = settings or SensitivitySettings()
    rows = candidates(prepared) if rows is None else rows
    if not batches or not rows:
        raise DataError("A ranking needs quantizers and bad cases, but got none. Calibrate, and give data.")
    if settings.method == "point":
        table = gains(prepared, batches, rows=rows, metric=settings.metric)
        table = replace(table, rows=tuple(replace(row, score=max(row.score, 0.0)) for row in table.rows))
        on_row(len(rows))
        return replace(table, findings=health(table))
    with torch.no_grad():
        measure = _Measure(model, prepared, rows, settings)
        return measure.table(batches, on_row)


class _Measure:
    """One ranking: its models and settings, its findings, and which ways of measuring work for this model."""

    def __init__(
        self, model: nn.Module, prepared: QuantizedModel, rows: Sequence[Candidate], settings: SensitivitySettings
    ) -> None:
        self.model, self.prepared, self.rows, self.settings = model, prepared, rows, settings
        self.findings: list[Finding] = []
        self.memory = settings.memory_mb * 1e6

    # ---- the table

    def table(self, batches: Sequence[Any], on_row: Callable[[int], None]) -> SensitivityTable:
        samples = sum(batch_size(inputs) for inputs in batches)
        method, reason = self.choose_method(samples, max(sample_bytes(self.prepared.graph, b) for b in batches))
        if reason:
            self.findings.append(Finding("sensitivity", "info", reason))
        # half for the values that are kept, half for those that differ between variants
        room = self.memory / (2.0 if method == "exact" else ESTIMATE_HOLDS)
        captures = self.captures = Captures(self.model, self.prepared, self.memory, method)
        self.exact = Exact(self.model, self.prepared, captures, self.memory, len(self.rows))
        chunks = captures.chunks(batches, room, 0 if method == "estimate" else PROOF)
        if captures.reason:
            text = f"{captures.reason}: the bad cases are not cut into smaller batches"
            self.findings.append(Finding("sensitivity", "check", text))
        guessed = self.estimated(chunks) if method != "exact" else []
        exact = self.in_doubt(guessed, method) if guessed else list(range(len(self.rows)))
        found = self.measured(chunks, exact, on_row) if exact else {}
        made = [found[i] if i in found else row.row(*guessed[i], {}, exact=False) for i, row in enumerate(self.rows)]
        if guessed and found:
            made, text = in_one_unit(made, guessed, found)
            self.findings += [Finding("sensitivity", "info", text)] if text else []
        order_of = {n: i for i, node in enumerate(self.prepared.graph.nodes) for n in (node.name, *node.inner)}
        made.sort(key=lambda r: (-r.score, order_of[r.op_name], r.sensitive_type))
        table = SensitivityTable(
            metric=self.settings.metric,
            merge=MERGE,
            samples=samples,
            exact=len(found) == len(self.rows),
            flops=sample_flops(self.prepared.graph),
            rows=tuple(made),
            method=self.description(method if guessed else "exact", samples),
        )
        return replace(table, findings=(*self.findings, *health(table, self.exact.infinite)))

    def in_doubt(self, guessed: list[tuple[float, float]], method: str) -> list[int]:
        """Rows to measure: those without an estimate and, when screening, those that may belong to the top fifth.

        A row may belong to it if its estimate is at least the lowest of the top fifth over DOUBT (nine of ten estimates
        are wrong by less than a factor of 1.3). At most `screened_share` of the estimated rows are measured.
        """
        blind = [i for i, (score, _) in enumerate(guessed) if math.isnan(score)]
        if blind:
            text = f"{len(blind)} rows have no estimate (rounding, comparisons or indices on the way): measured"
            self.findings.append(Finding("sensitivity", "info", text))
        rest = sorted(set(range(len(guessed))) - set(blind), key=lambda i: -guessed[i][0])
        if method == "estimate" or not rest:
            return blind
        cut_off = guessed[rest[math.ceil(0.2 * len(rest)) - 1]][0] / DOUBT
        doubtful = [i for i in rest if guessed[i][0] >= cut_off]
        return [*blind, *doubtful[: math.ceil(len(rest) * self.settings.screened_share)]]

    def estimated(self, chunks: Sequence[Any]) -> list[tuple[float, float]]:
        """Estimated (score, standard error) of every row; empty if that fails or an uncut batch is too large."""
        held = ESTIMATE_HOLDS * max(batch_size(c) * sample_bytes(self.prepared.graph, c) for c in chunks)
        if self.captures.reason and held > self.memory:
            text = f"no estimate: an uncut batch holds {held / 1e6:.0f} MB, above memory_mb. Every row was measured."
            self.findings.append(Finding("sensitivity", "check", text))
            return []
        try:
            variants = [row.variant for row in self.rows]
            return estimate(self.model, self.prepared, variants, chunks, self.settings, self.captures.whole)
        except Exception as error:  # an operator may raise when gradients are computed, or on fewer samples
            text = f"no estimate: {reason_of(error)}. Every row was measured."
            self.findings.append(Finding("sensitivity", "check", text))
            return []

    def choose_method(self, samples: int, sample: float) -> tuple[str, str]:
        """The method to use, and why it is not the one in the settings ("" if it is); a sample has `sample` bytes."""
        wanted, metric = self.settings.method, self.settings.metric
        if wanted == "exact":
            return wanted, ""
        if not estimable(metric):
            return "exact", f"{metric} has no second-order estimate: every row was measured"
        if ESTIMATE_HOLDS * sample > self.memory:
            need = ESTIMATE_HOLDS * sample / 1e6
            return "exact", f"an estimate of one sample holds {need:.0f} MB, above memory_mb: every row was measured"
        exact, guess = 0.45 * len(self.rows), passes(samples, self.settings.draws)
        if wanted == "screened":
            guess += self.settings.screened_share * exact + PROVING
        if guess >= exact:
            return "exact", f"{wanted} costs {guess:.0f} forwards, all rows exactly {exact:.0f}: all were measured"
        return wanted, ""

    def description(self, method: str, samples: int) -> str:
        """How the rows were obtained, in words."""
        how = "replay from the quantizer on" if self.exact.replays else "full forwards"
        draws = (
            f"second-order estimate from {max(1, math.ceil(self.settings.draws / samples))} draws of {samples} samples"
        )
        share = f"{100 * self.settings.screened_share:g} %"
        return {
            "exact": f"one quantizer on at a time, {how}",
            "screened": f"{draws}; those in doubt, at most {share}, one at a time, {how}",
            "estimate": draws,
        }[method]

    def measured(
        self, chunks: Sequence[Any], chosen: Sequence[int], on_row: Callable[[int], None]
    ) -> dict[int, SensitivityRow]:
        """Position -> measured row."""
        rows = [self.rows[i] for i in chosen]
        found = self.exact.measured(
            chunks, rows, self.settings.metric, lambda share: on_row(int(share * len(self.rows) + 1e-9))
        )
        self.findings += self.exact.findings
        return dict(zip(chosen, found, strict=True))
