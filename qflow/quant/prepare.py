"""prepare: a float model in, a `QuantizedModel` with named quantizers out; the float model is left as it was.

Nothing is traced wrongly without a word: the prepared model's float graph is compared with the model on the example
and on another batch size, bit for bit (within 1e-4 of the norm where attention was written out in parts), and a
value that reaches an operator by a way that tracing cannot see is found by tracing twice on different inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qflow.core.errors import ModelError
from qflow.quant.calling import call_model, named_tensors
from qflow.quant.ops import is_leaf
from qflow.quant.plan import make_plan
from qflow.quant.quantized_model import QuantizedModel
from qflow.quant.tape import Tape
from qflow.quant.tracer import trace

TOLERANCE = 1e-4
"""Relative norm by which a float graph with decomposed attention may differ from the model in float32."""


def prepare(model: nn.Module, example_inputs: Any, skip: Sequence[str | type[nn.Module]] = ()) -> QuantizedModel:
    """Trace `model` (eval mode) on `example_inputs`, fuse, place quantizers, and prove the float graph unchanged.

    `example_inputs` is a tensor, a tuple to splat or a dict of keyword arguments; the batch axis comes first.
    `skip` are module names, class names or classes that stay in float. Raises ModelError where the model cannot
    run, has no float output, or the comparison fails.
    """
    if model.training:
        raise ModelError("A model is prepared in eval mode, but got one in train mode. Call model.eval() first.")
    if is_leaf(model):
        raise ModelError(f"A model holds modules, but got a single {type(model).__name__}. Wrap it in nn.Sequential.")
    scripted = next((n or "model" for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    paths = skipped_paths(model, skip)
    if scripted is not None:
        raise ModelError(f"A model is plain PyTorch, but got TorchScript at {scripted}. Give the original module.")
    tape = _trace(model, example_inputs, paths)
    _refuse_unseen(tape, model, example_inputs, paths)
    prepared = QuantizedModel(model, make_plan(tape, model, paths)).eval()
    tolerance = TOLERANCE if tape.decomposed else 0.0
    verify_float(model, prepared, example_inputs, tolerance)
    try:
        verify_float(model, prepared, tree_map(_other_batch, example_inputs), tolerance)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ModelError(
            f"The model must run at any batch size, but at one more sample got: {str(error).splitlines()[0]}. "
            "Take the batch size from the input's shape."
        ) from error
    return prepared


def skipped_paths(model: nn.Module, skip: Sequence[str | type[nn.Module]]) -> frozenset[str]:
    """Paths of the modules that `skip` names, by path, class name or class. Raises ModelError where none answers."""
    found: set[str] = set()
    for wanted in skip:
        paths = {
            path
            for path, module in model.named_modules()
            if path and (path == wanted or type(module).__name__ == wanted or type(module) is wanted)
        }
        if not paths:
            raise ModelError(
                f"quant.skip names modules or classes of the model, but got {wanted!r}. "
                f"There are: {', '.join(list(dict(model.named_modules()))[1:6])}."
            )
        found |= paths
    return frozenset(p for p in found if not any(p.startswith(f"{other}.") for other in found))


def _trace(model: nn.Module, inputs: Any, skip: Collection[str]) -> Tape:
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        tape = trace(model, inputs, skip)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"The model must run on a batch of its data, but got: {text}. Check task.model and task.data."
        ) from error
    changed = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, state[name])]
    if changed:
        raise ModelError(
            f"A model in eval mode keeps no state between calls, but got {changed[0]} changed by one. "
            "Reset it in forward."
        )
    names = [name for name, _ in tape.outputs]
    if len(set(names)) < len(names):
        raise ModelError(f"Outputs have different names, but got {sorted(names)}. Rename the keys.")
    if not tape.outputs:
        raise ModelError("A model has outputs computed from its inputs, but tracing found none. Return tensors.")
    return tape


def _refuse_unseen(tape: Tape, model: nn.Module, inputs: Any, skip: Collection[str]) -> None:
    """Refuse a model in which a "constant" changes with the inputs: its way to the operator was not seen."""
    if not tape.fingerprints:
        return
    other = trace(model, tree_map(_other_values, inputs), skip).fingerprints
    for name, (reader, values) in tape.fingerprints.items():
        if name in other and other[name][1] != values:
            raise ModelError(
                f"Tensors reach an operator through PyTorch operators, but got {name}, read by {reader}, computed "
                "where tracing cannot see it (NumPy, TorchScript) or at random. Write it in torch and make the model "
                "deterministic in eval mode, or skip the module (quant.skip)."
            )


def _other_values(value: Any) -> Any:
    """The same shapes with other values: what depends on them changes."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value * 0.97 + 0.003
    return value


def _other_batch(value: Any) -> Any:
    """The same data at another batch size: batch n -> n + 1, the first item repeated at the end."""
    return torch.cat([value, value[:1]]) if isinstance(value, Tensor) and value.ndim > 0 else value


def verify_float(model: nn.Module, prepared: QuantizedModel, inputs: Any, tolerance: float = 0.0) -> None:
    """Refuse a prepared model whose float graph is not the model's: bit for bit, or within `tolerance` of the norm."""
    with torch.no_grad():
        expected = named_tensors(call_model(model, inputs))
        got = named_tensors(call_model(_Observed(prepared.observed), inputs))
    if [n for n, _ in expected] != [n for n, _ in got]:
        raise ModelError(
            f"The traced model must give the outputs {[n for n, _ in expected]}, but got {[n for n, _ in got]}."
        )
    for (name, a), (_, b) in zip(expected, got, strict=True):
        if torch.equal(a.nan_to_num(), b.nan_to_num()):
            continue
        difference = float((a.double() - b.double()).nan_to_num().norm())
        if difference > tolerance * float(a.double().nan_to_num().norm()):
            close = f"within {tolerance:g}" if tolerance else "bit for bit"
            raise ModelError(
                f"The traced float graph must reproduce the model {close}, but output {name} differs by "
                f"{difference:.3g}. Make the model deterministic in eval mode."
            )


class _Observed(nn.Module):
    """A function called as a module is."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)
