"""Advice on a model, and what following one of its lines does to the outputs' error."""

import torch

import qflow
from qflow import HighPrecisionOutput, ModuleNameQconfigSetter, TemplateSetter


def advised(model, data, tmp_path, setters=(), calibration=None, settings=None):
    """The calibrated model and its advice by operator; `data` are the items of the search for bad cases."""
    calibration = data if calibration is None else calibration
    prepared = qflow.prepare(model.eval(), calibration[0], qconfig_setter=setters)
    qflow.calibrate(prepared, calibration, settings)
    qa = qflow.QuantAnalysis(model, prepared, out_dir=tmp_path)
    qa.auto_find_bad_case(data)
    return prepared, {advice.op: advice for advice in qa.advise()}


def error_with(model, prepared, data, modules):
    """Relative error of the outputs with `modules` (operator -> spec) set on top of all int8."""
    setters = (ModuleNameQconfigSetter(modules), HighPrecisionOutput(), TemplateSetter("qint8"))
    qflow.configure(prepared, setters)
    with torch.no_grad():
        pairs = [(model(*x), prepared(*x)) if isinstance(x, tuple) else (model(x), prepared(x)) for x in data]
    return float(sum((a - b).norm() for a, b in pairs) / sum(a.norm() for a, _ in pairs))
