"""The guide's QAT as a stage of its own, after the search, in three parts:

rates     train with qat.learning_rate and search.rates for a share of the steps, without scheduler (train_rate.py)
halving   train with fixed and with moving activation scales (with learned ones instead, if qat.learned_scales is set),
          each with every search.weight_decays, with the scheduler; the better half continues from its checkpoint until
          one candidate has all the steps (at most 20 % of the float steps, `QatSettings.capped`), or meets the goal
          beyond its noise
demote    set int16 operators of the trained mix to int8 and train alike, as long as the goal is met
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qflow.config.settings import trial_settings
from qflow.search.objective import best_trial, meets, nearest_miss, over_budget
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import BudgetSpent, halving
from qflow.study.fewer import demoted
from qflow.study.paired import goal_margin
from qflow.study.session import Session
from qflow.study.train_rate import find_rate, rates
from qflow.trial.training import NO_TRAIN_SPLIT, train_split

DEMOTIONS = 6  # trials that are reserved for demotion
RUNGS = 3  # rungs of the halving: a quarter, half, and all of the steps


def leave_for_training(session: Session) -> None:
    """Print when trials are trained. If that is after the search, switch training off until then and reserve trials."""
    qat, search = session.config.qat, session.config.search
    if qat.steps and qat.apply == "after_search":
        alive, trainings = 2 * len(search.weight_decays), len(rates(session.config)) + DEMOTIONS
        steps, cut = trial_settings(session.config).qat.capped()
        for _ in _rungs(steps):
            trainings, alive = trainings + alive, max(alive // 2, 1)
        session.kept["qat.steps"], session.budget.reserved = 0, trainings
        text = "; ".join([f"after the search, {steps} steps (qat.apply=after_search)", *cut])
        session.console.say(f"{'training':<12} {text}")
    elif qat.steps:
        session.console.say(
            f"{'training':<12} each trial is trained after its calibration: {qat.steps} steps (qat.steps)"
        )
    settings, training, task = trial_settings(session.config).qat, session.evaluator.training, session.evaluator.task
    unlabelled = training is not None and training.loss is None
    if settings.steps and unlabelled and train_split(task, settings, labels=False) == "calibration":
        session.console.say(f"{'':<12} {NO_TRAIN_SPLIT}")
    if hint := settings.unchecked:
        session.console.say(f"{'':<12} {hint}")


def train_nearest(session: Session) -> None:
    """Train the trial nearest to the goal, if training was left to this stage and no trial meets the goal."""
    if session.untrained_best is not None or session.kept.get("qat.steps") != 0:
        return
    nearest = nearest_miss([t for t in session.trials if not _is_trained(t)], session.goal.ranking)
    if nearest is None:
        return
    if over := over_budget(nearest):  # then no trial is within the budgets, and training changes no cost
        session.decide("training", f"does not help: the nearest, trial {nearest.number}, exceeds {', '.join(over)}")
        return
    del session.kept["qat.steps"]
    session.budget.reserved = 0
    session.decide("training", f"from trial {nearest.number} {nearest.label}".rstrip() + ", the nearest to the goal")
    train(session, nearest)


def train(session: Session, start: FinishedTrial) -> None:
    """Train the mix of `start`; if a trained trial meets the goal, demote int16 operators of it."""
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
    """Search the rate, then scales and weight decay; return the best trained trial that meets the goal, or None.

    It ends with the first trial that meets the goal beyond its noise.
    """
    done: list[FinishedTrial] = []

    def measure(point: Mapping[str, Any], label: str) -> FinishedTrial | None:
        trial = session.measure(point, label)
        done.extend([trial] if trial is not None else [])
        return trial

    def enough(trial: FinishedTrial | None) -> bool:
        return meets(trial) and (margin := goal_margin(session, trial)) is not None and margin.sure

    search, (steps, _) = session.config.search, trial_settings(session.config).qat.capped()
    final = find_rate(session, measure, {**point, "qat.scheduled": False}, max(round(steps * search.probe_share), 1))
    if final is None:
        return None
    if not enough(final):
        rate = final.params["qat.learning_rate"]
        candidates = [
            {**point, "qat.learning_rate": rate, "qat.scheduled": True, **scales, "qat.weight_decay": decay}
            for decay in search.weight_decays
            for scales in _scales(session.config.qat.learned_scales, session.config.qat.moving)
        ]
        final = next(iter(halving(measure, candidates, _rungs(steps), enough)), None)
        if final is None:
            failed = f"every training at rate {rate:g} with the scheduler fails"
            session.decide("training", f"{failed}; add lower rates to search.rates")
    if final is not None:
        session.decide("training", _ending(session, final, steps))
    return best_trial(done, session.goal.ranking)


def _ending(session: Session, final: FinishedTrial, steps: int) -> str:
    """Return how the last training was done and what it reached; why it ended early, if it did."""
    at = {**session.base(), **final.params}
    learned, moving, decay = (
        at.get(f"qat.{key}", session.config.qat[key]) for key in ("learned_scales", "moving", "weight_decay")
    )
    scales, taken = "learned" if learned else "moving" if moving else "fixed", final.outcome.metrics["qat/steps"]
    early = ""
    if taken < steps and meets(final):
        early = f", which meets the goal by {goal_margin(session, final)}: the other {steps - taken:.0f} are left out"
    drop = final.outcome.metrics["accuracy/drop"]
    return f"{scales} activation scales, weight decay {decay:g}: drop {drop:+.4f} after {taken:.0f} steps{early}"


def _scales(learned: float, moving: bool) -> tuple[dict[str, Any], ...]:
    """Return the two ways to treat activation scales that are compared, the configured one first."""
    if not learned:
        return {"qat.moving": moving}, {"qat.moving": not moving}
    return tuple({"qat.moving": False, "qat.learned_scales": rate} for rate in (learned, 0.0))


def _rungs(steps: int) -> list[int]:
    """Return the numbers of steps of the rungs; after each rung the worse half of the candidates is dropped."""
    return sorted({max(steps // 2**k, 1) for k in range(RUNGS)})


def _demote(session: Session, trained: FinishedTrial) -> None:
    """Demote int16 operators under the same training, which may have made most of them unnecessary."""
    before, after = demoted(session, trained, 2, "QAT ", int8_misses=False)
    if before:
        session.decide("demote", f"{before} int16 operators before, {after} after")


def _is_trained(trial: FinishedTrial) -> bool:
    return trial.outcome.metrics.get("qat/steps", 0.0) > 0.0


def _score(trial: FinishedTrial) -> float:
    """Return the negative drop: larger is better."""
    return -trial.outcome.metrics["accuracy/drop"]
