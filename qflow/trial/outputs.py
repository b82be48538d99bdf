"""How far the outputs of the quantized model are from float on the bad cases, with all quantizers on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qflow.analysis.measures.distances import Distances
from qflow.core.settings import TrialSettings
from qflow.quant.model.calibrate import apply_scales
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import batch_size, call_model, named_tensors
from qflow.trial.analysed import AnalysedState


@dataclass(frozen=True)
class Distance:
    """A distance of outputs from float, as the cache holds it."""

    value: float


def outputs_off(state: AnalysedState, prepared: QuantizedModel | None = None) -> float:
    """Return the distance of the outputs under the present scales from float, merged over outputs and samples.

    It is measured in `sensitivity.metric`, as a row of the sensitivity table. The model is `prepared`, by default that
    of `state`.
    """
    model = state.prepared if prepared is None else prepared
    distances = Distances(state.sensitivity_settings.metric, 1)
    with torch.no_grad():
        for inputs in state.cases():
            with model.recording_order() as order:
                plain = dict(named_tensors(call_model(model, inputs)))
            distances.reference(plain, batch_size(inputs))
            with model.quantized(), model.following(order):
                distances.add(0, dict(named_tensors(call_model(model, inputs))))
    return distances.result(0)[0]


def outputs_off_under(state: AnalysedState, settings: TrialSettings) -> float:
    """Return `outputs_off` under the qconfig and the calibration of `settings`; infinity for outputs without one.

    It takes two forward passes over the bad cases, so calibration methods can be ordered without an evaluation; a later
    start reads it.
    """
    calibration = settings.calibration
    with state.repaired(settings.repair, calibration):
        applied = state.resolve(settings.qconfig)[1]

        def measured() -> Distance:
            apply_scales(state.prepared, state.calibrate(calibration), applied, calibration)
            found = outputs_off(state)
            return Distance(math.inf if math.isnan(found) else found)

        data = state.augmented(calibration), list((state.badcases or state.find_badcases()).chosen)
        key = state.key(applied.digest, calibration, state.rules, state.sensitivity_settings.metric, *data)
        return state.cache.get("outputs", key, measured, Distance).value
