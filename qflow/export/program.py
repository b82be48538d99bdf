"""A calibrated model as one graph of torch operators, with its quantizers as operators of their own (quant_ops.py).

torch.export runs the prepared model itself, so whatever a prepared model computes is in the graph, and no operator has
to be translated by hand. What depends on parameters alone is then computed (constants.py): weights become codes.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from qflow.api.prepared import Prepared
from qflow.export.constants import fold
from qflow.export.contract import ExportError
from qflow.export.quant_ops import ExportedQuant
from qflow.quant.model.temporal import settled
from qflow.quant.trace.calling import argument_names, input_tensors, named_tensors, run_model, state_tensors
from qflow.quant.trace.state import Frame, State

_SIMPLE = (Tensor, int, float, bool, str, type(None))


@dataclass(frozen=True)
class Program:
    """The graph of a calibrated model, and how it is called: `module(*args, **kwargs)`.

    A model with temporal state takes it as the keyword `state`, a dict by attribute, and returns a dict of its
    `outputs` and its next `state`.
    """

    module: GraphModule
    """Functional: it writes into nothing."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[str, ...]
    """Names of the input tensors, in the order of the leaves of `args` and `kwargs`."""
    outputs: tuple[str, ...]
    """Names of the output tensors, in the order of the leaves of the result."""
    dynamic: bool
    """True if the batch size is free."""
    notes: tuple[str, ...] = ()

    def exported(self) -> ExportedProgram:
        """`module` as a program of torch.export; the graph may have been changed since it was made."""
        names = inspect.signature(self.module.forward).parameters
        shapes = _free_axes({**dict(zip(names, self.args, strict=False)), **self.kwargs}, self.dynamic)
        with torch.no_grad(), quiet():
            return torch.export.export(self.module, self.args, dict(self.kwargs), dynamic_shapes=shapes, strict=False)


class _Call(nn.Module):
    """Calls the prepared model under the names of its own arguments; results are made of builtin containers."""

    def __init__(self, prepared: Prepared, arguments: list[str], keywords: list[str]) -> None:
        super().__init__()
        self.prepared, self.simple = prepared, True

        def forward(*args: Any, state: Any = None, **kwargs: Any) -> Any:
            return self.run(args or kwargs, state)

        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in arguments]
        parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in keywords]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward

    def run(self, inputs: Any, state: State | None) -> Any:
        found = run_model(self.prepared, inputs if state is None else Frame(inputs, state))
        if state is None:
            return self.shown(found)
        return {"outputs": self.shown(found.outputs), "state": found.after}

    def shown(self, outputs: Any) -> Any:
        return outputs if self.simple else dict(named_tensors(outputs))


def quantized_program(prepared: Prepared, fixed: str = "") -> Program:
    """The quantized forward of `prepared` in eval mode; `fixed` is a reason not to leave the batch size free.

    Raises ExportError if torch.export cannot take the model.
    """
    frozen = copy.deepcopy(prepared).cpu().eval()
    frozen.follow_weights()
    for quantizer in frozen._keys().values():
        quantizer.__class__ = ExportedQuant
    with torch.no_grad(), frozen.quantized(), quiet():
        sample = tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, frozen.sample)
        state = None if frozen.cached is None else settled(frozen, frozen.cached, sample).state
        if state is not None:
            found = _traced(frozen, sample, state, False, "a model with state is exported for one sequence")
            return replace(found, notes=(*found.notes, *_start(frozen, state)))
        doubled, why = None if fixed else _doubled(frozen, sample), fixed or "the model takes no other"
        if doubled is not None:
            try:
                found = _traced(frozen, doubled, None, True, "")
                if found.dynamic:
                    return found
                why = "the model computes with its number"
            except ExportError:
                why = "with a free one torch.export cannot take the model"
        return _traced(frozen, sample, None, False, why)


def _start(frozen: Prepared, state: State) -> Iterator[str]:
    """What is not in the program: frames in which the state has another form than it keeps."""
    assert frozen.cached is not None
    start = frozen.cached.start(frozen)
    odd = [path for path in state if _form(start[path]) != _form(state[path])]
    if odd:
        yield (
            f"The first frames of a sequence are not in the program, because {', '.join(odd)} has another form in "
            "them: compute these with qflow, or begin with the state that the model has after them."
        )


def _form(state: Any) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in named_tensors(state)]


def _traced(frozen: Prepared, inputs: Any, state: State | None, free: bool, why: str) -> Program:
    """The program on these inputs; `why` is the reason for a batch size that is not free."""
    args, kwargs = _arguments(inputs)
    names = argument_names(frozen.model, len(args))
    if state is not None:
        kwargs["state"] = state
    call = _Call(frozen, names, list(kwargs))
    result = call.run(inputs, state)
    call.simple = _is_simple(result["outputs"] if state is not None else result)
    result = call.run(inputs, state)
    shapes = _free_axes({**dict(zip(names, args, strict=True)), **kwargs}, free)
    try:
        exported = torch.export.export(call, args, kwargs, dynamic_shapes=shapes, strict=False)
        exported = exported.run_decompositions({})
        module = exported.module()
        fold(module)
    except Exception as error:  # torch.export raises many types
        raise _refused(error) from error
    held = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    sizes = [v.shape[0] for v in held if isinstance(v, Tensor) and v.ndim > 0]
    dynamic = bool(sizes) and all(map(_is_free, sizes))  # one that is not would hold the size of the doubled sample
    tensors = input_tensors(frozen.model, inputs if state is None else Frame(inputs, state))
    given = tuple(name for name, _ in tensors)
    size = next((t.shape[0] for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim), 1)
    return Program(
        module,
        args,
        kwargs,
        given,
        tuple(f"output.{name}" if name in given else name for name in _output_names(result, state is not None)),
        dynamic,
        () if dynamic else (f"The batch size is fixed at {size}: {why}.",),
    )


def _output_names(result: Any, stateful: bool) -> Iterator[str]:
    outputs = result["outputs"] if stateful else result
    for name, _ in named_tensors(outputs):
        yield f"output{name}" if name[:1].isdigit() else name
    for name, _ in state_tensors(result["state"]) if stateful else ():
        yield f"next.{name}"


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _doubled(model: nn.Module, sample: Any) -> Any:
    """The sample twice, because torch.export takes a size of 1 as a constant; None if the model does not run on it."""
    two = tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim and t.shape[0] == 1 else t, sample)
    try:
        run_model(model, two)
    except Exception:  # whatever the user's code raises
        return None
    return two


def _free_axes(arguments: Mapping[str, Any], free: bool) -> Any:
    """The first axis of each tensor as torch.export takes it: free, unless the model fixes it."""
    return tree_map(lambda v: {0: Dim.AUTO} if free and isinstance(v, Tensor) and v.ndim else None, dict(arguments))


def _is_free(size: Any) -> bool:
    """True for a size that no operator has fixed."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _is_simple(outputs: Any) -> bool:
    if type(outputs) in (tuple, list):
        return all(map(_is_simple, outputs))
    return all(map(_is_simple, outputs.values())) if type(outputs) is dict else isinstance(outputs, _SIMPLE)


def _refused(error: Exception) -> ExportError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    found = re.findall(r'File "([^"]*)", line (\d+)', str(error))
    place = next((f" at {Path(f).name}:{n}" for f, n in reversed(found) if f"{os.sep}torch{os.sep}" not in f), "")
    return ExportError(
        f"torch.export takes a model whose path does not depend on values, but got: {lines[0][:200]}{place}. Write the "
        "choice as torch.where, or export to a target that needs no graph: plugin, qflow."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings and logs: on a refusal torch.export prints the graph so far, which is no help to the user."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
