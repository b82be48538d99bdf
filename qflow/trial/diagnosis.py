"""The accuracy debugging of the tuning guide: bad cases, layer comparison, sensitivity, and advice with its check.

Each step is computed once; a step that needs an earlier one runs it. All steps analyse one model under the default
calibration: all int8, or the qconfig that `settings` ask for (a template, operators by name, an int16 ratio).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from qflow.analysis.advice.advisor import advise
from qflow.analysis.badcases.files import BadcaseInputs
from qflow.analysis.checks.calibration_check import calibration_findings
from qflow.analysis.checks.model_check import grouped
from qflow.analysis.layers.compare import compare_layers, filtered
from qflow.analysis.measures.advice import Advice, Fidelity, FidelityRow
from qflow.analysis.measures.override import override, setting
from qflow.analysis.measures.tables import BadcaseTable, Finding, LayerTable, SensitivityRow, SensitivityTable
from qflow.analysis.sensitivity.candidates import candidates
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.qconfig import QConfig
from qflow.core.settings import QConfigSettings
from qflow.trial.evaluator import Evaluator
from qflow.trial.outputs import outputs_off
from qflow.trial.precisions import Precisions
from qflow.trial.shared import Progress, silent
from qflow.trial.split_gain import split_gain

PICTURE_BINS = 1024  # of a histogram picture


@dataclass
class Diagnosis:
    """The analysis of why a calibrated model loses accuracy, filled step by step."""

    evaluator: Evaluator
    settings: QConfigSettings | None = None
    """The qconfig of the model; None is all int8, as in a study. Settings that need a ranking use the evaluator's."""
    badcases: BadcaseTable | None = None
    inputs: BadcaseInputs = field(default_factory=BadcaseInputs)
    layers: LayerTable | None = None
    sensitivity: SensitivityTable | None = None
    advice: tuple[Advice, ...] | None = None
    fidelity: Fidelity | None = None
    findings: tuple[Finding, ...] = ()
    split_gain: tuple[Finding, ...] = ()
    """Of `findings`, what splitting the calls of shared modules gives."""

    @cached_property
    def applied(self) -> QConfig | None:
        """The analysed qconfig, as the device would run it; None for all int8."""
        return None if self.settings is None else self._precisions.resolve(self.settings)[1]

    @cached_property
    def _precisions(self) -> Precisions:
        """The evaluator's precisions, ranked before the analysis.

        The analysis ranks another model; its ranking would change which operators an int16 ratio chooses.
        """
        return self.evaluator.precisions

    def find_badcases(self, progress: Progress = silent) -> BadcaseTable:
        """Find the calibration samples on which the quantized model differs most from float."""
        self.badcases = self.evaluator.find_badcases(progress, self.inputs, self.applied)
        return self.badcases

    def compare_layers(self, progress: Progress = silent) -> LayerTable:
        """Compare every operator call on the bad cases, float against calibrated; `progress` counts calls.

        A model with state is compared on the worst frame, from the state before it.
        """
        evaluator = self.evaluator
        cases = evaluator.cases()[0]
        calibrated = self._calibrated()
        self.split_gain = split_gain(evaluator, self.qconfig({}))
        self.findings = calibrated + self.split_gain
        memory = evaluator.sensitivity_settings.memory_mb
        self.layers = compare_layers(
            evaluator.weights.model, evaluator.prepared, cases, memory_mb=memory, on_op=progress
        )
        return self.layers

    def rank(self, progress: Progress = silent) -> SensitivityTable:
        """Measure the sensitivity of every quantizer on the bad cases; `progress` counts rows."""
        self.sensitivity = self.evaluator.rank(progress, self.applied)
        return self.sensitivity

    def advise(self) -> tuple[Advice, ...]:
        """Return what to change, in order of the expected gain."""
        table = self.sensitivity or self.rank()
        layers = self.layers or self.compare_layers()
        self._calibrated()
        stats = self.evaluator.calibrate(self.evaluator.default_calibration)
        self.advice = advise(self.evaluator.prepared, stats, table, layers, self.refused)
        return self.advice

    def check_advice(self, most: int = 8) -> Fidelity:
        """Apply the first `most` lines of advice, and measure the operators that they change exactly, before and after.

        Raises ConfigError if no advice has a line.
        """
        chosen, left_out = self._agreed(most)
        if not chosen:
            raise ConfigError("Advice is checked by its lines, but got none: nothing stands out or nothing is allowed.")
        table, evaluator = self.sensitivity or self.rank(), self.evaluator
        modules = {a.target: a.spec for a in chosen}
        touched = {a.op for a in chosen} | set(modules)
        self._calibrated()
        old, before = self._measured(touched, table), outputs_off(evaluator)
        evaluator.apply(self.qconfig(modules))
        new, after = self._measured(touched), outputs_off(evaluator)
        self._calibrated()
        rows = [
            FidelityRow(*key, old[key].quant_dtype, row.quant_dtype, old[key].score, row.score)
            for key, row in new.items()
            if key in old
        ]
        self.fidelity = Fidelity(table.metric, tuple(rows), before, after, override(modules), tuple(left_out))
        return self.fidelity

    def _agreed(self, most: int) -> tuple[list[Advice], list[str]]:
        """Return the first `most` pieces of advice that the device accepts together, and why others were left out."""
        chosen: list[Advice] = []
        left_out: list[str] = []
        for a in self.advise() if self.advice is None else self.advice:
            if not a.line or len(chosen) == most:
                continue
            if reason := self.refused(a.target, a.spec, {c.target: c.spec for c in chosen}):
                left_out.append(f"{a.target} {a.spec} is not allowed beside the rest: {reason}")
            else:
                chosen.append(a)
        return chosen, left_out

    def _measured(
        self, operators: set[str], known: SensitivityTable | None = None
    ) -> dict[tuple[str, str], SensitivityRow]:
        """Return exact rows of `operators` at their present dtypes, by operator and type; of `known` if complete."""
        evaluator = self.evaluator
        rows = [c for c in candidates(evaluator.prepared) if c.node.name in operators]
        own = {(c.name, c.sensitive_type, str(c.variant.quantizer.dtype)) for c in rows}
        found = [
            r for r in (known.rows if known else ()) if r.exact and (r.op_name, r.sensitive_type, r.quant_dtype) in own
        ]
        if len(found) < len(rows):  # estimates are too rough to check what an advice changed
            exact = replace(evaluator.sensitivity_settings, method="exact")
            found = list(
                sensitivity(
                    evaluator.weights.model, evaluator.prepared, evaluator.cases(), settings=exact, rows=rows
                ).rows
            )
        return {(r.op_name, r.sensitive_type): r for r in found}

    def shown_layers(self, prefixes: Sequence[str], types: Sequence[str]) -> LayerTable | None:
        """Return the layer table with the rows that the filters choose. Raises ConfigError if they choose none."""
        shown = filtered(self.layers, prefixes, types) if self.layers else None
        if shown is not None and not shown.rows:
            raise ConfigError(
                f"prefixes and types choose operators of the model, but got none with {[*prefixes, *types]}. See "
                "qflow.check for their names."
            )
        return shown

    @property
    def all_findings(self) -> tuple[Finding, ...]:
        """The findings of all steps: bad cases, layers, sensitivity, then calibration."""
        own = [t.findings for t in (self.badcases, self.layers, self.sensitivity) if t is not None]
        return grouped((*(finding for found in own for finding in found), *self.findings))

    def qconfig(self, modules: Mapping[str, str]) -> QConfig:
        """Return the qconfig of the model with `modules` set in addition, as the device would run it."""
        return self._resolved(modules)[1]

    def refused(self, operator: str, spec: str, beside: Mapping[str, str] | None = None) -> str:
        """Return why the device would not keep `spec` on `operator` together with `beside`; "" if it does."""
        try:
            requested, applied = self._resolved({**(beside or {}), operator: spec})
        except ConfigError as error:
            return str(error)
        for name in (operator, *(beside or {})):
            asked, kept = requested.ops[name], applied.ops[name]
            if (asked.output, asked.weight) != (kept.output, kept.weight):
                return kept.fallback or f"{kept.output} remains on {name}"
        return ""

    def _resolved(self, modules: Mapping[str, str]) -> tuple[QConfig, QConfig]:
        """Return (requested, applied) of the model with `modules` set in addition."""
        base, precisions = (
            self.settings or QConfigSettings(),
            self._precisions if self.settings else self.evaluator.precisions,
        )
        own = {name: setting(spec) for name, spec in modules.items()}
        return precisions.resolve(replace(base, modules={**base.modules, **own}))

    def _calibrated(self) -> tuple[Finding, ...]:
        """Apply the analysed qconfig with its scales, and return the findings of calibration."""
        evaluator, applied = self.evaluator, self.qconfig({})
        extra = evaluator.apply(applied)
        return calibration_findings(
            evaluator.prepared,
            evaluator.calibrate(evaluator.default_calibration),
            applied,
            extra,
            evaluator.rules,
            evaluator.scores,
        )


def histogram_of(evaluator: Evaluator, operator: str) -> dict[str, Any]:
    """Return what the histogram picture of an operator needs: counts of |x|, edges, scale, dtype and its codes."""
    node = evaluator.graph.by_name[operator]
    histogram = evaluator.calibrate(evaluator.default_calibration).histograms[node.quantizer or ""]
    quantizer = evaluator.prepared.outputs[node.quantizer or ""]
    dtype = quantizer.dtype or QDtype.qint8
    counts = histogram.linear(PICTURE_BINS)
    counts[0] += histogram.zeros
    return {
        "counts": counts.numpy(),
        "edges": torch.linspace(0.0, histogram.largest or 1.0, PICTURE_BINS + 1).numpy(),
        "scale": float(quantizer.scale),
        "dtype_name": str(dtype),
        "qmin": dtype.qmin,
        "qmax": dtype.qmax,
        "absolute": True,
    }
