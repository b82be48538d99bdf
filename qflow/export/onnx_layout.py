"""Quantizers and matrix products placed where ONNX runtimes look for them. No value changes.

conv -> relu -> Q          Q(relu(x)) = Q(relu(Q(x))), because rounding keeps the order and 0 is a code. With a Q
                           right after it the convolution becomes an integer kernel; the grid is signed, so that a
                           relu cannot be absorbed by the Q as with uint8.
DQ -> reshape -> conv      A value on the grid stays on it under a Q of the same scale. So an operator that only
                           moves values stands between DQ and Q too, and integers move. (onnxruntime would insert
                           this Q itself, and in opset 21 gives it a zero point of another type than its codes.)
linear on more than 2 axes A Gemm between two reshapes. As a MatMul onnxruntime takes a weight of codes for one
                           that was compressed, and rounds int16 and float activations to 8 bits on its own account.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qflow.export.quant_ops import DEQUANTIZE

_ATEN = torch.ops.aten
_MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "MaxPool", "Gather"})
_BETWEEN = frozenset({"Relu", "Clip", "Reshape"})
_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul", "Add"})


def flatten_products(module: GraphModule) -> None:
    """Write each product with a constant matrix of codes as a linear operator on two axes; for a folded program."""
    for node in list(module.graph.nodes):
        right = node.args[1] if len(node.args) > 1 else None
        if not isinstance(right, Node) or right.target is not DEQUANTIZE or right.meta["val"].ndim != 2:
            continue
        if node.target is _ATEN.matmul.default and node.args[0].meta["val"].ndim >= 2:
            _as_linear(module, node, _transposed(module, right, node), None)
        elif node.target is _ATEN.linear.default and node.args[0].meta["val"].ndim > 2:
            _as_linear(module, node, right, node.args[2] if len(node.args) > 2 else None)
    module.graph.eliminate_dead_code()
    module.recompile()


def _as_linear(module: GraphModule, node: Node, weight: Node, bias: Any) -> None:
    call, x = module.graph.call_function, node.args[0]
    assert isinstance(x, Node)
    sizes, width = x.meta["val"].shape[:-1], int(x.meta["val"].shape[-1])
    with module.graph.inserting_before(node):
        kept = [n if isinstance(n, int) else call(_ATEN.sym_size.int, (x, i)) for i, n in enumerate(sizes)]
        flat = call(_ATEN.reshape.default, (x, [-1, width]))
        product = call(_ATEN.linear.default, (flat, weight, bias))
        whole = call(_ATEN.reshape.default, (product, [*kept, int(node.meta["val"].shape[-1])]))
    whole.meta = dict(node.meta)
    node.replace_all_uses_with(whole)


def _transposed(module: GraphModule, weight: Node, at: Node) -> Node:
    codes, scale, axis, name = weight.args
    held = f"{codes.target}_transposed"  # type: ignore[union-attr]
    module.register_buffer(held, getattr(module, str(codes.target)).t().contiguous())  # type: ignore[union-attr]
    with module.graph.inserting_before(at):
        args = (module.graph.get_attr(held), scale, axis if axis < 0 else 1 - axis, name)  # type: ignore[operator]
        return module.graph.call_function(DEQUANTIZE, args)


def place_quantizers(model: Any) -> None:
    """Place the quantizers of an `onnx_ir.Model`."""
    for node in list(model.graph):
        if node.op_type == "Identity" and not node.outputs[0].is_graph_output():
            for use in list(node.outputs[0].uses()):
                use.node.replace_input_with(use.idx, node.inputs[0])
            model.graph.remove(node, safe=True)
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear":
            _after_product(model, node)
    for node in list(model.graph):
        if node.op_type in _MOVES:
            _after_move(model, node)


def _after_product(model: Any, quantizer: Any) -> None:
    """Quantize a product too whose clamped or reshaped result is quantized, if nothing else reads it."""
    value, name = quantizer.inputs[0], f"{_owner(quantizer)}/before_relu"
    while len(value.uses()) == 1 and value.producer() is not None:
        producer = value.producer()
        if producer.op_type in _PRODUCTS:
            if value is not quantizer.inputs[0]:
                _insert(model, value, quantizer, name)
            return
        if producer.op_type not in _BETWEEN:
            return
        value = producer.inputs[0]


def _after_move(model: Any, move: Any) -> None:
    """Quantize the result of `move` as its input was, unless only quantizers read it."""
    source, result = move.inputs[0].producer(), move.outputs[0]
    if source is None or source.op_type != "DequantizeLinear" or source.inputs[0].is_initializer():
        return
    others = [use.node for use in result.uses() if use.node.op_type != "QuantizeLinear"]
    if not source.inputs[1].shape and (others or result.is_graph_output()):
        _insert(model, result, source, f"{_owner(source)}/moved")


def _owner(quantizer: Any) -> str:
    """The operator's name in that of a quantizer: `a/b/QuantizeLinear` -> `a/b`."""
    name: str = quantizer.name.removesuffix(f"/{quantizer.op_type}")
    return re.sub(r"/(moved|before_relu)\d*$", "", name)


def _insert(model: Any, value: Any, like: Any, name: str) -> None:
    """Quantize `value` with the scale and zero point of the quantizer `like`."""
    import onnx_ir as ir

    taken = {node.name for node in model.graph}
    full = next(f"{name}{n or ''}" for n in range(len(taken) + 1) if f"{name}{n or ''}/QuantizeLinear" not in taken)
    readers = [(use.node, use.idx) for use in value.uses()]
    q = ir.node("QuantizeLinear", [value, *like.inputs[1:]], name=f"{full}/QuantizeLinear")
    dq = ir.node("DequantizeLinear", [q.outputs[0], *like.inputs[1:]], name=f"{full}/DequantizeLinear")
    for node, kind in ((q, like.inputs[2].dtype), (dq, value.dtype)):
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].dtype = node.name, value.shape, kind
    model.graph.insert_after(value.producer(), [q, dq])
    for node, index in readers:
        node.replace_input_with(index, dq.outputs[0])
    for place, output in enumerate(model.graph.outputs):
        if output is value:
            value.name, dq.outputs[0].name = f"{full}/result", value.name
            model.graph.outputs[place] = dq.outputs[0]
