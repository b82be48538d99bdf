"""Finds the operators of a model by the names that another tool gives them, and says what it did not find.

What is known of the plugin's names is in plugin/names.py. From there in this order: the plugin's name of the operator,
the operator's own, the same without what the model check adds (`sub[sub]`, `conv(1)`) or without trailing parts (a
value inside), a candidate for a generated name, and the place in the order of calls where the file numbers generated
names for the whole model. The last two are not sure. A module's name stands for the operators in it that have no entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qflow.core.dtype import QDtype
from qflow.core.graph import ModelGraph, OpKind
from qflow.core.setter import covers
from qflow.imports.records import IN_FILE, IN_MODEL, NOT_HAD, NOT_READ, NOT_SURE, Content, Entry, Unmatched
from qflow.plugin.names import candidate, plugin_names
from qflow.quant.model.quantized_model import QuantizedModel

_DECORATED = re.compile(r"(?P<name>.+?)(?:\[\w+\])?(?:\(\d+\))?")
_GENERATED = re.compile(r"_generated_(?P<function>\w+?)_\d+")
_FUNCTION = re.compile(r".*\[(?P<function>\w+)\](?:\(\d+\))?")
LONGEST = 1000  # characters of a name; each of its parts is looked up
PATTERN = "matched by the pattern of generated names"
ORDER = "matched by the order of calls, because the file numbers generated names for the whole model"
SEVERAL = "calls with a quantizer each here, and one in the file: all take it"
INSIDE, PART = "a value inside {}, whose precision follows from it", "part of {} here"
PASSES, HOST = "passes on the precision of what it reads", "no operator of the qconfig here"


@dataclass(frozen=True)
class Place:
    """Where a name of a file belongs."""

    ops: tuple[str, ...] = ()
    group: str = ""
    """Empty if it is sure."""
    reason: str = ""


@dataclass(frozen=True)
class Names:
    """The names by which the operators of a model may be called."""

    operators: tuple[str, ...]
    """Operators of the qconfig, in the order of execution."""
    sure: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Another name -> operators."""
    candidates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    others: Mapping[str, Place] = field(default_factory=dict)
    """Names of the model that are no operators of the qconfig."""

    def place(self, name: str, generated: Mapping[str, str], own: bool = False) -> Place:
        """Return where `name` belongs; `generated` are the names that are matched by order, `own` are qflow's names."""
        if own:
            return Place((name,)) if name in self.operators else self.others.get(name, Place(group=IN_FILE))
        if len(name) > LONGEST:
            return Place(group=IN_FILE)
        for text in dict.fromkeys([name, _undecorated(name), *_cut(name)]):
            found = self.sure.get(text) or ((text,) if text in self.operators else ())
            if found:
                return Place(found, NOT_SURE, SEVERAL) if len(found) > 1 else Place(found)
            if text in self.candidates:
                return Place(self.candidates[text], NOT_SURE, PATTERN)
            if text in generated:
                return Place((generated[text],), NOT_SURE, ORDER)
            if text in self.others:
                return self.others[text]
        inside = next((op for op in _owners(name) if op in self.operators), "")
        return Place(group=NOT_READ, reason=INSIDE.format(inside)) if inside else Place(group=IN_FILE)

    def by_order(self, names: Iterable[str]) -> dict[str, str]:
        """Return name -> operator for generated names that are numbered over the whole model.

        They are as many as the model has calls of their function, and at least one of them is no candidate.
        """
        found: dict[str, str] = {}
        by_function: dict[str, list[str]] = {}
        for name in names:
            if match := _GENERATED.fullmatch(name):
                by_function.setdefault(match["function"], []).append(name)
        for function, given in by_function.items():
            calls = [op for op in self.operators if (m := _FUNCTION.fullmatch(op)) and m["function"] == function]
            if len(calls) == len(given) and any(name not in self.candidates for name in given):
                found |= dict(zip(sorted(given, key=lambda n: int(n.rpartition("_")[2])), calls, strict=True))
        return found


def names_of(prepared: QuantizedModel, sample: Any, given: Mapping[str, tuple[str, bool]]) -> Names:
    """Return the names of a model. `given` are the names that names.csv holds, by operator."""
    graph = prepared.graph
    ruled = {op: (name.plugin, name.sure) for op, name in plugin_names(prepared, sample).items() if name.plugin}
    known = {**ruled, **{op: pair for op, pair in given.items() if op in graph.by_name}}
    sure: dict[str, tuple[str, ...]] = {}
    candidates: dict[str, tuple[str, ...]] = {}
    for op, (name, is_sure) in known.items():
        table = sure if is_sure else candidates
        table[name] = (*table.get(name, ()), op)
    operators = tuple(node.name for node in graph.quantized)
    return Names(operators, sure, candidates, _others(graph, dict(prepared.model.named_modules())))


def names_of_operators(operators: Iterable[str]) -> Names:
    """Return the names that follow from those of the operators alone, without the model."""
    known = tuple(operators)
    found = {name: (op,) for op in known if (name := candidate(op))}
    return Names(known, candidates=found)


def _others(graph: ModelGraph, modules: Mapping[str, Any]) -> dict[str, Place]:
    owners = {node.quantizer: node.name for node in graph.quantized}
    found = {name: Place(group=NOT_READ, reason=HOST) for name, module in modules.items() if not [*module.children()]}
    for node in graph.nodes:
        if node.quantizer is None:
            found[node.name] = Place(group=NOT_READ, reason=PASSES)
        elif node.name != owners[node.quantizer]:
            found[node.name] = Place((owners[node.quantizer],))
        for part in node.fused:
            found[part] = Place(group=NOT_READ, reason=PART.format(node.name))
        for value in node.inner:
            found[value] = Place(group=NOT_READ, reason=INSIDE.format(node.name))
    return found


def match(content: Content, names: Names) -> tuple[dict[str, Entry], list[Unmatched]]:
    """Return what a file says of each operator, and what did not match."""
    found: dict[str, Entry] = {}
    unmatched: list[Unmatched] = []
    rest: dict[str, Entry] = {}
    generated = {} if content.own_names else names.by_order(content.entries)
    for name, entry in content.entries.items():
        place = names.place(name, generated, content.own_names)
        if place.group:
            shown = f"{name} = {', '.join(place.ops)}" if place.ops else name
            if place.group == IN_FILE and not content.own_names and any(covers(name, op) for op in names.operators):
                rest[name] = entry
                continue
            if place.group == IN_FILE and not name:
                rest[name] = entry
                continue
            unmatched.append(Unmatched(place.group, shown, place.reason))
        for op in place.ops:
            found.setdefault(op, entry)
    for name in sorted(rest, key=len, reverse=True):  # the innermost module first
        whole = replace(rest[name], inputs=(), scale=None)
        for op in names.operators:
            if covers(name, op) or not name:
                found.setdefault(op, whole)
    return found, unmatched


def left_out(names: Names, graph: ModelGraph | None, found: Mapping[str, Entry]) -> list[Unmatched]:
    """Return the operators that no file says anything of; constants follow what reads them."""
    kinds = {node.name: node.kind for node in graph.quantized} if graph is not None else {}
    return [
        Unmatched(IN_MODEL, op)
        for op in names.operators
        if op not in found and kinds.get(op) != OpKind.constant and not op.startswith("const[")
    ]


def not_possible(graph: ModelGraph, found: dict[str, Entry]) -> list[Unmatched]:
    """Take out of `found` what no device could run, and return it: float outputs that are read, and weights of none.

    Input dtypes are left where they differ from the output of the producer: others are no requests.
    """
    owners = {node.quantizer: node.name for node in graph.quantized}
    outputs = {op: entry.output for op, entry in found.items()}

    def asked(dtype: QDtype | None, producer: str) -> QDtype | None:
        given = {outputs.get(owners[graph.by_name[source].quantizer]) for source in graph.source(producer)}
        return None if given <= {dtype, None} else dtype

    unmatched = []
    for op, entry in list(found.items()):
        node = graph.by_name[op]
        if entry.high_precision and op not in graph.high_precision:
            unmatched.append(
                Unmatched(NOT_HAD, op, "an output that is not quantized, which only a GEMM at an output has")
            )
            entry = replace(entry, high_precision=False)
        if entry.weight is not None and node.weight is None:
            entry = replace(entry, weight=None)
        inputs = tuple(asked(dtype, producer) for dtype, producer in zip(entry.inputs, node.inputs, strict=False))
        found[op] = replace(entry, inputs=inputs if any(inputs) else ())
    return unmatched


def _owners(name: str) -> list[str]:
    """Return what is left of a name without one trailing part, two, and so on."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


def _undecorated(name: str) -> str:
    found = _DECORATED.fullmatch(name)
    return found["name"] if found else name


def _cut(name: str) -> list[str]:
    """Return a generated name without its trailing parts: `_generated_div_0.mul` means `_generated_div_0`."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.startswith("_generated_")), default=len(parts) - 1)
    return [".".join(parts[: i + 1]) for i in range(len(parts) - 2, last - 1, -1)]
