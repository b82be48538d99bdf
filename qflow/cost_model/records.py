"""The results of the cost model, and the measurements of a board, as dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qflow.core.qconfig import QConfig
from qflow.core.shown import Shown, View
from qflow.cost_model.traffic import Traffic


@dataclass(frozen=True)
class OpCost:
    """Time of one operator in ms with its interval, and the work that it comes from (counts, bytes)."""

    op: str
    kind: str
    engine: str
    input_dtype: str
    weight_dtype: str
    output_dtype: str
    ms: float
    low_ms: float
    high_ms: float
    share: float
    """Share of the BPU's time for the whole network."""
    utilisation: float
    """Its MACs over those that the nominal int8 MAC array could do in the same time."""
    macs: int
    padded_macs: int
    depthwise_macs: int
    attention_macs: int
    lut_elements: int
    softmax_elements: int
    layer_norm_elements: int
    reduce_elements: int
    elementwise_elements: int
    moved_elements: int
    gathered_elements: int
    cast_elements: int
    boundary_elements: int
    weight_bytes: int
    input_bytes: int
    output_bytes: int
    spilled_bytes: int
    source: str
    """formula, measured, or measured at other dtypes and converted by the formula."""

    def placed(self, share: float, bytes_: tuple[int, int, int]) -> OpCost:
        """The record with its share of the network and its input, output and spilled bytes.

        `dataclasses.replace` would take four times as long, for hundreds of operators of each report.
        """
        found = object.__new__(OpCost)
        read, written, spilled = bytes_
        values = {"share": share, "input_bytes": read, "output_bytes": written, "spilled_bytes": spilled}
        found.__dict__.update(self.__dict__ | values)
        return found


@dataclass(frozen=True, repr=False)
class CostReport(Shown):
    """Predicted cost of one qconfig at the deployed shape. `latency_ms` is for one thread, with its interval.

    `refusal` is the reason why the cost should not be published without a measured profile; "" if it may be. `fps` is
    the throughput of several frames at once, 1000 / bpu_ms: the host works on one frame while the BPU computes the
    next, so it is more than 1000 / latency_ms. Both are for one call at `shapes`: at batch n, n samples per call.
    """

    march: str
    latency_ms: float
    low_ms: float
    high_ms: float
    bpu_ms: float
    fps: float
    gmacs: float
    int16_mac_share: float
    weight_mb: float
    ops: tuple[OpCost, ...]
    traffic: Traffic
    refusal: str = ""
    widened: tuple[str, ...] = ()
    """Why the interval is wider than that of the measured networks; () if it is not."""
    float_output_ms: float = 0.0
    """What the host would add at most if it converted the outputs to float; 0 if the latency contains it."""
    boundaries: int = 0
    """Operators at which values pass from int8 to int16 or back."""
    boundary_ms: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Lowest, likely and highest time of these conversions. The latency contains the likely one, its interval the
    others: `latency_ms - boundary_ms[1]` is the latency if they are free, `latency_ms - boundary_ms[1] +
    boundary_ms[2]` if the host makes them."""
    measured: str = ""
    """The measured profile that times come from, and how many operators it covers."""
    measured_bytes: int | None = None
    """Bytes loaded and stored in one run of the measured model, at its dtypes."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Input -> the shape at which the cost was computed, batch first."""

    def latency_at(self, threads: int) -> float:
        """Predicted latency in ms with `threads` frames in flight: with more than one, a frame waits for the BPU.

        Of 103 published latencies at two threads, 90 % are 0.95 to 1.14 times this figure; the median is 0.99.
        """
        return max(self.latency_ms, threads * self.bpu_ms)

    def view(self) -> View:
        """Return the operators, the costliest first; the title has the latency and its interval."""
        title = f"{self.latency_ms:.3f} ms [{self.low_ms:.3f}, {self.high_ms:.3f}] on {self.march}, {self.fps:.0f} fps"
        title += f"; no estimate: {self.refusal}" if self.refusal else ""
        title += f"; wide: {'; '.join(self.widened)}" if self.widened and not self.refusal else ""
        rows = [
            (op.op, op.engine, op.input_dtype, op.weight_dtype, op.ms, op.low_ms, op.high_ms, 100.0 * op.share)
            for op in sorted(self.ops, key=lambda op: -op.ms)
        ]
        header = ("operator", "unit", "input", "weight", "time (ms)", "low (ms)", "high (ms)", "share (%)")
        return View(title, header, rows)


@dataclass(frozen=True)
class Measured:
    """Measured times by operator (ms), the dtypes they were measured at, and the total, if the report has one."""

    times: Mapping[str, float]
    reference: QConfig
    total_ms: float | None = None
    """On the BPU."""
    host_ms: float = 0.0
    """Time of nodes on the CPU: part of the latency of one thread, not of the BPU's time."""
    ddr_bytes: int | None = None
    source: str = ""


@dataclass(frozen=True)
class Change:
    """BPU time of one qconfig over that of another of the same network: the likely ratio, and its range by factors."""

    ratio: float
    low: float
    high: float
