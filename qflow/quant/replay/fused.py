"""Fast float operators, because a replay runs them thousands of times.

Batch norms are folded into the weights once, as the device does it. On a CPU, convolution weights are in channels-last
layout, and so are the results. This takes a fifth to a third less time than the user's own calls. The last bits differ
from the float model (1e-7 of a value). A quantizer under test therefore reads the captured values of the float model:
other last bits would change how it rounds. Converting captured values to channels-last pays off if they are read many
times; a single pass over them (backward.py) uses folded weights and leaves the layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qflow.core.graph import WEIGHTED_KINDS, OpKind
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.weighted import ConvLeaf, WeightedLeaf
from qflow.quant.replay.capture import Captured
from qflow.quant.replay.captured_ops import Ops, Patch, Values, Weights
from qflow.quant.replay.packed import Convolve, packed
from qflow.quant.trace.ops import function_name
from qflow.quant.trace.tape import Op
from qflow.quant.values.fake_quant import FakeQuant

_FOLLOWS = frozenset(
    [OpKind.norm, OpKind.relu, OpKind.lut, OpKind.add, OpKind.mul, OpKind.arithmetic]
    + [OpKind.concat, OpKind.resize, OpKind.max_pool, OpKind.avg_pool]
)
"""Kinds of operators whose result has the memory layout of their input."""
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
"""Modules that give their input unchanged in eval mode."""
_STRIDES = frozenset(["as_strided"])
"""Functions that address memory by strides, so that the layout changes their result."""


class FoldedOps(Ops):
    """`Ops` whose batch norms are folded, once, into the weights of the ops before them."""

    def __init__(
        self, model: nn.Module, prepared: QuantizedModel, captured: Captured, weights: Weights | None = None
    ) -> None:
        super().__init__(model, prepared, captured)
        self.raw = frozenset(self.ends)  # captured without their norm, replayed with it
        self.weights: Weights = {} if weights is None else weights

    def run(self, op: Op, args: Any, kwargs: Any) -> Values:
        """Run the float op with its norm folded in; the norm itself is the identity."""
        if op.owner in self.folded:
            return (args[0] if args else kwargs["input"],)
        leaf = self.leaves.get(op.module or "")
        if isinstance(leaf, WeightedLeaf) and op.kind != OpKind.skipped:
            return (leaf.run_with(*self.weight(op), *args, **kwargs),)
        return super().run(op, args, kwargs)

    def patched(self, op: Op, patch: Patch, quantizer: FakeQuant, args: Any, kwargs: Any) -> Values:
        """As in Ops, with the weight of `run`."""
        if patch.kind != "weight":
            return super().patched(op, patch, quantizer, args, kwargs)
        leaf: Any = self.leaves[op.module or ""]
        weight, bias = self.weight(op)
        return (leaf.run_with(quantizer(weight), bias, *args, **kwargs),)

    def change(self, op: Op, quantizer: FakeQuant, args: Any, kwargs: Any) -> Tensor:
        """The change of the op's result (after its folded batch norm) that quantizing its weight makes."""
        leaf: Any = self.leaves[op.module or ""]
        weight, _ = self.weight(op)
        found: Tensor = leaf.run_with(quantizer(weight) - weight, None, *args, **kwargs)
        return found

    def weight(self, op: Op) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a weighted op, with its batch norm folded in."""
        path = op.module or ""
        if path not in self.weights:
            with torch.no_grad():
                self.weights[path] = self.folded_weight(self.leaves[path])
        return self.weights[path]

    def folded_weight(self, leaf: Any) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that `run` uses for this leaf module."""
        found: tuple[Tensor, Tensor | None] = leaf.folded()
        return found


class FusedOps(FoldedOps):
    """`FoldedOps` in channels-last layout; an op that cannot take this layout gets contiguous tensors."""

    def __init__(
        self, model: nn.Module, prepared: QuantizedModel, captured: Captured, weights: Weights | None = None
    ) -> None:
        super().__init__(model, prepared, captured, weights)
        last: set[int] = set()
        for op in self.ops:
            follows = op.kind in _FOLLOWS or isinstance(self.leaves.get(op.module or ""), _IDENTITIES)
            follows = follows and any(i in last for i in self.reads[op.index])
            if len(op.shape) == 4 and (follows or _channels_last(self.leaves.get(op.module or ""))):
                last.add(op.index)
        for index in last & captured.values.keys():  # equal values; mixed layouts would take twice the time
            captured.values[index] = tuple(_laid_out(t) for t in captured.values[index])
        functions = {op.index: op.call.function for op in self.ops if op.call is not None}
        self.by_strides = {i for i, f in functions.items() if f is not None and function_name(f) in _STRIDES}
        self.convolutions: dict[str, Convolve | None] = {}
        """Path of a weighted module -> its convolution with a weight that is laid out once."""

    def run(self, op: Op, args: Any, kwargs: Any) -> Values:
        """As in FoldedOps, in either layout."""
        convolve = self._convolution(op, args, kwargs)
        return self.float_run(op, args, kwargs) if convolve is None else (convolve(args[0]),)

    def float_run(self, op: Op, args: Any, kwargs: Any) -> Values:
        """As `run`, with torch's own convolutions."""
        if op.index in self.by_strides:
            args, kwargs = _plain((args, kwargs))
        try:
            return super().run(op, args, kwargs)
        except RuntimeError:  # view() and similar functions refuse channels-last tensors
            return super().run(op, *_plain((args, kwargs)))

    def _convolution(self, op: Op, args: Any, kwargs: Any) -> Convolve | None:
        """The convolution with a packed weight; None for any other operator."""
        path = op.module
        if path is None or op.kind not in WEIGHTED_KINDS or len(args) != 1 or kwargs:
            return None
        if path not in self.convolutions:
            self.convolutions[path] = packed(self.leaves.get(path), *self.weight(op), args[0])
        return self.convolutions[path]

    def folded_weight(self, leaf: Any) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that `run` uses for this leaf module."""
        weight, bias = super().folded_weight(leaf)
        return _laid_out(weight) if _channels_last(leaf) else weight, bias


def _channels_last(leaf: Any) -> bool:
    return isinstance(leaf, ConvLeaf) and leaf.weight.ndim == 4 and leaf.weight.device.type == "cpu"


def _laid_out(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _plain(structure: Any) -> Any:
    return tree_map(lambda v: v.contiguous() if isinstance(v, Tensor) else v, structure)
