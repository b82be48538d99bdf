"""The checks and findings of one evaluated trial."""

from __future__ import annotations

from collections.abc import Mapping

from qflow.analysis.checks.calibration_check import calibration_findings
from qflow.analysis.checks.model_check import check_model
from qflow.analysis.checks.shared_check import reach_finding
from qflow.analysis.measures.tables import Finding, ModelCheck
from qflow.core.dtype import QDtype
from qflow.core.errors import ModelError
from qflow.core.qconfig import QConfig
from qflow.core.raisable import raisable
from qflow.core.settings import CalibrationSettings
from qflow.quant.model.calibrate import CalibrationStats, apply_scales
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.trial.precisions import Precisions
from qflow.trial.shared import SharedState


def require_all_ran(model: QuantizedModel) -> None:
    """Raise ModelError unless every planned quantizer ran; one that did not would make the metric look better."""
    quantizers = [*model.outputs.values(), *model.weights.values()]
    wanted = {q.name for q in quantizers if q.dtype not in (None, QDtype.float32)}
    missing = sorted(wanted - model.ran)
    # the first frame of a sequence may run others (zeros for the state); the calibration reports them
    if missing or (model.unseen and model.cached is None):
        raise ModelError(
            f"Every planned quantizer runs, but got none for {missing[:3]} and unplanned operators "
            f"{sorted(model.unseen)[:3]}. The model takes another path on this data than while traced."
        )


def findings_of(
    model: QuantizedModel,
    stats: CalibrationStats,
    applied: QConfig,
    calibrated: list[str],
    overflowed: Mapping[str, int],
    precisions: Precisions,
) -> tuple[Finding, ...]:
    """Return the findings of calibration (`calibrated` are those of `apply_scales`) and evaluation."""
    found = calibration_findings(model, stats, applied, calibrated, precisions.rules, precisions.scores)
    raised = raisable(model.graph, precisions.rules, tuple(overflowed))
    for name, count in overflowed.items():
        way = "calibration.float16_clip=true" + (", or qint16" if name in raised else "")
        found += (Finding(name, "check", f"{count} values beyond half precision: {way}"),)
    return found


def checked(state: SharedState, requested: QConfig, applied: QConfig, calibration: CalibrationSettings) -> ModelCheck:
    """Set the scales of `applied`, and return the model check with the findings of calibration."""
    stats, prepared = state.calibrate(calibration), state.prepared
    silent = apply_scales(prepared, stats, applied, calibration)
    found = reach_finding(prepared, state.rules)
    found += calibration_findings(prepared, stats, applied, silent, state.rules, state.scores)
    return check_model(state.graph, requested, applied, found, calibration.method)
