"""Target `hmct`: ONNX PTQ of Horizon, as the float model in ONNX and a quant_config for it.

HMCT sets the dtypes of a node's INPUTS, where a qconfig sets those of outputs: the dtype of an operator's result goes
to every node that reads it. HMCT calibrates itself, so scales are not in the file.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from qflow.api.prepared import Prepared
from qflow.config.device_file import load_rules
from qflow.core.dtype import QDtype
from qflow.core.graph import GEMM_KINDS, OpKind, OpNode
from qflow.core.settings import CalibrationSettings
from qflow.export.contract import Exported, Subject, Unexpressed, applied_fallbacks, origin_text, written
from qflow.export.float_onnx import FloatOnnx, float_onnx
from qflow.export.hmct_text import README
from qflow.export.precisions import OpPrecision, precisions

INT8 = "int8"
NAMES = {QDtype.qint8: INT8, QDtype.qint16: "int16", QDtype.float16: "float16"}
METHODS = {"minmax": "max", "percentile": "max", "kl": "kl"}


def export(subject: Subject, folder: Path) -> Exported:
    """Write `model.onnx`, `quant_config.json`, `nodes.csv` and a README with their use."""
    prepared = subject.prepared
    made = float_onnx(prepared, "hmct")
    ops = precisions(prepared)
    nodes = _Nodes(prepared, made, ops)
    node_config = nodes.config()
    config = {"model_config": _model_config(prepared.settings), "node_config": node_config}
    (folder / "model.onnx").write_bytes(made.model.SerializeToString(deterministic=True))
    (folder / "quant_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "nodes.csv").write_text(nodes.csv())
    march, digest = load_rules(prepared.march).march, prepared.applied.digest
    (folder / "README.md").write_text(README.substitute(origin=origin_text(subject), march=march, digest=digest))
    return Exported(
        "hmct",
        written(folder),
        applied_fallbacks(prepared),
        (*nodes.missing, *nodes.without_node(), *nodes.lost_float16(node_config), *_pinned(ops)),
        _notes(prepared, ops),
    )


@dataclass
class _Nodes:
    """The nodes of the ONNX graph with the operators that they belong to and the dtypes of their inputs."""

    prepared: Prepared
    onnx: FloatOnnx
    ops: dict[str, OpPrecision]
    missing: list[Unexpressed] = field(default_factory=list)

    def __post_init__(self) -> None:
        from onnx import TensorProto, shape_inference

        graph = self.onnx.model.graph
        self.graph = self.prepared.graph
        inferred = shape_inference.infer_shapes(self.onnx.model).graph
        floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        self.activations = {v.name for v in values if v.type.tensor_type.elem_type in floats}
        self.weights = {t.name for t in graph.initializer if t.data_type in floats}
        self.outputs = [value.name for value in graph.output]
        self.by_quantizer = {node.quantizer: node.name for node in self.graph.quantized}
        self.owner = self._owners(list(graph.node))
        self.activations -= self._fixed(list(graph.node))

    def _owners(self, nodes: list[Any]) -> dict[str, str]:
        """Node -> operator. A node whose result is no operator's belongs to the operator that reads it."""
        owner: dict[str, str] = {}
        of_tensor = dict(self.onnx.operators)
        for node in reversed(nodes):
            found = next((of_tensor[t] for t in node.output if t in of_tensor), None)
            if found is not None:
                owner[node.name] = found
                for tensor in node.input:
                    of_tensor.setdefault(tensor, found)
        return owner

    def _fixed(self, nodes: list[Any]) -> set[str]:
        """Return the tensors that no input of the model reaches: constants that nodes compute."""
        reached = {value.name for value in self.onnx.model.graph.input}
        for node in nodes:
            if not reached.isdisjoint(node.input):
                reached.update(node.output)
        return {tensor for node in nodes for tensor in node.output if tensor not in reached}

    def config(self) -> dict[str, dict[str, str]]:
        """Return node_config: every node with an input that is not int8, or whose result leaves the model quantized."""
        found: dict[str, dict[str, str]] = {}
        for node in self.onnx.model.graph.node:
            operator = self.graph.by_name.get(self.owner.get(node.name, ""))
            if operator is None:
                continue
            entry = self._inputs(node, operator)
            for tensor in node.output:
                dtype = self._result(self.onnx.operators.get(tensor))
                if tensor in self.outputs and dtype is not None:
                    entry["OutputType"] = NAMES[dtype]
            if entry:
                found[node.name] = entry
        return found

    def _inputs(self, node: Any, operator: OpNode) -> dict[str, str]:
        own = self.ops.get(operator.name)
        if own is not None and own.op.output == QDtype.float16:  # its readers may cast it
            return {"qtype": "float16"} if self.activations.intersection(node.input) else {}
        dtypes = {i: NAMES[d] for i, tensor in enumerate(node.input) if (d := self._read(tensor, i, node, operator))}
        if not dtypes or set(dtypes.values()) == {INT8}:
            return {}
        if operator.kind not in GEMM_KINDS and len(set(dtypes.values())) == 1:
            return {"qtype": next(iter(dtypes.values()))}
        if max(dtypes) > 1:
            differing = ", ".join(f"input {i} {d}" for i, d in dtypes.items())
            reason = f"HMCT names the dtypes of a node's first two inputs, and {node.name} has {len(dtypes)}"
            self.missing.append(Unexpressed(operator.name, differing, reason, "Give all its inputs one dtype."))
            return {"qtype": max(dtypes.values(), key=list(NAMES.values()).index)}
        return {f"input{i}": dtype for i, dtype in dtypes.items()}

    def _read(self, tensor: str, position: int, node: Any, operator: OpNode) -> QDtype | None:
        """Return the dtype in which `node` reads `tensor`; None for what is not quantized there, such as a bias."""
        own = self.ops.get(operator.name)
        source = self.onnx.operators.get(tensor)
        if tensor in self.weights:
            return self._constant(position, node, operator)
        if tensor not in self.activations:
            return None
        if source is None or source == operator.name:
            return self._result(operator.name)
        for place, producer in enumerate(operator.inputs):
            if producer == source and own is not None and place in own.inputs:
                return own.inputs[place][0]
        return self._result(source)

    def _constant(self, position: int, node: Any, operator: OpNode) -> QDtype | None:
        """Return the dtype of a weight, or of a constant that the qconfig names."""
        if (
            operator.weight is not None
            and position == 1
            and node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        ):
            return self.prepared.weights[operator.weight].dtype
        constants = [p for p in operator.inputs if self.graph.by_name[p].kind == OpKind.constant]
        return self._result(constants[0]) if constants and operator.weight is None else None

    def _result(self, name: str | None) -> QDtype | None:
        """Return the dtype of an operator's result, through operators that pass values on; None if not quantized."""
        if name is None:
            return None
        sources = self.graph.source(name)
        return self.ops[self.by_quantizer[self.graph.by_name[sources[0]].quantizer]].op.output if sources else None

    def lost_float16(self, config: dict[str, dict[str, str]]) -> list[Unexpressed]:
        """Return the float16 operators that no node shows, and those that read another dtype than they compute in."""
        found = []
        for name, op in self.ops.items():
            if op.op.output != QDtype.float16:
                continue
            tensors = {tensor for tensor, operator in self.onnx.operators.items() if operator == name}
            nodes = [n.name for n in self.onnx.model.graph.node if self.owner.get(n.name) == name]
            nodes = nodes or [n.name for n in self.onnx.model.graph.node if not tensors.isdisjoint(n.input)]
            if not any("float16" in config.get(node, {}).values() for node in nodes):
                reason = "no node that computes or reads it takes float16"
                found.append(Unexpressed(name, "float16", reason, 'Set "qtype" of its nodes in nodes.csv.'))
            for position, (dtype, _) in op.inputs.items():
                reason = "HMCT computes a node in the dtype of its inputs, which is float16 here"
                found.append(Unexpressed(name, f"input {position}: {dtype}", reason, "Leave out its input dtype."))
        return found

    def without_node(self) -> list[Unexpressed]:
        """Return the operators that no tensor of the ONNX graph belongs to; constants are read where they are used."""
        known = {*self.onnx.operators.values(), *self.owner.values()}
        way_out = "Look for it in nodes.csv of the operator after it, and set its dtype in quant_config.json."
        return [
            Unexpressed(name, str(op.op.output or "high precision"), "no node of the ONNX graph computes it", way_out)
            for name, op in self.ops.items()
            if name not in known and op.node.kind != OpKind.constant
        ]

    def csv(self) -> str:
        """Return operator, its nodes from float to float, the tensor of its result, and the dtype of the result."""
        tensors = {operator: tensor for tensor, operator in reversed(list(self.onnx.operators.items()))}
        nodes: dict[str, list[str]] = {}
        for node in self.onnx.model.graph.node:
            floats = [self.activations.intersection(names) for names in (node.input, node.output)]
            if node.name in self.owner and all(floats):
                nodes.setdefault(self.owner[node.name], []).append(node.name)
        file = StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["qflow", "nodes", "tensor", "dtype"])
        for op in self.graph.nodes:
            dtype = self._result(op.name)
            writer.writerow([op.name, " ".join(nodes.get(op.name, [])), tensors.get(op.name, ""), dtype or ""])
        return file.getvalue()


def _model_config(settings: CalibrationSettings) -> dict[str, Any]:
    config: dict[str, Any] = {"all_node_type": INT8}
    if settings.method in METHODS:
        activation: dict[str, Any] = {"calibration_type": METHODS[settings.method]}
        if settings.method == "percentile":
            activation["max_percentile"] = settings.percentile / 100
        config["activation"] = activation
    return config


def _pinned(ops: dict[str, OpPrecision]) -> list[Unexpressed]:
    way_out = "Clip the tensor in the model to its range, or export to plugin."
    return [
        Unexpressed(name, f"fixed scale {op.scale:.6g}", "HMCT calibrates every tensor", way_out)
        for name, op in ops.items()
        if op.pinned and op.scale is not None
    ]


def _notes(prepared: Prepared, ops: dict[str, OpPrecision]) -> tuple[str, ...]:
    found = ["HMCT calibrates itself: its scales, and so its figures, are others than those of the study."]
    if prepared.settings.method not in METHODS:
        found.append(
            f"HMCT has no calibration method {prepared.settings.method}: quant_config.json leaves the method to HMCT."
        )
    if any(op.op.observer not in (None, prepared.settings.method) for op in ops.values()):
        found.append("Calibration methods of single operators are not in the file.")
    return tuple(found)
