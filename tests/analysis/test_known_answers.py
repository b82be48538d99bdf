"""One operator is made bad on purpose; the tools must name it."""

import copy

import pytest
from support.models import Wide

from qflow.analysis.badcases.files import badcase_text
from qflow.analysis.checks.model_check import check_text
from qflow.core.dtype import QDtype
from qflow.core.record import from_dict, plain
from qflow.core.settings import CalibrationSettings, QConfigSettings, SensitivitySettings, TrialSettings
from qflow.cost_model.model import CostModel
from qflow.tasks.task import make_task
from qflow.trial.evaluator import Evaluator


@pytest.fixture(scope="module")
def planted(digits_task, nash_m):
    model = Wide(copy.deepcopy(digits_task.model)).eval()
    task = make_task(name="planted", model=model, data=digits_task.data, metric=digits_task.metric)
    evaluator = Evaluator(
        task,
        nash_m,
        CostModel(),
        sensitivity_settings=SensitivitySettings(bad_cases=8, search_samples=64),
        default_calibration=CalibrationSettings(method="minmax", batch_size=16, steps=8),
        eval_batch=256,
    )
    evaluator.measure_float()
    evaluator.rank()
    return evaluator


def test_sensitivity_names_the_planted_operator_first(planted):
    first, second = planted.sensitivities.rows[:2]
    assert (first.op_name, first.sensitive_type) == ("loud", "activation")
    assert first.score > 5 * second.score
    assert planted.sensitivities.rows[-1].score < 0.05 * first.score


def test_promoting_it_alone_restores_the_accuracy(planted):
    def run(**settings):
        return planted.run_trial(
            TrialSettings(qconfig=QConfigSettings(**settings), calibration=planted.default_calibration)
        )

    int8, all_int16, mix = run(), run(int16_ratio=1.0), run(int16_ratio=1 / len(planted.precisions.promotable))
    assert int8.drop > 0.05
    assert all_int16.drop < 0.01
    assert mix.drop < 0.01
    assert mix.qconfig.names(QDtype.qint16) == ("loud",)
    assert mix.cost.latency_ms < all_int16.cost.latency_ms
    assert mix.qconfig.digest == run(modules={"loud": "qint16"}).qconfig.digest


def test_bad_cases_are_the_samples_that_differ_most(planted):
    table = planted.badcases
    assert len(table.chosen) == 8
    assert table.chosen[0] == table.worst["L1"]
    assert 0 <= table.index["0"]["Cosine"] < table.samples == 64
    text = badcase_text(table)
    assert "The bad case input index of each output:" in text
    assert "The metric results of each badcase:" in text
    assert "dataloader index" in text


def test_tables_survive_json(planted):
    assert from_dict(type(planted.sensitivities), plain(planted.sensitivities)) == planted.sensitivities
    assert from_dict(type(planted.badcases), plain(planted.badcases)) == planted.badcases


def test_the_guides_columns(planted):
    header = planted.sensitivities.text().splitlines()[0].split()
    assert header == ["op_name", "sensitive_type", "op_type", "L1", "quant_dtype"]


def test_the_model_check_shows_requested_against_applied(planted):
    result = planted.run_trial(TrialSettings(qconfig=QConfigSettings(int16_ratio=1.0)))
    text = check_text(result.check)
    for section in (
        "All fusable modules are fused in model!",
        "Each module called times:",
        "Each layer out qconfig:",
        "Weight qconfig:",
        "Please check if these OPs qconfigs are expected..",
    ):
        assert section in text, section
    assert "inner.relu  3" in text  # counted; but fused everywhere, it owns no scale that its calls could share
    assert not any(f.op == "inner.relu" for f in result.check.findings)
