"""Laws of the cost model, and its predictions against the published formula by hand."""

from dataclasses import replace
from math import inf, nan
from typing import get_type_hints

import pytest
import torch
from support.networks import GRAPHS, MODEL, all_at, conv, network
from torch import nn

from qflow.core.device import apply_rules
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.core.limits import Above, AtLeast
from qflow.core.qconfig import OpQConfig, QConfig
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, TemplateSetter
from qflow.cost_model.features import features
from qflow.cost_model.latency import Pricer, predict
from qflow.cost_model.model import CostModel
from qflow.cost_model.table import cost_text
from qflow.quant.model.plan import make_plan
from qflow.quant.trace.trace import trace


def limited(limit):
    """The parameters with this limit."""
    hints = get_type_hints(CostModel, include_extras=True)
    return [name for name, hint in hints.items() if limit in getattr(hint, "__metadata__", ())]


RATES, AMOUNTS = limited(Above(0.0)), limited(AtLeast(0.0))
assert len(RATES) == 9 and len(AMOUNTS) == 5


def test_the_total_is_the_published_formula():
    graph = network()
    report = predict(graph, all_at(graph, QDtype.qint8), MODEL)
    gmacs = 32 * 32 * 9 * (16 * 32 + 32 * 32) * 1e-9  # 3 -> 16 and 20 -> 32 channels padded
    lut = 32 * 32 * 32 * 1e-6
    weights = (32 * 3 * 9 + 20 * 32 * 9) * 1e-6
    compute = 2e-3 * MODEL.gemm_us_ghz + gmacs / MODEL.gmac_per_ms_ghz + lut / MODEL.lut_melem_per_ms_ghz
    by_hand = MODEL.fixed_ms + compute / 1.5 + weights / MODEL.weight_mb_per_ms
    assert report.bpu_ms == pytest.approx(by_hand, rel=1e-9)
    assert report.latency_ms == pytest.approx(by_hand + MODEL.host_ms + MODEL.host_output_ms, rel=1e-9)
    assert report.fps == pytest.approx(1000 / by_hand)


@pytest.mark.parametrize("kind", [OpKind.add, OpKind.mul, OpKind.arithmetic, OpKind.layer_norm, OpKind.reduce])
def test_whatever_runs_in_fp16_takes_time(kind):
    nodes = (
        OpNode("x", OpKind.input, "QuantStub", (), (1, 8, 4, 4), "x"),
        OpNode("op", kind, kind.value, ("x",), (1, 8, 4, 4), "op"),
    )
    graph = ModelGraph(nodes, (("0", "op"),))
    int8 = all_at(graph, QDtype.qint8)
    report = predict(graph, int8.with_ops({"op": OpQConfig(QDtype.float16)}), MODEL)
    pass_ms = 128e-6 / MODEL.lut_melem_per_ms_ghz / MODEL.clock_ghz
    op = report.ops[-1]
    assert (op.engine, op.cast_elements) == ("VPU", 128)
    assert (op.ms, op.low_ms, op.high_ms) == pytest.approx((16 * pass_ms, 0.65 * 8 * pass_ms, 1.5 * 32 * pass_ms))
    likely = MODEL.element_prices["layer_norm"][1] if kind == OpKind.layer_norm else 0.0
    assert predict(graph, int8, MODEL).ops[-1].ms == pytest.approx(128e-6 * likely / MODEL.clock_ghz)


def test_an_int16_input_doubles_macs_and_look_ups():
    graph = network()
    low, high = (predict(graph, all_at(graph, d), MODEL) for d in (QDtype.qint8, QDtype.qint16))
    fixed = 1e-3 * MODEL.gemm_us_ghz / 1.5
    for a, b in zip(low.ops[1:], high.ops[1:], strict=True):
        stream = a.weight_bytes * 1e-6 / MODEL.weight_mb_per_ms
        gemm = fixed if a.kind == "conv" else 0.0
        assert b.ms - stream - gemm == pytest.approx(2 * (a.ms - stream - gemm))
    assert high.int16_mac_share == 1.0
    assert low.int16_mac_share == 0.0


def test_the_interval_widens_only_for_what_runs_in_16_bits():
    graph = network()
    int8 = all_at(graph, QDtype.qint8)
    mixed = int8.with_ops({"act": OpQConfig(QDtype.qint16)})
    a, b = (predict(graph, q, MODEL) for q in (int8, mixed))
    host = MODEL.host_ms + MODEL.host_output_ms
    for end, bpu, of_host in zip((a.low_ms, a.high_ms), MODEL.short_interval, MODEL.host_interval, strict=True):
        assert end == pytest.approx(bpu * a.bpu_ms + of_host * host)
    assert a.high_ms / a.latency_ms < b.high_ms / b.latency_ms < 2.5
    assert next(op for op in b.ops if op.op == "a").high_ms == next(op for op in a.ops if op.op == "a").high_ms
    assert (a.widened, [r.split(":")[0] for r in b.widened]) == ((), ["int16 operators"])


def test_a_network_of_half_a_millisecond_has_the_wider_interval_of_short_ones():
    """Both ends come from the residuals of left-out networks of less than a millisecond, and of the longer ones."""
    for size, ends in ((64, MODEL.short_interval), (1024, MODEL.interval)):
        graph = ModelGraph(
            (OpNode("x", OpKind.input, "QuantStub", (), (1, 64, size, size), "x"), conv("c", "x", 64, 64, size)),
            (("0", "c"),),
        )
        op = predict(graph, all_at(graph, QDtype.qint8), MODEL).ops[-1]
        assert (op.low_ms / op.ms, op.high_ms / op.ms) == pytest.approx(ends)


def test_each_output_takes_time_on_the_host_and_frames_in_flight_wait_for_the_bpu():
    graph = network()
    two = replace(graph, outputs=(("0", "b"), ("1", "act")))
    a, b = (predict(g, all_at(g, QDtype.qint8), MODEL) for g in (graph, two))
    assert b.latency_ms - a.latency_ms == pytest.approx(MODEL.host_output_ms)
    assert a.bpu_ms == b.bpu_ms
    assert a.latency_at(1) == a.latency_at(2) == a.latency_ms  # the host takes longer than the BPU
    assert a.latency_at(20) == pytest.approx(20 * a.bpu_ms)


def chain(*dtypes):
    """Sigmoids one after another, with these output dtypes."""
    nodes = [OpNode("x", OpKind.input, "QuantStub", (), (1, 8, 64, 64), "x")]
    for i in range(len(dtypes)):
        nodes.append(OpNode(f"s{i}", OpKind.lut, "Sigmoid", (nodes[-1].name,), (1, 8, 64, 64), f"s{i}"))
    graph = ModelGraph(tuple(nodes), (("0", nodes[-1].name),))
    raised = {f"s{i}": OpQConfig(d) for i, d in enumerate(dtypes)}
    return predict(graph, all_at(graph, QDtype.qint8).with_ops(raised), MODEL)


def test_passing_between_int8_and_int16_takes_time_and_one_block_less_than_two():
    low, high = QDtype.qint8, QDtype.qint16
    none, block, apart = chain(low, low, low, low), chain(low, high, high, low), chain(high, low, high, low)
    million = 8 * 64 * 64e-6
    assert (none.boundaries, none.boundary_ms) == (0, (0.0, 0.0, 0.0))
    assert (block.boundaries, apart.boundaries) == (2, 4)
    for report, times in ((block, 2), (apart, 4)):
        assert report.boundary_ms == pytest.approx([times * million * price for price in MODEL.boundary_ms])
        assert "if they are free" in cost_text(report)
    assert block.latency_ms < apart.latency_ms
    assert block.high_ms < apart.high_ms
    assert "boundaries  " not in cost_text(none)


def test_both_readings_of_boundaries_lie_in_the_interval():
    report = chain(QDtype.qint16, QDtype.qint8)
    free, host = (report.latency_ms - report.boundary_ms[1] + report.boundary_ms[k] for k in (0, 2))
    assert report.low_ms < free < report.latency_ms < host < report.high_ms


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


@pytest.mark.parametrize("kind", [OpKind.matmul, OpKind.conv])
def test_a_product_of_two_activations_is_priced_by_both(kind):
    a = OpNode("a", OpKind.lut, "SiLU", (), (1, 16, 16), "a")
    b = OpNode("b", OpKind.lut, "SiLU", (), (1, 16, 16), "b")
    sizes = {"inner": 16} if kind == OpKind.matmul else {"in": 16, "out": 16, "groups": 1, "kernel": 1, "weights": 256}
    m = OpNode("m", kind, "torch.conv2d", ("a", "b"), (1, 16, 16), "m", attrs=sizes)
    graph = ModelGraph((a, b, m), (("0", "m"),))
    int8 = all_at(graph, QDtype.qint8)
    pricer = Pricer(graph, MODEL)
    ops = [int8.with_ops({n: OpQConfig(QDtype.qint16) for n in names}) for names in ([], ["a"], ["a", "b"])]
    rows = [replace(features(graph, q)[-1], boundary=0) for q in ops]
    times = [pricer.times(row)[1] - 1e-3 * MODEL.gemm_us_ghz / 1.5 for row in rows]
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


def test_the_weights_of_a_module_that_is_called_twice_count_once():
    report = predict(GRAPHS["shared"], all_at(GRAPHS["shared"], QDtype.qint8), MODEL)
    calls = [op for op in report.ops if op.kind == "conv"]
    assert len(calls) > 1
    assert report.weight_mb == pytest.approx(4 * 4e-6)
    assert all(op.weight_bytes == 16 for op in calls)  # each call reads them


def test_a_network_without_any_work_has_finite_costs():
    graph = ModelGraph((OpNode("x", OpKind.input, "QuantStub", (), (1, 2), "x"),), (("0", "x"),))
    pricer = Pricer(graph, CostModel(fixed_ms=0.0))
    int8 = all_at(graph, QDtype.qint8)
    assert pricer.report(int8).fps < 1e13
    assert pricer.change(int8, int8).ratio == 1.0


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
    assert Pricer(network_of(512), MODEL).large == pytest.approx(
        1 - MODEL.large_gemm_gmac / (512 * 512 * 64 * 64 * 9e-9)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: v}, f"cost.{name} is a number above 0, but") for name in RATES for v in (0.0, -1.0, inf, nan)),
        *(({name: v}, f"cost.{name} is a number of at least 0") for name in AMOUNTS for v in (-1.0, inf, nan)),
        *(({"onchip_mb": v}, "cost.onchip_mb is a number above 0, or null") for v in (0.0, -1.0, inf, nan)),
        *(
            ({"mac_factors": {"qint8/qint8": v}}, "cost.mac_factors.qint8/qint8 is a number above 0 or")
            for v in ("abc", None, [], ["a", 1, 2], [1, 1, inf], nan, {"a": 1})
        ),
        ({"vector_factors": {"qint8": [2, 1, 3]}}, r"cost.vector_factors.qint8 is a number above 0 or \[lowest"),
        ({"mac_factors": {"qint8/qint8": [1, 2]}}, "cost.mac_factors.qint8/qint8 is a number"),
        ({"boundary_ms": [0, 2, 1]}, r"cost.boundary_ms is a number of at least 0 or \[lowest"),
        ({"element_prices": {"resize": 1}}, "cost.element_prices has a price for .*, but got none for elementwise, gr"),
        *(({"interval": v}, r"cost.interval is \[lowest, highest\] around 1") for v in ([1.1, 1.2], [0, 2], "ab", [1])),
    ],
)
def test_parameters_that_no_device_has_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        CostModel(**changes)


def test_a_factor_may_be_a_single_number():
    assert CostModel(vector_factors={"qint8": 1.5}).vector_factors == {"qint8": (1.5, 1.5, 1.5)}
