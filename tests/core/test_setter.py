import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.graphs import chain

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.core.qconfig import OpQConfig
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, ModuleNameSetter, SensitiveSetter, TemplateSetter, ratio_candidates

GRAPH = chain(OpKind.input, OpKind.conv, OpKind.lut, OpKind.conv, OpKind.lut, OpKind.conv)
NAMES = [n.name for n in GRAPH.nodes]


def test_the_first_setter_wins_and_is_recorded():
    qconfig = resolve(
        GRAPH,
        [ModuleNameSetter({"op2": "qint16"}), HighPrecisionOutput(), TemplateSetter(QDtype.qint8)],
        "nash-m",
    )
    assert qconfig.ops["op2"].output == "qint16"
    assert qconfig.ops["op2"].rule == "module name op2"
    assert qconfig.ops["op1"].rule == "template all-int8"
    assert qconfig.ops["op5"].output is None  # the last convolution leaves the model: high-precision output
    assert qconfig.ops["op5"].weight == "qint8"


@given(st.floats(0, 1), st.lists(st.floats(0, 9), min_size=5, max_size=5))
def test_the_ratio_is_a_share_of_operators_rounded_up(ratio, scores):
    chosen = SensitiveSetter(dict(zip(NAMES, scores, strict=False)), NAMES[:5], ratio).chosen
    assert len(chosen) in (int(ratio * 5), int(ratio * 5) + 1)
    assert len(chosen) >= ratio * 5 - 1e-8
    rest = [n for n in NAMES[:5] if n not in chosen]
    by_name = dict(zip(NAMES, scores, strict=False))
    assert all(by_name[a] >= by_name[b] for a in chosen for b in rest)


@given(st.integers(1, 60), st.data())
def test_a_ratio_of_k_out_of_n_promotes_k(n, data):
    k = data.draw(st.integers(0, n))
    assert len(SensitiveSetter({}, [str(i) for i in range(n)], k / n).chosen) == k


def test_ties_go_by_graph_order():
    assert SensitiveSetter(dict.fromkeys(NAMES, 1.0), NAMES, 0.5).chosen == tuple(NAMES[:3])


def test_a_larger_ratio_keeps_what_a_smaller_one_promoted():
    scores = {name: (i * 7) % 5 for i, name in enumerate(NAMES)}
    sets = [set(SensitiveSetter(scores, NAMES, r / 10).chosen) for r in range(11)]
    assert all(a <= b for a, b in zip(sets, sets[1:], strict=False))


def test_bad_requests_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"between 0 and 1, but got 1\.2"):
        SensitiveSetter({}, NAMES, 1.2)
    with pytest.raises(ConfigError, match="but got nope"):
        resolve(GRAPH, [ModuleNameSetter({"nope": "qint16"}), TemplateSetter(QDtype.qint8)], "nash-m")
    with pytest.raises(ConfigError, match=r"qconfig\[op1\] is one of qint8"):
        resolve(GRAPH, [ModuleNameSetter({"op1": "int16"}), TemplateSetter(QDtype.qint8)], "nash-m")
    with pytest.raises(ConfigError, match="no setter answers for op0"):
        resolve(GRAPH, [], "nash-m")


def test_a_name_without_a_quantizer_is_refused_and_a_fixed_scale_is_kept():
    graph = chain(OpKind.input, OpKind.move, OpKind.lut)
    with pytest.raises(ConfigError, match="with a quantizer, or a module of the model, but got op1"):
        resolve(graph, [ModuleNameSetter({"op1": "qint16"}), TemplateSetter(QDtype.qint8)], "nash-m")
    fixed = resolve(graph, [ModuleNameSetter({"op2": "qint8@0.05"}), TemplateSetter(QDtype.qint8)], "nash-m")
    assert fixed.ops["op2"].fixed_scale == 0.05
    with pytest.raises(ConfigError, match=r"qconfig\[op2\]: a fixed scale is a number above 0, but got 'x'"):
        resolve(graph, [ModuleNameSetter({"op2": "qint8@x"}), TemplateSetter(QDtype.qint8)], "nash-m")


def setting(value, graph=GRAPH, name="op1"):
    """What a module-name setting makes of one operator of an all-int8 model."""
    setters = [ModuleNameSetter({name: value}), HighPrecisionOutput(), TemplateSetter(QDtype.qint8)]
    return resolve(graph, setters, "nash-m").ops[name]


def test_every_written_form_means_the_same_operator_qconfig():
    assert setting("qint8/qint16").weight == setting({"output": "qint8", "weight": "qint16"}).weight == "qint16"
    assert setting("qint16@0..200").known_range == setting({"output": "qint16", "known_range": [0, 200]}).known_range
    assert setting("qint16@-1..1").pinned_scale() == 1 / 32768
    assert setting("qint8@0.05").pinned_scale() == setting({"output": "qint8", "fixed_scale": 0.05}).pinned_scale()
    given = OpQConfig(QDtype.qint16, QDtype.qint8, observer="mse", frozen=True)
    assert setting(given) == setting({"output": "qint16", "observer": "mse", "frozen": True})
    assert setting({"output": None}, name="op5").output is None


def test_what_a_setting_leaves_open_is_decided_by_the_next_rules():
    op = setting({"observer": "percentile", "frozen": True})
    assert (op.output, op.observer, op.frozen) == ("qint8", "percentile", True)
    assert op.rule == "template all-int8; module name op1: observer, frozen"
    setters = [
        ModuleNameSetter({"op1": {"weight_axis": -1}}),
        SensitiveSetter({}, ["op1"], 1.0),
        TemplateSetter(QDtype.qint8),
    ]
    op = resolve(GRAPH, setters, "nash-m").ops["op1"]
    assert (op.output, op.weight_axis) == ("qint16", -1)
    assert op.rule.startswith("sensitive 1: rank 1 of 1; module name")


def test_kl_is_refused_for_int16_and_falls_away_where_int16_came_from_elsewhere():
    with pytest.raises(ConfigError, match="kl is for qint8, but got qint16: its 32768 levels exceed"):
        setting({"output": "qint16", "observer": "kl"})
    setters = [ModuleNameSetter({"op1": {"observer": "kl"}}), TemplateSetter(QDtype.qint16)]
    assert resolve(GRAPH, setters, "nash-m").ops["op1"].observer is None
    assert setting({"observer": "kl"}).observer == "kl"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "is a text, a mapping or an OpQConfig, but got 3"),
        ("qint16@200..0", "low..high, two ordered numbers, but got '200..0'"),
        ("qint16@0..x", "low..high, two ordered numbers"),
        ("qint8/qint16@0.1", "follows the output dtype"),
        ({"outputs": "qint8"}, "has the keys output, weight, input, .*, but got outputs"),
        ({"output": "qint8", "observer": "median"}, "observer is one of minmax, .*, but got 'median'"),
        ({"output": "qint8", "known_range": [0]}, "two ordered numbers"),
        ({"output": "qint8", "frozen": 1}, "frozen is true or false, but got 1"),
        ({"output": "qint8", "weight_axis": -2}, "weight_axis is an axis of the weight, or -1"),
        ({"output": "qint8", "fixed_scale": 1, "known_range": [0, 1]}, "a fixed scale or a known range, but got both"),
        ({"output": "float16", "fixed_scale": 0.1}, "fixed_scale is for an integer output, but got float16"),
        ({"output": "qint8", "input": ["qint8", "qint8", "qint16"]}, "but got 3 for op1, which reads 1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_line(value, message):
    with pytest.raises(ConfigError, match=message) as refused:
        setting(value)
    assert "\n" not in str(refused.value)


def test_a_weight_dtype_for_an_operator_without_weight_is_refused():
    with pytest.raises(ConfigError, match=r"with a weight, but got qint16 for op2 \(lut\)"):
        setting("qint8/qint16", name="op2")


def test_a_name_inside_a_fused_group_is_answered_with_the_groups_name():
    conv = OpNode("conv", OpKind.conv, "Conv2d", (), (1, 4), "conv", "conv", fused=("bn", "relu"))
    with pytest.raises(ConfigError, match="but got bn. It is fused into conv: name that one."):
        resolve(ModelGraph((conv,), (("0", "conv"),)), [ModuleNameSetter({"bn": "qint16"})], "nash-m")


def test_one_input_dtype_holds_for_every_input():
    a, b = (OpNode(n, OpKind.input, "input", (), (1, 4), n) for n in "ab")
    add = OpNode("[add]", OpKind.add, "torch.add", ("a", "b"), (1, 4), "[add]")
    graph = ModelGraph((a, b, add), (("0", "[add]"),))
    assert setting({"output": "qint16", "input": "qint8"}, graph, "[add]").input == ("qint8", "qint8")
    assert setting({"output": "qint16", "input": [None, "qint8"]}, graph, "[add]").input == (None, "qint8")


# ---- constants


def with_constant(kind=OpKind.add, weight=None, moved=False):
    x = OpNode("x", OpKind.input, "input", (), (1, 4), "x")
    const = OpNode("const[pos]", OpKind.constant, "constant", (), (1, 4), "const[pos]")
    move = OpNode("[reshape]", OpKind.move, "torch.reshape", ("const[pos]",), (1, 4))
    read = "[reshape]" if moved else "const[pos]"
    op = OpNode("sum", kind, f"torch.{kind.value}", ("x", read), (1, 4), "sum", weight)
    last = OpNode("last", OpKind.lut, "torch.silu", ("sum",), (1, 4), "last")
    nodes = (x, const, move, op, last) if moved else (x, const, op, last)
    return ModelGraph(nodes, (("0", "last"),))


@pytest.mark.parametrize("moved", [False, True])
def test_a_constant_follows_the_operator_that_reads_it(moved):
    setters = [ModuleNameSetter({"sum": "qint16"}), TemplateSetter(QDtype.qint8)]
    qconfig = resolve(with_constant(moved=moved), setters, "nash-m")
    assert qconfig.ops["const[pos]"].output == "qint16"
    assert qconfig.ops["const[pos]"].rule == "constant follows sum"
    assert list(qconfig.ops) == ["x", "const[pos]", "sum", "last"]  # in order of execution


def test_a_named_constant_is_what_its_name_says():
    setters = [ModuleNameSetter({"const[pos]": "qint16@-2..2"}), TemplateSetter(QDtype.qint8)]
    assert resolve(with_constant(), setters, "nash-m", propagate=False).ops["const[pos]"].known_range == (-2, 2)


def table(*more):
    const = OpNode("const[word.weight]", OpKind.constant, "constant", (), (9, 4), "const[word.weight]")
    rows = OpNode("word[embedding]", OpKind.order, "torch.embedding", (const.name,), (1, 4))
    norm = OpNode("norm", OpKind.layer_norm, "LayerNorm", (rows.name,), (1, 4), "norm")
    return ModelGraph((const, rows, norm, *more), (("0", norm.name),))


@pytest.mark.parametrize("name", ["word", "word.weight", "const[word.weight]"])
def test_the_name_of_an_embedding_sets_its_table(name):
    ops = resolve(table(), [ModuleNameSetter({name: "qint16"}), TemplateSetter(QDtype.qint8)], "nash-m").ops
    assert [op.output for op in ops.values()] == ["qint16", "qint8"]


def test_a_module_with_operators_leaves_its_constants_to_follow_what_reads_them():
    within = OpNode("word.act", OpKind.lut, "SiLU", ("norm",), (1, 4), "word.act")
    setters = [ModuleNameSetter({"word": "qint16"}), TemplateSetter(QDtype.qint8)]
    ops = resolve(table(within), setters, "nash-m").ops
    assert ops["word.act"].output == "qint16"
    assert ops["const[word.weight]"].output == "qint8"


def test_a_look_up_has_no_precision_of_its_own_and_the_message_names_what_has():
    with pytest.raises(ConfigError, match=r"of what it reads: name const\[word.weight\]\."):
        resolve(table(), [ModuleNameSetter({"word[embedding]": "qint16"}), TemplateSetter(QDtype.qint8)], "nash-m")


def test_a_constant_read_as_a_weight_or_by_a_high_precision_output_is_int8():
    graph = with_constant(OpKind.linear)
    assert resolve(graph, TemplateSetter(QDtype.qint16), "nash-m").ops["const[pos]"].output == "qint8"
    graph = ModelGraph(with_constant(OpKind.matmul).nodes[:3], (("0", "sum"),))
    setters = [HighPrecisionOutput(), TemplateSetter(QDtype.qint16)]
    assert resolve(graph, setters, "nash-m").ops["const[pos]"].output == "qint8"


def test_constants_are_no_candidates_of_a_ratio():
    graph = with_constant()
    wide = resolve(graph, TemplateSetter(QDtype.qint16), "nash-m")
    assert wide.ops["const[pos]"].output == "qint16"
    assert ratio_candidates(graph, wide) == ("x", "sum", "last")
