"""Finite masks of a softmax: -10000, -1e9 or finfo.min, where the code means "masked out".

-inf does not count in the range of a quantizer (quant/trace/masks.py), but a finite number does, and takes the codes
from the scores. A mask may be an input, a constant or computed from integers or booleans, and it may be added,
subtracted, filled in or chosen by `where`. It is recognized by its values and by where it goes:

    before a softmax   a softmax reads the values, through moves, arithmetic and adds
    apart              an empty stretch of the histogram lies between the scores and the mask, wider than 16 (softmax
                       gives what is 16 lower a weight of exp(-16) = 1e-7) and wider than the scores themselves
    no GEMM's result   the values, or one of the operands, are not computed from the result of a GEMM, as scores are

The operator where scores and mask meet is named if its scale leaves the scores fewer than 32 codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qflow.analysis.measures.tables import Finding
from qflow.core.graph import GEMM_KINDS, ModelGraph, OpKind, OpNode
from qflow.quant.model.calibrate import CalibrationStats
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.values.observer import Histogram

APART = 16.0  # exp(-16) = 1e-7, the resolution of float32
FEW = 32  # codes for the scores; a quarter of what int8 has
WAY_OUT = "write scores.masked_fill(mask, float('-inf')) right before the softmax: -inf does not count in the range"
_ON_THE_WAY = frozenset(
    {OpKind.move, OpKind.add, OpKind.mul, OpKind.arithmetic, OpKind.concat, OpKind.relu, OpKind.resize, OpKind.other}
)


@dataclass(frozen=True)
class FiniteMask:
    """Values of one operator that a finite mask lies far below."""

    low: float
    """The smallest value: the mask."""
    scores: float
    """Largest |x| of the values that are not masked; 0 if there are none but zeros."""
    codes: float
    """How many codes the present scale leaves them; infinite without an integer scale."""
    meets: bool
    """The scores and the mask meet here, and no mask has reached the scores before."""

    @property
    def harmful(self) -> bool:
        """Whether too few codes are left."""
        return self.meets and self.codes < FEW


def finite_masks(prepared: QuantizedModel, stats: CalibrationStats) -> dict[str, FiniteMask]:
    """Return the operators whose values hold a finite mask of a softmax."""
    graph = prepared.graph
    before, plain = _before_softmax(graph), _without_gemm(graph)
    holding: dict[str, FiniteMask | None] = {}  # None: a move of values that hold a mask
    for node in graph.nodes:
        given = [name for name in node.inputs if name in holding]
        if node.name not in before:
            continue
        h = stats.histograms.get(node.quantizer or "")
        if h is None:
            if given:
                holding[node.name] = None
            continue
        found = _apart(h, node.name in plain)
        masks = node.name in plain or "where" in node.op_type or "masked_fill" in node.op_type
        if found is None or not (masks or given or any(name in plain for name in node.inputs)):
            continue
        scale = float(prepared.outputs[node.quantizer or ""].scale)
        codes = found[1] / scale if scale > 0.0 and _is_integer(prepared, node) else float("inf")
        last = not any(name in before for name in graph.consumers[node.name])
        met = any(_met(name, holding, graph) for name in given)
        holding[node.name] = FiniteMask(*found, codes, meets=(node.name not in plain or last) and not met)
    return {name: mask for name, mask in holding.items() if mask is not None}


def mask_findings(masks: Mapping[str, FiniteMask]) -> list[Finding]:
    """Return one finding for all operators at which a finite mask leaves the scores too few codes."""
    harmful = {name: mask for name, mask in masks.items() if mask.harmful}
    if not harmful:
        return []
    first, *others = harmful
    mask = harmful[first]
    also = f" (so do {len(others)} more masks: {', '.join(others[:3])}{', ...' * (len(others) > 3)})" if others else ""
    return [Finding(first, "check", f"{mask_text(mask)}{also}. Way out: {WAY_OUT}")]


def mask_text(mask: FiniteMask) -> str:
    """Return what a finite mask does to the scores."""
    return (
        f"values down to {mask.low:.4g} before a softmax: such a mask takes the range from the scores, which reach "
        f"{mask.scores:.3g} and keep {mask.codes:.0f} codes"
    )


def _apart(h: Histogram, either_sign: bool) -> tuple[float, float] | None:
    """(smallest value, largest |x| of the scores) if an empty stretch parts the values; else None."""
    lower_edges, upper_edges, _ = h.filled()
    upper = 0.0
    for lower, next_upper in zip(lower_edges.tolist(), upper_edges.tolist(), strict=True):
        if lower - upper > APART and lower >= 2.0 * upper:
            break
        upper = next_upper
    else:
        return None
    low, high = min(h.batch_min), max(h.batch_max)
    negative = high <= upper
    if not negative and not (either_sign and low >= -upper):
        return None
    return (low, high if high > 0.0 else upper) if negative else (high, upper)


def _before_softmax(graph: ModelGraph) -> set[str]:
    """Operators whose result a softmax reads, through operators that keep a mask a mask."""
    found: set[str] = set()
    for node in reversed(graph.nodes):
        for name in graph.consumers[node.name]:
            reader = graph.by_name[name]
            passes = reader.kind in _ON_THE_WAY or reader.fused_add or "addbmm" in reader.op_type
            softmax = reader.kind == OpKind.softmax and "log" not in reader.op_type.lower()
            if softmax or (passes and name in found):
                found.add(node.name)
    return found


def _without_gemm(graph: ModelGraph) -> set[str]:
    """Operators that are computed from inputs and constants alone, without a GEMM, a norm or a look-up."""
    kinds = GEMM_KINDS | {OpKind.norm, OpKind.layer_norm, OpKind.softmax, OpKind.grid_sample, OpKind.skipped}
    found: set[str] = set()
    for node in graph.nodes:
        if node.kind not in kinds and all(name in found for name in node.inputs):
            found.add(node.name)
    return found


def _met(name: str, holding: Mapping[str, FiniteMask | None], graph: ModelGraph) -> bool:
    """Whether the mask that `name` holds has met the scores before."""
    mask = holding[name]
    if mask is not None:
        return mask.meets or any(_met(n, holding, graph) for n in graph.by_name[name].inputs if n in holding)
    return any(_met(n, holding, graph) for n in graph.by_name[name].inputs if n in holding)


def _is_integer(prepared: QuantizedModel, node: OpNode) -> bool:
    dtype = prepared.outputs[node.quantizer or ""].dtype
    return dtype is not None and dtype.is_integer
