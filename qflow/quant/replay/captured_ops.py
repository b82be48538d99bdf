"""The captured operators that a replay runs: which op reads which, where quantizers act, and the float values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qflow.core.graph import OpKind
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.weighted import WeightedLeaf
from qflow.quant.replay.capture import Captured, ReplayError
from qflow.quant.trace.calling import all_tensors
from qflow.quant.trace.compounds import written_out
from qflow.quant.trace.ops import function_name
from qflow.quant.trace.order import ORDER_CHANGING, in_order, indices_of
from qflow.quant.trace.tape import Op, Ref, references, tensors_in
from qflow.quant.values.fake_quant import FakeQuant

Values = tuple[Tensor, ...]
Weights = dict[str, tuple[Tensor, Tensor | None]]
"""Path of a weighted module -> weight and bias to run it with, its batch norm folded in."""
_CONTAINERS = (tuple, list, dict)


@dataclass(frozen=True)
class Variant:
    """One quantizer that is on: `name` is the name of an output quantizer (`weight` False) or of a weight quantizer."""

    name: str
    weight: bool
    quantizer: FakeQuant


@dataclass(frozen=True)
class Patch:
    """Where a quantizer acts: on an op's result, on an argument (`slot`), after a step inside it, or as its weight.

    `at` is the op whose result changes: for a weight with a folded batch norm, the batch norm after op `op`.
    """

    op: int
    at: int
    kind: str
    slot: int = -1
    step: str = ""


class Ops:
    """The ops that an output depends on: which op reads which, where quantizers act, and how an op is run."""

    def __init__(self, model: nn.Module, prepared: QuantizedModel, captured: Captured) -> None:
        tape, plan = captured.tape, prepared.plan
        self.modules = dict(model.named_modules())
        self.leaves: dict[str, Any] = dict(prepared.model.named_modules())
        self.tape, self.outputs = tape, captured.outputs
        self.reads = {op.index: _reads(op) for op in tape.ops}
        live = _live(self.reads, [ref.op for _, ref in captured.outputs])
        self.ops = [op for op in tape.ops if op.index in live and (op.call is not None or op.kind == OpKind.input)]
        self.last_use = {i: i for i in live}
        for op in self.ops:
            self.last_use.update(dict.fromkeys(self.reads[op.index], op.index))
        for _, ref in captured.outputs:
            self.last_use[ref.op] = len(tape.ops)
        self.last_read = {
            op.index: [i for i in self.reads[op.index] if self.last_use[i] == op.index] for op in self.ops
        }
        """Op -> those that no later op reads."""
        functions = [(op.index, op.call.function) for op in self.ops if op.call is not None]
        self.ordering = {i for i, f in functions if f is not None and function_name(f) in ORDER_CHANGING}
        self.patches: dict[tuple[bool, str], list[Patch]] = {}
        self.folded = {norm: weighted for weighted, norm in plan.folds.items()}
        norms = {op.owner: op.index for op in self.ops if op.owner in self.folded}
        self.ends = {op.index: norms[plan.folds[op.module]] for op in self.ops if op.module in plan.folds}
        """Weighted op -> its folded batch norm, whose result is that of both."""
        self.raw: frozenset[int] = frozenset()
        """Ops whose replayed result is not their captured one, because a folded batch norm is included."""
        for op in self.ops:
            self._place(op, prepared)

    def _place(self, op: Op, prepared: QuantizedModel) -> None:
        plan = prepared.plan
        if op.name in plan.output_at:
            self.add(False, plan.output_at[op.name], Patch(op.index, op.index, "result"))
        for step, name in plan.inner_at.get(op.name, {}).items():
            self.add(False, name, Patch(op.index, op.index, "inside", step=step))
        for slot, name in plan.constants_at.get(op.name, {}).items():
            self.add(False, name, Patch(op.index, op.index, "argument", slot))
        if op.name in plan.weights_at:
            weight = plan.weights_at[op.name]
            self.add(True, weight.name, Patch(op.index, op.index, "argument", weight.slot))
        elif op.module in prepared.weights:
            self.add(True, op.module, Patch(op.index, self.ends.get(op.index, op.index), "weight"))

    def add(self, weight: bool, name: str, patch: Patch) -> None:
        self.patches.setdefault((weight, name), []).append(patch)

    def arguments(self, call: Any, value: Callable[[Ref], Tensor]) -> tuple[Any, Any]:
        """(args, kwargs) of a call with its `Ref`s replaced."""
        return _replaced(call[0], value), _replaced(call[1], value) if call[1] else call[1]

    def reaches(self, variant: Variant) -> bool:
        """True if `variant` runs on this batch."""
        return (variant.weight, variant.name) in self.patches

    def of(self, variant: Variant) -> list[Patch]:
        """The places where `variant` acts. Raises ReplayError if there are none on this batch."""
        found = self.patches.get((variant.weight, variant.name))
        if not found:
            raise ReplayError(f"{variant.name} does not run on this batch")
        return found

    def run(self, op: Op, args: Any, kwargs: Any) -> Values:
        """Run the float op; an in-place op writes into a copy."""
        call = op.call
        assert call is not None
        if call.in_place:
            args = (args[0].clone(), *args[1:])
        if call.module is not None:
            module = self.modules[call.module]
            # Operators in the hooks of a leaf module were captured as ops; hooks of a skipped module are part of it.
            forward = module if op.kind == OpKind.skipped else module.forward
            out = forward(*args, **kwargs)
            return (out,) if type(out) is Tensor else tuple(all_tensors(out))
        out = call.function(*args, **kwargs)
        if type(out) is Tensor:
            return (out,)
        return (args[0],) if out is None else tuple(tensors_in(out))  # setitem returns None

    def float_run(self, op: Op, args: Any, kwargs: Any) -> Values:
        """Run the op for a float value that a quantizer may read: other last bits would change how it rounds."""
        return self.run(op, args, kwargs)

    def patched(self, op: Op, patch: Patch, quantizer: FakeQuant, args: Any, kwargs: Any) -> Values:
        """Run the op (with its batch norm) with a quantized weight or argument, or with one inner value quantized."""
        if patch.kind == "argument":
            return self.run(op, *_with_argument(args, kwargs, patch.slot, quantizer))
        if patch.kind == "inside":
            return self._inside(op, {patch.step: quantizer}, args, kwargs)
        leaf: Any = self.leaves[op.module or ""]
        assert isinstance(leaf, WeightedLeaf)
        weight, bias = leaf.folded()
        return (leaf.run_with(quantizer(weight), bias, *args, **kwargs),)

    def quantized(
        self, op: Op, prepared: QuantizedModel, args: Any, kwargs: Any, weights: Weights | None = None
    ) -> Values:
        """Run the op as the prepared model does: arguments, weight and result are quantized.

        A convolution with a folded batch norm gives the result of the norm; the norm itself is then the identity.
        `weights` are as in `before_quantizer`.
        """
        values = self.before_quantizer(op, prepared, args, kwargs, weights)
        name = prepared.plan.output_at.get(op.name)
        return values if name is None else (prepared.outputs[name](values[0]), *values[1:])

    def before_quantizer(
        self, op: Op, prepared: QuantizedModel, args: Any, kwargs: Any, weights: Weights | None = None
    ) -> Values:
        """As `quantized`, without the quantizer of the result.

        `weights` holds, by module path, quantized weights and biases that take the place of the present ones.
        """
        for slot, quantizer in prepared.arguments_of(op.name).items():
            args, kwargs = _with_argument(args, kwargs, slot, quantizer)
        if op.owner in self.folded and prepared.weights[self.folded[op.owner]].active:
            return (args[0] if args else kwargs["input"],)
        given = (weights or {}).get(op.module or "") or self.quantized_weight(op, prepared)
        if given is not None:
            return (self.leaves[op.module or ""].run_with(*given, *args, **kwargs),)
        inner = {step: prepared.outputs[name] for step, name in prepared.plan.inner_at.get(op.name, {}).items()}
        active = any(quantizer.active for quantizer in inner.values())
        return self._inside(op, inner, args, kwargs) if active else self.run(op, args, kwargs)

    def quantized_weight(self, op: Op, prepared: QuantizedModel) -> tuple[Tensor, Tensor | None] | None:
        """The quantized weight (its batch norm folded in) and the bias of an op; None if it has no active quantizer."""
        leaf: Any = self.leaves.get(op.module or "")
        weight = prepared.weights.get(op.module or "")
        if weight is None or not weight.active or not isinstance(leaf, WeightedLeaf):
            return None
        folded, bias = leaf.folded()
        return weight(folded), bias

    def _inside(self, op: Op, quantizers: Mapping[str, FakeQuant], args: Any, kwargs: Any) -> Values:
        """Run a norm or softmax by its formula with these inner values quantized."""
        assert op.call is not None
        target = op.call.function if op.call.module is None else self.modules[op.call.module]
        written = written_out(target, args, kwargs)
        assert written is not None
        return (written.run(lambda step, value: quantizers[step](value) if step in quantizers else value),)

    def follows_order(self, op: Op, values: Callable[[], Values], args: Any, kwargs: Any) -> Values | None:
        """The result of an order-changing op in the order of its float `values`; None for any other op."""
        if op.index not in self.ordering:
            return None
        assert op.call is not None
        name = function_name(op.call.function)
        found = values()
        indices = indices_of(name, found if len(found) > 1 else found[0])
        return None if indices is None else tuple(tensors_in(in_order(name, indices, args, kwargs)))


def _replaced(structure: Any, value: Callable[[Ref], Tensor]) -> Any:
    """The same structure with its `Ref`s replaced; torch's tree functions take ten times as long."""
    kind = type(structure)
    if kind is Ref:
        return value(structure)
    if kind is tuple or kind is list:
        return kind([value(v) if type(v) is Ref else _replaced(v, value) for v in structure])
    if kind is dict:
        return {key: _replaced(v, value) for key, v in structure.items()}
    if isinstance(structure, _CONTAINERS):  # of another class, such as a named tuple
        return tree_map(lambda v: value(v) if isinstance(v, Ref) else v, structure)
    return structure


def _with_argument(args: Any, kwargs: Any, slot: int, quantizer: FakeQuant) -> tuple[Any, Any]:
    """The arguments with the `slot`-th of their tensors quantized."""
    position = iter(range(len(tensors_in((args, kwargs)))))

    def quantize(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return quantizer(value) if next(position) == slot else value

    found: tuple[Any, Any] = tree_map(quantize, (args, kwargs))
    return found


def _reads(op: Op) -> frozenset[int]:
    if op.call is None:
        return frozenset()
    return frozenset(ref.op for ref in references((op.call.args, op.call.kwargs)))


def _live(reads: dict[int, frozenset[int]], outputs: Sequence[int]) -> set[int]:
    live: set[int] = set()
    stack = list(outputs)
    while stack:
        index = stack.pop()
        if index not in live:
            live.add(index)
            stack.extend(reads[index])
    return live
