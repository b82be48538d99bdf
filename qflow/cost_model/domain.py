"""What the measured rows do not cover in a network: reasons to widen the interval of its latency, or to refuse it.

An operator whose price is only known as a range counts by time, with the upper end of its range. The rows contain moves
and element-wise operators, which the fit finds free, up to `SEEN` of their time by these upper ends (YOLO26n Detect
has most); only what goes beyond is unpriced. Of layer norm, grid_sample and topk or gather the rows have nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qflow.core.dtype import QDtype
from qflow.core.graph import OpKind
from qflow.cost_model.features import OpFeatures
from qflow.cost_model.model import CostModel
from qflow.cost_model.work import OpWork

WIDEN, REFUSE = 0.03, 0.20
"""Shares of the time that unpriced operators may take before the interval is widened, and before it is refused."""
ATTENTION_WIDEN, ATTENTION_REFUSE = 0.05, 0.50
"""The same of attention. The measured rows have up to 5 % of it; beyond that its price rests on one network."""
SEEN = 0.15
"""Share of the time, by upper ends, that moves and element-wise operators take in the measured rows."""
UNFUSED = frozenset({OpKind.norm, OpKind.relu})
"""Element-wise kinds that are mostly part of a convolution: whoever reads of them can look for what keeps them out."""
PRESENT = {
    "unfused": "batch norms and ReLUs outside of a convolution",
    "elementwise": "element-wise operators",
    "move": "transposes, concats, slices and other moves",
    "pool": "pooling",
    "reduce": "reductions",
}
ABSENT = {"layer_norm": "layer norm", "grid_sample": "grid_sample", "order": "topk, sort and gather"}
HOST = "a part of it runs on the host or has no price"


@dataclass(frozen=True)
class Domain:
    """`refusal` says why the latency should not be published, or is ""; `widened` says why its interval is wide.

    `int8_ms` is the BPU time of the network with every operator at int8.
    """

    refusal: str = ""
    widened: tuple[str, ...] = ()
    int8_ms: float = 0.0


def domain_of(works: Sequence[OpWork], model: CostModel, large: float, known: Mapping[str, float]) -> Domain:
    """The domain of a network whose operators are `works`, at int8; `known` are measured times, which need no price."""
    foreign = [w.name for w in works if w.engine == "host" and w.name not in known]
    if foreign:
        names = ", ".join(foreign[:3])
        return Domain(f"no price for {names}: the latency is a lower bound; compare two qconfigs only", (HOST,))
    likely, absent, attention, upper = model.fixed_ms, 0.0, 0.0, dict.fromkeys([*PRESENT, *ABSENT], 0.0)
    for work in works:
        row = _at_int8(work)
        ms = known.get(work.name, model.compute_ms(row, large)[1] + model.stream_ms(row))
        likely += ms
        attention += ms if work.attention_macs or work.softmax else 0.0
        if (group := _group(work)) in upper and work.name not in known:
            upper[group] += model.element_prices[work.priced][2] * work.passed * 1e-6 / model.clock_ghz
            absent += ms if group in ABSENT else 0.0
    int8_ms, likely = likely, likely - absent
    beyond = max(0.0, sum(upper[name] for name in PRESENT) - SEEN * likely)
    unpriced = sum(upper[name] for name in ABSENT) + beyond
    share = unpriced / (likely + unpriced) if unpriced else 0.0
    words = {**(PRESENT if beyond else {}), **ABSENT}
    most = sorted((n for n in words if upper[n] > 0.0), key=lambda n: -upper[n])[:2]
    kinds = " and ".join(words[n] for n in most)
    reasons = []
    if share > WIDEN:
        reasons.append(f"{kinds} may take {share:.0%} of the time, at prices that no board measured")
    if attention > ATTENTION_WIDEN * likely:
        name = "attention" if any(w.attention_macs for w in works) else "softmax"
        reasons.append(f"{name} takes {attention / likely:.0%} of the time, and its price comes from one network")
    if share > REFUSE or attention > ATTENTION_REFUSE * likely:
        way = "load a measured profile, or read only the change between two qconfigs"
        return Domain(f"{'; '.join(reasons)}: outside what the model was validated on; {way}", tuple(reasons), int8_ms)
    macs, depthwise = sum(w.macs for w in works), sum(w.depthwise_macs for w in works)
    if depthwise > 0.5 * macs:  # the fit gives them no cost: good enough beside other MACs, a guess for most of them
        reasons.append(f"{depthwise / macs:.0%} of the MACs are depthwise, and the measured rows give them no price")
    return Domain("", tuple(reasons), int8_ms)


def _group(work: OpWork) -> str:
    return "unfused" if work.priced == "elementwise" and work.kind in UNFUSED else work.priced


def _at_int8(work: OpWork) -> OpFeatures:
    stored = work.weights if work.kind != OpKind.constant else 0
    return OpFeatures(work, QDtype.qint8, QDtype.qint8, QDtype.qint8, 0, 0, stored)
