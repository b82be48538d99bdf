"""From settings to a qconfig: which precisions the device allows for each operator, and which one it gets.

This module interprets an int16 ratio, an fp16 count or an assignment, by means of the sensitivity table and the cost
model. It never runs the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from qflow.analysis.measures.tables import SensitivityTable
from qflow.core.device import apply_rules, input_dtypes
from qflow.core.device_rules import DeviceRules
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph
from qflow.core.qconfig import QConfig
from qflow.core.record import to_json
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, Setter, TemplateSetter, ratio_candidates
from qflow.core.settings import QConfigSettings
from qflow.core.table_setter import TableRow, table_rows
from qflow.core.template import Assigned, trial_setters
from qflow.core.weight_inputs import weight_inputs
from qflow.cost_model.latency import Pricer

OUTPUT, WEIGHT = "activation", "weight"  # the two kinds of quantizers, named as in a sensitivity table
FREE_MS = 1e-5  # promotions that cost less count as equally cheap, and only their sensitivity ranks them


@dataclass(frozen=True)
class Resolver:
    """A graph on a device, with the sensitivities that rank its operators (None before the ranking)."""

    graph: ModelGraph
    rules: DeviceRules
    sensitivities: SensitivityTable | None
    pricer: Callable[[], Pricer]
    """Returns the cost model; it is called only if a cost is needed."""
    _weights: dict[str, dict[str, frozenset[str]]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def scores(self) -> dict[str, float]:
        """Activation sensitivities by operator, at the lowest dtype measured; empty before the ranking.

        NaN becomes infinity, so that such an operator ranks first: an unknown error may be large.
        """
        return _known(self.sensitivities.activation_scores() if self.sensitivities else {})

    @cached_property
    def weight_scores(self) -> dict[str, float]:
        """Weight sensitivities by operator, as `scores`."""
        return _known(self.sensitivities.weight_scores() if self.sensitivities else {})

    def score(self, name: str, kind: str = OUTPUT) -> float:
        """Return the sensitivity of an operator's output or weight (`kind`); 0 if it is not known."""
        return (self.weight_scores if kind == WEIGHT else self.scores).get(name, 0.0)

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

        The errors of the values inside a norm or softmax count too, because fp16 replaces them as well.
        Raises ConfigError without sensitivities at qint16.
        """
        if self.sensitivities is None or "qint16" not in self.sensitivities.dtypes:
            raise ConfigError(
                "An fp16 count needs sensitivities at int16, but got none. "
                "Set sensitivity.dtypes=[qint8,qint16,float16]."
            )
        at16, at_float = (self.sensitivities.activation_scores(d) for d in ("qint16", "float16"))
        able = [name for name in self.promotable if self._keeps_float16(name)]
        parts = {name: (name, *self.graph.by_name[name].inner) for name in able}
        gain = {name: sum(at16.get(n, 0.0) - at_float.get(n, 0.0) for n in parts[name]) for name in able}
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

    @cached_property
    def weight_worth(self) -> dict[str, float]:
        """Sensitivity of each weight per ms that int16 of this weight alone adds to all-int8."""
        costs = self.pricer().weight_promotions(self.template(QDtype.qint8)[1])
        return {name: self.weight_scores.get(name, 0.0) / max(costs[name], FREE_MS) for name in self.weighted}

    @cached_property
    def weighted(self) -> tuple[str, ...]:
        """Operators with a weight, in graph order. With sensitive_type=both an assignment lists their weights, too."""
        return tuple(self._weight_inputs)

    @cached_property
    def _weight_inputs(self) -> Mapping[str, frozenset[str]]:
        return weight_inputs(self.graph, self.rules)

    def weights(self, settings: QConfigSettings) -> dict[str, frozenset[str]]:
        """Return the operators whose weight may be int16 under `settings`, if no promotion is in the way.

        The outputs that must be int8 beside it are given for each of them. A weight is left out if `settings` fix its
        dtype, or its input at int16.
        """
        plain = replace(without_int16(settings), sensitive_type=OUTPUT, counting="operators", ranking="score")
        key = to_json(plain)
        if key not in self._weights:
            low = self._resolved(plain, Assigned(()))[1]
            asked = self._requested(plain, Assigned((), self.weighted)).ops
            barred = {
                node.weight
                for node in self.graph.nodes
                if QDtype.qint16 in input_dtypes(self.graph, low, node.name) and not self.rules.dual(node)
            }
            self._weights[key] = {
                name: inputs
                for name, inputs in self._weight_inputs.items()
                if self.graph.by_name[name].weight not in barred
                and (low.ops[name].weight, asked[name].weight) == (QDtype.qint8, QDtype.qint16)
            }
        return self._weights[key]

    def mix(self, settings: QConfigSettings, outputs: Iterable[str] = (), weights: Iterable[str] = ()) -> str:
        """Return the assignment that sets these outputs and weights to int16.

        It has a letter for each promotable operator, and with sensitive_type=both one for each weight after them.
        """
        lists = [(self.promotable, set(outputs))]
        lists += [(self.weighted, set(weights))] if settings.sensitive_type == "both" else []
        return "".join("6" if name in chosen else "8" for names, chosen in lists for name in names)

    def mix_of(self, settings: QConfigSettings) -> str:
        """Return the assignment that gives what `settings` give, as the device runs it."""
        applied = self.resolve(settings)[1]
        return self.mix(settings, applied.names(QDtype.qint16), applied.weights(QDtype.qint16))

    def resolve(self, settings: QConfigSettings) -> tuple[QConfig, QConfig]:
        """Return the (requested, applied) qconfig of a trial. A ratio between 0 and 1 needs sensitivities."""
        if 0.0 < settings.int16_ratio < 1.0 and not self.scores:
            raise ConfigError("An int16 ratio between 0 and 1 needs sensitivities, but got none. Rank first.")
        return self._resolved(settings, self._assigned(settings))

    def _resolved(self, settings: QConfigSettings, assigned: Assigned | None) -> tuple[QConfig, QConfig]:
        requested = self._requested(settings, assigned)
        return requested, self._explained(apply_rules(self.graph, requested, self.rules, self.scores))

    def _requested(self, settings: QConfigSettings, assigned: Assigned | None) -> QConfig:
        setters = self._setters(settings, assigned)
        return resolve(self.graph, setters, self.rules.march, propagate=settings.propagate_ranges)

    def _setters(self, settings: QConfigSettings, assigned: Assigned | None) -> list[Setter]:
        by_worth = settings.ranking == "score_per_ms" and settings.int16_ratio > 0.0
        both = settings.sensitive_type == "both" and settings.counting == "operators"
        rows = table_rows(self.sensitivities) if self.sensitivities else ()
        return trial_setters(
            settings,
            self.promotable,
            self.worth if by_worth else self.scores,
            self._ranked(rows, by_worth) if both else rows,
            float16=self.float16_order[: settings.float16_count] if settings.float16_count else (),
            assigned=assigned,
            weights=self.weights(settings) if both and assigned is None else None,
        )

    def _ranked(self, rows: Sequence[TableRow], by_worth: bool) -> tuple[TableRow, ...]:
        """Return the rows of outputs and weights in one order of promotion."""
        outputs, weights = (self.worth, self.weight_worth) if by_worth else (self.scores, self.weight_scores)
        return tuple(
            sorted(rows, key=lambda r: -(weights if r.sensitive_type == WEIGHT else outputs).get(r.op_name, 0.0))
        )

    def _assigned(self, settings: QConfigSettings) -> Assigned | None:
        """Return what the assignment promotes; None if there is none."""
        text = settings.assignment
        if not text:
            return None
        weights = self.weighted if settings.sensitive_type == "both" else ()
        outputs = len(self.promotable)
        if len(text) not in (outputs, outputs + len(weights)):
            more = f", and may have one for each of the {len(weights)} weights" if weights else ""
            raise ConfigError(
                f"qconfig.assignment has a letter for each of the {outputs} operators that can be int16{more}, but got "
                f"{len(text)}. qflow.check lists them."
            )
        chosen = [letter == "6" for letter in text]
        return Assigned(
            tuple(name for name, int16 in zip(self.promotable, chosen, strict=False) if int16),
            tuple(name for name, int16 in zip(weights, chosen[outputs:], strict=False) if int16),
        )

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


def _known(scores: Mapping[str, float]) -> dict[str, float]:
    """Return `scores` with infinity in place of NaN."""
    return {name: math.inf if math.isnan(score) else score for name, score in scores.items()}


def without_int16(settings: QConfigSettings) -> QConfigSettings:
    """Return `settings` with nothing promoted to int16."""
    return replace(settings, int16_ratio=0.0, assignment="", error_share=None)
