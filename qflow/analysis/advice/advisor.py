"""The advisor: finds out why an operator is sensitive, for every operator above the noise, and what to change.

It uses the sensitivity table (how sensitive), the layer table (range on the bad cases, error of the operator alone) and
the calibration statistics (how the values lie in the range of the scale). The causes are in causes.py.

Against low resolution int16 helps. If the operator is int16 already, or is still above the noise when measured at
int16, float16 is advised if its score in the table is less than half of that at int16. Each advice is checked against
the device rules: if the march would undo it, it has no override, and the text says what to change in the float model.
The gain is the row's share of the sum of all scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from qflow.analysis.advice.causes import CUT, FAR_VALUES, Case, cause_of
from qflow.analysis.checks.harmless import noise_level
from qflow.analysis.checks.mask_check import FiniteMask, finite_masks
from qflow.analysis.checks.scale_check import near_specs
from qflow.analysis.measures.advice import Advice, AdviceList
from qflow.analysis.measures.override import WEIGHT_ONLY, override
from qflow.analysis.measures.tables import LayerTable, SensitivityRow, SensitivityTable
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import OpKind, OpNode
from qflow.quant.model.calibrate import CalibrationStats
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.weighted import WeightedLeaf

MOST = 16  # operators with an advice, beside those with far values
FLOAT16_BETTER = 0.5  # float16 is better if its score is less than this times that of int16


def advise(
    prepared: QuantizedModel,
    stats: CalibrationStats,
    table: SensitivityTable,
    layers: LayerTable | None,
    refused: Callable[[str, str], str],
) -> AdviceList:
    """Advice, ordered by expected gain.

    `refused(operator, spec)` returns why the device would not keep a setting, or "". Raises ConfigError if the table
    has no rows at the model's own dtypes.
    """
    nodes = prepared.graph.by_name
    around = {name: node for node in nodes.values() for name in node.inner}
    rows = [r for r in table.rows if r.quant_dtype == _dtype(prepared, nodes.get(r.op_name), r)]
    if table.rows and all(r.op_name in around for r in rows):
        raise ConfigError(
            f"Advice goes by rows at the model's own dtypes, but got {', '.join(table.dtypes)}. Add them to "
            "sensitivity.dtypes."
        )
    finite = [r.score for r in rows if math.isfinite(r.score)]
    total = sum(finite) or 1.0
    noise = noise_level(finite)
    weights = {r.op_name: r for r in rows if r.sensitive_type == "weight" and r.score > noise}
    near = near_specs(prepared, stats)  # far values are cut off at every operator that they reach, or at none
    activations = {
        r.op_name: r
        for r in rows
        if r.sensitive_type == "activation" and r.op_name not in around and (r.score > noise or r.op_name in near)
    }
    scores = {(r.op_name, r.quant_dtype): r.score for r in table.rows if r.sensitive_type == "activation"}
    maker = _Maker(prepared, stats, layers, cache(refused), scores, noise, finite_masks(prepared, stats), near)
    found = []
    for name in dict.fromkeys([*activations, *weights]):
        activation, weight = activations.get(name), weights.get(name)
        own = sum(r.score for r in (activation, weight) if r is not None)
        gain = own / total if math.isfinite(own) else 1.0  # operators that make outputs infinite come first
        if activation is not None and weight is not None:
            found.append(maker.dual(nodes[name], activation, weight, gain))
        elif weight is not None:
            found.append(maker.weight(nodes[name], weight, gain))
        elif activation is not None:
            found.append(maker.activation(nodes[name], activation, gain))
    inner = [r for r in rows if r.op_name in around and r.score > noise]
    for node in dict.fromkeys(around[r.op_name].name for r in inner):
        found.append(maker.inside(nodes[node], [r for r in inner if r.op_name in nodes[node].inner], total))
    ordered = sorted(found, key=lambda a: -a.gain)
    return AdviceList(a for place, a in enumerate(ordered) if place < MOST or a.cause == FAR_VALUES)


def _dtype(prepared: QuantizedModel, node: OpNode | None, row: SensitivityRow) -> str:
    """Dtype in the model of the quantizer of a row; the table may contain candidates at other dtypes as well."""
    if node is not None and row.sensitive_type == "weight":
        return str(prepared.weights[node.weight or ""].dtype)
    return str(prepared.outputs[row.op_name if node is None else node.quantizer or ""].dtype)


@dataclass(frozen=True)
class _Maker:
    prepared: QuantizedModel
    stats: CalibrationStats
    layers: LayerTable | None
    refused: Callable[[str, str], str]
    scores: Mapping[tuple[str, str], float]
    """Scores of activations by operator and dtype."""
    noise: float
    masks: Mapping[str, FiniteMask]
    near: Mapping[str, str]
    """Operators whose scale covers far values, with a setting that cuts them off."""

    def case(self, node: OpNode, row: SensitivityRow) -> Case:
        quantizer = self.prepared.outputs[node.quantizer or ""]
        calls = {n.name for n in self.prepared.graph.nodes if n.quantizer == node.quantizer}
        layers = tuple(r for r in (self.layers.rows if self.layers else ()) if r.quantizer in calls)
        dtype = quantizer.dtype if quantizer.dtype is not None and quantizer.dtype.is_integer else QDtype.qint8
        histogram = self.stats.histograms.get(node.quantizer or "")
        return Case(node, row.score, histogram, layers, float(quantizer.scale), dtype)

    def activation(self, node: OpNode, row: SensitivityRow, gain: float) -> Advice:
        case = self.case(node, row)
        source = "input" if node.kind == OpKind.input else "activation"
        cause = cause_of(case, self.prepared.graph, self.stats, self.masks.get(node.name), self.near.get(node.name, ""))
        text, spec = cause.text, cause.spec
        if cause.raised and case.dtype != QDtype.qint16 and not self.refused(node.name, spec):
            text += cause.raised
        if spec == "qint16" and (better := self.float16(node)):
            text, spec = f"{text}; {better}", "float16"
        if "@" in spec and node.weight and self.prepared.weights[node.weight].dtype == QDtype.qint16:
            spec += "/qint16"  # the line leaves the weight as it is
        return self.made(node.name, cause.name, source, {**case.values(), **cause.values}, text, spec, gain)

    def inside(self, node: OpNode, rows: Sequence[SensitivityRow], total: float) -> Advice:
        """The advice for a norm or softmax whose inner values are too coarse; `rows` are theirs."""
        worst, own = max(rows, key=lambda r: r.score), sum(r.score for r in rows)
        gain = own / total if math.isfinite(own) else 1.0
        finer = sum(self.scores.get((r.op_name, "float16"), math.nan) for r in rows)
        values = {"score": own, "score of the worst": worst.score}
        text = f"the values inside are {worst.quant_dtype} whatever its dtype, and {worst.op_name} is too coarse"
        if worst.quant_dtype == "float16":
            return self.made(node.name, "values inside", "activation", values, text, "", gain)
        if math.isnan(finer):
            text += "; float16 for the operator may help, but has no sensitivities here"
        else:
            text += f": at fp16 they lose {finer:.3g} instead of {own:.3g}"
        spec = "float16" if finer < FLOAT16_BETTER * own else ""
        return self.made(node.name, "values inside", "activation", values, text, spec, gain)

    def float16(self, node: OpNode) -> str:
        """The scores at int16 and fp16 as text, if int16 does not help and fp16 is better and allowed; else ""."""
        at16, at_float = (self.scores.get((node.name, dtype), math.nan) for dtype in ("qint16", "float16"))
        if not (at16 > self.noise and at_float < FLOAT16_BETTER * at16) or self.refused(node.name, "float16"):
            return ""
        return f"int16 leaves {at16:.3g}, fp16 {at_float:.3g}"

    def weight(self, node: OpNode, row: SensitivityRow, gain: float) -> Advice:
        values, spread = self.weight_values(node, row)
        if values["largest over range"] > CUT:
            text = "the weight exceeds the range of its scale, so it has changed since: calibrate the model again"
            return self.made(node.name, "truncation", "weight", values, text, "", gain)
        text = "the weight's resolution is too low"
        if spread > 100.0:
            text += f": single values of a channel are {spread:.0f} times the usual one, clip or regularize them"
        return self.made(node.name, "rounding", "weight", values, text, WEIGHT_ONLY, gain)

    def dual(self, node: OpNode, activation: SensitivityRow, weight: SensitivityRow, gain: float) -> Advice:
        activated = self.activation(node, activation, gain)
        if "@" in activated.spec:  # a scale costs nothing; whether int16 is needed for both shows after that
            return activated
        values, _ = self.weight_values(node, weight)
        own = {**self.case(node, activation).values(), "weight score": weight.score}
        text = "weight and activation are both sensitive: "
        reason = self.refused(node.name, "qint16/qint16")
        output = self.refused(node.name, "qint16")
        if output and not self.refused(node.name, WEIGHT_ONLY):  # half of it can be had
            alone = self.weight(node, weight, gain * weight.score / (activation.score + weight.score))
            return replace(alone, text=f"{alone.text}; its output is sensitive too, but stays int8: {output}")
        if reason:
            text += "the device has no dual int16 here; equalize the layer with its neighbours (repair=basic), or clip "
            text += "or regularize the weight in the float model"
        return self.made(
            node.name,
            "dual int16",
            "weight and activation",
            {**own, "weight values over median": values["largest over median"]},
            text + ("" if reason else "int16 for both"),
            "qint16" if reason else "qint16/qint16",
            gain,
        )

    def weight_values(self, node: OpNode, row: SensitivityRow) -> tuple[dict[str, float], float]:
        """Values for a weight's advice, and the largest over the median |w| of a channel (worst channel).

        `largest over range` is the largest |w| over what the scale of its channel covers (worst channel).
        """
        quantizer = self.prepared.weights[node.weight or ""]
        leaf = dict(self.prepared.model.named_modules()).get(node.weight or "")
        weight = leaf.folded()[0] if isinstance(leaf, WeightedLeaf) else self.stats.weights.get(quantizer.name)
        spread = over = 0.0
        if weight is not None:
            flat = weight.detach().abs().movedim(quantizer.axis, 0).reshape(weight.shape[quantizer.axis], -1)
            spread = float((flat.amax(1) / flat.median(1).values.clamp_min(1e-12)).max())
            if quantizer.dtype is not None and quantizer.dtype.is_integer:
                over = float((flat.amax(1) / (quantizer.scale.detach().flatten() * -quantizer.dtype.qmin)).max())
        largest = float(quantizer.scale.max())
        found = {
            "score": row.score,
            "largest scale": largest,
            "largest over median": spread,
            "largest over range": over,
        }
        return found, spread

    def made(
        self,
        op: str,
        cause: str,
        source: str,
        values: Mapping[str, float],
        text: str,
        spec: str,
        gain: float,
    ) -> Advice:
        """The advice, without an override if the device would undo it or nothing would change."""
        node = self.prepared.graph.by_name[op]
        if spec == "qint16" and node.quantizer and str(self.prepared.outputs[node.quantizer].dtype) == spec:
            text, spec = f"{text}; it is int16 already", ""
        reason = self.refused(op, spec) if spec else ""
        if reason:
            text, spec = f"{text}; {spec} is not kept here: {reason}", ""
        kept = tuple((k, v) for k, v in values.items() if math.isfinite(v))
        line = override({op: spec}) if spec else ""
        if spec and not line:
            text += f"; its name cannot stand on a command line, in a file write modules: {{'{op}': {spec}}}"
        return Advice(op, cause, source, kept, text, line, gain, op if spec else "", spec)
