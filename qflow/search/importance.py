"""Which searched keys matter: Optuna's own evaluators on the finished trials of a study.

The trials are put into a study in memory with the points that were really measured, because the database holds the
sampler's values where a strategy replaced them. The int16 share of a mix that a strategy chose is the measured one, and
is compared like a key. Trials that lack another searched key are left out, so that every key that is always searched is
compared. Keys with conditions are left out where a trial lacks them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from qflow.search.domain import Choice, Domain, Interval, Scalar, Space
from qflow.search.objective import Directions
from qflow.search.outcome import FinishedTrial

ENOUGH = 20  # trials; with fewer, one lucky trial decides the figures
TREES = 16  # of fANOVA's forest; the 64 of Optuna take 5 s for 500 trials
PED_ANOVA, FANOVA = "PED-ANOVA", "fANOVA"
SHARE, CHOSEN, MEASURED_SHARE = "qconfig.int16_ratio", "qconfig.assignment", "qconfig/int16_ratio"


@dataclass(frozen=True)
class Importances:
    """Share of each key by (evaluator, metric), each summing to 1; if there are none, `reason` says why."""

    shares: Mapping[tuple[str, str], Mapping[str, float]]
    reason: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """The compared keys, the most important first."""
        every = dict.fromkeys(key for shares in self.shares.values() for key in shares)
        return tuple(sorted(every, key=lambda key: -max(shares.get(key, 0.0) for shares in self.shares.values())))


def importances(space: Space, trials: Sequence[FinishedTrial], metrics: Directions) -> Importances:
    """Return how much each key of `space` explains of each of `metrics`, which are optimized in the given directions.

    fANOVA gives the share of a metric's variance over all trials; PED-ANOVA compares the best tenth with the rest, so
    it tells which keys the best trials have in common (both are those of optuna.importance, with seed 0).
    """
    if any(CHOSEN in trial.params for trial in trials):
        space, trials = {**space, SHARE: Interval(0.0, 1.0)}, [_with_share(trial) for trial in trials]
    every = {key: _distribution(domain) for key, domain in space.items()}
    always = [key for key, domain in space.items() if not domain.when]
    measured = [t for t in trials if all(name in t.outcome.metrics for name in metrics)]
    known = [t for t in measured if all(_held(space[key], t.params.get(key)) for key in always)]
    shared = {k: d for k, d in every.items() if all(_held(space[k], t.params.get(k)) for t in known)}
    varied = {k: d for k, d in shared.items() if len({t.params[k] for t in known}) > 1}
    if len(known) < ENOUGH:
        others = f"; {len(measured) - len(known)} more lack a searched key" if len(measured) > len(known) else ""
        return Importances(
            {}, f"{ENOUGH} finished trials are needed to tell parameters apart; there are {len(known)}{others}."
        )
    if len(varied) < 2:
        return Importances({}, "Fewer than two parameters were varied in all trials, so there is nothing to compare.")
    shares = {
        (name, metric): _shares(name, varied, known, metric, direction)
        for name in (FANOVA, PED_ANOVA)
        for metric, direction in metrics.items()
        if len({t.outcome.metrics[metric] for t in known}) > 1
    }
    return Importances(shares, "" if shares else "All trials have the same metrics.")


def _with_share(trial: FinishedTrial) -> FinishedTrial:
    """Return the trial with the share of operators that it has in int16 as a param."""
    share = trial.outcome.metrics.get(MEASURED_SHARE)
    return trial if share is None else replace(trial, params={**trial.params, SHARE: share})


def _shares(
    evaluator: str, varied: Mapping[str, BaseDistribution], trials: Sequence[FinishedTrial], metric: str, direction: str
) -> dict[str, float]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it announces every study in memory
    study = optuna.create_study(
        directions=[optuna.study.StudyDirection[direction.upper()]], sampler=optuna.samplers.RandomSampler(seed=0)
    )
    for trial in trials:
        study.add_trial(
            optuna.create_trial(
                params={key: trial.params[key] for key in varied},
                distributions=dict(varied),
                value=trial.outcome.metrics[metric],
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = (
            optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=0)
            if evaluator == FANOVA
            else optuna.importance.PedAnovaImportanceEvaluator()
        )
        return dict(optuna.importance.get_param_importances(study, evaluator=made))


def _distribution(domain: Domain) -> BaseDistribution:
    if isinstance(domain, Choice):
        return CategoricalDistribution(domain.values)
    low, high = (domain.low, domain.high) if isinstance(domain, Interval) else _ends(domain.points())
    log = isinstance(domain, Interval) and domain.log
    if domain.integer:
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(low, high, log=log)


def _ends(points: Sequence[Scalar]) -> tuple[float, float]:
    numbers = [float(p) for p in points if isinstance(p, (int, float))]
    return numbers[0], numbers[-1]


def _held(domain: Domain, value: Scalar) -> bool:
    """Return whether a trial's value lies in the domain; a value that a strategy chose may lie outside."""
    if isinstance(domain, Choice):
        return domain.contains(value)
    low, high = (domain.low, domain.high) if isinstance(domain, Interval) else _ends(domain.points())
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
