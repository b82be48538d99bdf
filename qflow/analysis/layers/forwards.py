"""Layer comparison by full forward passes, for models whose operators cannot be run one by one.

One pass in float keeps every operator's value, and one pass of the calibrated model compares its own with it. That
gives the accumulated error; the error of an operator alone would need one more pass for each operator. Values that
exceed the memory are left to another pair of passes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qflow.analysis.layers.rows import Rows
from qflow.analysis.measures.tables import Finding, LayerRow
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import call_model

_FUNCTIONAL = re.compile(r"\[(\w+)\](\(\d+\))?( at .*)?$")  # `scope[add](1)`, `scope[add] at net.py:12`
_REPEATED = re.compile(r"\(\d+\)$")


def by_forwards(
    model: nn.Module, prepared: QuantizedModel, inputs: Any, memory: float, on_op: Callable[[int], None]
) -> tuple[list[LayerRow], list[Finding]]:
    """The rows of all operator calls, in the order of the float pass and without `single_error`, and findings.

    `memory` bounds the bytes of the float values that are held at once.
    """
    rows = Rows(prepared)
    types = {path: f"{type(m).__module__}.{type(m).__qualname__}" for path, m in model.named_modules()}
    passes = _Passes(prepared, rows, types, memory, on_op)
    while passes.run(inputs):
        pass
    differing = [name for name in passes.order if name in passes.differing]
    if differing:
        text = f"{len(differing)} operators have another shape in the calibrated model, or do not run: no columns"
        rows.findings.append(Finding(differing[0], "check", text))
    return [passes.rows[name] for name in passes.order], rows.findings


class _Passes:
    """Pairs of passes: each compares as many of the operators that are left as the memory holds."""

    def __init__(
        self, prepared: QuantizedModel, rows: Rows, types: dict[str, str], memory: float, on_op: Callable[[int], None]
    ) -> None:
        self.prepared, self.make, self.types, self.memory, self.on_op = prepared, rows, types, memory, on_op
        self.order: dict[str, None] = {}
        self.rows: dict[str, LayerRow] = {}
        self.differing: set[str] = set()
        """Operators that have another shape in the calibrated model, or do not run in it."""
        self.kept: dict[str, Tensor] = {}
        self.room = 0.0

    def run(self, inputs: Any) -> bool:
        """Run one pair; returns False if all operators are done."""
        self.kept, self.room = {}, self.memory
        try:
            with self.prepared.recording_order() as order:
                self.prepared.watch = self._keep
                call_model(self.prepared, inputs)
            with self.prepared.quantized(), self.prepared.following(order):
                self.prepared.watch = self._compare
                call_model(self.prepared, inputs)
        finally:
            self.prepared.watch = None
        for name, base in self.kept.items():
            self._add(name, base, None)
        return len(self.rows) < len(self.order)

    def _keep(self, name: str, value: Tensor) -> None:
        if name in self.kept or (name in self.prepared.plan.known and name not in self.make.nodes):
            return  # a later result of the same call, or an operator that no output depends on
        self.order[name] = None
        if name in self.rows or (self.kept and self.room <= 0):
            return
        self.room -= value.numel() * value.element_size()
        with torch._C.DisableTorchFunction():  # after a skipped module it would count as an operator of the model
            self.kept[name] = value.clone()

    def _compare(self, name: str, value: Tensor) -> None:
        base = self.kept.pop(name, None)
        if base is None:
            return
        quantizer = self.prepared.outputs.get(self.prepared.plan.output_at.get(name, ""))
        with torch._C.DisableTorchFunction():
            self._add(name, base, value if quantizer is None else quantizer(value))

    def _add(self, name: str, base: Tensor, own: Tensor | None) -> None:
        if own is None or own.shape != base.shape:
            self.differing.add(name)
        functional = _FUNCTIONAL.search(name)
        node = self.make.nodes.get(name)
        if node is not None and node.kind == "input":
            op_type = node.op_type
        else:
            op_type = f"torch.{functional[1]}" if functional else self.types.get(_REPEATED.sub("", name), "")
        self.rows[name] = self.make.row(name, op_type, base, own, None)
        self.on_op(len(self.rows))
