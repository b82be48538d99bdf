"""The dtype rules of a march as data: what conf/device/*.yaml holds under `rules`; device.py applies them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qflow.core.errors import ConfigError
from qflow.core.graph import OpKind, OpNode
from qflow.core.known_range import function_of


@dataclass(frozen=True)
class DeviceRules:
    """Dtype rules of one march under one OpenExplorer release; kinds are `OpKind` values."""

    march: str
    oe_version: str
    int8_inputs: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Operator kind -> input positions that take int8 only (the plugin's canonicaliser)."""
    int8_outputs: Sequence[str] = ()
    """Operator kinds whose output is int8 only."""
    attention_int8: bool = True
    """The output of an nn.MultiheadAttention (of its last projection) is int8 only."""
    fused_add_int8: bool = True
    """Both inputs of a fused conv + add are int8 only on nash-e/m."""
    dual_int16: bool = False
    """A GEMM may have an int16 weight and an int16 input (J6M: from OE 3.2)."""
    dual_int16_ops: Sequence[str] = ("conv2d", "linear")
    """Functions for which `dual_int16` holds; for matmul see `matmul_int16_inputs`."""
    dual_high_precision: bool = False
    """An int16 x int16 GEMM may have a high-precision output."""
    matmul_int16_inputs: int = 1
    """How many inputs of a matmul may be int16."""
    float16_kinds: Sequence[str] = ()
    """Operator kinds that can run in fp16 (on the vector unit); others are refused."""
    inner_int16: Sequence[str] = ()
    """Operator kinds (layer_norm, softmax) whose inner values are int16 whatever their qconfig, and float16 in fp16.
    Other kinds are computed in float inside."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a rule that would match no operator and so have no effect."""
        kinds = [kind.value for kind in OpKind]
        for name in ("int8_inputs", "int8_outputs", "float16_kinds", "inner_int16"):
            for kind in getattr(self, name):
                if kind not in kinds:
                    raise ConfigError(f"rules.{name} takes operator kinds {', '.join(kinds)}, but got {kind}.")
        for kind, positions in self.int8_inputs.items():
            if any(p < 0 for p in positions):
                raise ConfigError(f"rules.int8_inputs.{kind} takes positions from 0 on, but got {list(positions)}.")
        if not 0 <= self.matmul_int16_inputs <= 2:
            raise ConfigError(f"rules.matmul_int16_inputs is 0, 1 or 2, but got {self.matmul_int16_inputs}.")

    def dual(self, node: OpNode) -> bool:
        """Return whether the device multiplies int16 by int16 for this operator."""
        if node.kind == OpKind.matmul:
            return self.matmul_int16_inputs > 1
        return self.dual_int16 and function_of(node) in self.dual_int16_ops
