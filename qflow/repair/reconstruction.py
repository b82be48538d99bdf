"""The steps that change what the float model computes, so that the quantized model computes what it did: rounding
anew, and bias correction. Rounding comes first, because the correction is of the weights as they are rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from qflow.quant.model.quantized_model import QuantizedModel
from qflow.repair.bias import Target, correct_biases, correctable
from qflow.repair.contract import Context, Part, Step
from qflow.repair.operators import Skipped
from qflow.repair.rounding import Rounded, in_memory, round_weights, writable, write


class Reference:
    """The float model before the first of these steps: it is taken once, by whichever step comes first."""

    def __init__(self, kind: type[Target]) -> None:
        self.kind = kind
        self._target: Target | None = None

    def take(self, prepared: QuantizedModel, context: Context) -> Target:
        """What outputs are compared with; in the first call, from the present float model."""
        if self._target is None:
            self._target = self.kind.of(prepared, [inputs for inputs, _ in context.batches])
            context.forwards += self.kind.passes * context.samples
        return self._target


class Rounding(Step):
    """Second-order rounding of int8 weights (rounding.py), a part for each weight."""

    name = "rounding"

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self._found: dict[str, Rounded] = {}

    def parts(self, prepared: QuantizedModel, context: Context) -> tuple[Sequence[Part], Skipped]:
        chosen, skipped = writable(prepared)
        self._found = {}
        return [Part(name) for name in chosen], skipped

    def apply(self, prepared: QuantizedModel, context: Context, parts: Sequence[Part]) -> Mapping[str, str]:
        self.reference.take(prepared, context)
        chosen, _ = writable(prepared)
        new = [part.name for part in parts if part.name not in self._found]
        if new:  # a later attempt, with fewer parts, takes the same weights
            self._found |= round_weights(prepared, [inputs for inputs, _ in context.batches], new)
            context.forwards += len(in_memory({name: chosen[name] for name in new})) * context.samples
        moved = {part.name: self._found[part.name] for part in parts if part.name in self._found}
        for name, rounded in moved.items():
            write(prepared, name, chosen[name], rounded.weight)
        return {name: str(rounded) for name, rounded in moved.items() if rounded.moved}


class Bias(Step):
    """Bias correction of the operators with an int8 weight (bias.py), a part for each."""

    name = "bias"

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    def parts(self, prepared: QuantizedModel, context: Context) -> tuple[Sequence[Part], Skipped]:
        chosen, skipped = correctable(prepared)
        return [Part(name) for name in chosen], skipped

    def apply(self, prepared: QuantizedModel, context: Context, parts: Sequence[Part]) -> Mapping[str, str]:
        target = self.reference.take(prepared, context)
        batches = [inputs for inputs, _ in context.batches]
        shifts = correct_biases(prepared, batches, target, [part.name for part in parts])
        context.forwards += context.samples
        return {name: _described(shift) for name, shift in shifts.items()}


def _described(shift: Tensor) -> str:
    moved, most = int((shift != 0).sum()), float(shift.abs().max())
    return f"the mean of {moved} of {shift.numel()} channels shifted, by {most:.2g} at most"
