"""The choices of int16 operators among which a search chooses: ratios, assignments, error shares and int16 weights.

A choice is a setting of a trial; resolver.py turns it into a qconfig. Nothing here runs the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from types import MappingProxyType

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import OpKind
from qflow.core.qconfig import QConfig
from qflow.core.record import to_json
from qflow.core.setter import SensitiveSetter
from qflow.core.settings import QConfigSettings
from qflow.core.table_setter import TableSetter
from qflow.cost_model.table import cost_metrics
from qflow.search.assign import Limit, Operator, Problem
from qflow.search.cost_terms import Group, cost_terms
from qflow.search.objective import BUDGETS
from qflow.trial.resolver import OUTPUT, WEIGHT, Resolver, without_int16

LATENCY, SLOWDOWN = BUDGETS["max_latency_ms"], BUDGETS["max_slowdown"]
NO_BUDGETS: Mapping[str, float] = MappingProxyType({})
INT16_STEP = 2.0**-8  # ratio of int16 to int8 steps; gives the int16 error of rows that were measured at int8 only
NOISE = 0.1  # of the largest error that is left: if no weight gains that much, the weights are not the cause of a miss


@dataclass(frozen=True)
class Precisions(Resolver):
    """What a search may choose for the operators of a graph on a device."""

    _problems: dict[str, Problem] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _fine(self) -> dict[str, dict[str, float]]:
        """Sensitivities at int16 by kind and operator, where they were measured."""
        table = self.sensitivities
        return {WEIGHT: table.weight_scores("qint16"), OUTPUT: table.activation_scores("qint16")} if table else {}

    def int16_error(self, name: str, kind: str = OUTPUT) -> float:
        """Return the sensitivity at int16 of an operator's output or weight (`kind`), at most that at int8.

        Where it was not measured, it follows from the ratio of the steps; what is not finite at int8 is taken to be
        mended by int16.
        """
        score, fine = self.score(name, kind), self._fine.get(kind, {})
        if name in fine:
            return min(fine[name], score)
        return score * INT16_STEP if score < math.inf else 0.0

    def gain(self, name: str, kind: str = OUTPUT) -> float:
        """Return by how much int16 lowers the error of an operator's output or weight; 0 if it is not known."""
        score, left = self.score(name, kind), self.int16_error(name, kind)
        return score - left if left < math.inf else 0.0

    def problem(self, settings: QConfigSettings, budgets: Mapping[str, float] = NO_BUDGETS) -> Problem:
        """Return the choice of int16 operators as a problem, given all other `settings` and `budgets` (Goal.budgets).

        With sensitive_type=both the weights are part of it. Operators that `settings` fix at one precision are not.
        Raises ConfigError without sensitivities.
        """
        if self.sensitivities is None:
            raise ConfigError("An assignment needs sensitivities, but got none. Rank first.")
        plain = without_int16(settings)
        key = to_json([plain, dict(budgets)])
        if key not in self._problems:
            self._problems[key] = self._problem(plain, budgets)
        return self._problems[key]

    def _problem(self, settings: QConfigSettings, budgets: Mapping[str, float]) -> Problem:
        low, high = (
            self.resolve(replace(settings, assignment=self.mix(settings, outputs)))[1].ops
            for outputs in ((), self.promotable)
        )
        outputs = {
            name: place
            for place, name in enumerate(self.promotable)
            if (low[name].output, high[name].output) == (QDtype.qint8, QDtype.qint16)
        }
        allowed = self.weights(settings) if settings.sensitive_type == "both" else {}
        weights = {
            name: place
            for place, name in enumerate(self.weighted, len(self.promotable))
            if name in allowed and self.gain(name, WEIGHT) > 0.0
        }
        operators = [
            Operator(name, self.score(name, kind), self.int16_error(name, kind), place, weight=kind == WEIGHT)
            for kind, places in ((OUTPUT, outputs), (WEIGHT, weights))
            for name, place in places.items()
        ]
        pairs = [(outputs[i], place) for name, place in weights.items() for i in sorted(allowed[name]) if i in outputs]
        excluded = {place for _, place in pairs}
        highest = self.mix(settings, outputs, (name for name, place in weights.items() if place not in excluded))
        costs = self._costs(settings, [LATENCY, *(BUDGETS[name] for name in budgets)])
        groups = self._read_together(weights)
        time, *bounded = (cost_terms(cost, highest, groups, sorted(excluded)) for cost in costs)
        limits = (Limit(cost, most) for cost, most in zip(bounded, budgets.values(), strict=True))
        return Problem(tuple(operators), time, len(highest), tuple(limits), tuple(pairs))

    def resolve(self, settings: QConfigSettings) -> tuple[QConfig, QConfig]:
        """Return the (requested, applied) qconfig of a trial. A ratio between 0 and 1 needs sensitivities."""
        if settings.error_share is not None:
            problem = self.problem(settings)
            mix = problem.cheapest(problem.budget(settings.error_share))
            settings = replace(settings, error_share=None, assignment=mix)
        return super().resolve(settings)

    @cached_property
    def int8_ms(self) -> float:
        """The predicted latency in ms with every operator at int8, whatever the configuration pins."""
        return self.pricer().report(self.template(QDtype.qint8)[1]).latency_ms

    def slowdown(self, latency_ms: float) -> float:
        """Return a predicted latency over `int8_ms`."""
        return latency_ms / self.int8_ms

    def _cost(self, applied: QConfig) -> dict[str, float]:
        """Return the cost metrics of a qconfig, by the names of a run's metrics."""
        report = self.pricer().report(applied)
        return {**cost_metrics(report), SLOWDOWN: self.slowdown(report.latency_ms)}

    def within(self, settings: QConfigSettings, budgets: Mapping[str, float]) -> bool:
        """Return whether the predicted cost of `settings` is within `budgets` (Goal.budgets)."""
        if not budgets:
            return True
        costs = self._cost(self.resolve(settings)[1])
        return all(round(costs[BUDGETS[name]] - most, 9) <= 0.0 for name, most in budgets.items())

    def int16_ratios(self, settings: QConfigSettings, budgets: Mapping[str, float] = NO_BUDGETS) -> list[float]:
        """Return the int16 ratios from 0 on, with one more promotion each, that give a new qconfig within `budgets`.

        Operators that lose nothing at int8 are not promoted, and promoting one that `settings` fix gives no new
        qconfig. Needs scores.
        """
        counted = self._counted(settings)
        useful = sum(score > 0.0 for score in counted)
        ratios = [k / len(counted) for k in range(useful + 1)] if counted else [0.0]
        found: dict[str, float] = {}
        for ratio in ratios:
            applied = self.resolve(replace(settings, int16_ratio=ratio))[1]
            found.setdefault(applied.digest, ratio)
        return [r for r in found.values() if self.within(replace(settings, int16_ratio=r), budgets)]

    def _counted(self, settings: QConfigSettings) -> list[float]:
        """Return the scores of the promotions that an int16 ratio counts."""
        for setter in self._setters(replace(settings, int16_ratio=1.0), None):
            if isinstance(setter, SensitiveSetter):
                return [self.score(name) for name in setter.candidates]
            if isinstance(setter, TableSetter):
                return [self.score(row.op_name, row.sensitive_type) for row in setter.counted]
        return []

    def weight_order(self, settings: QConfigSettings, rest: QDtype) -> tuple[str, ...]:
        """Return the operators whose int16 weight lowers the error, the largest gain first; the outputs are at `rest`.

        The gain of a weight is what remains after its input has lost int16, where the device allows only one of them.
        The result is empty if no gain reaches `NOISE` of the largest error that is left at `rest`.
        """
        promotable = set(self.promotable)
        gains = {
            name: self.gain(name, WEIGHT) - sum(self.gain(i) for i in sorted(inputs) if i in promotable)
            for name, inputs in self.weights(settings).items()
        }
        order = sorted((name for name in gains if gains[name] > 0.0), key=lambda name: -gains[name])
        wide = promotable if rest == QDtype.qint16 else set()
        fine = self._at_float16(settings)
        left = [
            fine[name] if name in fine else self.int16_error(name) if name in wide else score
            for name, score in self.scores.items()
        ]
        known = [error for error in (*left, *self.weight_scores.values()) if error < math.inf]
        largest = max(known, default=0.0)
        return tuple(order) if order and gains[order[0]] >= NOISE * largest else ()

    def _at_float16(self, settings: QConfigSettings) -> dict[str, float]:
        """Return the errors of the operators that `settings` keep in fp16, and of the values inside them."""
        names = self.resolve(without_int16(settings))[1].names(QDtype.float16)
        table = self.sensitivities.activation_scores("float16") if self.sensitivities else {}
        return {part: table.get(part, 0.0) for name in names for part in (name, *self.graph.by_name[name].inner)}

    def weight_mix(self, settings: QConfigSettings, rest: QDtype, names: Sequence[str]) -> str:
        """Return the assignment with the weights of `names` at int16, and every output at `rest` that may be."""
        free = self.weights(settings)
        held = {i for name in names for i in free[name]}
        outputs = () if rest == QDtype.qint8 else (name for name in self.promotable if name not in held)
        return self.mix(replace(settings, sensitive_type="both"), outputs, names)

    def _read_together(self, weights: Mapping[str, int]) -> set[Group]:
        """Return the groups of promotable operators, by place, that one operator reads, also with its weight's place
        and with its own, since values that it writes in another dtype than it reads are converted.

        `weights` are the places of weights. A constant's readers stand for it.
        """
        place = {name: i for i, name in enumerate(self.promotable)}
        works = self.pricer().works
        reads = [{owner for owners in work.inputs for owner in owners} for work in works]
        deciding: dict[str, set[str]] = {}
        for work, read in zip(works, reads, strict=True):
            for name in read:
                constant = self.graph.by_name[name].kind == OpKind.constant
                deciding.setdefault(name, set()).add((work.owner or name) if constant else name)
        found: set[Group] = set()
        for work, read in zip(works, reads, strict=True):
            group = {place[d] for name in read for d in deciding[name] if d in place}
            for own in (weights.get(work.owner or ""), place.get(work.owner or "")):
                found |= {tuple(sorted(group)), tuple(sorted(group | ({own} if own is not None else set())))}
        return {group for group in found if len(group) > 1}

    def _costs(self, settings: QConfigSettings, metrics: Sequence[str]) -> list[Callable[[str], float]]:
        """Return each of `metrics` as a function of the mix; a mix is resolved once for all of them."""

        @cache
        def costs(mix: str) -> dict[str, float]:
            applied, pricer = self.resolve(replace(settings, assignment=mix))[1], self.pricer()
            if {LATENCY, SLOWDOWN} >= set(metrics):  # faster than a full report
                ms = pricer.bpu_ms(applied) + pricer.host_ms
                return {LATENCY: ms, SLOWDOWN: self.slowdown(ms)}
            return self._cost(applied)

        return [lambda mix, metric=metric: costs(mix)[metric] for metric in metrics]  # type: ignore[misc]
