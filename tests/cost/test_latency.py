"""Laws of the cost model, and its figures against the published formula by hand."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import zoo
from torch import nn
from torch.utils._pytree import tree_map

from qflow.core.device import apply_rules
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.core.qconfig import OpQConfig, QConfig
from qflow.core.setter import HighPrecisionOutput, SensitiveSetter, TemplateSetter, resolve
from qflow.cost.features import features
from qflow.cost.latency import Pricer, predict
from qflow.cost.model import CostModel
from qflow.cost.records import Measured
from qflow.quant.plan import make_plan
from qflow.quant.trace import trace

GRAPHS = {name: make_plan(trace(*pair), pair[0]).graph for name, pair in zoo().items()}
MODEL = CostModel()


def conv(name, source, cin, cout, size, kernel=9, groups=1):
    attrs = {"in": cin, "out": cout, "groups": groups, "kernel": kernel, "weights": cout * (cin // groups) * kernel}
    return OpNode(name, OpKind.conv, "Conv2d", (source,), (1, cout, size, size), name, name, attrs=attrs)


def network():
    stub = OpNode("x", OpKind.input, "QuantStub", (), (1, 3, 64, 64), "x")
    act = OpNode("act", OpKind.lut, "SiLU", ("a",), (1, 32, 32, 32), "act")
    return ModelGraph((stub, conv("a", "x", 3, 32, 32), act, conv("b", "act", 32, 20, 32)), (("0", "b"),))


def all_at(graph, dtype):
    return resolve(graph, [TemplateSetter(dtype)], "nash-m")


def test_the_total_is_the_published_formula():
    graph = network()
    report = predict(graph, all_at(graph, QDtype.qint8), MODEL)
    gmacs = 32 * 32 * 9 * (16 * 32 + 32 * 32) * 1e-9  # 3 -> 16 and 20 -> 32 channels padded
    lut = 32 * 32 * 32 * 1e-6
    weights = (32 * 3 * 9 + 20 * 32 * 9) * 1e-6
    by_hand = 0.0549 + (2 * 1.718e-3 + gmacs / 19.2 + lut / 22.7) / 1.5 + weights / 61.2
    assert report.bpu_ms == pytest.approx(by_hand, rel=1e-9)
    assert report.latency_ms == pytest.approx(by_hand + 0.32, rel=1e-9)
    assert report.fps == pytest.approx(1000 / by_hand)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_total_is_the_sum_of_its_parts_and_lies_in_its_interval(name):
    for dtype in (QDtype.qint8, QDtype.qint16):
        report = predict(GRAPHS[name], all_at(GRAPHS[name], dtype), MODEL)
        assert report.bpu_ms == pytest.approx(MODEL.fixed_ms + sum(op.ms for op in report.ops))
        assert report.low_ms < report.latency_ms < report.high_ms
        assert all(op.low_ms <= op.ms <= op.high_ms for op in report.ops)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(GRAPHS)), st.floats(0, 1), st.floats(0, 1))
def test_more_int16_never_costs_less(name, a, b):
    """Operators go to int16 in graph order, so the larger ratio holds the smaller one."""
    graph = GRAPHS[name]
    names = [n.name for n in graph.quantized]
    costs = []
    for ratio in sorted((a, b)):
        setters = [SensitiveSetter({}, names, ratio), TemplateSetter(QDtype.qint8)]
        report = predict(graph, resolve(graph, setters, "nash-m"), MODEL)
        costs.append(
            report.latency_ms - sum(op.cast_elements for op in report.ops) * 2e-6 / MODEL.lut_melem_per_ms_ghz / 1.5
        )
    assert costs[0] <= costs[1] + 1e-12


def test_an_int16_input_doubles_macs_and_look_ups():
    graph = network()
    low, high = (predict(graph, all_at(graph, d), MODEL) for d in (QDtype.qint8, QDtype.qint16))
    fixed = 1.718e-3 / 1.5
    for a, b in zip(low.ops[1:], high.ops[1:], strict=True):
        stream = a.weight_bytes * 1e-6 / 61.2
        gemm = fixed if a.kind == "conv" else 0.0
        assert b.ms - stream - gemm == pytest.approx(2 * (a.ms - stream - gemm))
    assert high.int16_mac_share == 1.0
    assert low.int16_mac_share == 0.0


def test_the_interval_widens_only_for_what_runs_in_16_bits():
    graph = network()
    int8 = all_at(graph, QDtype.qint8)
    mixed = int8.with_ops({"act": OpQConfig(QDtype.qint16)})
    a, b = (predict(graph, q, MODEL) for q in (int8, mixed))
    assert a.high_ms / a.latency_ms == pytest.approx(1.25)
    assert 1.25 < b.high_ms / b.latency_ms < 2.5
    assert next(op for op in b.ops if op.op == "a").high_ms == next(op for op in a.ops if op.op == "a").high_ms


def test_depthwise_counts_its_call_and_its_weights_only():
    stub = OpNode("x", OpKind.input, "QuantStub", (), (1, 32, 8, 8), "x")
    graph = ModelGraph((stub, conv("d", "x", 32, 32, 8, groups=32)), (("0", "d"),))
    row = features(graph, all_at(graph, QDtype.qint8))[1]
    work = row.work
    assert (work.gemm, work.macs, work.padded_macs, work.depthwise_macs) == (1, 8 * 8 * 32 * 9, 0, 8 * 8 * 32 * 9)
    assert row.weight_bytes == 32 * 9


def test_a_concat_of_two_dtypes_is_charged_a_cast():
    a = OpNode("a", OpKind.lut, "SiLU", (), (1, 8, 4, 4), "a")
    b = OpNode("b", OpKind.lut, "SiLU", (), (1, 8, 4, 4), "b")
    graph = ModelGraph((a, b, OpNode("c", OpKind.concat, "cat", ("a", "b"), (1, 16, 4, 4), "c")), (("0", "c"),))
    same = all_at(graph, QDtype.qint8)
    mixed = same.with_ops({"b": OpQConfig(QDtype.qint16)})
    assert [r.cast for r in features(graph, same)] == [0, 0, 0]
    assert [r.cast for r in features(graph, mixed)] == [0, 0, 128]


def test_an_attention_core_is_counted_apart():
    rows = {r.work.name: r.work for r in features(GRAPHS["attention"], all_at(GRAPHS["attention"], QDtype.qint8))}
    assert rows["[softmax]"].softmax > 0
    for name in ("[matmul]", "[matmul](1)"):
        assert rows[name].padded_macs == 0
        assert rows[name].attention_macs == rows[name].macs > 0
    assert rows["qkv"].padded_macs > rows["qkv"].attention_macs == 0


def test_outside_the_validated_domain_it_says_so():
    soft = OpNode("s", OpKind.softmax, "softmax", (), (1, 8, 64, 64), "s")
    graph = ModelGraph((soft,), (("0", "s"),))
    assert "outside what the model was validated on" in predict(graph, all_at(graph, QDtype.qint8), MODEL).refusal
    assert predict(network(), all_at(network(), QDtype.qint8), MODEL).refusal == ""


def test_a_dtype_without_a_price_is_refused():
    graph = network()
    qconfig = QConfig("nash-m", {**all_at(graph, QDtype.qint8).ops, "x": OpQConfig(QDtype.float16)})
    with pytest.raises(ConfigError, match="prices qint8/qint8, .* but got float16/qint8 for a"):
        predict(graph, qconfig, MODEL)


def test_the_high_precision_output_is_shown_as_int32(nash_m):
    graph = GRAPHS["resnet"]
    qconfig = apply_rules(
        graph, resolve(graph, [HighPrecisionOutput(), TemplateSetter(QDtype.qint8)], "nash-m"), nash_m
    )
    assert predict(graph, qconfig, MODEL).ops[-1].output_dtype == "int32"


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "macs"), [(2, 2, 0, 65536), (4, 2, 1, 262144), (3, 1, 1, 147456)]
)
def test_a_transposed_convolution_applies_its_kernel_at_every_input_position(kernel, stride, padding, macs):
    model = nn.Sequential(nn.ConvTranspose2d(16, 16, kernel, stride, padding), nn.SiLU()).eval()
    graph = make_plan(trace(model, torch.randn(1, 16, 8, 8)), model).graph
    assert graph.by_name["0"].macs == macs


def test_a_matmul_is_priced_by_both_its_inputs():
    a = OpNode("a", OpKind.lut, "SiLU", (), (1, 16, 16), "a")
    b = OpNode("b", OpKind.lut, "SiLU", (), (1, 16, 16), "b")
    m = OpNode("m", OpKind.matmul, "matmul", ("a", "b"), (1, 16, 16), "m", attrs={"inner": 16})
    graph = ModelGraph((a, b, m), (("0", "m"),))
    int8 = all_at(graph, QDtype.qint8)
    times = [
        predict(graph, int8.with_ops({n: OpQConfig(QDtype.qint16) for n in names}), MODEL).ops[-1].ms - 1.718e-3 / 1.5
        for names in ([], ["a"], ["a", "b"])
    ]
    assert times[1] == pytest.approx(2 * times[0])
    assert times[2] == pytest.approx(4 * times[0])


def test_a_matmul_on_one_side_of_a_softmax_is_counted():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.w = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return ((self.lin(x) @ self.w) * 0.1).softmax(-1)

    model = Scores().eval()
    graph = make_plan(trace(model, torch.randn(1, 4, 8)), model).graph
    rows = {r.work.name: r.work for r in features(graph, all_at(graph, QDtype.qint8))}
    assert rows["[matmul]"].macs == 4 * 8 * 8


def test_an_operator_without_a_price_makes_the_latency_a_lower_bound():
    class Distances(nn.Module):
        def forward(self, x):
            return torch.cdist(x, x * 2.0)

    model = Distances().eval()
    graph = make_plan(trace(model, torch.randn(1, 4, 16)), model).graph
    assert "no price for" in predict(graph, all_at(graph, QDtype.qint8), MODEL).refusal


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


def test_fusing_an_activation_saves_nothing_but_its_own_pass():
    """Conv and ReLU fused or apart: a ReLU is free, so the same figure comes out."""
    stub = OpNode("x", OpKind.input, "QuantStub", (), (1, 16, 8, 8), "x")
    fused = replace(conv("a", "x", 16, 16, 8), fused=("r",), fused_types=("ReLU",))
    apart = (conv("a", "x", 16, 16, 8), OpNode("r", OpKind.relu, "ReLU", ("a",), (1, 16, 8, 8), "r"))
    graphs = ModelGraph((stub, fused), (("0", "a"),)), ModelGraph((stub, *apart), (("0", "r"),))
    a, b = (Pricer(g, MODEL).report(all_at(g, QDtype.qint8)) for g in graphs)
    assert a.bpu_ms == pytest.approx(b.bpu_ms)
    assert b.traffic.peak_bytes >= a.traffic.peak_bytes


def test_a_change_is_given_where_the_figures_are_refused():
    graph = GRAPHS["attention"]
    pricer = Pricer(graph, MODEL)
    int8, int16 = all_at(graph, QDtype.qint8), all_at(graph, QDtype.qint16)
    same, more = pricer.change(int8, int8), pricer.change(int8, int16)
    assert (same.ratio, same.low, same.high) == (1.0, 1.0, 1.0)
    assert 1.0 <= more.low <= more.ratio <= more.high
    assert pricer.change(int16, int8).ratio == pytest.approx(1.0 / more.ratio)


def test_large_gemms_run_slower_than_their_macs_say():
    def network_of(size):
        stub = OpNode("x", OpKind.input, "QuantStub", (), (1, 64, size, size), "x")
        return ModelGraph((stub, conv("a", "x", 64, 64, size)), (("0", "a"),))

    def rate(size):
        graph = network_of(size)
        pricer = Pricer(graph, MODEL)
        report = pricer.report(all_at(graph, QDtype.qint8))
        return report.gmacs / (report.bpu_ms - MODEL.fixed_ms)

    assert rate(64) > rate(512)
    assert Pricer(network_of(64), MODEL).large == 0.0
    assert Pricer(network_of(512), MODEL).large == pytest.approx(1 - 0.5 / (512 * 512 * 64 * 64 * 9e-9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gmac_per_ms_ghz": 0.0}, "cost.gmac_per_ms_ghz is a number above 0, but got 0"),
        ({"vector_factors": {"qint8": [2, 1, 3]}}, r"cost.vector_factors.qint8 is a number above 0 or \[lowest"),
        ({"mac_factors": {"qint8/qint8": [1, 2]}}, "cost.mac_factors.qint8/qint8 is a number"),
    ],
)
def test_parameters_that_no_device_has_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        CostModel(**changes)


def test_a_factor_may_be_a_single_number():
    assert CostModel(vector_factors={"qint8": 1.5}).vector_factors == {"qint8": (1.5, 1.5, 1.5)}


def test_measured_times_replace_the_formula_and_its_ratios_carry_them_on():
    graph = network()
    int8, int16 = all_at(graph, QDtype.qint8), all_at(graph, QDtype.qint16)
    plain = Pricer(graph, MODEL)
    measured = Pricer(graph, MODEL, Measured({"act": 0.5}, int8, total_ms=2.0, source="hbm_perf x.json"))
    at_int8, at_int16 = measured.report(int8), measured.report(int16)
    ops = {op.op: op for op in at_int8.ops}
    assert (ops["act"].ms, ops["act"].source) == (0.5, "measured")
    assert ops["a"].ms == next(op.ms for op in plain.report(int8).ops if op.op == "a")
    assert at_int8.bpu_ms == pytest.approx(2.0)
    wide = next(op for op in at_int16.ops if op.op == "act")
    assert wide.ms == pytest.approx(2 * 0.5)  # a look-up in int16 takes twice as long
    assert wide.source == "measured, other dtypes"
    assert wide.low_ms < wide.ms < wide.high_ms
    assert measured.bpu_ms(int16) == pytest.approx(at_int16.bpu_ms)
    assert at_int8.low_ms < at_int8.latency_ms < at_int8.high_ms
    assert at_int8.measured == "hbm_perf x.json: 1 of 4 operators"


def test_units_that_overlap_never_make_a_total_negative():
    """Layers that add up to more than the measured total share what there is, at any dtype."""
    graph = network()
    int8, int16 = all_at(graph, QDtype.qint8), all_at(graph, QDtype.qint16)
    measured = Pricer(graph, MODEL, Measured({"a": 3.0, "act": 2.0, "b": 1.0}, int16, total_ms=2.0))
    assert measured.bpu_ms(int16) == pytest.approx(2.0)
    assert 0.0 < measured.bpu_ms(int8) < 2.0
    assert sum(op.ms for op in measured.report(int16).ops) == pytest.approx(2.0)


def test_a_measured_operator_without_a_price_pays_for_casts():
    stub = [OpNode(n, OpKind.lut, "SiLU", (), (1, 8, 4, 4), n) for n in ("a", "b")]
    graph = ModelGraph((*stub, OpNode("c", OpKind.concat, "cat", ("a", "b"), (1, 16, 4, 4), "c")), (("0", "c"),))
    int8 = all_at(graph, QDtype.qint8)
    pricer = Pricer(graph, MODEL, Measured({"c": 0.5}, int8))
    mixed_ = pricer.report(int8.with_ops({"b": OpQConfig(QDtype.qint16)})).ops[-1]
    assert pricer.report(int8).ops[-1].ms == 0.5
    assert mixed_.ms > 0.5
