"""Latency of a qconfig on Journey 6: the sum of its operators' times (model.py), each with an interval.

The interval of an operator is [0.80, 1.25] of its time, times the range of its dtypes' factors. It is [0.65, 1.5] for
an operator in 16 bits, and in a network that the measured rows do not cover (domain.py). No network was ever published
both in int8 and in int16: the int16 factors rest on one all-int16 network (DINOv2 ViT-S, measured on nash-e and
nash-m), those of fp16 on no measurement. The ratio of two qconfigs of one network is more reliable than either latency,
because fixed costs and weights cancel.

With a measured profile (profile.py), measured times replace the formula at the dtypes that were measured; for other
dtypes they are multiplied by the formula's ratio. If the report has a total, the part that the operators do not explain
is added as a constant; if the operators add up to more (units overlap), their times are scaled to the total. Nodes on
the CPU count towards the latency only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from qflow.core.dtype import QDtype
from qflow.core.graph import ModelGraph, OpKind
from qflow.core.qconfig import OpQConfig, QConfig
from qflow.cost_model.domain import domain_of
from qflow.cost_model.features import OpFeatures, under
from qflow.cost_model.model import CostModel, Range
from qflow.cost_model.records import Change, CostReport, Measured, OpCost
from qflow.cost_model.traffic import traffic
from qflow.cost_model.work import OpWork, work_of

INT8_INTERVAL = (0.80, 1.25)
UNSEEN_INTERVAL = (0.65, 1.5)
MEASURED_INTERVAL = (0.88, 1.14)
"""The times of a network on one board under two tool chains differ by up to 14 %."""
TINY = 1e-9  # ms: time of a network without any work, so that its frame rate is finite


class Pricer:
    """Computes the cost of many qconfigs of a graph at its deployed shape; times that repeat are computed once."""

    def __init__(self, graph: ModelGraph, model: CostModel, measured: Measured | None = None) -> None:
        self.graph, self.model, self.measured = graph, model, measured
        self.works = work_of(graph)
        self.large = model.large_share(self.works)
        self.readers: dict[str, list[OpWork]] = {}
        for work in self.works:
            for owner in {work.owner, *(o for owners in work.inputs for o in owners)} - {None}:
                self.readers.setdefault(owner, []).append(work)  # type: ignore[arg-type]
        self._times: dict[tuple[object, ...], tuple[Range, float]] = {}
        own = measured.times if measured is not None else {}
        self.domain = domain_of(self.works, model, self.large, own)
        priced = [w for w in self.works if not w.transparent or w.priced or w.name in own]
        self._known: list[tuple[OpWork, tuple[str, ...], dict[tuple[object, ...], float]]] = [
            (w, tuple(dict.fromkeys(o for owners in w.inputs for o in owners)), {}) for w in priced
        ]
        """Operator, the operators whose outputs it reads, and its time by their dtypes."""
        self.reference = (
            {row.work.name: self._formula(row) for row in under(self.works, measured.reference.ops)} if measured else {}
        )
        out = sum(w.elements for w in self.works if w.leaving) * 1e-6 / model.float_melem_per_ms
        out = out if model.host_dequantize else 0.0
        self.fixed_ms = model.fixed_ms + out
        self.host_ms = model.host_ms + (measured.host_ms if measured is not None else 0.0)
        self.overlap = 1.0
        if measured is not None and measured.total_ms is not None:
            added = self._sum(under(self.works, measured.reference.ops))
            self.fixed_ms = max(measured.total_ms - added, 0.0) + out
            self.overlap = min(measured.total_ms / added, 1.0) if added > 0 else 1.0

    # ---- one operator

    def _formula(self, row: OpFeatures) -> tuple[Range, float]:
        """(time to compute by factors, time to read the weights) in ms."""
        key = (row.work.name, row.input_dtype, row.weight_dtype, row.cast, row.weight_bytes)
        found = self._times.get(key)
        if found is None:
            found = self._times[key] = self.model.compute_ms(row, self.large), self.model.stream_ms(row)
        return found

    def times(self, row: OpFeatures) -> Range:
        """Time of one operator in ms, by the lowest, likely and highest factors of its dtypes."""
        (low, likely, high), stream = self._formula(row)
        own = self.measured.times.get(row.work.name) if self.measured else None
        found = [t + stream for t in (low, likely, high)]
        if own is not None:  # if the formula gave 0 at the measured dtypes, its present time is added
            was, stream_was = self.reference[row.work.name]
            before = [t + stream_was for t in was]
            found = [own * a / b if b > 0 else own + a for a, b in zip(found, before, strict=True)]
        return self.overlap * min(found), self.overlap * found[1], self.overlap * max(found)

    def _sum(self, rows: Iterable[OpFeatures]) -> float:
        return sum(self.times(row)[1] for row in rows)

    def _same(self, row: OpFeatures) -> bool:
        """True if the operator computes at the dtypes at which it was measured."""
        return self.reference.get(row.work.name) == self._formula(row)

    def _op(self, row: OpFeatures, bpu_ms: float, bytes_: tuple[int, int, int]) -> OpCost:
        work, (low, ms, high) = row.work, self.times(row)
        integer8 = row.input_dtype == QDtype.qint8 and row.weight_dtype in (None, QDtype.qint8) and not row.cast
        below, above = INT8_INTERVAL if not self.domain.widened and integer8 else UNSEEN_INTERVAL
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
            share=ms / bpu_ms if bpu_ms > 0 else 0.0,
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
            weight_bytes=row.weight_bytes,
            input_bytes=bytes_[0],
            output_bytes=bytes_[1],
            spilled_bytes=bytes_[2],
            source=source,
        )

    # ---- the network

    def bpu_ms(self, qconfig: QConfig) -> float:
        """Predicted BPU time in ms, fast enough for a search: an operator's time is looked up by the dtypes at it."""
        ops, total = qconfig.ops, self.fixed_ms
        given = {name: id(op.output) for name, op in ops.items()}  # ids of enum members: their hashes are slow
        for work, sources, known in self._known:
            op = ops[work.owner] if work.owner is not None else None
            own = (id(op.output), id(op.weight), op.input) if op is not None else (None,)
            key = (*own, *[given[name] for name in sources])
            ms = known.get(key)
            if ms is None:
                ms = known[key] = self._sum(under((work,), ops))
            total += ms
        return total

    def report(self, qconfig: QConfig) -> CostReport:
        """The full cost report of `qconfig`."""
        rows = tuple(under(self.works, qconfig.ops))
        bpu = self.fixed_ms + self._sum(rows)
        moved = traffic(rows, self.model.onchip_mb)
        ops = tuple(self._op(row, bpu, moved.by_op[row.work.name]) for row in rows)
        below, above = INT8_INTERVAL if not self.domain.widened else UNSEEN_INTERVAL
        if self.measured is not None and self.measured.total_ms is not None:
            below, above = MEASURED_INTERVAL
        outside = self.fixed_ms + self.host_ms
        macs = sum(w.macs for w in self.works)
        int16 = sum(r.work.macs for r in rows if QDtype.qint16 in (r.input_dtype, r.weight_dtype))
        return CostReport(
            march=self.model.march,
            latency_ms=bpu + self.host_ms,
            low_ms=below * outside + sum(op.low_ms for op in ops),
            high_ms=above * outside + sum(op.high_ms for op in ops),
            bpu_ms=bpu,
            fps=1000.0 / (bpu or TINY),
            gmacs=macs * 1e-9,
            int16_mac_share=int16 / macs if macs else 0.0,
            weight_mb=moved.weight_bytes * 1e-6,
            ops=ops,
            traffic=moved,
            refusal=self.domain.refusal,
            widened=self.domain.widened,
            measured=self._coverage(),
            measured_bytes=self.measured.ddr_bytes if self.measured else None,
            shapes={n.name: n.shape for n in self.graph.nodes if n.kind == OpKind.input},
        )

    def change(self, before: QConfig, after: QConfig) -> Change:
        """How much longer `after` takes than `before`: usable even if the latencies themselves are refused."""
        sums = [[self.fixed_ms + t for t in self._totals(q)] for q in (before, after)]
        ratios = [(b or TINY) / (a or TINY) for a, b in zip(*sums, strict=True)]
        return Change(ratios[1], min(ratios), max(ratios))

    def _totals(self, qconfig: QConfig) -> list[float]:
        times = [self.times(row) for row in under(self.works, qconfig.ops)]
        return [sum(column) for column in zip(*times, strict=True)]

    def promotions(self, qconfig: QConfig, dtype: QDtype = QDtype.qint16) -> dict[str, float]:
        """Operator -> added time in ms if its output alone is raised to `dtype`; operators whose output has this or a
        higher dtype, or none at all, are left out.
        """
        found = {}
        for name, op in qconfig.ops.items():
            if op.output is None or op.output.rank >= dtype.rank:
                continue
            touched = self.readers.get(name, ())
            ops = {**qconfig.ops, name: replace(op, output=dtype)}
            found[name] = self._difference(touched, qconfig.ops, ops)
        return found

    def weight_promotions(self, qconfig: QConfig, dtype: QDtype = QDtype.qint16) -> dict[str, float]:
        """Operator -> added time in ms if its weight alone is raised to `dtype`; weights at this or a higher dtype are
        left out.
        """
        found = {}
        for name, op in qconfig.ops.items():
            if op.weight is not None and op.weight.rank < dtype.rank:
                ops = {**qconfig.ops, name: replace(op, weight=dtype)}
                found[name] = self._difference(self.readers.get(name, ()), qconfig.ops, ops)
        return found

    def _difference(
        self, works: Sequence[OpWork], before: Mapping[str, OpQConfig], after: Mapping[str, OpQConfig]
    ) -> float:
        return self._sum(under(works, after)) - self._sum(under(works, before))

    def _coverage(self) -> str:
        if self.measured is None:
            return ""
        return f"{self.measured.source}: {len(self.measured.times)} of {len(self.works)} operators"


def predict(graph: ModelGraph, qconfig: QConfig, model: CostModel) -> CostReport:
    """Cost of `graph` (traced at the deployed shape) under `qconfig`."""
    return Pricer(graph, model).report(qconfig)
