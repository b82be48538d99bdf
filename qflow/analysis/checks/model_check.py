"""The model check: fusion, call counts, requested against applied precision, and suspicious settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from qflow.analysis.checks.shared_check import SHARED
from qflow.analysis.measures.tables import CheckRow, Finding, ModelCheck, also, text_table
from qflow.core.device import input_dtypes
from qflow.core.dtype import QDtype
from qflow.core.graph import COMPOUND_KINDS, GEMM_KINDS, ModelGraph, OpKind, OpNode
from qflow.core.qconfig import OpQConfig, QConfig

SEVERAL_STEPS = frozenset(["glu", "GLU", "logsumexp", "norm", "std", "var", "vector_norm"])
"""Functions that the device computes in several steps, beside norms and softmaxes."""


def check_model(
    graph: ModelGraph, requested: QConfig, applied: QConfig, extra: Sequence[Finding] = (), method: str = "minmax"
) -> ModelCheck:
    """Join the graph with the requested and the applied qconfig.

    `extra` are findings of calibration, `method` is the observer of operators without one of their own.
    """
    rows = tuple(_row(node, graph, requested, applied, method) for node in graph.quantized)
    findings: list[Finding] = []
    for node in graph.quantized:
        wanted, op = requested.ops[node.name], applied.ops[node.name]
        if op.fallback:
            same = wanted.output == op.output
            dtypes = f"{op.output}" if same else f"requested {wanted.output}, applied {op.output}"
            findings.append(Finding(node.name, "info", f"{dtypes}: {op.fallback}"))
        findings += _suspicious(node, op)
    findings += _calls(graph, extra)
    findings += _unfused(graph)
    findings += [Finding(note.split(": ")[0], "check", note.partition(": ")[2] or note) for note in graph.notes]
    findings += _float_inside(graph, applied)
    findings += [*_float_inputs(graph), *extra, *_quantized_outputs(graph, applied)]
    return ModelCheck(applied.march, graph.n_operators, rows, dict(graph.calls), graph.unfused, grouped(findings))


def grouped(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings in order, each text once: the first operator's, with the names of the others."""
    same: dict[tuple[str, str], dict[str, None]] = {}
    for finding in findings:
        same.setdefault((finding.level, finding.message), {})[finding.op] = None
    found = []
    for (level, message), names in same.items():
        first, *others = names
        found.append(Finding(first, level, message + also(others)))
    return tuple(found)


def _row(node: OpNode, graph: ModelGraph, requested: QConfig, applied: QConfig, method: str) -> CheckRow:
    """The requested and the applied settings of one operator."""
    op = applied.ops[node.name]
    return CheckRow(
        op=node.name,
        op_type=fused_type(node),
        input_dtype=" ".join(dict.fromkeys(str(d) for d in input_dtypes(graph, applied, node.name))) or "float32",
        requested=str(requested.ops[node.name].output or "float32"),
        applied=str(op.output or "float32"),
        weight_dtype=str(op.weight or ""),
        weight_axis=int(node.kind == OpKind.conv_transpose) if op.weight_axis is None else op.weight_axis,
        observer=_observer(op, method),
        rule=op.rule,
        reason=op.fallback,
        fused=", ".join(node.fused),
    )


def _unfused(graph: ModelGraph) -> Iterator[Finding]:
    """Pairs that could fuse, once for all calls of a shared module and once for all pairs of the same reason."""
    pairs = {(a.partition("(")[0], b.partition("(")[0]): why for a, b, why in reversed(graph.unfused)}
    for why in dict.fromkeys(reversed(pairs.values())):
        (first, second), *others = [pair for pair, reason in reversed(pairs.items()) if reason == why]
        yield Finding(first, "check", f"could fuse with {second} but does not: {why}{also([a for a, _ in others])}")


def _calls(graph: ModelGraph, extra: Sequence[Finding]) -> Iterator[Finding]:
    """Shared modules that calibration (`extra`) has not compared, and modules that neither it nor tracing called."""
    seen = {finding.op.partition("(")[0] for finding in extra}
    compared = {finding.op for finding in extra if finding.message.startswith(SHARED)}
    quantizers = Counter(node.quantizer for node in graph.nodes)
    for path, count in graph.calls.items():
        if quantizers[path] > 1 and path not in compared:
            text = f"{SHARED}, called {count} times with one set of scales: compare its calls"
            yield Finding(path, "check", text)
    for path, count in graph.calls.items():
        if count == 0 and path not in seen:
            yield Finding(path, "info", "never called: not quantized")


def _quantized_outputs(graph: ModelGraph, applied: QConfig) -> Iterator[Finding]:
    """GEMMs that leave the model through a quantizer, where a high-precision output may have been meant."""
    owners = {node.quantizer: node.name for node in graph.quantized}
    leaving = [graph.by_name[owners[graph.by_name[s].quantizer]] for _, p in graph.outputs for s in graph.source(p)]
    kept = {s for name in graph.state for s in graph.source(name)}  # the next call reads temporal state
    for node in {n.name: n for n in leaving if n.name not in kept}.values():
        if node.kind in GEMM_KINDS and applied.ops[node.name].output is not None:
            text = "a GEMM before an output, but not a high-precision output: read elsewhere or moved"
            yield Finding(node.name, "info", text)


def _float_inside(graph: ModelGraph, applied: QConfig) -> Iterator[Finding]:
    """Operators of several steps whose inner values stay float, for want of a formula or of a rule of the device."""
    for node in graph.quantized:
        several = node.kind in COMPOUND_KINDS or node.op_type.rpartition(".")[2] in SEVERAL_STEPS
        if several and applied.ops[node.name].inner is None:
            yield Finding(node.name, "info", "computed in float inside: the device may round values between its steps")


def _float_inputs(graph: ModelGraph) -> list[Finding]:
    """Operators that read values which no quantizer has seen (an integer tensor cast to float)."""
    found = []
    for node in graph.quantized:
        for producer in node.inputs:
            if graph.source(producer):
                continue
            if _of_integer_input(graph, producer):
                text = f"float32 input: no quantizer stands behind {producer}. Give the model float inputs"
                found.append(Finding(node.name, "check", text))
            else:
                text = f"float32 input: {producer} is a mask or an index that the model computes: it has no scale"
                found.append(Finding(node.name, "info", text))
    return found


def _of_integer_input(graph: ModelGraph, producer: str) -> bool:
    node = graph.by_name[producer]
    return "integer_input" in node.attrs or any(_of_integer_input(graph, source) for source in node.inputs)


def _observer(op: OpQConfig, method: str) -> str:
    """What sets the output scale: at int16 minmax with a margin, unless the operator has its own observer."""
    if op.output is None or not op.output.is_integer:
        return ""
    if op.pinned_scale() is not None:
        return "fixed scale"
    observer = "minmax" if op.output == QDtype.qint16 and not op.own_observer else op.observer or method
    return f"{observer}, kept in QAT" if op.frozen else observer


def fused_type(node: OpNode) -> str:
    """Short type with what was fused, after the plugin's class names: `ConvBNAddReLU2d`; `SiLU` as it is."""
    base = node.op_type.rsplit(".", 1)[-1]
    digits = base[-2:] if base.endswith(("1d", "2d", "3d")) else ""
    return base.removesuffix(digits) + "".join(node.fused_types) + digits


def _suspicious(node: OpNode, op: OpQConfig) -> list[Finding]:
    found = []
    if op.weight == QDtype.qint16:
        found.append(Finding(node.name, "check", "qint16 weight!!!"))
    if node.kind == OpKind.conv_transpose and node.attrs.get("groups", 1) > 1:
        found.append(Finding(node.name, "info", f"its {node.attrs['groups']} groups share the weight scales"))
    if op.fixed_scale is not None:
        found.append(Finding(node.name, "check", f"Fixed scale {op.fixed_scale:.6g}"))
    elif op.known_range is not None:
        low, high = op.known_range
        found.append(
            Finding(node.name, "info", f"Fixed scale {op.pinned_scale() or 0.0:.6g} of range {low:g}..{high:g}")
        )
    if op.input and any(op.input):
        inputs = ", ".join(f"input {i} {d}" for i, d in enumerate(op.input) if d)
        found.append(Finding(node.name, "check", f"requantized at {inputs}"))
    return found


def check_text(check: ModelCheck) -> str:
    """`model_check_result.txt`: the guide's sections, with the requested dtypes and the reasons for others."""
    lines = ["Fusable modules are listed below:" if check.unfused else "All fusable modules are fused in model!"]
    types = {row.op: row.op_type for row in check.rows}
    for first, second, why in check.unfused:
        lines.append(
            text_table(["name", "type"], [[n, types.get(n, "")] for n in (first, second)]) + f"because {why}\n"
        )
    groups = [[row.op, row.op_type, row.fused] for row in check.rows if row.fused]
    if groups:
        lines += ["\nFused operators, each one operator of the qconfig:", text_table(["name", "type", "with"], groups)]
    odd = [[path, str(count)] for path, count in check.calls.items() if count != 1]
    lines.append("\nEach module called times:" if odd else "\nAll modules in the model run exactly once.")
    if odd:
        lines.append(text_table(["name", "called times"], odd))
    lines += ["\nDtype statistics:", _dtype_statistics(check)]
    lines.append("\nEach layer out qconfig:")
    header = ["Module Name", "Module Type", "Input dtype", "out dtype", "ch_axis", "observer"]
    out = [
        [r.op, r.op_type, r.input_dtype, r.applied, "-1" if r.observer else "qconfig = None", r.observer]
        for r in check.rows
    ]
    lines.append(text_table(header, out))
    lines.append("\nRequested and applied:")
    both = [[r.op, r.requested, r.applied, r.rule, r.reason] for r in check.rows]
    lines.append(text_table(["Module Name", "requested", "applied", "rule", "reason"], both))
    lines.append("\nWeight qconfig:")
    weights = [[r.op, r.op_type, r.weight_dtype, str(r.weight_axis), "minmax"] for r in check.rows if r.weight_dtype]
    lines.append(text_table(["Module Name", "Module Type", "weight dtype", "ch_axis", "observer"], weights))
    lines.append("\nPlease check if these OPs qconfigs are expected..")
    notable = [[f.op, types.get(f.op, ""), f.level, f.message] for f in check.findings]
    header = ["Module Name", "Module Type", "level", "Msg"]
    lines.append(text_table(header, notable) if notable else "nothing to check\n")
    return "\n".join(lines)


def _dtype_statistics(check: ModelCheck) -> str:
    """How many operators of each type read and give each dtype, with a total."""
    dtypes = [str(d) for d in QDtype]
    counts: dict[str, Counter[str]] = {}
    for row in check.rows:
        for kind in (row.op_type, "total"):
            counter = counts.setdefault(kind, Counter())
            counter.update(f"in {dtype}" for dtype in row.input_dtype.split())
            counter[f"out {row.applied}"] += 1
    columns = [f"{way} {dtype}" for way in ("in", "out") for dtype in dtypes]
    total = counts.pop("total", Counter())
    rows = [
        [kind, *(str(counter[c]) for c in columns)] for kind, counter in [*sorted(counts.items()), ("total", total)]
    ]
    return text_table(["Module Type", *columns], rows)
