"""prepare: a float model in, a `QuantizedModel` with named quantizers out; the float model is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qflow.core.dtype import QDtype
from qflow.core.errors import ModelError
from qflow.core.graph import ModelGraph, OpKind
from qflow.core.qconfig import QConfig
from qflow.quant.calling import call_model, input_tensors, named_tensors
from qflow.quant.fake_quant import FakeQuant
from qflow.quant.observer import Histogram
from qflow.quant.ops import is_leaf
from qflow.quant.plan import Plan, make_plan
from qflow.quant.run import Run, set_current_run
from qflow.quant.runtime import EnterScope, Mode, leaf_class, leave_scope
from qflow.quant.tape import trace
from qflow.quant.weighted import WeightedLeaf


class QuantizedModel(nn.Module):
    """The user's model with a quantizer behind every operator and on every weight, all switched off at first.

    It is called like the float model. `outputs` and `weights` hold the quantizers by operator and module name
    (`only`, `quantized` and `collecting` switch them and restore on leaving; `ran` and `unseen` tell what happened).
    """

    def __init__(self, float_model: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.model = copy.deepcopy(float_model)
        self.outputs = {node.quantizer: FakeQuant(node.quantizer) for node in plan.graph.quantized if node.quantizer}
        self.weights: dict[str, FakeQuant] = {}
        self.ran: set[str] = set()
        """Quantizers that ran since they were last switched."""
        self.unseen: set[str] = set()
        """Operators met since then that tracing did not see."""
        self._collect: dict[str, Histogram] | None = None
        self._swap()
        # Registered flat under plain numbers: operator names hold dots and brackets, and a child of the user's
        # container would change how it iterates.
        self.store = nn.ModuleList([*self.outputs.values(), *self.weights.values()])
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.store.to(device)

    @property
    def graph(self) -> ModelGraph:
        """The fused graph as data."""
        return self.plan.graph

    def _swap(self) -> None:
        modules = dict(self.model.named_modules())
        for path, module in modules.items():
            if is_leaf(module):
                module.__class__ = leaf_class(module)
                module.qflow_path = path  # type: ignore[assignment]
                if isinstance(module, WeightedLeaf):
                    norm_path = self.plan.folds.get(path)
                    # Not registered as a child: the batch norm belongs to the user's own container.
                    object.__setattr__(module, "qflow_norm", modules[norm_path] if norm_path else None)
                    module.qflow_norm_path = norm_path
            elif path:
                module.register_forward_pre_hook(EnterScope(path))
                module.register_forward_hook(leave_scope, always_call=True)
        for node in self.plan.graph.weighted:
            assert node.weight is not None
            weight = modules[node.weight].weight
            axis = 1 if node.kind == OpKind.conv_transpose else 0
            channels = int(weight.shape[axis])  # type: ignore[index, union-attr]
            self.weights[node.weight] = FakeQuant(node.weight, channels, axis, weight.ndim)  # type: ignore[union-attr, arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward with the active quantizers."""
        run = Run(self.plan, self.outputs, self.weights, self._collect)
        before = set_current_run(run)
        try:
            args, kwargs = self._quantize_inputs(run, args, kwargs)
            with Mode(run):
                out = self.model(*args, **kwargs)
        finally:
            set_current_run(before)
            self.ran |= run.ran
            self.unseen |= run.unseen
        return out

    def _quantize_inputs(self, run: Run, args: Any, kwargs: Any) -> Any:
        named = {id(t): f"quant[{n}]" for n, t in input_tensors(self.model, kwargs if kwargs and not args else args)}

        def quantize(value: Any) -> Any:
            if isinstance(value, Tensor) and id(value) in named:
                return run.finish(named[id(value)], value, None)
            return value

        return tree_map(quantize, args), tree_map(quantize, kwargs)

    # ---- states; each restores what it found -------------------------------------------------------------------

    def configure(self, qconfig: QConfig) -> None:
        """Set every quantizer's dtype. Raises ModelError if the qconfig is not one of this graph."""
        rows = self.plan.graph.quantized
        missing = [n.name for n in rows if n.name not in qconfig.ops]
        unknown = sorted(set(qconfig.ops) - {n.name for n in rows})
        if missing or unknown:
            raise ModelError(
                f"A qconfig names the operators of its model, but got none for {missing[:3]} and unknown {unknown[:3]}."
            )
        for node in rows:
            op = qconfig.ops[node.name]
            self.outputs[node.quantizer].dtype = op.output  # type: ignore[index]
        for node in self.plan.graph.weighted:
            name = next(n.name for n in rows if n.weight == node.weight)
            self.weights[node.weight].dtype = qconfig.ops[name].weight or QDtype.qint8  # type: ignore[index]

    @contextmanager
    def quantized(self) -> Iterator[QuantizedModel]:
        """All quantizers on."""
        with self._switched({*self._keys()}):
            yield self

    @contextmanager
    def only(self, outputs: Collection[str] = (), weights: Collection[str] = ()) -> Iterator[QuantizedModel]:
        """Only the named quantizers on. Raises ModelError for an unknown name or none at all."""
        keys = {("output", name) for name in outputs} | {("weight", name) for name in weights}
        unknown = sorted(name for kind, name in keys - set(self._keys()))
        if unknown or not keys:
            raise ModelError(f"Quantizers are switched by name, but got {unknown or 'no name'}. See the model check.")
        with self._switched(keys):
            yield self

    @contextmanager
    def collecting(self) -> Iterator[dict[str, Histogram]]:
        """Float forward passes that feed the histograms: the plugin's CALIBRATION state."""
        stats: dict[str, Histogram] = {}
        self._collect, before = stats, self._collect
        try:
            with self._switched(set()):
                yield stats
        finally:
            self._collect = before

    def _keys(self) -> list[tuple[str, str]]:
        return [("output", name) for name in self.outputs] + [("weight", name) for name in self.weights]

    @contextmanager
    def _switched(self, on: set[tuple[str, str]]) -> Iterator[None]:
        quantizers = {
            **{("output", n): q for n, q in self.outputs.items()},
            **{("weight", n): q for n, q in self.weights.items()},
        }
        before = {key: quantizer.enabled for key, quantizer in quantizers.items()}
        self.ran, self.unseen = set(), set()
        for key, quantizer in quantizers.items():
            quantizer.enabled = key in on
        try:
            yield
        finally:
            for key, quantizer in quantizers.items():
                quantizer.enabled = before[key]


def prepare(model: nn.Module, example_inputs: Any) -> QuantizedModel:
    """Trace `model` (eval mode) on `example_inputs`, fuse, place quantizers, and prove the float graph unchanged.

    `example_inputs` is a tensor, a tuple to splat or a dict of keyword arguments; the batch axis comes first.
    The prepared model with quantizers off is compared bit for bit with the model, on the example and on another
    batch size. Raises ModelError where the model cannot run, has no float output, or the comparison fails.
    """
    if model.training:
        raise ModelError("A model is prepared in eval mode, but got one in train mode. Call model.eval() first.")
    if is_leaf(model):
        raise ModelError(f"A model holds modules, but got a single {type(model).__name__}. Wrap it in nn.Sequential.")
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        tape = trace(model, example_inputs)
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
    prepared = QuantizedModel(model, make_plan(tape, model)).eval()
    verify_float(model, prepared, example_inputs)
    try:
        verify_float(model, prepared, tree_map(_other_batch, example_inputs))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ModelError(
            f"The model must run at any batch size, but at one more sample got: {str(error).splitlines()[0]}. "
            "Take the batch size from the input's shape."
        ) from error
    return prepared


def _other_batch(value: Any) -> Any:
    """The same data at another batch size: batch n -> n + 1, the first item repeated at the end."""
    return torch.cat([value, value[:1]]) if isinstance(value, Tensor) and value.ndim > 0 else value


def verify_float(model: nn.Module, prepared: QuantizedModel, inputs: Any) -> None:
    """Refuse a prepared model whose float graph is not the model's, bit for bit."""
    with torch.no_grad():
        expected = named_tensors(call_model(model, inputs))
        got = named_tensors(call_model(prepared, inputs))
    if [n for n, _ in expected] != [n for n, _ in got]:
        raise ModelError(
            f"The traced model must give the outputs {[n for n, _ in expected]}, but got {[n for n, _ in got]}."
        )
    for (name, a), (_, b) in zip(expected, got, strict=True):
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            raise ModelError(
                f"The traced float graph must reproduce the model bit for bit, but output {name} differs by "
                f"{(a.double() - b.double()).abs().max().item():.3g}. Make the model deterministic in eval mode."
            )


def scales(prepared: QuantizedModel) -> dict[str, float | list[float]]:
    """All scales by quantizer name (`name` for outputs, `name.weight` for weights, one a channel)."""
    found: dict[str, float | list[float]] = {name: float(q.scale) for name, q in prepared.outputs.items()}
    found.update({f"{name}.weight": q.scale.flatten().tolist() for name, q in prepared.weights.items()})
    return found
