"""Latency of a qconfig on Journey 6: the sum of its operators' times (model.py), each with an interval.

The interval of an operator is that of the measured int8 networks, which contains 90 % of the times that a fit without
their family predicts (fit.py), times the range of its dtypes' factors. It is [0.65, 1.5] for an operator in 16 bits,
and in a network that the measured rows do not cover (domain.py). No network was ever published both in int8 and in
int16 with its operators: the int16 factors rest on one all-int16 network (DINOv2 ViT-S, measured on nash-e and nash-m),
those of fp16 on no measurement. The ratio of two qconfigs of one network is more reliable than either latency, because
fixed costs and weights cancel.

With a measured profile (profile.py), measured times replace the formula at the dtypes that were measured; for other
dtypes they are multiplied by the formula's ratio. If the report has a total, the part that the operators do not explain
is added as a constant; if the operators add up to more (units overlap), their times are scaled to the total. Nodes on
the CPU count towards the latency only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from qflow.core.dtype import QDtype
from qflow.core.graph import ModelGraph, OpKind
from qflow.core.qconfig import OpQConfig, QConfig
from qflow.cost_model.domain import domain_of
from qflow.cost_model.features import OpFeatures, under
from qflow.cost_model.model import CostModel, Range
from qflow.cost_model.predictions import SHORT_MS
from qflow.cost_model.records import Change, CostReport, Measured, OpCost
from qflow.cost_model.traffic import lifetimes, traffic
from qflow.cost_model.work import OpWork, work_of

UNSEEN_INTERVAL = (0.65, 1.5)
MEASURED_INTERVAL = (0.88, 1.14)
"""The times of a network on one board under two tool chains differ by up to 14 %."""
TINY = 1e-9  # ms: time of a network without any work, so that its frame rate is finite


@dataclass(frozen=True)
class _Priced:
    """An operator at certain dtypes: its work, its time by the lowest, likely and highest factors, and its record."""

    row: OpFeatures
    times: Range
    boundary: Range
    """The part of `times` that is taken by conversions between int8 and int16."""
    cost: OpCost
    """The record without its share of the network and without its traffic."""


@dataclass(frozen=True)
class _Slot:
    """An operator, the operators whose outputs it reads, and what it costs by the dtypes at it, as far as asked for."""

    work: OpWork
    sources: tuple[str, ...]
    priced: dict[tuple[object, ...], _Priced] = field(default_factory=dict)


class Pricer:
    """Computes the cost of many qconfigs of a graph at its deployed shape; times that repeat are computed once."""

    def __init__(self, graph: ModelGraph, model: CostModel, measured: Measured | None = None) -> None:
        self.graph, self.model, self.measured = graph, model, measured
        self.works = work_of(graph)
        self._lifetimes = lifetimes(self.works)
        self.large = model.large_share(self.works)
        own = measured.times if measured is not None else {}
        self.domain = domain_of(self.works, model, self.large, own)
        self.usual = model.short_interval if self.domain.int8_ms < SHORT_MS else model.interval
        self.slots = [_Slot(w, tuple(dict.fromkeys(o for owners in w.inputs for o in owners))) for w in self.works]
        self._timed = [s for s in self.slots if not s.work.transparent or s.work.priced or s.work.name in own]
        self._readers: dict[str, list[_Slot]] = {}
        for slot in self.slots:
            for owner in {slot.work.owner, *slot.sources} - {None}:
                self._readers.setdefault(owner, []).append(slot)  # type: ignore[arg-type]
        self._reference = (
            {row.work.name: self._formula(row) for row in under(self.works, measured.reference.ops)} if measured else {}
        )
        leaving = [w for w in self.works if w.leaving]
        floats = sum(w.elements for w in leaving) * 1e-6 / model.float_melem_per_ms
        out, self.float_output_ms = (floats, 0.0) if model.host_dequantize else (0.0, floats)
        self.fixed_ms = model.fixed_ms + out
        self.host_ms = model.host_ms + model.host_output_ms * max(len(graph.outputs), 1)
        self.host_ms += measured.host_ms if measured is not None else 0.0
        self.overlap = 1.0
        if measured is not None and measured.total_ms is not None:
            added = self.bpu_ms(measured.reference) - self.fixed_ms
            self.fixed_ms = max(measured.total_ms - added, 0.0) + out
            self.overlap = min(measured.total_ms / added, 1.0) if added > 0 else 1.0
            for slot in self.slots:
                slot.priced.clear()

    # ---- one operator

    def _formula(self, row: OpFeatures) -> tuple[Range, Range]:
        """Times to compute and read the weights, and times to convert between int8 and int16, by factors, in ms."""
        stream = self.model.stream_ms(row)
        low, likely, high = self.model.compute_ms(row, self.large)
        return (low + stream, likely + stream, high + stream), self.model.conversion_ms(row)

    def times(self, row: OpFeatures) -> Range:
        """Time of one operator in ms, by the lowest, likely and highest factors of its dtypes."""
        return self._times(row)[0]

    def _times(self, row: OpFeatures) -> tuple[Range, Range]:
        """Time of one operator in ms, and the part of it that conversions take, by lowest, likely, highest factors."""
        found, boundary = self._formula(row)
        own = self.measured.times.get(row.work.name) if self.measured else None
        if own is not None:  # if the formula gave 0 at the measured dtypes, its present time is added
            before, held = self._reference[row.work.name]
            found = _range(own * a / b if b > 0 else own + a for a, b in zip(found, before, strict=True))
            boundary = _range(max(a - b, 0.0) for a, b in zip(boundary, held, strict=True))
        low, likely, high = (self.overlap * (t + b) for t, b in zip(found, boundary, strict=True))
        return (min(low, likely, high), likely, max(low, likely, high)), _range(self.overlap * b for b in boundary)

    def _priced(self, slot: _Slot, ops: Mapping[str, OpQConfig], given: Mapping[str, int]) -> _Priced:
        """What the operator costs under `ops`, whose outputs are `given` as ids (hashes of enum members are slow)."""
        work = slot.work
        op = ops[work.owner] if work.owner is not None else None
        own = (id(op.output), id(op.weight), op.input) if op is not None else (None,)
        key = (*own, *[given[name] for name in slot.sources])
        found = slot.priced.get(key)
        if found is None:
            (row,) = under((work,), ops)
            times, boundary = self._times(row)
            found = slot.priced[key] = _Priced(row, times, boundary, self._op(row, times))
        return found

    def _all(self, ops: Mapping[str, OpQConfig]) -> list[_Priced]:
        given = _ids(ops)
        return [self._priced(slot, ops, given) for slot in self.slots]

    def _same(self, row: OpFeatures) -> bool:
        """True if the operator computes at the dtypes at which it was measured."""
        return self._reference.get(row.work.name) == self._formula(row)

    def _op(self, row: OpFeatures, times: Range) -> OpCost:
        work, (low, ms, high) = row.work, times
        integer8 = row.input_dtype == QDtype.qint8 and row.weight_dtype in (None, QDtype.qint8) and not row.cast
        below, above = self.usual if not self.domain.widened and integer8 else UNSEEN_INTERVAL
        source = "formula"
        if self.measured and work.name in self.measured.times:
            source = "measured" if self._same(row) else "measured, other dtypes"
            below, above = MEASURED_INTERVAL
        peak = self.model.nominal_mac_per_cycle * self.model.clock_ghz * 1e6 * ms
        return OpCost(
            op=work.name,
            kind=work.kind.value,
            engine="VPU" if row.input_dtype == QDtype.float16 and work.engine == "VAE" else work.engine,
            input_dtype=row.input_dtype.value,
            weight_dtype=row.weight_dtype.value if row.weight_dtype else "",
            output_dtype=row.output_dtype.value if row.output_dtype else "int32" if work.gemm else "",
            ms=ms,
            low_ms=below * low,
            high_ms=above * high,
            share=0.0,
            utilisation=work.macs / peak if peak else 0.0,
            macs=work.macs,
            padded_macs=work.padded_macs,
            depthwise_macs=work.depthwise_macs,
            attention_macs=work.attention_macs,
            lut_elements=work.lut,
            softmax_elements=work.softmax,
            layer_norm_elements=work.layer_norm,
            reduce_elements=work.reduce,
            elementwise_elements=work.elementwise,
            moved_elements=work.moved,
            gathered_elements=work.gathered,
            cast_elements=row.cast,
            boundary_elements=row.boundary,
            weight_bytes=row.weight_bytes,
            input_bytes=0,
            output_bytes=0,
            spilled_bytes=0,
            source=source,
        )

    # ---- the network

    def bpu_ms(self, qconfig: QConfig) -> float:
        """Predicted BPU time in ms, fast enough for a search: an operator's time is looked up by the dtypes at it."""
        ops = qconfig.ops
        given = _ids(ops)
        return sum([self._priced(slot, ops, given).times[1] for slot in self._timed], self.fixed_ms)

    def report(self, qconfig: QConfig) -> CostReport:
        """The full cost report of `qconfig`."""
        priced = self._all(qconfig.ops)
        rows = [p.row for p in priced]
        bpu = sum([p.times[1] for p in priced], self.fixed_ms)
        moved = traffic(rows, self.model.onchip_mb, self._lifetimes)
        share = 1.0 / bpu if bpu > 0 else 0.0
        ops = tuple([p.cost.placed(share * p.times[1], moved.by_op[p.cost.op]) for p in priced])
        below, above = self.usual if not self.domain.widened else UNSEEN_INTERVAL
        if self.measured is not None and self.measured.total_ms is not None:
            below, above = MEASURED_INTERVAL
        host = [self.host_ms * end for end in self.model.host_interval]
        macs = sum(row.work.macs for row in rows)
        int16 = sum(r.work.macs for r in rows if QDtype.qint16 in (r.input_dtype, r.weight_dtype))
        edges = [p for p in priced if p.row.boundary]
        return CostReport(
            march=self.model.march,
            latency_ms=bpu + self.host_ms,
            low_ms=below * self.fixed_ms + host[0] + sum([op.low_ms for op in ops]),
            high_ms=above * self.fixed_ms + host[1] + sum([op.high_ms for op in ops]),
            bpu_ms=bpu,
            fps=1000.0 / (bpu or TINY),
            gmacs=macs * 1e-9,
            int16_mac_share=int16 / macs if macs else 0.0,
            weight_mb=moved.weight_bytes * 1e-6,
            ops=ops,
            traffic=moved,
            refusal=self.domain.refusal,
            widened=self._widened(rows),
            float_output_ms=self.float_output_ms,
            boundaries=len(edges),
            boundary_ms=_range(sum(p.boundary[k] for p in edges) for k in range(3)),
            measured=self._coverage(),
            measured_bytes=self.measured.ddr_bytes if self.measured else None,
            shapes={n.name: n.shape for n in self.graph.nodes if n.kind == OpKind.input},
        )

    def _widened(self, rows: Iterable[OpFeatures]) -> tuple[str, ...]:
        """Why the interval is wider than that of the measured int8 networks."""
        held = {d for row in rows for d in (row.input_dtype, row.weight_dtype)}
        found = list(self.domain.widened)
        if QDtype.qint16 in held:
            found.append("int16 operators: how much slower they are comes from one network in int16")
        if QDtype.float16 in held:
            found.append("fp16 operators: no board measured any")
        return tuple(found)

    def change(self, before: QConfig, after: QConfig) -> Change:
        """How much longer `after` takes than `before`: usable even if the latencies themselves are refused."""
        sums = [[self.fixed_ms + t for t in self._totals(q)] for q in (before, after)]
        ratios = [(b or TINY) / (a or TINY) for a, b in zip(*sums, strict=True)]
        return Change(ratios[1], min(ratios), max(ratios))

    def _totals(self, qconfig: QConfig) -> Range:
        return _range(map(sum, zip(*[p.times for p in self._all(qconfig.ops)], strict=True)))

    def promotions(self, qconfig: QConfig, dtype: QDtype = QDtype.qint16) -> dict[str, float]:
        """Operator -> added time in ms if its output alone is raised to `dtype`; operators whose output has this or a
        higher dtype, or none at all, are left out.
        """
        raised = {
            name: replace(op, output=dtype)
            for name, op in qconfig.ops.items()
            if op.output is not None and op.output.rank < dtype.rank
        }
        return self._differences(qconfig, raised)

    def weight_promotions(self, qconfig: QConfig, dtype: QDtype = QDtype.qint16) -> dict[str, float]:
        """Operator -> added time in ms if its weight alone is raised to `dtype`; weights at this or a higher dtype are
        left out.
        """
        raised = {
            name: replace(op, weight=dtype)
            for name, op in qconfig.ops.items()
            if op.weight is not None and op.weight.rank < dtype.rank
        }
        return self._differences(qconfig, raised)

    def _differences(self, qconfig: QConfig, raised: Mapping[str, OpQConfig]) -> dict[str, float]:
        """Operator -> added time in ms if it alone is as in `raised`."""
        ops = dict(qconfig.ops)
        given = _ids(ops)
        found = {}
        for name, op in raised.items():
            slots, plain, held = self._readers.get(name, ()), ops[name], given[name]
            before = sum([self._priced(slot, ops, given).times[1] for slot in slots])
            ops[name], given[name] = op, id(op.output)
            found[name] = sum([self._priced(slot, ops, given).times[1] for slot in slots]) - before
            ops[name], given[name] = plain, held
        return found

    def _coverage(self) -> str:
        if self.measured is None:
            return ""
        return f"{self.measured.source}: {len(self.measured.times)} of {len(self.works)} operators"


def _ids(ops: Mapping[str, OpQConfig]) -> dict[str, int]:
    return {name: id(op.output) for name, op in ops.items()}


def _range(values: Iterable[float]) -> Range:
    low, likely, high = values
    return low, likely, high


def predict(graph: ModelGraph, qconfig: QConfig, model: CostModel) -> CostReport:
    """Cost of `graph` (traced at the deployed shape) under `qconfig`."""
    return Pricer(graph, model).report(qconfig)
