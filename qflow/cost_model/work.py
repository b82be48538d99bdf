"""Counts the work of each operator, independent of its dtypes: MACs, look-ups, elements moved, weights.

A softmax in steps counts as one (attention.py), and views (reshape, squeeze, ...) move nothing.

The work is counted on the fused graph at the deployed shape. A GEMM's channels are padded to multiples of 16 per group
(16 and 32 fit the published rows equally well, 64 is clearly worse). The two matmuls of an attention core are counted
separately: they run much slower per MAC than a convolution, and the published rows only give a cost of them together
with the softmax between them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from qflow.core.graph import GEMM_KINDS, TRANSPARENT_KINDS, ModelGraph, OpKind, OpNode
from qflow.cost_model.attention import attention_matmuls, function_of, softmaxes

CHANNEL_ALIGN = 16
ELEMENTWISE = frozenset({OpKind.add, OpKind.mul, OpKind.arithmetic, OpKind.norm})
MOVES = frozenset({OpKind.move, OpKind.concat, OpKind.resize, OpKind.max_pool, OpKind.avg_pool})
_VIEWS = (
    "Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout Flatten Unflatten reshape view "
    "view_as flatten unflatten ravel squeeze unsqueeze contiguous clone detach dropout dropout1d dropout2d dropout3d "
    "alpha_dropout feature_dropout identity to float half double bfloat16 type type_as data"
)
VIEWS = frozenset(_VIEWS.split())
"""Functions and modules whose result is the same memory in another shape; they take no time."""
SPLITS = frozenset(["chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit", "unbind"])
PRICED = {
    **dict.fromkeys([*ELEMENTWISE, OpKind.relu], "elementwise"),
    **dict.fromkeys([OpKind.move, OpKind.concat], "move"),
    **dict.fromkeys([OpKind.max_pool, OpKind.avg_pool], "pool"),
    OpKind.resize: "resize",
    OpKind.reduce: "reduce",
    OpKind.layer_norm: "layer_norm",
    OpKind.grid_sample: "grid_sample",
    OpKind.order: "order",
}
"""Kind -> key of `CostModel.element_prices`. These kinds cost by the elements that they pass, in a range."""
COUNTED = {
    **dict.fromkeys(ELEMENTWISE, "elementwise"),
    **dict.fromkeys([OpKind.grid_sample, OpKind.order], "gathered"),
    OpKind.lut: "lut",
    OpKind.layer_norm: "layer_norm",
    OpKind.reduce: "reduce",
}
"""Kind -> the count of `OpWork` that its output elements are."""
READ = frozenset({OpKind.reduce, OpKind.max_pool, OpKind.avg_pool})
"""Kinds whose time follows the elements that they read. (topk and gather read no more than they need.)"""
ENGINES = {
    **dict.fromkeys(GEMM_KINDS, "TAE"),
    **dict.fromkeys([OpKind.relu, OpKind.lut, OpKind.softmax, OpKind.layer_norm, OpKind.reduce, *ELEMENTWISE], "VAE"),
    **dict.fromkeys([OpKind.max_pool, OpKind.avg_pool, OpKind.resize, OpKind.grid_sample], "AAE"),
    **dict.fromkeys([OpKind.move, OpKind.concat], "DTE"),
    OpKind.input: "VPU",
    OpKind.order: "SPU",
    OpKind.constant: "",
}
"""Kind -> unit of the BPU that computes it; kinds that are not listed are computed on the host."""


@dataclass(frozen=True)
class OpWork:
    """Work of one operator per call, as counts. `inputs` are the operators whose quantizers act at each position."""

    name: str
    kind: OpKind
    owner: str | None
    inputs: tuple[tuple[str, ...], ...]
    producers: tuple[str, ...]
    input_elements: tuple[int, ...]
    elements: int
    shape: tuple[int, ...]
    weight: str = ""
    """Name of the weights, which all calls of a shared module have in common; "" without weights of a module."""
    gemm: int = 0
    macs: int = 0
    padded_macs: int = 0
    """Of convolutions, linear layers and plain matmuls, channels padded; 0 for a depthwise convolution."""
    depthwise_macs: int = 0
    attention_macs: int = 0
    lut: int = 0
    softmax: int = 0
    layer_norm: int = 0
    reduce: int = 0
    elementwise: int = 0
    moved: int = 0
    gathered: int = 0
    """Output elements of grid_sample, topk, gather and the like."""
    weights: int = 0
    passed: int = 0
    """Elements that an operator of `PRICED` passes; 0 for views and for steps of a softmax."""
    leaving: bool = False
    """True if the result is a model output."""

    @property
    def engine(self) -> str:
        """Unit that computes the operator; "host" outside the quantized region."""
        return ENGINES.get(self.kind, "host")

    @property
    def priced(self) -> str:
        """Key of `CostModel.element_prices`, or "" if the operator has no price by the element."""
        return PRICED.get(self.kind, "") if self.passed else ""

    @property
    def two_activations(self) -> bool:
        """True if a GEMM multiplies two activations, so that it has no weight of its own."""
        return bool(self.gemm) and not self.weight

    @property
    def transparent(self) -> bool:
        """True if values pass unchanged, in the dtype that they have."""
        return self.kind in TRANSPARENT_KINDS


_KNOWN: dict[int, tuple[weakref.ref[ModelGraph], tuple[OpWork, ...]]] = {}


def work_of(graph: ModelGraph) -> tuple[OpWork, ...]:
    """One row per operator of `graph`, traced at the deployed shape; counted once for as long as the graph lives."""
    place = id(graph)
    if place not in _KNOWN:
        _KNOWN[place] = weakref.ref(graph, lambda _: _KNOWN.pop(place, None)), tuple(_counted(graph))
    return _KNOWN[place][1]


def _counted(graph: ModelGraph) -> Iterator[OpWork]:
    owners = {node.quantizer: node.name for node in graph.quantized}
    acting = {
        node.name: (owners[node.quantizer],)
        if node.quantizer is not None
        else tuple(owners[graph.by_name[s].quantizer] for s in graph.sources(node.name))
        for node in graph.nodes
    }
    sizes = {node.name: node.elements for node in graph.nodes}
    found = softmaxes(graph)
    attention = attention_matmuls(graph, found)
    steps = {name: name == softmax.last for softmax in found for name in softmax.steps}
    leaving = {producer for _, producer in graph.outputs}
    for node in graph.nodes:
        name, size, read = node.name, sizes[node.name], tuple([sizes[producer] for producer in node.inputs])
        if name in steps:  # the last step of a softmax stands for all of them
            counts = {"softmax": size if steps[name] else 0}
        elif node.kind in GEMM_KINDS:
            counts = _products(node, name in attention)
        else:
            counts = _others(node, size, sum(read))
        yield OpWork(
            name=name,
            kind=node.kind,
            owner=owners[node.quantizer] if node.quantizer else None,
            inputs=tuple([acting[producer] for producer in node.inputs]),
            producers=node.inputs,
            input_elements=read,
            elements=size,
            shape=node.shape,
            weight=node.weight or "",
            leaving=name in leaving,
            **counts,
        )


def _products(node: OpNode, attention: bool) -> dict[str, int]:
    """Counts of a GEMM."""
    macs = node.macs
    depthwise = bool(macs) and _depthwise(node)
    return {
        "gemm": 1,
        "macs": macs,
        "padded_macs": _padded_macs(node) if macs and not (attention or depthwise) else 0,
        "depthwise_macs": macs if depthwise else 0,
        "attention_macs": macs if attention else 0,
        "elementwise": node.elements if node.fused_add else 0,
        "weights": node.attrs.get("weights", 0),
    }


def _others(node: OpNode, elements: int, read: int) -> dict[str, int]:
    """Counts of an operator that is no GEMM, with `elements` out and `read` elements in."""
    kind, passed = node.kind, _passed(node, elements, read)
    counts = {"passed": passed, "weights": elements if kind == OpKind.constant else node.attrs.get("weights", 0)}
    if kind in COUNTED:
        counts[COUNTED[kind]] = elements
    if node.fused_add:
        counts["elementwise"] = elements
    if kind in MOVES and passed:
        counts["moved"] = elements
    return counts


def _passed(node: OpNode, elements: int, read: int) -> int:
    """Elements that an operator passes on, or reads if its time follows its input."""
    if node.kind == OpKind.move:
        name = function_of(node)
        whole = name == "getitem" and elements == read  # x[None], x[:]
        return 0 if name in VIEWS or whole else read if name in SPLITS else elements
    if node.kind not in PRICED:
        return 0
    return max(elements, read) if node.kind in READ else elements


def _depthwise(node: OpNode) -> bool:
    groups = node.attrs.get("groups", 1)
    return groups > 1 and node.attrs["in"] == groups


def _padded(channels: int) -> int:
    return -(-channels // CHANNEL_ALIGN) * CHANNEL_ALIGN


def _padded_macs(node: OpNode) -> int:
    """MACs with padded input and output channels (per group)."""
    if node.kind == OpKind.matmul:
        inner, columns = node.attrs["inner"], node.shape[-1] if node.shape else 1
        return node.elements // max(columns, 1) * _padded(columns) * _padded(inner)
    groups = node.attrs["groups"]
    inner, outer = node.attrs["in"] // groups, node.attrs["out"] // groups
    return node.positions * groups * _padded(inner) * _padded(outer) * node.attrs["kernel"]
