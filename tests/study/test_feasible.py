"""What only the model can refuse: switches that no operator answers to, budgets on costs that cannot be judged."""

import pytest
from support.compose import BASE, compose

from qflow.config.settings import trial_settings
from qflow.config.space import module_settings, search_space
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.setter import covers
from qflow.search.domain import Choice, Interval, Range
from qflow.search.objective import Goal
from qflow.study.feasible import check_budgets, check_feasible, within_data


@pytest.fixture
def grouped(digits_task, nash_m):
    """The digits network as a part of another, so that a name stands above several operators."""
    from torch import nn

    from qflow.cost_model.model import CostModel
    from qflow.tasks.task import make_task
    from qflow.trial.evaluator import Evaluator

    model = nn.Sequential()
    model.add_module("body", digits_task.model)
    model.add_module("head", nn.Linear(10, 10))
    task = make_task(name="grouped", model=model.eval(), data=digits_task.data, metric=digits_task.metric)
    return Evaluator(task, nash_m, CostModel(), eval_batch=256)


def applied(evaluator, config, params):
    qconfig = evaluator.resolve(trial_settings(config, params).qconfig)[1]
    return {name: op.output for name, op in qconfig.ops.items()}


def test_a_switch_covers_the_group_and_a_part_of_it_may_differ(grouped):
    config = compose(
        BASE, "qconfig.int16_ratio=0", "qconfig.modules.body=choice(qint8,qint16)",
        "qconfig.modules.body.conv2=choice(qint8,qint16)",
    )  # fmt: skip
    space = search_space(config)
    check_feasible(grouped, Goal(0.01), module_settings(config, space))
    low = applied(grouped, config, {"qconfig.modules.body": "qint8", "qconfig.modules.body.conv2": "qint8"})
    assert QDtype.qint16 not in low.values()
    body = {name for name in low if covers("body", name)}
    assert len(body) >= 4 and "body[add]" in body  # functionals called in the module, too
    mixed = applied(grouped, config, {"qconfig.modules.body": "qint16", "qconfig.modules.body.conv2": "qint8"})
    assert {name for name in body if mixed[name] == QDtype.qint8} == {"body.conv2"}
    assert all(mixed[name] == low[name] for name in set(low) - body)
    part = applied(grouped, config, {"qconfig.modules.body": "qint8", "qconfig.modules.body.conv2": "qint16"})
    assert {name for name in part if part[name] == QDtype.qint16} == {"body.conv2"}


def test_switches_on_the_digits_model_decide_their_operators(evaluator):
    config = compose(BASE, "qconfig.int16_ratio=0", "qconfig.modules.conv2=choice(qint8,qint16)")
    before = applied(evaluator, config, {"qconfig.modules.conv2": "qint8"})
    after = applied(evaluator, config, {"qconfig.modules.conv2": "qint16"})
    assert {name for name in after if after[name] != before[name]} == {"conv2"}
    assert after["conv2"] == QDtype.qint16


def test_a_switch_that_no_operator_answers_to_is_refused_before_the_first_trial(evaluator):
    config = compose(BASE, "qconfig.modules.conv7=choice(qint8,qint16)")
    with pytest.raises(ConfigError, match="but got conv7"):
        check_feasible(evaluator, Goal(0.01), module_settings(config, search_space(config)))


class Report:
    """What a budget is judged by."""

    def __init__(self, refusal="", lower_bound=False):
        self.refusal = refusal
        self.traffic = type("Traffic", (), {"lower_bound": lower_bound, "bytes": 2_000_000})


@pytest.mark.parametrize(
    ("budget", "report", "says"),
    [
        ({"max_latency_ms": 1.0}, Report(refusal="no price for x"), "but got no price for x. Load a measured profile"),
        ({"max_slowdown": 1.1}, Report(refusal="no price for x"), "but got no price for x. Load a measured profile"),
        ({"max_traffic_mb": 9.0}, Report(lower_bound=True), "a lower bound (2.000 MB all-int8)"),
        ({"max_latency_ms": 1.0}, Report(lower_bound=True), ""),
        ({"max_traffic_mb": 9.0}, Report(refusal="no price for x"), ""),
        ({"max_int16_mac_share": 0.5}, Report(refusal="no price for x", lower_bound=True), ""),
    ],
)
def test_a_cost_that_cannot_be_judged_meets_no_budget(evaluator, monkeypatch, budget, report, says):
    monkeypatch.setattr(evaluator, "cost", lambda qconfig: report)
    if not says:
        check_budgets(evaluator, Goal(0.01, **budget))
        return
    with pytest.raises(ConfigError) as caught:
        check_budgets(evaluator, Goal(0.01, **budget))
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert f"objective.{next(iter(budget))}=null" in str(caught.value)


def test_traffic_of_a_device_without_its_memory_is_a_lower_bound(evaluator):
    with pytest.raises(ConfigError, match=r"device\.cost\.onchip_mb"):
        check_budgets(evaluator, Goal(0.01, max_traffic_mb=9.0))


def test_the_metrics_that_can_be_optimized_are_those_of_a_run(evaluator):
    from qflow.core.settings import CalibrationSettings, TrialSettings
    from qflow.study.outcome import outcome
    from qflow.trial.record import RUN_METRICS

    result = evaluator.run_trial(TrialSettings(calibration=CalibrationSettings(batch_size=16, steps=4)))
    goal = Goal(0.01, optimize={"cost/traffic_mb": "minimize"}).aimed("accuracy/accuracy", "maximize", (*RUN_METRICS,))
    found = outcome(result, goal, "accuracy/accuracy", {}, result.samples)
    assert set(found.metrics) == {"accuracy/accuracy", "goal/meets", *RUN_METRICS} - {"qat/steps", "qat/loss"}
    assert found.objectives == (found.metrics["cost/traffic_mb"],)


def test_the_space_of_calibrations_ends_where_the_data_do(digits_task):
    samples = len(digits_task.data.calibration)
    space = {
        "calibration.batch_size": Choice((16, samples, 2 * samples)),
        "calibration.steps": Choice((4, samples // 16, samples // 16 + 1, 10 * samples)),
        "qconfig.int16_ratio": Interval(0.0, 1.0),
    }
    found, said = within_data(space, digits_task)
    assert found["calibration.batch_size"].values == (16, samples)
    assert found["calibration.steps"].values == (4, samples // 16)
    assert found["qconfig.int16_ratio"] == space["qconfig.int16_ratio"]
    assert [text.split(":")[0] for text in said] == ["calibration.batch_size", "calibration.steps"]
    assert said[0].endswith(f"values above {samples} are left out: it reads the whole calibration set")
    steps = {"calibration.steps": Interval(1, 10**6, integer=True)}
    assert within_data(steps, digits_task)[0]["calibration.steps"].high == samples
    steps = {"calibration.steps": Range(100, 10**6, 100)}
    assert max(within_data(steps, digits_task)[0]["calibration.steps"].points()) == -(-samples // 100) * 100
    assert within_data(found, digits_task) == (found, [])
