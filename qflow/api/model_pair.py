"""The float model and the model that was prepared from it, which an analysis compares.

Both work in eval mode on one device. What is changed for that (modes, hooks, devices, a calibration in progress) is
restored when the work is done, also after an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qflow.analysis.measures.override import setting
from qflow.analysis.sensitivity.candidates import Candidate
from qflow.api.plugin_names import plugin_ranking
from qflow.api.prepared import Prepared
from qflow.config.device_file import load_rules
from qflow.core.device import apply_rules
from qflow.core.device_rules import DeviceRules
from qflow.core.errors import ConfigError, ModelError
from qflow.core.graph import ModelGraph, OpNode
from qflow.core.qconfig import OpQConfig
from qflow.core.record import digest
from qflow.core.resolve import resolve
from qflow.core.setter import ModuleNameSetter
from qflow.quant.model.quantized_model import QuantizedModel, scales
from qflow.quant.replay.capture import ReplayError, capture
from qflow.quant.replay.captured_ops import Ops
from qflow.quant.trace.binding import inputs_of
from qflow.quant.trace.calling import call_model, named_tensors

Hook = Callable[..., Any]


class ModelPair:
    """`model` and the model that `qflow.prepare` made of it, to be run on `device` (None: where `prepared` is).

    Raises ModelError for any other pair, or if `prepared` is not calibrated.
    """

    def __init__(self, model: nn.Module, prepared: Prepared, device: Any = None) -> None:
        if not isinstance(prepared, Prepared):
            raise ModelError(
                f"analysis_model is a prepared model, but got {type(prepared).__name__}. Call qflow.prepare and "
                "qflow.calibrate."
            )
        if not isinstance(model, nn.Module) or isinstance(model, QuantizedModel):
            raise ModelError(f"baseline_model is the float model, but got {type(model).__name__}. Give an nn.Module.")
        self.model, self.prepared, self.device = model, prepared, one_device(device)
        self._require_same_weights()
        self._require_scales()

    def _require_same_weights(self) -> None:
        own, wanted = dict(self.model.named_parameters()), dict(self.prepared.model.named_parameters())
        odd = sorted(own.keys() ^ wanted.keys())
        odd += [n for n in own if n in wanted and not torch.equal(own[n].cpu(), wanted[n].cpu())]
        if odd:
            raise ModelError(
                f"baseline_model is the float model that analysis_model was prepared from, but got another {odd[0]}. "
                "Give that one; after training, one with the weights of analysis_model.float_state_dict()."
            )

    def _require_scales(self) -> None:
        missing = self.prepared.uncalibrated
        if missing:
            raise ModelError(
                f"analysis_model is calibrated, but got no scale for {missing[0]}. Call qflow.calibrate first."
            )

    # ---- work

    @contextmanager
    def at_work(self, device: Any, *hooks: Hook | None) -> Iterator[torch.device]:
        """Put both models in eval mode on `device` (None: that of the pair) with forward hooks; restore them after."""
        self._require_scales()
        places = {model: _place(model) for model in (self.model, self.prepared)}
        target = one_device(device) or self.device or places[self.prepared]
        modes = [(module, module.training) for model in places for module in model.modules()]
        prepared = self.prepared
        state = prepared._collect, prepared.ran, prepared.unseen
        prepared._collect = None  # a calibration in progress must not observe bad cases
        try:
            for model, place in places.items():
                model.eval()
                if place != target:
                    model.to(target)
            with self.hooked(*hooks):
                yield target
        finally:
            prepared._collect, prepared.ran, prepared.unseen = state
            for model, place in places.items():
                if place != target:
                    model.to(place)
            for module, training in modes:
                module.training = training

    @contextmanager
    def hooked(self, *hooks: Hook | None) -> Iterator[None]:
        """Register forward hooks on both models inside the block."""
        with ExitStack() as stack:
            for hook in filter(None, hooks):
                for model in (self.model, self.prepared):
                    stack.callback(model.register_forward_hook(hook).remove)
            yield

    def inputs(self, item: Any) -> Any:
        """Return an item of the data in the form that the model takes. Raises DataError."""
        return inputs_of(self.model, self.prepared.sample, item)

    def outputs(self, case: Any, names: tuple[str, ...] | None) -> tuple[str, ...]:
        """Return the names of the float outputs on `case`, or `names`. Raises ConfigError for a name of no output."""
        with torch.no_grad():
            found = [n for n, t in named_tensors(call_model(self.model, case)) if t.is_floating_point()]
        unknown = [n for n in names or () if n not in found]
        if unknown or names == ():
            raise ConfigError(f"Outputs are of {', '.join(found)}, but got {unknown or 'none'}. Name one.")
        return tuple(found if names is None else names)

    def live(self, rows: Sequence[Candidate], case: Any) -> Sequence[Candidate]:
        """Return those of `rows` that affect an output on `case`; all if the operator calls cannot be captured."""
        try:
            captured = capture(self.model, self.prepared.plan, case, 0.0)
        except ReplayError:
            return rows
        patches = Ops(self.model, self.prepared, captured).patches
        return [row for row in rows if (row.variant.weight, row.variant.name) in patches]

    # ---- state of the prepared model

    @property
    def state(self) -> str:
        """Digest of qconfig and scales."""
        return digest({"qconfig": self.prepared.applied.digest, "scales": scales(self.prepared)})

    def refusals(self) -> Callable[[str, str], str]:
        """Return `refused(operator, spec)`: why the device would not keep it beside the present qconfig; "" if it does.

        The device file is read once for all answers.
        """
        rules = load_rules(self.prepared.march)
        return lambda operator, spec: self._refused({operator: setting(spec)}, rules)

    def agreed(self, wanted: Sequence[tuple[str, str]]) -> dict[str, str | Mapping[str, str]]:
        """Return the (operator, spec) pairs that the device keeps together; of two that conflict, the earlier."""
        found: dict[str, str | Mapping[str, str]] = {}
        rules = load_rules(self.prepared.march)
        for operator, spec in wanted:
            more = {operator: setting(spec), **found}
            found = found if operator in found or self._refused(more, rules) else {**found, operator: setting(spec)}
        return found

    def _refused(self, settings: Mapping[str, str | Mapping[str, str]], rules: DeviceRules) -> str:
        prepared, rest = self.prepared, self.prepared.requested.ops

        def present(node: OpNode, graph: ModelGraph) -> OpQConfig | None:
            return rest.get(node.name)

        named = ModuleNameSetter(settings)
        ranking = plugin_ranking(named, prepared.graph)
        try:
            requested = resolve(prepared.graph, (named, present), prepared.requested.march)
            applied = apply_rules(prepared.graph, requested, rules, ranking=ranking)
        except ConfigError as error:
            return str(error)
        for asked, kept in ((requested.ops[name], applied.ops[name]) for name in settings):
            if (asked.output, asked.weight) != (kept.output, kept.weight):
                return kept.fallback or f"{kept.output} remains"
        return ""


def only(names: Sequence[str]) -> Hook:
    """Return a forward hook that returns these outputs only. It calls no operator, so that a replay does not see it."""
    return lambda module, inputs, outputs: {n: t for n, t in named_tensors(outputs) if n in names}


def one_device(given: Any) -> torch.device | None:
    """Return `device_ids` as one device; an int is a CUDA device. Raises ConfigError for several or a missing one."""
    ids = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(ids) != 1:
        raise ConfigError(f"An analysis runs on one device, but got device_ids {ids}. Give one of them.")
    if ids[0] is None:
        return None
    try:
        probe = torch.zeros(1, device=torch.device("cuda", ids[0]) if isinstance(ids[0], int) else torch.device(ids[0]))
        probe.cpu()  # raises on the meta device, from which a model cannot be moved back
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].removesuffix(".")
        raise ConfigError(f"A device is one of this machine, but got {ids[0]!r} ({reason}). Leave it out.") from error
    return probe.device  # with its index: cuda is cuda:0


def on(device: torch.device | str, inputs: Any) -> Any:
    """Return the same structure with its tensors on `device`."""
    return tree_map(lambda v: v.detach().to(device) if isinstance(v, Tensor) else v, inputs)


def same(a: Any, b: Any) -> bool:
    """Return whether the tensors of two inputs are equal; NaN equals NaN."""
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=False)
    return all(_equal(x, y) for x, y in pairs if isinstance(x, Tensor) and isinstance(y, Tensor))


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())


def _place(model: nn.Module) -> torch.device:
    places = {t.device for t in chain(model.parameters(), model.buffers())}
    if len(places) > 1:
        raise ModelError(
            f"An analysis runs on one device, but got a model on {', '.join(sorted(map(str, places)))}. Move it to one."
        )
    return places.pop() if places else torch.device("cpu")
