"""Float operators as fast as they go: what a replay runs thousands of times.

Batch norms are folded into the weights once, as the device does it, and convolution weights on a CPU lie channels
last, which their results take over: a fifth to a third less time than the user's own calls. The last bits differ from
the float model's (1e-7 of a value). What a quantizer under test reads is the float model's own, as captured: there
those bits would flip roundings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qflow.core.graph import OpKind
from qflow.quant.capture import Captured
from qflow.quant.fake_quant import FakeQuant
from qflow.quant.ops import function_name
from qflow.quant.quantized_model import QuantizedModel
from qflow.quant.rerun import Ops, Patch, Values
from qflow.quant.tape import Op
from qflow.quant.weighted import ConvLeaf, WeightedLeaf

_FOLLOWS = frozenset(
    [OpKind.norm, OpKind.relu, OpKind.lut, OpKind.add, OpKind.mul, OpKind.arithmetic]
    + [OpKind.concat, OpKind.resize, OpKind.max_pool, OpKind.avg_pool]
)
"""What takes over the layout of what it reads."""
_STRIDES = frozenset(["as_strided"])
"""Functions that mean places in memory, not values."""


class FusedOps(Ops):
    """`Ops` with folded norms; an op that refuses values that lie channels last gets plain ones."""

    def __init__(self, model: nn.Module, prepared: QuantizedModel, captured: Captured) -> None:
        super().__init__(model, prepared, captured)
        self.weights: dict[str, tuple[Tensor, Tensor | None]] = {}
        last: set[int] = set()
        for op in self.ops:
            follows = op.kind in _FOLLOWS and any(i in last for i in self.reads[op.index])
            if len(op.shape) == 4 and (follows or _channels_last(self.leaves.get(op.module or ""))):
                last.add(op.index)
        for index in last & captured.values.keys():  # the same values; mixed layouts take twice the time
            captured.values[index] = tuple(_laid_out(t) for t in captured.values[index])

    def run(self, op: Op, args: Any, kwargs: Any) -> Values:
        """The float op, its norm folded in; the norm passes it on."""
        if op.module in self.folded:
            return (args[0] if args else kwargs["input"],)
        leaf = self.leaves.get(op.module or "")
        if isinstance(leaf, WeightedLeaf) and op.kind != OpKind.skipped:
            return (leaf.run_with(*self._folded(op.module or "", leaf), *args, **kwargs),)
        assert op.call is not None
        if op.call.function is not None and function_name(op.call.function) in _STRIDES:
            args, kwargs = _plain((args, kwargs))
        try:
            return super().run(op, args, kwargs)
        except RuntimeError:  # view() and its like
            return super().run(op, *_plain((args, kwargs)))

    def patched(self, op: Op, patch: Patch, quantizer: FakeQuant, args: Any, kwargs: Any) -> Values:
        """The op (with its batch norm) with a quantized weight or argument."""
        if patch.kind == "argument":
            return super().patched(op, patch, quantizer, args, kwargs)
        leaf: Any = self.leaves[op.module or ""]
        weight, bias = self._folded(op.module or "", leaf)
        return (leaf.run_with(quantizer(weight), bias, *args, **kwargs),)

    def _folded(self, path: str, leaf: WeightedLeaf) -> tuple[Tensor, Tensor | None]:
        if path not in self.weights:
            weight, bias = leaf.folded()
            self.weights[path] = _laid_out(weight) if _channels_last(leaf) else weight, bias
        return self.weights[path]


def _channels_last(leaf: Any) -> bool:
    return isinstance(leaf, ConvLeaf) and leaf.weight.ndim == 4 and leaf.weight.device.type == "cpu"


def _laid_out(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _plain(structure: Any) -> Any:
    return tree_map(lambda v: v.contiguous() if isinstance(v, Tensor) else v, structure)
