"""Target `plugin35`: the plugin of OpenExplorer 3.5 and later, whose QconfigSetter takes templates.

Thresholds fix the scales of outputs there: scale = threshold / 128 for qint8, / 32768 for qint16. A later template
overrides an earlier one, and `freeze` protects from both later templates and automatic changes.
"""

from __future__ import annotations

from pathlib import Path

from qflow.analysis.sensitivity.sensitive_ops import write_sensitive_ops
from qflow.api.prepared import Prepared
from qflow.config.device_file import load_rules
from qflow.core.device import input_dtypes
from qflow.core.dtype import QDtype
from qflow.core.graph import GEMM_KINDS
from qflow.export.contract import Exported, Subject, Unexpressed, applied_fallbacks, origin_text, written
from qflow.export.plugin import in_plugin_names, notes, shared
from qflow.export.plugin35_text import MODULE, README
from qflow.export.precisions import OpPrecision, precisions
from qflow.export.weights import write_weights
from qflow.plugin.names import PluginName, names_csv, plugin_names

UNKNOWN = (
    "Not known of QconfigSetter: whether an entry with dtype and threshold keeps the input and weight dtypes that an "
    "earlier entry gave the same operator. Read qconfig_dtypes.pt.py, which it writes."
)
FLOAT16 = "Not known of QconfigSetter: whether an fp16 operator reads fp16 too. Read qconfig_dtypes.pt.py."


def export(subject: Subject, folder: Path) -> Exported:
    """Write the module of templates, the names, the weights, the sensitivity tables and a README with their use."""
    prepared, names = subject.prepared, plugin_names(subject.prepared, subject.prepared.sample)
    ops = precisions(prepared)
    values = {"march": load_rules(prepared.march).march, "digest": prepared.applied.digest}
    entries = "\n".join(f"    {name!r}: {_output(op)}," for name, op in ops.items() if op.op.output is not None)
    found = {name: _ports(prepared, op) for name, op in ops.items()}
    ports = "\n".join(f"    {name!r}: {text}," for name, text in found.items() if text)
    (folder / "qconfig_j6m.py").write_text(MODULE.substitute(outputs=entries, ports=ports, **values))
    (folder / "names.csv").write_text(names_csv(names))
    left_out = write_weights(prepared, folder)
    if subject.sensitivity is not None:
        write_sensitive_ops(in_plugin_names(subject.sensitivity, names), folder)
    (folder / "README.md").write_text(README.substitute(origin=origin_text(subject), **values))
    fp16 = any(op.op.output == QDtype.float16 for op in ops.values())
    return Exported(
        "plugin35",
        written(folder),
        applied_fallbacks(prepared),
        (*shared(prepared, ops, names), *_without_threshold(ops, names)),
        (*notes(ops, names, left_out), *([UNKNOWN] if ports else []), *([FLOAT16] if fp16 else [])),
    )


def _output(op: OpPrecision) -> str:
    if op.scale is None or op.op.output is None or op.node.inner:
        return f'{{"dtype": {op.op.output}}}'
    return f'{{"dtype": {op.op.output}, "threshold": {op.scale * -op.op.output.qmin!r}}}'


def _ports(prepared: Prepared, op: OpPrecision) -> str:
    """Return the dtypes of a GEMM's inputs and weight where they are not all int8, and requantized inputs."""
    arriving = list(input_dtypes(prepared.graph, prepared.applied, op.node.name))
    count = len(op.node.inputs)
    asked: list[QDtype | None] = [op.inputs[i][0] if i in op.inputs else None for i in range(count)]
    if op.node.kind in GEMM_KINDS and len(arriving) == count and QDtype.qint16 in arriving:
        asked = list(arriving)
    found = []
    if any(asked):
        found.append(f'"input": [{", ".join(str(dtype) for dtype in asked)}]')
    if op.node.weight is not None and op.op.weight not in (None, QDtype.qint8):
        found.append(f'"weight": {op.op.weight}')
    return f"{{{', '.join(found)}}}" if found else ""


def _without_threshold(ops: dict[str, OpPrecision], names: dict[str, PluginName]) -> list[Unexpressed]:
    """Return the scales and outputs that no template states."""
    found = []
    for name, op in ops.items():
        if not names[name].sure:
            continue
        for position, (dtype, scale) in op.inputs.items():
            if scale is not None:
                reason = "the form of a threshold for one of several inputs is not known"
                way_out = "Leave out the input dtype of this operator, or set the threshold in qconfig_j6m.py."
                found.append(Unexpressed(name, f"input {position}: {dtype}, scale {scale:.6g}", reason, way_out))
        if op.op.output is None:
            reason = "how a template asks for a high-precision output is not known; the plugin decides"
            way_out = "Look for float32 at this operator in qconfig_dtypes.pt.py."
            found.append(Unexpressed(name, "high-precision output", reason, way_out))
    return found
