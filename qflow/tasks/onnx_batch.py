"""ONNX files that are exported at batch 1, run at any batch size.

Three places hold the batch of such a file: the leading 1 of a constant reshape, the sizes of a resize (onnx_model.py),
and a constant that a Concat joins to each sample, as the class token of a transformer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn

from qflow.core.errors import ModelError

BATCH, CONCAT = "batch", "OnnxConcat"


def free_batch(model: Any) -> bool:
    """Let a file that is exported at batch 1 run at any batch: the leading 1 of constant reshapes follows the input.

    False if the batch is not fixed at 1.
    """
    from onnx import numpy_helper, shape_inference

    graph = model.graph
    constant = {tensor.name: tensor for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constant and value.type.tensor_type.shape.dim]
    if not inputs or any(value.type.tensor_type.shape.dim[0].dim_value != 1 for value in inputs):
        return False
    inferred = shape_inference.infer_shapes(model).graph
    first = {
        value.name: value.type.tensor_type.shape.dim[0].dim_value
        for value in [*inferred.value_info, *inferred.input]
        if value.type.tensor_type.shape.dim
    }
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[1] not in constant or any(a.i for a in node.attribute):
            continue
        shape = numpy_helper.to_array(constant[node.input[1]]).copy()
        if not shape.size or shape[0] != 1 or (first.get(node.input[0]) != 1 and -1 in shape):
            continue
        shape[0] = 0 if first.get(node.input[0]) == 1 else -1  # 0 copies the size of the input
        node.input[1] = f"{node.input[1]}, {node.output[0]} at any batch"  # other nodes may read the same constant
        graph.initializer.append(numpy_helper.from_array(shape, node.input[1]))
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.shape.dim and value.type.tensor_type.shape.dim[0].dim_value == 1:
            value.type.tensor_type.shape.dim[0].dim_param = BATCH
    del graph.value_info[:]
    return True


def repeated_constants(model: Any) -> list[set[int]]:
    """Return for each Concat of the graph which of its inputs are constants that the batch repeats.

    `free_batch` has named the batch of the graph's inputs. A constant counts if its first size is 1 and shape inference
    proves that of an input beside it to be the batch; along the first axis nothing is repeated.
    """
    from onnx import helper, shape_inference

    probe = copy.deepcopy(model)  # each constant that is found becomes an input there, so that what follows is inferred
    sizes = {t.name: list(t.dims) for t in probe.graph.initializer}
    kinds = {t.name: t.data_type for t in probe.graph.initializer}
    concats = [node for node in probe.graph.node if node.op_type == "Concat"]
    found: list[set[int]] = [set() for _ in concats]
    for known, node in zip(found, concats, strict=True):
        inferred = shape_inference.infer_shapes(probe).graph
        first = {v.name: _first(v) for v in [*inferred.value_info, *inferred.input]}
        axis = next(a.i for a in node.attribute if a.name == "axis")
        if not axis or not any(first.get(name) == BATCH for name in node.input):
            continue
        for place, name in enumerate(node.input):
            size = sizes.get(name, [])
            if len(size) > 1 and size[0] == 1 and axis != -len(size):
                known.add(place)
                node.input[place] = f"{name}, {node.output[0]} for each sample"
                value = helper.make_tensor_value_info(node.input[place], kinds[name], [BATCH, *size[1:]])
                probe.graph.input.append(value)
    return found


def _first(value: Any) -> str:
    """Name of the first size of a value; "" if it has none."""
    dims = value.type.tensor_type.shape.dim
    return str(dims[0].dim_param) if dims else ""


def repeat_constants(model: nn.Module, repeated: Sequence[set[int]]) -> None:
    """Let the converted model expand the constants that `repeated` names, for each Concat in order, to the batch."""
    if not any(repeated) or not isinstance(model, fx.GraphModule):
        return
    graph = model.graph
    batch = next(node for node in graph.nodes if node.op == "placeholder")
    joins = [n for n in graph.nodes if n.op == "call_module" and type(model.get_submodule(n.target)).__name__ == CONCAT]
    for node, places in zip(joins, repeated, strict=True):
        arguments = list(node.args)
        with graph.inserting_before(node):
            for place in sorted(places):
                rank = model.get_buffer(arguments[place].target).ndim
                size = graph.call_method("size", (batch, 0))
                arguments[place] = graph.call_method("expand", (arguments[place], size, *[-1] * (rank - 1)))
        node.args = tuple(arguments)
    model.recompile()


@torch.no_grad()
def check_batch(model: nn.Module, onnx_model: Any) -> None:
    """Raise ModelError unless `model` gives for two samples at once what it gives for each; `free_batch` came before.

    The inputs are random numbers of the sizes in the file; with open sizes nothing is checked.
    """
    inputs = _inputs(onnx_model)
    if inputs is None:
        return
    try:
        parts = [_outputs(model(*(x[i : i + 1] for x in inputs))) for i in range(2)]  # as the file is exported
    except (RuntimeError, ValueError, IndexError):
        return  # it does not run on random numbers, so they say nothing
    try:
        both = _outputs(model(*inputs))
        same = all(_same(found, alone) for found, alone in zip(both, zip(*parts, strict=True), strict=True))
        why = "" if same else "other numbers at batch 2"
    except (RuntimeError, ValueError, IndexError) as error:
        why = " ".join(str(error).split())
    if why:
        raise ModelError(
            f"A model runs at any batch size, but got an ONNX file that is exported at batch 1 and gives: {why}. "
            'Export it with an open batch, torch.onnx.export(..., dynamic_axes={"<input>": {0: "batch"}}).'
        )


def _inputs(onnx_model: Any) -> list[Tensor] | None:
    """Two samples for each input of the graph; None if a size is open."""
    from onnx import helper

    held, generator = {tensor.name for tensor in onnx_model.graph.initializer}, torch.Generator().manual_seed(0)
    found = []
    for value in onnx_model.graph.input:
        sizes = [d.dim_value for d in value.type.tensor_type.shape.dim[1:]]
        if value.name in held:
            continue
        if not all(sizes):
            return None
        kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        dtype = torch.from_numpy(numpy.zeros(1, kind)).dtype
        drawn = torch.randn(2, *sizes, generator=generator)
        found.append(drawn.to(dtype) if dtype.is_floating_point else torch.zeros(2, *sizes, dtype=dtype))
    return found


def _outputs(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def _same(both: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether an output of two samples is that of each, up to rounding; results of integers are compared by shape."""
    alone = torch.cat(list(parts))
    if both.shape != alone.shape or not both.is_floating_point() or not bool(alone.isfinite().all()):
        return both.shape == alone.shape
    return bool((both - alone).norm() <= 1e-2 * alone.norm())
