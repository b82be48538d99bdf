"""What a metric says beside its value: on the runs of trials and of the float model, by names that a run takes."""

import pytest

from qflow.core.errors import ConfigError
from qflow.core.settings import QConfigSettings, TrialSettings
from qflow.tasks.details import details_of
from qflow.tasks.digits import Accuracy
from qflow.tasks.task import make_task
from qflow.trial.evaluator import Evaluator
from qflow.trial.record import Evaluation, metrics_of, run_metrics


class ByDigit:
    """Accuracy as a metric computed at the end, and by digit."""

    direction, name = "maximize", "accuracy"

    def reset(self):
        self.right = {digit: [] for digit in range(10)}

    def update(self, outputs, batch):
        for label, score in zip(batch[1].tolist(), Accuracy()(outputs, batch).tolist(), strict=True):
            self.right[label].append(score)

    def compute(self):
        every = [score for scores in self.right.values() for score in scores]
        return sum(every) / len(every)

    def details(self):
        return {f"class/{digit}": sum(scores) / len(scores) for digit, scores in self.right.items()}


class Says:
    def __init__(self, said):
        self.details = said


def test_details_stand_on_a_trials_run_and_on_that_of_the_float_model(digits_task, evaluator):
    task = make_task(name="own", model=digits_task.model, data=digits_task.data, metric=ByDigit())
    own = Evaluator(task, evaluator.rules, evaluator.cost_model, eval_batch=256)
    own.measure_float()
    assert own.float_metrics["float/accuracy"] == evaluator.measure_float()
    assert {f"float/detail/class/{digit}" for digit in range(10)} < set(own.float_metrics)
    trial = own.run_trial(TrialSettings(qconfig=QConfigSettings()))
    found = run_metrics(trial, "accuracy/accuracy")
    assert found["accuracy/accuracy"] == trial.metric
    mean = sum(found[f"detail/class/{d}"] * len(task.metric.right[d]) for d in range(10)) / trial.samples
    assert mean == pytest.approx(trial.metric)
    again = own.run_trial(TrialSettings(qconfig=QConfigSettings()))
    assert not again.evaluated
    assert again.details == trial.details


def test_names_become_those_that_a_run_takes_and_stay_apart():
    said = {"a(b)": 1, "a[b]": 2.0, "class/N/A": 0.5, "traffic light": 0.25, "..": 0.0, "none of it": float("nan")}
    assert details_of(Says(lambda: said)) == {
        "a_b_": 1.0, "a_b_ 2": 2.0, "class/N/A": 0.5, "traffic light": 0.25, "_": 0.0,
    }  # fmt: skip
    assert details_of(object()) == {}
    assert Evaluation(0.5, 2).details == {}


def test_a_study_keeps_details_apart_from_what_it_says_of_a_mix_itself():
    found = {"accuracy/drop": 0.25, "cost/bpu_ms": 2.0, "detail/drop": 0.5, "detail/class/a": 1.0}
    assert metrics_of("best", found) == {
        "best/drop": 0.25, "best/bpu_ms": 2.0, "best/detail/drop": 0.5, "best/detail/class/a": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("said", [lambda: 3.0, lambda: {"a": "b"}, lambda: 1 / 0])
def test_other_details_are_refused_in_one_line(said):
    with pytest.raises(ConfigError, match="gives numbers by name, but got .*Error: .* Return a dict"):
        details_of(Says(said))
