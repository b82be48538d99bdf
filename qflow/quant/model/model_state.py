"""The state dict of a prepared model holds more than tensors: dtypes, switches and requantized inputs.

A scale means nothing without its dtype: an int16 scale that is read with int8 codes clips everything. So the state
dict holds, under torch's `_extra_state`, all settings that decide the values of every quantizer. They are JSON in a
tensor of bytes, which every format for state dicts can hold (torch.save, weights_only loading, safetensors), and
nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from qflow.core.dtype import QDtype
from qflow.core.errors import ModelError
from qflow.quant.model.weighted import WeightedLeaf
from qflow.quant.values.fake_quant import FakeQuant

SCHEMA = 1


class HasQuantizers(Protocol):
    """The attributes of a prepared model that are used here: its quantizers and where they act."""

    outputs: dict[str, FakeQuant]
    weights: dict[str, FakeQuant]
    weight_shapes: dict[str, tuple[tuple[int, ...], int]]
    """Weight -> its shape and the axis of its output channels."""
    requants: nn.ModuleList
    """Quantizers of requantized inputs, each once."""
    requants_at: dict[str, dict[int, FakeQuant]]
    """Operator call -> slot among its tensors -> the quantizer of that requantized input."""

    def place_requants(self, requants: dict[str, dict[int, FakeQuant]]) -> None:
        """Replace the requantized inputs."""


class QuantizerStateMixin(nn.Module):
    """A model whose state dict holds dtypes and switches beside the scales, and which also gives the float model's."""

    model: nn.Module

    def get_extra_state(self) -> Tensor:
        """Torch's hook: dtypes, switches and requantized inputs as a tensor of bytes."""
        return pack(self.settings_state())

    def set_extra_state(self, state: Any) -> None:
        """Torch's hook: restore dtypes, switches and requantized inputs. Raises ModelError if they do not fit."""
        self.restore_settings(unpack(state))

    def settings_state(self) -> dict[str, Any]:
        """The extra state as plain values."""
        return quantizer_states(cast("HasQuantizers", self))

    def restore_settings(self, state: Mapping[str, Any]) -> None:
        """Restore what `settings_state` returned."""
        restore_quantizers(cast("HasQuantizers", self), state)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if f"{prefix}_extra_state" not in state_dict:
            raise ModelError(
                "A prepared model's state holds its dtypes, but got none (no _extra_state). Load a state from "
                "prepared.state_dict(), or float weights with load_float_state_dict."
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[no-untyped-call]

    # ---- the float model's own state ---------------------------------------------------------------------------

    def float_state_dict(self) -> dict[str, Any]:
        """Parameters and buffers under the float model's own keys, trained weights included, without quantizers."""
        return self.model.state_dict()

    def load_float_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any:
        """Load parameters and buffers of the float model.

        If they differ from the present ones, weight scales follow, and all other scales are forgotten, because the
        activations will be others: calibrate again.
        """
        own = self.model.state_dict()
        same = all(_equal(own[name], value) for name, value in state.items() if name in own)
        found = self.model.load_state_dict(state, strict)
        if not same:
            self.follow_weights()
            self.forget_activations()
        return found

    def forget_activations(self) -> None:
        """Clear the scales that belong to the activations of other weights."""
        prepared = cast("HasQuantizers", self)
        for quantizer in (*prepared.outputs.values(), *cast("Iterable[FakeQuant]", prepared.requants)):
            quantizer.clear_scale("lost its scale when other float weights were loaded")
        for quantizer in prepared.weights.values():
            quantizer.changed = False

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; the saved scales are those of the saved weights."""
        self.follow_weights()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; the loaded scales belong to the loaded weights."""
        found = super().load_state_dict(*args, **kwargs)
        self.know_weights()
        return found

    # ---- weights that change after calibration --------------------------------------------------------------------

    def know_weights(self) -> None:
        """Take the present weights as those that their scales were set for."""
        for quantizer in cast("HasQuantizers", self).weights.values():
            quantizer.forget_weight()
        self.follow_weights()

    @torch.no_grad()
    def follow_weights(self) -> list[str]:
        """Let weight scales follow weights that were changed; return the names of all that changed since calibration.

        A forward pass does the same for the weights that it reads. Weights of functionals are only seen there.
        """
        quantizers = cast("HasQuantizers", self).weights
        for leaf in (module for module in self.model.modules() if isinstance(module, WeightedLeaf)):
            quantizer = quantizers.get(leaf.qflow_path)
            integer = quantizer is not None and quantizer.dtype is not None and quantizer.dtype.is_integer
            if quantizer is not None and integer and quantizer.follows:
                quantizer.follow(leaf.folded()[0])
        return [name for name, quantizer in quantizers.items() if quantizer.changed]


def _equal(own: Any, loaded: Any) -> bool:
    """True if a state holds what the model has already."""
    if not isinstance(own, Tensor) or not isinstance(loaded, Tensor):
        return True  # an extra state of a user's module
    return own.shape == loaded.shape and torch.equal(own, loaded.to(own))


def pack(state: Mapping[str, Any]) -> Tensor:
    """`state` (plain values) as a tensor of bytes."""
    return torch.frombuffer(bytearray(json.dumps({"schema": SCHEMA, **state}).encode()), dtype=torch.uint8).clone()


def unpack(packed: Any) -> dict[str, Any]:
    """The state that `pack` packed. Raises ModelError for anything else."""
    try:
        state = json.loads(bytes(packed.cpu().tolist()))
        schema = state["schema"]
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise ModelError(
            f"A prepared model's state is one that qflow saved, but got {type(packed).__name__} for _extra_state. "
            "Save prepared.state_dict() anew."
        ) from error
    if schema != SCHEMA:
        raise ModelError(f"A prepared model's state has schema {SCHEMA}, but got {schema}. Save it anew.")
    return dict(state)


def quantizer_states(prepared: HasQuantizers) -> dict[str, Any]:
    """The settings of every quantizer beside its scale; requantized inputs come with their call and slot."""
    return {
        "outputs": {name: _state(quantizer) for name, quantizer in prepared.outputs.items()},
        "weights": {name: _state(quantizer) for name, quantizer in prepared.weights.items()},
        "requants": {
            call: {str(slot): {"name": q.name, **_state(q)} for slot, q in slots.items()}
            for call, slots in prepared.requants_at.items()
        },
    }


def forward_state(prepared: HasQuantizers) -> dict[str, Any]:
    """All that a quantized forward reads beside the float weights: with equal states it gives equal numbers."""
    requants = cast("Iterable[FakeQuant]", prepared.requants)
    scales = [_scales(own) for own in (prepared.outputs.values(), prepared.weights.values(), requants)]
    return {"states": quantizer_states(prepared), "scales": scales}


def stored_quantizers(prepared: HasQuantizers) -> dict[str, Any]:
    """What a quantized forward reads beside the float weights and `scales` (quantized_model.py), as plain values."""
    requants = cast("Iterable[FakeQuant]", prepared.requants)
    return {"schema": SCHEMA, "states": quantizer_states(prepared), "requants": _scales(requants)}


@torch.no_grad()
def restore_stored(prepared: HasQuantizers, stored: Mapping[str, Any], scales: Mapping[str, Any]) -> None:
    """Restore what `stored_quantizers` and `scales` returned, and switch all quantizers on.

    Raises ModelError for another schema, or the quantizers of another model.
    """
    if stored.get("schema") != SCHEMA:
        raise ModelError(f"Stored quantizers have schema {SCHEMA}, but got {stored.get('schema')}. Store them anew.")
    restore_quantizers(prepared, stored["states"])
    wanted: dict[str, FakeQuant] = {**prepared.outputs, **{f"{n}.weight": q for n, q in prepared.weights.items()}}
    requants = {str(q.name): q for q in cast("Iterable[FakeQuant]", prepared.requants)}
    for own, values in ((wanted, scales), (requants, stored["requants"])):
        if odd := sorted(set(own) ^ set(values)):
            raise ModelError(f"Scales belong to the quantizers of their model, but got another at {odd[0]}.")
        for name, quantizer in own.items():
            quantizer.restore_scale(values[name])
            quantizer.enabled = True


def restore_quantizers(prepared: HasQuantizers, state: Mapping[str, Any]) -> None:
    """Restore the settings of every quantizer; scales are loaded separately. Raises ModelError for another model."""
    for kind, own in (("outputs", prepared.outputs), ("weights", prepared.weights)):
        odd = sorted(set(state[kind]) ^ set(own))
        if odd:
            raise ModelError(
                f"A state fits a model that was prepared alike, but got another quantizer at {odd[0]}. Prepare "
                "the same model with the same split_shared and the same skip."
            )
        for name, quantizer in own.items():
            _restore(quantizer, state[kind][name])
    for name, quantizer in prepared.weights.items():
        quantizer.set_axis(int(state["weights"][name]["axis"]), prepared.weight_shapes[name][0])
    made: dict[str, dict[int, FakeQuant]] = {}
    shared: dict[str, FakeQuant] = {}  # all calls of a shared module use the same quantizer
    for call, slots in state["requants"].items():
        for slot, saved in slots.items():
            quantizer = shared.setdefault(saved["name"], FakeQuant(saved["name"]))
            _restore(quantizer, saved)
            made.setdefault(call, {})[int(slot)] = quantizer
    prepared.place_requants(made)


def _scales(quantizers: Iterable[FakeQuant]) -> dict[str, list[float]]:
    return {quantizer.name: quantizer.scale.flatten().tolist() for quantizer in quantizers}


def _state(quantizer: FakeQuant) -> dict[str, Any]:
    return {
        "dtype": None if quantizer.dtype is None else quantizer.dtype.value,
        "clip": quantizer.clip,
        "half_step": quantizer.half_step,
        "enabled": quantizer.enabled,
        "keeps_mask": quantizer.keeps_mask,
        "axis": quantizer.axis,
    }


def _restore(quantizer: FakeQuant, saved: Mapping[str, Any]) -> None:
    quantizer.dtype = None if saved["dtype"] is None else QDtype(saved["dtype"])
    quantizer.clip, quantizer.half_step = bool(saved["clip"]), float(saved["half_step"])
    quantizer.enabled, quantizer.keeps_mask = bool(saved["enabled"]), bool(saved["keeps_mask"])
