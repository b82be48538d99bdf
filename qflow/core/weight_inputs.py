"""Which outputs must be int8 so that a weight can be int16, on a device that does not multiply int16 by int16."""

from __future__ import annotations

from collections.abc import Mapping

from qflow.core.device_rules import DeviceRules
from qflow.core.graph import ModelGraph, OpKind


def weight_inputs(graph: ModelGraph, rules: DeviceRules) -> Mapping[str, frozenset[str]]:
    """Return, for each operator with a weight, the operators whose outputs must be int8 while that weight is int16.

    It is an empty set where the device multiplies int16 by int16. All calls of a shared module count. A constant takes
    the dtype of the operators that read it (resolve.py), so these stand for it.
    """
    owners = {node.quantizer: node.name for node in graph.quantized}
    found: dict[str, frozenset[str]] = {}
    for node in graph.nodes:
        if node.weight is None or node.quantizer is None or not node.inputs:
            continue
        sources = () if rules.dual(node) else graph.source(node.inputs[0])
        deciding = {name for source in sources for name in _deciding(graph, source)}
        name = owners[node.quantizer]
        found[name] = found.get(name, frozenset()) | {owners[graph.by_name[d].quantizer] for d in deciding}
    return found


def _deciding(graph: ModelGraph, source: str) -> set[str]:
    """Return the operators whose own precision decides that of the output of `source`."""
    if graph.by_name[source].kind != OpKind.constant:
        return {source}
    found, stack = set[str](), [source]
    while stack:
        for reader in graph.consumers[stack.pop()]:
            (stack.append if graph.by_name[reader].quantizer is None else found.add)(reader)
    return found
