"""The fewest int16 operators that meet a goal, and what is recovered at 1.10 times the predicted time of all int8, by
qflow's own search on the float model and on the repaired one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from benchmarks.repair_networks.states import BATCH, State, Subject
from benchmarks.repair_networks.stress import stressed
from qflow.config.device_file import load_cost, load_rules
from qflow.core.dtype import QDtype
from qflow.core.qconfig import QConfig
from qflow.core.settings import CalibrationSettings, QConfigSettings, SensitivitySettings, TrialSettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.search.assign import Problem
from qflow.search.cost_terms import CostTerms
from qflow.search.objective import Goal, accurate
from qflow.search.outcome import FinishedTrial, Outcome
from qflow.search.strategies import ASSIGNMENT, BudgetSpent, assign
from qflow.trial.evaluator import Evaluator

MARCH = "nash-m"
SLOWDOWN = 1.1
"""Largest predicted time over that of all int8."""
EVALUATIONS = 6
"""Mixes that one search measures at most, beside all int8 and all int16."""


@dataclass
class RepairedEvaluator(Evaluator):
    """An evaluator of a model that `repair_model` gave."""

    state: State | None = None
    bits: int = 8

    def prepare(self) -> QuantizedModel:
        """Prepare as always, with the bits of the stress."""
        prepared = super().prepare()
        if self.bits < 8:
            stressed(prepared)
        return prepared

    def resolve(self, settings: QConfigSettings) -> tuple[QConfig, QConfig]:
        """Return the (requested, applied) qconfig, with the calibration that the repair chose for int8 outputs."""
        requested, applied = super().resolve(settings)
        assert self.state is not None
        chosen = self.state.model.applied.ops
        return requested, applied.with_ops(
            {
                name: replace(
                    op,
                    observer=chosen[name].observer,
                    own_observer=chosen[name].own_observer,
                    fixed_scale=chosen[name].fixed_scale,
                )
                for name, op in applied.ops.items()
                if name in chosen and op.output == chosen[name].output == QDtype.qint8
            }
        )


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
        model = _float_of(subject, state)
        steps = max(len(subject.data), 1)
        self.evaluator = RepairedEvaluator(
            replace(subject.task, model=model),
            load_rules(MARCH),
            load_cost(MARCH),
            sensitivity_settings=SensitivitySettings(),
            default_calibration=CalibrationSettings(batch_size=BATCH, steps=steps),
            eval_batch=2 * BATCH,
            state=state,
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


def _float_of(subject: Subject, state: State) -> nn.Module:
    model = copy.deepcopy(subject.task.model)
    model.load_state_dict(state.model.float_state_dict())
    return model


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
