"""The model check: fusion, call counts, requested against applied precision, and what deserves a second look."""

from __future__ import annotations

from collections.abc import Sequence

from qflow.analysis.tables import CheckRow, Finding, ModelCheck, text_table
from qflow.core.device import input_dtypes
from qflow.core.dtype import QDtype
from qflow.core.graph import GEMM_KINDS, ModelGraph, OpKind, OpNode
from qflow.core.qconfig import OpQConfig, QConfig


def check_model(graph: ModelGraph, requested: QConfig, applied: QConfig, extra: Sequence[str] = ()) -> ModelCheck:
    """Join the graph with what was asked and what the device will run; `extra` are findings of calibration."""
    owners = {node.quantizer: node.name for node in graph.quantized}
    rows, findings = [], []
    for node in graph.quantized:
        ask, op = requested.ops[node.name], applied.ops[node.name]
        inputs = " ".join(dict.fromkeys(str(d) for d in input_dtypes(graph, applied, node.name))) or "float32"
        rows.append(
            CheckRow(
                op=node.name,
                op_type=fused_type(node),
                input_dtype=inputs,
                requested=str(ask.output or "float32"),
                applied=str(op.output or "float32"),
                weight_dtype=str(op.weight or ""),
                weight_axis=int(node.kind == OpKind.conv_transpose),
                rule=op.rule,
                reason=op.fallback,
            )
        )
        if op.fallback:
            asked = "stays" if ask.output == op.output else f"{ask.output} asked,"
            findings.append(Finding(node.name, "info", f"{asked} {op.output}: {op.fallback}"))
        findings.extend(_suspicious(node, op))
    owning = {name for node in graph.nodes for name in (node.quantizer, node.weight) if name}
    findings += [
        Finding(path, "check", f"shared module, called {count} times with one set of scales: compare its calls")
        for path, count in graph.calls.items()
        if count > 1 and path in owning
    ]
    findings += [Finding(p, "info", "never called: not quantized") for p, count in graph.calls.items() if count == 0]
    findings += [Finding(a, "check", f"could fuse with {b} but does not: {why}") for a, b, why in graph.unfused]
    findings += [Finding(note.split(": ")[0], "check", note.partition(": ")[2] or note) for note in graph.notes]
    findings += [Finding(text.split(" ")[0], "check", text) for text in extra]
    leaving = [graph.by_name[owners[graph.by_name[s].quantizer]] for _, p in graph.outputs for s in graph.source(p)]
    findings += [
        Finding(node.name, "info", "a GEMM before an output, but not a high-precision output: read elsewhere or moved")
        for node in {n.name: n for n in leaving}.values()
        if node.kind in GEMM_KINDS and applied.ops[node.name].output is not None
    ]
    return ModelCheck(applied.march, len(graph.nodes), tuple(rows), dict(graph.calls), graph.unfused, tuple(findings))


def fused_type(node: OpNode) -> str:
    """Short type with what was fused, after the plugin's class names: `ConvBNAddReLU2d`; `SiLU` as it is."""
    base = node.op_type.rsplit(".", 1)[-1]
    digits = base[-2:] if base.endswith(("1d", "2d", "3d")) else ""
    return base.removesuffix(digits) + "".join(node.fused_types) + digits


def _suspicious(node: OpNode, op: OpQConfig) -> list[Finding]:
    found = []
    if op.weight == QDtype.qint16:
        found.append(Finding(node.name, "check", "qint16 weight: its input must be int8"))
    if node.kind == OpKind.conv_transpose and node.attrs.get("groups", 1) > 1:
        found.append(Finding(node.name, "info", f"its {node.attrs['groups']} groups share the weight scales"))
    if op.fixed_scale is not None:
        found.append(Finding(node.name, "check", f"fixed scale {op.fixed_scale:.6g}"))
    return found


def check_text(check: ModelCheck) -> str:
    """`model_check_result.txt`: the guide's sections in its order."""
    lines = ["Fusable modules are listed below:" if check.unfused else "All fusable modules are fused in model!"]
    if check.unfused:
        lines.append(text_table(["name", "with", "not fused because"], check.unfused))
    odd = [[path, str(count)] for path, count in check.calls.items() if count != 1]
    lines.append("\nEach module called times:" if odd else "\nAll modules in the model run exactly once.")
    if odd:
        lines.append(text_table(["name", "called times"], odd))
    lines.append("\nEach layer out qconfig:")
    out = [[r.op, r.op_type, r.input_dtype, r.requested, r.applied, r.rule, r.reason] for r in check.rows]
    lines.append(
        text_table(["Module Name", "Module Type", "Input dtype", "requested", "out dtype", "rule", "reason"], out)
    )
    lines.append("\nWeight qconfig:")
    weights = [[r.op, r.op_type, r.weight_dtype, str(r.weight_axis)] for r in check.rows if r.weight_dtype]
    lines.append(text_table(["Module Name", "Module Type", "weight dtype", "ch_axis"], weights))
    lines.append("\nPlease check if these OPs qconfigs are expected..")
    notable = [[f.op, f.level, f.message] for f in check.findings]
    lines.append(text_table(["Module Name", "level", "Msg"], notable) if notable else "nothing to check\n")
    return "\n".join(lines)
