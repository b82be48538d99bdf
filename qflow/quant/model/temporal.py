"""Temporal models in `prepare`: the state from which a model is traced, and the proof over a sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qflow.core.errors import ModelError
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.verify import Observed, same_tensors
from qflow.quant.trace.calling import call_model, map_named, named_tensors, state_tensors
from qflow.quant.trace.state import CachedState, Frame, State

MOST_FRAMES = 64
"""After so many frames the state must have the form that it keeps: queues are full, nothing is None any more."""


def settled(model: nn.Module, cached: CachedState, inputs: Any) -> Frame:
    """`inputs` with the state that `model` has once its form no longer changes, and all of the state as outputs.

    Raises ModelError if the form still changes after MOST_FRAMES calls from the start.
    """
    state = cached.start(model)
    frames = [_form(state)]
    for _ in range(MOST_FRAMES):
        with torch.no_grad():
            state = call_model(model, Frame(inputs, state)).after
        frames.append(_form(state))
        if frames[-1] == frames[-2]:
            break
    else:
        odd = next(path for path in cached.attrs if frames[-1][path] != frames[-2][path])
        raise ModelError(
            f"The state of a model keeps its form after some frames, but got {odd} still changing after {MOST_FRAMES} "
            "calls. Bound its length (deque(maxlen=n))."
        )
    if not state_tensors(state):
        raise ModelError(
            f"cached_attrs names attributes in which a model keeps tensors, but got none in {', '.join(cached.attrs)}. "
            "Name the others, or leave out cached_attrs."
        )
    return Frame(inputs, state)


def _form(state: State) -> dict[str, Any]:
    return {path: [(n, tuple(t.shape)) for n, t in state_tensors({path: value})] for path, value in state.items()}


def verify_sequence(model: nn.Module, prepared: QuantizedModel, inputs: Any, tolerance: float) -> None:
    """Run both models from the start over frames of changing inputs, each with its own state, and compare.

    The frames reach three beyond the form that the state keeps. Raises ModelError where the models differ: bit for bit,
    or by more than `tolerance` of the norm.
    """
    cached = prepared.cached
    assert cached is not None
    states, form, left = [cached.start(model), cached.start(model)], None, 3
    for n in range(MOST_FRAMES + 3):
        shown = _dimmed(inputs, 1.0 - 0.01 * n)
        with torch.no_grad():
            expected = call_model(model, Frame(shown, states[0]))
            got = call_model(Observed(prepared.observed), Frame(shown, states[1]))
        same_tensors(named_tensors(expected), named_tensors(got), tolerance, f" of frame {n}")
        states, before, form = [expected.after, got.after], form, _form(expected.after)
        left = 3 if form != before else left - 1
        if not left:
            break
    prepared.unseen = set()


def _dimmed(inputs: Any, factor: float) -> Any:
    return map_named(lambda _, t: t * factor if t.is_floating_point() else t, inputs)
