"""The guide's QAT as a stage: rates at a fixed rate, then scheduler, scales and weight decay, then bits given back.

rates       qat.learning_rate in search.rates for a share of the steps, no scheduler; the best is kept
halving     fixed and moving activation scales, each with search.weight_decays, with the scheduler: the better
half goes on from its checkpoint until one has all the steps (at most 20 % of the float steps, qat.py)
give back   int16 operators of the trained mix to int8, trained alike, where the goal still holds
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qflow.config.settings import trial_settings, with_params
from qflow.core.dtype import QDtype
from qflow.search.objective import best_trial, nearest_miss, over_budget
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import ASSIGNMENT, ERROR_SHARE, RATIO, BudgetSpent, demote, halving
from qflow.study.session import Session

GIVEN_BACK = 6  # trials that are left for giving int16 back
RUNGS = 3  # a quarter, half, and all of the steps


def leave_for_training(session: Session) -> None:
    """Say when trials are trained; where that is after the search, keep training out of it and trials for it."""
    qat, search = session.config.qat, session.config.search
    if qat.steps and qat.apply == "after_search":
        alive, trainings = 2 * len(search.weight_decays), len(search.rates) + GIVEN_BACK
        steps, cut = trial_settings(session.config).qat.capped()
        for _ in _rungs(steps):
            trainings, alive = trainings + alive, max(alive // 2, 1)
        session.kept["qat.steps"], session.budget.reserved = 0, trainings
        said = "; ".join([f"after the search, {steps} steps (qat.apply=after_search)", *cut])
        session.console.say(f"{'training':<12} {said}")
    elif qat.steps:
        session.console.say(
            f"{'training':<12} each trial is trained after its calibration: {qat.steps} steps (qat.steps)"
        )


def train_nearest(session: Session) -> None:
    """Training as a stage of its own, where it was left to one and nothing meets the goal yet."""
    if session.untrained_best is not None or session.kept.get("qat.steps") != 0:
        return
    nearest = nearest_miss([t for t in session.trials if not _is_trained(t)], session.goal.ranking)
    if nearest is None:
        return
    if over := over_budget(nearest):  # then nothing that was tried keeps it, and training changes no cost
        session.decide("training", f"does not help: the nearest, trial {nearest.number}, exceeds {', '.join(over)}")
        return
    del session.kept["qat.steps"]
    session.budget.reserved = 0
    session.decide("training", f"from trial {nearest.number} {nearest.label}".rstrip() + ", the nearest to the goal")
    train(session, nearest)


def train(session: Session, start: FinishedTrial) -> None:
    """Train the mix of `start`; where a trained trial meets the goal, give int16 back."""
    with session.console.stage("training") as say:
        ended = ""
        try:
            met = _trained(session, dict(start.params))
            if met is not None:
                _demote(session, met)
        except BudgetSpent as spent:
            ended = f"; {spent}"
        done = [t for t in session.trials if _is_trained(t)]
        best = max(done, key=_score, default=None)
        if best is not None:
            rate = best.params["qat.learning_rate"]
            say(f"{len(done)} trainings, best {best.outcome.metrics[session.accuracy]:.4f} at rate {rate:g}{ended}")
        else:
            say(f"none was started{ended}" if ended else "every training failed")


def _trained(session: Session, point: dict[str, Any]) -> FinishedTrial | None:
    """The rate, then scales and weight decay; the best trial on the way that meets the goal, however long it was."""
    done: list[FinishedTrial] = []

    def measure(point: Mapping[str, Any], label: str) -> FinishedTrial | None:
        trial = session.measure(point, label)
        done.extend([trial] if trial is not None else [])
        return trial

    search, (steps, _) = session.config.search, trial_settings(session.config).qat.capped()
    probe = max(round(steps * search.probe_share), 1)
    fixed = {**point, "qat.steps": probe, "qat.scheduled": False}
    trials = {r: measure({**fixed, "qat.learning_rate": r}, f"QAT rate {r:g}") for r in search.rates}
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
    final = next(iter(halving(measure, candidates, _rungs(steps))), None)
    if final is not None:
        scales = "moving" if final.params["qat.moving"] else "fixed"
        session.decide(
            "training",
            f"{scales} activation scales, weight decay {final.params['qat.weight_decay']:g}: drop "
            f"{final.outcome.metrics['accuracy/drop']:+.4f} after {final.outcome.metrics['qat/steps']:.0f} steps",
        )
    else:
        session.decide("training", f"at rate {rate:g} with the scheduler every training fails; add lower ones")
    return best_trial(done, session.goal.ranking)


def _rungs(steps: int) -> list[int]:
    """Steps after which the worse half of the candidates is left behind."""
    return sorted({max(steps // 2**k, 1) for k in range(RUNGS)})


def _demote(session: Session, trained: FinishedTrial) -> None:
    """Fewer int16 operators under the same training: most of what int16 was for, training may have taught."""
    point = {k: v for k, v in trained.params.items() if k not in (RATIO, ASSIGNMENT, ERROR_SHARE)}
    precisions = session.evaluator.precisions
    settings = trial_settings(with_params(session.config, trained.params)).qconfig
    wide = set(precisions.resolve(settings)[1].names(QDtype.qint16))
    mix = "".join("6" if name in wide else "8" for name in precisions.promotable)
    if "6" not in mix:
        return
    bare = trial_settings(with_params(session.config, {**point, RATIO: 0.0})).qconfig

    def ask(assignment: str, label: str) -> FinishedTrial | None:
        return session.measure({**point, RATIO: 0.0, ASSIGNMENT: assignment}, f"QAT {label}")

    with session.pass_or_fail():
        fewer = demote(ask, precisions.problem(bare, session.goal.budgets), mix, patience=2)
    session.decide("give back", f"{mix.count('6')} int16 operators before, {fewer.count('6')} after")


def _is_trained(trial: FinishedTrial) -> bool:
    return trial.outcome.metrics.get("qat/steps", 0.0) > 0.0


def _score(trial: FinishedTrial) -> float:
    """Larger is better: the negative drop."""
    return -trial.outcome.metrics["accuracy/drop"]
