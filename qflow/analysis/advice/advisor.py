"""The advisor: finds out why an operator is sensitive, for every operator above the noise, and what to change.

It uses the sensitivity table (how sensitive), the layer table (range on the bad cases, error of the operator alone) and
the calibration statistics (how the values lie in the range of the scale). The cause of a sensitive activation is the
first of these that applies:

    constant          the operator is a parameter or buffer, which takes the precision of the operator that reads it
    huge mask value   before a softmax, values below -1000: no dtype can represent both them and the scores
    shared module     one scale serves calls whose 99.9 % thresholds of |x| differ by a factor of more than 2
    known range       the range follows from the operator (sigmoid, softmax, clamp), and the scale covers more than
                      twice as much, or cuts values off although it covers at least about half of it
    calibration data  on the bad cases |x| exceeds 1.5 times the largest value during calibration
    truncation        the squared error beyond the range is larger than that of rounding, scale^2 / 12
    rounding          otherwise: the resolution is too low

Against the last two int16 helps. If the operator is int16 already, or is still above the noise when measured at int16,
float16 is advised if its score in the table is less than half of that at int16. Each advice is checked against the
device rules: if the march would undo it, it has no override, and the text says what to change in the float model. The
gain is the row's share of the sum of all scores.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qflow.analysis.advice.override import WEIGHT_ONLY, override
from qflow.analysis.checks.calibration_check import FAR_BELOW, UNLIKE_CALLS, call_reach
from qflow.analysis.measures.tables import Advice, LayerRow, LayerTable, SensitivityRow, SensitivityTable
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import OpKind, OpNode
from qflow.core.known_range import bounded
from qflow.quant.model.calibrate import CalibrationStats
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.weighted import WeightedLeaf
from qflow.quant.values.observer import Histogram

NOISE = 0.05  # of the most sensitive row
MOST = 16  # operators with an advice
FLOAT16_BETTER = 0.5  # float16 is better if its score is less than this times that of int16
FAR = 1.5  # bad cases are far beyond the calibration data above this times their largest value


@dataclass(frozen=True)
class Case:
    """What is known about one sensitive quantizer."""

    node: OpNode
    score: float
    histogram: Histogram | None
    layer: LayerRow | None
    scale: float
    qmin: int

    @property
    def reach(self) -> float:
        """Largest |x| that the scale can represent."""
        return self.scale * -self.qmin

    @property
    def largest(self) -> float:
        """Largest |x| of the float model on the bad cases; during calibration if layers were not compared."""
        ends = (self.layer.base_model_min, self.layer.base_model_max) if self.layer else (None, None)
        found = [abs(v) for v in ends if v is not None and math.isfinite(v)]
        return max(found) if found else (self.histogram.largest if self.histogram else 0.0)

    def clipped(self) -> tuple[float, float]:
        """(share of the values beyond the range, mean squared error that cutting them off makes)."""
        h = self.histogram
        if h is None or not h.limit or not h.size:
            return 0.0, 0.0
        width = h.limit / len(h.counts)
        total = share = error = 0.0
        first = int(self.reach / width)
        for i, count in enumerate(h.counts[first:].tolist(), first):
            over = (i + 0.5) * width - self.reach
            if over > 0 and count:
                share, error = share + count, error + count * over * over
        total = float(h.counts.sum()) + h.zeros
        return share / total, error / total

    def values(self) -> dict[str, float]:
        """Name -> value of all that an advice is based on."""
        share, error = self.clipped()
        found = {"score": self.score, "scale": self.scale, "range": self.reach, "float max": self.largest}
        found |= {"clipped share": share, "clip error": error, "rounding error": self.scale**2 / 12.0}
        if self.layer is not None:
            for name, value in (("own error", self.layer.single_error), ("accumulated error", self.layer.error)):
                if value is not None:
                    found[name] = value
        return found


def advise(
    prepared: QuantizedModel,
    stats: CalibrationStats,
    table: SensitivityTable,
    layers: LayerTable | None,
    refused: Callable[[str, str], str],
) -> tuple[Advice, ...]:
    """Advice, ordered by expected gain.

    `refused(operator, spec)` returns why the device would not keep a setting, or "". Raises ConfigError if the table
    has no rows at the model's own dtypes.
    """
    nodes = prepared.graph.by_name
    rows = [r for r in table.rows if r.quant_dtype == _dtype(prepared, nodes[r.op_name], r.sensitive_type)]
    if table.rows and not rows:
        raise ConfigError(
            f"Advice goes by rows at the model's own dtypes, but got {', '.join(table.dtypes)}. Add them to "
            "sensitivity.dtypes."
        )
    finite = [r.score for r in rows if math.isfinite(r.score)]
    total = sum(finite) or 1.0
    noise = max(NOISE * max(finite, default=0.0), statistics.median(finite) if finite else 0.0)
    weights = {r.op_name: r for r in rows if r.sensitive_type == "weight" and r.score > noise}
    activations = {r.op_name: r for r in rows if r.sensitive_type == "activation" and r.score > noise}
    scores = {(r.op_name, r.quant_dtype): r.score for r in table.rows if r.sensitive_type == "activation"}
    maker = _Maker(prepared, stats, layers, refused, scores, noise)
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
    return tuple(sorted(found, key=lambda a: -a.gain)[:MOST])


def _dtype(prepared: QuantizedModel, node: OpNode, sensitive_type: str) -> str:
    """Dtype in the model; the table may contain candidates at other dtypes as well."""
    if sensitive_type == "weight":
        return str(prepared.weights[node.weight or ""].dtype)
    return str(prepared.outputs[node.quantizer or ""].dtype)


@dataclass(frozen=True)
class _Maker:
    prepared: QuantizedModel
    stats: CalibrationStats
    layers: LayerTable | None
    refused: Callable[[str, str], str]
    scores: Mapping[tuple[str, str], float]
    """Scores of activations by operator and dtype."""
    noise: float

    def case(self, node: OpNode, row: SensitivityRow) -> Case:
        quantizer = self.prepared.outputs[node.quantizer or ""]
        rows = self.layers.rows if self.layers else ()
        layer = next((r for r in rows if r.quantizer == node.name), None)
        dtype = quantizer.dtype if quantizer.dtype is not None and quantizer.dtype.is_integer else QDtype.qint8
        histogram = self.stats.histograms.get(node.quantizer or "")
        return Case(node, row.score, histogram, layer, float(quantizer.scale), dtype.qmin)

    def activation(self, node: OpNode, row: SensitivityRow, gain: float) -> Advice:
        case = self.case(node, row)
        source = "input" if node.kind == OpKind.input else "activation"
        cause, text, spec, values = self.cause(case)
        target = node.name
        if cause == "constant":
            readers = self.prepared.graph.consumers[node.name]
            target = readers[0] if readers else node.name
        if spec == "qint16" and target == node.name and (better := self.float16(node)):
            text, spec = f"{text}; {better}", "float16"
        return self.made(node.name, cause, source, {**case.values(), **values}, text, target, spec, gain)

    def float16(self, node: OpNode) -> str:
        """The scores at int16 and fp16 as text, if int16 does not help and fp16 is better and allowed; else ""."""
        at16, at_float = (self.scores.get((node.name, dtype), math.nan) for dtype in ("qint16", "float16"))
        if not (at16 > self.noise and at_float < FLOAT16_BETTER * at16) or self.refused(node.name, "float16"):
            return ""
        return f"int16 leaves {at16:.3g}, fp16 {at_float:.3g}"

    def cause(self, case: Case) -> tuple[str, str, str, dict[str, float]]:
        """(cause, what it means, spec that removes it, values of this cause)."""
        h, name = case.histogram, case.node.name
        if case.node.kind == OpKind.constant:
            text = "a constant takes the precision of its reader: raise that, or scale the constant down in the model"
            return "constant", text, "qint16", {}
        if h is not None and min(h.batch_min, default=0.0) < -FAR_BELOW and self._masks(case.node):
            text = "a huge finite mask takes the range from the scores: write masked_fill(mask, float('-inf'))"
            return "huge mask value", text, "", {}
        reach = call_reach(self.stats, case.node.quantizer or "")
        low, high = min(reach.values(), default=0.0), max(reach.values(), default=0.0)
        if reach and high > UNLIKE_CALLS * low:
            text = "its calls need different scales: give each call a module of its own, or raise it to int16"
            return "shared module", text, "qint16", {"call min": low, "call max": high}
        bounds = bounded(self.prepared.graph).get(name)
        if bounds is not None and all(map(math.isfinite, bounds)):
            most = max(abs(bounds[0]), abs(bounds[1]))
            wasted, cut = case.reach > 2.0 * most, most >= case.largest > 1.05 * case.reach > 0.5 * most
            if most > 0 and (wasted or cut):
                text = f"its range is {bounds[0]:g}..{bounds[1]:g} whatever the data: fix the scale"
                return "known range", text, f"qint8@{bounds[0]:g}..{bounds[1]:g}", {"known max": most}
        if h is not None and case.largest > FAR * h.largest:
            text = "the bad cases go far beyond the calibration data: add such samples to it"
            return "calibration data", text, "", {"calibration max": h.largest}
        share, error = case.clipped()
        if error > case.scale**2 / 12.0:
            text, scale = f"{share:.3%} of the values are cut off: ", h.largest / -case.qmin if h else math.inf
            enough = scale**2 / 12.0 < error
            text += f"use int16, or int8 with a scale of {scale:.3g}" if enough else "covering them needs int16"
            return "truncation", text, "qint16", {}
        text = "the resolution is too low for what follows"
        if 0 < case.largest < case.reach / 4.0:
            codes = max(1, round(case.largest / case.scale))
            text += f": the bad cases reach {case.largest:.3g} of {case.reach:.3g}, {codes} of {-case.qmin} codes"
        return "rounding", text, "qint16", {}

    def _masks(self, node: OpNode) -> bool:
        seen, stack = set(), [node.name]
        nodes, consumers = self.prepared.graph.by_name, self.prepared.graph.consumers
        while stack:
            for reader in consumers[stack.pop()]:
                if nodes[reader].kind == OpKind.softmax:
                    return True
                if reader not in seen and nodes[reader].kind in (OpKind.add, OpKind.move, OpKind.arithmetic):
                    seen.add(reader)
                    stack.append(reader)
        return False

    def weight(self, node: OpNode, row: SensitivityRow, gain: float) -> Advice:
        values, spread = self.weight_values(node, row)
        text = "the weight's resolution is too low"
        if spread > 100.0:
            text += f": single values of a channel are {spread:.0f} times the usual one, clip or regularize them"
        return self.made(node.name, "rounding", "weight", values, text, node.name, WEIGHT_ONLY, gain)

    def dual(self, node: OpNode, activation: SensitivityRow, weight: SensitivityRow, gain: float) -> Advice:
        values, _ = self.weight_values(node, weight)
        own = {**self.case(node, activation).values(), "weight score": weight.score}
        text = "weight and activation are both sensitive: "
        reason = self.refused(node.name, "qint16/qint16")
        if reason:
            text += "the device has no dual int16 here; in the float model, clip or regularize the weight"
        return self.made(
            node.name,
            "dual int16",
            "weight and activation",
            {**own, "weight values over median": values["largest over median"]},
            text + ("" if reason else "int16 for both"),
            node.name,
            "qint16" if reason else "qint16/qint16",
            gain,
        )

    def weight_values(self, node: OpNode, row: SensitivityRow) -> tuple[dict[str, float], float]:
        """Values for a weight's advice, and the largest over the median |w| of a channel (worst channel)."""
        quantizer = self.prepared.weights[node.weight or ""]
        leaf = dict(self.prepared.model.named_modules()).get(node.weight or "")
        weight = leaf.folded()[0] if isinstance(leaf, WeightedLeaf) else self.stats.weights.get(quantizer.name)
        spread = 0.0
        if weight is not None:
            flat = weight.detach().abs().movedim(quantizer.axis, 0).reshape(weight.shape[quantizer.axis], -1)
            spread = float((flat.amax(1) / flat.median(1).values.clamp_min(1e-12)).max())
        largest = float(quantizer.scale.max())
        return {"score": row.score, "largest scale": largest, "largest over median": spread}, spread

    def made(
        self,
        op: str,
        cause: str,
        source: str,
        values: Mapping[str, float],
        text: str,
        target: str,
        spec: str,
        gain: float,
    ) -> Advice:
        """The advice, without an override if the device would undo it or nothing would change."""
        node = self.prepared.graph.by_name[target]
        if spec == "qint16" and node.quantizer and _dtype(self.prepared, node, "activation") == spec:
            text, spec = f"{text}; {target} is int16 already", ""
        reason = self.refused(target, spec) if spec else ""
        if reason:
            text, spec = f"{text}; {spec} is not kept here: {reason}", ""
        kept = tuple((k, v) for k, v in values.items() if math.isfinite(v))
        line = override({target: spec}) if spec else ""
        if spec and not line:
            text += f"; its name cannot stand on a command line, in a file write modules: {{'{target}': {spec}}}"
        return Advice(op, cause, source, kept, text, line, gain, target if spec else "", spec)
