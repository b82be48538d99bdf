"""QConfig: the precision of every operator, the rule that decided it, and the change that the device made to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from qflow.core.dtype import QDtype
from qflow.core.record import digest
from qflow.core.shown import Shown, View

METHODS = ("minmax", "percentile", "mse", "kl", "mix", "clip", "clip_std")
"""Calibration methods: what `OpQConfig.observer` and `calibration.method` may name."""


@dataclass(frozen=True)
class OpQConfig:
    """Precision of one operator, in the plugin's sense: "output" is its activation.

    `output` None means high-precision output: no fake quantizer. The input dtype is the producer's output, unless
    `input` asks for another one at that position (a requantization on this edge alone).
    """

    output: QDtype | None
    weight: QDtype | None = None
    input: tuple[QDtype | None, ...] | None = None
    """Dtype by input position if it differs from the producer's; None takes the producer's. In a setter's answer a
    single entry holds for every position; `resolve` expands it."""
    observer: str | None = None
    """Calibration method of this output; None takes the trial's."""
    own_observer: bool = False
    """The observer was set for this operator by name: then it holds for int16 too, unlike a template's."""
    fixed_scale: float | None = None
    known_range: tuple[float, float] | None = None
    """Known range (low, high) of the values: the scale is max(|low|, |high|) / -qmin."""
    frozen: bool = False
    """QAT keeps the calibrated scale (the plugin's fix_scale, averaging_constant 0)."""
    inner: QDtype | None = None
    """Dtype of the values inside a norm or softmax (`OpNode.inner`), set by the device rules; None: float inside."""
    weight_axis: int | None = None
    """Axis of the weight scales: None for the output channels, -1 for one scale of the whole weight."""
    rule: str = ""
    """The setter that decided, for example `sensitive 0.2: rank 3 of 41`."""
    fallback: str = ""
    """Why the device changed the requested precision; empty if it did not."""

    @property
    def effective(self) -> tuple[object, ...]:
        """The fields that change numbers, unlike rules and reasons."""
        dtypes = (self.output and self.output.value, self.weight and self.weight.value)
        more = (
            tuple(str(d or "") for d in self.input) if self.input else None,
            self.observer,
            self.known_range,
            self.frozen or None,
            self.weight_axis,
        )
        # fields at their defaults are left out, so that the digests of earlier studies stay the same
        own = ("own observer",) if self.own_observer and self.observer and self.output == QDtype.qint16 else ()
        inner = (f"inner {self.inner}",) if self.inner else ()
        return (*dtypes, self.fixed_scale, *(more if any(m is not None for m in more) else ()), *own, *inner)

    def pinned_scale(self) -> float | None:
        """Return the fixed scale, or the one that follows from the known range; None if calibration decides."""
        if self.fixed_scale is not None or self.known_range is None or self.output is None:
            return self.fixed_scale
        threshold = max(abs(bound) for bound in self.known_range)
        return threshold / -self.output.qmin if self.output.is_integer and threshold > 0 else None


@dataclass(frozen=True, repr=False)
class QConfig(Shown):
    """Maps the name of every operator that owns a quantizer to its OpQConfig."""

    march: str
    ops: Mapping[str, OpQConfig] = field(default_factory=dict)
    schema: int = 1

    @cached_property
    def digest(self) -> str:
        """Digest of what the qconfig computes: equal digests give equal numbers, whatever rules led to them."""
        return digest({"march": self.march, "ops": {name: op.effective for name, op in self.ops.items()}})

    def share(self, dtype: QDtype) -> float:
        """Return the share (0..1) of operators with output `dtype`, among those with a quantized output."""
        outputs = [op.output for op in self.ops.values() if op.output is not None]
        return sum(output == dtype for output in outputs) / len(outputs) if outputs else 0.0

    def names(self, dtype: QDtype) -> tuple[str, ...]:
        """Return the operators whose output is `dtype`."""
        return tuple(name for name, op in self.ops.items() if op.output == dtype)

    def weights(self, dtype: QDtype) -> tuple[str, ...]:
        """Return the operators whose weight is `dtype`."""
        return tuple(name for name, op in self.ops.items() if op.weight == dtype)

    def diff(self, other: QConfig) -> dict[str, tuple[OpQConfig | None, OpQConfig | None]]:
        """Return the operators whose effective precision differs, as (self, other)."""
        names = dict.fromkeys([*self.ops, *other.ops])
        pairs = {name: (self.ops.get(name), other.ops.get(name)) for name in names}
        return {name: (a, b) for name, (a, b) in pairs.items() if (a and a.effective) != (b and b.effective)}

    def view(self) -> View:
        """Return the precision of each operator; the title counts them by dtype."""
        counts = {str(d): len(self.names(d)) for d in QDtype}
        parts = [f"{n} {dtype}" for dtype, n in counts.items() if n]
        parts += [f"{n} int16 weights" for n in [len(self.weights(QDtype.qint16))] if n]
        rows = [(name, op.output or "int32", op.weight, op.rule, op.fallback) for name, op in self.ops.items()]
        title = f"{len(self.ops)} operators on {self.march}: {', '.join(parts)}"
        return View(title, ("operator", "output", "weight", "rule", "what the device changed"), rows)

    def with_ops(self, changes: Mapping[str, OpQConfig]) -> QConfig:
        """Return a copy with some operators replaced."""
        return replace(self, ops={**self.ops, **changes})
