"""Exact rows of a sensitivity table: the outputs with one quantizer on, by replay or by full forward passes.

A replay (quant/replay/replay.py) computes again only the operators that depend on the quantizer. On the first samples
the replay of a few quantizers is compared with full forward passes of the prepared model; if it differs, or replay is
impossible, full forward passes measure every row, and a finding gives the reason. With few samples in a batch, several
quantizers are replayed at once. Full forward passes run all bad cases in one batch, if that gives the same outputs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from qflow.analysis.measures.distances import Distances, disagreement
from qflow.analysis.measures.tables import Finding, SensitivityRow
from qflow.analysis.sensitivity.candidates import Candidate
from qflow.analysis.sensitivity.captures import Captures
from qflow.analysis.sensitivity.parts import GaveUp
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.replay.capture import Captured, ReplayError, reason_of
from qflow.quant.replay.captured_ops import Variant
from qflow.quant.replay.replay import Replay, full_forward
from qflow.quant.replay.widen import Widths, most_behind, widen
from qflow.quant.trace.calling import batch_size, call_model, named_tensors
from qflow.quant.trace.order import may_change_order

WIDE_BYTES = 1e6  # average bytes of a result of all variants together; beyond it a CPU gains nothing (docs/log.md)
MOST_AT_ONCE = 16  # variants; each op is tested for as many
FEW_SAMPLES = 8  # several variants are run at once for batches of up to so many samples
CHECKED = 2  # quantizers for which a replay is compared with full forward passes
AGREES = 1e-3  # difference that counts as equal, over the change by quantization: larger batches run other kernels
ROUNDING = 1e-4  # relative change of the float outputs that folded batch norms and other kernels may cause

WHOLE = slice(None)


class Exact:
    """Measures rows on the chunks of `captures`, and holds which ways of doing so work for this model."""

    def __init__(
        self, model: nn.Module, prepared: QuantizedModel, captures: Captures, memory: float, most: int
    ) -> None:
        self.model, self.prepared, self.captures = model, prepared, captures
        self.memory, self.most = memory, most
        """Bytes that may be held, and the most quantizers that are replayed at once."""
        self.findings: list[Finding] = []
        self.infinite = False
        """True if an output is infinite in the float model."""
        self.replays, self.reorders = True, may_change_order(prepared.plan.known)
        self.widths: Widths | None = None
        self.one_at_a_time = ""
        """Why several quantizers cannot be replayed at once; "" if they can."""
        self.rounding: float | None = None
        """Relative difference between the float outputs of the first chunk and their replay, once it is known."""

    def measured(
        self,
        chunks: Sequence[Any],
        rows: Sequence[Candidate],
        metric: str,
        on_share: Callable[[float], None],
        elsewhere: Callable[[], Sequence[Mapping[str, Any]] | None],
    ) -> list[SensitivityRow]:
        """The rows in their order; by replay if that agrees with full forward passes on the first chunk.

        `elsewhere` returns what other processes give for parts of the rows in the present way, or None.
        """
        while True:
            try:
                shared = elsewhere()
                distances = None if shared is None else self.gathered(shared, rows, metric)
                if distances is None:
                    distances = self.distances(chunks, rows, metric, on_share)
                break
            except Exception as error:  # an operator may raise anything when it is run alone, or on stacked batches
                if not self.replays:
                    raise
                self._fall_back(error)
                chunks = chunks if self.replays else self.captures.for_forwards()
        self.findings += distances.findings
        self.infinite = bool(distances.infinite)
        return [row.row(*distances.result(position)) for position, row in enumerate(rows)]

    def distances(
        self,
        chunks: Sequence[Any],
        rows: Sequence[Candidate],
        metric: str,
        on_share: Callable[[float], None] = lambda share: None,
        part: slice = WHOLE,
    ) -> Distances:
        """The distances of the rows on all chunks, or of those rows that belong to a `part` of the passes."""
        distances = Distances(metric, len(rows))
        for n, inputs in enumerate(chunks):
            plain, outputs = self.outputs(n, inputs, [row.variant for row in rows], part)
            distances.reference(plain, batch_size(inputs))
            for done, (position, got) in enumerate(outputs, 1):
                distances.add(position, got)
                on_share((n * len(rows) + done) / (len(chunks) * len(rows)))
        return distances

    def gathered(self, parts: Sequence[Mapping[str, Any]], rows: Sequence[Candidate], metric: str) -> Distances | None:
        """The distances that other processes have measured; None if some are missing. Raises GaveUp."""
        distances = Distances(metric, len(rows))
        for part in parts:
            if "gave_up" in part:
                raise GaveUp(part["gave_up"], part["wide"])
            distances.take(part["distances"])
            if part["one_at_a_time"] and not self.one_at_a_time:
                self.run_alone(part["one_at_a_time"])
        return distances if distances.complete else None

    def _fall_back(self, error: Exception) -> None:
        """Take the next slower way: several variants at once, then one at a time, then full forward passes."""
        reason, wide = (
            (error.reason, error.wide) if isinstance(error, GaveUp) else (reason_of(error), self.widths is not None)
        )
        if wide:
            self.run_alone(f"one quantizer at a time, though samples are few: {reason}")
        else:
            self.replays = False
            text = f"replay was given up: {reason}. Full forward passes were run."
            self.findings.append(Finding("sensitivity", "info", text))

    def run_alone(self, why: str) -> None:
        """Replay one quantizer at a time from now on."""
        self.widths, self.one_at_a_time = None, why
        self.findings.append(Finding("sensitivity", "info", why))

    def outputs(
        self, n: int, inputs: Any, variants: Sequence[Variant], part: slice
    ) -> tuple[dict[str, Tensor], Iterator[tuple[int, dict[str, Tensor]]]]:
        """Float outputs of the n-th chunk, and position and outputs of each variant of a part. Raises ReplayError."""
        if not self.replays:
            plain = dict(named_tensors(call_model(self.model, inputs)))
            return plain, self._full(inputs, variants, range(len(variants))[part])
        captured = self.captures.captured(n, inputs)
        if n == 0:
            self.reorders = may_change_order(captured.tape.names)
        replay = Replay(self.model, self.prepared, captured)
        replay.widths = self.widened(inputs, captured, replay)
        plain, outputs = replay.references(), self._replayed(replay, inputs, variants, part)
        return plain, self._checked(replay, inputs, variants, outputs) if n == 0 else outputs

    def _replayed(
        self, replay: Replay, inputs: Any, variants: Sequence[Variant], part: slice
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Outputs of each variant by replay, or by full forwards if this batch does not reach it (a branch on data)."""
        there = [i for i, variant in enumerate(variants) if replay.ops.reaches(variant)]
        absent = sorted(set(range(len(variants))) - set(there))
        for i, got in replay.run([variants[i] for i in there], part):
            yield there[i], got
        yield from self._full(inputs, variants, absent[part])

    def _checked(
        self, replay: Replay, inputs: Any, variants: Sequence[Variant], outputs: Iterator[tuple[int, dict[str, Tensor]]]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """`outputs`. Raises ReplayError if the float outputs, or a few of these, differ from full forward passes."""
        plain = replay.references()
        if self.rounding is None:
            self.rounding = disagreement(replay.replayed(), plain, plain, 1.0)
        if self.rounding > ROUNDING:
            raise ReplayError(f"its float outputs differ from the model's by {self.rounding:.2g}")
        nothing = max(1e-3, 4.0 * self.rounding / AGREES)
        chosen = set(self.to_check(replay, variants))
        for i, got in outputs:
            if i in chosen:
                ((_, full),) = self._full(inputs, variants, [i], written_out=True)
                gap = disagreement(got, full, plain, nothing)
                if gap > AGREES:
                    raise ReplayError(f"its outputs differ from full forwards by {gap:.2g} of what quantization does")
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
        most = int(min(fitting, self.most, MOST_AT_ONCE))
        tight = 4.0 * sum(held) > self.memory / 2  # `widen` captures the batch, another, and both together
        behind = most_behind(captured, most, WIDE_BYTES)
        if max(behind) < 2 or tight:
            return None
        if self.widths is None:
            try:
                made = widen(self.model, self.prepared, replay.ops, inputs, captured, size, most, WIDE_BYTES)
                self.widths = made
                return self.widths
            except ReplayError as error:
                self.run_alone(f"one quantizer at a time, though samples are few: {error.reason}")
                return None
        return self.widths.at(captured, size, behind)

    def _full(
        self, inputs: Any, variants: Sequence[Variant], chosen: Sequence[int], written_out: bool = False
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Outputs of the chosen variants by full forward passes in which topk and the like use the float order."""
        order = None
        if self.reorders and chosen:
            with self.prepared.recording_order() as order:
                call_model(self.prepared, inputs)
        for i in chosen:
            with nullcontext() if order is None else self.prepared.following(order):
                yield i, full_forward(self.prepared, inputs, variants[i], written_out)
