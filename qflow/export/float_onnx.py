"""The float model as ONNX, with the tensor that each operator of the qconfig computes.

The model runs in float while torch traces it, and every operator's result leaves it as one more output. So the exporter
itself tells which tensor an operator has become, whatever names it gives; then these outputs are taken away again.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qflow.api.prepared import Prepared
from qflow.core.graph import OpNode
from qflow.export.contract import ExportError, missing_extra
from qflow.quant.trace.calling import copied, input_tensors, map_named, named_tensors

OPSET = 17


@dataclass(frozen=True)
class FloatOnnx:
    """An ONNX model and the operator of each tensor; a tensor without one is inside the operator that reads it."""

    model: Any
    operators: Mapping[str, str]
    """Tensor -> name of the operator in the fused graph."""


def float_onnx(prepared: Prepared, target: str) -> FloatOnnx:
    """Return the float model of `prepared` as ONNX at its sample, nodes named after the user's modules.

    Raises ExportError for a model with state between calls, without the extra, or where torch cannot export it.
    """
    try:
        import onnx
    except ImportError as error:
        raise missing_extra(target, error) from None
    if prepared.cached is not None:
        attributes = ", ".join(prepared.cached.attrs)
        raise ExportError(
            f"ONNX takes a model without state between calls, but got one with {attributes}. Take the state as an "
            "input and return it as an output."
        )
    traced = _Traced(prepared)
    file: Any = io.BytesIO()  # torch writes to it; its annotation says paths only
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                traced, traced.flat, file, dynamo=False, opset_version=OPSET, input_names=traced.input_names
            )
        except Exception as error:
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise ExportError(f"ONNX takes a model that torch.onnx.export takes, but got: {line}") from error
    model = onnx.load_from_string(file.getvalue())
    return _unmarked(model, traced.output_names, traced.marks)


class _Traced(nn.Module):
    """The float model with flat inputs; it returns its outputs and then every operator's result."""

    def __init__(self, prepared: Prepared) -> None:
        super().__init__()
        twin = copy.deepcopy(prepared).cpu()
        for quantizer in twin._quantizers():
            quantizer.enabled = False
        self.prepared = twin
        self.sample = copied(_cpu(prepared.sample))
        named = input_tensors(twin.model, self.sample)
        self.input_names = [name for name, _ in named]
        self.flat = tuple(tensor for _, tensor in named)
        self.last = {last_member(node, twin.plan.output_at): node.name for node in twin.graph.nodes}
        self.marks: list[str] = []
        self.output_names: list[str] = []

    def forward(self, *tensors: Tensor) -> Any:
        """Run the model."""
        given = iter(tensors)
        inputs = map_named(lambda _, __: next(given), self.sample)
        kept: list[tuple[str, Tensor]] = []

        def keep(call: str, result: Tensor) -> None:
            if call in self.last and result.is_floating_point():
                kept.append((self.last[call], result.clone()))

        self.prepared.watch = keep
        with torch.no_grad():
            outputs = _called(self.prepared.observed, inputs)
        self.marks = [name for name, _ in kept]
        named = named_tensors(outputs)
        self.output_names = [name for name, _ in named]
        return tuple(tensor for _, tensor in (*named, *kept))


def last_member(node: OpNode, output_at: Mapping[str, str]) -> str:
    """Return the call whose result is that of `node`: the last of a fused group."""
    return node.name if node.name in output_at or not node.fused else node.fused[-1]


def _called(function: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(*inputs) if isinstance(inputs, (tuple, list)) else function(inputs)


def _cpu(sample: Any) -> Any:
    return map_named(lambda _, tensor: tensor.cpu(), sample)


def _unmarked(model: Any, output_names: list[str], marks: list[str]) -> FloatOnnx:
    """Take the outputs of the marks away, with the nodes that only they need, and name what is left."""
    graph = model.graph
    count = len(output_names)
    copies = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}
    constants = {tensor.name for tensor in graph.initializer}
    operators: dict[str, str] = {}
    for operator, value in zip(marks, graph.output[count:], strict=True):
        tensor = value.name
        while tensor in copies and copies[tensor] not in constants:
            tensor = copies[tensor]
        operators.setdefault(tensor, operator)
    del graph.output[count:]
    _drop_unread(graph)
    renamed = _renamed(graph, output_names)
    return FloatOnnx(model, {renamed.get(tensor, tensor): operator for tensor, operator in operators.items()})


def _drop_unread(graph: Any) -> None:
    """Remove the nodes that no output depends on."""
    needed = {value.name for value in graph.output}
    for node in reversed(list(graph.node)):
        if needed.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            needed.update(node.input)


def _renamed(graph: Any, output_names: list[str]) -> dict[str, str]:
    """Give outputs, weights and nodes the names that they have in the user's model; return the tensors that changed.

    An output that is an input or a weight, or comes twice, keeps its name.
    """
    inputs, weights = ({value.name for value in values} for values in (graph.input, graph.initializer))
    renamed = {name: name.removeprefix("prepared.model.") for name in weights}
    for value, name in zip(graph.output, output_names, strict=True):
        if value.name not in inputs and value.name not in renamed:
            renamed[value.name] = name
    kept = {name for name in renamed.values() if list(renamed.values()).count(name) > 1 or name in inputs}
    renamed = {old: new for old, new in renamed.items() if new not in kept}
    for node in graph.node:
        node.name = node.name.removeprefix("/model")
        node.input[:] = [renamed.get(tensor, tensor) for tensor in node.input]
        node.output[:] = [renamed.get(tensor, tensor) for tensor in node.output]
    for value in (*graph.output, *graph.initializer):
        value.name = renamed.get(value.name, value.name)
    del graph.value_info[:]
    return renamed
