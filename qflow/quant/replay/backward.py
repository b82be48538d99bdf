"""Backward pass over a captured batch: gradients at every op, for several directions over the outputs at once.

The values are the captured ones, so most ops need no forward pass: a convolution or linear layer only needs its weight
(with the batch norm folded in), a sum passes the gradient on, and a ReLU masks it by its captured result. Any other op
is replayed once on its captured inputs under autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qflow.core.graph import OpKind
from qflow.quant.model.weighted import LinearLeaf, WeightedLeaf
from qflow.quant.replay.capture import Captured
from qflow.quant.replay.floats import Floats
from qflow.quant.replay.fused import FoldedOps
from qflow.quant.trace.ops import function_name
from qflow.quant.trace.tape import Op, Ref, references

Gradients = list[Tensor | None]
"""A gradient for each direction; None if the direction does not reach this value."""
Rule = Callable[[Tensor], Sequence[tuple[Ref, Tensor]]]
"""Maps the gradient with respect to an op's result to the gradients with respect to the values that it read."""


class Backward:
    """Propagates gradients back through a batch that was captured with `inner`, to the ops in `wanted` (indices)."""

    def __init__(self, ops: FoldedOps, captured: Captured, wanted: Collection[int]) -> None:
        self.ops, self.captured, self.wanted = ops, captured, wanted
        self.floats = Floats(ops, captured)
        self.needed: set[int] = set()
        for op in ops.ops:
            if op.floating and (op.index in wanted or self.needed & ops.reads[op.index]):
                self.needed.add(op.index)

    def outputs(self) -> list[tuple[Ref, Tensor]]:
        """The float outputs that depend on a wanted op, with their values."""
        found = [(ref, self.floats.get(ref.op)[ref.position]) for _, ref in self.ops.outputs]
        return [
            (ref, value)
            for ref, value in found
            if ref.op in self.needed and value.is_floating_point() and value.numel()
        ]

    def walk(self, directions: Sequence[Sequence[tuple[Ref, Tensor]]]) -> Iterator[tuple[Op, Tensor, list[Tensor]]]:
        """Yield each wanted op, last to first, with its first result and that result's gradient for each direction.

        A direction gives a gradient for each output. Ops that no direction reaches are left out.
        """
        count = len(directions)
        gradients: dict[Ref, Gradients] = {}
        for d, direction in enumerate(directions):
            for ref, tensor in direction:
                _add(gradients.setdefault(ref, [None] * count), d, tensor)
        for op in reversed(self.ops.ops):
            if op.index not in self.needed:
                continue
            there = [ref for ref in gradients if ref.op == op.index]
            own = {ref.position: gradients.pop(ref) for ref in there}
            first = own.get(0, [])
            if op.index in self.wanted and any(g is not None for g in first):
                value = self.floats.get(op.index)[0]
                yield op, value, [torch.zeros_like(value) if g is None else g for g in first]
            if own and op.call is not None:
                for ref, d, tensor in self._back(op, own, count):
                    _add(gradients.setdefault(ref, [None] * count), d, tensor)

    def value(self, ref: Ref) -> Tensor:
        """The captured float value of `ref`."""
        return self.floats.get(ref.op)[ref.position]

    def _back(self, op: Op, own: dict[int, Gradients], count: int) -> Iterator[tuple[Ref, int, Tensor]]:
        assert op.call is not None
        read = [ref for ref in references((op.call.args, op.call.kwargs)) if ref.op in self.needed]
        if not read:
            return
        rule = self._rule(op)
        if rule is None:
            yield from self._by_autograd(op, own, count)
            return
        for d, gradient in enumerate(own.get(0, [])):
            if gradient is not None:
                yield from ((ref, d, tensor) for ref, tensor in rule(gradient) if ref.op in self.needed)

    def _rule(self, op: Op) -> Rule | None:
        """The rule that propagates a gradient without running the op; None if autograd is needed."""
        assert op.call is not None
        if op.kind == OpKind.skipped:
            return None  # its forward is the user's, whatever its class is
        name = function_name(op.call.function) if op.call.function is not None else ""
        read = references((op.call.args, op.call.kwargs))
        identity = name in ("detach", "data") or isinstance(self.ops.modules.get(op.module or ""), nn.Identity)
        if op.owner in self.ops.folded or (identity and len(read) == 1):
            return lambda gradient: [(read[0], gradient)]
        leaf = self.ops.leaves.get(op.module or "")
        if isinstance(leaf, WeightedLeaf):
            return self._linear(op, leaf) if len(op.call.args) == 1 and not op.call.kwargs else None
        if name in ("relu", "relu6") or isinstance(leaf, (nn.ReLU, nn.ReLU6)):
            result, masked = self.floats.get(op.index)[0], torch.ops.aten.hardtanh_backward.default
            most = 6.0 if name == "relu6" or isinstance(leaf, nn.ReLU6) else math.inf
            return lambda gradient: [(read[0], masked(gradient.to(result), result, 0.0, most))]
        alike = all(ref.position == 0 and self.ops.tape.ops[ref.op].shape == op.shape for ref in read)
        if name == "add" and len(read) == len(op.call.args) == 2 and not op.call.kwargs and alike:
            return lambda gradient: [(ref, gradient) for ref in read]
        return None

    def _linear(self, op: Op, leaf: WeightedLeaf) -> Rule | None:
        """The rule of a convolution or linear layer.

        None if autograd is needed: padding that mirrors or wraps, "same" padding, which may pad one side more, and
        inputs without a batch axis.
        """
        assert op.call is not None
        ref: Ref = op.call.args[0]
        weight, _ = self.ops.weight(op)
        if isinstance(leaf, LinearLeaf):
            return lambda gradient: [(ref, gradient.to(weight) @ weight)]
        conv: Any = leaf
        x, backward = self.value(ref), torch.ops.aten.convolution_backward.default
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or x.ndim != weight.ndim:
            return None
        geometry = (conv.stride, conv.padding, conv.dilation, conv.transposed, conv.output_padding, conv.groups)
        only = (True, False, False)
        return lambda gradient: [(ref, backward(gradient.to(weight), x, weight, None, *geometry, only)[0])]

    def _by_autograd(self, op: Op, own: dict[int, Gradients], count: int) -> Iterator[tuple[Ref, int, Tensor]]:
        assert op.call is not None
        call = (op.call.args, op.call.kwargs)
        values = {ref: self.value(ref) for ref in references(call) if ref.op in self.needed}
        leaves = {ref: v.detach().requires_grad_() for ref, v in values.items() if v.is_floating_point()}
        with torch.enable_grad():
            results = self.ops.run(op, *self.ops.arguments(call, lambda r: leaves[r] if r in leaves else self.value(r)))
        for d in range(count):
            given = [(results[i], g[d]) for i, g in own.items() if results[i].requires_grad]
            pairs = [(result, gradient.to(result)) for result, gradient in given if gradient is not None]
            if leaves and pairs:
                made = torch.autograd.grad(
                    [result for result, _ in pairs],
                    list(leaves.values()),
                    [gradient for _, gradient in pairs],
                    retain_graph=d + 1 < count,
                    allow_unused=True,
                )
                yield from ((ref, d, tensor) for ref, tensor in zip(leaves, made, strict=True) if tensor is not None)


def _add(gradients: Gradients, d: int, tensor: Tensor) -> None:
    there = gradients[d]
    gradients[d] = tensor if there is None else there + tensor
