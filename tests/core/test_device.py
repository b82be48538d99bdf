"""What the tool chain lowers silently is lowered here with its reason; what it cannot do is refused."""
# Long: the cases of every device rule share the same graphs and the same rules of nash-m.

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.graphs import chain

from qflow.core.device import apply_rules, input_dtypes
from qflow.core.device_rules import DeviceRules
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import TRANSPARENT_KINDS, ModelGraph, OpKind, OpNode
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, ModuleNameSetter, TemplateSetter

NASH_M = DeviceRules(
    march="nash-m",
    oe_version="3.0.17",
    int8_inputs={"resize": [0], "max_pool": [0], "avg_pool": [0], "grid_sample": [0]},
    int8_outputs=["resize", "max_pool", "grid_sample"],
    float16_kinds=["layer_norm", "lut", "softmax", "add"],
)


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
    dual = DeviceRules(march="nash-m", oe_version="3.2.0", dual_int16=True, dual_int16_ops=["conv"])
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


def test_float32_is_refused(nash_m):
    with pytest.raises(ConfigError, match="got float32 for op1"):
        applied(chain(OpKind.input, OpKind.lut, OpKind.conv), nash_m, {"op1": "float32"})


# ---- fp16: the vector unit only, with casts at the borders


def test_fp16_between_integer_operators_is_cast_where_a_gemm_reads_it(nash_m):
    graph = chain(OpKind.input, OpKind.layer_norm, OpKind.linear, OpKind.lut)
    ops = applied(graph, nash_m, {"op1": "float16"}).ops
    assert ops["op1"].output == "float16"
    assert ops["op2"].input == ("qint16",)
    assert ops["op2"].fallback == "reads fp16 from op1: cast to qint16 at its input"
    int8 = applied(graph, nash_m, {"op1": "float16", "op2": "qint8"}).ops
    assert int8["op2"].input == ("qint8",)
    wide_weight = applied(graph, nash_m, {"op1": "float16", "op2": "qint16/qint16"}).ops
    assert wide_weight["op2"].input == ("qint8",)


def test_fp16_stays_fp16_between_vector_operators(nash_m):
    ops = applied(chain(OpKind.input, OpKind.layer_norm, OpKind.lut), nash_m, {"op1": "float16"}).ops
    assert ops["op2"].input is None
    assert not ops["op2"].fallback


def test_fp16_at_an_int8_only_input_is_cast_or_refused(nash_m):
    ops = applied(chain(OpKind.input, OpKind.lut, OpKind.avg_pool), nash_m, {"op1": "float16"}).ops
    assert ops["op2"].input == ("qint8",)
    base = chain(OpKind.input, OpKind.lut)
    pool = OpNode("pool", OpKind.max_pool, "MaxPool2d", ("op1",), (1, 4))  # no quantizer of its own: no place to cast
    with pytest.raises(ConfigError, match=r"pool \(max_pool\) takes int8 input only, but got float16 from op1"):
        applied(ModelGraph((*base.nodes, pool), (("0", "pool"),)), nash_m, {"op1": "float16"})


def test_asking_a_gemm_for_fp16_is_refused(nash_m):
    graph = chain(OpKind.input, OpKind.lut, OpKind.conv)
    with pytest.raises(ConfigError, match=r"fp16 input for op2 \(conv\): the GEMM engine has no float path"):
        applied(graph, nash_m, {"op2": {"output": "qint16", "input": "float16"}})


# ---- what an operator asks of its own inputs


def test_an_operator_that_asks_for_int8_leaves_its_producer_at_int16(nash_m):
    graph = chain(OpKind.input, OpKind.lut, OpKind.resize)
    qconfig = applied(graph, nash_m, {"op2": {"output": "qint16", "input": "qint8"}})
    assert qconfig.ops["op1"].output == "qint16"
    assert qconfig.ops["op2"].output == "qint8"  # by its own rule
    assert input_dtypes(graph, qconfig, "op2") == (QDtype.qint8,)


def test_asking_for_int16_where_int8_only_goes_in_is_refused(nash_m):
    graph = chain(OpKind.input, OpKind.lut, OpKind.resize)
    with pytest.raises(ConfigError, match=r"op2 \(resize\) takes int8 input only, but got input qint16"):
        applied(graph, nash_m, {"op2": {"output": "qint8", "input": "qint16"}})


def test_an_asked_input_that_the_producer_gives_anyway_is_dropped(nash_m):
    graph = chain(OpKind.input, OpKind.lut, OpKind.lut)
    ops = applied(graph, nash_m, {"op2": {"output": "qint16", "input": "qint16"}}).ops
    assert ops["op2"].input is None
    assert applied(graph, nash_m, {"op2": {"output": "qint16", "input": "qint8"}}).ops["op2"].input == ("qint8",)


def test_a_cast_in_front_of_a_conv_makes_room_for_an_int16_weight(nash_m):
    graph = chain(OpKind.input, OpKind.conv, OpKind.lut)
    op = {"output": "qint16", "weight": "qint16", "input": "qint8"}
    assert applied(graph, nash_m, {"op1": op}).ops["op0"].output == "qint16"


# ---- matmul


def test_a_matmul_input_cast_to_int8_leaves_the_other_one_int16(nash_m):
    dtypes = {"[matmul]": {"output": "qint16", "input": ["qint8", None]}}
    qconfig = applied(matmul_graph(), nash_m, dtypes)
    assert qconfig.ops["a"].output == qconfig.ops["b"].output == "qint16"
    assert input_dtypes(matmul_graph(), qconfig, "[matmul]") == (QDtype.qint8, QDtype.qint16)


@pytest.mark.parametrize(
    ("ranking", "lowered"),
    [
        (None, "b"),  # the producer that comes first keeps int16
        (["a", "b"], "b"),
        (["b", "a"], "a"),
        (["a"], "b"),
        (["b"], "a"),
        ([], "a"),  # an unranked first producer falls back, even if the second is unranked too
    ],
)
def test_the_plugins_ranking_of_matmul_inputs(nash_m, ranking, lowered):
    graph = matmul_graph()
    requested = resolve(graph, TemplateSetter(QDtype.qint16), "nash-m")
    assert apply_rules(graph, requested, nash_m, ranking=ranking).names(QDtype.qint8) == (lowered,)


def test_without_scores_the_order_of_execution_decides_not_the_position(nash_m):
    a, b, m = matmul_graph().nodes
    swapped = ModelGraph((a, b, replace(m, inputs=("b", "a"))), (("0", "[matmul]"),))
    assert applied(swapped, nash_m).names(QDtype.qint8) == ("b",)


def test_other_marches_take_no_int16_in_a_matmul_and_oe32_takes_two(nash_m):
    none = replace(nash_m, matmul_int16_inputs=0)
    assert applied(matmul_graph(), none).names(QDtype.qint8) == ("a", "b")
    assert applied(matmul_graph(), replace(nash_m, matmul_int16_inputs=2)).names(QDtype.qint8) == ()


# ---- a convolution or linear layer whose weight is computed is a product of two activations, as a matmul is


@pytest.mark.parametrize("kind", [OpKind.conv, OpKind.conv_transpose, OpKind.linear])
def test_of_two_int16_factors_a_computed_weight_is_lowered_as_in_a_matmul(nash_m, kind):
    a, b, m = matmul_graph().nodes
    product = replace(m, kind=kind, op_type={OpKind.conv: "torch.conv2d"}.get(kind, f"torch.{kind}"))
    graph = ModelGraph((a, b, product), (("0", "[matmul]"),))
    assert applied(graph, nash_m).names(QDtype.qint8) == ("b",)
    lowered = applied(graph, nash_m, scores={"a": 0.1, "b": 0.9})
    assert lowered.names(QDtype.qint8) == ("a",)
    assert lowered.ops["a"].fallback == "[matmul] takes 1 int16 input only"
    dual = replace(nash_m, dual_int16=True, dual_int16_ops=["conv2d", "linear"])
    assert applied(graph, dual).names(QDtype.qint8) == (("b",) if kind == OpKind.conv_transpose else ())
    assert applied(graph, replace(nash_m, matmul_int16_inputs=0)).names(QDtype.qint8) == ("b",)


def test_the_computed_bias_of_a_product_is_no_factor(nash_m):
    a, b, m = matmul_graph().nodes
    bias = replace(a, name="bias", quantizer="bias")
    product = replace(m, kind=OpKind.linear, op_type="torch.linear", inputs=("a", "b", "bias"))
    assert applied(ModelGraph((bias, a, b, product), (("0", "[matmul]"),)), nash_m).names(QDtype.qint8) == ("b",)


# ---- int16 x int16


def leaving_conv(op_type="torch.nn.modules.conv.Conv2d"):
    x = OpNode("x", OpKind.input, "input", (), (1, 4), "x")
    conv = OpNode("conv", OpKind.conv, op_type, ("x",), (1, 4), "conv", "conv")
    return ModelGraph((x, conv), (("0", "conv"),))


def test_an_int16_x_int16_gemm_gives_no_accumulator(nash_m):
    oe32 = replace(nash_m, dual_int16=True, oe_version="3.2.0")
    op = {"output": None, "weight": "qint16"}
    assert applied(leaving_conv(), oe32, {"conv": op}).ops["conv"].output == "qint16"
    assert "no high-precision output" in applied(leaving_conv(), oe32, {"conv": op}).ops["conv"].fallback
    assert applied(leaving_conv(), oe32, {"conv": op, "x": "qint8"}).ops["conv"].output is None
    kept = replace(oe32, dual_high_precision=True)
    assert applied(leaving_conv(), kept, {"conv": op}).ops["conv"].output is None


def test_oe32_multiplies_int16_by_int16_in_conv2d_and_linear_only(nash_m):
    oe32 = replace(nash_m, dual_int16=True, oe_version="3.2.0")
    assert applied(leaving_conv(), oe32, {"conv": "qint16/qint16"}).ops["conv"].weight == "qint16"
    with pytest.raises(ConfigError, match="OpenExplorer 3.2.0 has no int16 x int16"):
        applied(leaving_conv("torch.nn.modules.conv.Conv3d"), oe32, {"conv": "qint16/qint16"})


def test_a_high_precision_output_inside_the_model_is_refused(nash_m):
    graph = chain(OpKind.input, OpKind.conv, OpKind.lut)
    with pytest.raises(ConfigError, match=r"leaves the model, but got one for op1 \(conv\). Use qint16."):
        applied(graph, nash_m, {"op1": {"output": None}})


def test_a_lowered_fixed_scale_keeps_its_threshold_and_a_known_range_needs_nothing(nash_m):
    graph = chain(OpKind.input, OpKind.lut, OpKind.resize)
    op = applied(graph, nash_m, {"op1": "qint16@0.001"}).ops["op1"]
    assert op.fixed_scale * 128 == pytest.approx(0.001 * 32768)
    assert "fixed scale x 256 = 0.256 keeps its threshold" in op.fallback
    known = applied(graph, nash_m, {"op1": "qint16@0..4"}).ops["op1"]
    assert (known.output, known.pinned_scale()) == ("qint8", 4 / 128)


def test_rules_that_match_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"rules.int8_outputs takes operator kinds input, .*, but got rezise"):
        DeviceRules(march="m", oe_version="1", int8_outputs=["rezise"])
    with pytest.raises(ConfigError, match="matmul_int16_inputs is 0, 1 or 2, but got 3"):
        DeviceRules(march="m", oe_version="1", matmul_int16_inputs=3)


# ---- properties of any graph and any request

FLOWING = [k for k in OpKind if k not in (OpKind.input, OpKind.constant, OpKind.skipped)]
SETTINGS = ["qint8", "qint16", "float16", "qint8/qint16", "qint16/qint16", "qint16@0.001", "qint16@0..3"]
SETTINGS += [
    {"output": "qint16", "input": "qint8"},
    {"output": "qint8", "input": [None, "qint16"]},
    {"weight": "qint16"},
]


@st.composite
def graphs(draw):
    nodes = [OpNode("op0", OpKind.input, "input", (), (1, 8), "op0")]
    for i in range(1, draw(st.integers(2, 9))):
        kind = draw(st.sampled_from(FLOWING + [OpKind.constant]))
        two = kind in (OpKind.matmul, OpKind.add, OpKind.mul, OpKind.concat, OpKind.grid_sample, OpKind.conv)
        weighted = kind in (OpKind.conv, OpKind.linear, OpKind.conv_transpose)
        computed = weighted and draw(st.booleans())  # the weight is an activation
        two |= computed
        names = [draw(st.sampled_from([n.name for n in nodes])) for _ in range(1 + two)]
        fused = ("Add",) if kind == OpKind.conv and not computed and draw(st.booleans()) else ()
        names = names if fused or computed or kind != OpKind.conv else names[:1]
        nodes.append(
            OpNode(
                name=f"op{i}",
                kind=kind,
                op_type={OpKind.conv: "torch.nn.modules.conv.Conv2d", OpKind.linear: "torch.linear"}.get(
                    kind, kind.value
                ),
                inputs=() if kind == OpKind.constant else tuple(names),
                shape=(1, 8),
                quantizer=None if kind in TRANSPARENT_KINDS else f"op{i}",
                weight=f"op{i}" if weighted and not computed else None,
                fused_types=fused,
            )
        )
    return ModelGraph(tuple(nodes), (("0", nodes[-1].name),))


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(graphs(), st.data())
def test_rules_applied_twice_change_nothing_and_are_never_refused(graph, data):
    names = [n.name for n in graph.quantized]
    wanted = data.draw(st.dictionaries(st.sampled_from(names), st.sampled_from(SETTINGS), max_size=3))
    rules = data.draw(st.sampled_from(["3.0.17", "3.2.0", "float"]))
    device = {
        "3.0.17": NASH_M,
        "3.2.0": replace(NASH_M, dual_int16=True, matmul_int16_inputs=2),
        "float": replace(NASH_M, float16_kinds=[k.value for k in OpKind]),
    }[rules]
    scores = data.draw(st.dictionaries(st.sampled_from(names), st.floats(0, 1), max_size=4))
    template = data.draw(st.sampled_from([QDtype.qint8, QDtype.qint16]))
    try:
        requested = resolve(
            graph, [ModuleNameSetter(wanted), HighPrecisionOutput(), TemplateSetter(template)], "nash-m"
        )
        once = apply_rules(graph, requested, device, scores)
    except ConfigError:
        assert wanted  # a template alone is never refused
        return
    assert apply_rules(graph, once, device, scores) == once
    for name, op in once.ops.items():
        if replace(op, input=None).effective != replace(requested.ops[name], input=None).effective:
            assert op.fallback  # a change has its reason; dropping a cast that casts nothing is none
    for node in graph.nodes:  # what the device promises holds for what is computed
        arriving = input_dtypes(graph, once, node.name)
        if node.kind.value in device.int8_inputs and node.inputs:
            assert arriving[0] != "qint16"
        if node.two_activations and rules != "3.2.0":
            assert arriving.count(QDtype.qint16) <= 1


@settings(max_examples=100, deadline=None)
@given(graphs(), st.sampled_from(list(SETTINGS[:2])))
def test_a_template_alone_is_never_refused(graph, dtype):
    requested = resolve(graph, [HighPrecisionOutput(), TemplateSetter(QDtype(dtype))], "nash-m")
    apply_rules(graph, requested, NASH_M)


def test_values_inside_a_norm_are_int16_whatever_its_dtype_and_halves_in_fp16():
    inside = ("op1.var_mean.var", "op1.rsqrt")
    base = chain(OpKind.input, OpKind.layer_norm, OpKind.lut)
    graph = replace(base, nodes=(base.nodes[0], replace(base.nodes[1], inner=inside), base.nodes[2]))
    rules = replace(NASH_M, inner_int16=["layer_norm"])
    for dtype, inner in (("qint8", QDtype.qint16), ("qint16", QDtype.qint16), ("float16", QDtype.float16)):
        found = applied(graph, rules, {"op1": dtype})
        assert found.ops["op1"].inner == inner
        assert found.ops["op2"].inner is None
        exact = applied(graph, NASH_M, {"op1": dtype})
        assert exact.ops["op1"].inner is None
        assert exact.digest != found.digest
        assert exact.digest == applied(base, rules, {"op1": dtype}).digest  # a network without inner values
