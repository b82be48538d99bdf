"""From HMCT's dtypes, which are those of what the nodes of an ONNX graph READ, to the outputs of operators.

An operator's result has the dtype in which its readers read it; where they differ, it has the higher one, and the
others get an input dtype of their own. `OutputType` is the dtype of a result that leaves the model, and all nodes of an
fp16 operator read float16. Which nodes an operator has, nodes.csv of an export says; without it, their names: the last
part of a node's name is its type, what stands before it the module, as torch.onnx writes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from qflow.core.dtype import QDtype
from qflow.core.graph import ModelGraph, OpNode
from qflow.imports.records import IN_FILE, NOT_READ, NOT_SURE, Content, Entry, Unmatched

GEMMS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FUNCTIONS: Mapping[str, tuple[str, ...]] = {
    "MatMul": ("matmul", "bmm", "linear", "scaled_dot_product_attention"),
    "Concat": ("cat", "concat", "stack"),
    "GridSample": ("grid_sample",),
    "Resize": ("interpolate", "upsample"),
    "Clip": ("clamp", "clip", "hardtanh", "relu6"),
    "GlobalAveragePool": ("adaptive_avg_pool2d",),
    "AveragePool": ("avg_pool2d",),
    "MaxPool": ("max_pool2d",),
    "ReduceMean": ("mean",),
    "ReduceSum": ("sum",),
    "LayerNormalization": ("layer_norm",),
}
"""Type of a node -> functions that become such a node; another type is a function of its own name."""
_NODE = re.compile(r"(?P<scope>(?:/[^/]+)*)/(?P<type>[A-Za-z]+)(?:_(?P<number>\d+))?")
_CALL = re.compile(r"(?P<scope>.*)\[(?P<function>\w+)\](?:\(\d+\))?")
NO_ROW = "in no row of nodes.csv, like nodes that read constants alone"
BY_ORDER = "by the order of nodes of one type: give nodes.csv of an export too"


def match_nodes(
    content: Content, graph: ModelGraph, nodes: Mapping[str, Sequence[str]]
) -> tuple[dict[str, Entry], list[Unmatched]]:
    """Return what a quant_config says of each operator, and what did not match.

    `nodes` are the nodes of each operator, from the one that reads its inputs on; empty takes those of their names.
    """
    unmatched: list[Unmatched] = []
    known = {op: list(names) for op, names in nodes.items() if op in graph.by_name}
    if not nodes:
        known = _by_name(content.node_config, graph, unmatched)
    owned = {name for names in known.values() for name in names}
    odd = Unmatched(NOT_READ, "", NO_ROW) if nodes else Unmatched(IN_FILE, "")
    unmatched += [replace(odd, name=name) for name in content.node_config if name not in owned]
    if content.node_config and owned.isdisjoint(content.node_config):
        return {}, unmatched
    return _entries(content, graph, known), unmatched


def _entries(content: Content, graph: ModelGraph, nodes: Mapping[str, list[str]]) -> dict[str, Entry]:
    outputs: dict[str, QDtype] = {}
    for node in graph.quantized:
        if (own := nodes.get(node.name)) and all(_read(content, n, 0) == QDtype.float16 for n in own):
            outputs[node.name] = QDtype.float16
        elif own and (dtype := _keys(content, own[-1]).get("OutputType")):
            outputs[node.name] = dtype
    owners = {node.quantizer: node.name for node in graph.quantized}
    reads: list[tuple[str, str, int, QDtype]] = []  # producer, reader, position, dtype
    for reader in graph.nodes:
        if outputs.get(owners.get(reader.quantizer, "")) != QDtype.float16:
            reads += [
                (s, reader.name, at, d)
                for at, d in _dtypes(content, reader, nodes)
                for s in graph.source(reader.inputs[at])
            ]
    found: dict[str, Entry] = {}
    for node in graph.quantized:
        read = [dtype for producer, _, _, dtype in reads if owners[graph.by_name[producer].quantizer] == node.name]
        output = outputs.get(node.name) or max(read, key=lambda d: d.rank, default=None)
        high = output is None and node.name in graph.high_precision
        found[node.name] = Entry(None if high else output or content.node_default, high, _weight(content, node, nodes))
    for producer, name, at, dtype in reads:
        source, reader = owners[graph.by_name[producer].quantizer], graph.by_name[name]
        if dtype != found[source].output and name in found and not found[source].high_precision:
            entry = found[name]
            asked: list[QDtype | None] = [*entry.inputs, *[None] * (len(reader.inputs) - len(entry.inputs))]
            asked[at] = dtype
            found[name] = replace(entry, inputs=tuple(asked))
    return found


def _dtypes(content: Content, reader: OpNode, nodes: Mapping[str, list[str]]) -> list[tuple[int, QDtype]]:
    """Return (position, dtype) of the inputs of an operator whose node is known; of a weighted one the first alone."""
    if not (own := nodes.get(reader.name)):
        return []
    positions = range(1) if reader.weight is not None else range(len(reader.inputs))
    return [(at, _read(content, own[0], at)) for at in positions if at < len(reader.inputs)]


def _weight(content: Content, node: OpNode, nodes: Mapping[str, list[str]]) -> QDtype | None:
    own = nodes.get(node.name)
    if node.weight is None:
        return None
    keys = _keys(content, own[0]) if own else {}
    return keys.get("input1", QDtype.qint8)


def _read(content: Content, node: str, position: int) -> QDtype:
    keys = _keys(content, node)
    return keys.get(f"input{position}") or keys.get("qtype") or content.node_default


def _keys(content: Content, node: str) -> Mapping[str, QDtype]:
    """Return the keys of a node; those of its type hold where it has none of its own."""
    match = _NODE.fullmatch(node)
    of_type = content.op_config.get(match["type"], {}) if match else {}
    return {**of_type, **content.node_config.get(node, {})}


def _by_name(names: Iterable[str], graph: ModelGraph, unmatched: list[Unmatched]) -> dict[str, list[str]]:
    """Return operator -> nodes from the names of nodes alone."""
    parts = {part: node.name for node in graph.nodes for part in (*node.fused, node.name)}
    found: dict[str, list[str]] = {}
    for name in names:
        match = _NODE.fullmatch(name)
        if match is None:
            continue
        path = _module_path(match["scope"].split("/")[1:])
        op = parts.get(path) or parts.get(re.sub(r"_(\d+)$", r"(\1)", path))
        if op is None:
            op = _call(graph, path, match["type"], int(match["number"] or 0))
            if op is not None:
                unmatched.append(Unmatched(NOT_SURE, f"{name} = {op}", BY_ORDER))
        if op is not None:
            at = 0 if match["type"] in GEMMS else len(found.get(op, []))
            found.setdefault(op, []).insert(at, name)
    return found


def _call(graph: ModelGraph, scope: str, kind: str, number: int) -> str | None:
    """Return the call of a function in `scope` that is the `number`-th node of its type there, or the one call.

    torch counts nodes that compute constants too.
    """
    functions = FUNCTIONS.get(kind, (kind.lower(),))
    calls = [
        node.name
        for node in graph.nodes
        if (m := _CALL.fullmatch(node.name)) and m["scope"] == scope and m["function"] in functions
    ]
    return calls[number] if number < len(calls) else calls[0] if len(calls) == 1 else None


def _module_path(scopes: Sequence[str]) -> str:
    """Return `stem.0.conv` of the scopes `stem`, `stem.0`, `conv`: a scope may repeat the one before it."""
    path: list[str] = []
    for scope in scopes:
        if path and scope.startswith(f"{path[-1]}."):
            path.pop()
        path.append(scope)
    return ".".join(path)
