"""Quantization sensitivity: switches on one quantizer at a time and compares the outputs with float, on bad cases.

Exact rows are measured by replay or by full forward passes (exact.py). Estimated rows are second order (estimate.py).
With the method `point` all other quantizers are on instead (point.py).

Outputs are merged by the sum over outputs of distance / mean |float output| (MSE: its square), so that outputs of
different size count alike; for Cosine and SQNR by the sum of the badness, 1 - cosine and |noise| / |signal|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
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
from qflow.analysis.sensitivity.parts import Elsewhere, Part
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
    elsewhere: Elsewhere | None = None,
) -> SensitivityTable:
    """Rank `rows` (None: every active quantizer of a calibrated model) on `batches` of bad cases (model inputs each).

    `settings.method` is exact, screened (all estimated, the top share measured), estimate, or point (point.py: all
    other quantizers are on, at their present dtypes; a gain below zero counts as 0, because what cancels another error
    here does not elsewhere). `on_row` is called with the number of rows that are done. `elsewhere` may have other
    processes measure the exact rows. Raises DataError without samples or quantizers.
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
        return Measure(model, prepared, batches, rows, settings).table(on_row, elsewhere)


class Measure:
    """One ranking: its models and settings, its findings, and which ways of measuring work for this model.

    Use it inside `torch.no_grad()`.
    """

    def __init__(
        self,
        model: nn.Module,
        prepared: QuantizedModel,
        batches: Sequence[Any],
        rows: Sequence[Candidate],
        settings: SensitivitySettings,
    ) -> None:
        self.model, self.prepared, self.batches, self.rows = model, prepared, batches, rows
        self.settings = settings
        self.findings: list[Finding] = []
        self.memory = settings.memory_mb * 1e6
        self.method = ""
        """The method that the bad cases were cut for; "" before."""

    def cut(self, method: str) -> None:
        """Cut the bad cases into chunks that `method` can hold."""
        # half for the values that are kept, half for those that differ between variants
        room = self.memory / (2.0 if method == "exact" else ESTIMATE_HOLDS)
        self.method, self.captures = method, Captures(self.model, self.prepared, self.memory, method)
        self.exact = Exact(self.model, self.prepared, self.captures, self.memory, len(self.rows))
        self.chunks = self.captures.chunks(self.batches, room, 0 if method == "estimate" else PROOF)

    # ---- the table

    def table(self, on_row: Callable[[int], None], elsewhere: Elsewhere | None) -> SensitivityTable:
        samples = sum(batch_size(inputs) for inputs in self.batches)
        method, reason = self.choose_method(samples, max(sample_bytes(self.prepared.graph, b) for b in self.batches))
        if reason:
            self.findings.append(Finding("sensitivity", "info", reason))
        self.cut(method)
        if self.captures.reason:
            text = f"{self.captures.reason}: the bad cases are not cut into smaller batches"
            self.findings.append(Finding("sensitivity", "check", text))
        guessed = self.estimated(self.chunks) if method != "exact" else []
        exact = self.in_doubt(guessed, method) if guessed else list(range(len(self.rows)))
        found = self.measured(exact, on_row, elsewhere) if exact else {}
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
        self, chosen: Sequence[int], on_row: Callable[[int], None], elsewhere: Elsewhere | None
    ) -> dict[int, SensitivityRow]:
        """Position -> measured row."""
        exact, rows = self.exact, [self.rows[i] for i in chosen]

        def on_share(share: float) -> None:
            on_row(int(share * len(self.rows) + 1e-9))

        def shared() -> Sequence[Mapping[str, Any]] | None:
            return elsewhere and elsewhere(Part(self.method, chosen, exact.replays, exact.one_at_a_time), on_share)

        found = exact.measured(self.chunks, rows, self.settings.metric, on_share, shared)
        self.findings += exact.findings
        return dict(zip(chosen, found, strict=True))

    # ---- a part of the table of another process

    def part(self, part: Part) -> dict[str, Any]:
        """Measure a part of the rows in its way, as plain data that `Exact.gathered` takes in."""
        if self.method != part.method:
            self.cut(part.method)
        exact, chunks = self.exact, self.chunks if part.replays else self.whole
        exact.replays, exact.one_at_a_time = part.replays, part.one_at_a_time
        if part.one_at_a_time:
            exact.widths = None
        rows = [self.rows[i] for i in part.chosen]
        try:
            found = exact.distances(chunks, rows, self.settings.metric, part=part.passes)
        except Exception as error:  # as in `Exact.measured`
            if not part.replays:
                raise
            return {"gave_up": reason_of(error), "wide": exact.widths is not None}
        return {"distances": found.plain(), "one_at_a_time": exact.one_at_a_time}

    @cached_property
    def whole(self) -> list[Any]:
        """The chunks for full forward passes."""
        return self.captures.for_forwards()
