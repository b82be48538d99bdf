"""The baselines all-int16 and all-int8, by which the tree of the tuning guide decides, and mixes are judged.

A baseline is what its label says, whatever else is configured. Operators that the user pins (`qconfig.modules`,
`qconfig.rules`) keep their precision, and the label names them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qflow.config.settings import current, trial_settings
from qflow.core.dtype import QDtype
from qflow.core.errors import TrialError
from qflow.search.domain import Choice
from qflow.search.objective import CONSTRAINT, accurate, nearest_miss
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import RATIO, BudgetSpent
from qflow.study.at_once import at_once
from qflow.study.session import Session
from qflow.trial.outputs import outputs_off_under

ALL_INT16, ALL_INT8 = "all-int16", "all-int8"
METHOD, MODULES = "calibration.method", "qconfig.modules."
NAMED = 2  # how many pinned operators a label names
PROMOTES_OUTPUTS: Mapping[str, str] = {"qconfig.sensitive_type": "activation", "qconfig.counting": "operators"}
"""What a ratio must promote to mean all outputs at 1.0: other rows would turn all-int16 into another mix."""


def baseline(session: Session, label: str) -> FinishedTrial | None:
    """Return the most accurate trial of `label`, all-int16 or all-int8, over the searched calibration methods.

    None stands for outputs that are not finite: the mix misses any goal. Raises TrialError if the trial fails for
    another reason, because a study cannot judge trials without its baselines.
    """
    point = baseline_point(session, label)
    pinned = pins(session, label, point)
    most = (session.config.search.n_trials - 2) // 4
    found = best_calibration(session, point, _named(label, pinned), most)
    trained = point.get("qat.steps", session.config.qat.steps)  # then the training is at fault, not the mix
    if found is None and (trained or not session.broken(point)):
        raise TrialError(f"A study needs its baseline {label}, but that trial failed. Its line above says why.")
    if found is not None:
        session.baselines[label] = found
    if pinned:
        session.decide(label, f"the configuration keeps at another precision: {_listed(pinned)}")
    return found


def measure_baselines(session: Session) -> None:
    """Measure all-int16 and all-int8 at once if there are workers for that; `baseline` then finds their trials."""
    points = {label: baseline_point(session, label) for label in (ALL_INT16, ALL_INT8)}
    at_once(session)([(point, _named(label, pins(session, label, point))) for label, point in points.items()])


def _named(label: str, pinned: Mapping[str, str]) -> str:
    shown = _listed(pinned) if len(pinned) <= NAMED else f"{len(pinned)} operators pinned"
    return f"{label} ({shown})" if pinned else label


def _listed(pinned: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {what}" for name, what in pinned.items())


def baseline_point(session: Session, label: str) -> dict[str, Any]:
    """Return the point of the baseline `label`: searched modules at its dtype, the share of int16 at its end.

    Modules that a branch keeps at fp16 stay there.
    """
    modules = [key for key in session.study.space if key.startswith(MODULES) and key not in session.kept]
    ratio, dtype = (1.0, "qint16") if label == ALL_INT16 else (0.0, "qint8")
    plain = {k: v for k, v in PROMOTES_OUTPUTS.items() if k in session.study.space or current(session.config, k) != v}
    return {**session.base(), **dict.fromkeys(modules, dtype), **plain, RATIO: ratio}


def free_point(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the params of a baseline without the keys that made it one, to search a mix with its calibration."""
    return {key: value for key, value in params.items() if key not in PROMOTES_OUTPUTS}


def pins(session: Session, label: str, point: Mapping[str, Any]) -> dict[str, str]:
    """Return the operators that the user's settings keep at another precision than `label`, with that precision."""
    dtype = QDtype.qint16 if label == ALL_INT16 else QDtype.qint8
    plain = session.evaluator.template(dtype)[1]
    found = plain.diff(session.evaluator.resolve(session.qconfig_at(point))[1])
    outputs = {name: b.output for name, (a, b) in found.items() if a and b and a.output != b.output}
    weights = {name: b.weight for name, (a, b) in found.items() if a and b and a.weight != b.weight}
    named = {name: "high-precision output" if out is None else str(out) for name, out in outputs.items()}
    return {**named, **{name: f"{weight} weight" for name, weight in weights.items() if name not in outputs}}


def best_calibration(session: Session, point: Mapping[str, Any], label: str, most: int = 1) -> FinishedTrial | None:
    """Return the most accurate trial at `point` over the searched calibration methods, the present one first.

    While the goal is missed, at most `most` other methods follow (the guide's basic tuning), those with the least error
    on the bad cases first. A method with exactly the error of another gives the same model and is left out. None if no
    trial gives finite outputs. Raises BudgetSpent before the first trial.
    """
    first = session.measure(point, label)
    trials = [first] if first is not None else []
    if not accurate(first):
        for at in other_methods(session, point)[:most]:
            try:
                trial = session.measure(at, f"{label} {at[METHOD]}")
            except BudgetSpent:
                break
            trials += [trial] if trial is not None else []
            if accurate(trial):
                break
    return min(trials, key=lambda t: t.outcome.constraints[CONSTRAINT], default=None)


def retry_calibration(session: Session, missed: Sequence[FinishedTrial]) -> FinishedTrial | None:
    """Measure the nearest miss among `missed` under the most promising other calibration; return it if that meets.

    A branch is given up only after that, because its mixes were tried under one calibration.
    """
    nearest = nearest_miss(missed, session.goal.ranking)
    found = best_calibration(session, nearest.params, nearest.label) if nearest is not None else None
    return found if accurate(found) else None


def other_methods(session: Session, point: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return `point` with each other searched calibration method that gives another model, the most promising first."""
    domain = session.study.space.get(METHOD)
    points = [{**point, METHOD: method} for method in (domain.values if isinstance(domain, Choice) else ())]
    tried, errors = {_error(session, point)}, []
    for at in points:
        error = _error(session, at)
        if at[METHOD] != method_of(session, point) and (error == math.inf or error not in tried):
            errors.append((error, at))
        tried.add(error)
    return [at for _, at in sorted(errors, key=lambda pair: pair[0])]


def _error(session: Session, point: Mapping[str, Any]) -> float:
    """Return how far the outputs at `point` are from float on the bad cases; infinity if they are not finite."""
    return outputs_off_under(session.evaluator, trial_settings(session.config_at(point)))


def method_of(session: Session, point: Mapping[str, Any]) -> str:
    """Return the calibration method of a trial at `point`."""
    return str(point.get(METHOD, session.config.calibration.method))
