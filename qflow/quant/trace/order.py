"""Operators that change the order of values, and other operators whose result jumps on small errors.

Two values that are almost equal can change places under quantization. The result of `topk` or `sort` then differs from
float by the distance of the two values, and everything that is gathered by its indices differs entirely, although no
operator has made a large error. So a quantized pass can follow the order of a float pass: it takes its own values at
the indices of the float pass.

These can be followed: topk, sort, argsort, argmax, argmin, max and min over a dim, kthvalue, median, nanmedian, mode,
cummax and cummin, as functions and as Tensor methods. These cannot: `msort`, pooling with `return_indices`, and
operators inside a skipped module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qflow.core.graph import GEMM_KINDS, OpKind
from qflow.quant.trace.tape import Op, Tape

INDEX_ONLY = frozenset({"argsort", "argmax", "argmin"})
# Operator that returns (values, indices) -> position of `dim` among its arguments, default of `dim`.
_DIM: dict[str, tuple[int, int | None]] = {
    "topk": (2, -1),
    "sort": (1, -1),
    "kthvalue": (2, -1),
    "mode": (1, -1),
    **{name: (1, None) for name in ("max", "min", "median", "nanmedian", "cummax", "cummin")},
}
ORDER_CHANGING = INDEX_ONLY | frozenset(_DIM)
_FUNCTIONAL = re.compile(r"\[(\w+)\](\(\d+\))?$")  # `scope[topk](1)`, the name of an operator call

# A small error makes their result jump by a whole step, or gives another value.
_JUMPS = frozenset(
    ["round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "frac", "floor_divide", "remainder", "fmod", "heaviside"]
    + ["bucketize", "searchsorted", "histc", "histogram", "bernoulli", "multinomial", "poisson", "binomial"]
    + [
        "hardshrink",
        "gumbel_softmax",
        "copysign",
        "angle",
        "fake_quantize_per_tensor_affine",
        "fake_quantize_per_channel_affine",
    ]
    # vectors change sign or places
    + ["svd", "linalg_svd", "linalg_eig", "linalg_eigh", "qr", "linalg_qr", "slogdet", "linalg_slogdet"]
)
_COMPARISONS = frozenset({"eq", "ne", "gt", "ge", "lt", "le"})
# They keep some rows and drop others: all later values may hold other rows than in float.
_SELECTIONS = frozenset(["nms", "batched_nms", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"])


def may_change_order(calls: Collection[str]) -> bool:
    """True if one of these operator calls (`Plan.known`) may be order-changing; for `max` the name does not show it."""
    return any(found[1] in ORDER_CHANGING for found in map(_FUNCTIONAL.search, calls) if found)


def indices_of(name: str, out: Any) -> Tensor | None:
    """Indices (int64) in the result `out` of operator `name`; None if it is not order-changing.

    `name` is `function_name` of the function (ops.py). `max` of two tensors or of a whole tensor has no indices.
    """
    if name in INDEX_ONLY:
        return out if isinstance(out, Tensor) else None
    if name in _DIM and isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Tensor):
        return out[1]
    return None


def in_order(name: str, indices: Tensor, args: Any, kwargs: Any) -> Any:
    """The result of operator `name` on `args` and `kwargs` if its order were that of `indices`.

    Values are gathered from the first argument; the result has the operator's own type (`torch.return_types.topk`).
    `indices` must fit that argument: the same shape except along the operator's dim, and below its size there.
    """
    if name in INDEX_ONLY:
        return indices.clone()  # the user's code may write into it
    x = _values(args, kwargs)
    position, default = _DIM[name]
    dim = kwargs.get("dim", kwargs.get("axis", args[position] if len(args) > position else default))
    reduced = indices.ndim < x.ndim  # without keepdim
    values = x.gather(dim, indices.unsqueeze(dim)).squeeze(dim) if reduced else x.gather(dim, indices)
    return getattr(torch.return_types, name)((values, indices.clone()))


def _values(args: Any, kwargs: Any) -> Tensor:
    values: Tensor = args[0] if args else kwargs["input"]
    return values


@dataclass
class Order:
    """Indices of the order-changing calls of one float pass, and which calls of a later pass have followed them."""

    indices: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    """Shape of the values that each call has ordered."""
    followed: set[str] = field(default_factory=set)
    strayed: set[str] = field(default_factory=set)
    """Calls that could not follow, because the float pass has no such call or had values of another shape."""

    def record(self, name: str, call: str, out: Any, args: Any, kwargs: Any) -> Any:
        """Record the indices in `out`, the result of operator call `call`, and return `out`."""
        indices = indices_of(name, out)
        if indices is not None:
            self.indices[call] = indices.clone()
            self.shapes[call] = _values(args, kwargs).shape
        return out

    def follow(self, name: str, call: str, out: Any, args: Any, kwargs: Any) -> Any:
        """The result of `call` in the recorded order; `out` itself if it cannot follow."""
        if indices_of(name, out) is None:
            return out
        if self.shapes.get(call) != _values(args, kwargs).shape or kwargs.get("out") is not None:
            self.strayed.add(call)
            return out
        self.followed.add(call)
        return in_order(name, self.indices[call], args, kwargs)


Ordering = Callable[[str, str, Any, Any, Any], Any]
"""`Order.record` or `Order.follow`: (operator, its call, result, args, kwargs) -> the result to use."""


@dataclass(frozen=True)
class Jump:
    """An operator between the last GEMMs and an output whose result jumps on small errors."""

    output: str
    op: str
    op_type: str
    known: bool
    """False if it only may jump, because qflow does not know the operator."""
    skipped: str = ""
    """Path of the module if it was skipped, else ""."""


def jumps(tape: Tape) -> list[Jump]:
    """Operators that make outputs incomparable, by output, in the order of the model.

    Operators with no GEMM between them and the output count, and selections of rows (NMS, nonzero, unique) anywhere
    before it. Order-changing operators do not count, because they can be followed.
    """
    found = []
    for output, index in tape.outputs:
        for op in _upstream(tape, index):
            known = _jumps(op, [tape.ops[i] for i in op.inputs])
            if known is not None:
                skipped = op.module or "" if op.kind == OpKind.skipped else ""
                found.append(Jump(output, op.name, op.op_type, known, skipped))
    return found


def _upstream(tape: Tape, last: int) -> list[Op]:
    near, stack = set(), [last]
    while stack:
        index = stack.pop()
        if index not in near:
            near.add(index)
            if tape.ops[index].kind not in GEMM_KINDS:
                stack.extend(tape.ops[index].inputs)
    seen, stack = set(near), list(near)
    while stack:
        sources = [i for i in tape.ops[stack.pop()].inputs if i not in seen]
        seen.update(sources)
        stack.extend(sources)
    return [tape.ops[i] for i in sorted(seen) if i in near or _base(tape.ops[i]) in _SELECTIONS]


def _base(op: Op) -> str:
    return op.op_type.rpartition(".")[2]


def _jumps(op: Op, inputs: list[Op]) -> bool | None:
    name = _base(op)
    if name in ORDER_CHANGING or op.kind in (OpKind.input, OpKind.constant):
        return None
    if name in _SELECTIONS:
        return True
    # An op after topk may read its values or its indices; integer arithmetic on indices (`at // width`) is no jump.
    either = [_base(source) in ORDER_CHANGING and not source.single for source in inputs]
    values = any(source.floating and not both for source, both in zip(inputs, either, strict=True))
    if name in _JUMPS and (values or op.floating):
        return True
    if op.kind == OpKind.skipped:
        return False
    if not op.floating and not op.complex and (values or (any(either) and name in _COMPARISONS)):
        return True  # comparisons, casts to integers
    unknown = op.kind == OpKind.other and not _of_torch(op)
    return False if unknown and (op.floating or op.complex or values) else None


def _of_torch(op: Op) -> bool:
    """True for an operator of torch itself; those of them that jump are listed above."""
    spaces = (torch.ops.aten, torch.nn.functional, torch)
    return op.op_type.startswith("torch.nn.modules.") or any(hasattr(space, _base(op)) for space in spaces)
