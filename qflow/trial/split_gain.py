"""What a scale for each call of the shared modules gives: the error of the outputs with and without, measured."""

from __future__ import annotations

from dataclasses import replace

from qflow.analysis.checks.shared_check import SHARED, splittable, unlike_calls
from qflow.analysis.measures.tables import Finding
from qflow.core.qconfig import QConfig
from qflow.quant.model.calibrate import apply_scales
from qflow.quant.model.prepare import prepare
from qflow.quant.model.shared_modules import AUTO, SETTING
from qflow.tasks.task import batches, model_inputs
from qflow.trial.analysed import AnalysedState
from qflow.trial.outputs import outputs_off


def split_gain(state: AnalysedState, applied: QConfig) -> tuple[Finding, ...]:
    """Compare the outputs' distance to float on the bad cases with that of a copy whose unlike calls are split.

    The copy has the dtypes of `applied`, which `state.prepared` holds with its scales; its own scales come from the
    same calibration. Only modules without parameters whose calls need different scales (case C) are split; without any,
    there is no finding and nothing is run.
    """
    calibration = state.default_calibration
    stats, prepared = state.calibrate(calibration), state.prepared
    shared = [name for name in splittable(prepared) if unlike_calls(stats, name)]
    if not shared:
        return ()
    task, fold = state.task, state.fold_functional_norms
    batch, _ = next(batches(task, "calibration", 4, limit=1))
    split = (*state.split_shared, *shared)
    apart = prepare(state.weights.model, model_inputs(task, batch), state.skip, fold, task.cached_attrs, split)
    owners = {node.quantizer: node.name for node in prepared.graph.quantized}
    known = prepared.graph.by_name
    ops = {node.name: applied.ops[owners[known[node.name].quantizer]] for node in apart.graph.quantized}
    parts = [part for name in shared for part in (name, *known[owners[name]].inner)]
    by_call = {call: h for part in parts for call, h in stats.calls[part].items()}
    own = replace(stats, histograms={**stats.histograms, **by_call}, calls={})
    apply_scales(apart, own, replace(applied, ops=ops), calibration)
    before, after = outputs_off(state), outputs_off(state, apart)
    first, *others = shared
    also = f" ({len(others)} more: {', '.join(others[:4])}{', ...' * (len(others) > 4)})" if others else ""
    text = (
        f"{SHARED}: a scale for each of its calls{also} changes the outputs' distance to float on the bad cases from "
        f"{before:.4g} to {after:.4g} ({state.sensitivity_settings.metric}): {SETTING}={AUTO}"
    )
    return (Finding(first, "check" if after < before else "info", text),)
