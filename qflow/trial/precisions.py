"""From settings to a qconfig: which precisions the device allows for each operator, and which one it gets.

This module interprets an int16 ratio, an fp16 count, an assignment or an error share, by means of the sensitivity table
and the cost model. It never runs the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from types import MappingProxyType

from qflow.analysis.measures.tables import SensitivityTable
from qflow.core.device import DeviceRules, apply_rules
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph, OpKind
from qflow.core.qconfig import QConfig
from qflow.core.record import to_json
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, TemplateSetter, ratio_candidates
from qflow.core.settings import QConfigSettings
from qflow.core.table_setter import table_rows
from qflow.core.template import trial_setters
from qflow.cost_model.latency import Pricer
from qflow.cost_model.table import cost_metrics
from qflow.search.assign import Limit, Operator, Problem
from qflow.search.cost_terms import Group, cost_terms
from qflow.search.objective import BUDGETS

FREE_MS = 1e-5  # promotions that cost less count as equally cheap, and only their sensitivity ranks them
LATENCY = BUDGETS["max_latency_ms"]
NO_BUDGETS: Mapping[str, float] = MappingProxyType({})
INT16_STEP = 2.0**-8  # ratio of int16 to int8 steps; gives the int16 error of rows that were measured at int8 only


@dataclass(frozen=True)
class Precisions:
    """A graph on a device, with the sensitivities that rank its operators (None before the ranking)."""

    graph: ModelGraph
    rules: DeviceRules
    sensitivities: SensitivityTable | None
    pricer: Callable[[], Pricer]
    """Returns the cost model; it is called only if a cost is needed."""
    _problems: dict[str, Problem] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def scores(self) -> dict[str, float]:
        """Activation sensitivities by operator, at the lowest dtype measured; empty before the ranking.

        NaN becomes infinity, so that such an operator ranks first: an unknown error may be large.
        """
        found = self.sensitivities.activation_scores() if self.sensitivities else {}
        return {name: math.inf if math.isnan(score) else score for name, score in found.items()}

    def template(self, dtype: QDtype) -> tuple[QConfig, QConfig]:
        """Return (requested, applied) with every operator at `dtype`."""
        requested = resolve(self.graph, [HighPrecisionOutput(), TemplateSetter(dtype)], self.rules.march)
        return requested, apply_rules(self.graph, requested, self.rules, self.scores)

    @cached_property
    def promotable(self) -> tuple[str, ...]:
        """Operators that keep int16 on the device, in graph order. A ratio counts them, an assignment lists them."""
        return ratio_candidates(self.graph, self.template(QDtype.qint16)[1])

    @cached_property
    def float16_order(self) -> tuple[str, ...]:
        """Operators that keep fp16 on the device, in the order of how much their error falls from int16 to fp16.

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
        """Sensitivity of each promotable operator per ms that its promotion alone adds to all-int8."""
        costs = self.pricer().promotions(self.template(QDtype.qint8)[1])
        return {name: self.scores.get(name, 0.0) / max(costs[name], FREE_MS) for name in self.promotable}

    def problem(self, settings: QConfigSettings, budgets: Mapping[str, float] = NO_BUDGETS) -> Problem:
        """Return the choice of int16 operators as a problem, given all other `settings` and `budgets` (Goal.budgets).

        Operators that `settings` fix at one precision are not part of it. Raises ConfigError without sensitivities.
        """
        if self.sensitivities is None:
            raise ConfigError("An assignment needs sensitivities, but got none. Rank first.")
        without_int16 = replace(settings, int16_ratio=0.0, assignment="", error_share=None)
        key = to_json([without_int16, dict(budgets)])
        if key not in self._problems:
            self._problems[key] = self._problem(without_int16, budgets)
        return self._problems[key]

    def _problem(self, settings: QConfigSettings, budgets: Mapping[str, float]) -> Problem:
        letters = len(self.promotable)
        low, high = (self.resolve(replace(settings, assignment=x * letters))[1].ops for x in "86")
        fine = self.sensitivities.activation_scores("qint16") if self.sensitivities else {}
        operators = []
        for place, name in enumerate(self.promotable):
            if (low[name].output, high[name].output) == (QDtype.qint8, QDtype.qint16):
                score = self.scores.get(name, 0.0)
                operators.append(Operator(name, score, min(fine.get(name, score * INT16_STEP), score), place))
        free = {o.place for o in operators}
        all_int16 = "".join("6" if place in free else "8" for place in range(letters))
        costs = self._costs(settings, [LATENCY, *(BUDGETS[name] for name in budgets)])
        time, *bounded = (cost_terms(cost, all_int16, self._read_together) for cost in costs)
        limits = (Limit(cost, most) for cost, most in zip(bounded, budgets.values(), strict=True))
        return Problem(tuple(operators), time, letters, tuple(limits))

    def within(self, settings: QConfigSettings, budgets: Mapping[str, float]) -> bool:
        """Return whether the predicted cost of `settings` is within `budgets` (Goal.budgets)."""
        if not budgets:
            return True
        costs = cost_metrics(self.pricer().report(self.resolve(settings)[1]))
        return all(round(costs[BUDGETS[name]] - most, 9) <= 0.0 for name, most in budgets.items())

    def int16_ratios(self, settings: QConfigSettings, budgets: Mapping[str, float] = NO_BUDGETS) -> list[float]:
        """Return the int16 ratios from 0 on, with one more promotion each, that give a new qconfig within `budgets`.

        Operators that lose nothing at int8 are not promoted, and promoting one that `settings` fix gives no new
        qconfig. Needs scores.
        """
        raised = set(self.float16_order[: settings.float16_count]) if settings.float16_count else set()
        candidates = [name for name in self.promotable if name not in raised]
        useful = sum(self.scores.get(name, 0.0) > 0.0 for name in candidates)
        ratios = [k / len(candidates) for k in range(useful + 1)] if candidates else [0.0]
        found: dict[str, float] = {}
        for ratio in ratios:
            applied = self.resolve(replace(settings, int16_ratio=ratio))[1]
            found.setdefault(applied.digest, ratio)
        return [r for r in found.values() if self.within(replace(settings, int16_ratio=r), budgets)]

    @cached_property
    def _read_together(self) -> set[Group]:
        """Groups of promotable operators, by place, that one operator reads; a constant's readers stand for it."""
        place = {name: i for i, name in enumerate(self.promotable)}
        works = self.pricer().works
        reads = [{owner for owners in work.inputs for owner in owners} for work in works]
        deciding: dict[str, set[str]] = {}
        for work, read in zip(works, reads, strict=True):
            for name in read:
                constant = self.graph.by_name[name].kind == OpKind.constant
                deciding.setdefault(name, set()).add((work.owner or name) if constant else name)
        found = {tuple(sorted({place[d] for name in read for d in deciding[name] if d in place})) for read in reads}
        return {group for group in found if len(group) > 1}

    def _costs(self, settings: QConfigSettings, metrics: Sequence[str]) -> list[Callable[[str], float]]:
        """Return each of `metrics` as a function of the mix; a mix is resolved once for all of them."""

        @cache
        def costs(mix: str) -> dict[str, float]:
            applied, pricer = self.resolve(replace(settings, assignment=mix))[1], self.pricer()
            if set(metrics) == {LATENCY}:  # faster than a full report
                return {LATENCY: pricer.bpu_ms(applied) + pricer.host_ms}
            return cost_metrics(pricer.report(applied))

        return [lambda mix, metric=metric: costs(mix)[metric] for metric in metrics]  # type: ignore[misc]

    def resolve(self, settings: QConfigSettings) -> tuple[QConfig, QConfig]:
        """Return the (requested, applied) qconfig of a trial. A ratio between 0 and 1 needs sensitivities."""
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
        """Return the operators that an assignment or an error share promotes; None if neither is set."""
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
        """Return the qconfig with the reason added to operators that stay int8 because the device bars int16."""
        return applied.with_ops(
            {
                name: replace(applied.ops[name], fallback=f"no int16: {reason}")
                for name, reason in self._barred.items()
                if applied.ops[name].output == QDtype.qint8 and not applied.ops[name].fallback
            }
        )

    @cached_property
    def _barred(self) -> dict[str, str]:
        """Operators that do not keep int16 on the device even in all-int16, and why."""
        return {name: op.fallback for name, op in self.template(QDtype.qint16)[1].ops.items() if op.fallback}
