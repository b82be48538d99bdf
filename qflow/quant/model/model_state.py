"""What a prepared model's state dict holds beside tensors: dtypes, switches, requantized inputs.

A scale says nothing without its dtype: an int16 scale read with int8 codes clips everything. So the state carries,
under torch's `_extra_state`, what decides the values of every quantizer. It is JSON in a tensor of bytes: whatever
holds a state dict (torch.save, weights_only loading, safetensors) holds it too, and nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from qflow.core.dtype import QDtype
from qflow.core.errors import ModelError
from qflow.quant.values.fake_quant import FakeQuant

SCHEMA = 1


class HasQuantizers(Protocol):
    """What is read of a prepared model: its quantizers, and where they stand."""

    outputs: dict[str, FakeQuant]
    weights: dict[str, FakeQuant]
    weight_shapes: dict[str, tuple[tuple[int, ...], int]]
    """Shape and output axis by weight."""
    requants: nn.ModuleList
    """Quantizers of requantized inputs, each once."""
    requants_at: dict[str, dict[int, FakeQuant]]
    """The same by operator call and input position."""

    def place_requants(self, requants: dict[str, dict[int, FakeQuant]]) -> None:
        """Take other requantized inputs."""


class QuantizerStateMixin(nn.Module):
    """A model whose state dict holds what its scales mean, and the float model's own state beside it."""

    model: nn.Module

    def get_extra_state(self) -> Tensor:
        """Torch's hook: what the state dict holds beside tensors (model_state.py)."""
        return pack(self.settings_state())

    def set_extra_state(self, state: Any) -> None:
        """Torch's hook: dtypes, switches and requantized inputs as they were saved. Raises ModelError."""
        self.restore_settings(unpack(state))

    def settings_state(self) -> dict[str, Any]:
        """The extra state as plain values."""
        return quantizer_states(cast("HasQuantizers", self))

    def restore_settings(self, state: Mapping[str, Any]) -> None:
        """Take what `settings_state` gave."""
        restore_quantizers(cast("HasQuantizers", self), state)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if f"{prefix}_extra_state" not in state_dict:
            raise ModelError(
                "A prepared model's state holds its dtypes, but got none (no _extra_state). Load what "
                "prepared.state_dict() gave, or float weights with load_float_state_dict."
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[no-untyped-call]

    # ---- the float model's own state ---------------------------------------------------------------------------

    def float_state_dict(self) -> dict[str, Any]:
        """Parameters and buffers under the float model's own keys; what trained there is in it, quantizers are not."""
        return self.model.state_dict()

    def load_float_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any:
        """Take the float model's parameters and buffers; scales stay as they are."""
        return self.model.load_state_dict(state, strict)


def pack(state: Mapping[str, Any]) -> Tensor:
    """`state` (plain values) as a tensor of bytes."""
    return torch.frombuffer(bytearray(json.dumps({"schema": SCHEMA, **state}).encode()), dtype=torch.uint8).clone()


def unpack(packed: Any) -> dict[str, Any]:
    """What `pack` was given. Raises ModelError for anything else."""
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
    """What decides the values of every quantizer beside its scale; requantized inputs with where they are."""
    return {
        "outputs": {name: _state(quantizer) for name, quantizer in prepared.outputs.items()},
        "weights": {name: _state(quantizer) for name, quantizer in prepared.weights.items()},
        "requants": {
            call: {str(slot): {"name": q.name, **_state(q)} for slot, q in slots.items()}
            for call, slots in prepared.requants_at.items()
        },
    }


def forward_state(prepared: HasQuantizers) -> dict[str, Any]:
    """Everything that a quantized forward reads beside the float weights: equal states, equal numbers."""
    requants = cast("Iterable[FakeQuant]", prepared.requants)
    scales = [_scales(own) for own in (prepared.outputs.values(), prepared.weights.values(), requants)]
    return {"states": quantizer_states(prepared), "scales": scales}


def restore_quantizers(prepared: HasQuantizers, state: Mapping[str, Any]) -> None:
    """Put every quantizer into the saved state; scales are loaded apart. Raises ModelError for another model's."""
    for kind, own in (("outputs", prepared.outputs), ("weights", prepared.weights)):
        odd = sorted(set(state[kind]) ^ set(own))
        if odd:
            raise ModelError(
                f"A state goes into a model that was prepared alike, but got another quantizer at {odd[0]}. Prepare "
                "the same model with the same skip."
            )
        for name, quantizer in own.items():
            _restore(quantizer, state[kind][name])
    for name, quantizer in prepared.weights.items():
        quantizer.set_axis(int(state["weights"][name]["axis"]), prepared.weight_shapes[name][0])
    made: dict[str, dict[int, FakeQuant]] = {}
    shared: dict[str, FakeQuant] = {}  # all calls of a shared module read through one
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
