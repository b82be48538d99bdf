"""Nothing is kept at int16 or fp16 that the goal does not need: what a search found is measured without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from qflow.core.dtype import QDtype
from qflow.search.objective import accurate, best_trial
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import (
    ASSIGNMENT,
    DEMOTED,
    ERROR_SHARE,
    RATIO,
    SENSITIVE_TYPE,
    BudgetSpent,
    demote,
    leave_out,
)
from qflow.study.session import Session

PATIENCE = 3  # operators in a row that prove needed, after which a mix counts as needed


def lower_best(session: Session) -> None:
    """Demote the int16 operators and weights that the best mix of a search does not need, while the budget lasts.

    It starts from the best trial that is not such a demotion itself, so that a study that continues asks for the same
    trials again, which it has.
    """
    trials = [t for t in session.trials if not t.label.startswith(DEMOTED) and not t.outcome.metrics.get("qat/steps")]
    start = best_trial(trials, session.goal.ranking)
    if start is not None:
        with suppress(BudgetSpent):
            session.budget.require(session.trials, session.untrained_best is not None)
            demoted(session, start, PATIENCE)


def demoted(
    session: Session, trial: FinishedTrial, patience: int, label: str = "", *, int8_misses: bool = True
) -> tuple[int, int]:
    """Demote int16 operators and weights of a mix as long as the goal is met; return how many it had, and has now.

    Everything else of the trial stays. `label` begins those of the trials. If `int8_misses`, all int8 is not tried.
    """
    params = {k: v for k, v in trial.params.items() if k not in (RATIO, ASSIGNMENT, ERROR_SHARE)}
    point: dict[str, Any] = {**params, RATIO: 0.0}
    if trial.outcome.metrics.get("qconfig/n_int16_weights"):
        point |= {SENSITIVE_TYPE: "both", "qconfig.counting": "operators"}
    settings, precisions = session.qconfig_at(point), session.evaluator.precisions
    applied = precisions.resolve(session.qconfig_at(trial.params))[1]
    mix = precisions.mix(settings, applied.names(QDtype.qint16), applied.weights(QDtype.qint16))
    if "6" not in mix:
        return 0, 0

    def ask(assignment: str, name: str) -> FinishedTrial | None:
        return session.measure({**point, ASSIGNMENT: assignment}, f"{label}{name}")

    problem = precisions.problem(settings, session.goal.budgets)
    with session.pass_or_fail():
        fewer = demote(ask, problem, mix, patience, missed=[problem.all_int8] if int8_misses else ())
    return mix.count("6"), fewer.count("6")


def without_needless(
    session: Session,
    found: FinishedTrial,
    chosen: Sequence[str],
    at: Callable[[Sequence[str]], Mapping[str, Any]],
    what: str,
) -> FinishedTrial:
    """Return the trial with the fewest of the `chosen` operators that still meets the goal; `found` has all of them.

    A prefix of a ranking may hold operators that the goal does not need. `at` gives the point with some of them, `what`
    names them in labels.
    """
    kept = list(chosen)

    def without(group: Sequence[str]) -> bool:
        nonlocal found, kept
        fewer = [name for name in kept if name not in group]
        trial = session.measure(at(fewer), f"{what}={len(fewer)}") if fewer else None
        if not accurate(trial):  # with none of them it was measured before
            return False
        found, kept = trial, fewer
        return True

    try:
        leave_out(list(reversed(chosen)), without, patience=len(chosen))
    except BudgetSpent:
        return found
    return found
