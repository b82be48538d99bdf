"""`resolve`: it asks the setters in order for every operator, and returns a complete QConfig.

Constants get the dtype of the operators that read them, unless a setter names them. Operators that read one weight
quantize it alike. At the end, known ranges are
propagated to all operators whose range follows from them (known_range.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import WEIGHTED_KINDS, ModelGraph, OpKind, OpNode
from qflow.core.known_range import Bounds, KnownRange, follow, shared_ranges
from qflow.core.op_spec import check_op, inputs_by_position, parse_range
from qflow.core.qconfig import OpQConfig, QConfig
from qflow.core.setter import ModuleNameSetter, Setter, first_answer, way_out


def resolve(
    graph: ModelGraph,
    setters: Setter | Sequence[Setter],
    march: str,
    ranges: Mapping[str, Bounds] | None = None,
    propagate: bool = True,
) -> QConfig:
    """Ask the setters in order for every operator that owns a quantizer.

    `ranges` are known ranges (low, high) by operator, in addition to those of the setters; `propagate` extends them to
    all operators whose range follows. Raises ConfigError if no setter answers for an operator; a TemplateSetter at the
    end of the list prevents that.
    """
    rules = setters if isinstance(setters, Sequence) else (setters,)
    for setter in rules:
        if check := getattr(setter, "check", None):
            check(graph)
    ops: dict[str, OpQConfig] = {}
    for node in sorted(graph.quantized, key=lambda n: n.kind == OpKind.constant):  # readers before what they read
        answer = first_answer(s(node, graph) for s in rules if node.kind != OpKind.constant or _names(s))
        if node.kind == OpKind.constant and not isinstance(answer, OpQConfig):
            base = _constant(node, graph, ops) or first_answer(s(node, graph) for s in rules)
            answer = answer.over(base) if answer and isinstance(base, OpQConfig) else base
        if not isinstance(answer, OpQConfig):
            raise ConfigError(f"Every operator needs a qconfig, but no setter answers for {node.name}. Add a template.")
        inputs = inputs_by_position(answer, node)
        op = answer if answer.input == inputs else replace(answer, input=inputs)
        check_op({"output": op.output, "observer": op.observer}, node.name)
        ops[node.name] = op
    _one_weight(graph, ops)
    pinned = _pinned(graph, ops, ranges or {}, propagate)
    return QConfig(march=march, ops={node.name: pinned[node.name] for node in graph.quantized})


def _one_weight(graph: ModelGraph, ops: dict[str, OpQConfig]) -> None:
    """Let operators that read one weight (split calls of a module) quantize it as the first of them does."""
    first = {node.weight: node.name for node in reversed(graph.quantized) if node.weight}
    for node in graph.quantized:
        if not node.weight or first[node.weight] == node.name:
            continue
        op, lead = ops[node.name], ops[first[node.weight]]
        if (op.weight, op.weight_axis) != (lead.weight, lead.weight_axis):
            why = f"its weight is that of {first[node.weight]}: {lead.weight}"
            ops[node.name] = replace(op, weight=lead.weight, weight_axis=lead.weight_axis, fallback=why)


def _names(setter: Setter) -> bool:
    return isinstance(setter, ModuleNameSetter)


def _constant(node: OpNode, graph: ModelGraph, ops: Mapping[str, OpQConfig]) -> OpQConfig | None:
    """Return a constant's qconfig, with the highest dtype of its readers (the plugin's ConstTensorQuantTemplate).

    For a reader that uses it as weight or has a high-precision output, qint8 counts.
    """
    owners = {n.quantizer: n.name for n in graph.quantized}
    found: list[tuple[QDtype, OpNode]] = []
    stack, seen = [node], {node.name}
    while stack:
        source = stack.pop()
        for reader in (graph.by_name[name] for name in graph.consumers[source.name]):
            if reader.quantizer is None and reader.name not in seen:
                seen.add(reader.name)
                stack.append(reader)
            elif reader.quantizer is not None and owners[reader.quantizer] in ops:
                weight = reader.kind in WEIGHTED_KINDS and source.name not in reader.inputs[:1]
                dtype = QDtype.qint8 if weight else ops[owners[reader.quantizer]].output or QDtype.qint8
                found.append((dtype, reader))
    if not found:
        return None
    dtype, reader = max(found, key=lambda pair: pair[0].rank)
    of = ops[owners[reader.quantizer]]
    return OpQConfig(output=dtype, observer=of.observer, frozen=of.frozen, rule=f"constant follows {reader.name}")


def _pinned(
    graph: ModelGraph, ops: dict[str, OpQConfig], ranges: Mapping[str, Bounds], propagate: bool
) -> dict[str, OpQConfig]:
    """Return `ops` with the known ranges of `ranges`, and those that follow from these and from the ranges in `ops`."""
    unknown = [name for name in ranges if name not in ops]
    if unknown:
        raise ConfigError(f"A known range is for an operator, but got {unknown[0]}. {way_out(unknown[0], graph)}")
    stated = {name: parse_range(value, f"ranges[{name}]") for name, value in ranges.items()}
    stated |= {name: op.known_range for name, op in ops.items() if op.known_range is not None}
    if not stated:
        return ops
    known = {name: KnownRange(*bounds, (name,)) for name, bounds in stated.items()}
    if propagate:
        known = shared_ranges(graph, follow(graph, stated))
    done = dict(ops)
    for name, found in known.items():
        op = ops[name]
        free = op.fixed_scale is None and op.known_range is None
        if free and found.origins and (found.low or found.high) and op.output and op.output.is_integer:
            why = "is given" if found.origins == (name,) else f"follows from {', '.join(found.origins)}"
            done[name] = replace(op, known_range=(found.low, found.high), rule=f"{op.rule}; range {found} {why}")
    return done
