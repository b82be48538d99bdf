"""Loads ONNX files as plain PyTorch modules (with onnx2torch, extra `onnx`; no TorchScript).

    task.model: {_target_: qflow.tasks.onnx_model.load, path: model.onnx}

Module names are the ONNX node names, and arguments the names of its inputs, so that a qconfig can be read next to the
ONNX graph. Weights may be initializers,
or Constant nodes as paddle2onnx writes them. A file that is exported at batch 1 runs at any batch size where its only
places with a batch size are those of onnx_batch.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from qflow.core.errors import ConfigError, ModelError
from qflow.tasks.files.onnx_names import name_inputs
from qflow.tasks.onnx_batch import check_batch, free_batch, repeat_constants, repeated_constants

OLDER = "Operators of an older opset may be among them: torch.onnx.export(..., opset_version=16)."


def load(path: str | Path) -> nn.Module:
    """The network in `path`, in eval mode.

    Raises ConfigError if onnx2torch is not installed, ModelError if it cannot convert the file, or if a file that is
    exported at batch 1 does not run at another batch.
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
        name_inputs(found.graph)
        free = free_batch(found)
        repeated = repeated_constants(found) if free else []
        for node in found.graph.node:
            if hasattr(nn.Module(), node.name) or node.name == "initializers":  # these cannot name a submodule
                node.name += "_"
        model: nn.Module = convert(found, save_input_names=True)
    except Exception as error:  # onnx and onnx2torch raise many types: unknown operators, broken protobufs
        text = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"An ONNX file holds operators that onnx2torch converts, but got: {text}. {OLDER}") from error
    for module in model.modules() if free else ():
        if hasattr(module, "ignore_bs_ch_size"):  # of a resize to constant sizes, which name the batch
            module.ignore_bs_ch_size = True  # type: ignore[assignment]
    repeat_constants(model, repeated)
    if free:
        check_batch(model.eval(), found)
    return model.eval()


def _constants_to_initializers(graph: Any) -> None:
    """Turn Constant nodes, and Identity or Expand nodes on constants, into initializers, where weights are read."""
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
        elif node.op_type == "Expand":
            tensor = _expanded(*(next((t for t in graph.initializer if t.name == n), None) for n in node.input))
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


def _expanded(tensor: Any, shape: Any) -> Any:
    """The tensor at a constant shape, as an exported `token.expand(1, -1, -1)` gives it; None unless both are known."""
    import numpy
    from onnx import numpy_helper

    if tensor is None or shape is None:
        return None
    value, wanted = numpy_helper.to_array(tensor), numpy_helper.to_array(shape)
    return numpy_helper.from_array(value * numpy.ones(wanted, value.dtype))
