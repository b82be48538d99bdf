"""Finds softmaxes that are written out in steps, and the matmuls of attention.

A softmax is often exported as its steps: exp and sum, then a division (or a product with the reciprocal), before them
mostly the subtraction of the maximum. The device does the same work as for a softmax in one operator, so the steps are
counted as one: its elements at the last step, nothing at the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qflow.core.graph import TRANSPARENT_KINDS, ModelGraph, OpKind, OpNode

EXPONENTIALS = frozenset({"exp", "exp2"})
RECIPROCALS = frozenset({"reciprocal", "rdiv"})
MAXIMA = frozenset({"max", "amax"})


@dataclass(frozen=True)
class Softmax:
    """The steps of one softmax: `first` reads the scores, `last` has the result, `steps` are all of them."""

    first: str
    last: str
    steps: frozenset[str]


def function_of(node: OpNode) -> str:
    """Name of the function or module of an operator: `torch.exp` and `exp_` are exp."""
    return node.op_type.rsplit(".", 1)[-1].strip("_")


def softmaxes(graph: ModelGraph) -> tuple[Softmax, ...]:
    """All softmaxes of `graph`, those of one operator and those in steps."""
    found = [Softmax(n.name, n.name, frozenset({n.name})) for n in graph.nodes if n.kind == OpKind.softmax]
    for node in graph.nodes:
        if node.kind == OpKind.lut and function_of(node) in EXPONENTIALS:
            found += _in_steps(graph, node)
    return tuple(found)


def _in_steps(graph: ModelGraph, exp: OpNode) -> Iterator[Softmax]:
    before = _shift(graph, exp)
    shift = function_of(graph.by_name[before[1]]) if before else ""
    if shift == "logsumexp":  # exp(x - logsumexp(x)) needs no division
        yield Softmax(before[0], exp.name, frozenset({*before, exp.name}))
        return
    last, between = _division(graph, exp)
    if last:
        yield Softmax(before[0] if before else exp.name, last, frozenset({*before, exp.name, *between, last}))


def _shift(graph: ModelGraph, exp: OpNode) -> tuple[str, ...]:
    """The subtraction before `exp` and the maximum (or logsumexp) of the same scores that it subtracts, if any."""
    source = _through_views(graph, exp.inputs[0]) if exp.inputs else None
    if source is None or source.kind != OpKind.arithmetic or function_of(source) != "sub" or len(source.inputs) != 2:
        return ()
    least = _through_views(graph, source.inputs[1])
    if function_of(least) not in {*MAXIMA, "logsumexp"} or least.kind != OpKind.reduce:
        return ()
    same = _through_views(graph, least.inputs[0]).name == _through_views(graph, source.inputs[0]).name
    return (source.name, least.name) if same else ()


def _division(graph: ModelGraph, exp: OpNode) -> tuple[str, set[str]]:
    """The operator that divides `exp` by its own sum, and the operators between; ("", {}) if there is none."""
    for reader in graph.consumers[exp.name]:
        total = graph.by_name[reader]
        if total.kind != OpKind.reduce or function_of(total) != "sum":
            continue
        frontier = [(name, {total.name}) for name in graph.consumers[total.name]]
        while frontier:
            name, between = frontier.pop()
            node = graph.by_name[name]
            if node.kind in (OpKind.arithmetic, OpKind.mul) and function_of(node) in ("div", "truediv", "mul"):
                same = [n.name for i in node.inputs if _same(n := _through_views(graph, i), exp)]
                if same:
                    return name, between | set(same)
            elif _passes(node):
                frontier += [(after, between | {name}) for after in graph.consumers[name]]
    return "", set()


def _same(node: OpNode, exp: OpNode) -> bool:
    """True for `exp` and for another call of it with the same scores."""
    return (node.kind, function_of(node), node.inputs) == (exp.kind, function_of(exp), exp.inputs)


def _passes(node: OpNode) -> bool:
    """True for what stands between a sum and the division by it: views, 1 / x, and the addition of a small number."""
    constant = node.kind == OpKind.add and len(node.inputs) == 1
    floor = node.kind == OpKind.relu
    return node.kind == OpKind.move or constant or floor or function_of(node) in RECIPROCALS


def _through_views(graph: ModelGraph, name: str) -> OpNode:
    node = graph.by_name[name]
    while node.kind == OpKind.move and len(node.inputs) == 1:
        node = graph.by_name[node.inputs[0]]
    return node


def attention_matmuls(graph: ModelGraph, found: Sequence[Softmax]) -> frozenset[str]:
    """The two matmuls of each attention core: one before a softmax (with scaling, mask, clamp, cap and moves between),
    one directly after it. A matmul on one side only does not count as attention.
    """
    cores: set[str] = set()
    upstream = {node.name: node.inputs for node in graph.nodes}
    scaling = {OpKind.mul, OpKind.arithmetic, OpKind.add, OpKind.relu, OpKind.lut, *TRANSPARENT_KINDS}
    for softmax in found:
        before = _nearest_matmuls(graph, upstream, softmax.first, scaling)
        after = _nearest_matmuls(graph, graph.consumers, softmax.last, set(TRANSPARENT_KINDS))
        if before and after:
            cores |= before | after
    return frozenset(cores)


def _nearest_matmuls(
    graph: ModelGraph, neighbours: Mapping[str, tuple[str, ...]], start: str, passing: set[OpKind]
) -> set[str]:
    found: set[str] = set()
    seen: set[str] = set()
    frontier = list(neighbours[start])
    while frontier:
        name = frontier.pop()
        kind = graph.by_name[name].kind
        if kind == OpKind.matmul:
            found.add(name)
        elif kind in passing and name not in seen:
            seen.add(name)
            frontier.extend(neighbours[name])
    return found
