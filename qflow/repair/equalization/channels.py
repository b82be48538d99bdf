"""Which channels of a model share one factor: the groups that equalization scales.

A weighted operator or the affine part of a norm makes new variables for its output channels (a producer) and reads
those of its input (a consumer): a factor on a variable is multiplied into the rows of its producers and divided out of
the columns of its consumers, and the float function stays. The model runs once on one sample, and each operator takes
the ids of its arguments to those of its results (channel_rules.py), so it is known of every value which channels it
holds, wherever moves have put them. A product of two activations that is summed over channels, as query and key of an
attention, takes the inverse factors on its other side (a pair). What reads values as they are fixes their variables at
1, and the first reason is kept for the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qflow.core.graph import WEIGHTED_KINDS, OpKind
from qflow.quant.model.leaf import own_classes
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.weighted import WeightedLeaf
from qflow.quant.replay.capture import capture
from qflow.quant.replay.captured_ops import Ops
from qflow.quant.trace.tape import Op, Ref
from qflow.repair.equalization.channel_rules import Found, Rules, UnknownIds, read_by
from qflow.repair.equalization.channel_weights import Consumer, Matrix, Pair, Producer, Read, Source, Vectors
from qflow.repair.equalization.held_parameters import HeldParameters, tied
from qflow.repair.equalization.products import Letters, letters_of, placed
from qflow.repair.equalization.variables import FIXED, thin

_RELU6 = "ReLU6 bounds it, and the bound would have to move with each channel"
_NORM_ARGUMENTS = {"layer_norm": (2, 3), "rms_norm": (2, 9), "group_norm": (2, 3), "batch_norm": (3, 4)}
_NORM_ARGUMENTS |= {"instance_norm": (3, 4)}


class Channels(Rules):
    """The variables of a prepared model: its `producers` and `consumers` by name, and its `pairs`.

    `inputs` are those of one sample. Raises ReplayError for a model whose operators cannot be followed on it.
    """

    def __init__(self, prepared: QuantizedModel, inputs: Any) -> None:
        with own_classes(prepared.model):
            captured = capture(prepared.model, prepared.plan, inputs, 0.0)
        super().__init__(Ops(prepared.model, prepared, captured))
        self.plan = prepared.plan
        self.held = HeldParameters(prepared.model, self.ops.ops)
        self.tied = tied(prepared.model)
        self.producers: dict[Any, Producer] = {}
        self.consumers: dict[Any, Consumer] = {}
        self.pairs: list[Pair] = []
        self.results: dict[str, int] = {}
        """Operator -> the number of its results, where they have ids."""
        self.sources: dict[int, tuple[Source, ...]] = {}
        """Operator -> tensors with a scale whose noise is in its result, in the channels of that result."""
        for op in self.ops.ops:
            self._follow(op)
        for _, ref in captured.outputs:
            self._fix(ref, "its result is an output of the model")
        for index in captured.tape.read_by_python:
            self._fix(Ref(index, 0), "a Python value is taken from it")

    def factors(self, ids: Tensor, values: Tensor) -> Tensor:
        """The factor of each id; `values` has one for each variable, of which that of the root counts."""
        signed = self.variables.of(ids)
        found = values[signed.abs()]
        return torch.where(signed < 0, 1 / found, found)

    # ---- following operators

    def _follow(self, op: Op) -> None:
        read = read_by(op)
        found = self._of(op) if op.floating else None
        if found is None:
            name = self.name(op)
            for ref in read:
                self._fix(ref, _RELU6 if "relu6" in name.lower() else f"{name} reads it")
        own = tuple(source for ref in read for source in self.sources.get(ref.op, ()))
        if op.kind in WEIGHTED_KINDS or self._normalizes(op):
            own = ()
        self.results[op.name] = len(found or ())
        for position, ids in enumerate(found or ()):
            self.shapes[Ref(op.index, position)] = tuple(ids.shape)
            if self.variables.free(ids):
                ref = Ref(op.index, position)
                self.labels[ref] = ids
                if op.name in self.plan.output_at and position == 0:
                    own = (*own, Source(self._read(ref, ids, _varying(ids)), _along(ids, _varying(ids))))
        if own and found:
            self.sources[op.index] = tuple(dict.fromkeys(own))

    def _of(self, op: Op) -> Found:
        if op.kind in WEIGHTED_KINDS:
            return self._weighted(op)
        if self._normalizes(op):
            return self._norm(op)
        if op.owner in self.ops.folded:  # the producer before it scales it
            return self._passing(op)
        return self._matmul(op) if op.kind == OpKind.matmul else self.passed(op)

    def _normalizes(self, op: Op) -> bool:
        return op.kind in (OpKind.layer_norm, OpKind.norm) and op.owner not in self.ops.folded

    def constant(self, tensor: Tensor) -> Tensor:
        """The ids of a constant; a parameter that is a vector has variables of its own."""
        name = self.held.name(tensor)
        if name is None or tensor.numel() < 2 or max(tensor.shape) != tensor.numel() or not self.held.own(tensor):
            return super().constant(tensor)
        return self._produced(self.held.key(tensor), name, tensor.numel(), Vectors((tensor,))).view(tensor.shape)

    def _fix(self, argument: Any, why: str) -> None:
        if isinstance(argument, Ref) and argument in self.labels:
            self.variables.fix(self.labels[argument], why)

    def _read(self, ref: Ref, ids: Tensor, axes: Sequence[int]) -> Read:
        sizes = tuple(ids.shape[axis] for axis in axes)
        return Read(self.ops.tape.ops[ref.op].name, ref.position, tuple(axes), sizes, ids.ndim)

    # ---- producers and consumers

    def _weighted(self, op: Op) -> Found:
        argument = self.arguments(op, "input")[0]
        holds, why = self._matrix(op)
        if holds is None:
            for ref in read_by(op):
                self._fix(ref, why)
            return None
        axis = len(op.shape) - (holds.weight.ndim - 1)
        key = op.module or self.held.key(holds.weight)
        path = str(op.module or (op.weight.name if op.weight else op.name))
        self._consumed(key, path, holds, argument, axis)
        rows: Matrix | Vectors = holds
        norm: Any = holds.leaf.qflow_norm if holds.leaf is not None else None
        if norm is not None:
            rows = Vectors((norm.weight, norm.bias))
        ids = self._produced(key, path, op.shape[axis], rows)
        if why:
            self.variables.fix(ids, why)
        return (ids.view(-1, *[1] * (len(op.shape) - axis - 1)).expand(op.shape),)

    def _matrix(self, op: Op) -> tuple[Matrix | None, str]:
        """The weight of an operator, and why its rows (or, without a weight, also its columns) stay as they are."""
        groups, transposed = op.attrs.get("groups", 1), op.kind == OpKind.conv_transpose
        if op.module is not None:
            leaf: Any = self.ops.leaves[op.module]
            norm = getattr(leaf, "qflow_norm", None)
            if {op.module, getattr(leaf, "qflow_norm_path", None)} & self.tied:
                return None, f"a weight is shared by several modules ({op.module})"
            if not isinstance(leaf, WeightedLeaf):
                return None, f"a weight is no module's own ({op.module})"
            bare = norm is not None and (getattr(norm, "weight", None) is None or getattr(norm, "bias", None) is None)
            why = "its batch norm has no weight and bias" if bare else ""
            return Matrix(leaf.weight, leaf.bias, groups, transposed, leaf), why
        given = self.arguments(op)
        assert op.call is not None
        weight = op.call.kwargs.get("weight", given[1] if len(given) > 1 else None)
        bias = op.call.kwargs.get("bias", given[2] if len(given) > 2 else None)
        if not isinstance(weight, Tensor):
            return None, f"it is a weight that is computed ({op.name})"
        if not self.held.own(weight):
            return None, f"a weight is no module's own ({op.weight.name if op.weight else op.name})"
        free = bias is None or (isinstance(bias, Tensor) and self.held.own(bias))
        return Matrix(weight, bias if free else None, groups, transposed), "" if free else "its bias is no parameter"

    def _consumed(self, key: Any, path: str, holds: Matrix, argument: Any, axis: int) -> None:
        """Let the columns of a weight have the variables of what it reads; positions of a channel have one factor."""
        try:
            x = self.ids(argument)
        except UnknownIds:
            x = torch.full((holds.columns,), FIXED).double().view(-1, *[1] * (holds.weight.ndim - 2))
            axis = 0
        others = [i for i in range(x.ndim) if i != axis]
        ids = self.variables.unify(x, others, f"{path} reads it beside values that stay as they are").flatten()
        ids = torch.where(ids == 0, FIXED, ids)
        known = self.consumers.setdefault(key, Consumer(path, holds, ids, [], []))
        self.variables.equal(known.ids, ids, f"{path} reads it beside values that stay as they are")
        if isinstance(argument, Ref):
            known.reads.append(self._read(argument, x, [axis]))
            known.sources += [s for s in self.sources.get(argument.op, ()) if s not in known.sources]

    def _produced(self, key: Any, path: str, count: int, holds: Matrix | Vectors) -> Tensor:
        if key not in self.producers:
            self.producers[key] = Producer(path, self.variables.new(count), holds)
        return self.producers[key].ids

    def _norm(self, op: Op) -> Found:
        name, given = self.name(op), self.arguments(op)
        for ref in read_by(op):
            self._fix(ref, f"{name} reads it")
        assert op.call is not None
        if op.module is not None:
            module: Any = self.ops.leaves[op.module]
            vectors = [getattr(module, "weight", None), getattr(module, "bias", None)]
            own = op.module not in self.tied
        else:
            places = zip(("weight", "bias"), _NORM_ARGUMENTS.get(name, (9, 9)), strict=True)
            vectors = [op.call.kwargs.get(key, given[i] if len(given) > i else None) for key, i in places]
            own = all(v is None or (isinstance(v, Tensor) and self.held.own(v)) for v in vectors)
        axis = len(op.shape) - 1 if name.lower().removesuffix("norm").rstrip("_") in ("layer", "rms") else 1
        tensors = tuple(v for v in vectors if isinstance(v, Tensor))
        if vectors[0] is None or not own or any(tuple(v.shape) != (op.shape[axis],) for v in tensors):
            return None
        path = op.module or str(self.held.name(tensors[0])).rpartition(".")[0] or op.name
        ids = self._produced(op.module or self.held.key(tensors[0]), path, op.shape[axis], Vectors(tensors))
        return (ids.view(-1, *[1] * (len(op.shape) - axis - 1)).expand(op.shape),)

    # ---- products of two activations

    def _matmul(self, op: Op) -> Found:
        """One side stays as it is and the other passes, with one factor along what is summed; or both are a pair."""
        given = self.arguments(op, "input", "other", "mat2")
        sides = [v for v in given if isinstance(v, (Ref, Tensor))]
        try:
            both = [self.ids(side) for side in sides]
        except UnknownIds:
            return None
        letters = letters_of(self.name(op), given, [ids.ndim for ids in both])
        if letters is None:
            return None
        free, summed = [self.variables.free(ids) for ids in both], [letters.left.index(x) for x in letters.summed]
        if all(free) and not set(summed).isdisjoint(_varying(both[0])):
            self._paired(op, sides, both, letters)
            return (torch.full((), FIXED, dtype=torch.float64).expand(op.shape),)
        kept = int(free[1])
        own, ids = (letters.left, letters.right)[kept], both[kept]
        self.variables.fix(both[1 - kept], "it is multiplied by values that have factors of their own")
        axes = [i for i, x in enumerate(own) if x not in letters.out]
        ids = self.variables.unify(ids, axes, f"{self.name(op)} reads it")
        return (placed(ids, own, letters.out).expand(op.shape),)

    def _paired(self, op: Op, sides: Sequence[Any], both: Sequence[Tensor], letters: Letters) -> None:
        """The left side takes a factor for each summed channel, the right side its inverse."""
        owns, why = (letters.left, letters.right), f"{self.name(op)} reads it beside values that stay as they are"
        shared = "".join(x for x in letters.left if x in letters.right)
        ones = [
            placed(self.variables.unify(ids, [i for i, x in enumerate(own) if x not in shared], why), own, shared)
            for ids, own in zip(both, owns, strict=True)
        ]
        self.variables.equal(ones[0], -ones[1], why)
        shape = torch.broadcast_shapes(*(ids.shape for ids in ones))  # type: ignore[no-untyped-call]
        whole = [ids.expand(shape) for ids in ones]
        axes = [x for i, x in enumerate(shared) if any(i in _varying(ids) for ids in whole) and x not in letters.summed]
        order = "".join(axes) + letters.summed
        reads, sources = [], []
        for side, ids, own in zip(sides, both, owns, strict=True):
            reads.append(self._read(side, ids, [own.index(x) for x in order]))
            sources.append(self.sources.get(side.op, ()))
        self.pairs.append(
            Pair(op.name, placed(whole[0], shared, order), (reads[0], reads[1]), (sources[0], sources[1]))
        )


def _varying(ids: Tensor) -> list[int]:
    """The axes along which there are several ids."""
    few = thin(ids)
    return [i for i, size in enumerate(few.shape) if size > 1 and not bool((few == few.narrow(i, 0, 1)).all())]


def _along(ids: Tensor, axes: Sequence[int]) -> Tensor:
    """The ids along `axes`, taken at the first position of all others."""
    for axis in reversed([i for i in range(ids.ndim) if i not in axes]):
        ids = ids.select(axis, 0)
    return ids
