"""Setters: rules that decide the precision of an operator (resolve.py asks them in order; the first that answers wins).

The plugin's order (most specific first, template last) and its words are kept. One difference is on purpose:
the int16 ratio counts operators that can be promoted, not table rows, so ratio 1.0 is exactly all-int16 and
no quota is spent on weight rows or on operators that the device would put back to int8.

A rule may answer in part (an `Overlay`: only the observer, only the weight); the next rules answer what it leaves open,
and the part is laid over their answer.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.core.op_spec import parse_op
from qflow.core.qconfig import OpQConfig, QConfig


@dataclass(frozen=True)
class Overlay:
    """Fields of an operator's qconfig that a rule decides without deciding its output dtype."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    rule: str = ""

    def over(self, op: OpQConfig) -> OpQConfig:
        """`op` with the changes, but for those that it cannot take: a weight dtype without a weight, kl at int16."""
        changes = dict(self.changes)
        if op.weight is None:
            changes.pop("weight", None)
        if changes.get("observer") == "kl" and op.output == QDtype.qint16:
            del changes["observer"]
        if "fixed_scale" in changes or "known_range" in changes:
            changes = {"fixed_scale": None, "known_range": None, **changes}
        return replace(op, **changes, rule=f"{op.rule}; {self.rule}")


Answer = OpQConfig | Overlay | None


class Setter(Protocol):
    """Answers for one operator, or leaves it to the next setter. A `check(graph)`, where it exists, is asked first."""

    def __call__(self, node: OpNode, graph: ModelGraph) -> Answer:
        """The operator's qconfig, a part of it, or None."""
        ...


def first_answer(answers: Iterable[Answer]) -> Answer:
    """The first whole answer, with the partial answers before it laid over it, the earliest on top.

    Without a whole answer it is the partial ones together; None if no setter answered.
    """
    parts: list[Overlay] = []
    for answer in answers:
        if isinstance(answer, OpQConfig):
            for part in reversed(parts):
                answer = part.over(answer)
            return answer
        if answer is not None:
            parts.append(answer)
    merged = {key: value for part in reversed(parts) for key, value in part.changes.items()}
    return Overlay(merged, "; ".join(part.rule for part in parts)) if parts else None


@dataclass(frozen=True)
class ModuleNameSetter:
    """Explicit operator or module names -> what to set, in any form of op_spec.py: `qint16`, `qint8/qint16`,
    `qint8@0.05`, `qint16@0..200`, a mapping, or an OpQConfig.

    The name of a module (`backbone.stem`) sets the whole subtree, as with the plugin's setter. The name of a module
    that only holds constants (`word`, an embedding) sets these: `const[word.weight]`. If two names cover an operator,
    the first one wins.
    """

    dtypes: Mapping[str, str | Mapping[str, Any] | OpQConfig]

    @cached_property
    def fields(self) -> dict[str, dict[str, Any]]:
        """Parsed settings by name. Raises ConfigError."""
        return {name: parse_op(value, f"qconfig[{name}]") for name, value in self.dtypes.items()}

    def __call__(self, node: OpNode, graph: ModelGraph) -> Answer:
        named = ((name, f) for name, f in self.fields.items() if stands_for(name, node.name, graph))
        return first_answer(self._one(name, f, node) for name, f in named)

    def _one(self, name: str, fields: Mapping[str, Any], node: OpNode) -> Answer:
        rule, own = f"module name {name}", "observer" in fields
        if "output" not in fields:
            return Overlay({**fields, "own_observer": True} if own else fields, f"{rule}: {', '.join(fields)}")
        weight = (fields.get("weight") or QDtype.qint8) if node.weight else None
        return OpQConfig(**{**fields, "weight": weight}, own_observer=own, rule=rule)

    def check(self, graph: ModelGraph) -> None:
        """Refuse a name that covers no operator: such a setting would silently do nothing. Raises ConfigError."""
        for name, value in self.dtypes.items():
            covered = [node for node in graph.quantized if stands_for(name, node.name, graph)]
            if not covered:
                raise ConfigError(
                    f"A module name must be an operator with a quantizer, or a module of the model, but got {name}. "
                    f"{way_out(name, graph)}"
                )
            weight = self.fields[name].get("weight")
            if weight and not isinstance(value, OpQConfig) and not any(node.weight for node in covered):
                raise ConfigError(
                    f"A weight dtype is for an operator with a weight, but got {weight} for {name} "
                    f"({covered[0].kind}). Remove it."
                )


def covers(name: str, op_name: str) -> bool:
    """Whether the name `name` in a setting stands for the operator `op_name`.

    A module's name stands for all its calls (`conv(1)`), which share one quantizer (unless they are split, see
    `stands_for`). Each call of a functional has its own name and quantizer.
    """
    if name.endswith("]"):
        return op_name == name
    return op_name == name or op_name.startswith((f"{name}.", f"{name}[", f"{name}("))


def holds(name: str, op_name: str) -> bool:
    """Whether `op_name` is the constant `name` (`pos`, `word.weight`) or one of the module `name` (`word`)."""
    return op_name == f"const[{name}]" or op_name.startswith(f"const[{name}.")


def stands_for(name: str, op_name: str, graph: ModelGraph) -> bool:
    """Whether `name` in a setting sets the operator `op_name`: it covers it, or holds it and covers no operator.

    A module that has operators too leaves its constants to follow what reads them. If each call of a module has a
    quantizer (split_shared), the name of a call stands for it alone. A value inside a norm or softmax
    (`norm3.var_mean.pre_mean`) stands for the whole operator, as in the plugin.
    """
    if op_name.startswith(f"{name}(") and graph.by_name[op_name].quantizer == op_name:
        return False
    return (
        covers(name, op_name)
        or graph.by_name[op_name].contains(name)
        or (holds(name, op_name) and not any(covers(name, node.name) for node in graph.quantized))
    )


def way_out(name: str, graph: ModelGraph) -> str:
    """The way out for an error about `name`, which is no operator with a quantizer: what to write instead."""
    for node in graph.nodes:
        if name in node.fused:
            return f"It is fused into {node.name}: name that one."
        if node.name == name:
            owner = next((n.name for n in graph.quantized if n.quantizer == node.quantizer), None)
            if owner or not graph.sources(name):
                return f"It shares the quantizer of {owner}." if owner else "It keeps the precision of what it reads."
            return f"It keeps the precision of what it reads: name {', '.join(graph.sources(name))}."
    names = [n.name for n in graph.quantized]
    close = [n for n in names if name.split(".")[-1] in n][:3] or difflib.get_close_matches(name, names, 3)
    return "Use one of the names in the model check" + (f", for example {', '.join(close)}." if close else ".")


@dataclass(frozen=True)
class HighPrecisionOutput:
    """A GEMM that leaves the model and feeds nothing else gets no output quantizer."""

    def __call__(self, node: OpNode, graph: ModelGraph) -> OpQConfig | None:
        if node.name not in graph.high_precision:
            return None
        return OpQConfig(output=None, weight=QDtype.qint8 if node.weight else None, rule="high-precision output")


@dataclass(frozen=True)
class SensitiveSetter:
    """The most sensitive share of `candidates` gets `dtype`, rounded up, ties by graph order.

    `scores` are activation sensitivities by operator name, larger is more sensitive; candidates without a
    score come last, in graph order. Raises ConfigError for a ratio outside 0..1.
    """

    scores: Mapping[str, float]
    candidates: Sequence[str]
    ratio: float
    dtype: QDtype = QDtype.qint16

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0:
            raise ConfigError(f"An int16 ratio lies between 0 and 1, but got {self.ratio:g}. 0.2 promotes one in five.")

    @cached_property
    def chosen(self) -> tuple[str, ...]:
        """Promoted operators, most sensitive first."""
        ranked = sorted(self.candidates, key=lambda name: -self.scores.get(name, -math.inf))  # stable: graph order
        return tuple(ranked[: share_of(self.ratio, len(self.candidates))])

    def __call__(self, node: OpNode, graph: ModelGraph) -> OpQConfig | None:
        chosen = self.chosen
        if node.name not in chosen:
            return None
        rank = chosen.index(node.name) + 1
        return OpQConfig(
            output=self.dtype,
            weight=QDtype.qint8 if node.weight else None,
            rule=f"sensitive {self.ratio:.3g}: rank {rank} of {len(self.candidates)}",
        )


@dataclass(frozen=True)
class ChosenSetter:
    """The `chosen` operators get `dtype`; `why` names each one's reason, by its place from 1."""

    chosen: Sequence[str]
    dtype: QDtype
    why: str

    def __call__(self, node: OpNode, graph: ModelGraph) -> OpQConfig | None:
        if node.name not in self.chosen:
            return None
        place = self.chosen.index(node.name) + 1
        weight = QDtype.qint8 if node.weight else None
        return OpQConfig(output=self.dtype, weight=weight, rule=f"{self.why}: {place} of {len(self.chosen)}")


@dataclass(frozen=True)
class WeightSetter:
    """The weights of the `chosen` operators get int16; other setters decide their outputs."""

    chosen: Sequence[str]

    def __call__(self, node: OpNode, graph: ModelGraph) -> Overlay | None:
        return Overlay({"weight": QDtype.qint16}, "assigned int16 weight") if node.name in self.chosen else None


@dataclass(frozen=True)
class ObserverSetter:
    """Calibration methods of single operators, which hold while the operator is int8; other setters decide its dtypes.

    It comes after the setters whose own observers shall stand, and before those that answer for every operator.
    """

    methods: Mapping[str, str]

    @classmethod
    def of(cls, qconfig: QConfig) -> ObserverSetter:
        """The methods of the int8 operators of `qconfig`, as a repair has chosen them, for another mix."""
        ops = qconfig.ops.items()
        return cls({name: op.observer for name, op in ops if op.observer and op.output == QDtype.qint8})

    def __call__(self, node: OpNode, graph: ModelGraph) -> Overlay | None:
        method = self.methods.get(node.name)
        return Overlay({"observer": method}, f"observer {method}") if method else None


def share_of(ratio: float, total: int) -> int:
    """How many of `total` a ratio takes, rounded up; a ratio computed as k/n gives back k."""
    return math.ceil(round(ratio * total, 9))


def ratio_candidates(graph: ModelGraph, all_int16: QConfig) -> tuple[str, ...]:
    """The operators that an int16 ratio counts: those that keep int16 on the device, except constants.

    Constants take the dtype of their readers.
    """
    wide = all_int16.names(QDtype.qint16)
    return tuple(name for name in wide if graph.by_name[name].kind != OpKind.constant)


@dataclass(frozen=True)
class TemplateSetter:
    """Every operator gets `dtype` activations and int8 weights: the all-int8 and all-int16 templates."""

    dtype: QDtype

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", QDtype.parse(self.dtype, "TemplateSetter's dtype"))

    def __call__(self, node: OpNode, graph: ModelGraph) -> OpQConfig | None:
        return OpQConfig(
            output=self.dtype, weight=QDtype.qint8 if node.weight else None, rule=f"template all-{self.dtype.value[1:]}"
        )
