"""`qflow.repair_model`: a prepared model that loses less in int8, and the table of what was tried for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qflow.api.library import FakeQuantState, adopt_stats, set_fake_quantize
from qflow.api.prepared import Prepared
from qflow.core.errors import ModelError
from qflow.quant.trace.binding import inputs_of
from qflow.quant.trace.calling import batch_size
from qflow.repair.base.contract import RepairTable, Step
from qflow.repair.run import repair
from qflow.repair.steps import steps_of


def repair_model(
    prepared: Prepared, data: Iterable[Any], steps: Sequence[str | Step] | None = None
) -> tuple[Prepared, RepairTable]:
    """Return a repaired copy of `prepared`, calibrated on `data`, and what was tried, kept, taken back and refused.

    `data` are calibration items as `qflow.calibrate` takes them; no labels are needed, and all items are held in
    memory. One sample in four is held out and decides. The copy keeps the qconfig and the calibration settings of
    `prepared`, its `float_state_dict()` holds the repaired weights under the float model's own keys, and its
    quantizers are on. `steps` are names or steps of your own: `equalize`, the default, leaves the float function bit
    for bit; `rounding`, `reconstruction` and `bias` change it, so that the quantized model computes what the float
    model did. `prepared` and the float model are not changed. Raises ConfigError for an unknown step or a model with
    temporal state, DataError for fewer than four samples, ModelError during QAT.
    """
    if prepared.training:
        raise ModelError("A repair starts from a model in eval mode, but got one in train mode. Repair it before QAT.")
    chosen = steps_of(steps)
    inputs = [inputs_of(prepared.model, prepared.sample, item) for item in data]
    batches = [(item, batch_size(item)) for item in inputs]
    repaired, context, table = repair(prepared, batches, prepared.applied, prepared.settings, chosen)
    repaired.applied = context.qconfig
    assert context.stats is not None  # of the last calibration
    adopt_stats(repaired, context.stats)
    set_fake_quantize(repaired, FakeQuantState.VALIDATION)
    return repaired, table
