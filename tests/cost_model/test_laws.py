"""Laws of the cost model as properties of real small models."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import zoo
from support.networks import GRAPHS, MODEL, all_at
from torch.utils._pytree import tree_map

from qflow.core.device import apply_rules
from qflow.core.dtype import QDtype
from qflow.core.resolve import resolve
from qflow.core.setter import SensitiveSetter, TemplateSetter
from qflow.cost_model.features import features
from qflow.cost_model.latency import Pricer, predict
from qflow.quant.model.plan import make_plan
from qflow.quant.trace.trace import trace


@pytest.mark.parametrize("name", GRAPHS)
def test_the_total_is_the_sum_of_its_parts_and_lies_in_its_interval(name):
    for dtype in (QDtype.qint8, QDtype.qint16):
        report = predict(GRAPHS[name], all_at(GRAPHS[name], dtype), MODEL)
        assert report.bpu_ms == pytest.approx(MODEL.fixed_ms + sum(op.ms for op in report.ops))
        assert report.low_ms < report.latency_ms < report.high_ms
        assert all(op.low_ms <= op.ms <= op.high_ms for op in report.ops)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(GRAPHS)), st.sampled_from([QDtype.qint16, QDtype.float16]), st.data())
def test_a_higher_dtype_never_costs_less_but_by_a_conversion_that_it_saves(nash_m, name, dtype, data):
    """Any operators of any mix of int8 and `dtype` go on to `dtype`, as the device runs them: at each operator the
    time, conversions apart, does not fall, at the lowest, likely and highest factors.
    """
    graph = GRAPHS[name]
    able = [n.name for n in graph.quantized if dtype == QDtype.qint16 or n.kind.value in nash_m.float16_kinds]
    more = data.draw(st.sets(st.sampled_from(able))) if able else set()
    fewer = data.draw(st.sets(st.sampled_from(sorted(more)))) if more else set()
    pricer, int8 = Pricer(graph, MODEL), all_at(graph, QDtype.qint8)

    def rows(raised):
        ops = {n: replace(int8.ops[n], output=dtype) for n in raised}
        return features(graph, apply_rules(graph, int8.with_ops(ops), nash_m))

    for a, b in zip(rows(fewer), rows(more), strict=True):
        low, high = (pricer.times(replace(row, cast=0, boundary=0)) for row in (a, b))
        assert all(x <= y + 1e-12 for x, y in zip(low, high, strict=True)), a.work.name
        if a.cast <= b.cast and a.boundary <= b.boundary:
            assert pricer.times(a)[1] <= pricer.times(b)[1] + 1e-12


@pytest.mark.parametrize("name", GRAPHS)
def test_an_operator_of_the_vector_unit_takes_longer_the_wider_it_computes(name):
    for row in features(GRAPHS[name], all_at(GRAPHS[name], QDtype.qint8)):
        if not row.work.gemm:
            dtypes = (QDtype.qint8, QDtype.qint16, QDtype.float16)
            times = [MODEL.compute_ms(replace(row, input_dtype=d), 0.0) for d in dtypes]
            assert all(list(column) == sorted(column) for column in zip(*times, strict=True)), row.work.name


def mixed(graph, seed, ratio=0.4):
    rng = random.Random(seed)
    names = [n.name for n in graph.quantized]
    setters = [SensitiveSetter({}, rng.sample(names, len(names)), ratio), TemplateSetter(QDtype.qint8)]
    return resolve(graph, setters, "nash-m")


@pytest.mark.parametrize("name", GRAPHS)
def test_the_search_sees_the_figure_that_the_report_shows(name):
    pricer = Pricer(GRAPHS[name], MODEL)
    for seed in range(5):
        qconfig = mixed(GRAPHS[name], seed)
        for _ in range(2):  # the second time from what is known
            assert pricer.bpu_ms(qconfig) == pytest.approx(pricer.report(qconfig).bpu_ms)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_promotion_costs_what_the_promoted_qconfig_costs_more(name):
    graph, pricer = GRAPHS[name], Pricer(GRAPHS[name], MODEL)
    qconfig = mixed(graph, 1)
    deltas = pricer.promotions(qconfig)
    assert set(deltas) == {n for n, op in qconfig.ops.items() if op.output == QDtype.qint8}
    for op, delta in deltas.items():
        raised = qconfig.with_ops({op: replace(qconfig.ops[op], output=QDtype.qint16)})
        assert pricer.bpu_ms(raised) - pricer.bpu_ms(qconfig) == pytest.approx(delta, abs=1e-12)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_larger_batch_never_costs_less(name):
    model, x = zoo()[name]
    twice = tree_map(lambda t: torch.cat([t, t]), x)
    larger = make_plan(trace(model, twice), model).graph
    for dtype in (QDtype.qint8, QDtype.qint16):
        one, two = (Pricer(g, MODEL).report(all_at(g, dtype)) for g in (GRAPHS[name], larger))
        assert two.bpu_ms >= one.bpu_ms
        assert two.traffic.bytes >= one.traffic.bytes
        assert two.weight_mb == one.weight_mb


@pytest.mark.parametrize("name", GRAPHS)
def test_fusing_saves_only_what_is_held_between_the_fused(name, monkeypatch):
    """Batch norm, add and ReLU fused or apart: they are free in integers, so the same time comes out."""
    monkeypatch.setattr("qflow.quant.model.fusion.Fuser.join", lambda *_: None)
    model, x = zoo()[name]
    apart = make_plan(trace(model, x), model).graph
    assert (len(apart.nodes) > len(GRAPHS[name].nodes)) == any(n.fused for n in GRAPHS[name].nodes)
    for dtype in (QDtype.qint8, QDtype.qint16):
        a, b = (Pricer(g, MODEL).report(all_at(g, dtype)) for g in (GRAPHS[name], apart))
        assert a.bpu_ms == pytest.approx(b.bpu_ms)
        assert (a.gmacs, a.weight_mb) == pytest.approx((b.gmacs, b.weight_mb))
        assert a.traffic.peak_bytes <= b.traffic.peak_bytes


def test_a_change_is_given_where_the_figures_are_refused():
    graph = GRAPHS["attention"]
    pricer = Pricer(graph, MODEL)
    int8, int16 = all_at(graph, QDtype.qint8), all_at(graph, QDtype.qint16)
    same, more = pricer.change(int8, int8), pricer.change(int8, int16)
    assert (same.ratio, same.low, same.high) == (1.0, 1.0, 1.0)
    assert 1.0 <= more.low <= more.ratio <= more.high
    assert pricer.change(int16, int8).ratio == pytest.approx(1.0 / more.ratio)
