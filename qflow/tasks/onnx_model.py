"""Loads ONNX files as plain PyTorch modules (with onnx2torch, extra `onnx`; no TorchScript).

    task.model: {_target_: qflow.tasks.onnx_model.load, path: model.onnx}

Module names are the ONNX node names, so that a qconfig can be read next to the ONNX graph. Weights may be initializers,
or Constant nodes as paddle2onnx writes them. A file that is exported at batch 1 runs at any batch size if its only
places with a batch size are reshapes and resizes to a constant shape.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from qflow.core.errors import ConfigError, ModelError


def load(path: str | Path) -> nn.Module:
    """The network in `path`, in eval mode.

    Raises ConfigError if onnx2torch is not installed, ModelError if it cannot convert the file.
    """
    try:
        import onnx
        from onnx2torch import convert
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError if torch is of another build
        raise ConfigError(
            f"ONNX models need the extra `onnx` (onnx2torch and its torchvision), but got: {error}. "
            "pip install 'qflow[onnx]', with torch and torchvision of one build."
        ) from error
    if not Path(path).is_file():
        raise ModelError(f"An ONNX model is a file, but got {path}. Check task.model.path.")
    try:
        found = onnx.load(str(path))
        _constants_to_initializers(found.graph)
        free = _free_batch(found)
        for node in found.graph.node:
            if hasattr(nn.Module(), node.name) or node.name == "initializers":  # these cannot name a submodule
                node.name += "_"
        model: nn.Module = convert(found)
    except Exception as error:  # onnx and onnx2torch raise many types: unknown operators, broken protobufs
        text = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"An ONNX file holds operators that onnx2torch converts, but got: {text}.") from error
    for module in model.modules() if free else ():
        if hasattr(module, "ignore_bs_ch_size"):  # of a resize to constant sizes, which name the batch
            module.ignore_bs_ch_size = True  # type: ignore[assignment]
    return model.eval()


def _constants_to_initializers(graph: Any) -> None:
    """Turn Constant nodes, and Identity nodes on initializers, into initializers: there weights are looked for."""
    from onnx import numpy_helper

    leaving = {value.name for value in graph.output}
    for node in list(graph.node):  # in order of execution
        if any(name in leaving for name in node.output):
            continue
        tensor = None
        if node.op_type == "Constant":
            tensor = _value(node)
        elif node.op_type == "Identity":
            tensor = next((t for t in graph.initializer if t.name == node.input[0]), None)
        if tensor is not None:
            graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(tensor), node.output[0]))
            graph.node.remove(node)


def _value(node: Any) -> Any:
    """The tensor of a Constant node; None for texts and sparse tensors."""
    import numpy
    from onnx import helper, numpy_helper

    attribute = node.attribute[0]
    if attribute.name == "value":
        return attribute.t
    dtypes = {"value_float": "f4", "value_floats": "f4", "value_int": "i8", "value_ints": "i8"}
    if attribute.name not in dtypes:
        return None
    return numpy_helper.from_array(numpy.asarray(helper.get_attribute_value(attribute), dtypes[attribute.name]))


def _free_batch(model: Any) -> bool:
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
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del graph.value_info[:]
    return True
