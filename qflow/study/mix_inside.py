"""The mix inside the settings that the sampler proposes: Optuna searches the settings, the program of assign the mix.

The sampler proposes everything else that is searched (calibration, training). The mix is the one that is most worth a
trial under these settings (next_mix.py), given the drops of all trials so far, whatever their settings were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qflow.core.dtype import QDtype
from qflow.core.errors import QflowError
from qflow.core.qconfig import QConfig
from qflow.core.record import to_json
from qflow.core.settings import QConfigSettings
from qflow.search.assign import Limit, Problem
from qflow.search.cost_terms import CostTerms
from qflow.search.domain import Domain, Interval, Scalar, Values
from qflow.search.next_mix import NextMix
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import ASSIGNMENT, ERROR_SHARE, RATIO, SENSITIVE_TYPE
from qflow.search.surrogate import Measurement
from qflow.study.session import Session
from qflow.study.unrepaired import UNREPAIRED

COUNTING = "qconfig.counting"
OF_THE_MIX = (RATIO, ASSIGNMENT, ERROR_SHARE, SENSITIVE_TYPE, COUNTING, "qconfig.ranking")
"""The keys that choose a mix; all others are the settings around it."""


def mix_problem(session: Session, settings: QConfigSettings) -> Problem:
    """Return the choice of int16 operators within the budgets and the largest int16 share of the search space."""
    problem = session.evaluator.precisions.problem(settings, session.goal.budgets)
    domain = session.study.space.get(RATIO)
    ends = [session.config.qconfig.int16_ratio] if domain is None else _ends(domain)
    most = max((end for end in ends if isinstance(end, (int, float))), default=0.0)
    if not 0.0 < most < 1.0:  # 0 is the default of a key that is not set
        return problem
    outputs = [o.place for o in problem.operators if not o.weight]
    count = CostTerms(lambda mix: sum(mix[i] == "6" for i in outputs), 0.0, {(i,): 1.0 for i in outputs})
    return problem.bounded(Limit(count, most * len(session.evaluator.precisions.promotable)))


def _ends(domain: Domain) -> Sequence[Scalar]:
    return (domain.low, domain.high) if isinstance(domain, Interval) else domain.points()


@dataclass
class MixInside:
    """Chooses the mix for the settings of a proposal. `low` and `high` are the baselines at int8 and int16."""

    session: Session
    base: Mapping[str, Any]
    low: FinishedTrial | None
    high: FinishedTrial
    _choosers: dict[str, NextMix] = field(default_factory=dict)
    _applied: dict[int, QConfig] = field(default_factory=dict)
    """By number of the trial: resolved once, because a study has many proposals."""

    def __call__(self, proposal: Values) -> dict[str, Any]:
        """Return the keys of the mix for a proposal of the sampler; none if no mix is worth a trial there."""
        own = {key: self.base[key] for key in (SENSITIVE_TYPE, COUNTING) if key in self.base}
        own |= {RATIO: 0.0, **({ERROR_SHARE: None} if ERROR_SHARE in proposal else {})}
        point = {**self.session.base(), **proposal, **own}
        try:
            settings = self.session.qconfig_at(point)
            chooser = self._chooser(settings)
        except QflowError:
            return {}  # the trial will fail with this error as its reason
        measured, around = self._measured(settings, chooser.problem), _around(point)
        seen = {m.mix for m in measured if m.settings == around} | self._tried(around)
        mix = chooser.choose(measured, seen, around)
        return {**own, ASSIGNMENT: mix} if mix else {}

    def _chooser(self, settings: QConfigSettings) -> NextMix:
        key = to_json(settings)
        if key not in self._choosers:
            session, least = self.session, self.high.outcome.metrics["accuracy/drop"]
            problem = mix_problem(session, settings)
            most = self.low.outcome.metrics["accuracy/drop"] if self.low else max(session.goal.max_drop, least)
            self._choosers[key] = NextMix(problem, session.goal.max_drop, least, most)
        return self._choosers[key]

    def _measured(self, settings: QConfigSettings, problem: Problem) -> list[Measurement]:
        """Return the mix, the drop and the settings of all trials so far that were evaluated to the end."""
        session, precisions = self.session, self.session.evaluator.precisions
        found = []
        for trial in session.trials:
            if trial.stopped or trial.label == UNREPAIRED:
                continue
            if trial.number not in self._applied:
                self._applied[trial.number] = precisions.resolve(session.qconfig_at(trial.params))[1]
            applied = self._applied[trial.number]
            mix = precisions.mix(settings, applied.names(QDtype.qint16), applied.weights(QDtype.qint16))
            drop = trial.outcome.metrics["accuracy/drop"]
            found.append(Measurement(problem.plain(mix), drop, _around(trial.params)))
        return found

    def _tried(self, around: str) -> set[str]:
        """Return the mixes of the trials under these settings that failed or still run."""
        driver = self.session.driver
        assert driver is not None
        points = [*(t.params for t in driver.failed.values()), *(b.proposal.params for b in driver.running)]
        return {str(p[ASSIGNMENT]) for p in points if ASSIGNMENT in p and _around(p) == around}


def _around(params: Mapping[str, Any]) -> str:
    """Return the settings of a trial around its mix as text."""
    return to_json({key: value for key, value in sorted(params.items()) if key not in OF_THE_MIX})
