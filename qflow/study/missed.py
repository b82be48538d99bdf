"""What stands behind "the goal is missed": the last mixes worth a trial, what was tried, and what was not.

Before a study says that it missed the goal, it measures the mixes of its space that single promotions, as measured in
the sensitivity table, predict to meet it. The drop of a mix is read from the measured trials: it rises with the
predicted error, and a mix without error has no drop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from qflow.core.dtype import QDtype
from qflow.search.assign import Problem
from qflow.search.objective import nearest_miss
from qflow.search.outcome import FailedTrial, FinishedTrial
from qflow.search.strategies import ASSIGNMENT, ERROR_SHARE, FLOAT16, RATIO, SENSITIVE_TYPE, BudgetSpent
from qflow.study.baselines import (
    ALL_INT8,
    ALL_INT16,
    METHOD,
    MODULES,
    baseline_point,
    method_of,
    other_methods,
)
from qflow.study.int16_weights import weights_that_matter
from qflow.study.session import Session

BUDGETS = 16  # error budgets over the whole range, for each of which the cheapest mix is a candidate
PROMISING = "predicted to meet"  # label of such a trial
MIXED = ("int8_int16", "int8_int16_fp16", "full")  # workflows that search a mix
ATTEMPTS = 4  # how many promising mixes are measured; each corrects the prediction for the next


def measure_promising(session: Session) -> None:
    """Measure mixes that are predicted to meet the goal, cheapest first, until one does or none is left.

    Does nothing if a trial meets the goal. A budget that is spent leaves them to the verdict, which names them.
    """
    attempts = ATTEMPTS - sum(trial.label.startswith(PROMISING) for trial in session.trials)  # of all starts
    for _ in range(attempts):
        found = promising(session) if session.untrained_best is None else []
        if not found:
            return
        point, mix, _ = found[0]
        try:
            session.measure({**point, ASSIGNMENT: mix}, f"{PROMISING}: {mix.count('6')} int16")
        except BudgetSpent:
            return


def promising(session: Session) -> list[tuple[Mapping[str, Any], str, float]]:
    """Return (point, mix, predicted drop) of unmeasured mixes within the budgets that are predicted to meet the goal.

    They start from the calibration and the fp16 operators of the nearest miss; the cheapest comes first.
    """
    nearest = nearest_miss(_whole(session), session.goal.ranking)
    if nearest is None or session.evaluator.sensitivities is None:
        return []
    point = {k: v for k, v in nearest.params.items() if k not in (ASSIGNMENT, ERROR_SHARE)}
    point |= {RATIO: 0.0, SENSITIVE_TYPE: "both", "qconfig.counting": "operators", "qconfig.ranking": "score"}
    problem = session.evaluator.precisions.problem(session.qconfig_at(point), session.goal.budgets)
    known = _known(session, point)
    near = _mix(session, nearest)
    candidates = {problem.cheapest(problem.budget((k / BUDGETS) ** 2)) for k in range(BUDGETS)} | {problem.finest}
    candidates |= {problem.flipped(near, o.place) for o in problem.operators if near[o.place] == "8"}
    drops = {mix: _predicted(problem, known, mix) for mix in candidates - known.keys() if problem.within(mix)}
    good = sorted((problem.price(mix), drop, mix) for mix, drop in drops.items() if drop <= session.goal.max_drop)
    return [(point, mix, drop) for _, drop, mix in good if not session.broken({**point, ASSIGNMENT: mix})]


def _known(session: Session, point: Mapping[str, Any]) -> dict[str, float]:
    """Return the least measured drop of each mix, of trials with the fp16 operators and pinned modules of `point`."""
    found: dict[str, float] = {}
    pinned = _pinned(point)
    for trial in _whole(session):
        if _pinned(trial.params) != pinned:
            continue
        mix, drop = _mix(session, trial), trial.outcome.metrics["accuracy/drop"]
        found[mix] = min(drop, found.get(mix, drop))
    return found


def _mix(session: Session, trial: FinishedTrial) -> str:
    """Return the int16 outputs and weights of a trial as an assignment with a letter for each weight."""
    settings, precisions = session.qconfig_at(trial.params), session.evaluator.precisions
    applied = precisions.resolve(settings)[1]
    both = replace(settings, sensitive_type="both")
    return precisions.mix(both, applied.names(QDtype.qint16), applied.weights(QDtype.qint16))


def _pinned(params: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in params.items() if f"{key}.".startswith(MODULES) or key == FLOAT16}


def _predicted(problem: Problem, known: Mapping[str, float], mix: str) -> float:
    """Return the drop of `mix`, interpolated from the measured ones by predicted error; no error is no drop.

    Beyond the largest measured error nothing is known, so nothing is promised.
    """
    points = sorted([(0.0, 0.0), *((problem.error(at), max(drop, 0.0)) for at, drop in known.items())])
    levels = np.maximum.accumulate([drop for _, drop in points])
    return float(np.interp(problem.error(mix), [error for error, _ in points], levels, right=np.inf))


def _whole(session: Session) -> list[FinishedTrial]:
    """Return the trials without training that were evaluated to the end; what ended early has no drop of its own."""
    return [t for t in session.trials if not t.outcome.metrics.get("qat/steps") and not t.stopped]


def tried(session: Session) -> str:
    """Return what the study has measured, by kind of mix."""
    ends = {label: _methods(session, label) for label in (ALL_INT8, ALL_INT16)}
    parts = [f"{label} under {', '.join(methods)}" for label, methods in ends.items() if methods]
    free = [t for t in session.trials if not t.label.startswith((ALL_INT8, ALL_INT16))]
    fp16, weights = (
        [t for t in free if t.outcome.metrics.get(f"qconfig/{count}")] for count in ("n_float16", "n_int16_weights")
    )
    kinds = {
        "trained": [t for t in free if t.outcome.metrics.get("qat/steps")],
        "with fp16 and int16 weights": [t for t in fp16 if t in weights],
        "with fp16": fp16,
        "with int16 weights": weights,
        "of int8 and int16": free,
    }
    seen: set[int] = set()
    for kind, trials in kinds.items():
        own = [t for t in trials if t.number not in seen]
        seen |= {t.number for t in own}
        if own:
            counts = sorted({int(t.outcome.metrics["qconfig/n_int16"]) for t in own})
            span = f"{counts[0]} to {counts[-1]}" if counts[0] < counts[-1] else str(counts[0])
            parts.append(f"{len(own)} mix{'es' * (len(own) > 1)} {kind} (int16 operators: {span})")
    return "; ".join(parts)


def not_tried(session: Session) -> str:
    """Return what of the search space was not measured, and what lies beyond it, with the settings that add it."""
    workflow = session.config.workflow
    parts = []
    for label in (ALL_INT8, ALL_INT16):
        known = _methods(session, label)
        left = other_methods(session, baseline_point(session, label)) if known else []
        names = [str(at[METHOD]) for at in left if at[METHOD] not in known]
        parts += [f"{label} under {', '.join(names)} (search.n_trials)"] if names else []
    if left_over := promising(session):
        _, mix, drop = left_over[0]
        way = "search.n_trials" if workflow in MIXED else "+experiment=int8_int16"
        many = f"{len(left_over)} mixes that are" if len(left_over) > 1 else "1 mix that is"
        parts.append(
            f"{many} predicted to meet the goal, the cheapest with {mix.count('6')} int16 operators and weights and a "
            f"drop of {drop:+.4f} ({way})"
        )
    weights = weights_that_matter(session, baseline_point(session, ALL_INT16), QDtype.qint16)
    if weights and not any(t.outcome.metrics.get("qconfig/n_int16_weights") for t in session.trials):
        parts.append(f"int16 weights ({'+experiment=int8_int16' if workflow == 'int8' else 'search.n_trials'})")
    if session.evaluator.rules.float16_kinds and not any(stage == "int16/fp16" for stage, _ in session.decisions):
        reaches = workflow in ("full", "int16_fp16", "int8_int16_fp16")
        parts.append(f"fp16 operators ({'this branch was not reached' if reaches else '+experiment=full'})")
    if not any(t.outcome.metrics.get("qat/steps") for t in session.trials):
        way = "it was not reached" if session.config.qat.steps else "qat=<yours> qat.apply=after_search"
        parts.append(f"training ({way})")
    return "; ".join(parts)


def _methods(session: Session, label: str) -> list[str]:
    """Return the calibration methods under which a baseline was measured, with those that gave no finite outputs."""
    trials: list[FinishedTrial | FailedTrial] = [*session.trials]
    trials += [t for t in session.driver.failed.values() if t.lasting] if session.driver else []
    trials = [t for t in trials if t.label.startswith(label)]
    return list(dict.fromkeys(method_of(session, t.params) for t in sorted(trials, key=lambda t: t.number)))
