"""Target `torch`: a program of torch.export that computes as the prepared model, and its numbers as plain files.

    model.pt2               the quantized forward; integer weights stay integers in it
    weights.safetensors     the float model's state dict, trained weights included, under its own names
    quantization.json       qconfig by operator, scale of each quantizer, names of inputs and outputs

None of them needs qflow. The program holds torch's own operators only: a quantizer is mul, round, clamp and mul.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from qflow.core.record import plain, to_json
from qflow.export.contract import Exported, Subject, applied_fallbacks, origin_text, written
from qflow.export.program import Program, quantized_program
from qflow.export.quant_ops import DEQUANTIZE, FAKE_HALF, FAKE_QUANTIZE
from qflow.export.weights import float_tensors
from qflow.quant.model.quantized_model import scales
from qflow.quant.values.half import HALF_MAX

SCHEMA = 1
_ATEN = torch.ops.aten


def export(subject: Subject, folder: Path) -> Exported:
    """Write the files. Raises ExportError if torch.export cannot take the model."""
    from safetensors.torch import save_file

    prepared = subject.prepared
    program = quantized_program(prepared)
    lower(program.module)
    exported = program.exported()
    _forget_places(exported)
    torch.export.save(exported, folder / "model.pt2")
    weights, others = float_tensors(prepared)
    save_file(weights, folder / "weights.safetensors")
    (folder / "quantization.json").write_text(to_json(_numbers(subject, program), indent=2) + "\n")
    (folder / "README.md").write_text(_readme(subject, program))
    notes = (f"weights.safetensors leaves out what is no tensor: {', '.join(others)}.",) if others else ()
    return Exported("torch", written(folder), applied_fallbacks(prepared), notes=(*program.notes, *notes))


def lower(module: GraphModule) -> None:
    """Write each quantizer as torch's own operators, the engine's arithmetic step by step."""
    steps: dict[Any, Callable[..., Node]] = {FAKE_QUANTIZE: _quantizer, FAKE_HALF: _half, DEQUANTIZE: _weight}
    for node in list(module.graph.nodes):
        if node.target in steps:
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(steps[node.target](module, *node.args))
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _quantizer(module: GraphModule, x: Node, scale: Node, axis: int, bits: int, name: str) -> Node:
    call, lowest = module.graph.call_function, -(2 ** (bits - 1))
    if axis < 0:
        factor: Any = float(getattr(module, str(scale.target)))
        inverse: Any = 1.0 / factor
    else:
        shape = [-1 if i == axis else 1 for i in range(x.meta["val"].ndim)]
        factor = call(_ATEN.view.default, (scale, shape))
        inverse = call(_ATEN.reciprocal.default, (factor,))
    codes = call(_ATEN.round.default, (call(_ATEN.mul.Tensor, (x, inverse)),))
    return call(_ATEN.mul.Tensor, (call(_ATEN.clamp.default, (codes, lowest, -lowest - 1)), factor))


def _half(module: GraphModule, x: Node, clip: bool, name: str) -> Node:
    call, dtype = module.graph.call_function, x.meta["val"].dtype
    bounded = call(_ATEN.clamp.default, (x, -HALF_MAX, HALF_MAX)) if clip else x
    return call(_ATEN.to.dtype, (call(_ATEN.to.dtype, (bounded, torch.float16)), dtype))


def _weight(module: GraphModule, codes: Node, scale: Node, axis: int, name: str) -> Node:
    call, graph_scale = module.graph.call_function, getattr(module, str(scale.target))
    shape = [-1 if i == axis else 1 for i in range(getattr(module, str(codes.target)).ndim)] if axis >= 0 else []
    values = call(_ATEN.to.dtype, (codes, graph_scale.dtype))
    return call(_ATEN.mul.Tensor, (values, call(_ATEN.view.default, (scale, shape))))


def _forget_places(exported: ExportedProgram) -> None:
    """Remove source lines from the nodes: they hold paths of this machine."""
    for node in exported.graph.nodes:
        node.meta = {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}


def _numbers(subject: Subject, program: Program) -> dict[str, Any]:
    prepared = subject.prepared
    return {
        "schema": SCHEMA,
        "march": prepared.march,
        "inputs": list(program.inputs),
        "outputs": list(program.outputs),
        "qconfig": plain(prepared.applied.ops),
        "scales": scales(prepared),
    }


def _readme(subject: Subject, program: Program) -> str:
    arguments = ", ".join(inspect.signature(program.module.forward).parameters)
    return f"""# Quantized model for torch

{origin_text(subject)}

    program = torch.export.load("model.pt2").module()
    outputs = program({arguments})                     # as the prepared model of qflow computes them

`weights.safetensors` is the float model's state dict, `quantization.json` holds the qconfig and the scale of each
quantizer: `name` for a result, `name.weight` for a weight (one scale for each channel). qflow is not needed.
"""
