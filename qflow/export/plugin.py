"""Target `plugin`: Horizon's plugin under OpenExplorer 3.0.x, as a Python module of qconfigs with fixed scales.

The module holds a qconfig for every operator (reference of the plugin: ModuleNameQconfigSetter, FixedScaleObserver), so
that the plugin computes with the dtypes and scales that were judged, and calibrates only what has no sure name there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qflow.analysis.measures.tables import SensitivityTable
from qflow.analysis.sensitivity.sensitive_ops import write_sensitive_ops
from qflow.api.prepared import Prepared
from qflow.config.device_file import device_names, load_rules
from qflow.core.device import apply_rules
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import OpKind
from qflow.export.contract import Exported, Fallback, Subject, Unexpressed, applied_fallbacks, origin_text, written
from qflow.export.plugin_text import MODULE, README, operators_text, sensitivity_text
from qflow.export.precisions import OpPrecision, precisions
from qflow.export.weights import other_axes, scale_differences, write_weights
from qflow.plugin.names import PluginName, names_csv, plugin_names

DIVISOR = 127.5
FLOAT16 = "An fp16 operator has fp16 inputs in the plugin too (get_qconfig with float16 three times)."
NAMES_WAY_OUT = "Prepare the model with the plugin, put its name into names.csv and set sure to yes."


def export(subject: Subject, folder: Path) -> Exported:
    """Write the module, the names, the weights, the sensitivity tables and a README with their use."""
    prepared, names = subject.prepared, plugin_names(subject.prepared, subject.prepared.sample)
    ops = precisions(prepared)
    values = {"march": load_rules(prepared.march).march, "digest": prepared.applied.digest}
    (folder / "qconfig_j6m.py").write_text(MODULE.substitute(operators=operators_text(ops), **values))
    (folder / "names.csv").write_text(names_csv(names))
    left_out = write_weights(prepared, folder)
    if subject.sensitivity is not None:
        write_sensitive_ops(in_plugin_names(subject.sensitivity, names), folder)
    tables = sensitivity_text(folder)
    (folder / "README.md").write_text(README.substitute(origin=origin_text(subject), tables=tables, **values))
    lowered, refused = canonicalised(prepared)
    fp16 = any(op.op.output == QDtype.float16 for op in ops.values())
    return Exported(
        "plugin",
        written(folder),
        (*applied_fallbacks(prepared), *lowered),
        (*refused, *shared(prepared, ops, names)),
        (*notes(ops, names, left_out), *([FLOAT16] if fp16 else [])),
    )


def in_plugin_names(table: SensitivityTable, names: dict[str, PluginName]) -> SensitivityTable:
    """Return `table` with sure names of the plugin; other operators keep their own, and the plugin skips them."""
    sure = {name.op: name.plugin for name in names.values() if name.sure}
    return replace(table, rows=tuple(replace(r, op_name=sure.get(r.op_name, r.op_name)) for r in table.rows))


def canonicalised(prepared: Prepared) -> tuple[list[Fallback], list[Unexpressed]]:
    """Return what the plugin of OpenExplorer 3.0.x lowers beyond the judged qconfig, and what it refuses.

    A qconfig that was made under the rules of 3.0.x has neither; one for a later release may have both.
    """
    rules = load_rules(prepared.march)
    if rules.march not in device_names():
        return [], []
    try:
        own = apply_rules(prepared.graph, prepared.applied, load_rules(rules.march), ranking=list(prepared.applied.ops))
    except ConfigError as error:
        way_out = f"Tune for OpenExplorer 3.0.x (device={rules.march}), or export to plugin35."
        return [], [Unexpressed("model", "its qconfig", str(error), way_out)]
    found = []
    for name, (judged, lowered) in prepared.applied.diff(own).items():
        assert judged is not None
        assert lowered is not None
        reason = lowered.fallback.removeprefix(judged.fallback).lstrip("; ") or "rule of OpenExplorer 3.0.x"
        found.append(Fallback(name, f"{judged.output} -> {lowered.output}", reason, judged=False))
    return found, []


def unnamed(ops: dict[str, OpPrecision], names: dict[str, PluginName]) -> list[Unexpressed]:
    """Return the operators without a sure name in the plugin: there its default qconfig holds."""
    found = []
    for name, op in ops.items():
        if names[name].sure or op.node.kind == OpKind.skipped:
            continue
        what = f"{op.op.output or 'high precision'}" + (f", scale {op.scale:.6g}" if op.scale else "")
        if op.node.kind == OpKind.input:
            stub = names[name].plugin
            way_out = f"Add a QuantStub named {stub} for it, and set sure to yes in names.csv."
            found.append(Unexpressed(name, what, "the model has no QuantStub for this input", way_out))
        elif op.node.kind == OpKind.constant:
            reason = "the plugin quantizes a constant where it is read, with its own range"
            found.append(Unexpressed(name, what, reason, "Pass it through a QuantStub of its own."))
        else:
            reason = "the name that the plugin generates is not sure, so its default qconfig holds"
            found.append(Unexpressed(name, what, reason, NAMES_WAY_OUT))
    return found


def shared_names(names: dict[str, PluginName]) -> list[Unexpressed]:
    """Return the calls of a module that have a quantizer of their own: the plugin has one for all calls."""
    first: dict[str, str] = {}
    found = []
    for name in names.values():
        if name.sure and first.setdefault(name.plugin, name.op) != name.op:
            reason = f"all calls of a module share one qconfig in the plugin, that of {first[name.plugin]}"
            found.append(Unexpressed(name.op, "its own scale", reason, "Give each call a module of its own."))
    return found


def unlike_weights(prepared: Prepared) -> list[Unexpressed]:
    """Return the weights that the plugin quantizes with other scales, or may."""
    owners = {node.weight: node.name for node in prepared.graph.weighted}
    axes, found = other_axes(prepared), []
    for weight, axis in axes.items():
        if weight in owners:
            what = f"weight scales along axis {axis}"
            reason = "whether the plugin takes another axis than 0, as for other weights, is not known"
            way_out = "Compare the number of its weight's scales in the prepared model with its output channels."
            found.append(Unexpressed(owners[weight], what, reason, way_out))
    for weight, off in scale_differences(prepared, DIVISOR).items():
        if weight in owners and weight not in axes:
            what = f"weight scales, up to {100 * off:.2g}% other"
            reason = "the plugin's weight scale is max |w| / 127.5 for each output channel"
            found.append(Unexpressed(owners[weight], what, reason, "Calibrate with calibration.divisor=plugin."))
    return found


def inside(prepared: Prepared, ops: dict[str, OpPrecision], names: dict[str, PluginName]) -> list[Unexpressed]:
    """Return the scales of norms and softmaxes: to fix that of the output might fix those of the values inside."""
    found = []
    for name, op in ops.items():
        inner = [n for n in op.node.inner if op.op.inner is not None and op.op.inner.is_integer]
        scales = {"output": op.scale} if op.scale is not None else {}
        scales |= {n.removeprefix(f"{op.node.quantizer}."): float(prepared.outputs[n].scale) for n in inner}
        if op.node.inner and scales and names[name].sure:
            what = f"scales: {', '.join(f'{part} {scale:.6g}' for part, scale in scales.items())}"
            reason = "whether a fixed scale of its output reaches the values inside is not known"
            way_out = "The plugin calibrates it: compare its scales after the calibration with these."
            found.append(Unexpressed(name, what, reason, way_out))
    return found


def shared(prepared: Prepared, ops: dict[str, OpPrecision], names: dict[str, PluginName]) -> list[Unexpressed]:
    """Return what neither generation of the plugin is told."""
    by_name = (*unnamed(ops, names), *shared_names(names), *inside(prepared, ops, names))
    return [*by_name, *unlike_weights(prepared), *host(ops)]


def host(ops: dict[str, OpPrecision]) -> list[Unexpressed]:
    """Return the modules that were kept in float."""
    way_out = "Put a DeQuantStub before it and a QuantStub after it, or move it out of the model."
    return [
        Unexpressed(name, "float", "a qconfig cannot keep a module on the host", way_out)
        for name, op in ops.items()
        if op.node.kind == OpKind.skipped
    ]


def notes(ops: dict[str, OpPrecision], names: dict[str, PluginName], left_out: tuple[str, ...]) -> tuple[str, ...]:
    """Return what the user has to know about this export."""
    found = []
    candidates = sum(1 for n in names.values() if not n.sure and "_generated_" in n.plugin)
    if candidates:
        found.append(
            f"{candidates} generated name{'s' * (candidates != 1)} in names.csv may be another: missing(model) of "
            "qconfig_j6m.py lists those that the prepared model has not."
        )
    if left_out:
        found.append(f"The weight files hold tensors only, without {', '.join(left_out)}.")
    return tuple(found)
