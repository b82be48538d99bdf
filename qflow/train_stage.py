"""The guide's QAT as a stage: rates at a fixed rate, then scheduler, scales and weight decay, then bits given back.

rates       qat.learning_rate in search.rates for a share of the steps, no scheduler; the best is kept
halving     fixed and moving activation scales, each with search.weight_decays, with the scheduler: the better
half goes on from its checkpoint until one has all the steps (at most 20 % of the float steps, qat.py)
give back   int16 operators of the trained mix to int8, trained alike, where the goal still holds
"""

from __future__ import annotations

from typing import Any

from qflow import config as conf
from qflow.core.dtype import QDtype
from qflow.search.objective import meets, nearest_miss
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import ASSIGNMENT, BudgetSpent, give_back, halving
from qflow.session import Session
from qflow.stages import RATIO

RUNGS = 3  # a quarter, half, and all of the steps


def train_nearest(session: Session) -> None:
    """Training as a stage of its own, where it was left to one and nothing meets the goal yet."""
    if session.untrained_best is not None or session.kept.get("qat.steps") != 0:
        return
    calibrated = [t for t in session.trials if not t.outcome.metrics.get("qat/steps")]
    nearest = nearest_miss(calibrated, session.goal.ranking)
    assert nearest is not None
    del session.kept["qat.steps"]
    session.decide("training", f"from trial {nearest.number} {nearest.label}".rstrip() + ", the nearest to the goal")
    train(session, nearest)


def train(session: Session, start: FinishedTrial) -> FinishedTrial | None:
    """Train the mix of `start`; the best trained trial that meets the goal, or None."""
    with session.console.stage("training") as say:
        try:
            found = _trained(session, dict(start.params))
            if found is not None and meets(found):
                _give_back(session, found)
        except BudgetSpent as spent:
            session.console.say(f"{'budget':<12} {spent}")
        done = [t for t in session.trials if t.outcome.metrics.get("qat/steps")]
        best = max(done, key=_score, default=None)
        say(
            f"{len(done)} trainings, best {best.outcome.metrics[session.accuracy]:.4f} at rate "
            f"{best.params['qat.learning_rate']:g}"
            if best
            else "every training failed"
        )
    return session.best if session.best and session.best.outcome.metrics.get("qat/steps") else None


def _trained(session: Session, point: dict[str, Any]) -> FinishedTrial | None:
    qat, search = session.config.qat, session.config.search
    probe = max(round(qat.steps * search.probe_share), 1)
    fixed = {**point, "qat.steps": probe, "qat.scheduled": False}
    trials = {r: session.measure({**fixed, "qat.learning_rate": r}, f"QAT rate {r:g}") for r in search.rates}
    known = {rate: t for rate, t in trials.items() if t is not None}
    if not known:
        session.decide("learning rate", f"every rate of {list(search.rates)} fails; add lower ones to search.rates")
        return None
    rate = max(known, key=lambda r: (_score(known[r]), -r))
    drops = {r: f"{t.outcome.metrics['accuracy/drop']:+.4f}" if t else "failed" for r, t in trials.items()}
    said = ", ".join(f"{r:g}: {drop}" for r, drop in drops.items())
    session.decide("learning rate", f"{rate:g} is best after {probe} steps at a fixed rate (drop by rate {said})")
    candidates = [
        {**point, "qat.learning_rate": rate, "qat.scheduled": True, "qat.moving": moving, "qat.weight_decay": decay}
        for decay in search.weight_decays
        for moving in (False, True)
    ]
    rungs = sorted({max(qat.steps // 2**k, 1) for k in range(RUNGS)})
    halving(session.measure, candidates, rungs)
    final = [t for t in session.trials if t.params.get("qat.steps") == qat.steps and _same(t, point)]
    best = max(final, key=_score, default=None)
    if best is not None:
        scales = "moving" if best.params["qat.moving"] else "fixed"
        session.decide(
            "training",
            f"{scales} activation scales, weight decay {best.params['qat.weight_decay']:g}: drop "
            f"{best.outcome.metrics['accuracy/drop']:+.4f} after {best.outcome.metrics['qat/steps']:.0f} steps",
        )
    return best


def _give_back(session: Session, trained: FinishedTrial) -> None:
    """Fewer int16 operators under the same training: most of what int16 was for, training may have taught."""
    point = {k: v for k, v in trained.params.items() if k not in (RATIO, ASSIGNMENT)}
    precisions = session.bench.precisions
    settings = conf.trial_settings(conf.with_params(session.config, trained.params)).qconfig
    wide = set(precisions.resolve(settings)[1].names(QDtype.qint16))
    mix = "".join("6" if name in wide else "8" for name in precisions.promotable)
    if "6" not in mix:
        return
    bare = conf.trial_settings(conf.with_params(session.config, {**point, RATIO: 0.0})).qconfig

    def ask(assignment: str, label: str) -> FinishedTrial | None:
        return session.measure({**point, RATIO: 0.0, ASSIGNMENT: assignment}, f"QAT {label}")

    fewer = give_back(ask, precisions.problem(bare), mix, patience=2)
    session.decide("give back", f"{mix.count('6')} int16 operators before, {fewer.count('6')} after")


def _same(trial: FinishedTrial, point: dict[str, Any]) -> bool:
    return all(trial.params.get(k) == v for k, v in point.items() if not k.startswith("qat."))


def _score(trial: FinishedTrial) -> float:
    """Larger is better: the negative drop."""
    return -trial.outcome.metrics["accuracy/drop"]
