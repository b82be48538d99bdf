"""The model of `qflow.prepare`, with what `check`, `cost` and a state dict need of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qflow.analysis.measures.tables import Finding, SensitivityTable
from qflow.api.qat_mode import QATMode
from qflow.core.errors import ModelError
from qflow.core.qconfig import QConfig
from qflow.core.record import from_dict, plain
from qflow.core.settings import CalibrationSettings
from qflow.core.shown import View
from qflow.quant.model.calibrate import CalibrationStats
from qflow.quant.model.quantized_model import QuantizedModel

ROWS = 16  # operators that `print(prepared)` lists


class Prepared(QuantizedModel):
    """A prepared model with its qconfig, both as requested and as the device will run it.

    The state dict holds everything but the statistics. Loaded into a model that was prepared from the same inputs, with
    any setters, it makes this model compute and check like the saved one. Another qconfig needs a new calibration.
    """

    requested: QConfig
    applied: QConfig
    march: str
    sample: Any
    """The first sample of the example inputs; the cost is predicted at its shape."""
    qat_mode: QATMode
    settings: CalibrationSettings = CalibrationSettings()
    stats: CalibrationStats | None = None
    findings: tuple[Finding, ...] = ()
    silent: Sequence[str] = ()
    """What `apply_scales` reported of operators without values."""
    sensitivities: SensitivityTable | None = None
    """The sensitivities that the trial of a loaded model was decided by; None otherwise."""
    scores: Mapping[str, float] = {}
    """Activation sensitivities of the last analysis by operator: the check tells by them what is worth a look."""
    _warned = False
    _calibrated = False
    """True as soon as nothing has to be said about a missing calibration."""
    _warned_of_weights = False

    def view(self) -> View:
        """Return the operators with their precision and scale; `print(prepared.model)` prints the modules."""
        graph = self.graph
        quantizers = [self.outputs[node.quantizer or ""] for node in graph.quantized]
        rows = [
            (node.name, node.op_type.rpartition(".")[2], q.dtype or "int32", self.applied.ops[node.name].weight, scale)
            for node, q in zip(graph.quantized, quantizers, strict=True)
            for scale in [float(q.scale) if q.calibrated and q.dtype is not None and q.dtype.is_integer else None]
        ]
        fused = sum(bool(node.fused) for node in graph.quantized)
        missing = len(self.uncalibrated)
        state = f"not calibrated: {missing} quantizers without a scale" if missing else "calibrated"
        title = f"Prepared {type(self.model).__name__} for {self.march}: {graph.n_operators} operators ({fused} fused)"
        return View(f"{title}, {state}", ("operator", "type", "output", "weight", "scale"), rows)

    def __repr__(self) -> str:
        return self.view().text(ROWS) if hasattr(self, "applied") else super().__repr__()

    def _repr_html_(self) -> str:
        return self.view().html()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; warn once if it is not calibrated, if operators were not traced, if weights changed since."""
        if not self._calibrated and self._collect is None and not torch.compiler.is_compiling():
            self._calibrated = True  # or the user knows now
            if self.uncalibrated and not any(quantizer.enabled for quantizer in self._quantizers()):
                warnings.warn(
                    "The prepared model is not calibrated and computes in float. Call qflow.calibrate first.",
                    stacklevel=4,  # skips the frames of nn.Module
                )
        out = super().forward(*args, **kwargs)
        quiet = torch.compiler.is_compiling() or self.training or self._collect is not None
        if not quiet and not self._warned and self.unseen:  # during calibration this becomes a finding
            self._warned = True
            first = min(self.unseen)
            warnings.warn(
                f"{len(self.unseen)} operators ran that the example inputs did not reach and stay float, {first} "
                "first. Prepare with inputs of this kind.",
                stacklevel=4,  # skips the frames of nn.Module
            )
        changed = [] if quiet or self._warned_of_weights else [n for n, q in self.weights.items() if q.changed]
        if changed:
            self._warned_of_weights = True
            warnings.warn(f"{changed[0]}: {text_of_changed(changed)}.", stacklevel=4)
        return out

    def forget_activations(self) -> None:
        """Forget the scales, statistics and findings that belong to the activations of other weights."""
        super().forget_activations()
        text = "other float weights were loaded: the scales of activations are gone, calibrate again"
        self.stats, self.findings = None, (Finding("model", "error", text),)

    def settings_state(self) -> dict[str, Any]:
        """Return the extra state as plain values."""
        kept = ("requested", "applied", "march", "settings", "findings")
        return {**super().settings_state(), "library": {name: plain(getattr(self, name)) for name in kept}}

    def restore_settings(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `settings_state` returned. Raises ModelError for a state without a qconfig."""
        if "library" not in state:
            raise ModelError("A state of qflow.prepare holds its qconfig, but got none. Save that of the same kind.")
        super().restore_settings(state)
        saved = state["library"]
        self.requested, self.applied = (from_dict(QConfig, saved[name]) for name in ("requested", "applied"))
        self.settings = from_dict(CalibrationSettings, saved["settings"])
        self.march, self.stats = saved["march"], None
        self.findings = tuple(from_dict(Finding, finding) for finding in saved["findings"])


def text_of_changed(weights: Sequence[str]) -> str:
    """Return what is said of weights that changed after the calibration, without the name of the first."""
    others = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
    text = "changed after calibration: the scale follows, those of activations do not, calibrate again"
    return f"this weight{others} {text}"
