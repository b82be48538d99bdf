"""The repair of a study judged by the task's metric: all-int8 with it against all-int8 without it."""

from __future__ import annotations

from qflow.core.repair_settings import RepairSettings
from qflow.search.noise import SIGMAS
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import BudgetSpent
from qflow.study.baselines import ALL_INT8
from qflow.study.paired import paired_noise
from qflow.study.session import Session
from qflow.study.stages import diagnose

UNREPAIRED, REPAIRED = f"{ALL_INT8} unrepaired", f"{ALL_INT8} repaired"
DROP = "accuracy/drop"


def better_without(session: Session, int8: FinishedTrial) -> FinishedTrial:
    """Return all-int8 as the study goes on with it: `int8`, or the one without repair where that is surely better.

    The repair was decided on the errors of the outputs, without labels. If the metric contradicts it beyond the noise,
    it is given up, and the analysis is made again. Nothing is measured if nothing was repaired.
    """
    evaluator = session.evaluator
    if evaluator.weights.now is None or not evaluator.weights.now.changed:
        return int8
    off = {f"repair.{step}": False for step in evaluator.default_repair.steps}
    try:
        plain = session.measure({**int8.params, **off}, UNREPAIRED)
    except BudgetSpent:
        return int8
    if plain is None:
        session.decide("repair", "kept: without it all-int8 gives no finite outputs")
        return int8
    before, after = plain.outcome.metrics[DROP], int8.outcome.metrics[DROP]
    noise = paired_noise(session, int8, plain)
    lost = after > before and (after - before > SIGMAS * noise.error or not noise.known)
    known = f"noise {SIGMAS * noise.error:.4f}" if noise.known else "noise not known"
    verdict = "given up" if lost else "kept"
    session.baselines.pop(ALL_INT8, None)
    session.baselines |= {REPAIRED: int8, ALL_INT8: plain} if lost else {UNREPAIRED: plain, ALL_INT8: int8}
    session.decide("repair", f"{verdict}: drop of all-int8 {before:+.4f} without it, {after:+.4f} with it ({known})")
    if not lost:
        return int8
    session.kept |= off
    evaluator.default_repair = RepairSettings()
    evaluator.repair()
    diagnose(session)
    return plain
