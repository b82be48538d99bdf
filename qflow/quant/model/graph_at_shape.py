"""A prepared model traced again at another input shape: the cost model needs the graph at that shape."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qflow.core.errors import ModelError
from qflow.core.graph import ModelGraph
from qflow.quant.model.leaf import Leaf
from qflow.quant.model.plan import make_plan
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.temporal import settled
from qflow.quant.model.temporal_state import at_start
from qflow.quant.trace.trace import trace_filled
from qflow.quant.trace.tracer import PYTHON_VALUE


def graph_at(prepared: QuantizedModel, inputs: Any, way_out: str = "Give inputs=....") -> ModelGraph:
    """The fused graph of `prepared` traced again on `inputs`.

    A loop over the samples may run operators without a quantizer more or less often there. Raises ModelError if the
    model does not run there or has other quantized operators; the message ends with `way_out`.
    """
    plan = prepared.plan
    with at_start(prepared.model, prepared.cached):
        model = _unswapped(prepared.model)
    try:
        shown = inputs if prepared.cached is None else settled(model, prepared.cached, inputs)
        tape, _ = trace_filled(model, shown, plan.skipped, plan.sites)
        graph = make_plan(tape, model, plan.skipped, plan.fold_functional_norms, plan.split).graph
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"The model must run at the shape that is costed, but got: {text}. {way_out}") from error
    odd = sorted({n.name for n in graph.quantized} ^ {n.name for n in prepared.graph.quantized})
    if odd:
        rule = "The model has the same operators at the shape that is costed"
        taken = next((note for note in graph.notes + prepared.graph.notes if PYTHON_VALUE in note), None)
        why = "a branch on the size" if taken is None else f"perhaps a branch on a value ({taken})"
        raise ModelError(f"{rule}, but got differences at {odd[:3]}: {why}. {way_out}")
    return graph


def _unswapped(model: nn.Module) -> nn.Module:
    """A copy of the user's model with its original classes; it shares the tensors with the prepared model."""
    held = [value for module in model.modules() for value in tree_leaves(vars(module))]  # caches among them
    shared: dict[int, Any] = {id(t): t for t in held if isinstance(t, Tensor)}
    original = copy.deepcopy(model, shared).eval()
    for module in original.modules():
        if isinstance(module, Leaf):
            module.__class__ = type(module).__bases__[1]
    return original
