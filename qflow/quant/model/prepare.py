"""`prepare` makes a `QuantizedModel` with named quantizers from a float model, which it leaves unchanged.

A model that was traced wrongly is refused. The float graph of the prepared model is compared with the model on the
example and at another batch size, bit for bit (within 1e-4 of the norm where attention was decomposed). A value that
is computed outside of torch operators (NumPy, TorchScript) is found by tracing twice, on different inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qflow.core.errors import ModelError, QflowError
from qflow.core.signature import mismatch
from qflow.quant.model.find_state import changed, held_values, parameter_values, unnamed_state
from qflow.quant.model.module_names import Named, matching
from qflow.quant.model.plan import make_plan
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.shared_modules import REPORT, split_paths
from qflow.quant.model.temporal import settled, verify_sequence
from qflow.quant.model.verify import holder, verify_float
from qflow.quant.trace.calling import batch_size, map_named, state_tensors
from qflow.quant.trace.ops import is_leaf
from qflow.quant.trace.state import cached_state
from qflow.quant.trace.tape import Tape
from qflow.quant.trace.trace import trace_filled

T = TypeVar("T")
Skip = Named
"""Modules that stay float: by path, class name or class; one, or several."""
TOLERANCE = 1e-4
"""In float32, a float graph with decomposed attention may differ from the model by this much, relative to the norm."""


def prepare(
    model: nn.Module,
    example_inputs: Any,
    skip: Skip = (),
    fold_functional_norms: bool = False,
    cached_attrs: str | Iterable[str] = (),
    split_shared: Named = REPORT,
) -> QuantizedModel:
    """Trace `model` (eval mode) on `example_inputs`, fuse, place quantizers, and prove the float graph unchanged.

    `example_inputs` is a tensor, a tuple to splat or a dict of keyword arguments; the batch axis comes first.
    `skip` are module names, class names or classes that stay in float. `fold_functional_norms` folds an `F.batch_norm`
    on a module's own statistics as an nn.BatchNorm2d. `cached_attrs` are the attributes in which the model keeps state
    from call to call; their present values are the state at the start of a sequence. `split_shared` names modules whose
    calls get a quantizer each, or is `auto` or `report` (shared_modules.py). Raises ModelError where the model cannot
    run, has no float output, keeps other state, or the comparison fails.
    """
    if model.training:
        raise ModelError("A model is prepared in eval mode, but got one in train mode. Call model.eval() first.")
    if is_leaf(model):
        raise ModelError(f"A model holds modules, but got a single {type(model).__name__}. Wrap it in nn.Sequential.")
    _refuse_compiled(model)
    paths = skipped_paths(model, skip)
    split = split_paths(model, split_shared, paths)
    if not any(module.training for module in model.modules()):
        model.eval()  # empties caches that eval() empties, as it will in the copy: what fills them is traced
    cached = cached_state(model, cached_attrs)
    inputs = example_inputs
    if cached is not None:
        inputs = _runs(model, example_inputs, functools.partial(settled, model, cached, example_inputs))
    tape = _trace(model, inputs, paths)
    prepared = QuantizedModel(model, make_plan(tape, model, paths, fold_functional_norms, split), cached).eval()
    tolerance = TOLERANCE if tape.decomposed else 0.0
    try:
        _verify(model, prepared, inputs, tape.results, tolerance)
    except ModelError as error:
        found = holder(model)
        if not found:
            raise
        raise ModelError(
            "A function that a model keeps must not hold the model itself, because a prepared model is a copy, but got "
            f"{found}. Make it a method."
        ) from error
    return prepared


def _refuse_compiled(model: nn.Module) -> None:
    """Raise ModelError for TorchScript and torch.compile: the operators of compiled code cannot be traced."""
    for path, module in model.named_modules():
        at = path or "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"A model is plain PyTorch, but got TorchScript at {at}. Give the original module.")
        if "_orig_mod" in module._modules:
            way_out = f"Give {path or 'model'}._orig_mod in its place, and compile what prepare returns."
        elif module._compiled_call_impl is not None:
            way_out = "Give the model before its compile() was called, and compile what prepare returns."
        elif hasattr(module.forward, "_torchdynamo_orig_callable"):
            way_out = "Leave out torch.compile on its forward, and compile what prepare returns."
        else:
            continue
        raise ModelError(f"A model is plain PyTorch, but got torch.compile at {at}. {way_out}")


def _verify(
    model: nn.Module, prepared: QuantizedModel, inputs: Any, traced: Mapping[str, Tensor], tolerance: float
) -> None:
    verify_float(model, prepared, inputs, tolerance, traced)
    if prepared.cached is not None:
        verify_sequence(model, prepared, inputs.inputs, tolerance)
    try:
        if (more := _at_other_batch(model, prepared, inputs)) is not None:
            verify_float(model, prepared, more, tolerance)
    except QflowError:
        raise
    except Exception as error:  # the user's forward may raise anything
        raise ModelError(
            f"The model must run at any batch size, but at one more sample got: {first_line(error)}. "
            "Take the batch size from the input's shape."
        ) from error


def _at_other_batch(model: nn.Module, prepared: QuantizedModel, inputs: Any) -> Any:
    """The inputs at batch size n + 1; None for a state that starts as tensors for batch size n, which is noted."""
    cached = prepared.cached
    if cached is None:
        return _one_more(inputs)
    try:
        return settled(model, cached, _one_more(inputs.inputs))
    except Exception:  # whatever a state of another batch size causes
        held = [name for name, _ in state_tensors(cached.initial)]
        if not held:
            raise
        graph = prepared.graph
        note = f"{held[0]} starts with a batch size of its own: only that of the example inputs was checked"
        prepared.plan = replace(prepared.plan, graph=replace(graph, notes=(*graph.notes, note)))
        return None


def first_line(error: Exception) -> str:
    """First line of the message of an exception that the user's code raised."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def skipped_paths(model: nn.Module, skip: Skip) -> frozenset[str]:
    """Paths of the modules that `skip` names by path, class name or class. Raises ModelError if one has no match."""
    found = matching(model, skip, "quant.skip")
    return frozenset(p for p in found if not any(p.startswith(f"{other}.") for other in found))


def _runs(model: nn.Module, inputs: Any, call: Callable[[], T]) -> T:
    try:
        return call()
    except QflowError:
        raise
    except Exception as error:  # the user's forward may raise anything
        text = f"{first_line(error)}{mismatch(model.forward, inputs)}"
        raise ModelError(
            f"The model must run on a batch of its data, but got: {text}. Check task.model and task.data."
        ) from error


def _trace(model: nn.Module, inputs: Any, skip: Collection[str]) -> Tape:
    before, weights = held_values(model), parameter_values(model)
    others = [map_named(_other_values, inputs), map_named(_other_floats, inputs)]
    tape, other = _runs(model, inputs, lambda: trace_filled(model, inputs, skip, others=others))
    if written := changed(weights, parameter_values(model)):
        raise ModelError(
            f"A model in eval mode keeps its parameters, but got {', '.join(written[:3])} changed by a call. "
            "Let forward compute with a changed copy, without writing to the parameter."
        )
    state = unnamed_state(model, inputs, others[0], before)
    if state:
        named = ", ".join(f'"{path}"' for path in state) + "," * (len(state) == 1)
        raise ModelError(
            f"A model in eval mode keeps no state between calls, but got {', '.join(state)} changed by one. Name all "
            f"its state, cached_attrs=({named}) (task.cached_attrs in a task), or reset it in forward."
        )
    names = [name for name, _ in tape.outputs]
    if len(set(names)) < len(names):
        raise ModelError(f"Outputs have different names, but got {sorted(names)}. Rename the keys.")
    if not tape.outputs:
        raise ModelError("A model has outputs computed from its inputs, but tracing found none. Return tensors.")
    if other is not None:
        _refuse_unseen(tape, other)
    return tape


def _refuse_unseen(tape: Tape, other: Tape) -> None:
    """Refuse a model in which a traced "constant" changes with the inputs: tracing missed how it is computed."""
    for name, (reader, values) in tape.fingerprints.items():
        if name in other.fingerprints and other.fingerprints[name][1] != values:
            raise ModelError(
                f"Tensors reach an operator through PyTorch operators, but got {name}, read by {reader}, computed "
                "where tracing cannot see it (NumPy, TorchScript) or at random. Write it in torch and make the model "
                "deterministic in eval mode, or skip the module (quant.skip)."
            )


def _other_values(name: str, value: Tensor) -> Tensor:
    """The same shape with other values; integers are taken from another sample, so that they stay valid."""
    if value.is_floating_point() or not value.ndim:
        return _other_floats(name, value)
    return value.roll(1, 0)


def _other_floats(name: str, value: Tensor) -> Tensor:
    return value * 0.97 + 0.003 if value.is_floating_point() else value


def _one_more(inputs: Any) -> Any:
    """The same data at batch size n + 1: the first sample is repeated at the end; tensors without a batch stay."""
    size = batch_size(inputs)
    return map_named(lambda name, t: torch.cat([t, t[:1]]) if t.ndim and t.shape[0] == size else t, inputs)
