"""Checks that a prepared model is the float model: it runs the same operators and, with quantizers off, is equal.

Equal outputs alone prove little, because a prepared model without any quantizer would be equal too. So the check also
compares the operators: on the example and at another batch size, every traced operator has to run, and no other
operator that would have a quantizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from qflow.core.errors import ModelError
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import call_model, named_tensors
from qflow.quant.trace.state import owner_of


def verify_float(
    model: nn.Module,
    prepared: QuantizedModel,
    inputs: Any,
    tolerance: float = 0.0,
    traced: Mapping[str, Tensor] | None = None,
) -> None:
    """Raise ModelError unless the float graph equals the model: bit for bit, or within `tolerance` of the norm.

    `traced` are the model's outputs on these inputs, if they are known: then the model does not run again for them.
    """
    visited: set[str] = set()
    prepared.watch, prepared.unseen = lambda name, value: visited.add(name), set()
    try:
        with torch.no_grad():
            got = named_tensors(call_model(Observed(prepared.observed), inputs))
            known = traced is not None and traced.keys() == {name for name, _ in got}
            expected = list(traced.items()) if known and traced else named_tensors(call_model(model, inputs))
        _same_operators(prepared, visited)
    finally:
        prepared.watch, prepared.unseen = None, set()
    same_tensors(expected, got, tolerance)


def same_tensors(
    expected: list[tuple[str, Tensor]], got: list[tuple[str, Tensor]], tolerance: float, where: str = ""
) -> None:
    """Raise ModelError unless names, shapes and values are equal; `where` follows the name in the message."""
    if [(n, t.shape) for n, t in expected] != [(n, t.shape) for n, t in got]:
        raise ModelError(
            f"The traced model must give the outputs {_shapes(expected)}, but got {_shapes(got)}. Keep no tensors "
            "between calls."
        )
    for (name, a), (_, b) in zip(expected, got, strict=True):
        _same_values(name + where, a, b, tolerance)


def _same_operators(prepared: QuantizedModel, visited: set[str]) -> None:
    plan = prepared.plan
    missing, extra = sorted(plan.visited - visited), sorted(prepared.unseen)
    if not missing and not extra:
        return
    places = {name: f" ({key[1]}, line {key[2]} of it)" for key, name in plan.sites.items() if key[1]}
    what = f"{missing[0]}{places.get(missing[0], '')} left out" if missing else f"{extra[0]} that was not traced"
    raise ModelError(
        f"A model runs the same operators at every call and batch size, but got {what}. Fill caches in __init__ or "
        "call the model once before, compute samples in one batch (or skip what loops over them), and ask "
        "isinstance(m, nn.Conv2d), not type(m)."
    )


def _same_values(name: str, a: Tensor, b: Tensor, tolerance: float) -> None:
    if torch.equal(a.isnan(), b.isnan()):
        if torch.equal(a.nan_to_num(), b.nan_to_num()):
            return
        difference = float((a.double() - b.double()).nan_to_num().norm())
        if difference <= tolerance * float(a.double().nan_to_num().norm()):
            return
        what = f"by {difference:.3g}"
    else:
        what = f"in {int((a.isnan() != b.isnan()).sum())} NaN"
    close = f"within {tolerance:g}" if tolerance else "bit for bit"
    raise ModelError(
        f"The traced float graph must reproduce the model {close}, but output {name} differs {what}. "
        "Make the model deterministic in eval mode."
    )


def _shapes(tensors: list[tuple[str, Tensor]]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors)


def holder(model: nn.Module) -> str:
    """A function in a module (a hook, a replaced forward) whose closure holds a module of `model`; "" if none.

    A copy of the model keeps such a function unchanged, so that it calls the original module.
    """
    inside = {id(m) for m in model.modules()}
    for path, module in model.named_modules():
        kept = [*vars(module).items()]
        for hooks in ("_forward_pre_hooks", "_forward_hooks"):
            kept += [(hooks.strip("_")[:-1].replace("_", " "), hook) for hook in getattr(module, hooks).values()]
        for name, function in kept:
            cells = function.__closure__ or () if isinstance(function, FunctionType) else ()
            if any(id(_content(cell)) in inside for cell in cells):
                return f"{function.__qualname__} ({name} of {path or 'the model'})"
    return ""


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


class Observed(nn.Module):
    """A module whose forward is `function`, a method of a prepared model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    @property
    def qflow_state_owner(self) -> nn.Module:
        """The module whose attributes hold temporal state (trace/state.py)."""
        return owner_of(self.function.__self__)  # type: ignore[attr-defined]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)
