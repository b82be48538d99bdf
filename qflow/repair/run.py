"""`repair` tries steps on a copy of a prepared model, keeps what helps on held-out samples, and reports all of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError, DataError
from qflow.core.qconfig import QConfig
from qflow.core.settings import CalibrationSettings
from qflow.quant.model.calibrate import apply_scales
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import cut
from qflow.repair.base.contract import KEPT, REFUSED, UNDONE, Context, Part, Point, RepairTable, Row, Step
from qflow.repair.base.measure import BEYOND, SAME_FUNCTION, HeldOut, Verdict, judged

HELD_OUT = 4  # one sample in so many decides
TEXT = 200  # characters of an error that a reason shows
ATTEMPTS = 7  # of one step: the whole, its halves, their halves

Model = TypeVar("Model", bound=QuantizedModel)
Batches = Sequence[tuple[Any, int]]


def repair(
    prepared: Model,
    batches: Batches,
    qconfig: QConfig,
    settings: CalibrationSettings,
    steps: Sequence[Step],
    also: Sequence[QConfig] = (),
) -> tuple[Model, Context, RepairTable]:
    """Return a repaired copy of `prepared`, calibrated on all of `batches`, the context and the table.

    `batches` are model inputs with their number of samples. One sample in four is held out: the steps do not see it,
    and it decides. `also` are further qconfigs of the model, as all int16: a step that changes the float function is
    taken back if under one of them it loses more than it gains under `qconfig`. `prepared` is not changed. Raises
    DataError for fewer than four samples, ConfigError for a model with temporal state.
    """
    if prepared.cached is not None:
        raise ConfigError(
            "A repair reads samples in any order, but got a model with temporal state (cached_attrs). Calibrate it "
            "without a repair."
        )
    fit, held = held_out(batches)
    model = copy.deepcopy(prepared)
    context = Context(fit, qconfig, settings)
    context.calibrate(model)
    trial = _Trial(model, context, HeldOut(model, held), also)
    for step in steps:
        trial.step(step)
    last = replace(context, batches=batches)
    last.calibrate(model)
    table = RepairTable(
        tuple(trial.rows),
        _known(trial.first.mean()),
        _known(trial.errors.mean()),
        trial.held.samples,
        context.samples,
        last.forwards,
    )
    return model, last, table


def held_out(batches: Batches) -> tuple[Batches, Batches]:
    """Split into batches for the steps and batches that decide: every fourth sample, counted over all batches."""
    fit: list[tuple[Any, int]] = []
    held: list[tuple[Any, int]] = []
    total = sum(size for _, size in batches)
    if total < HELD_OUT:
        raise DataError(f"A repair needs {HELD_OUT} calibration samples or more, but got {total}. Give more data.")
    first = 0
    for inputs, size in batches:
        # The last samples of a batch, so that both parts are slices; which batches give one more goes round.
        count = (first + size) // HELD_OUT - first // HELD_OUT
        for part, begin, end in ((fit, 0, size - count), (held, size - count, size)):
            if end > begin:
                part.append((cut(inputs, size, begin, end) if end - begin < size else inputs, end - begin))
        first += size
    return fit, held


def _known(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


class _Trial:
    """The model between steps: its errors on the held-out samples, and the rows so far."""

    def __init__(self, model: QuantizedModel, context: Context, held: HeldOut, also: Sequence[QConfig]) -> None:
        self.model, self.context, self.held, self.also = model, context, held, also
        self.rows: list[Row] = []
        self.context.forwards += held.samples
        self.errors = self.first = self._measured()
        self.elsewhere: list[Tensor] | None = None

    def _measured(self) -> Tensor:
        self.context.forwards += self.held.samples
        return self.held.errors(self.model)

    def _measured_elsewhere(self) -> list[Tensor]:
        """The errors under each qconfig of `also`; the model is left as it was."""
        stats, found = self.context.stats, []
        assert stats is not None
        for qconfig in self.also:
            apply_scales(self.model, stats, qconfig, self.context.settings)
            found.append(self._measured())
        if self.also:
            apply_scales(self.model, stats, self.context.qconfig, self.context.settings)
        return found

    def step(self, step: Step) -> None:
        """Try a step. One that fails is taken back whole and refused: a study can go on without it."""
        before, errors, rows = Point.of(self.model, self.context), self.errors, len(self.rows)
        try:
            self._step(step)
        except Exception as error:  # a user's model may fail in a backward pass, or where its parts run alone
            before.restore(self.model, self.context)
            self.context.calibrate(self.model)
            self.errors, self.elsewhere = errors, None
            text = " ".join(str(error).split())[:TEXT]
            self.rows[rows:] = [Row(step.name, (), REFUSED, f"it failed: {type(error).__name__}: {text}")]

    def _step(self, step: Step) -> None:
        """Try all parts of a step at once, then halves of what was not kept.

        A change within the noise that may fit the held-out samples, because the float function changes, ends there.
        """
        lack = step.needs(self.model, self.context)
        if lack:
            self.rows.append(Row(step.name, (), REFUSED, lack))
            return
        parts, refused = step.parts(self.model, self.context)
        waiting, attempts = [list(parts)] if parts else [], 0
        while waiting and attempts < ATTEMPTS:
            tried = waiting.pop(0)
            attempts += 1
            if (
                not self._attempt(step, tried)
                and len(tried) > 1
                and (step.preserving or not _within_noise(self.rows[-1]))
            ):
                middle = len(tried) // 2
                waiting += [tried[:middle], tried[middle:]]
        if waiting:
            left = tuple(part.name for some in waiting for part in some)
            self.rows.append(Row(step.name, left, REFUSED, f"not tried alone after {ATTEMPTS} attempts"))
        reasons: dict[str, list[str]] = {}
        for name, reason in refused.items():
            reasons.setdefault(reason, []).append(name)
        self.rows += [Row(step.name, tuple(names), REFUSED, reason) for reason, names in reasons.items()]

    def _attempt(self, step: Step, parts: Sequence[Part]) -> bool:
        """Apply `parts`, measure, and take it back unless it helps. True if it was kept or changed nothing."""
        names, spent = tuple(part.name for part in parts), self.context.forwards
        before = Point.of(self.model, self.context)
        if self.elsewhere is None and not step.preserving:
            self.elsewhere = self._measured_elsewhere()
        changed = step.apply(self.model, self.context, parts)
        if not changed:
            self.rows.append(Row(step.name, names, REFUSED, "nothing to gain", forwards=self.context.forwards - spent))
            return True
        self.context.calibrate(self.model)
        after = self._measured()
        verdict = self._verdict(step, after)
        row = Row(
            step.name, tuple(changed), KEPT if verdict.keep else UNDONE, verdict.reason, _known(self.errors.mean()),
            _known(after.mean()), _known(verdict.change), _known(verdict.noise), changed,
        )  # fmt: skip
        if verdict.keep:
            self.errors = after
        else:
            step.undo(self.model, self.context, before)
            self.context.calibrate(self.model)
        self.rows.append(replace(row, forwards=self.context.forwards - spent))
        return verdict.keep

    def _verdict(self, step: Step, after: Tensor) -> Verdict:
        verdict = judged(self.errors, after, step.preserving)
        if not verdict.keep:
            return verdict
        if step.preserving:
            self.context.forwards += self.held.samples
            moved = self.held.moved(self.model)
            if moved > SAME_FUNCTION:
                return replace(verdict, keep=False, reason=f"the float function moved by {moved:.1e}")
            self.elsewhere = None  # the errors there are others now
            return verdict
        now = self._measured_elsewhere()
        for qconfig, old, new in zip(self.also, self.elsewhere or (), now, strict=True):
            other = judged(old, new, preserving=False)
            if not other.change <= max(-verdict.change, BEYOND * other.noise):
                where = _most_frequent(qconfig)
                reason = f"with {where} it loses {other.change:.2g}, more than the {-verdict.change:.2g} that it gains"
                return replace(verdict, keep=False, reason=reason)
        self.elsewhere = now
        return verdict


def _within_noise(row: Row) -> bool:
    """Whether an attempt made no difference that can be told from noise: in either direction."""
    return row.change is not None and row.noise is not None and abs(row.change) <= BEYOND * row.noise


def _most_frequent(qconfig: QConfig) -> str:
    return f"all {max(QDtype, key=lambda dtype: len(qconfig.names(dtype)))}"
