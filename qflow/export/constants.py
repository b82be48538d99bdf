"""What depends on parameters alone is computed once: weights become integer codes, folded biases become values."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qflow.export.quant_ops import CODES, DEQUANTIZE, FAKE_QUANTIZE, along

COPY = torch.ops.aten.copy.default


def fold(module: GraphModule) -> None:
    """Replace constant parts of a functional graph by tensors, and quantized constants by codes with `dequantize`."""
    known: dict[Node, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "call_module":  # the guards of torch.export: a program that is made of this graph has its own
            module.graph.erase_node(node)
        elif node.op == "get_attr":
            value = _attribute(module, str(node.target))
            if isinstance(value, Tensor):
                known[node] = value.detach()
        elif _is_constant(node, known):
            if node.target is FAKE_QUANTIZE:
                _store_codes(module, node, known)
            else:
                with torch.no_grad():
                    value = node.target(*_known(node.args, known), **_known(node.kwargs, known))
                known[node] = value
        elif node.target is COPY and _same_form(*node.args):
            node.replace_all_uses_with(node.args[1])
    for node, value in known.items():
        if isinstance(value, Tensor) and node.op != "get_attr" and any(user not in known for user in node.users):
            inputs = sum(known[n].numel() for n in node.all_input_nodes if isinstance(known[n], Tensor))
            if value.numel() <= inputs or value.numel() < 1024:  # an expanded constant would only take space
                node.replace_all_uses_with(_constant(module, node, node.name, value.contiguous()))
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    _delete_unread(module)
    module.recompile()


def _is_constant(node: Node, known: dict[Node, Any]) -> bool:
    inputs, target = node.all_input_nodes, node.target
    if target is operator.getitem:  # one of several results
        return inputs[0] in known
    if node.op != "call_function" or not inputs or not isinstance(target, torch._ops.OpOverload):
        return False
    fixed = torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable
    return fixed and all(n in known for n in inputs)


def _same_form(written: Any, value: Any) -> bool:
    """True if a copy into `written` is the value itself."""
    a, b = written.meta["val"], value.meta["val"]
    return bool(a.dtype == b.dtype and a.shape == b.shape)


def _known(structure: Any, known: dict[Node, Any]) -> Any:
    return torch.fx.node.map_arg(structure, lambda node: known[node])


def _store_codes(module: GraphModule, node: Node, known: dict[Node, Any]) -> None:
    x, scale, axis, bits, name = _known(node.args, known)
    lowest = -(2 ** (bits - 1))
    codes = x.mul(1.0 / along(scale, axis, x.ndim).to(x.dtype)).round_().clamp_(lowest, -lowest - 1)
    stored = _constant(module, node, f"{node.name}_codes", codes.to(CODES[bits]).contiguous())
    factor = _constant(module, node, f"{node.name}_scale", scale.contiguous())
    with module.graph.inserting_before(node):
        restored = module.graph.call_function(DEQUANTIZE, (stored, factor, axis, name))
    restored.meta = dict(node.meta)
    node.replace_all_uses_with(restored)


def _constant(module: GraphModule, at: Node, name: str, value: Tensor) -> Node:
    module.register_buffer(name, value)
    with module.graph.inserting_before(at):
        return module.graph.get_attr(name)


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _delete_unread(module: GraphModule) -> None:
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for path in [n for n, _ in [*module.named_parameters(), *module.named_buffers()] if n not in read]:
        owner, _, name = path.rpartition(".")
        delattr(module.get_submodule(owner), name)
