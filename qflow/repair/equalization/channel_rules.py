"""What operators do to the factors of their inputs: f(s x) = s f(x) lets them pass, moves put them elsewhere.

Ids of variables (variables.py) lie in tensors like the values, so an operator that only moves values is run on the ids.
An operator without a rule reads its inputs as they are: their factors have to be 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from qflow.core.graph import OpKind
from qflow.quant.replay.captured_ops import Ops
from qflow.quant.trace.ops import MODULE_KINDS, function_name
from qflow.quant.trace.tape import Op, Ref, references, tensors_in
from qflow.repair.equalization.variables import ANY, FIXED, Variables

_RULES: Mapping[str, str] = {
    "passing": "ReLU LeakyReLU PReLU Identity Dropout Dropout1d Dropout2d Dropout3d relu leaky_relu prelu identity "
    "dropout dropout1d dropout2d dropout3d contiguous clone detach neg abs to float double half bfloat16 type type_as",
    "adding": "add sub rsub maximum minimum max min where masked_fill",
    "scaling": "mul div",
    "reducing": "mean sum amax amin",
    "clamping": "clamp clip clamp_min",
    "sampling": "grid_sample",
    "picking": "gather index_select take_along_dim",
}
RULE_OF = {name: rule for rule, names in _RULES.items() for name in names.split()}
_MOVES = frozenset({OpKind.move, OpKind.concat})
_SPATIAL = frozenset({OpKind.max_pool, OpKind.avg_pool, OpKind.resize})
_VIEWS = frozenset({"view", "view_as", "unflatten", "Unflatten"})
_JOINED = "it meets values that stay as they are"

Found = tuple[Tensor, ...] | None
"""Ids of the results of an operator; None if it reads its inputs as they are."""


class UnknownIds(Exception):
    """The ids of an argument are not known: the operator counts as one without a rule."""


class Rules:
    """Ids of the results of operators without weights, from those of their arguments."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self.variables = Variables()
        self.labels: dict[Ref, Tensor] = {}
        """Result of an operator -> ids, where one of them may have a factor; other results stay as they are."""
        self.shapes: dict[Ref, tuple[int, ...]] = {}

    def ids(self, argument: Any) -> Tensor:
        """The ids of an argument: a result, a constant tensor or a number (zero takes any factor)."""
        if isinstance(argument, Ref):
            if argument in self.labels:
                return self.labels[argument]
            op = self.ops.tape.ops[argument.op]
            shape = self.shapes.get(argument, None if argument.position else op.shape)
            if not op.floating or shape is None:
                raise UnknownIds
            return torch.full((), FIXED, dtype=torch.float64).expand(shape)
        if isinstance(argument, Tensor):
            return self.constant(argument)
        if isinstance(argument, (int, float)):
            return torch.tensor(float(FIXED if argument else ANY), dtype=torch.float64)
        raise UnknownIds

    def constant(self, tensor: Tensor) -> Tensor:
        """The ids of a constant."""
        return torch.where(tensor.detach().cpu() == 0, ANY, FIXED).double()

    def passed(self, op: Op) -> Found:
        """The ids of the results of an operator that lets factors pass."""
        rule = self._rule(op)
        try:
            return rule(op) if rule is not None else None
        except (UnknownIds, RuntimeError, IndexError, TypeError, ValueError):  # a move may not take ids for values
            return None

    def _rule(self, op: Op) -> Callable[[Op], Found] | None:
        rule = RULE_OF.get(self.name(op))
        if rule is not None:
            found: Callable[[Op], Found] = getattr(self, f"_{rule}")
            return found
        if op.kind in _SPATIAL:
            return self._spatial
        return self._moved if op.kind in _MOVES else None

    def name(self, op: Op) -> str:
        """The operator's canonical name: of a function, or of torch's own class of a module."""
        if op.call is not None and op.call.module is not None:
            classes = type(self.ops.modules[op.call.module]).__mro__
            return next((c.__name__ for c in classes if c in MODULE_KINDS), op.op_type.rpartition(".")[2])
        return op.op_type.rpartition(".")[2] if op.call is None else function_name(op.call.function)

    def arguments(self, op: Op, *names: str) -> list[Any]:
        """The positional arguments of a call, and after them those of these keywords."""
        assert op.call is not None
        return [*op.call.args, *(op.call.kwargs[name] for name in names if name in op.call.kwargs)]

    # ---- rules

    def _passing(self, op: Op) -> Found:
        return (self.ids(self.arguments(op, "input")[0]).expand(op.shape),)

    def _adding(self, op: Op) -> Found:
        """All parts of a sum have equal factors; zeros take any."""
        given, name = self.arguments(op, "input", "other", "value"), self.name(op)
        if name in ("where", "masked_fill"):
            given = [value for i, value in enumerate(given) if i != (name == "masked_fill")]
        if len(given) != 2 or (name in ("max", "min") and op.kind != OpKind.arithmetic):
            return None
        a, b = (self.ids(value) for value in given)
        self.variables.equal(a, b, _JOINED)
        either = a if a.ndim == b.ndim and not bool((a == ANY).any()) else torch.where(a == ANY, b, a)
        return (either.expand(op.shape),)

    def _scaling(self, op: Op) -> Found:
        """A product with values that stay as they are: s x y. Of two that may change, the larger one does."""
        given = self.arguments(op, "input", "other")
        if len(given) != 2 or (isinstance(given[0], Ref) and given[0] == given[1]):
            return None
        a, b = (self.ids(value) for value in given)
        first, second = (a, b) if self.variables.free(a) else (b, a)
        if self.name(op) == "div" and (first is b or len(op.operands) > 2):  # a divisor, or a result that is rounded
            return None
        if self.variables.free(second) and second.numel() > first.numel() and self.name(op) != "div":
            first, second = second, first
        self.variables.fix(second, "it is a factor of a product")
        return (first.expand(op.shape),)

    def _reducing(self, op: Op) -> Found:
        assert op.call is not None
        given = self.arguments(op, "input")
        x, named = self.ids(given[0]), op.call.kwargs
        axes = named.get("dim", named.get("axis", given[1] if len(given) > 1 else None))
        axes = list(range(x.ndim)) if axes is None or axes == () else [axes] if isinstance(axes, int) else list(axes)
        one = self.variables.unify(x, axes, f"{self.name(op)} reads it beside values that stay as they are")
        return (one.reshape(op.shape),)

    def _clamping(self, op: Op) -> Found:
        """Only a clamp at 0 from below, which is a ReLU."""
        low = op.operands[1:2] == (0.0,) and len(op.inputs) == 1
        return self._passing(op) if low and all(bound is None for bound in op.operands[2:]) else None

    def _spatial(self, op: Op) -> Found:
        """Pooling and resizing: each channel by itself, and all positions of a channel have one factor."""
        x, name = self.ids(self.arguments(op, "input")[0]), self.name(op)
        axes = range(x.ndim - int(name[-2]), x.ndim) if name[-2:] in ("1d", "2d", "3d") else range(2, x.ndim)
        return (self.variables.unify(x, list(axes), f"{name} reads it").expand(op.shape),)

    def _sampling(self, op: Op) -> Found:
        given = self.arguments(op, "input", "grid")
        self.variables.fix(self.ids(given[1]), "it is the grid of a grid_sample")
        x = self.ids(given[0])
        return (self.variables.unify(x, list(range(2, x.ndim)), "grid_sample reads it").expand(op.shape),)

    def _picking(self, op: Op) -> Found:
        """Values along one axis, by an index that the data may give: that axis has one factor."""
        assert op.call is not None
        given = self.arguments(op, "input", "dim", "index")
        x, axis = self.ids(given[0]), next(v for v in given[1:] if isinstance(v, int))
        return (self.variables.unify(x, [axis], f"{self.name(op)} reads it").expand(op.shape),)

    def _moved(self, op: Op) -> Found:
        """Run the operator on the ids."""
        assert op.call is not None
        border = op.call.kwargs.get("value", op.call.args[3] if len(op.call.args) > 3 else None)
        if self.name(op) == "pad" and border:
            return None
        args, kwargs = tree_map(self._moving, (op.call.args, op.call.kwargs))
        if self.name(op) in _VIEWS:
            args = (args[0].contiguous(), *args[1:])  # as the values are: repeated ids share their memory
        return tuple(t if t.dtype == torch.float64 else t.double() for t in self.ops.run(op, args, kwargs))

    def _moving(self, argument: Any) -> Any:
        if isinstance(argument, Ref):
            return self.ids(argument)
        if not isinstance(argument, Tensor):
            return argument
        return self.constant(argument) if argument.is_floating_point() else argument.cpu()


def read_by(op: Op) -> list[Ref]:
    """The results that an operator reads."""
    return [] if op.call is None else references((op.call.args, op.call.kwargs))


def constants_of(op: Op) -> list[Tensor]:
    """The floating constants among an operator's arguments."""
    found = [] if op.call is None else tensors_in((op.call.args, op.call.kwargs))
    return [tensor for tensor in found if tensor.is_floating_point()]
