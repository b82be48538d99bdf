"""Work under a qconfig: the dtypes that each operator computes in, the casts, and the bytes of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qflow.core.dtype import QDtype
from qflow.core.graph import ModelGraph, OpKind
from qflow.core.qconfig import OpQConfig, QConfig
from qflow.cost_model.work import OpWork, work_of

Ops = Mapping[str, OpQConfig]


@dataclass(frozen=True)
class OpFeatures:
    """One operator's work with the dtypes that its engine computes in."""

    work: OpWork
    input_dtype: QDtype
    weight_dtype: QDtype | None
    """Dtype that a GEMM multiplies its input of highest precision with; None if the operator is no GEMM."""
    output_dtype: QDtype | None
    cast: int
    """Elements of inputs that must be cast to another dtype first."""
    boundary: int
    """Elements that pass from int8 to int16 or back at the operator: its casts between the two, and its output if it
    writes the other one than it computes in."""
    weight_bytes: int
    """Bytes stored in the model: weights, and constants at the dtype in which they are read."""


def features(graph: ModelGraph, qconfig: QConfig) -> tuple[OpFeatures, ...]:
    """One row per operator of `graph`, traced at the deployed shape, under `qconfig`."""
    return tuple(under(work_of(graph), qconfig.ops))


def under(works: Sequence[OpWork], ops: Ops) -> Iterator[OpFeatures]:
    """The rows of `works` under `ops`; for other dtypes a search only needs to repeat this step."""
    for work in works:
        op = ops[work.owner] if work.owner is not None else None
        arriving = _arriving(work, op, ops)
        dtypes = {d for at in arriving for d in at}
        known = dtypes - FLOAT
        computed = max(known, key=_rank) if known else (op.output if op and op.output else QDtype.qint8)
        if op is not None and op.output == QDtype.float16:
            computed = QDtype.float16
        alike = len(dtypes) == 1 and computed in dtypes and not (op is not None and op.input)
        cast = 0 if alike or work.transparent else _casts(work, op, ops, computed)
        yield OpFeatures(
            work,
            computed,
            _weight_dtype(work, op, arriving) if work.gemm else None,
            op.output if op else None,
            cast,
            _boundary(work, op, computed, cast),
            _stored_bytes(work, op) if work.weights else 0,
        )


FLOAT = frozenset({QDtype.float32})
INTEGERS = (QDtype.qint8, QDtype.qint16)
_RANK = {dtype: dtype.rank for dtype in QDtype}
_rank = _RANK.__getitem__


def _arriving(work: OpWork, op: OpQConfig | None, ops: Ops) -> list[list[QDtype]]:
    """Dtypes at each input position as the operator computes with them: a dtype set for the input replaces that of the
    producer.
    """
    given = op.input if op and op.input else ()
    if not given:
        return [[ops[o].output or QDtype.float32 for o in owners] for owners in work.inputs]
    return [
        [given[i]] if i < len(given) and given[i] is not None else [ops[o].output or QDtype.float32 for o in owners]  # type: ignore[list-item]
        for i, owners in enumerate(work.inputs)
    ]


def _weight_dtype(work: OpWork, op: OpQConfig | None, arriving: Sequence[Sequence[QDtype]]) -> QDtype:
    if work.two_activations:
        factors = [d for at in arriving[:2] for d in at if d != QDtype.float32]
        return min(factors, key=_rank) if len(factors) > 1 else QDtype.qint8
    return (op.weight if op else None) or QDtype.qint8


def _stored_bytes(work: OpWork, op: OpQConfig | None) -> int:
    dtype = (op.output if work.kind == OpKind.constant else op.weight) if op else None
    return work.weights * dtype.bits // 8 if dtype else 0


def _boundary(work: OpWork, op: OpQConfig | None, computed: QDtype, cast: int) -> int:
    if computed not in INTEGERS or work.transparent:
        return 0
    written = op.output if op else None
    return cast + (work.elements if written in INTEGERS and written != computed else 0)


def _casts(work: OpWork, op: OpQConfig | None, ops: Ops, to: QDtype) -> int:
    """Elements that must be cast: because another input has a higher dtype, because the qconfig sets the dtype of the
    input, or because one side is integer and the other fp16.
    """
    several = len(work.inputs) > 1 and not work.two_activations
    total = 0
    for i, owners in enumerate(work.inputs):
        held = [ops[owner].output for owner in owners]
        given = op.input[i] if op and op.input and i < len(op.input) else None
        higher = several and any(d is not None and d != to for d in held)
        border = any(d is not None and (d == QDtype.float16) != (to == QDtype.float16) for d in held)
        if higher or border or (given is not None and any(d != given for d in held)):
            total += work.input_elements[i]
    return total
