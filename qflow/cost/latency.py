"""Latency on Journey 6: an additive operator model, every figure with its interval.

    T_op  = [tau*gemm + k_mac*MAC/M + k_vec*LUT/V + k_soft*SOFT/S + k_vec*CAST/V] / f  +  weight bytes / B
    T_bpu = T0 + sum of T_op + float outputs / F;      latency (1 thread) = T_bpu + H

Fitted to published measurements of S100 (nash-e) and S100P (nash-m) boards: 6 % median error leaving a network
out, 8 % leaving a family out, 96 % of int8 convolutional networks within 20 %. No pair int8 / int16 of one
network was ever published: the int16 factors rest on two all-int16 networks and come with a wide interval.
Each operator's interval is [0.80, 1.25] of its int8 time ([0.65, 1.5] in a network with operators that the rows do
not hold) and [0.5, 2.5] of what runs in 16 bits, so the total's interval grows with the share of time in 16 bits.
Comparing two qconfigs of one network is safer than either figure: fixed costs and weights cancel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph, OpKind
from qflow.core.qconfig import QConfig
from qflow.cost.features import UNVALIDATED, VALIDATED, OpFeatures, features

INT8_INTERVAL = (0.80, 1.25)
UNSEEN_INTERVAL = (0.65, 1.5)
WIDE_INTERVAL = (0.5, 2.5)


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Parameters of one march; defaults are those of nash-m (S100P as its stand-in)."""

    march: str = "nash-m"
    clock_ghz: float = 1.5
    fixed_ms: float = 0.062
    gemm_us_ghz: float = 1.6
    gmac_per_ms_ghz: float = 15.1
    lut_melem_per_ms_ghz: float = 27.7
    softmax_melem_per_ms_ghz: float = 7.0
    weight_mb_per_ms: float = 64.5
    host_ms: float = 0.32
    float_melem_per_ms: float = 1.56
    host_dequantize: bool = False
    """True if float outputs are converted on the host; builds usually strip the dequantize nodes."""
    mac_factors: Mapping[str, float] = field(
        default_factory=lambda: {
            "qint8/qint8": 1.0,
            "qint16/qint8": 2.0,
            "qint8/qint16": 2.0,
            "qint16/qint16": 4.0,
        }
    )
    """Input / weight dtype -> cost of a MAC relative to int8."""
    vector_factors: Mapping[str, float] = field(default_factory=lambda: {"qint8": 1.0, "qint16": 2.0, "float16": 8.0})


@dataclass(frozen=True)
class OpCost:
    """Time of one operator in ms with its interval, and the work it comes from."""

    op: str
    kind: str
    input_dtype: str
    weight_dtype: str
    output_dtype: str
    ms: float
    low_ms: float
    high_ms: float
    macs: int
    lut_elements: int
    weight_bytes: int
    cast_elements: int


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
    refusal: str = ""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Input -> the shape at which the cost was computed, batch first."""


def op_cost(row: OpFeatures, model: CostModel, narrow: tuple[float, float] = INT8_INTERVAL) -> OpCost:
    """Time of one operator; `narrow` is the interval of what runs in int8.

    Raises ConfigError for a dtype pair that the device file has no factor for.
    """
    f = model.clock_ghz
    weight = (row.weight_dtype or QDtype.qint8).value
    mac_factor = _factor(model.mac_factors, f"{row.input_dtype}/{weight}", row) if row.padded_macs else 0.0
    vector = _factor(model.vector_factors, row.input_dtype.value, row) if row.lut or row.cast else 0.0
    attention = 2.0 if row.input_dtype == QDtype.qint16 else 1.0
    compute = (
        model.gemm_us_ghz * 1e-3 * row.gemm
        + mac_factor * row.padded_macs * 1e-9 / model.gmac_per_ms_ghz
        + vector * (row.lut + row.cast) * 1e-6 / model.lut_melem_per_ms_ghz
        + attention * row.softmax * 1e-6 / model.softmax_melem_per_ms_ghz
    ) / f
    stream = row.weight_bytes * 1e-6 / model.weight_mb_per_ms
    wide = row.input_dtype != QDtype.qint8 or (row.weight_dtype or QDtype.qint8) != QDtype.qint8 or row.cast > 0
    low, high = WIDE_INTERVAL if wide else narrow
    return OpCost(
        op=row.name,
        kind=row.kind.value,
        input_dtype=row.input_dtype.value,
        weight_dtype=row.weight_dtype.value if row.weight_dtype else "",
        output_dtype=row.output_dtype.value if row.output_dtype else "int32" if row.gemm else "",
        ms=compute + stream,
        low_ms=low * compute + narrow[0] * stream,
        high_ms=high * compute + narrow[1] * stream,
        macs=row.macs,
        lut_elements=row.lut,
        weight_bytes=row.weight_bytes,
        cast_elements=row.cast,
    )


def _factor(table: Mapping[str, float], key: str, row: OpFeatures) -> float:
    if key not in table:
        raise ConfigError(f"The device file prices {', '.join(table)}, but got {key} for {row.name}. Add a factor.")
    return table[key]


def predict(graph: ModelGraph, qconfig: QConfig, model: CostModel) -> CostReport:
    """Cost of `graph` (traced at the deployed shape) under `qconfig`."""
    rows = features(graph, qconfig)
    narrow = INT8_INTERVAL if all(r.kind in VALIDATED for r in rows) else UNSEEN_INTERVAL
    ops = tuple(op_cost(row, model, narrow) for row in rows)
    float_out = sum(r.float_out for r in rows) * 1e-6 / model.float_melem_per_ms if model.host_dequantize else 0.0
    fixed = model.fixed_ms + float_out
    bpu = fixed + sum(op.ms for op in ops)
    outside = fixed + model.host_ms
    macs = sum(r.macs for r in rows)
    wide = sum(r.macs for r in rows if QDtype.qint16 in (r.input_dtype, r.weight_dtype))
    return CostReport(
        march=model.march,
        latency_ms=bpu + model.host_ms,
        low_ms=narrow[0] * outside + sum(op.low_ms for op in ops),
        high_ms=narrow[1] * outside + sum(op.high_ms for op in ops),
        bpu_ms=bpu,
        fps=1000.0 / bpu,
        gmacs=macs * 1e-9,
        int16_mac_share=wide / macs if macs else 0.0,
        weight_mb=sum(r.weight_bytes for r in rows) * 1e-6,
        ops=ops,
        refusal=_refusal(rows),
        shapes={n.name: n.shape for n in graph.nodes if n.kind == OpKind.input},
    )


def _refusal(rows: tuple[OpFeatures, ...]) -> str:
    foreign = [r.name for r in rows if r.kind in (OpKind.other, OpKind.skipped)]
    if foreign:
        return f"no price for {', '.join(foreign[:3])}: the latency is a lower bound; compare two qconfigs only"
    work = sum(r.elements for r in rows)
    unknown = sum(r.elements for r in rows if r.kind in UNVALIDATED)
    if work and unknown > 0.5 * work:
        return (
            f"softmax, grid_sample and gather hold {unknown / work:.0%} of the elements: outside what the model was "
            "validated on; load a measured profile, or read only the change between two qconfigs"
        )
    return ""
