"""QuantizedModel: the user's model with a named quantizer after every operator and on every weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import qflow.quant.model.activation_checkpointing  # noqa: F401  # the import wraps torch.utils.checkpoint
from qflow.core.dtype import QDtype
from qflow.core.errors import ModelError
from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.core.qconfig import OpQConfig, QConfig
from qflow.core.settings import CalibrationSettings
from qflow.quant.model.leaf import leaf_type
from qflow.quant.model.model_state import QuantizerStateMixin
from qflow.quant.model.plan import Plan
from qflow.quant.model.run import Collected, Needed, Run, functionals_of, set_current_run
from qflow.quant.model.runtime import EnterScope, LeaveSkipped, Mode, enter_skipped, leaf_class, leave_scope
from qflow.quant.model.temporal_state import TemporalStateMixin, copy_at_start
from qflow.quant.model.weighted import NormScope, WeightedLeaf
from qflow.quant.trace.calling import argument_names, map_named
from qflow.quant.trace.ops import is_leaf
from qflow.quant.trace.order import Order, Ordering
from qflow.quant.trace.state import CachedState
from qflow.quant.values.fake_quant import FakeQuant
from qflow.quant.values.precision import full_precision


class QuantizedModel(TemporalStateMixin, QuantizerStateMixin):
    """The user's model with a quantizer after every operator and on every weight, all switched off at first.

    It is called like the float model. `outputs` and `weights` hold the quantizers by operator and module name. `only`,
    `quantized` and `collecting` switch them and restore the switches on leaving.
    """

    def __init__(self, float_model: nn.Module, plan: Plan, cached: CachedState | None = None) -> None:
        super().__init__()
        self.plan, self.cached = plan, cached
        self.model = copy_at_start(float_model, cached)
        self.outputs = {node.quantizer: FakeQuant(node.quantizer) for node in plan.graph.quantized if node.quantizer}
        for name in (name for node in plan.graph.quantized for name in node.inner):
            self.outputs[name] = FakeQuant(name)
            self.outputs[name].dtype = None  # float until a qconfig with the device's rules comes
        self.weights: dict[str, FakeQuant] = {}
        self.weight_shapes: dict[str, tuple[tuple[int, ...], int]] = {}
        """Weight quantizer -> the weight's shape and the axis of its output channels."""
        self.ran: set[str] = set()
        """Quantizers that ran since any quantizer was last switched."""
        self.unseen: set[str] = set()
        """Operators that ran since then without a quantizer, because they were not traced."""
        self.watch: Callable[[str, Tensor], None] | None = None
        """Called in `observed` with every operator's name and its result before its quantizer."""
        self._collect: Collected | None = None
        self._order: Ordering | None = None
        self._needed: Needed | None = None
        for name in plan.masks:
            self.outputs[name].keeps_mask = True
        self._swap()
        # Registered in a flat list: operator names hold dots and brackets, and a new child in one of the user's
        # containers would change what its loops iterate over.
        self.store = nn.ModuleList([*self.outputs.values(), *self.weights.values()])
        self.requants = nn.ModuleList()
        self._arguments: dict[str, dict[int, FakeQuant]] = {}
        self.requants_at: dict[str, dict[int, FakeQuant]] = {}
        self.place_requants({})
        self.store.to(next((p.device for p in self.model.parameters()), torch.device("cpu")))

    @property
    def graph(self) -> ModelGraph:
        """The fused graph as data."""
        return self.plan.graph

    def _swap(self) -> None:
        modules = dict(self.model.named_modules())
        for path, module in modules.items():
            if path in self.plan.skipped:
                module.register_forward_pre_hook(enter_skipped)
                module.register_forward_hook(LeaveSkipped(path), always_call=True)
            elif any(path.startswith(f"{skipped}.") for skipped in self.plan.skipped):
                continue
            elif is_leaf(module):
                self._swap_leaf(path, module, modules)
            elif path:
                if path in self.plan.functional_norms.values():
                    module.__class__ = leaf_type(NormScope, type(module))
                    module.qflow_path = path  # type: ignore[assignment]
                module.register_forward_pre_hook(EnterScope(path))
                module.register_forward_hook(leave_scope, always_call=True)
        for weight in self.plan.weights_at.values():
            self._add_weight(weight.name, weight.shape, weight.axis)

    def _swap_leaf(self, path: str, module: nn.Module, modules: dict[str, nn.Module]) -> None:
        module.__class__ = leaf_class(module)
        module.qflow_path = path  # type: ignore[assignment]
        if not isinstance(module, WeightedLeaf):
            return
        norm_path = self.plan.folds.get(path)
        # Not registered as a child: the batch norm is already a child of one of the user's modules.
        object.__setattr__(module, "qflow_norm", modules[norm_path] if norm_path else None)
        module.qflow_norm_path = norm_path
        if any(node.weight == path for node in self.plan.graph.weighted):
            axis = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
            self._add_weight(path, tuple(module.weight.shape), axis)

    def _add_weight(self, name: str, shape: tuple[int, ...], axis: int) -> None:
        self.weights[name] = FakeQuant(name, shape[axis], axis, len(shape))
        self.weight_shapes[name] = shape, axis

    def place_requants(self, requants: dict[str, dict[int, FakeQuant]]) -> None:
        """Set `requants` as the requantized inputs; constants and weights of functionals are quantized in any case."""
        self.requants_at = requants
        self.requants = nn.ModuleList(dict.fromkeys(q for slots in requants.values() for q in slots.values()))
        found: dict[str, dict[int, FakeQuant]] = {}
        for call, slots in self.plan.constants_at.items():
            for slot, name in slots.items():
                found.setdefault(call, {})[slot] = self.outputs[name]
        for call, weight in self.plan.weights_at.items():
            found.setdefault(call, {})[weight.slot] = self.weights[weight.name]
        for call, extra in requants.items():
            found.setdefault(call, {}).update(extra)
        self._arguments = found

    def arguments_of(self, call: str) -> Mapping[int, FakeQuant]:
        """Slot -> quantizer of the call's tensors that are quantized before it: constants, weights, requants."""
        return self._arguments.get(call, {})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward with the active quantizers; with none active, exactly the float model."""
        if self._collect is None and self._order is None and not any(q.enabled for q in self._quantizers()):
            return self.model(*args, **kwargs)
        return self.observed(*args, **kwargs)

    def observed(self, *args: Any, **kwargs: Any) -> Any:
        """The forward with every operator followed (`watch`, `ran`, `unseen`), even if no quantizer is active."""
        run = Run(
            self.plan, self.outputs, self.weights, self._arguments, self._collect, watch=self.watch, order=self._order,
            sited=not torch.compiler.is_compiling(), needed=None if self.watch or self._collect else self._needed,
        )  # fmt: skip
        before = set_current_run(run)
        try:
            args, kwargs = self._quantize_inputs(run, args, kwargs)
            self._quantize_state(run)
            with full_precision(), Mode(run):
                out = self.model(*args, **kwargs)
            run.require_norms()
        finally:
            set_current_run(before)
            self.ran |= run.ran
            self.unseen |= run.unseen
        return out

    @property
    def overflowed(self) -> dict[str, int]:
        """fp16 quantizer -> number of finite values beyond half precision, over all calls so far; without zeros."""
        counts = {name: int(q.overflowed) for name, q in self.outputs.items() if q.dtype == QDtype.float16}
        return {name: count for name, count in counts.items() if count}

    @property
    def uncalibrated(self) -> list[str]:
        """Names of the quantizers that need a scale and have none."""
        return [q.name for q in self._keys().values() if q.dtype and q.dtype.is_integer and not q.calibrated]

    def _quantizers(self) -> Iterator[FakeQuant]:
        yield from self.outputs.values()
        yield from self.weights.values()
        yield from self.requants  # type: ignore[misc]

    def _quantize_inputs(self, run: Run, args: Any, kwargs: Any) -> Any:
        def quantize(name: str, value: Tensor) -> Any:
            return run.finish(f"quant[{name}]", value, None)

        names = argument_names(self.model, len(args))
        args = tuple(map_named(quantize, value, name) for name, value in zip(names, args, strict=True))
        return args, {name: map_named(quantize, value, name) for name, value in kwargs.items()}

    # ---- states; each context manager restores the state before it -----------------------------------------------

    def configure(self, qconfig: QConfig) -> None:
        """Set all dtypes and clear the scale where one changes. Raises ModelError for the qconfig of another graph."""
        rows = self.plan.graph.quantized
        missing = [n.name for n in rows if n.name not in qconfig.ops]
        unknown = sorted(set(qconfig.ops) - {n.name for n in rows})
        if missing or unknown:
            raise ModelError(
                f"A qconfig names the operators of its model, but got none for {missing[:3]} and unknown {unknown[:3]}."
            )
        requants: dict[str, dict[int, FakeQuant]] = {}
        on = all(q.enabled for q in self.outputs.values())
        for node in rows:
            op = qconfig.ops[node.name]
            self.outputs[node.quantizer].retype(op.output)  # type: ignore[index]
            for name in node.inner:
                self.outputs[name].retype(op.inner)
            for position, dtype in enumerate(op.input or ()):
                if dtype is None:
                    continue
                quantizer = FakeQuant(f"{node.name}:{position}")
                quantizer.dtype, quantizer.enabled = dtype, on
                quantizer.keeps_mask = node.kind == OpKind.softmax or node.quantizer in self.plan.masks
                for reads in self.reads_of(node):  # all calls of a shared module
                    if position < len(reads):
                        call, slot = reads[position]
                        requants.setdefault(call, {})[slot] = quantizer
        self.place_requants(requants)
        owners = {n.weight: n.name for n in reversed(rows) if n.weight}
        for weight in self.weights:
            op = qconfig.ops[owners[weight]] if weight in owners else OpQConfig(output=None)
            shape, axis = self.weight_shapes[weight]
            self.weights[weight].set_axis(axis if op.weight_axis is None else op.weight_axis, shape)
            self.weights[weight].retype(op.weight or QDtype.qint8)

    def reads_of(self, node: OpNode) -> list[tuple[tuple[str, int], ...]]:
        """For each operator that shares the quantizer of `node`: the (call, slot) that reads each of its inputs."""
        return [self.plan.reads[n.name] for n in self.plan.graph.nodes if n.quantizer == node.quantizer]

    @contextmanager
    def quantized(self) -> Iterator[QuantizedModel]:
        """Switch all quantizers on."""
        with self._switched(set(self._keys())):
            yield self

    @contextmanager
    def only(
        self, outputs: Collection[str] = (), weights: Collection[str] = (), written_out: bool = False
    ) -> Iterator[QuantizedModel]:
        """Switch only the named quantizers on, with attention `written_out` everywhere or only where one acts inside.

        Raises ModelError for an unknown name or for no name.
        """
        keys = {*(("output", name) for name in outputs), *(("weight", name) for name in weights)}
        unknown = sorted(name for kind, name in keys - set(self._keys()))
        if unknown or not keys:
            raise ModelError(f"Quantizers are switched by name, but got {unknown or 'no name'}. See the model check.")
        with self._switched(keys, None if written_out else functionals_of(self.plan, outputs, weights)):
            yield self

    @contextmanager
    def collecting(self, sampling: int = CalibrationSettings.sampling, by_batch: bool = False) -> Iterator[Collected]:
        """Forward passes run in float and collect statistics, as in the plugin's CALIBRATION state."""
        self._collect, before = Collected(sampling, by_batch), self._collect
        try:
            with self._switched(set()):
                yield self._collect
        finally:
            self._collect = before

    @contextmanager
    def recording_order(self) -> Iterator[Order]:
        """Forward passes run in float and record the indices of topk, sort, argmax, ... (trace/order.py)."""
        order = Order()
        with self._switched(set()), self._ordered(order.record):
            yield order

    @contextmanager
    def following(self, order: Order) -> Iterator[QuantizedModel]:
        """In forward passes, those operators take their own values in the order of the recorded pass."""
        with self._ordered(order.follow):
            yield self

    @contextmanager
    def _ordered(self, ordering: Ordering) -> Iterator[None]:
        self._order, before = ordering, self._order
        try:
            yield
        finally:
            self._order = before

    def _keys(self) -> dict[tuple[str, str], FakeQuant]:
        return {
            **{("output", n): q for n, q in self.outputs.items()},
            **{("weight", n): q for n, q in self.weights.items()},
            **{("input", q.name): q for q in self.requants},  # type: ignore[dict-item, misc]
        }

    @contextmanager
    def _switched(self, on: Collection[tuple[str, str]], needed: Needed | None = None) -> Iterator[None]:
        quantizers, before_needed = self._keys(), self._needed
        before = {key: quantizer.enabled for key, quantizer in quantizers.items()}
        self.ran, self.unseen, self._needed = set(), set(), needed
        switch = object.__setattr__  # nn.Module's own takes ten times as long, and a ranking does it for each row
        for key, quantizer in quantizers.items():
            switch(quantizer, "enabled", key in on)
        try:
            yield
        finally:
            self._needed = before_needed
            for key, quantizer in quantizers.items():
                switch(quantizer, "enabled", before[key])


def scales(prepared: QuantizedModel) -> dict[str, float | list[float]]:
    """All scales by quantizer name: `name` for an output, `name.weight` for a weight (one scale for each channel)."""
    prepared.follow_weights()
    found: dict[str, float | list[float]] = {name: float(q.scale) for name, q in prepared.outputs.items()}
    found.update({f"{name}.weight": q.scale.flatten().tolist() for name, q in prepared.weights.items()})
    return found
