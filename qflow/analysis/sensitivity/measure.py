"""Quantization sensitivity: switches on one quantizer at a time and compares the outputs with float, on bad cases.

Exact rows are measured by replay (quant/replay/replay.py): only the operators that depend on the quantizer are computed
again. On the first samples the replay of a few quantizers is compared with full forward passes of the prepared model;
if it differs, or replay is impossible, full forward passes measure every row, and a finding gives the reason. With few
samples in a batch, several quantizers are replayed at once. Estimated rows are second order (estimate.py).

Outputs are merged by the sum over outputs of distance / mean |float output| (MSE: its square), so that outputs of
different size count alike; for Cosine and SQNR by the sum of the badness, 1 - cosine and |noise| / |signal|.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qflow.analysis.measures.distances import Distances, disagreement
from qflow.analysis.measures.tables import Finding, SensitivityRow, SensitivityTable
from qflow.analysis.sensitivity.candidates import Candidate, candidates
from qflow.analysis.sensitivity.captures import Captures
from qflow.analysis.sensitivity.chunks import sample_bytes
from qflow.analysis.sensitivity.estimate import estimable, estimate, in_one_unit, passes
from qflow.analysis.sensitivity.health import health
from qflow.core.errors import DataError
from qflow.core.settings import SensitivitySettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.replay.capture import Captured, ReplayError
from qflow.quant.replay.captured_ops import Variant
from qflow.quant.replay.replay import Replay, full_forward
from qflow.quant.replay.widen import Widths, widen
from qflow.quant.trace.calling import batch_size, call_model, named_tensors
from qflow.quant.trace.order import may_change_order

MERGE = "sum over outputs of distance / mean |float output|"
WIDE_BYTES = 1e6  # average bytes of a result of all variants together; beyond it a CPU gains nothing (docs/log.md)
FEW_SAMPLES = 8  # several variants are run at once for batches of up to so many samples
DOUBT = 1.5  # factor by which an estimate may be wrong
ESTIMATE_HOLDS = 5.0  # memory of an estimate over that of the kept values: also values inside groups, and gradients
PROOF = 8  # samples of the first chunk, on which a replay is compared with full forward passes
PROVING = 1.0  # cost of this comparison in float forward passes, for any number of rows
CHECKED = 2  # quantizers for which a replay is compared with full forward passes
AGREES = 1e-3  # difference that counts as equal, over the change by quantization: larger batches run other kernels
ROUNDING = 1e-4  # relative change of the float outputs that folded batch norms and other kernels may cause


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

    `settings.method` is exact, screened (all estimated, the top share measured) or estimate. `on_row` is called with
    the number of rows that are done. Raises DataError without samples or quantizers.
    """
    settings = settings or SensitivitySettings()
    rows = candidates(prepared) if rows is None else rows
    if not batches or not rows:
        raise DataError("A ranking needs quantizers and bad cases, but got none. Calibrate, and give data.")
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
        self.replays = self.reorders = True
        self.infinite = False
        """True if an output is infinite in the float model."""
        self.widths: Widths | None = None
        self.one_at_a_time = ""
        """Why several quantizers cannot be replayed at once; "" if they can."""

    # ---- the table

    def table(self, batches: Sequence[Any], on_row: Callable[[int], None]) -> SensitivityTable:
        samples = sum(batch_size(inputs) for inputs in batches)
        method, reason = self.choose_method(samples, max(sample_bytes(self.prepared.graph, b) for b in batches))
        if reason:
            self.findings.append(Finding("sensitivity", "info", reason))
        # half for the values that are kept, half for those that differ between variants
        room = self.memory / (2.0 if method == "exact" else ESTIMATE_HOLDS)
        captures = self.captures = Captures(self.model, self.prepared, self.memory, method)
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
        order_of = {node.name: i for i, node in enumerate(self.prepared.graph.nodes)}
        made.sort(key=lambda r: (-r.score, order_of[r.op_name], r.sensitive_type))
        table = SensitivityTable(
            metric=self.settings.metric,
            merge=MERGE,
            samples=samples,
            exact=len(found) == len(self.rows),
            flops=sum(2 * n.macs // max(n.shape[0] if n.shape else 1, 1) for n in self.prepared.graph.weighted),
            rows=tuple(made),
            method=self.description(method if guessed else "exact", samples),
        )
        return replace(table, findings=(*self.findings, *health(table, self.infinite)))

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
            reason = error.reason if isinstance(error, ReplayError) else f"{type(error).__name__}: {error}"
            text = f"no estimate: {' '.join(reason.split())}. Every row was measured."
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
        how = "replay from the quantizer on" if self.replays else "full forwards"
        draws = (
            f"second-order estimate from {max(1, math.ceil(self.settings.draws / samples))} draws of {samples} samples"
        )
        share = f"{100 * self.settings.screened_share:g} %"
        return {
            "exact": f"one quantizer on at a time, {how}",
            "screened": f"{draws}; those in doubt, at most {share}, one at a time, {how}",
            "estimate": draws,
        }[method]

    # ---- exact rows

    def measured(
        self, chunks: Sequence[Any], chosen: Sequence[int], on_row: Callable[[int], None]
    ) -> dict[int, SensitivityRow]:
        """Position -> measured row; by replay if that agrees with full forward passes on the first chunk."""
        rows = [self.rows[i] for i in chosen]
        while True:
            distances = Distances(self.settings.metric, len(rows))
            try:
                for n, inputs in enumerate(chunks):
                    plain, outputs = self.outputs(n, inputs, [row.variant for row in rows])
                    distances.reference(plain, batch_size(inputs))
                    for done, (position, got) in enumerate(outputs, 1):
                        distances.add(position, got)
                        on_row((n * len(rows) + done) * len(self.rows) // (len(chunks) * len(rows)))
                break
            except ReplayError as error:
                self._fall_back(error.reason)
        self.findings += distances.findings
        self.infinite = bool(distances.infinite)
        return {
            i: row.row(*distances.result(position)) for position, (i, row) in enumerate(zip(chosen, rows, strict=True))
        }

    def _fall_back(self, reason: str) -> None:
        """Take the next slower way: several variants at once, then one at a time, then full forward passes."""
        if self.widths is not None:
            self.widths = None
            self.one_at_a_time = text = f"one quantizer at a time, though samples are few: {reason}"
        else:
            self.replays = False
            text = f"replay was given up: {reason}. Full forward passes were run."
        self.findings.append(Finding("sensitivity", "info", text))

    def outputs(self, n: int, inputs: Any, variants: Sequence[Variant]) -> tuple[dict[str, Tensor], Any]:
        """Float outputs of the n-th chunk, and each variant's position with its outputs. Raises ReplayError."""
        if not self.replays:
            return dict(named_tensors(call_model(self.model, inputs))), self._full(inputs, variants)
        captured = self.captures.captured(n, inputs)
        if n == 0:
            self.reorders = may_change_order(captured.tape.names)
        replay = Replay(self.model, self.prepared, captured)
        replay.widths = self.widened(inputs, captured, replay)
        plain, outputs = replay.references(), self._replayed(replay, inputs, variants)
        return plain, self._checked(replay, inputs, variants, outputs) if n == 0 else outputs

    def _replayed(
        self, replay: Replay, inputs: Any, variants: Sequence[Variant]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Outputs of each variant by replay, or by full forwards if this batch does not reach it (a branch on data)."""
        there = [i for i, variant in enumerate(variants) if replay.ops.reaches(variant)]
        absent = sorted(set(range(len(variants))) - set(there))
        for i, got in replay.run([variants[i] for i in there]):
            yield there[i], got
        for i, got in self._full(inputs, [variants[i] for i in absent]):
            yield absent[i], got

    def _checked(
        self, replay: Replay, inputs: Any, variants: Sequence[Variant], outputs: Iterator[tuple[int, dict[str, Tensor]]]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """`outputs`. Raises ReplayError if the float outputs, or a few of these, differ from full forward passes."""
        plain = replay.references()
        rounding = disagreement(replay.replayed(), plain, plain, 1.0)
        if rounding > ROUNDING:
            raise ReplayError(f"its float outputs differ from the model's by {rounding:.2g}")
        worst, nothing = 0.0, max(1e-3, 4.0 * rounding / AGREES)
        chosen = self.to_check(replay, variants)
        full = {i: got for i, (_, got) in zip(chosen, self._full(inputs, [variants[i] for i in chosen]), strict=True)}
        for i, got in outputs:
            worst = max(worst, disagreement(got, full[i], plain, nothing) if i in full else 0.0)
            if worst > AGREES:
                raise ReplayError(f"its outputs differ from full forwards by {worst:.2g} of what quantization does")
            yield i, got

    def to_check(self, replay: Replay, variants: Sequence[Variant]) -> list[int]:
        """Positions of a few random variants, one of them not the first of its pass, which is never misplaced."""
        draw, there = random.Random(0), [i for i, variant in enumerate(variants) if replay.ops.reaches(variant)]
        behind = [there[i] for together in replay.passes([variants[i] for i in there]) for i in together[1:]]
        chosen = [draw.choice(behind)] if behind else []
        rest = [i for i in range(len(variants)) if i not in chosen]
        return [*chosen, *draw.sample(rest, min(CHECKED - len(chosen), len(rest)))]

    def widened(self, inputs: Any, captured: Captured, replay: Replay) -> Widths | None:
        """How several variants run at once; None if there are more than a few samples or it does not work."""
        size = batch_size(inputs)
        if size > FEW_SAMPLES or not captured.complete or self.one_at_a_time:
            return None
        held = [t.numel() * t.element_size() for ts in captured.values.values() for t in ts]
        fitting = self.memory / 2 / max(sum(held), 1.0) * 8  # at most an eighth of all values is in use at a time
        most = int(min(WIDE_BYTES * len(held) / max(sum(held), 1.0), fitting, len(self.rows)))
        tight = 4.0 * sum(held) > self.memory / 2  # `widen` captures the batch, another, and both together
        if most < 2 or tight:
            return None
        if self.widths is None:
            try:
                self.widths = widen(self.model, self.prepared, replay.ops, inputs, captured, size, most)
                return self.widths
            except ReplayError as error:
                self.one_at_a_time = f"one quantizer at a time, though samples are few: {error.reason}"
                self.findings.append(Finding("sensitivity", "info", self.one_at_a_time))
                return None
        return self.widths.at(captured, size, most)

    def _full(self, inputs: Any, variants: Sequence[Variant]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Outputs of each variant by a full forward pass in which topk and the like use the float order."""
        with self.prepared.recording_order() as order:
            if self.reorders:
                call_model(self.prepared, inputs)
        for i, variant in enumerate(variants):
            with self.prepared.following(order):
                yield i, full_forward(self.prepared, inputs, variant)
