"""The fewest int16 operators that meet a goal, and what is recovered at 1.10 times the predicted time of all int8, by
qflow's own search on the float model and on the repaired one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.repair_networks.states import BATCH, State, Subject
from benchmarks.repair_networks.stress import stressed
from qflow.config.device_file import load_cost, load_rules
from qflow.core.repair_settings import RepairSettings
from qflow.core.settings import CalibrationSettings, QConfigSettings, SensitivitySettings, TrialSettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.search.assign import Problem
from qflow.search.cost_terms import CostTerms
from qflow.search.objective import Goal, accurate
from qflow.search.outcome import FinishedTrial, Outcome
from qflow.search.strategies import ASSIGNMENT, BudgetSpent, assign
from qflow.trial.evaluator import Evaluator
from qflow.trial.repaired import Repaired

MARCH = "nash-m"
SLOWDOWN = 1.1
"""Largest predicted time over that of all int8."""
EVALUATIONS = 6
"""Mixes that one search measures at most, beside all int8 and all int16."""


@dataclass
class RepairedEvaluator(Evaluator):
    """An evaluator whose trials all have the weights and methods that `repair_model` gave."""

    given: Repaired | None = None
    bits: int = 8

    def prepare(self) -> QuantizedModel:
        """Prepare as always, with the bits of the stress and the repaired weights."""
        prepared = super().prepare()
        if self.bits < 8:
            stressed(prepared)
        self.weights.use(self.given)
        return prepared

    @contextmanager
    def repaired(self, settings: RepairSettings, calibration: CalibrationSettings) -> Iterator[None]:
        """The weights stay those of `given`, whatever a trial's settings are."""
        yield


@dataclass(frozen=True)
class Mixes:
    """What the searches found for one state of a model."""

    int16: int | None
    """Fewest int16 operators whose drop meets the goal; None if no measured mix meets it."""
    int16_drop: float
    """The drop with all operators at int16 that the device allows there."""
    least: float
    """Least drop of the mixes that take at most SLOWDOWN times the time of all int8; NaN if not searched."""


class _Search:
    def __init__(self, subject: Subject, state: State) -> None:
        self.evaluator = RepairedEvaluator(
            subject.task,
            load_rules(MARCH),
            load_cost(MARCH),
            sensitivity_settings=SensitivitySettings(),
            default_calibration=CalibrationSettings(batch_size=BATCH, steps=len(subject.data)),
            eval_batch=2 * BATCH,
            given=_given(subject, state),
            bits=subject.bits,
        )
        self.evaluator.float_metric = subject.float_metric
        self.evaluator.eval_samples = len(subject.task.data.evaluation)
        self.evaluator.rank()
        self.trials: dict[str, FinishedTrial] = {}

    def measured(self, mix: str, goal: Goal) -> FinishedTrial:
        if mix not in self.trials:
            result = self.evaluator.run_trial(TrialSettings(qconfig=QConfigSettings(assignment=mix)))
            metrics = {"accuracy/drop": result.drop, "cost/slowdown": result.slowdown}
            self.trials[mix] = FinishedTrial(len(self.trials), "", {}, "", Outcome((), {}, {}, metrics), 0.0)
        trial = self.trials[mix]
        outcome = replace(trial.outcome, constraints=goal.constraints(dict(trial.outcome.metrics)))
        return replace(trial, outcome=outcome)

    def run(self, problem: Problem, goal: Goal, explore: bool) -> list[tuple[str, FinishedTrial]]:
        """All mixes that the search measured, with the baselines that keep the limits."""
        found: dict[str, FinishedTrial] = {}

        def measure(point: Mapping[str, Any], label: str = "") -> FinishedTrial:
            mix = point[ASSIGNMENT]
            if len(found) >= EVALUATIONS and mix not in found:
                raise BudgetSpent("search.n_trials")
            found[mix] = self.measured(mix, goal)
            return found[mix]

        ends = {mix: self.measured(mix, goal) for mix in (problem.all_int8, problem.all_int16)}
        low, high = (trial.outcome.metrics["accuracy/drop"] for trial in ends.values())
        with suppress(BudgetSpent):
            assign(measure, {}, problem, max_drop=goal.max_drop, int8_drop=low, int16_drop=high, explore=explore)
        found |= {mix: trial for mix, trial in ends.items() if problem.within(mix)}
        return list(found.items())


def _given(subject: Subject, state: State) -> Repaired:
    before, after = subject.prepared.float_state_dict(), state.model.float_state_dict()
    weights = {name: tensor for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    plain, chosen = subject.prepared.applied.ops, state.model.applied.ops
    methods = {name: op.observer for name, op in chosen.items() if op.observer and op.observer != plain[name].observer}
    assert state.table is not None
    return Repaired(weights, state.table, methods)


def mixes(subject: Subject, state: State, max_drop: float, located: bool) -> Mixes:
    """Search both; the second only where the answer has places."""
    search = _Search(subject, state)
    goal = Goal(max_drop=max_drop)
    problem = search.evaluator.precisions.problem(QConfigSettings())
    fewest: int | None = 0
    if goal.excess(state.drop) > 0:
        count = CostTerms(lambda mix: mix.count("6"), 0.0, {(o.place,): 1.0 for o in problem.operators})
        by_count = search.run(replace(problem, time=count), goal, explore=False)
        fewest = min((mix.count("6") for mix, trial in by_count if accurate(trial)), default=None)
    least = float("nan")
    if located:
        bounded = search.evaluator.precisions.problem(QConfigSettings(), {"max_slowdown": SLOWDOWN})
        by_time = search.run(bounded, Goal(max_drop=0.0), explore=True)
        least = min(trial.outcome.metrics["accuracy/drop"] for _, trial in by_time)
    return Mixes(fewest, search.measured(problem.all_int16, goal).outcome.metrics["accuracy/drop"], least)
