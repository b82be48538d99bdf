"""Masks of a softmax, in which -inf means "masked out" and is not a value.

No integer code represents -inf. If it were quantized like a value, it would become the smallest code of the scores, and
masked positions would get a weight: a causal model would see the future. A large finite mask (-1e9) is no alternative,
because it takes the whole range from the scores. The device computes softmax itself (exp, sum, reciprocal) and applies
the mask there, to scores that are already quantized. So qflow does not quantize -inf:

    masked_fill(mask, -inf), where(mask, x, -inf) before a softmax    no quantizer: x keeps its scale
    x + mask, or a mask that is computed from other parts             quantized, but -inf stays -inf and moves no scale

An operator is "before a softmax" if every path from it ends in a softmax, through moves and arithmetic that keeps -inf.
Weights at masked positions are then exactly 0, as in float. -inf anywhere else saturates and is a finding of the model
check.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from qflow.core.graph import GEMM_KINDS, TRANSPARENT_KINDS, OpKind
from qflow.quant.trace.tape import Op

_FILLS = ("torch.masked_fill", "torch.where")
_CARRY = frozenset({OpKind.move, OpKind.add, OpKind.mul, OpKind.concat})
_CARRY_FUNCTIONS = (*_FILLS, "torch.sub", "torch.div")


def before_softmax(ops: Sequence[Op], readers: Mapping[int, Sequence[int]], leaving: Collection[int]) -> set[int]:
    """Ops whose result reaches nothing but a softmax, on every path, so that -inf in it is a mask."""
    found: set[int] = set()
    for op in reversed(ops):
        following = [ops[index] for index in readers[op.index]]
        if following and op.index not in leaving and all(_takes(reader, found) for reader in following):
            found.add(op.index)
    return found


def _takes(reader: Op, found: Collection[int]) -> bool:
    if reader.kind == OpKind.softmax:
        return "log" not in reader.op_type.lower()  # the result of a log softmax is -inf too
    return reader.index in found and (reader.kind in _CARRY or reader.op_type in _CARRY_FUNCTIONS)


def pure_masks(ops: Sequence[Op], masked: Collection[int]) -> set[int]:
    """Those of `masked` that only write -inf over one tensor of scores."""
    return {
        op.index
        for op in ops
        if op.index in masked
        and op.op_type in _FILLS
        and len(op.operands) == 3
        and -math.inf in op.operands
        and len([i for i in op.inputs if ops[i].floating]) == 1
    }


def keeping(ops: Sequence[Op], masked: Collection[int]) -> set[int]:
    """Those of `masked` that have a quantizer and can hold -inf: inputs, constants, fills, and ops on these."""
    origins = (OpKind.input, OpKind.constant)
    holding: set[int] = set()
    for op in ops:
        if op.index in masked and op.kind not in GEMM_KINDS:
            filled = op.kind in origins or op.op_type in _FILLS
            if filled or any(index in holding for index in op.inputs):
                holding.add(op.index)
    return {index for index in holding if ops[index].kind not in TRANSPARENT_KINDS}
