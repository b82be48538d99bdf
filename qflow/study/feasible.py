"""Checks of a study that need its model; they run before the first trial, so that not every trial fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from omegaconf import DictConfig, OmegaConf

from qflow.config.space import module_settings
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError, QflowError
from qflow.core.settings import QConfigSettings
from qflow.search.domain import Domain, Interval, Range
from qflow.search.objective import Goal, meets
from qflow.search.outcome import FinishedTrial
from qflow.tasks.early_stop import bounds_of
from qflow.tasks.task import Task, split_for
from qflow.trial.evaluator import Evaluator
from qflow.trial.frames import steps_of

BATCH_SIZE, STEPS = "calibration.batch_size", "calibration.steps"


def check_before(
    config: DictConfig, evaluator: Evaluator, goal: Goal, space: Mapping[str, Domain], say: Callable[[str], None]
) -> None:
    """Raise ConfigError for what no trial could do; say the latency that `max_slowdown` allows."""
    check_feasible(evaluator, goal, module_settings(config, space))
    if goal.max_slowdown is not None:
        ms = evaluator.precisions.int8_ms
        say(
            f"{'budget':<12} max_slowdown {goal.max_slowdown:g} allows {goal.max_slowdown * ms:.3f} ms: the cost model "
            f"predicts {ms:.3f} ms with every operator at int8"
        )

    def may_be_true(key: str) -> bool:
        domain = space.get(key)
        return domain.contains(True) if domain else bool(OmegaConf.select(config, key))

    check_augmented(evaluator.task, may_be_true("calibration.augment"), may_be_true("qat.augment"))
    if config.search.early_stop:
        bounds_of(evaluator.task.metric)  # raises here instead of in the first trial


def check_feasible(evaluator: Evaluator, goal: Goal, switched: Sequence[QConfigSettings]) -> None:
    """Raise ConfigError for budgets that cannot be judged, and for `switched` settings that the model cannot have.

    There is one of them for each value of each searched module; it must match an operator and suit the device.
    """
    check_budgets(evaluator, goal)
    for settings in switched:
        evaluator.resolve(replace(settings, int16_ratio=0.0))


def within_data(space: Mapping[str, Domain], task: Task) -> tuple[dict[str, Domain], list[str]]:
    """Return the search space without values that ask for more calibration data than there are, and what is left out.

    A calibration set that is too small is used whole, so of the values that do so the smallest one is enough.
    """
    found, said = dict(space), []
    most = {BATCH_SIZE: len(task.data.calibration)}
    for key in (BATCH_SIZE, STEPS):
        if key == STEPS:
            sizes = found[BATCH_SIZE].points() if BATCH_SIZE in found else ()
            most[STEPS] = steps_of(task, min((int(size) for size in sizes), default=1))  # type: ignore[arg-type]
        domain = found.get(key)
        if isinstance(domain, Interval):
            found[key] = replace(domain, high=min(domain.high, max(most[key], domain.low)))
        elif domain is not None:
            values = [v for v in domain.points() if isinstance(v, (int, float))]
            whole = min((v for v in values if v >= most[key]), default=math.inf)
            if isinstance(domain, Range):
                found[key] = replace(domain, stop=min(domain.stop, whole + domain.step))
            else:
                kept = (v for v in domain.points() if not isinstance(v, (int, float)) or v <= whole)
                found[key] = replace(domain, values=tuple(kept))
        if domain is not None and found[key] != domain:
            said.append(f"{key}: values above {_largest(found[key])} are left out: it reads the whole calibration set")
    return found, said


def _largest(domain: Domain) -> float:
    return (
        domain.high if isinstance(domain, Interval) else max(v for v in domain.points() if isinstance(v, (int, float)))
    )


def check_augmented(task: Task, calibration: bool, training: bool) -> None:
    """Raise ConfigError if trials calibrate or train on augmented data and the task has none."""
    split_for(task, "calibration", calibration)
    split_for(task, "train", training)


def check_budgets(evaluator: Evaluator, goal: Goal) -> None:
    """Raise ConfigError for a budget on a cost that is a lower bound or outside the validated range of the cost model.

    A wrong number must not meet a budget.
    """
    on_latency = [name for name in ("max_latency_ms", "max_slowdown") if name in goal.budgets]
    if not on_latency and goal.max_traffic_mb is None:
        return
    report = evaluator.cost(evaluator.template(QDtype.qint8)[1])
    for name in on_latency if report.refusal else ():
        raise ConfigError(
            f"objective.{name} needs a latency that can be judged, but got {report.refusal}. Load a measured profile "
            f"(device.profile=<report>), or drop the budget: objective.{name}=null."
        )
    if goal.max_traffic_mb is not None and report.traffic.lower_bound:
        raise ConfigError(
            f"objective.max_traffic_mb needs traffic that can be judged, but got a lower bound "
            f"({report.traffic.bytes * 1e-6:.3f} MB all-int8): what spills is unknown without device.cost.onchip_mb. "
            "Set that, or drop the budget: objective.max_traffic_mb=null."
        )


def too_costly(
    evaluator: Evaluator, goal: Goal, int16: FinishedTrial | None, qconfig: Callable[[], QConfigSettings]
) -> str:
    """Return why a trial with the settings of `qconfig` cannot be the best because of its cost, or an empty text.

    `int16` is the trial of all-int16: if least latency is the first aim and it meets the goal, none that is slower can.
    """
    budgets = goal.budgets
    if int16 is not None and meets(int16) and next(iter(goal.ranking), "") == "cost/latency_ms":
        budgets["max_latency_ms"] = int16.outcome.metrics["cost/latency_ms"]
    if not budgets:
        return ""
    try:
        return "" if evaluator.precisions.within(qconfig(), budgets) else "it costs too much to be the best"
    except QflowError:
        return ""  # the trial will fail with this error as its reason
