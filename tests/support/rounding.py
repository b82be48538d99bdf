"""What the tests of rounding and bias correction share: calibrated models, and their error against float."""

import torch

from qflow.core.dtype import QDtype
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, TemplateSetter
from qflow.core.settings import CalibrationSettings
from qflow.quant.model.calibrate import apply_scales, collect
from qflow.quant.model.prepare import prepare
from qflow.quant.trace.calling import batch_size, call_model

SETTINGS = CalibrationSettings(method="minmax")


def all_at(prepared, dtype=QDtype.qint8):
    return resolve(prepared.graph, [HighPrecisionOutput(), TemplateSetter(dtype)], "nash-m")


def recalibrate(prepared, batches, dtype=QDtype.qint8, settings=SETTINGS):
    stats = collect(prepared, [(batch, batch_size(batch)) for batch in batches])
    apply_scales(prepared, stats, all_at(prepared, dtype), settings)


def calibrated(model, batches, dtype=QDtype.qint8, settings=SETTINGS):
    prepared = prepare(model, batches[0])
    recalibrate(prepared, batches, dtype, settings)
    return prepared


@torch.no_grad()
def quantized_weights(prepared, names, batch):
    """The weights that the operators are run with, by name."""
    modules = dict(prepared.model.named_modules())
    with prepared.quantized():
        call_model(prepared, batch)
        return {name: prepared.weights[name](modules[name].folded()[0]).clone() for name in names}


@torch.no_grad()
def error(prepared, model, batch):
    """Mean over the samples of |quantized - float| / |float|."""
    right = model(batch).flatten(1)
    with prepared.quantized():
        found = prepared(batch).flatten(1)
    return float(((found - right).norm(dim=1) / right.norm(dim=1)).mean())
