"""What the cost model says, and what a board has said: records of names and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qflow.core.qconfig import QConfig
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
    """Of the BPU's time for the whole network."""
    utilisation: float
    """MACs a nominal int8 MAC array would do in the same time."""
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
    weight_bytes: int
    input_bytes: int
    output_bytes: int
    spilled_bytes: int
    source: str
    """formula, measured, or measured and carried to other dtypes by the formula."""


@dataclass(frozen=True)
class CostReport:
    """Predicted cost of one qconfig at the deployed shape. `latency_ms` is one thread, with its interval.

    `refusal` says why the figures should not be published without a measured profile; empty if they may be.
    `fps` is throughput with frames in flight, 1000 / bpu_ms: the host's part of one frame runs beside the next on the
    BPU, so it is more than 1000 / latency_ms. Both are for one call at `shapes`: at batch n, n samples a call.
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
    measured: str = ""
    """The measured profile that times come from, and how many operators it covers."""
    measured_bytes: int | None = None
    """Loaded and stored in one run of the model that was measured, at its dtypes."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Input -> the shape at which the cost was computed, batch first."""


@dataclass(frozen=True)
class Measured:
    """Measured times by operator (ms), the dtypes they were measured at, and the whole, if the report says it."""

    times: Mapping[str, float]
    reference: QConfig
    total_ms: float | None = None
    """On the BPU."""
    host_ms: float = 0.0
    """Of nodes on the CPU: a part of one thread's latency, none of the BPU's time."""
    ddr_bytes: int | None = None
    source: str = ""


@dataclass(frozen=True)
class Change:
    """BPU time of one qconfig over that of another of the same network, by the lowest to the highest factors."""

    ratio: float
    low: float
    high: float
