"""QuantizedModel: the user's model with a named quantizer behind every operator and on every weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import qflow.quant.recompute  # noqa: F401  # activation checkpointing, from the import on
from qflow.core.dtype import QDtype
from qflow.core.errors import ModelError
from qflow.core.graph import ModelGraph
from qflow.core.qconfig import QConfig
from qflow.core.settings import CalibrationSettings
from qflow.quant.calling import input_tensors
from qflow.quant.fake_quant import FakeQuant
from qflow.quant.ops import is_leaf
from qflow.quant.plan import Plan
from qflow.quant.run import Collected, Run, set_current_run
from qflow.quant.runtime import EnterScope, LeaveSkipped, Mode, enter_skipped, leaf_class, leave_scope
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
        self.watch: Callable[[str, Tensor], None] | None = None
        """Told every operator's result before its quantizer, in `observed`."""
        self._collect: Collected | None = None
        self._swap()
        # Registered flat under plain numbers: operator names hold dots and brackets, and a child of the user's
        # container would change how it iterates.
        self.store = nn.ModuleList([*self.outputs.values(), *self.weights.values()])
        self.requants = nn.ModuleList()
        self._arguments: dict[str, dict[int, FakeQuant]] = {}
        self._place_arguments({})
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.store.to(device)

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
                module.register_forward_pre_hook(EnterScope(path))
                module.register_forward_hook(leave_scope, always_call=True)
        for weight in self.plan.weights_at.values():
            self.weights[weight.name] = FakeQuant(
                weight.name, weight.shape[weight.axis], weight.axis, len(weight.shape)
            )

    def _swap_leaf(self, path: str, module: nn.Module, modules: dict[str, nn.Module]) -> None:
        module.__class__ = leaf_class(module)
        module.qflow_path = path  # type: ignore[assignment]
        if not isinstance(module, WeightedLeaf):
            return
        norm_path = self.plan.folds.get(path)
        # Not registered as a child: the batch norm belongs to the user's own container.
        object.__setattr__(module, "qflow_norm", modules[norm_path] if norm_path else None)
        module.qflow_norm_path = norm_path
        if any(node.weight == path for node in self.plan.graph.weighted):
            axis = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
            self.weights[path] = FakeQuant(path, int(module.weight.shape[axis]), axis, module.weight.ndim)

    def _place_arguments(self, requants: dict[str, dict[int, FakeQuant]]) -> None:
        """Which tensors of which calls are quantized before the call: constants, functional weights, `requants`."""
        self.requants = nn.ModuleList(q for slots in requants.values() for q in slots.values())
        found: dict[str, dict[int, FakeQuant]] = {}
        for call, slots in self.plan.constants_at.items():
            for slot, name in slots.items():
                found.setdefault(call, {})[slot] = self.outputs[name]
        for call, weight in self.plan.weights_at.items():
            found.setdefault(call, {})[weight.slot] = self.weights[weight.name]
        for call, extra in requants.items():
            found.setdefault(call, {}).update(extra)
        self._arguments = found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward with the active quantizers; with none active, exactly the float model."""
        if self._collect is None and not any(q.enabled for q in self._quantizers()):
            return self.model(*args, **kwargs)
        return self.observed(*args, **kwargs)

    def observed(self, *args: Any, **kwargs: Any) -> Any:
        """The forward with every operator seen, whether a quantizer is active or not."""
        run = Run(self.plan, self.outputs, self.weights, self._arguments, self._collect, watch=self.watch)
        before = set_current_run(run)
        try:
            args, kwargs = self._quantize_inputs(run, args, kwargs)
            with full_precision(), Mode(run):
                out = self.model(*args, **kwargs)
        finally:
            set_current_run(before)
            self.ran |= run.ran
            self.unseen |= run.unseen
        return out

    @property
    def overflowed(self) -> dict[str, int]:
        """fp16 quantizers that met finite values beyond half precision, with how many, over all calls so far."""
        counts = {name: int(q.overflowed) for name, q in self.outputs.items() if q.dtype == QDtype.float16}
        return {name: count for name, count in counts.items() if count}

    def _quantizers(self) -> Iterator[FakeQuant]:
        yield from self.outputs.values()
        yield from self.weights.values()
        yield from self.requants  # type: ignore[misc]

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
        requants: dict[str, dict[int, FakeQuant]] = {}
        for node in rows:
            op = qconfig.ops[node.name]
            self.outputs[node.quantizer].dtype = op.output  # type: ignore[index]
            for position, dtype in enumerate(op.input or ()):
                if dtype is not None:
                    call, slot = self.plan.reads[node.name][position]
                    quantizer = FakeQuant(f"{node.name}:{position}")
                    quantizer.dtype = dtype
                    requants.setdefault(call, {})[slot] = quantizer
        self._place_arguments(requants)
        owners = {n.weight: n.name for n in reversed(rows) if n.weight}
        for weight in self.weights:
            name = owners.get(weight)
            self.weights[weight].dtype = (qconfig.ops[name].weight if name else None) or QDtype.qint8

    @contextmanager
    def quantized(self) -> Iterator[QuantizedModel]:
        """All quantizers on."""
        with self._switched(set(self._keys())):
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
    def collecting(self, sampling: int = CalibrationSettings.sampling) -> Iterator[Collected]:
        """Float forward passes that gather statistics: the plugin's CALIBRATION state."""
        self._collect, before = Collected(sampling), self._collect
        try:
            with self._switched(set()):
                yield self._collect
        finally:
            self._collect = before

    def _keys(self) -> dict[tuple[str, str], FakeQuant]:
        return {
            **{("output", n): q for n, q in self.outputs.items()},
            **{("weight", n): q for n, q in self.weights.items()},
            **{("input", q.name): q for q in self.requants},  # type: ignore[dict-item, misc]
        }

    @contextmanager
    def _switched(self, on: Collection[tuple[str, str]]) -> Iterator[None]:
        quantizers = self._keys()
        before = {key: quantizer.enabled for key, quantizer in quantizers.items()}
        self.ran, self.unseen = set(), set()
        for key, quantizer in quantizers.items():
            quantizer.enabled = key in on
        try:
            yield
        finally:
            for key, quantizer in quantizers.items():
                quantizer.enabled = before[key]

    # ---- the float model's own state ---------------------------------------------------------------------------

    def float_state_dict(self) -> dict[str, Any]:
        """Parameters and buffers under the float model's own keys; what trained there is in it, quantizers are not."""
        return self.model.state_dict()

    def load_float_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any:
        """Take the float model's parameters and buffers; scales stay as they are."""
        return self.model.load_state_dict(state, strict)


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 inside a prepared model: it makes 78 to 86 % of int16 results wrong, by up to 11 steps (measured)."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def scales(prepared: QuantizedModel) -> dict[str, float | list[float]]:
    """All scales by quantizer name (`name` for outputs, `name.weight` for weights, one a channel)."""
    found: dict[str, float | list[float]] = {name: float(q.scale) for name, q in prepared.outputs.items()}
    found.update({f"{name}.weight": q.scale.flatten().tolist() for name, q in prepared.weights.items()})
    return found
