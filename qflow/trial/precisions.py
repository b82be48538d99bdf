"""From settings to a qconfig: which operators may have which precision on the device, and which of them get it.

What an int16 ratio, an fp16 count, an assignment or an error share mean is decided here, from the sensitivity table
and the cost model. Nothing here runs the model.
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

FREE_MS = 1e-5  # a promotion that costs less is free: by sensitivity alone among its like
LATENCY = BUDGETS["max_latency_ms"]
NO_BUDGETS: Mapping[str, float] = MappingProxyType({})
INT16_STEP = 2.0**-8  # int16 steps are finer than int8's by this: the error of rows that were measured at int8 only


@dataclass(frozen=True)
class Precisions:
    """A graph on a device, with the sensitivities that rank its operators (None before the ranking)."""

    graph: ModelGraph
    rules: DeviceRules
    sensitivities: SensitivityTable | None
    pricer: Callable[[], Pricer]
    """The cost model; called only where a price is needed."""
    _problems: dict[str, Problem] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def scores(self) -> dict[str, float]:
        """Activation sensitivities by operator, at the lowest dtype measured; empty before the ranking. One that is no
        number ranks first: unknown is not harmless.
        """
        found = self.sensitivities.activation_scores() if self.sensitivities else {}
        return {name: math.inf if math.isnan(score) else score for name, score in found.items()}

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

    def problem(self, settings: QConfigSettings, budgets: Mapping[str, float] = NO_BUDGETS) -> Problem:
        """The choice of int16 operators, under everything else that `settings` say and within `budgets` (Goal.budgets).

        Operators that `settings` hold at one precision are no part of it. Raises ConfigError without sensitivities.
        """
        if self.sensitivities is None:
            raise ConfigError("An assignment needs sensitivities, but got none. Rank first.")
        bare = replace(settings, int16_ratio=0.0, assignment="", error_share=None)
        key = to_json([bare, dict(budgets)])
        if key not in self._problems:
            self._problems[key] = self._problem(bare, budgets)
        return self._problems[key]

    def _problem(self, bare: QConfigSettings, budgets: Mapping[str, float]) -> Problem:
        letters = len(self.promotable)
        low, high = (self.resolve(replace(bare, assignment=x * letters))[1].ops for x in "86")
        fine = self.sensitivities.activation_scores("qint16") if self.sensitivities else {}
        operators = []
        for place, name in enumerate(self.promotable):
            if (low[name].output, high[name].output) == (QDtype.qint8, QDtype.qint16):
                score = self.scores.get(name, 0.0)
                operators.append(Operator(name, score, min(fine.get(name, score * INT16_STEP), score), place))
        free = {o.place for o in operators}
        widest = "".join("6" if place in free else "8" for place in range(letters))
        costs = self._costs(bare, [LATENCY, *(BUDGETS[name] for name in budgets)])
        time, *bounded = (cost_terms(cost, widest, self._read_together) for cost in costs)
        limits = (Limit(cost, most) for cost, most in zip(bounded, budgets.values(), strict=True))
        return Problem(tuple(operators), time, letters, tuple(limits))

    def within(self, settings: QConfigSettings, budgets: Mapping[str, float]) -> bool:
        """Whether what `settings` ask for keeps `budgets` (Goal.budgets), as far as its cost tells: before it runs."""
        if not budgets:
            return True
        costs = cost_metrics(self.pricer().report(self.resolve(settings)[1]))
        return all(round(costs[BUDGETS[name]] - most, 9) <= 0.0 for name, most in budgets.items())

    def rungs(self, settings: QConfigSettings, budgets: Mapping[str, float] = NO_BUDGETS) -> list[float]:
        """Int16 ratios of a ladder, from 0, a promotion more each: those that run something new within `budgets`.

        Operators that lose nothing at int8 are not promoted; one that `settings` hold changes nothing. Needs scores.
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
        """Places of promotable operators that one operator reads; a constant there has the dtype of all its readers."""
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

    def _costs(self, bare: QConfigSettings, metrics: Sequence[str]) -> list[Callable[[str], float]]:
        """Each of `metrics` as a function of the mix, which is resolved once for all of them."""

        @cache
        def costs(mix: str) -> dict[str, float]:
            applied, pricer = self.resolve(replace(bare, assignment=mix))[1], self.pricer()
            if set(metrics) == {LATENCY}:  # quicker than a whole report
                return {LATENCY: pricer.bpu_ms(applied) + pricer.host_ms}
            return cost_metrics(pricer.report(applied))

        return [lambda mix, metric=metric: costs(mix)[metric] for metric in metrics]  # type: ignore[misc]

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
        return applied.with_ops(
            {
                name: replace(applied.ops[name], fallback=f"no int16: {reason}")
                for name, reason in self._barred.items()
                if applied.ops[name].output == QDtype.qint8 and not applied.ops[name].fallback
            }
        )

    @cached_property
    def _barred(self) -> dict[str, str]:
        """Operators that lose int16 on the device even where all ask for it, and why."""
        return {name: op.fallback for name, op in self.template(QDtype.qint16)[1].ops.items() if op.fallback}
