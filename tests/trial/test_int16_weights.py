"""int16 weights as part of the choice: what is ranked, what excludes what, and nothing illegal is ever asked for."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import zoo

from qflow.analysis.measures.tables import SensitivityRow, SensitivityTable
from qflow.core.device import input_dtypes
from qflow.core.dtype import QDtype
from qflow.core.graph import WEIGHTED_KINDS, ModelGraph, OpKind, OpNode
from qflow.core.settings import QConfigSettings
from qflow.core.weight_inputs import weight_inputs
from qflow.cost_model.latency import Pricer
from qflow.cost_model.model import CostModel
from qflow.quant.model.plan import make_plan
from qflow.quant.trace.trace import trace
from qflow.trial.precisions import Precisions

BOTH = QConfigSettings(sensitive_type="both")
KINDS = (OpKind.conv, OpKind.linear, OpKind.lut, OpKind.add, OpKind.matmul, OpKind.move, OpKind.max_pool, OpKind.concat)
INT16, INT8 = QDtype.qint16, QDtype.qint8


def node(name, kind, inputs, quantizer=None, weight=None):
    transparent = kind in (OpKind.move, OpKind.max_pool)
    return OpNode(
        name=name, kind=kind, op_type=kind.value, inputs=tuple(inputs), shape=(1, 16, 4, 4),
        quantizer=None if transparent else quantizer or name,
        weight=(weight or name) if kind in WEIGHTED_KINDS else None,
        attrs={"in": 16, "out": 16, "groups": 1, "kernel": 1, "weights": 256, "inner": 16},
    )  # fmt: skip


def row_of(*kinds):
    """input -> op0 -> op1 -> ..."""
    nodes = [node("input", OpKind.input, ())]
    for i, kind in enumerate(kinds):
        nodes.append(node(f"op{i}", kind, [nodes[-1].name]))
    return ModelGraph(tuple(nodes), (("0", nodes[-1].name),))


def table(outputs, weights):
    rows = [SensitivityRow(name, "activation", "", score, "qint8", 0) for name, score in outputs.items()]
    rows += [SensitivityRow(name, "weight", "", score, "qint8", 0) for name, score in weights.items()]
    return SensitivityTable("L1", "max", 1, True, tuple(sorted(rows, key=lambda r: -r.score)))


def precisions(graph, rules, outputs=None, weights=None, seed=0):
    """Random sensitivities where none are given."""
    rng = random.Random(seed)
    drawn = lambda nodes: {n.name: rng.lognormvariate(0, 2) for n in nodes}  # noqa: E731
    found = table(
        outputs if outputs is not None else drawn(n for n in graph.quantized if n.kind != OpKind.constant),
        weights if weights is not None else drawn(graph.weighted),
    )
    pricer = Pricer(graph, CostModel(onchip_mb=0.01))
    return Precisions(graph, rules, found, lambda: pricer)


@pytest.fixture
def dual(nash_m):
    return replace(nash_m, oe_version="3.2.0", dual_int16=True, dual_int16_ops=["conv", "conv2d", "linear"])


def promoted(made, asked):
    """(operators with int16 outputs, operators with int16 weights) as the device runs them."""
    applied = made.resolve(asked)[1]
    return set(applied.names(INT16)), set(applied.weights(INT16))


# ---- one ranking of outputs and weights


def test_outputs_and_weights_are_promoted_in_one_order(nash_m):
    made = precisions(
        row_of(OpKind.conv, OpKind.lut, OpKind.conv, OpKind.lut), nash_m,
        {"input": 0.1, "op0": 0.5, "op1": 0.4, "op2": 0.1, "op3": 0.2}, {"op0": 9.0, "op2": 0.3},
    )  # fmt: skip
    ratios = made.int16_ratios(BOTH)
    steps = [promoted(made, replace(BOTH, int16_ratio=r)) for r in ratios]
    assert steps[:3] == [(set(), set()), (set(), {"op0"}), ({"op0"}, {"op0"})]
    assert steps[-1] == ({"op0", "op1", "op2", "op3"}, {"op0"})  # the input serves the weight, op1 excludes that of op2


def test_a_ratio_of_one_by_outputs_stays_all_int16_with_int8_weights(nash_m):
    made = precisions(row_of(OpKind.conv, OpKind.lut), nash_m, weights={"op0": 100.0})
    assert made.resolve(QConfigSettings(int16_ratio=1.0))[1].digest == made.template(INT16)[1].digest
    assert promoted(made, QConfigSettings(int16_ratio=1.0))[1] == set()


def test_where_int16_times_int16_exists_nothing_is_excluded(dual):
    graph = row_of(OpKind.conv, OpKind.lut, OpKind.conv, OpKind.lut)
    made = precisions(graph, dual)
    assert promoted(made, replace(BOTH, int16_ratio=1.0)) == ({n.name for n in graph.quantized}, {"op0", "op2"})
    assert made.problem(BOTH).exclusions == ()
    assert made.problem(BOTH).finest == "6666666"


def test_by_gain_per_time_weights_are_ranked_too(nash_m):
    kinds = set()
    for seed in range(8):
        made = precisions(row_of(OpKind.conv, OpKind.lut, OpKind.conv), nash_m, seed=seed)
        costs = made.pricer().weight_promotions(made.template(INT8)[1])
        assert set(costs) == {"op0", "op2"} and min(costs.values()) > 0.0
        assert made.weight_worth == pytest.approx({n: made.weight_scores[n] / max(costs[n], 1e-5) for n in costs})
        weight, output = (max(w, key=w.get) for w in (made.weight_worth, made.worth))
        wins = made.weight_worth[weight] > made.worth[output]
        first = promoted(made, replace(BOTH, int16_ratio=0.1, ranking="score_per_ms"))
        assert first == ((set(), {weight}) if wins else ({output}, set()))
        kinds.add(wins)
    assert kinds == {True, False}


# ---- which inputs a weight holds at int8


def test_the_input_of_a_weight_is_found_through_operators_without_a_quantizer(nash_m, dual):
    graph = row_of(OpKind.lut, OpKind.move, OpKind.conv)
    assert weight_inputs(graph, nash_m) == {"op2": {"op0"}}
    assert weight_inputs(graph, dual) == {"op2": frozenset()}


def test_a_shared_module_and_a_constant_hold_all_that_they_read(nash_m):
    nodes = (
        node("const[c]", OpKind.constant, ()), node("input", OpKind.input, ()),
        node("conv", OpKind.conv, ["const[c]"]), node("conv(1)", OpKind.conv, ["conv"], "conv", "conv"),
        node("add", OpKind.add, ["const[c]", "input"]), node("out", OpKind.add, ["conv(1)", "add"]),
    )  # fmt: skip
    graph = ModelGraph(nodes, (("0", "out"),))
    assert weight_inputs(graph, nash_m) == {"conv": {"conv", "add"}}  # the constant follows conv and add


def test_a_weight_whose_input_the_user_keeps_at_int16_is_no_choice(nash_m):
    made = precisions(row_of(OpKind.lut, OpKind.conv, OpKind.conv, OpKind.lut), nash_m)
    assert set(made.weights(BOTH)) == {"op1", "op2"}
    assert set(made.weights(replace(BOTH, modules={"op0": "qint16"}))) == {"op2"}
    assert set(made.weights(replace(BOTH, modules={"op2": "qint8/qint16"}))) == {"op1"}
    assert made.weights(replace(BOTH, template="qint16")) == {}


# ---- when weights matter


def test_weights_matter_where_one_gains_more_than_its_input_and_is_no_noise(nash_m):
    graph = row_of(OpKind.conv, OpKind.lut)
    order = lambda outputs, weight, rest: precisions(graph, nash_m, outputs, {"op0": weight}).weight_order(BOTH, rest)  # noqa: E731
    assert order({"input": 0.1, "op0": 0.1, "op1": 1.0}, 0.5, INT8) == ("op0",)
    assert order({"input": 0.6, "op0": 0.1, "op1": 1.0}, 0.5, INT8) == ()  # the input needs int16 more
    assert order({"input": 0.0, "op0": 0.1, "op1": 1.0}, 0.05, INT8) == ()  # a twentieth of the largest
    assert order({"input": 0.0, "op0": 0.1, "op1": 1.0}, 0.05, INT16) == ("op0",)  # what all-int16 leaves is less


def test_the_mix_of_a_weight_keeps_all_else_at_int16(nash_m):
    made = precisions(row_of(OpKind.conv, OpKind.lut, OpKind.conv, OpKind.lut), nash_m)
    mix = made.weight_mix(QConfigSettings(), INT16, ["op2"])
    assert mix == "66" + "8" + "66" + "86"
    assert promoted(made, replace(BOTH, assignment=mix)) == ({"input", "op0", "op2", "op3"}, {"op2"})
    assert made.mix_of(replace(BOTH, assignment=mix)) == mix
    assert made.weight_mix(QConfigSettings(), INT8, ["op2"]) == "8888886"


# ---- the integer program


def test_the_cheaper_of_weight_and_input_is_promoted(nash_m):
    """The input feeds five operators, the weight one: with equal errors int16 of the weight costs less."""
    nodes = [node("input", OpKind.input, ()), node("conv", OpKind.conv, ["input"])]
    nodes += [node(f"lut{i}", OpKind.lut, ["input"]) for i in range(4)]
    nodes += [node("out", OpKind.concat, ["conv", *(f"lut{i}" for i in range(4))])]
    graph = ModelGraph(tuple(nodes), (("0", "out"),))
    small = dict.fromkeys(("conv", "lut0", "lut1", "lut2", "lut3", "out"), 0.01)
    made = precisions(graph, nash_m, {"input": 1.0, **small}, {"conv": 1.0})
    problem = made.problem(BOTH)
    mix = problem.cheapest(problem.error(problem.all_int8) - 0.9)
    assert promoted(made, replace(BOTH, assignment=mix)) == (set(), {"conv"})
    without = made.problem(QConfigSettings())
    mix = without.cheapest(without.error(without.all_int8) - 0.9)
    assert "input" in promoted(made, QConfigSettings(assignment=mix))[0]
    alone = without.plain("6" + without.all_int8[1:])
    assert without.price(mix) < without.price(alone)  # readers at int16 convert nothing, so the block is cheaper
    assert promoted(made, replace(BOTH, error_share=0.5))[1] == {"conv"}


@pytest.mark.parametrize("name", ["unet", "convnext", "vision_transformer", "fpn", "shared"])
@pytest.mark.parametrize("device", ["nash_m", "dual"])
def test_times_are_sums_with_weights_too(name, device, request):
    model, example = zoo.build(name)
    graph = make_plan(trace(model, example), model).graph
    problem = precisions(graph, replace(request.getfixturevalue(device), fused_add_int8=False)).problem(BOTH)
    rng, weights = random.Random(1), {o.place for o in problem.operators if o.weight}
    assert weights
    for share in (0.2, 0.5, 1.0):
        mix = problem.all_int8
        for o in problem.operators:  # weights last
            mix = problem.flipped(mix, o.place) if rng.random() < share else mix
        assert share < 1.0 or any(mix[place] == "6" for place in weights)
        assert problem.within(mix)
        assert problem.time(mix) == pytest.approx(problem.price(mix), rel=1e-5)


# ---- whatever the graph, no illegal pair is asked for


@st.composite
def graphs(draw):
    """Random graphs: chains with branches, shared modules, operators without a quantizer, constants."""
    nodes = [node("input", OpKind.input, ()), node("const[c]", OpKind.constant, ())]
    for i in range(draw(st.integers(2, 9))):
        earlier = st.sampled_from([n.name for n in nodes])
        shared = [n.name for n in nodes if n.kind in WEIGHTED_KINDS and "(" not in n.name]
        if shared and draw(st.integers(0, 4)) == 0:
            of = draw(st.sampled_from(shared))
            kind = next(n.kind for n in nodes if n.name == of)
            nodes.append(node(f"{of}({i})", kind, [draw(earlier)], of, of))
            continue
        kind = draw(st.sampled_from(KINDS))
        count = 2 if kind in (OpKind.add, OpKind.concat, OpKind.matmul) else 1
        nodes.append(node(f"op{i}", kind, [draw(earlier) for _ in range(count)]))
    read = {name for n in nodes for name in n.inputs}
    nodes = [n for n in nodes if n.kind != OpKind.constant or n.name in read]
    leaves = [n.name for n in nodes if n.name not in read]
    return ModelGraph(tuple(nodes), tuple((str(i), name) for i, name in enumerate(leaves)))


def require_legal(made, asked):
    """No operator multiplies int16 by int16: never as applied, which would raise, and only a user's key requests it."""
    requested, applied = made.resolve(asked)
    for qconfig in (applied,) if asked.modules else (requested, applied):
        for n in made.graph.nodes:
            if n.weight is None or made.rules.dual(n) or not n.inputs:
                continue
            owner = next(o.name for o in made.graph.quantized if o.quantizer == n.quantizer)
            if qconfig.ops[owner].weight == INT16:
                reads = input_dtypes(made.graph, qconfig, n.name)
                assert INT16 not in reads, (n.name, reads)


@settings(max_examples=40, deadline=None)
@given(graph=graphs(), seed=st.integers(0, 1000), dual_int16=st.booleans(), data=st.data())
def test_no_strategy_asks_for_what_the_device_refuses(nash_m, graph, seed, dual_int16, data):
    rules = replace(nash_m, dual_int16=dual_int16, dual_int16_ops=["conv", "linear"])
    made = precisions(graph, rules, seed=seed)
    kept = data.draw(st.dictionaries(st.sampled_from([n.name for n in graph.quantized if "const" not in n.name]),
                                     st.sampled_from(["qint8", "qint16"]), max_size=2))  # fmt: skip
    base = replace(BOTH, modules=kept)
    for ratio in made.int16_ratios(base):
        require_legal(made, replace(base, int16_ratio=ratio))
    require_legal(made, replace(base, int16_ratio=0.5, ranking="score_per_ms"))
    problem = made.problem(base)
    for share in (0.0, 0.1, 0.5, 0.9):
        require_legal(made, replace(base, error_share=share))
    require_legal(made, replace(base, assignment=problem.finest or "8" * problem.letters))
    for o in problem.operators:
        require_legal(made, replace(base, assignment=problem.flipped(problem.finest, o.place)))
    for rest in (INT8, INT16):
        for count in range(1, len(made.weights(base)) + 1):
            require_legal(made, replace(base, assignment=made.weight_mix(base, rest, list(made.weights(base))[:count])))
