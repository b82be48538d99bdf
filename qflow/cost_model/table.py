"""A cost report as text, CSV and a table for the MLflow UI. The CSV's columns follow Arm Vela's per-layer report."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence

from qflow.core.record import to_json
from qflow.cost_model.records import CostReport, OpCost

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
    "MACs (count)": "macs",
    "Padded MACs (count)": "padded_macs",
    "Depthwise MACs (count)": "depthwise_macs",
    "Attention MACs (count)": "attention_macs",
    "LUT (elements)": "lut_elements",
    "Softmax (elements)": "softmax_elements",
    "Layer norm (elements)": "layer_norm_elements",
    "Reduce (elements)": "reduce_elements",
    "Element-wise (elements)": "elementwise_elements",
    "Moved (elements)": "moved_elements",
    "Gathered (elements)": "gathered_elements",
    "Cast (elements)": "cast_elements",
    "Boundary (elements)": "boundary_elements",
    "Weight (bytes)": "weight_bytes",
    "Input (bytes)": "input_bytes",
    "Output (bytes)": "output_bytes",
    "Spilled (bytes)": "spilled_bytes",
    "Source": "source",
}
"""Heading -> field of `OpCost`. Headings of numbers have the unit in brackets."""
FLOATS = 0.1
"""Share of the latency from which on the conversion of the outputs to float, which it leaves out, is worth a line."""


def by_time(report: CostReport) -> list[OpCost]:
    """Operators, the costliest first."""
    return sorted(report.ops, key=lambda op: -op.ms)


def fixed_ms(report: CostReport) -> float:
    """The BPU's time for a run besides that of its operators."""
    return max(report.bpu_ms - sum(op.ms for op in report.ops), 0.0)


def cost_csv(report: CostReport) -> str:
    """One line per operator with all its columns, in order of execution."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for op in report.ops:
        writer.writerow([_cell(getattr(op, name)) for name in COLUMNS.values()])
    return out.getvalue()


def cost_json(report: CostReport) -> str:
    """The main columns as a table that the MLflow UI shows; the costliest operator first."""
    names = ["Name", "Operator", "Engine", "Dtypes", "Time (ms)", "Low (ms)", "High (ms)", "Share (%)"]
    names += ["MACs (10^6)", "Weight (kB)", "Output (kB)", "Source"]
    rows = [
        [op.op, op.kind, op.engine, _dtypes(op)]
        + [_round(v) for v in (op.ms, op.low_ms, op.high_ms, 100.0 * op.share, op.macs * 1e-6)]
        + [_round(op.weight_bytes * 1e-3), _round(op.output_bytes * 1e-3), _source(op)]
        for op in by_time(report)
    ]
    return to_json({"columns": names, "data": rows})


def promotions_table(deltas: Mapping[str, float], dtype: str) -> tuple[list[str], list[tuple[str, float]]]:
    """Headings, and the added time if one operator's output alone is raised to `dtype`, cheapest first."""
    return ["Name", f"Time for {dtype} (ms)"], sorted(deltas.items(), key=lambda item: (item[1], item[0]))


def promotions_csv(deltas: Mapping[str, float], dtype: str) -> str:
    """`promotions_table` as CSV."""
    names, rows = promotions_table(deltas, dtype)
    return "\n".join([",".join(names), *(f'"{name}",{ms:.6g}' for name, ms in rows)]) + "\n"


def promotions_json(deltas: Mapping[str, float], dtype: str) -> str:
    """`promotions_table` as a table that the MLflow UI shows."""
    names, rows = promotions_table(deltas, dtype)
    return to_json({"columns": names, "data": [[name, _round(ms)] for name, ms in rows]})


COST_METRICS: Mapping[str, Callable[[CostReport], float]] = {
    "cost/latency_ms": lambda report: report.latency_ms,
    "cost/latency_low_ms": lambda report: report.low_ms,
    "cost/latency_high_ms": lambda report: report.high_ms,
    "cost/bpu_ms": lambda report: report.bpu_ms,
    "cost/fps": lambda report: report.fps,
    "cost/boundaries": lambda report: float(report.boundaries),
    "cost/boundary_ms": lambda report: report.boundary_ms[1],
    "cost/boundary_high_ms": lambda report: report.boundary_ms[2],
    "cost/int16_mac_share": lambda report: report.int16_mac_share,
    "cost/weight_mb": lambda report: report.weight_mb,
    "cost/traffic_mb": lambda report: report.traffic.bytes * 1e-6,
}
"""Name of a run's metric -> its value in a report."""


def cost_metrics(report: CostReport) -> dict[str, float]:
    """The values of all COST_METRICS."""
    return {name: read(report) for name, read in COST_METRICS.items()}


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _dtypes(op: OpCost) -> str:
    return f"{op.input_dtype}/{op.weight_dtype}" if op.weight_dtype else op.input_dtype


def _source(op: OpCost) -> str:
    return f"{op.source}, with casts" if op.cast_elements else op.source


def cost_text(report: CostReport, rows: int | None = None, fps: float | None = None) -> str:
    """The report as text: totals, then the `rows` costliest operators (None: all)."""
    ops = by_time(report)
    shown = [op for op in ops if op.ms > 0][:rows]
    width = max([8, *(len(op.op) for op in shown)])
    heading = f"{'operator':<{width}}  {'unit':<6}{'input/weight':<15}{'time (ms)':>9}{'interval (ms)':>18}"
    lines = [*_totals(report, fps), "", f"{heading}{'share (%)':>11}{'10^6 MACs':>11}  source"]
    lines += [_line(op, width) for op in shown]
    rest = ops[len(shown) :]
    others = f"{len(rest)} other operators: {sum(op.ms for op in rest):.4f} ms; " if rest else ""
    lines.append(f"{others}a run by itself: {fixed_ms(report):.4f} ms")
    return "\n".join(lines) + "\n"


def _totals(report: CostReport, fps: float | None) -> Sequence[str]:
    traffic = report.traffic
    at = fps if fps is not None else report.fps
    bound = "at least " if traffic.lower_bound else ""
    spilled = "unknown (device.cost.onchip_mb)" if traffic.lower_bound else f"{traffic.spilled_bytes * 1e-6:.3f}"
    lines = [
        f"{'latency':<12}{report.latency_ms:.3f} ms [{report.low_ms:.3f}, {report.high_ms:.3f}], one thread; "
        f"{report.latency_at(2):.3f} with two",
        f"{'throughput':<12}{report.fps:.0f} frames/s saturated ({report.bpu_ms:.3f} ms on the BPU)",
        f"{'work':<12}{report.gmacs:.3f} GMAC, {report.int16_mac_share:.1%} of them with int16; "
        f"weights {report.weight_mb:.3f} MB",
        f"{'traffic':<12}{bound}{traffic.bytes * 1e-6:.3f} MB a frame: weights {traffic.weight_bytes * 1e-6:.3f}, "
        f"inputs {traffic.input_bytes * 1e-6:.3f}, outputs {traffic.output_bytes * 1e-6:.3f}, spilled {spilled}",
        f"{'':<12}{bound}{traffic.bandwidth(at):.3f} GB/s at {at:.0f} frames/s; at most "
        f"{traffic.peak_bytes * 1e-6:.3f} MB of activations at once",
        f"{'shapes':<12}{', '.join(f'{name} {list(shape)}' for name, shape in report.shapes.items())}",
    ]
    if report.float_output_ms > FLOATS * report.latency_ms:
        lines.insert(1, _floats(report))
    if report.boundaries:
        lines.insert(1, _boundaries(report))
    if report.measured_bytes is not None:
        lines.insert(
            3 + next(i for i, line in enumerate(lines) if line.startswith("throughput")),
            f"{'':<12}measured {report.measured_bytes * 1e-6:.3f} MB a frame, at the profile's dtypes",
        )
    if report.measured:
        lines.append(f"{'measured':<12}{report.measured}")
    if not report.refusal:
        lines += [f"{'wide':<12}{reason}" for reason in report.widened]
    if report.refusal:
        lines.append(f"{'no estimate':<12}{report.refusal}")
    return lines


def _boundaries(report: CostReport) -> str:
    free = report.latency_ms - report.boundary_ms[1]
    return (
        f"{'boundaries':<12}{report.boundaries} between int8 and int16 take {report.boundary_ms[1]:.3f} ms of it: "
        f"{free:.3f} ms if they are free, {free + report.boundary_ms[2]:.3f} if the host converts"
    )


def _floats(report: CostReport) -> str:
    return (
        f"{'outputs':<12}counted as integers; if the build converts them to float, the host adds up to "
        f"{report.float_output_ms:.3f} ms (device.cost.host_dequantize=true)"
    )


def _line(op: OpCost, width: int) -> str:
    interval = f"[{op.low_ms:.4f}, {op.high_ms:.4f}]"
    return (
        f"{op.op:<{width}}  {op.engine:<6}{_dtypes(op):<15}{op.ms:>9.4f}{interval:>18}{100.0 * op.share:>11.1f}"
        f"{op.macs * 1e-6:>11.2f}  {_source(op)}"
    )
