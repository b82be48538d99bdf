"""Findings on shared modules: what one scale and one dtype for all their calls cost, and what splitting them gives.

    reach            an int8-only reader of one call keeps all calls at int8, and every GEMM that reads one of them
    case B           its calls see similar values: one scale is harmless
    case C           one scale serves calls of different range; C if their 99.9 % thresholds differ by more than 2

The cases are those of the tuning guide. The error with and without splitting is measured by `trial/diagnosis.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qflow.analysis.checks.harmless import judged
from qflow.analysis.measures.tables import Finding
from qflow.core.device import apply_rules
from qflow.core.device_rules import DeviceRules
from qflow.core.dtype import QDtype
from qflow.core.graph import ModelGraph
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, TemplateSetter
from qflow.quant.model.calibrate import CalibrationStats
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.shared_modules import AUTO, SETTING, own_modules, split_graph, stateless

UNLIKE_CALLS = 2.0
SHARED = "shared module"
CASE = f"{SHARED}, case"
"""How a finding on compared calls begins."""
LEAST_GAIN = 0.005
"""A smaller share of the MACs and operators, which would be printed as 0 %, is no gain."""


def splittable(prepared: QuantizedModel) -> tuple[str, ...]:
    """Shared modules that `split_shared=auto` would split: quantized, called several times, without parameters."""
    return tuple(path for path in sorted(prepared.plan.shared) if stateless(prepared.model.get_submodule(path)))


def reach_finding(prepared: QuantizedModel, rules: DeviceRules) -> tuple[Finding, ...]:
    """One finding on how much more all-int16 reaches if the calls of all `splittable` modules are split; else none."""
    shared = splittable(prepared)
    graphs = (prepared.graph, split_graph(prepared.graph, shared))
    if not shared:
        return ()
    before, after = (_outputs_of_all_int16(graph, rules) for graph in graphs)
    (macs, operators), (macs_left, operators_left) = (_int8_shares(prepared.graph, o) for o in (before, after))
    if max(macs - macs_left, operators - operators_left) < LEAST_GAIN:
        return ()
    calls = {path: [n for n in prepared.graph.nodes if n.quantizer == path] for path in shared}
    freed = [path for path, nodes in calls.items() if any(before[n.name] != after[n.name] for n in nodes)]
    first, *others = sorted(freed, key=lambda path: -len(calls[path]))
    also = f" ({len(others)} more: {', '.join(others[:4])}{', ...' * (len(others) > 4)})" if others else ""
    text = (
        f"{SHARED}: one {calls[first][0].op_type.rpartition('.')[2]} is called {len(calls[first])} times and has one "
        f"dtype{also}. Under all-int16 {macs:.0%} of the MACs and {operators:.0%} of the operators stay int8, if its "
        f"calls are split {macs_left:.0%} and {operators_left:.0%}: {SETTING}={AUTO} tries it. In the float model "
        f"{own_modules(prepared.model, first)}"
    )
    return (Finding(first, "check", text),)


def _outputs_of_all_int16(graph: ModelGraph, rules: DeviceRules) -> dict[str, QDtype | None]:
    """Output dtype that the device gives each quantized operator call if all are asked to be int16."""
    requested = resolve(graph, [HighPrecisionOutput(), TemplateSetter(QDtype.qint16)], rules.march)
    applied = apply_rules(graph, requested, rules)
    owners = {node.quantizer: node.name for node in graph.quantized}
    return {node.name: applied.ops[owners[node.quantizer]].output for node in graph.nodes if node.quantizer}


def _int8_shares(graph: ModelGraph, outputs: Mapping[str, QDtype | None]) -> tuple[float, float]:
    """Shares (0..1) of the MACs that read no int16 activation, and of the operator calls whose output is int8."""
    int8 = total = 0
    for node in graph.nodes:
        factors = node.inputs[: 2 if node.two_activations else 1]
        read = {outputs[source] for factor in factors for source in graph.source(factor)}
        total += node.macs
        int8 += 0 if QDtype.qint16 in read else node.macs
    dtypes = list(outputs.values())
    return int8 / max(total, 1), dtypes.count(QDtype.qint8) / max(len(dtypes), 1)


def call_reach(stats: CalibrationStats, quantizer: str) -> dict[str, float]:
    """Call of a shared module -> 99.9th percentile of |x|; empty if the module is not shared."""
    calls = stats.calls.get(quantizer, {})
    return {name: h.cut(99.9) if h.largest else 0.0 for name, h in calls.items()}


def unlike_calls(stats: CalibrationStats, quantizer: str) -> bool:
    """True for case C: the ranges of the calls differ by more than a factor of 2."""
    reach = call_reach(stats, quantizer).values()
    return max(reach, default=0.0) > UNLIKE_CALLS * min(reach, default=0.0)


def case_findings(prepared: QuantizedModel, stats: CalibrationStats, scores: Mapping[str, float]) -> Iterator[Finding]:
    """Case B or C for each shared module that the calibration has reached; `scores` are activation sensitivities."""
    for quantizer in (name for name in stats.calls if name in prepared.plan.shared):
        reach = call_reach(stats, quantizer)
        if not unlike_calls(stats, quantizer):
            yield Finding(quantizer, "info", f"{CASE} B: its {len(reach)} calls see similar values")
            continue
        low, high = min(reach, key=lambda n: reach[n]), max(reach, key=lambda n: reach[n])
        apart = f" (factor {reach[high] / reach[low]:.3g})" if reach[low] else ""
        tried = AUTO if quantizer in splittable(prepared) else f"[{quantizer}]"
        yield judged(
            quantizer,
            f"{CASE} C: {high} reaches {reach[high]:.4g} and {low} {reach[low]:.4g} under one scale{apart}: "
            f"give each call a module of its own. {SETTING}={tried} tries it; in the float model "
            f"{own_modules(prepared.model, quantizer)}",
            scores,
        )
