"""What the tool chain lowers silently is lowered here with its reason; what it cannot do is refused."""

import pytest
from test_setter import chain

from qflow.core.device import DeviceRules, apply_rules, input_dtypes
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.core.setter import ModuleNameSetter, TemplateSetter, resolve


def applied(graph, rules, dtypes=None, scores=None):
    setters = [ModuleNameSetter(dtypes or {}), TemplateSetter(QDtype.qint16)]
    return apply_rules(graph, resolve(graph, setters, "nash-m"), rules, scores)


def test_resize_takes_and_gives_int8_only(nash_m):
    graph = chain(OpKind.input, OpKind.conv, OpKind.resize, OpKind.conv)
    ops = applied(graph, nash_m).ops
    assert ops["op1"].output == "qint8"
    assert "op2 (resize) takes int8 input only" in ops["op1"].fallback
    assert ops["op2"].output == "qint8"
    assert ops["op0"].output == "qint16"


def test_the_producer_is_found_through_moves(nash_m):
    graph = chain(OpKind.input, OpKind.lut, OpKind.move, OpKind.move, OpKind.resize)
    assert applied(graph, nash_m).ops["op1"].output == "qint8"


def test_conv_and_add_fused_take_int8_inputs(nash_m):
    base = chain(OpKind.input, OpKind.lut, OpKind.conv)
    fused = OpNode(
        "sum[add]", OpKind.conv, "Conv2d", ("op1", "op0"), (1, 8, 4, 4), "sum[add]", "op2", fused_types=("Add",)
    )
    graph = ModelGraph((*base.nodes[:2], fused), (("0", "sum[add]"),))
    ops = applied(graph, nash_m).ops
    assert {ops["op0"].output, ops["op1"].output} == {QDtype.qint8}
    assert ops["sum[add]"].output == "qint16"


def matmul_graph():
    a = OpNode("a", OpKind.lut, "SiLU", (), (1, 4, 8), "a")
    b = OpNode("b", OpKind.lut, "SiLU", (), (1, 8, 4), "b")
    m = OpNode("[matmul]", OpKind.matmul, "torch.matmul", ("a", "b"), (1, 4, 4), "[matmul]")
    return ModelGraph((a, b, m), (("0", "[matmul]"),))


def test_of_two_int16_inputs_a_matmul_keeps_the_more_sensitive(nash_m):
    assert applied(matmul_graph(), nash_m).names(QDtype.qint8) == ("b",)
    assert applied(matmul_graph(), nash_m, scores={"a": 0.1, "b": 0.9}).names(QDtype.qint8) == ("a",)


def test_int16_weight_on_int16_input_is_refused_by_name(nash_m):
    graph = chain(OpKind.input, OpKind.conv, OpKind.lut)
    with pytest.raises(ConfigError, match="no int16 x int16, but got int16 weight and int16 input for op1"):
        applied(graph, nash_m, {"op1": "qint16/qint16"})
    with_int8_input = applied(graph, nash_m, {"op0": "qint8", "op1": "qint16/qint16"})
    assert with_int8_input.ops["op1"].weight == "qint16"
    dual = DeviceRules(march="nash-m", oe_version="3.2.0", dual_int16=True)
    assert applied(graph, dual, {"op1": "qint16/qint16"}).ops["op1"].weight == "qint16"


def test_fp16_is_refused_where_there_is_no_float_path(nash_m):
    graph = chain(OpKind.input, OpKind.conv, OpKind.lut)
    with pytest.raises(ConfigError, match=r"fp16 output for op1 \(conv\): the GEMM engine has no float path"):
        applied(graph, nash_m, {"op1": "float16"})
    assert applied(graph, nash_m, {"op2": "float16"}).ops["op2"].output == "float16"


def test_input_dtypes_follow_the_producer(nash_m):
    graph = chain(OpKind.input, OpKind.conv, OpKind.move, OpKind.conv)
    qconfig = applied(graph, nash_m, {"op1": "qint8"})
    assert input_dtypes(graph, qconfig, "op3") == (QDtype.qint8,)
    assert input_dtypes(graph, qconfig, "op1") == (QDtype.qint16,)


def test_a_matmul_of_one_tensor_with_itself_loses_int16(nash_m):
    q = OpNode("q", OpKind.lut, "SiLU", (), (1, 4, 8), "q")
    t = OpNode("[transpose]", OpKind.move, "torch.transpose", ("q",), (1, 8, 4))
    m = OpNode("[matmul]", OpKind.matmul, "torch.matmul", ("q", "[transpose]"), (1, 4, 4), "[matmul]")
    assert applied(ModelGraph((q, t, m), (("0", "[matmul]"),)), nash_m).ops["q"].output == "qint8"


def test_fp16_into_a_gemm_and_float32_are_refused(nash_m):
    graph = chain(OpKind.input, OpKind.lut, OpKind.conv)
    with pytest.raises(ConfigError, match=r"fp16 input for op2 \(conv\)"):
        applied(graph, nash_m, {"op1": "float16"})
    with pytest.raises(ConfigError, match="got float32 for op1"):
        applied(graph, nash_m, {"op1": "float32"})
