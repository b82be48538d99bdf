"""A range stated at the inputs fixes all that follows from it: the guide's fixed-scale figure, and arithmetic."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.core.known_range import bounded, propagate
from qflow.core.resolve import resolve
from qflow.core.setter import ModuleNameSetter, TemplateSetter


def op(name, function, *inputs, operands=(), kind=OpKind.arithmetic, **more):
    quantizer = None if kind == OpKind.move else name
    return OpNode(name, kind, f"torch.{function}", inputs, (1, 4), quantizer, operands=operands, **more)


def stub(name):
    return OpNode(name, OpKind.input, "input", (), (1, 4), name)


def graph_of(*nodes):
    return ModelGraph(nodes, (("0", nodes[-1].name),))


# The guide: "the value range of input a and b is determined, and the value range of input c is uncertain. Except for
# quantstub_c and the last add, all other operators need to set fixed scale."
FIGURE = graph_of(
    stub("quantstub_a"),
    stub("quantstub_b"),
    stub("quantstub_c"),
    op("[mul]", "mul", "quantstub_a", "quantstub_b", operands=(None, None)),
    op("[sub]", "sub", "quantstub_a", "quantstub_b", operands=(None, None)),
    op("[cat]", "cat", "[mul]", "[sub]", kind=OpKind.concat),
    op("[reshape]", "reshape", "[cat]", kind=OpKind.move),
    op("[div]", "div", "[reshape]", operands=(None, 100.0)),
    op("sigmoid", "sigmoid", "[div]", kind=OpKind.lut),
    op("[add]", "add", "sigmoid", "quantstub_c", operands=(None, None), kind=OpKind.add),
)


def test_the_guides_figure_all_but_input_c_and_the_last_add_are_fixed():
    speeds = ModuleNameSetter({"quantstub_a": "qint16@0..200", "quantstub_b": "qint16@-1..1"})
    qconfig = resolve(FIGURE, [speeds, TemplateSetter(QDtype.qint8)], "nash-m")
    free = [name for name, found in qconfig.ops.items() if found.pinned_scale() is None]
    assert free == ["quantstub_c", "[add]"]
    assert qconfig.ops["quantstub_a"].pinned_scale() == 200 / 32768  # the guide: 200 divided by the quantization range
    assert qconfig.ops["[mul]"].known_range == (-200, 200)
    assert qconfig.ops["[sub]"].known_range == (-1, 201)
    assert qconfig.ops["[cat]"].known_range == (-200, 201)
    assert qconfig.ops["[mul]"].rule == "template all-int8; range -200..200 follows from quantstub_a, quantstub_b"
    low, high = qconfig.ops["sigmoid"].known_range
    assert (low, high) == pytest.approx((1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2.01))))


def test_ranges_can_be_given_beside_the_setters_and_need_not_be_carried_on():
    ranges = {"quantstub_a": (0, 200), "quantstub_b": (-1, 1)}
    given_so = resolve(FIGURE, TemplateSetter(QDtype.qint8), "nash-m", ranges=ranges)
    assert given_so.ops["[sub]"].known_range == (-1, 201)
    assert given_so.ops["quantstub_a"].rule == "template all-int8; range 0..200 is given"
    alone = resolve(FIGURE, TemplateSetter(QDtype.qint8), "nash-m", ranges=ranges, propagate=False)
    assert [n for n, found in alone.ops.items() if found.known_range] == ["quantstub_a", "quantstub_b"]
    with pytest.raises(ConfigError, match="A known range is for an operator, but got quantstub_d"):
        resolve(FIGURE, TemplateSetter(QDtype.qint8), "nash-m", ranges={"quantstub_d": (0, 1)})
    with pytest.raises(ConfigError, match=r"ranges\[quantstub_a\]: a known range is low..high"):
        resolve(FIGURE, TemplateSetter(QDtype.qint8), "nash-m", ranges={"quantstub_a": (1, 0)})


def test_a_fixed_scale_is_never_overruled_and_float_outputs_are_left():
    names = {"quantstub_a": "qint16@0..200", "quantstub_b": "qint16@-1..1", "[mul]": "qint8@0.5", "[sub]": "float16"}
    ops = resolve(FIGURE, [ModuleNameSetter(names), TemplateSetter(QDtype.qint8)], "nash-m").ops
    assert (ops["[mul]"].fixed_scale, ops["[mul]"].known_range) == (0.5, None)
    assert ops["[sub]"].known_range is None


def test_a_functions_own_bound_is_reported_not_pinned():
    assert bounded(FIGURE) == {"sigmoid": (0, 1)}
    assert propagate(FIGURE, {}) == {}
    pinned = resolve(FIGURE, TemplateSetter(QDtype.qint8), "nash-m").ops
    assert not any(found.known_range for found in pinned.values())
    relu6 = OpNode("conv", OpKind.conv, "Conv2d", (), (1, 4), "conv", "conv", fused_types=("BN", "ReLU6"))
    assert bounded(graph_of(relu6)) == {"conv": (0, 6)}


def test_all_calls_of_a_shared_module_must_be_known():
    def shared(second):
        return graph_of(
            stub("a"),
            stub("c"),
            OpNode("act", OpKind.relu, "torch.nn.modules.activation.ReLU", ("a",), (1, 4), "act"),
            OpNode("act(1)", OpKind.relu, "torch.nn.modules.activation.ReLU", (second,), (1, 4), "act"),
        )

    names = ModuleNameSetter({"a": "qint8@-3..2"})
    assert resolve(shared("act"), [names, TemplateSetter(QDtype.qint8)], "m").ops["act"].known_range == (0, 2)
    assert resolve(shared("c"), [names, TemplateSetter(QDtype.qint8)], "m").ops["act"].known_range is None


ONE = {  # function, range of the input -> range of the result
    ("relu", (-3, 2)): (0, 2),
    ("relu6", (-3, 9)): (0, 6),
    ("abs", (-3, 2)): (0, 3),
    ("neg", (-3, 2)): (-2, 3),
    ("square", (-3, 2)): (0, 9),
    ("sqrt", (4, 9)): (2, 3),
    ("sqrt", (-1, 9)): None,
    ("exp", (0, 1)): (1, math.e),
    ("exp", (0, 1e9)): None,
    ("reciprocal", (2, 4)): (0.25, 0.5),
    ("reciprocal", (-2, 4)): None,
    ("sin", (0, 1)): (0, math.sin(1)),
    ("sin", (0, 3)): (0, 1),
    ("cos", (0, 4)): (-1, 1),
    ("tanh", (-1, 0)): (-math.tanh(1), 0),
    ("softmax", (-9, 9)): (0, 1),
    ("mean", (1, 2)): (1, 2),
    ("max", (1, 2)): (1, 2),
    ("adaptive_avg_pool2d", (1, 2)): (1, 2),
    ("avg_pool2d", (1, 2)): (0, 2),  # padding brings in zeros
    ("interpolate", (1, 2)): (0, 2),
    ("sum", (1, 2)): None,
    ("layer_norm", (1, 2)): None,
    ("pad", (1, 2)): None,
}


@pytest.mark.parametrize(("case", "result"), ONE.items(), ids=lambda x: str(x))
def test_functions_of_one_tensor(case, result):
    function, bounds = case
    kind = OpKind.move if function == "pad" else OpKind.other
    found = propagate(graph_of(stub("a"), op("f", function, "a", kind=kind)), {"a": bounds}).get("f")
    assert found == (pytest.approx(result) if result else None)


TWO = {
    ("clamp", (None, -1.0, None)): (-1, 2),
    ("clamp", (None, None, 1.0)): (-3, 1),
    ("clamp", (None, -0.5, 0.5)): (-0.5, 0.5),
    ("clamp_min", (None, 1.0)): (1, 2),
    ("clamp_max", (None, 1.0)): (-3, 1),
    ("add", (None, 1.0)): (-2, 3),
    ("sub", (None, 1.0)): (-4, 1),
    ("rsub", (None, 1.0)): (-1, 4),
    ("mul", (None, -2.0)): (-4, 6),
    ("div", (None, 2.0)): (-1.5, 1),
    ("rdiv", (None, 2.0)): None,
    ("pow", (None, 2.0)): (0, 9),
    ("pow", (None, 3.0)): (-27, 8),
    ("pow", (None, 0.5)): None,
    ("pow", (2.0, None)): None,
    ("maximum", (None, 0.0)): (0, 2),
    ("minimum", (None, 0.0)): (-3, 0),
    ("hardtanh", (None, None, None)): (-1, 1),
    ("where", (None, None, 5.0)): (-3, 5),
    ("where", (None, None, None)): None,  # one of the two is a tensor that the graph does not carry
    ("masked_fill", (None, None, 5.0)): (-3, 5),
    ("masked_fill", (None, None, -math.inf)): None,
    ("add", (None, 1.0, 2.0)): None,  # alpha
    ("add", (None, None)): None,  # the other tensor holds integers, which the graph does not carry
}


@pytest.mark.parametrize(("case", "result"), TWO.items(), ids=lambda x: str(x))
def test_a_tensor_and_a_number(case, result):
    function, operands = case
    found = propagate(graph_of(stub("a"), op("f", function, "a", operands=operands)), {"a": (-3.0, 2.0)}).get("f")
    assert found == (pytest.approx(result) if result else None)


def test_a_bicubic_resize_overshoots_and_is_left_to_calibration():
    node = op("up", "interpolate", "a", kind=OpKind.resize, attrs={"bicubic": 1})
    assert propagate(graph_of(stub("a"), node), {"a": (0, 1)}) == {"a": (0, 1)}


# ---- any element-wise graph: what is computed lies in what is known

EVALUATE = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: b - a,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "maximum": max,
    "minimum": min,
    "neg": lambda a: -a,
    "abs": abs,
    "relu": lambda a: max(a, 0.0),
    "relu6": lambda a: min(max(a, 0.0), 6.0),
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)) if a > -700 else 0.0,
    "hardsigmoid": lambda a: min(max(a / 6 + 0.5, 0), 1),
    "tanh": math.tanh,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "rsqrt": lambda a: a**-0.5,
    "log": math.log,
    "square": lambda a: a * a,
    "sin": math.sin,
    "cos": math.cos,
    "reciprocal": lambda a: 1 / a,
    "pow": lambda a, b: a**b,
    "clamp": lambda a, low, high: min(max(a, low), high),
}
NUMBERS = st.floats(-8, 8).map(lambda x: round(x, 3))


@st.composite
def elementwise(draw):
    nodes, values = [stub("a"), stub("b")], {"a": draw(NUMBERS), "b": draw(NUMBERS)}
    width = {
        name: (value - draw(st.floats(0.01, 3)), value + draw(st.floats(0.01, 3))) for name, value in values.items()
    }
    for i in range(draw(st.integers(1, 8))):
        function = draw(st.sampled_from(list(EVALUATE)))
        source = st.sampled_from([n.name for n in nodes])
        if function == "clamp":
            low = draw(NUMBERS)
            operands, inputs = (None, low, low + draw(st.floats(0, 4))), [draw(source)]
        elif function in ("rsub", "pow"):
            number = draw(st.sampled_from([-2.0, -1.0, 0.5, 2.0, 3.0]) if function == "pow" else NUMBERS)
            operands, inputs = (None, number), [draw(source)]
        elif function in ("add", "sub", "mul", "div", "maximum", "minimum"):
            operands = (None, draw(st.none() | NUMBERS))
            inputs = [draw(source) for o in operands if o is None]
        else:
            operands, inputs = (None,), [draw(source)]
        node = op(f"op{i}", function, *inputs, operands=operands)
        queue = iter(inputs)
        arguments = [values[next(queue)] if o is None else o for o in operands]
        try:
            value = EVALUATE[function](*arguments)
        except (ValueError, ZeroDivisionError, OverflowError):
            break
        if isinstance(value, complex) or not math.isfinite(value):
            break
        nodes.append(node)
        values[node.name] = value
    return ModelGraph(tuple(nodes), (("0", nodes[-1].name),)), width, values


@settings(max_examples=500, deadline=None)
@given(elementwise())
def test_the_interval_contains_what_is_computed(case):
    graph, given_ranges, values = case
    for name, (low, high) in propagate(graph, given_ranges).items():
        slack = 1e-9 * (1 + abs(low) + abs(high))
        assert low - slack <= values[name] <= high + slack, (name, graph.by_name[name].op_type)
