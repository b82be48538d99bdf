"""How a measured profile changes the predicted costs."""

import json
import re
from dataclasses import replace

import pytest
from support.networks import MODEL, all_at, network

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.core.qconfig import OpQConfig
from qflow.cost_model.latency import Pricer
from qflow.cost_model.measured import measure
from qflow.cost_model.records import Measured
from qflow.cost_model.table import cost_text
from qflow.study.manifest import profile_digest


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


def test_the_host_s_part_of_a_profile_is_latency_only():
    """Its CPU nodes, and float outputs that are converted there, come on top of what was measured on the BPU."""
    graph = network()
    int8 = all_at(graph, QDtype.qint8)
    measured = Measured({}, int8, total_ms=2.0, host_ms=0.5, ddr_bytes=1_500_000)
    plain = Pricer(graph, MODEL, measured).report(int8)
    assert (plain.bpu_ms, plain.latency_ms) == pytest.approx((2.0, 2.0 + MODEL.host_ms + MODEL.host_output_ms + 0.5))
    converted = Pricer(graph, replace(MODEL, host_dequantize=True), measured).report(int8)
    assert converted.bpu_ms - plain.bpu_ms == pytest.approx(20 * 32 * 32e-6 / MODEL.float_melem_per_ms)
    assert "measured 1.500 MB a frame" in cost_text(plain)


def test_a_measured_operator_without_a_price_pays_for_casts():
    stub = [OpNode(n, OpKind.lut, "SiLU", (), (1, 8, 4, 4), n) for n in ("a", "b")]
    graph = ModelGraph((*stub, OpNode("c", OpKind.concat, "cat", ("a", "b"), (1, 16, 4, 4), "c")), (("0", "c"),))
    int8 = all_at(graph, QDtype.qint8)
    pricer = Pricer(graph, MODEL, Measured({"c": 0.5}, int8))
    mixed_ = pricer.report(int8.with_ops({"b": OpQConfig(QDtype.qint16)})).ops[-1]
    assert pricer.report(int8).ops[-1].ms == 0.5
    assert mixed_.ms > 0.5


def log_of(**nodes):
    """profiler.log with the average times of `nodes` in ms."""
    latency = {name.replace("_", "-", 2): {"Total": {"avg_time": ms}} for name, ms in nodes.items()}
    run = {"perf_result": {"FPS": 400.5, "average_latency": 9.0}}
    return f"{json.dumps(run)}\n***\n{json.dumps({'model_latency': latency})}"


def perf_of(latency=1.0, march="nash-m", layers=None):
    details = [{"layer name": name, "computing cost (no DDR)": cost} for name, cost in (layers or {}).items()]
    speed = {} if latency is None else {"latency (ms)": latency}
    ddr = {"loaded bytes per run": 7, "stored bytes per run": 3}
    info = {"BPU march": march}
    summary = {"performance": speed, "layer details": details, "DDR access data": ddr, "model info": info}
    return json.dumps({"summary": summary})


def measured_from(tmp_path, text):
    path = tmp_path / "report"
    path.write_text(text)
    return measure(path, network(), all_at(network(), QDtype.qint8))


def test_nodes_on_the_cpu_are_no_time_of_the_bpu(tmp_path):
    """Even where a node has the name of an operator."""
    log = log_of(**{"Node_0_BPU-m": 1.5, "Node_1_CPU-act": 0.25, "Node_2_BPU-n": 0.5})
    measured, lines = measured_from(tmp_path, log)
    assert (measured.times, measured.total_ms, measured.host_ms) == ({}, 2.0, 0.25)
    assert lines[0] == "Node-1-CPU-act: 0.2500 ms on the CPU, in the latency only"
    report = Pricer(network(), MODEL, measured).report(measured.reference)
    assert (report.bpu_ms, report.latency_ms) == pytest.approx((2.0, 2.0 + MODEL.host_ms + MODEL.host_output_ms + 0.25))


def test_a_report_brings_its_traffic(tmp_path):
    assert measured_from(tmp_path, perf_of())[0].ddr_bytes == 10


@pytest.mark.parametrize("march", ["", "nash-m", "NASH-M"])
def test_a_report_of_the_same_march_is_taken(tmp_path, march):
    assert measured_from(tmp_path, perf_of(march=march))[0].total_ms == 1.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (perf_of(latency=0), "A measured time is 1e-06 to 1e+06 ms, but got 0 in"),
        (perf_of(latency="1e-7"), "but got 1e-07 in"),
        (perf_of(latency=1e300), "but got 1e+300 in"),
        (perf_of(latency=None, layers={"act": 1e300}), "but got 1e+297 in"),
        (log_of(**{"Node_0_BPU-m": 0.0}), "but got 0 in"),
        (log_of(**{"Node_0_CPU-m": 1.0}), "but got 0 in"),
        (perf_of(march="nash-e"), "A profile is measured on nash-m, but got one of nash-e in"),
        (perf_of(march="bayes"), "A profile is measured on nash-m, but got one of bayes in"),
        (perf_of(layers={"foreign": 3}), "carry the names of the model's modules, but got foreign in"),
    ],
)
def test_what_no_board_measured_is_refused_in_one_line(tmp_path, text, says):
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        measured_from(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_report_that_is_gone_is_named(tmp_path):
    with pytest.raises(ConfigError, match="lies at device.profile, but got .*none.json: No such file"):
        profile_digest(str(tmp_path / "none.json"))
