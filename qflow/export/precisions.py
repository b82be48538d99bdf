"""What every operator of a calibrated model computes with: dtypes and scales, read from its quantizers."""

from __future__ import annotations

from dataclasses import dataclass, field

from qflow.api.prepared import Prepared
from qflow.core.dtype import QDtype
from qflow.core.graph import OpNode
from qflow.core.qconfig import OpQConfig


@dataclass(frozen=True)
class OpPrecision:
    """One operator of the qconfig with its scales, as the model was judged."""

    node: OpNode
    op: OpQConfig
    scale: float | None
    """Scale of an integer output; None for float16 and for a high-precision output."""
    inputs: dict[int, tuple[QDtype, float | None]] = field(default_factory=dict)
    """Requantized inputs: position -> dtype and scale."""

    @property
    def pinned(self) -> bool:
        """True if the user gave the scale, or the range that it follows from."""
        return self.op.pinned_scale() is not None


def precisions(prepared: Prepared) -> dict[str, OpPrecision]:
    """Return every operator of the qconfig in the order of execution."""
    found = {}
    for node in prepared.graph.quantized:
        op = prepared.applied.ops[node.name]
        scale = float(prepared.outputs[node.quantizer or ""].scale) if op.output and op.output.is_integer else None
        inputs = {}
        for position, dtype in enumerate(op.input or ()):
            if dtype is not None:
                call, slot = prepared.reads_of(node)[0][position]
                own = float(prepared.requants_at[call][slot].scale)  # type: ignore[arg-type]
                inputs[position] = dtype, own if dtype.is_integer else None
        found[node.name] = OpPrecision(node, op, scale, inputs)
    return found
