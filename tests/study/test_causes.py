"""Why all-int16 misses: a cause is named where its row stands out, and dual int16 where the input needs it too."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qflow.analysis.measures.tables import SensitivityRow, SensitivityTable
from qflow.config.device_file import load_rules
from qflow.core.device import apply_rules
from qflow.core.dtype import QDtype
from qflow.core.qconfig import OpQConfig, QConfig
from qflow.core.repair_settings import RepairSettings
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, TemplateSetter
from qflow.quant.model.prepare import prepare
from qflow.study.causes import int16_miss_reason


@pytest.fixture(scope="module")
def net():
    layers = [
        nn.Conv2d(3, 4, 1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 1),
        nn.Tanh(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(4, 2, 1),
    ]
    graph = prepare(nn.Sequential(*layers).eval(), torch.randn(1, 3, 4, 4)).graph
    rules = load_rules("nash-m")
    requested = resolve(graph, [HighPrecisionOutput(), TemplateSetter(QDtype.qint16)], rules.march)
    evaluator = SimpleNamespace(graph=graph, rules=rules, default_repair=RepairSettings(equalize=True))
    return evaluator, apply_rules(graph, requested, rules)


def table(*rows):
    """Rows as (operator, kind, dtype, score[, spread])."""
    made = [SensitivityRow(name, kind, "", score, dtype, 0, *more) for name, kind, dtype, score, *more in rows]
    return SensitivityTable("L1", "sum", 16, True, tuple(made))


def reason(net, at16, at8=()):
    evaluator, applied = net
    return int16_miss_reason(evaluator, table(*at16), applied, table(*at8))


OUTPUTS16 = [
    ("0", "activation", "qint16", 0.001),
    ("1", "activation", "qint16", 0.002),
    ("2", "activation", "qint16", 0.001),
]


def test_a_weight_is_dual_only_where_its_input_needs_int16_too(net):
    hard = [*OUTPUTS16, ("2", "weight", "qint8", 0.3)]
    both = reason(net, hard, [("1", "activation", "qint8", 0.5)])
    assert both == "dual int16 suspected on 2 (weight 0.3, its input 1 0.5 at int8)"
    content = [("0", "activation", "qint8", 0.5), ("1", "activation", "qint8", 0.01)]
    assert reason(net, hard, content) == "int8 weights are too coarse: 2 (0.3)"
    noisy = [("1", "activation", "qint8", 0.5, 3.0)]
    assert reason(net, hard, noisy) == "int8 weights are too coarse: 2 (0.3)"


def test_an_input_that_was_not_measured_is_called_that(net):
    found = reason(net, [*OUTPUTS16, ("2", "weight", "qint8", 0.3)])
    assert found.endswith("is not known: sensitivity.dtypes has no qint8")


def test_where_the_device_multiplies_int16_by_int16_nothing_is_dual(net):
    evaluator, applied = net
    newer = SimpleNamespace(graph=evaluator.graph, rules=replace(evaluator.rules, dual_int16=True))
    hard = [*OUTPUTS16, ("2", "weight", "qint8", 0.3)]
    found = reason((newer, applied), hard, [("1", "activation", "qint8", 0.5)])
    assert found == "int8 weights are too coarse: 2 (0.3)"


def test_a_small_row_beside_a_large_one_is_no_cause(net):
    """The weight loses far less than int16 itself."""
    rows = [("1", "activation", "qint16", 30.0), ("0", "activation", "qint16", 20.0), ("2", "weight", "qint8", 0.004)]
    assert reason(net, rows, [("1", "activation", "qint8", 300.0)]) == "int16 itself is too coarse on 1 (30), 0 (20)"


def test_an_operator_that_the_device_keeps_at_int8_is_named_with_the_reason(net):
    found = reason(net, [*OUTPUTS16, ("3", "activation", "qint8", 0.4)])
    assert found.startswith("3 stays int8 (activation 0.4): 4 (resize) takes int8 input only")


def test_what_is_within_its_own_noise_is_no_cause(net):
    noisy = [("1", "activation", "qint16", 0.01, 0.05), ("2", "weight", "qint8", 0.008, 0.05)]
    assert reason(net, noisy) == "no operator stands out alone in the sensitivities of all-int16: the errors add up"


def test_errors_that_are_not_finite_come_first(net):
    rows = [*OUTPUTS16, ("3", "activation", "qint8", float("inf"))]
    assert reason(net, rows).startswith("3 stays int8 (activation inf)")


def test_a_miss_may_come_from_a_value_inside_a_norm():
    int16 = OpQConfig(output=QDtype.qint16, inner=QDtype.qint16)
    applied = QConfig("nash-m", {"norm": int16, "head": OpQConfig(output=QDtype.qint16, weight=QDtype.qint8)})
    scores = {"norm.var_mean.var": 5.0, "norm": 0.01, "head": 0.02}
    found = table(*((name, "activation", "qint16", score) for name, score in scores.items()))
    assert int16_miss_reason(None, found, applied, found) == "int16 itself is too coarse on norm.var_mean.var (5)"
