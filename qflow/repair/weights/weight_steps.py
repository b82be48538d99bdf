"""The steps that change what the float model computes, so that the quantized model computes what it did: rounding
anew, reconstruction, and bias correction. Reconstruction goes on from the codes that rounding has found; the correction
comes last, because it is of the weights as they are rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from qflow.quant.model.leaf import float_copy
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.replay.capture import reason_of
from qflow.repair.base.contract import Context, Part, Step
from qflow.repair.base.operators import Skipped, writable_leaves
from qflow.repair.weights.bias import Target, correct_biases, correctable
from qflow.repair.weights.reconstruction import Reconstructed, reconstruct
from qflow.repair.weights.regions import Region, regions_of
from qflow.repair.weights.rounding import Rounded, in_memory, round_weights, writable, write
from qflow.repair.weights.walk import MEMORY, Samples, samples_of


class Reference:
    """The float model before the first of these steps: it is taken once, by whichever step comes first."""

    def __init__(self, kind: type[Target]) -> None:
        self.kind = kind
        self._target: Target | None = None
        self._model: nn.Module | None = None

    def take(self, prepared: QuantizedModel, context: Context) -> Target:
        """What outputs are compared with; in the first call, from the present float model."""
        if self._target is None:
            self._target = self.kind.of(prepared, [inputs for inputs, _ in context.batches])
            self._model = float_copy(prepared.model)
            context.forwards += self.kind.passes * context.samples
        return self._target

    def model(self, prepared: QuantizedModel, context: Context) -> nn.Module:
        """A copy of the float model as it was when it was taken."""
        self.take(prepared, context)
        assert self._model is not None
        return self._model


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


class Reconstruction(Step):
    """Codes learned by layers and blocks (reconstruction.py), a part for each block and for each layer outside."""

    name = "reconstruction"

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self._samples: Samples | None = None
        self._regions: Sequence[Region] = ()
        self._found: dict[str, Reconstructed | None] = {}

    def needs(self, prepared: QuantizedModel, context: Context) -> str:
        """A capture of all samples; the reason why they have none."""
        model = self.reference.model(prepared, context)
        self._found = {}
        try:
            self._samples = samples_of(model, prepared, context.batches)
        except Exception as error:  # an operator may raise anything when it is run alone
            return f"its operators cannot be run one by one: {reason_of(error)}"
        context.forwards += self._samples.forwards
        return ""

    def parts(self, prepared: QuantizedModel, context: Context) -> tuple[Sequence[Part], Skipped]:
        assert self._samples is not None
        chosen, skipped = writable_leaves(prepared)
        self._regions, others = regions_of(self._samples.chunks[0].ops, chosen)
        return [Part(region.name) for region in self._regions], {**skipped, **others}

    def apply(self, prepared: QuantizedModel, context: Context, parts: Sequence[Part]) -> Mapping[str, str]:
        assert self._samples is not None
        names = {part.name for part in parts}
        if not names <= self._found.keys():  # a later attempt, with fewer parts, takes the same weights
            model, chunks = self.reference.model(prepared, context), self._samples.chunks
            found, forwards = reconstruct(prepared, model, chunks, self._regions, names)
            self._found |= {name: found.get(name) for name in names}
            context.forwards += forwards
        changed = {name: new for name in names if (new := self._found[name]) is not None}
        chosen, _ = writable_leaves(prepared)
        for new in changed.values():
            for name, weight in new.weights.items():
                write(prepared, name, chosen[name], weight)
        used, given = self._samples.used, context.samples
        fewer = f", on {used} of {given} samples: more exceed {MEMORY >> 20} MB" if used < given else ""
        return {part.name: f"{changed[part.name]}{fewer}" for part in parts if part.name in changed}


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
