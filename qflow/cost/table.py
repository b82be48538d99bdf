"""A cost report as text and CSV. The columns follow Arm Vela's per-layer report, in this hardware's units."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping

from qflow.cost.records import CostReport, OpCost

COLUMNS: dict[str, str] = {
    "Operator": "kind",
    "Name": "op",
    "Engine": "engine",
    "Input dtype": "input_dtype",
    "Weight dtype": "weight_dtype",
    "Output dtype": "output_dtype",
    "Time (ms)": "ms",
    "Low (ms)": "low_ms",
    "High (ms)": "high_ms",
    "Network (share)": "share",
    "Utilisation (share)": "utilisation",
    "MAC count": "macs",
    "MACs padded": "padded_macs",
    "MACs depthwise": "depthwise_macs",
    "MACs attention": "attention_macs",
    "LUT elements": "lut_elements",
    "Softmax elements": "softmax_elements",
    "Layer norm elements": "layer_norm_elements",
    "Reduce elements": "reduce_elements",
    "Element-wise elements": "elementwise_elements",
    "Moved elements": "moved_elements",
    "Gathered elements": "gathered_elements",
    "Cast elements": "cast_elements",
    "Weight (bytes)": "weight_bytes",
    "Input (bytes)": "input_bytes",
    "Output (bytes)": "output_bytes",
    "Spilled (bytes)": "spilled_bytes",
    "Source": "source",
}
"""Heading -> field of `OpCost`."""


def cost_csv(report: CostReport) -> str:
    """One line an operator."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for op in report.ops:
        writer.writerow([_cell(getattr(op, name)) for name in COLUMNS.values()])
    return out.getvalue()


def promotions_csv(deltas: Mapping[str, float], dtype: str) -> str:
    """What raising each operator's output to `dtype` costs, cheapest first."""
    lines = [f"Name,Time for {dtype} (ms)"]
    for name, ms in sorted(deltas.items(), key=lambda item: (item[1], item[0])):
        lines.append(f'"{name}",{ms:.6g}')
    return "\n".join(lines) + "\n"


COST_METRICS: Mapping[str, Callable[[CostReport], float]] = {
    "cost/latency_ms": lambda report: report.latency_ms,
    "cost/latency_low_ms": lambda report: report.low_ms,
    "cost/latency_high_ms": lambda report: report.high_ms,
    "cost/bpu_ms": lambda report: report.bpu_ms,
    "cost/fps": lambda report: report.fps,
    "cost/int16_mac_share": lambda report: report.int16_mac_share,
    "cost/weight_mb": lambda report: report.weight_mb,
    "cost/traffic_mb": lambda report: report.traffic.bytes * 1e-6,
}
"""The scalars of a report under the names that runs show."""


def cost_metrics(report: CostReport) -> dict[str, float]:
    """Every one of COST_METRICS."""
    return {name: read(report) for name, read in COST_METRICS.items()}


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def cost_text(report: CostReport, rows: int | None = None, fps: float | None = None) -> str:
    """Totals, then the costliest operators (`rows` of them, all without): what a person reads."""
    traffic = report.traffic
    at = fps if fps is not None else report.fps
    bound = "at least " if traffic.lower_bound else ""
    lines = [
        f"{'latency':<12}{report.latency_ms:.3f} ms [{report.low_ms:.3f}, {report.high_ms:.3f}], one thread",
        f"{'throughput':<12}{report.fps:.0f} frames/s saturated ({report.bpu_ms:.3f} ms on the BPU)",
        f"{'work':<12}{report.gmacs:.3f} GMAC, {report.int16_mac_share:.1%} of them with int16; "
        f"weights {report.weight_mb:.3f} MB",
        f"{'traffic':<12}{bound}{traffic.bytes * 1e-6:.3f} MB a frame: weights {traffic.weight_bytes * 1e-6:.3f}, "
        f"inputs {traffic.input_bytes * 1e-6:.3f}, outputs {traffic.output_bytes * 1e-6:.3f}, spilled "
        + ("unknown (device.cost.onchip_mb)" if traffic.lower_bound else f"{traffic.spilled_bytes * 1e-6:.3f}"),
        f"{'':<12}{bound}{traffic.bandwidth(at):.3f} GB/s at {at:.0f} frames/s; at most "
        f"{traffic.peak_bytes * 1e-6:.3f} MB of activations at once",
        f"{'shapes':<12}{', '.join(f'{name} {list(shape)}' for name, shape in report.shapes.items())}",
    ]
    if report.measured:
        lines.append(f"{'measured':<12}{report.measured}")
    if report.refusal:
        lines.append(f"{'no estimate':<12}{report.refusal}")
    ops = sorted(report.ops, key=lambda op: -op.ms)
    shown = [op for op in ops if op.ms > 0][:rows]
    width = max([8, *(len(op.op) for op in shown)])
    lines.append("")
    lines.append(
        f"{'operator':<{width}}  {'unit':<5}{'in/weight':<15}{'ms':>8}{'interval':>17}{'share':>8}{'MMAC':>9}  source"
    )
    lines += [_line(op, width) for op in shown]
    rest = [op for op in ops if op not in shown]
    if rest:
        lines.append(f"{len(rest)} other operators: {sum(op.ms for op in rest):.4f} ms")
    return "\n".join(lines) + "\n"


def _line(op: OpCost, width: int) -> str:
    dtypes = f"{op.input_dtype}/{op.weight_dtype}" if op.weight_dtype else op.input_dtype
    interval = f"[{op.low_ms:.4f}, {op.high_ms:.4f}]"
    return (
        f"{op.op:<{width}}  {op.engine:<5}{dtypes:<15}{op.ms:>8.4f}{interval:>17}{op.share:>8.1%}"
        f"{op.macs * 1e-6:>9.2f}  {op.source}"
    )
