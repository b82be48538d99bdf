"""The temporal state of a prepared model: quantized when a call reads it, put back at the start of a sequence."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qflow.core.errors import ModelError
from qflow.quant.model.plan import Plan
from qflow.quant.model.run import Run
from qflow.quant.trace.calling import map_named
from qflow.quant.trace.state import PREFIX, CachedState, put_state, state_of, without


class TemporalStateMixin(nn.Module):
    """A prepared model that keeps its own state between calls, apart from that of the float model."""

    model: nn.Module
    plan: Plan
    cached: CachedState | None
    """The attributes of temporal state and their values at the start of a sequence; None for a model without state."""

    @property
    def qflow_state_owner(self) -> nn.Module:
        """The module whose attributes hold the state (trace/state.py)."""
        return self.model

    def reset_state(self) -> None:
        """Begin a sequence: the attributes in `cached_attrs` get their values at `prepare`. Raises ModelError."""
        if self.cached is None:
            raise ModelError(
                "A model with cached_attrs has a state to reset, but got one without. Prepare it with cached_attrs."
            )
        self.cached.reset(self.model)

    def _quantize_state(self, run: Run) -> None:
        """Each tensor of the state is an input of this call, and passes its quantizer as an input does."""
        if self.cached is None:
            return

        def quantize(name: str, value: Tensor) -> Any:
            return run.finish(f"quant[{name}]", value, None)

        state = without(state_of(self.model, self.cached.attrs), self.plan.skipped)
        put_state(self.model, {path: map_named(quantize, value, PREFIX + path) for path, value in state.items()})

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; buffers of temporal state have their values at the start of a sequence."""
        with at_start(self.model, self.cached):
            return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; afterwards the model is at the start of a sequence."""
        if self.cached is not None:
            self.reset_state()
        return super().load_state_dict(*args, **kwargs)

    def load_float_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any:
        """Load parameters and buffers of the float model; afterwards the model is at the start of a sequence."""
        if self.cached is not None:
            self.reset_state()
        return super().load_float_state_dict(state, strict)  # type: ignore[misc]

    def float_state_dict(self) -> dict[str, Any]:
        """Parameters and buffers under the float model's own keys; those of temporal state as at the start."""
        with at_start(self.model, self.cached):
            found: dict[str, Any] = super().float_state_dict()  # type: ignore[misc]
        return found


@contextmanager
def at_start(model: nn.Module, cached: CachedState | None) -> Iterator[None]:
    """Hold the state of the start of a sequence inside the block, whatever the frame."""
    if cached is None:
        yield
        return
    own = state_of(model, cached.attrs)
    cached.reset(model)
    try:
        yield
    finally:
        put_state(model, own)


def copy_at_start(model: nn.Module, cached: CachedState | None) -> nn.Module:
    """A deep copy of `model`, at the start of a sequence. Raises ModelError if it cannot be copied."""
    with at_start(model, cached):
        try:
            return copy.deepcopy(model)
        except Exception as error:  # whatever the model holds may refuse
            text = (str(error) or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"A model can be copied (copy.deepcopy), but got: {text}. Keep what cannot be copied outside of it."
            ) from error
