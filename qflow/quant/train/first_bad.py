"""Find the first bad operator of a diverged training: one more forward pass checks the result of every operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import call_model
from qflow.quant.values.fake_quant import FakeQuant


@torch.no_grad()
def first_bad(
    prepared: QuantizedModel, inputs: Any, calibrated: Mapping[FakeQuant, float], times: float
) -> tuple[str, str]:
    """(name, reason) of the first operator with NaN or inf, else of the first beyond `times` its calibrated range.

    Without those, it is the first one that is zero everywhere; ("", "") if there is none. `calibrated` holds the scales
    before training. This pass changes no scale.
    """
    bad: list[tuple[str, str]] = []
    outside: list[tuple[str, str]] = []
    dead: list[tuple[str, str]] = []

    def watch(name: str, value: Tensor) -> None:
        if bad or not value.is_floating_point() or not value.numel():
            return
        if not bool(torch.isfinite(value).all()):
            bad.append((name, "NaN" if bool(value.isnan().any()) else "inf"))
            return
        quantizer = prepared.outputs.get(prepared.plan.output_at.get(name, ""))
        if quantizer is None or quantizer.dtype is None or not quantizer.dtype.is_integer:
            return
        reach = calibrated.get(quantizer, 0.0) * quantizer.divisor()
        factor = float(value.abs().max()) / reach if reach else 0.0
        if factor > times:
            outside.append((name, f"{factor:.3g} times its calibrated range"))
        elif reach and factor == 0.0:
            dead.append((name, "zero everywhere"))

    moving = {q: q.averaging_constant for q in prepared.modules() if isinstance(q, FakeQuant) and not q.per_channel}
    prepared.watch = watch
    try:
        for quantizer in moving:
            quantizer.averaging_constant = 0.0
        call_model(prepared.observed, inputs)  # type: ignore[arg-type]
    finally:
        prepared.watch = None
        for quantizer, constant in moving.items():
            quantizer.averaging_constant = constant
    return (bad or outside or dead or [("", "")])[0]
