"""Calibrated models, and full forward passes to compare replays with."""

from torch import nn

from qflow.core.dtype import QDtype
from qflow.core.resolve import resolve
from qflow.core.setter import TemplateSetter
from qflow.core.settings import CalibrationSettings
from qflow.quant.model.calibrate import apply_scales, collect
from qflow.quant.model.prepare import prepare
from qflow.quant.replay.replay import full_forward
from qflow.quant.trace.calling import batch_size, call_model

INF = float("inf")


def calibrated(model, inputs, dtype=QDtype.qint8, skip=()):
    prepared = prepare(model, inputs, skip)
    qconfig = resolve(prepared.graph, [TemplateSetter(dtype)], "nash-m")
    apply_scales(prepared, collect(prepared, [(inputs, batch_size(inputs))]), qconfig, CalibrationSettings())
    return prepared


def full(prepared, inputs, variants):
    """Every variant by a full forward that keeps the float order of topk and its like."""
    with prepared.recording_order() as order:
        call_model(prepared, inputs)
    with prepared.following(order):
        return [full_forward(prepared, inputs, variant) for variant in variants]


class Made(nn.Module):
    """A model of a function and its modules."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)
