"""Which channels of a model share one factor: the groups that equalization scales.

Every channel of every tensor gets a variable. A weighted operator or the affine part of a norm makes new variables for
its output channels (a producer) and reads those of its input (a consumer): a factor on a variable is multiplied into
the rows of its producers and divided out of the columns of its consumers, and the float function stays. What lies
between is homogeneous, f(s x) = s f(x) for s > 0: ReLU, LeakyReLU, PReLU, max and average pooling, resizing, moves;
an add makes the variables of its branches equal, a concat puts them in a row. Everything else reads its input as it is
(sigmoid, softmax, ReLU6, whose bound would have to move with every channel, outputs of the model): these variables are
fixed at 1, and the first reason is kept for the table.

Operators are known by kind, type and shape. Where the shape does not tell which axis holds the channels (a transpose of
equal axes, a split), they are fixed too. Where it tells the axis but not the order along it (an index, a roll), they
are taken as in order: same_function.py proves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qflow.core.graph import WEIGHTED_KINDS, ModelGraph, OpKind, OpNode
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.weighted import WeightedLeaf
from qflow.repair.channel_rules import PASSING_KINDS, RULE_OF, Labels, moved

RELU6 = "ReLU6 bounds it, and the bound would have to move with each channel"
FIXED = 0
"""The variable whose factor is 1."""


@dataclass(frozen=True)
class Producer:
    """A module whose output channels have variables of their own."""

    path: str
    module: Any
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Consumer:
    """A weighted module and the variables of the channels that it reads, from operators `sources` (one a call)."""

    path: str
    module: WeightedLeaf
    sources: list[str]
    ids: tuple[int, ...]


class Channels:
    """The variables of a prepared model: `labels` by operator, `producers`, `consumers`, and reasons for what is fixed.

    Variables that have to be equal are found by `find`.
    """

    def __init__(self, prepared: QuantizedModel) -> None:
        self.graph: ModelGraph = prepared.graph
        self.modules = dict(prepared.model.named_modules())
        self.tied = _tied(prepared.model)
        self.parent = [FIXED]
        self.fixed: dict[int, str] = {FIXED: "it stays as it is"}
        """Variable, as `find` gives it -> why its factor is 1."""
        self.labels: dict[str, Labels | None] = {}
        self.producers: dict[str, Producer] = {}
        self.consumers: dict[str, Consumer] = {}
        for node in self.graph.nodes:
            self.labels[node.name] = self._of(node)
        for _, producer in self.graph.outputs:
            self.fix(self.labels.get(producer), "its result is an output of the model")
        for name in self.graph.state:
            self.fix(self.labels.get(name), "the model keeps its result as state")

    # ---- variables ------------------------------------------------------------------------------------------------

    def find(self, variable: int) -> int:
        """Return the variable that stands for all that are equal to this one."""
        while self.parent[variable] != variable:
            self.parent[variable] = self.parent[self.parent[variable]]
            variable = self.parent[variable]
        return variable

    def along(self, ids: Sequence[int], values: Tensor) -> Tensor:
        """The values of these variables; `values` has one for each variable, of which that of `find` counts."""
        return values[[self.find(variable) for variable in ids]]

    def fix(self, labels: Labels | None, why: str) -> None:
        """Let the factors of these channels be 1, because of `why`."""
        for variable in labels.ids if labels else ():
            self.fixed.setdefault(self.find(variable), why)

    def _equal(self, a: Sequence[int], b: Sequence[int]) -> None:
        for first, second in zip(a, b, strict=True):
            x, y = sorted((self.find(first), self.find(second)))
            if x == y:
                continue
            if x == FIXED:  # not merged, so that each keeps its own reason
                self.fixed.setdefault(y, "it meets values that stay as they are")
                continue
            self.parent[y] = x
            if y in self.fixed:
                self.fixed.setdefault(x, self.fixed[y])

    def _new(self, count: int) -> tuple[int, ...]:
        first = len(self.parent)
        self.parent += range(first, first + count)
        return tuple(range(first, first + count))

    # ---- operators ------------------------------------------------------------------------------------------------

    def _of(self, node: OpNode) -> Labels | None:
        """The labels of an operator's result; None if its channels are fixed, or unknown and so fixed."""
        inputs = [self.labels[name] for name in node.inputs]
        if node.kind in WEIGHTED_KINDS:
            return self._weighted(node, inputs)
        if node.kind in (OpKind.layer_norm, OpKind.norm):
            return self._norm(node, inputs)
        kind = node.op_type.rpartition(".")[2]
        rule = self._rule(node, kind)
        found = rule(node, inputs) if rule else None
        if found is None:
            for labels in inputs:
                self.fix(labels, RELU6 if "relu6" in kind.lower() else f"{kind} reads it")
        return found

    def _rule(self, node: OpNode, kind: str) -> Callable[[OpNode, list[Labels | None]], Labels | None] | None:
        rule, count = RULE_OF.get(kind), len(node.inputs)
        if rule == "adding":
            return self._added if count == 2 else None
        if rule == "scaling":
            return self._scaled
        if node.kind == OpKind.concat:
            return self._joined
        return self._moved if count == 1 and (rule or node.kind in PASSING_KINDS) else None

    def _weighted(self, node: OpNode, inputs: list[Labels | None]) -> Labels | None:
        module = self.modules.get(node.weight or "")
        shared = {node.weight, getattr(module, "qflow_norm_path", None)} & self.tied
        if not isinstance(module, WeightedLeaf) or shared or len(inputs) != 1 + node.fused_add:
            why = "a weight is shared by several modules" if shared else "a weight is no module's own"
            for labels in inputs:
                self.fix(labels, f"{why} ({node.weight or node.name})")
            return None
        path, axis = str(node.weight), len(node.shape) - 1 if node.kind == OpKind.linear else 1
        self._consumed(path, module, node, inputs[0])
        producer = self._produced(path, module, node.shape[axis])
        found = Labels(axis, producer.ids)
        if module.qflow_norm is None and "BN" in node.fused_types:
            self.fix(found, "its batch norm is no module")
        norm: Any = module.qflow_norm
        if norm is not None and (getattr(norm, "weight", None) is None or getattr(norm, "bias", None) is None):
            self.fix(found, "its batch norm has no weight and bias")
        if node.fused_add and (inputs[1] is None or inputs[1].axis != axis):
            for labels in (found, inputs[1]):
                self.fix(labels, "it is added to values that stay as they are")
        elif inputs[1:] and inputs[1] is not None:
            self._equal(found.ids, inputs[1].ids)
        if "ReLU6" in node.fused_types:
            self.fix(found, RELU6)
        return found

    def _consumed(self, path: str, module: WeightedLeaf, node: OpNode, read: Labels | None) -> None:
        """Let the columns of a weight have the variables of what it reads, or fix them."""
        source, count = node.inputs[0], _channels_in(module)
        axis = len(self.graph.by_name[source].shape) - 1 if node.kind == OpKind.linear else 1
        if read is None or read.axis != axis or len(read.ids) != count:
            self.fix(read, f"{type(module).__name__.removeprefix('Q')} reads it along another axis")
            read = None
        ids = read.ids if read is not None else (FIXED,) * count
        known = self.consumers.setdefault(path, Consumer(path, module, [], ids))
        known.sources.append(source)
        self._equal(known.ids, ids)  # another call of a shared module

    def _produced(self, path: str, module: Any, count: int) -> Producer:
        if path not in self.producers:
            self.producers[path] = Producer(path, module, self._new(count))
        return self.producers[path]

    def _norm(self, node: OpNode, inputs: list[Labels | None]) -> Labels | None:
        for labels in inputs:
            self.fix(labels, f"{node.op_type.rpartition('.')[2]} reads it")
        # a functional belongs to the module that calls it: if its weight is another one, the float function would move
        path = node.name.partition("(")[0].partition("[")[0]
        module: Any = self.modules.get(path)
        weight = getattr(module, "weight", None)
        axis = (
            1 if node.kind == OpKind.norm or node.op_type.endswith(("GroupNorm", "group_norm")) else len(node.shape) - 1
        )
        if not isinstance(weight, Tensor) or tuple(weight.shape) != (node.shape[axis],) or path in self.tied:
            return None
        return Labels(axis, self._produced(path, module, len(weight)).ids)

    def _added(self, node: OpNode, inputs: list[Labels | None]) -> Labels | None:
        """Branches of one shape have equal factors; any other sum leaves its branches as they are."""
        a, b = inputs
        if a is None or b is None or a.axis != b.axis:
            return None
        if any(self.graph.by_name[name].shape != node.shape for name in node.inputs):
            return None
        self._equal(a.ids, b.ids)
        return a

    def _scaled(self, node: OpNode, inputs: list[Labels | None]) -> Labels | None:
        """A product with a number, or with a tensor that stays as it is: s x y."""
        if not inputs or (node.op_type.endswith("div") and len(inputs) == 1 and node.operands[:1] != (None,)):
            return None
        if len(inputs) == 2 and node.inputs[0] == node.inputs[1]:
            return None
        elements = [self.graph.by_name[name].elements for name in node.inputs]
        first = 0 if node.op_type.endswith("div") else elements.index(max(elements))
        for i, labels in enumerate(inputs):
            if i != first:
                self.fix(labels, "it is a factor of a product")
        found = inputs[first]
        return found if found is not None and node.shape == self.graph.by_name[node.inputs[first]].shape else None

    def _joined(self, node: OpNode, inputs: list[Labels | None]) -> Labels | None:
        """A concat along the channels puts the variables in a row; along another axis, its branches have equal ones."""
        shapes = [self.graph.by_name[name].shape for name in node.inputs]
        known = next((labels for labels in inputs if labels is not None), None)
        if known is None or any(len(shape) != len(node.shape) for shape in shapes):
            return None
        axis = known.axis
        parts = [
            labels.ids if labels is not None and labels.axis == axis else (FIXED,) * shape[axis]
            for labels, shape in zip(inputs, shapes, strict=True)
        ]
        if any(labels is not None and labels.axis != axis for labels in inputs):
            return None
        if sum(map(len, parts)) == node.shape[axis]:
            return Labels(axis, tuple(variable for part in parts for variable in part))
        if all(len(part) == node.shape[axis] for part in parts):
            for part in parts[1:]:
                self._equal(parts[0], part)
            return Labels(axis, parts[0])
        return None

    def _moved(self, node: OpNode, inputs: list[Labels | None]) -> Labels | None:
        read = inputs[0]
        return None if read is None else moved(node, read, self.graph.by_name[node.inputs[0]].shape)


def _channels_in(module: Any) -> int:
    return int(module.in_features if hasattr(module, "in_features") else module.in_channels)


def _tied(model: nn.Module) -> frozenset[str]:
    """Modules whose parameters belong to several modules, or are computed at each access (parametrized)."""
    owners: dict[int, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(path)
    tied = {path for paths in owners.values() if len(paths) > 1 for path in paths}
    computed = {path for path, m in model.named_modules() if hasattr(m, "parametrizations")}
    return frozenset(tied | computed)
