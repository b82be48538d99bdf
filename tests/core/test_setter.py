import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.core.setter import HighPrecisionOutput, ModuleNameSetter, SensitiveSetter, TemplateSetter, resolve


def chain(*kinds, outputs=None):
    """A graph of operators in a row: op0 -> op1 -> ..."""
    nodes = []
    for i, kind in enumerate(kinds):
        weighted = kind in (OpKind.conv, OpKind.linear)
        nodes.append(
            OpNode(
                name=f"op{i}",
                kind=kind,
                op_type=kind.value,
                inputs=(f"op{i - 1}",) if i else (),
                shape=(1, 8, 4, 4),
                quantizer=None if kind == OpKind.move else f"op{i}",
                weight=f"op{i}" if weighted else None,
            )
        )
    return ModelGraph(tuple(nodes), (("0", outputs or nodes[-1].name),))


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
    with pytest.raises(ConfigError, match="A dtype is one of qint8"):
        resolve(GRAPH, [ModuleNameSetter({"op1": "int16"}), TemplateSetter(QDtype.qint8)], "nash-m")
    with pytest.raises(ConfigError, match="no setter answers for op0"):
        resolve(GRAPH, [], "nash-m")


def test_a_name_without_a_quantizer_is_refused_and_a_fixed_scale_is_kept():
    graph = chain(OpKind.input, OpKind.move, OpKind.lut)
    with pytest.raises(ConfigError, match="with a quantizer, or a module of the model, but got op1"):
        resolve(graph, [ModuleNameSetter({"op1": "qint16"}), TemplateSetter(QDtype.qint8)], "nash-m")
    fixed = resolve(graph, [ModuleNameSetter({"op2": "qint8@0.05"}), TemplateSetter(QDtype.qint8)], "nash-m")
    assert fixed.ops["op2"].fixed_scale == 0.05
    with pytest.raises(ConfigError, match="fixed scale is a number above 0, but got 'x' for op2"):
        resolve(graph, [ModuleNameSetter({"op2": "qint8@x"}), TemplateSetter(QDtype.qint8)], "nash-m")
