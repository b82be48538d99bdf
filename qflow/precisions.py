"""From settings to a qconfig: which operators may have which precision on the device, and which of them get it.

What an int16 ratio, an fp16 count, an assignment or an error share mean is decided here, from the sensitivity table
and the cost model. Nothing here runs the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from qflow.analysis.tables import SensitivityTable
from qflow.core.device import DeviceRules, apply_rules
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph
from qflow.core.qconfig import QConfig
from qflow.core.sensitive import table_rows
from qflow.core.setter import HighPrecisionOutput, TemplateSetter, ratio_candidates, resolve
from qflow.core.settings import QConfigSettings
from qflow.core.template import trial_setters
from qflow.cost.latency import Pricer
from qflow.search.assign import Operator, Problem

FREE_MS = 1e-5  # a promotion that costs less is free: by sensitivity alone among its like
INT16_STEP = 2.0**-8  # int16 steps are finer than int8's by this: the error of rows that were measured at int8 only


@dataclass(frozen=True)
class Precisions:
    """A graph on a device, with the sensitivities that rank its operators (None before the ranking)."""

    graph: ModelGraph
    rules: DeviceRules
    sensitivities: SensitivityTable | None
    pricer: Callable[[], Pricer]
    """The cost model; called only where a price is needed."""

    @cached_property
    def scores(self) -> dict[str, float]:
        """Activation sensitivities by operator, at the lowest dtype measured; empty before the ranking."""
        return self.sensitivities.activation_scores() if self.sensitivities else {}

    def template(self, dtype: QDtype) -> tuple[QConfig, QConfig]:
        """(requested, applied) with every operator at `dtype`."""
        requested = resolve(self.graph, [HighPrecisionOutput(), TemplateSetter(dtype)], self.rules.march)
        return requested, apply_rules(self.graph, requested, self.rules, self.scores)

    @cached_property
    def promotable(self) -> tuple[str, ...]:
        """Operators that keep int16 on the device, in graph order: what a ratio counts and an assignment lists."""
        return ratio_candidates(self.graph, self.template(QDtype.qint16)[1])

    @cached_property
    def float16_order(self) -> tuple[str, ...]:
        """Operators that keep fp16 on the device, those first whose error falls most from int16 to fp16.

        Raises ConfigError without sensitivities at qint16.
        """
        if self.sensitivities is None or "qint16" not in self.sensitivities.dtypes:
            raise ConfigError(
                "An fp16 count needs sensitivities at int16, but got none. "
                "Set sensitivity.dtypes=[qint8,qint16,float16]."
            )
        at16, at_float = (self.sensitivities.activation_scores(d) for d in ("qint16", "float16"))
        able = [name for name in self.promotable if self._keeps_float16(name)]
        gain = {name: at16.get(name, 0.0) - at_float.get(name, 0.0) for name in able}
        return tuple(sorted((name for name in able if gain[name] > 0.0), key=lambda name: -gain[name]))

    def _keeps_float16(self, name: str) -> bool:
        if self.graph.by_name[name].kind.value not in self.rules.float16_kinds:
            return False
        try:
            asked = trial_setters(QConfigSettings(template="qint16"), (), {}, float16=[name])
            requested = resolve(self.graph, asked, self.rules.march)
            return apply_rules(self.graph, requested, self.rules, self.scores).ops[name].output == QDtype.float16
        except ConfigError:  # the device refuses it
            return False

    @cached_property
    def worth(self) -> dict[str, float]:
        """Sensitivity of each promotable operator by the time that int16 costs there, one promoted in all-int8."""
        costs = self.pricer().promotions(self.template(QDtype.qint8)[1])
        return {name: self.scores.get(name, 0.0) / max(costs[name], FREE_MS) for name in self.promotable}

    def problem(self, settings: QConfigSettings) -> Problem:
        """The choice of int16 operators as a knapsack, under everything else that `settings` say.

        Raises ConfigError without sensitivities.
        """
        if self.sensitivities is None:
            raise ConfigError("An assignment needs sensitivities, but got none. Rank first.")
        bare = replace(settings, int16_ratio=0.0, assignment="", error_share=None)
        fine = self.sensitivities.activation_scores("qint16")
        applied = self.resolve(bare)[1]
        costs = self.pricer().promotions(applied)
        kept = {name for name, op in applied.ops.items() if op.output != QDtype.qint8}
        operators = []
        for name in self.promotable:
            score = 0.0 if name in kept else self.scores.get(name, 0.0)  # it stays what it is
            at16 = min(0.0 if name in kept else fine.get(name, score * INT16_STEP), score)
            operators.append(Operator(name, score, at16, costs.get(name, 0.0)))
        known: dict[str, float] = {}

        def price(assignment: str) -> float:
            if assignment not in known:
                known[assignment] = self.pricer().bpu_ms(self.resolve(replace(bare, assignment=assignment))[1])
            return known[assignment]

        return Problem(tuple(operators), price)

    def resolve(self, settings: QConfigSettings) -> tuple[QConfig, QConfig]:
        """(requested, applied) qconfig of a trial. A ratio between 0 and 1 needs sensitivities."""
        if 0.0 < settings.int16_ratio < 1.0 and not self.scores:
            raise ConfigError("An int16 ratio between 0 and 1 needs sensitivities, but got none. Rank first.")
        rows = table_rows(self.sensitivities) if self.sensitivities else ()
        ranked = self.worth if settings.ranking == "score_per_ms" and settings.int16_ratio > 0.0 else self.scores
        setters = trial_setters(
            settings,
            self.promotable,
            ranked,
            rows,
            float16=self.float16_order[: settings.float16_count] if settings.float16_count else (),
            assigned=self._assigned(settings),
        )
        requested = resolve(self.graph, setters, self.rules.march, propagate=settings.propagate_ranges)
        return requested, self._explained(apply_rules(self.graph, requested, self.rules, self.scores))

    def _assigned(self, settings: QConfigSettings) -> list[str] | None:
        """Operators that an assignment or an error share makes int16; None where neither is given."""
        text = settings.assignment
        if settings.error_share is not None:
            problem = self.problem(settings)
            text = problem.cheapest(problem.budget(settings.error_share))
        if not text:
            return None
        if len(text) != len(self.promotable):
            raise ConfigError(
                f"qconfig.assignment has a letter for each of the {len(self.promotable)} operators that can be int16, "
                f"but got {len(text)}. qflow.check lists them."
            )
        return [name for name, letter in zip(self.promotable, text, strict=True) if letter == "6"]

    def _explained(self, applied: QConfig) -> QConfig:
        """The same qconfig; operators that the ratio passed over because the device bars int16 say so."""
        barred = {name: op.fallback for name, op in self.template(QDtype.qint16)[1].ops.items() if op.fallback}
        return applied.with_ops(
            {
                name: replace(applied.ops[name], fallback=f"no int16: {reason}")
                for name, reason in barred.items()
                if applied.ops[name].output == QDtype.qint8 and not applied.ops[name].fallback
            }
        )
