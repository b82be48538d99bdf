"""Setters: ordered rules that decide the precision of each operator. The first rule that answers wins.

The plugin's order (most specific first, template last) and its words are kept. One difference is on purpose:
the int16 ratio counts operators that can be promoted, not table rows, so ratio 1.0 is exactly all-int16 and
no quota is spent on weight rows or on operators that the device would put back to int8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph, OpNode
from qflow.core.qconfig import OpQConfig, QConfig


class Setter(Protocol):
    """Answers for one operator, or leaves it to the next setter."""

    def __call__(self, node: OpNode, graph: ModelGraph) -> OpQConfig | None:
        """The operator's qconfig, or None."""
        ...


@dataclass(frozen=True)
class ModuleNameSetter:
    """Explicit operator or module names -> output dtype: `qint16`, with the weight's `qint8/qint16`, or with a
    fixed scale `qint8@0.05`.

    A name that is a prefix (`backbone.stem`) configures the whole subtree, as the plugin's setter does.
    """

    dtypes: Mapping[str, str]

    def __call__(self, node: OpNode, graph: ModelGraph) -> OpQConfig | None:
        for name, value in self.dtypes.items():
            if _covers(name, node.name):
                output, _, weight = value.partition("/")
                output, _, scale = output.partition("@")
                return OpQConfig(
                    output=_dtype(output, name),
                    fixed_scale=_scale(scale, name) if scale else None,
                    weight=(_dtype(weight, name) if weight else QDtype.qint8) if node.weight else None,
                    rule=f"module name {name}",
                )
        return None

    def check(self, graph: ModelGraph) -> None:
        """Refuse a name that no operator answers to: a setting that silently does nothing is the usual trap."""
        for name in self.dtypes:
            if not any(_covers(name, node.name) for node in graph.quantized):
                close = [n.name for n in graph.quantized if name.split(".")[-1] in n.name][:3]
                raise ConfigError(
                    f"A module name must be an operator with a quantizer, or a module of the model, but got {name}. "
                    f"Use one of the names in the model check"
                    + (f", for example {', '.join(close)}." if close else ".")
                )


def _covers(name: str, op_name: str) -> bool:
    """True where the setter key `name` covers the operator `op_name`."""
    return op_name == name or op_name.startswith((f"{name}.", f"{name}[", f"{name}("))


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
        # A ratio computed as k/n must give back k: take off the rounding error before rounding up.
        count = math.ceil(round(self.ratio * len(self.candidates), 9))
        return tuple(ranked[:count])

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
class TemplateSetter:
    """Every operator gets `dtype` activations and int8 weights: the all-int8 and all-int16 templates."""

    dtype: QDtype

    def __call__(self, node: OpNode, graph: ModelGraph) -> OpQConfig | None:
        return OpQConfig(
            output=self.dtype, weight=QDtype.qint8 if node.weight else None, rule=f"template all-{self.dtype.value[1:]}"
        )


def resolve(graph: ModelGraph, setters: Sequence[Setter], march: str) -> QConfig:
    """Ask the setters in order for every operator that owns a quantizer.

    Raises ConfigError if no setter answers for an operator: end the list with a TemplateSetter.
    """
    ops: dict[str, OpQConfig] = {}
    for setter in setters:
        if isinstance(setter, ModuleNameSetter):
            setter.check(graph)
    for node in graph.quantized:
        answer = next((a for s in setters if (a := s(node, graph)) is not None), None)
        if answer is None:
            raise ConfigError(f"Every operator needs a qconfig, but no setter answers for {node.name}. Add a template.")
        ops[node.name] = answer
    return QConfig(march=march, ops=ops)


def _dtype(text: str, name: str) -> QDtype:
    try:
        return QDtype(text)
    except ValueError:
        known = ", ".join(d.value for d in QDtype)
        raise ConfigError(f"A dtype is one of {known}, but got {text!r} for {name}.") from None


def _scale(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise ConfigError(f"A fixed scale is a number above 0, but got {text!r} for {name}. Write qint8@0.05.")
    return value
