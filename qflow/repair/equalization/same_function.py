"""Proof on one sample that changes leave the float function: of several, those that do not are found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import call_model, cut, named_tensors
from qflow.repair.base.contract import Context, Part
from qflow.repair.base.measure import SAME_FUNCTION


def moving(
    prepared: QuantizedModel,
    context: Context,
    parts: Sequence[Part],
    change: Callable[[Part], None],
    back: Callable[[Part], None],
) -> set[str]:
    """Return the names of the parts whose `change` moves a float output of the first sample; `back` takes it back.

    All are tried at once, and each alone only if an output moved.
    """
    inputs, size = context.batches[0]
    sample = cut(inputs, size, 0, 1)
    wanted = _outputs(prepared, sample)

    def moves(some: Sequence[Part]) -> bool:
        context.forwards += 1
        for part in some:
            change(part)
        got = _outputs(prepared, sample)
        for part in reversed(some):
            back(part)
        return any(_differ(a, b) for a, b in zip(wanted, got, strict=True))

    context.forwards += 1
    return {part.name for part in parts if moves([part])} if parts and moves(parts) else set()


@torch.no_grad()
def _outputs(prepared: QuantizedModel, sample: Any) -> list[Tensor]:
    with prepared.recording_order():  # all quantizers off
        return [tensor for _, tensor in named_tensors(call_model(prepared, sample)) if tensor.is_floating_point()]


def _differ(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return True
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return float((a - b).norm()) > SAME_FUNCTION * float(a.norm())
