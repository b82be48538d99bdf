"""QConfig: the precision of every operator, who decided it, and what the device made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from qflow.core.dtype import QDtype
from qflow.core.record import digest


@dataclass(frozen=True)
class OpQConfig:
    """Precision of one operator, in the plugin's sense: "output" is its activation.

    `output` None means high-precision output: no fake quantizer. The input dtype is the producer's output.
    """

    output: QDtype | None
    weight: QDtype | None = None
    fixed_scale: float | None = None
    rule: str = ""
    """The setter that decided, for example `sensitive 0.2: rank 3 of 41`."""
    fallback: str = ""
    """Why the device gave something else than was asked; empty if it did not."""

    @property
    def effective(self) -> tuple[str | None, str | None, float | None]:
        """What changes numbers; rules and reasons do not."""
        return (self.output and self.output.value, self.weight and self.weight.value, self.fixed_scale)


@dataclass(frozen=True)
class QConfig:
    """Operator name -> OpQConfig for every operator of a graph that owns a quantizer."""

    march: str
    ops: Mapping[str, OpQConfig] = field(default_factory=dict)
    schema: int = 1

    @cached_property
    def digest(self) -> str:
        """Names what the qconfig computes: equal digests give equal numbers, whatever rules led there."""
        return digest({"march": self.march, "ops": {name: op.effective for name, op in self.ops.items()}})

    def share(self, dtype: QDtype) -> float:
        """Share of operators, among those with a quantized output, whose output is `dtype` (0..1)."""
        outputs = [op.output for op in self.ops.values() if op.output is not None]
        return sum(output == dtype for output in outputs) / len(outputs) if outputs else 0.0

    def names(self, dtype: QDtype) -> tuple[str, ...]:
        """Operators whose output is `dtype`."""
        return tuple(name for name, op in self.ops.items() if op.output == dtype)

    def diff(self, other: QConfig) -> dict[str, tuple[OpQConfig | None, OpQConfig | None]]:
        """Operators whose effective precision differs, as (self, other)."""
        names = dict.fromkeys([*self.ops, *other.ops])
        pairs = {name: (self.ops.get(name), other.ops.get(name)) for name in names}
        return {name: (a, b) for name, (a, b) in pairs.items() if (a and a.effective) != (b and b.effective)}

    def with_ops(self, changes: Mapping[str, OpQConfig]) -> QConfig:
        """A copy with some operators replaced."""
        return replace(self, ops={**self.ops, **changes})
