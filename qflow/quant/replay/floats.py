"""The float values of a captured batch that a replay reads: those that were kept, and others computed from them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qflow.quant.replay.capture import Captured
from qflow.quant.replay.captured_ops import Ops, Values
from qflow.quant.trace.tape import Ref


class Floats:
    """Float values by op: those that the capture kept; others are computed from their inputs on request."""

    def __init__(self, ops: Ops, captured: Captured, run: Callable[..., Values] | None = None) -> None:
        self.ops, self.run = ops, run or ops.float_run
        self.by_index = {op.index: op for op in ops.ops}
        self.given = captured.inputs
        self.kept = {i: v for i, v in captured.values.items() if i not in ops.raw} if captured.complete else {}
        self.ends: dict[int, Values] = {}
        """Values of the model's outputs: they are small, and each variant that does not change them reads them."""
        self.complete = captured.complete
        self.position = -1

    def get(self, index: int) -> Values:
        """The op's tensors."""
        found = self._there(index)
        if found is not None:
            return found
        values = self._compute(index)
        if self.complete:
            self.kept[index] = values
        elif any(ref.op == index for _, ref in self.ops.outputs):
            self.ends[index] = values
        return values

    def _there(self, index: int) -> Values | None:
        if index in self.given:
            return (self.given[index],)
        return self.kept.get(index) or self.ends.get(index)

    def _compute(self, index: int) -> Values:
        """Run all ops that this value depends on, in order; a value is dropped after its last reader among them."""
        wanted, stack = {index}, [index]
        while stack:
            for i in self.ops.reads[stack.pop()]:
                if i not in wanted and self._there(i) is None:
                    wanted.add(i)
                    stack.append(i)
        last = {i: max((j for j in wanted if i in self.ops.reads[j]), default=i) for i in wanted}
        found: dict[int, Values] = {}
        for i in sorted(wanted):
            found[i] = self._run(i, found)
            for j in self.ops.reads[i]:
                if last.get(j) == i:
                    del found[j]
        return found[index]

    def _run(self, index: int, found: dict[int, Values]) -> Values:
        def value(ref: Ref) -> Tensor:
            return (found[ref.op] if ref.op in found else self.get(ref.op))[ref.position]

        op = self.by_index[index]
        assert op.call is not None
        args, kwargs = self.ops.arguments((op.call.args, op.call.kwargs), value)
        return self.run(op, args, kwargs)

    def advance(self, position: int) -> None:
        """Hold the values before `position` that later ops read; does nothing if the capture kept all values."""
        if self.complete:
            return
        for op in self.ops.ops:
            if self.position < op.index < position and op.index not in self.given:
                self.kept[op.index] = self._run(op.index, {})
                for i in (op.index, *self.ops.reads[op.index]):
                    if self.ops.last_use[i] <= op.index:
                        self.kept.pop(i, None)
        self.kept = {i: v for i, v in self.kept.items() if self.ops.last_use[i] >= position}
        self.position = max(self.position, position - 1)
