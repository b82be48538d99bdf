"""The guide's accuracy debugging on a bench: bad cases, layer by layer, sensitivity, advice, and whether it helps.

Each step is computed once and takes what it needs of those before it. All look at the model with every operator at
`template` (qint8, or qint16 as far as the device has it), under the default calibration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qflow.analysis.advisor import advise, override, setting
from qflow.analysis.badcase_files import BadcaseInputs
from qflow.analysis.calibration_check import calibration_findings
from qflow.analysis.candidates import candidates
from qflow.analysis.distances import Distances
from qflow.analysis.layers import compare_layers, filtered
from qflow.analysis.sensitivity import sensitivity
from qflow.analysis.tables import (
    Advice,
    BadcaseTable,
    Fidelity,
    FidelityRow,
    Finding,
    LayerTable,
    SensitivityTable,
)
from qflow.bench import Bench
from qflow.core.device import apply_rules
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.qconfig import QConfig
from qflow.core.setter import HighPrecisionOutput, ModuleNameSetter, Setter, TemplateSetter, resolve
from qflow.groundwork import Progress, silent
from qflow.quant.calibrate import apply_scales
from qflow.quant.calling import batch_size, call_model, named_tensors
from qflow.quant.capture import ReplayError


@dataclass
class Diagnosis:
    """What is known about why a calibrated model loses accuracy."""

    bench: Bench
    template: QDtype = QDtype.qint8
    badcases: BadcaseTable | None = None
    inputs: BadcaseInputs = field(default_factory=BadcaseInputs)
    layers: LayerTable | None = None
    sensitivity: SensitivityTable | None = None
    advice: tuple[Advice, ...] = ()
    fidelity: Fidelity | None = None
    findings: tuple[Finding, ...] = ()

    def find_badcases(self, progress: Progress = silent) -> BadcaseTable:
        """The calibration samples on which the quantized model differs most from float."""
        self.badcases = self.bench.find_badcases(progress, self.inputs, self.template)
        return self.badcases

    def compare_layers(self, progress: Progress = silent) -> LayerTable | None:
        """Every operator call on the bad cases, float against calibrated; `progress` counts calls.

        None, with a finding, where the model's calls cannot be run one by one.
        """
        bench = self.bench
        (cases,) = bench.cases()
        self.findings = self._calibrated()
        memory = bench.sensitivity_settings.memory_mb
        try:
            self.layers = compare_layers(bench.task.model, bench.prepared, cases, memory_mb=memory, on_op=progress)
        except ReplayError as error:
            self.findings += (Finding("layers", "check", f"no layer-by-layer comparison: {error.reason}"),)
        return self.layers

    def rank(self, progress: Progress = silent) -> SensitivityTable:
        """Sensitivity of every quantizer on the bad cases; `progress` counts rows."""
        self.sensitivity = self.bench.rank(progress, self.template)
        return self.sensitivity

    def advise(self) -> tuple[Advice, ...]:
        """What to change, by expected gain."""
        table = self.sensitivity or self.rank()
        layers = self.layers or self.compare_layers()
        self._calibrated()
        stats = self.bench.calibrate(self.bench.default_calibration)
        self.advice = advise(self.bench.prepared, stats, table, layers, self.refused)
        return self.advice

    def check_advice(self, most: int = 8) -> Fidelity:
        """Follow the first `most` lines of advice, and measure the operators that they set again."""
        chosen: list[Advice] = []
        modules: dict[str, str] = {}
        left_out: list[str] = []
        for a in self.advice or self.advise():  # each was tried alone; together two may be too much for the device
            if not a.line or len(chosen) == most:
                continue
            if reason := self.refused(a.target, a.spec, modules):
                left_out.append(f"{a.target} {a.spec} is not allowed beside the rest: {reason}")
            else:
                chosen.append(a)
                modules[a.target] = a.spec
        if not chosen:
            raise ConfigError("Advice is checked by its lines, but got none: nothing stands out or nothing is allowed.")
        table, bench = self.sensitivity or self.rank(), self.bench
        self._calibrated()
        own = {(c.node.name, c.sensitive_type, str(c.variant.quantizer.dtype)) for c in candidates(bench.prepared)}
        before_rows = {
            (r.op_name, r.sensitive_type): r for r in table.rows if (r.op_name, r.sensitive_type, r.quant_dtype) in own
        }
        before = self._outputs_off()
        calibration = bench.default_calibration
        apply_scales(bench.prepared, bench.calibrate(calibration), self.qconfig(modules), calibration)
        after = self._outputs_off()
        touched = {a.op for a in chosen} | set(modules)
        rows = [c for c in candidates(bench.prepared) if c.node.name in touched]
        exact = replace(bench.sensitivity_settings, method="exact")
        again = sensitivity(bench.task.model, bench.prepared, bench.cases(), settings=exact, rows=rows)
        found = [
            FidelityRow(r.op_name, r.sensitive_type, old.quant_dtype, r.quant_dtype, old.score, r.score)
            for r in again.rows
            if (old := before_rows.get((r.op_name, r.sensitive_type))) is not None
        ]
        self._calibrated()
        self.fidelity = Fidelity(table.metric, tuple(found), before, after, override(modules), tuple(left_out))
        return self.fidelity

    def write(
        self, folder: Path, title: str, prefixes: Sequence[str] = (), types: Sequence[str] = ()
    ) -> dict[str, Path]:
        """All tables, pictures and the page into `folder`; returns the pictures by caption.

        `prefixes` and `types` choose rows of the layer table's text.
        """
        from qflow.report.analysis_files import write_analysis  # draws: matplotlib and plotly load only here

        shown = filtered(self.layers, prefixes, types) if self.layers else None
        if shown is not None and not shown.rows:
            raise ConfigError(
                f"prefixes and types choose operators of the model, but got none with {[*prefixes, *types]}. See "
                "qflow.check for their names."
            )
        return write_analysis(
            folder,
            title,
            badcases=self.badcases,
            inputs=self.inputs,
            layers=self.layers,
            sensitivity=self.sensitivity,
            advice=self.advice,
            fidelity=self.fidelity,
            findings=self.all_findings,
            histogram=lambda operator: histogram_of(self.bench, operator),
            shown=shown,
        )

    @property
    def all_findings(self) -> tuple[Finding, ...]:
        """What the steps noticed, bad cases first, then layers and sensitivity, then what calibration shows."""
        own = [t.findings for t in (self.badcases, self.layers, self.sensitivity) if t is not None]
        return (*(finding for found in own for finding in found), *self.findings)

    def qconfig(self, modules: dict[str, str]) -> QConfig:
        """The template with some operators set, as the device would run it."""
        return self._resolved(modules)[1]

    def refused(self, operator: str, spec: str, beside: Mapping[str, str] | None = None) -> str:
        """Why the device would not keep `spec` on `operator`, and those beside it as they are; "" where it does."""
        try:
            requested, applied = self._resolved({**(beside or {}), operator: spec})
        except ConfigError as error:
            return str(error)
        for name in (operator, *(beside or {})):
            asked, kept = requested.ops[name], applied.ops[name]
            if (asked.output, asked.weight) != (kept.output, kept.weight):
                return kept.fallback or f"{kept.output} remains on {name}"
        return ""

    def _resolved(self, modules: dict[str, str]) -> tuple[QConfig, QConfig]:
        bench = self.bench
        setters: list[Setter] = [
            ModuleNameSetter({name: setting(spec) for name, spec in modules.items()}),
            HighPrecisionOutput(),
            TemplateSetter(self.template),
        ]
        requested = resolve(bench.graph, setters, bench.rules.march)
        return requested, apply_rules(bench.graph, requested, bench.rules, bench.scores)

    def _calibrated(self) -> tuple[Finding, ...]:
        """The template's scales in force, and what calibration shows."""
        bench = self.bench
        extra = bench.all(self.template)
        stats = bench.calibrate(bench.default_calibration)
        return calibration_findings(bench.prepared, stats, bench.template(self.template)[1], extra)

    def _outputs_off(self) -> float:
        """Merged distance of the outputs from float with all quantizers on."""
        bench = self.bench
        distances = Distances(bench.sensitivity_settings.metric, 1)
        with torch.no_grad():
            for inputs in bench.cases():
                with bench.prepared.recording_order() as order:
                    plain = dict(named_tensors(call_model(bench.prepared, inputs)))
                distances.reference(plain, batch_size(inputs))
                with bench.prepared.quantized(), bench.prepared.following(order):
                    distances.add(0, dict(named_tensors(call_model(bench.prepared, inputs))))
        return distances.result(0)[0]


def histogram_of(bench: Bench, operator: str) -> dict[str, Any]:
    """What a picture of an operator's values needs: counts of |x|, edges, scale, dtype and its codes."""
    node = bench.graph.by_name[operator]
    histogram = bench.calibrate(bench.default_calibration).histograms[node.quantizer or ""]
    quantizer = bench.prepared.outputs[node.quantizer or ""]
    dtype = quantizer.dtype or QDtype.qint8
    counts = histogram.counts.clone()
    counts[0] += histogram.zeros
    return {
        "counts": counts.numpy(),
        "edges": torch.linspace(0.0, histogram.limit or 1.0, len(counts) + 1).numpy(),
        "scale": float(quantizer.scale),
        "dtype_name": str(dtype),
        "qmin": dtype.qmin,
        "qmax": dtype.qmax,
        "absolute": True,
    }
