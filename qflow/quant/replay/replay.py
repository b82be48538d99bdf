"""Replay: run the operators of a captured batch again, but only those that a changed quantizer reaches.

A `Variant` is one quantizer switched on alone. The replay starts at the first op that it changes and runs every op
that depends on it; all other values are the captured float values. Quantizers see the same values as in the prepared
model. Float ops run with folded batch norms (fused.py), so the outputs equal those of full forward passes except for
the last bits.

If every op keeps the batch axis intact (widen.py), several variants run together as one large batch: the samples of
variant 0, then those of variant 1, ... Variants are sorted by their first op, so that an op computes only those that
have started.

Float values are kept while they fit into the memory limit of the capture. Otherwise only those are held that later ops
still read, and any other value is computed again when a variant needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.replay.capture import Captured, ReplayError
from qflow.quant.replay.captured_ops import Patch, Values, Variant
from qflow.quant.replay.floats import Floats
from qflow.quant.replay.fused import FusedOps
from qflow.quant.replay.widen import Widths
from qflow.quant.trace.calling import call_model, named_tensors
from qflow.quant.trace.tape import Op, Ref
from qflow.quant.values.fake_quant import FakeQuant


class Replay:
    """Replays variants on one captured batch, as many at a time as `widths` says. Use it inside `torch.no_grad()`."""

    def __init__(
        self, model: nn.Module, prepared: QuantizedModel, captured: Captured, widths: Widths | None = None
    ) -> None:
        self.ops = FusedOps(model, prepared, captured)
        self.floats = Floats(self.ops, captured)
        self.widths = widths

    def references(self) -> dict[str, Tensor]:
        """Float outputs of the captured batch, by name."""
        return {name: self.floats.get(ref.op)[ref.position] for name, ref in self.ops.outputs}

    def replayed(self) -> dict[str, Tensor]:
        """The same outputs, replayed op by op from the inputs without any quantizer."""
        nothing = Captured(self.ops.tape, self.ops.outputs, self.floats.given, {}, False)
        floats = Floats(self.ops, nothing, self.ops.run)
        floats.advance(len(self.ops.tape.ops))
        return {name: floats.get(ref.op)[ref.position] for name, ref in self.ops.outputs}

    def start(self, variant: Variant) -> int:
        """Index of the first op that `variant` changes. Raises ReplayError if there is none on this batch."""
        return min(patch.op for patch in self.ops.of(variant))

    def run(self, variants: Sequence[Variant], part: slice = slice(None)) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield each variant's position in `variants` and its outputs by name, sorted by the first op they change.

        Those of a `part` of the passes have the same values as those of all.
        """
        for chosen in self.passes(variants)[part]:
            yield from zip(chosen, _Pass(self, [variants[i] for i in chosen]).outputs(), strict=True)

    def passes(self, variants: Sequence[Variant]) -> list[list[int]]:
        """Groups of variants that run together, as positions in `variants`, sorted by the first op they change."""
        starts = [self.start(variant) for variant in variants]
        order = sorted(range(len(variants)), key=lambda i: starts[i])
        groups = []
        while order:
            width = self.widths.most[starts[order[0]]] if self.widths else 1
            groups.append(order[:width])
            order = order[width:]
        return groups


class _Pass:
    """One pass over the ops for a few variants; variant v is slice v of every value that differs from float.

    `stacked` maps an op to its values and their number of slices: variants that start later have no slice yet.
    """

    def __init__(self, replay: Replay, variants: Sequence[Variant]) -> None:
        self.ops, self.floats, self.widths = replay.ops, replay.floats, replay.widths
        self.variants = variants
        self.first = replay.start(variants[0])
        self.stacked: dict[int, tuple[Values, int]] = {}
        self.patches: dict[int, list[tuple[int, Patch]]] = {}
        self.results: dict[int, list[int]] = {}
        for v, variant in enumerate(variants):
            for patch in self.ops.of(variant):
                if patch.kind == "result":
                    self.results.setdefault(patch.at, []).append(v)
                else:
                    self.patches.setdefault(patch.op, []).append((v, patch))
        self.acting = {patch.op for variant in variants for patch in self.ops.of(variant)}
        self.acting |= {patch.at for variant in variants for patch in self.ops.of(variant)}
        self.replaced: dict[int, dict[int, Values]] = {}
        """Op -> variant -> its result there, if a patch has already computed it."""

    def outputs(self) -> list[dict[str, Tensor]]:
        """The outputs of each variant, by name."""
        self.floats.advance(self.first)
        for op in self.ops.ops:
            if op.index >= self.first:
                self._op(op)
        found: list[dict[str, Tensor]] = [{} for _ in self.variants]
        for name, ref in self.ops.outputs:
            for v in range(len(self.variants)):
                found[v][name] = self._slice(ref, v)
        return found

    def _op(self, op: Op) -> None:
        reads = self.ops.reads[op.index]
        begun = 0
        for i in reads:
            if i in self.stacked and self.stacked[i][1] > begun:
                begun = self.stacked[i][1]
        if op.index in self.acting:
            self._acted(op, begun)
        elif begun:
            self.stacked[op.index] = self._run(op, begun), begun
        if begun:
            for i in self.ops.last_read[op.index]:
                self.stacked.pop(i, None)

    def _acted(self, op: Op, begun: int) -> None:
        """As `_op`, where quantizers act on the op; `begun` variants are there already."""
        for v, patch in self.patches.get(op.index, ()):
            args, kwargs = self._arguments(op, lambda ref, v=v: self._slice(ref, v))  # type: ignore[misc]
            result = self.ops.patched(op, patch, self.variants[v].quantizer, args, kwargs)
            self.replaced.setdefault(patch.at, {})[v] = result
        replaced, results = self.replaced.pop(op.index, {}), self.results.get(op.index, [])
        count = max([begun, *(v + 1 for v in (*replaced, *results))])
        if count:
            if begun and not all(v in replaced for v in range(begun)):
                values = self._run(op, begun)
            else:
                values, begun = (), 0
            self.stacked[op.index] = self._joined(op, values, begun, count, replaced, results), count

    def _run(self, op: Op, count: int) -> Values:
        """Run the float op on the first `count` slices. Raises ReplayError if its result has not as many slices."""
        args, kwargs = self._arguments(op, lambda ref: self._first(ref, count), count)
        if op.index in self.ops.ordering:
            ordered = self.ops.follows_order(op, lambda: self._repeated(op, count), args, kwargs)
            if ordered is not None:
                return ordered
        if count == 1:
            return self.ops.run(op, args, kwargs)
        try:
            values = self.ops.run(op, args, kwargs)
        except Exception as error:  # a call with a fixed size in it may raise anything at another size
            text = " ".join(str(error).split())
            raise ReplayError(f"{op.name} runs for one variant, but not for {count}: {text}") from error
        axis = self._axis(op.index, 0)
        if op.single and (len(op.shape) <= axis or values[0].shape[axis] != count * op.shape[axis]):
            raise ReplayError(f"{op.name} does not grow with the batch: {count} variants give {list(values[0].shape)}")
        return values

    def _joined(
        self, op: Op, values: Values, begun: int, count: int, replaced: dict[int, Values], results: list[int]
    ) -> Values:
        """`values` of the first `begun` slices, then the variants that start at this op, all with their patches."""
        if begun == count and not replaced and not results:
            return values
        pieces = [values] if begun else []
        base = self.floats.get(op.index) if count > begun else ()
        for v in range(begun, count):
            pieces.append(self._quantized(v, replaced.get(v, base), v in results))
        whole = tuple(self._cat(op.index, i, [p[i] for p in pieces]) for i in range(len(pieces[0])))
        late = [v for v in range(begun) if v in replaced or v in results]
        if late:  # a module that is called several times: its variants have slices from an earlier call
            whole = tuple(t.clone() for t in whole)
            for v in late:
                own = replaced.get(v, tuple(self._part(op.index, i, t, v, count) for i, t in enumerate(whole)))
                for i, tensor in enumerate(self._quantized(v, own, v in results)):
                    self._part(op.index, i, whole[i], v, count).copy_(tensor)
        return whole

    def _quantized(self, v: int, values: Values, result: bool) -> Values:
        return (self.variants[v].quantizer(values[0]), *values[1:]) if result else values

    # ---- slices

    def _arguments(self, op: Op, value: Callable[[Ref], Tensor], count: int = 1) -> tuple[Any, Any]:
        assert op.call is not None
        call = (op.call.args, op.call.kwargs) if count == 1 or self.widths is None else self.widths.call(op, count)
        return self.ops.arguments(call, value)

    def _axis(self, index: int, position: int) -> int:
        return self.widths.axes[index][position] if self.widths else 0

    def _cat(self, index: int, position: int, pieces: list[Tensor]) -> Tensor:
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self._axis(index, position))

    def _part(self, index: int, position: int, tensor: Tensor, v: int, count: int) -> Tensor:
        if count == 1:
            return tensor
        axis = self._axis(index, position)
        size = tensor.shape[axis] // count
        return tensor.narrow(axis, v * size, size)

    def _slice(self, ref: Ref, v: int) -> Tensor:
        """The value of variant v: its slice, or the float value if it does not differ."""
        values, count = self.stacked.get(ref.op, ((), 0))
        if v >= count:
            return self.floats.get(ref.op)[ref.position]
        return self._part(ref.op, ref.position, values[ref.position], v, count)

    def _first(self, ref: Ref, count: int) -> Tensor:
        """The first `count` slices of a value."""
        values, there = self.stacked.get(ref.op, ((), 0))
        if there >= count:
            whole = values[ref.position]
            if there == count:
                return whole
            axis = self._axis(ref.op, ref.position)
            return whole.narrow(axis, 0, whole.shape[axis] // there * count)
        base = self.floats.get(ref.op)[ref.position]
        return self._cat(ref.op, ref.position, [*([values[ref.position]] if there else []), *[base] * (count - there)])

    def _repeated(self, op: Op, count: int) -> Values:
        base = self.floats.get(op.index)
        return tuple(self._cat(op.index, i, [t] * count) for i, t in enumerate(base))


def full_forward(
    prepared: QuantizedModel, inputs: Any, variant: Variant, written_out: bool = False
) -> dict[str, Tensor]:
    """The outputs that `Replay.run` gives for one variant, but from a full forward pass: slow, and always right.

    torch's fused attention gives other last bits than its parts, and these move codes at near ties. With `written_out`
    the quantizer reads what it reads in a replay; without it, attention that it does not act on is fused and faster.
    """
    kept = prepared.weights if variant.weight else prepared.outputs
    own = kept[variant.name]
    switch: dict[str, Any] = {"weights" if variant.weight else "outputs": [variant.name]}
    with borrowed(own, variant.quantizer), prepared.only(**switch, written_out=written_out):
        return dict(named_tensors(call_model(prepared, inputs)))


@contextmanager
def borrowed(own: FakeQuant, other: FakeQuant) -> Iterator[None]:
    """Give `own` the dtype and scale of `other`, and restore its own on leaving."""
    before = (own.dtype, own.clip, own.half_step, own.scale.clone())
    try:
        own.dtype, own.clip, own.half_step = other.dtype, other.clip, other.half_step
        own.scale.copy_(other.scale)
        yield
    finally:
        own.dtype, own.clip, own.half_step = before[:3]
        own.scale.copy_(before[3])
