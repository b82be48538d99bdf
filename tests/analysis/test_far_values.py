"""A defective reading far beyond all others takes the codes from them: it is named, and what is advised mends it."""

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import nn

import qflow
from qflow.analysis.advice.advisor import advise
from qflow.analysis.sensitivity.measure import sensitivity


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.fixture(scope="module")
def readings():
    """200000 readings, one of them 1e5."""
    x = torch.randn(25_000, 8, generator=torch.Generator().manual_seed(0))
    x[123, 4] = 1e5
    return x


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Fused().eval()


def prepared_on(model, readings, method, dtype, settings=None):
    setters = [qflow.ModuleNameQconfigSetter(settings or {}), qflow.TemplateSetter(dtype)]
    prepared = qflow.prepare(model, readings[:4], qconfig_setter=setters)
    qflow.calibrate(prepared, readings.split(5_000), qflow.CalibrationSettings(method=method))
    return prepared


@torch.no_grad()
def error(prepared, model, readings):
    """Relative error on the samples without the defect."""
    sound = readings[(readings.abs() < 100).all(1)]
    right = model(sound)
    return float((prepared(sound) - right).norm() / right.norm())


def modules_of(line):
    return OverridesParser.create().parse_override(line).value()


@pytest.mark.parametrize("dtype", [qflow.QDtype.qint8, qflow.QDtype.qint16])
@pytest.mark.parametrize("method", ["mse", "minmax", "mix"])
def test_the_check_names_the_scales_that_mend_it(model, readings, method, dtype):
    prepared = prepared_on(model, readings, method, dtype)
    assert error(prepared, model, readings) > 0.1
    found = [f for f in qflow.check(prepared).findings if "out of the calibration data" in f.message]
    assert [f.op for f in found] == ["quant[x]"]  # once, with a line for all operators that it reaches
    assert "|x| up to 1e+05, but all except at most 0.01 % of its values lie within 4.67" in found[0].message
    settings = modules_of(found[0].message[found[0].message.index("qconfig.modules") :])
    assert list(settings) == ["quant[x]", "first", "second", "head"]
    mended = prepared_on(model, readings, method, dtype, settings)
    assert error(mended, model, readings) < 0.05
    assert {f.message[:12] for f in qflow.check(mended).findings if f.level != "info"} == {"Fixed scale "}


@pytest.mark.parametrize("dtype", [qflow.QDtype.qint8, qflow.QDtype.qint16])
@pytest.mark.parametrize("method", ["percentile", "kl"])
def test_methods_that_cut_outliers_need_no_help(model, readings, method, dtype):
    prepared = prepared_on(model, readings, method, dtype)
    assert error(prepared, model, readings) < 0.05
    assert not [f for f in qflow.check(prepared).findings if f.level != "info"]


def test_the_advice_mends_it(model, readings):
    prepared = prepared_on(model, readings, "mse", qflow.QDtype.qint8)
    with prepared.quantized():
        table = sensitivity(model, prepared, [readings[:64]])
    advice = advise(prepared, prepared.stats, table, None, lambda operator, spec: "")
    assert {a.cause for a in advice if a.source != "weight"} == {"far values"}
    settings = {}
    for a in advice:
        settings |= modules_of(a.line)
    assert error(prepared_on(model, readings, "mse", qflow.QDtype.qint8, settings), model, readings) < 0.05


def test_far_values_that_a_scale_cuts_off_are_no_truncation(model, readings):
    prepared = prepared_on(model, readings, "percentile", qflow.QDtype.qint8)
    table = sensitivity(model, prepared, [readings[64:128]])  # with the defect
    assert not {a.cause for a in advise(prepared, prepared.stats, table, None, lambda operator, spec: "")} & {
        "truncation",
        "far values",
    }


def test_peaks_of_a_bounded_function_are_no_defects():
    class Peaks(nn.Module):
        def forward(self, x):
            return torch.softmax(x, -1) * 2.0

    x = torch.zeros(4, 65_536)
    x[:, 7] = 16.0
    prepared = qflow.prepare(Peaks().eval(), x)
    qflow.calibrate(prepared, [x])
    assert not [f for f in qflow.check(prepared).findings if "out of the calibration data" in f.message]
