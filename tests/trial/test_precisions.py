"""What the assignment's problem says of real networks: its costs, and which letters mean something."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from support import zoo

from qflow.analysis.measures.tables import SensitivityRow, SensitivityTable
from qflow.core.dtype import QDtype
from qflow.core.settings import QConfigSettings
from qflow.cost_model.latency import Pricer
from qflow.cost_model.model import CostModel
from qflow.quant.model.plan import make_plan
from qflow.quant.trace.trace import trace
from qflow.trial.precisions import Precisions

NAMES = ("unet", "squeeze_excite", "convnext", "vision_transformer", "detr", "functional", "fpn", "dense", "shared")


def table(graph, **scores):
    """Random sensitivities of every operator, those given apart."""
    rng = random.Random(0)
    found = {node.name: rng.lognormvariate(0, 1) for node in graph.quantized} | scores
    rows = tuple(SensitivityRow(name, "activation", "", score, "qint8", 0) for name, score in found.items())
    return SensitivityTable("mse", "max", 1, True, rows)


def precisions(name, rules, **scores):
    model, example = zoo.build(name)
    graph = make_plan(trace(model, example), model).graph
    pricer = Pricer(graph, CostModel(onchip_mb=0.01))
    return Precisions(graph, rules, table(graph, **scores), lambda: pricer)


def drawn(problem, count=20):
    rng = random.Random(1)
    free = {o.place for o in problem.operators}
    letters = lambda share: (  # noqa: E731
        "6" if i in free and rng.random() < share else "8" for i in range(problem.letters)
    )
    return ["".join(letters(k / count)) for k in range(1, count)]


def test_the_gain_of_fp16_counts_the_values_inside_an_operator(nash_m):
    made = precisions("vision_transformer", nash_m)
    able = [n for n in made.graph.quantized if n.name in made.promotable and made._keeps_float16(n.name)]
    norm = next(n for n in reversed(able) if n.inner)
    error = dict.fromkeys([n.name for n in able], 1.0)
    scores = {"qint16": {**error, norm.inner[1]: 5.0}, "float16": {**dict.fromkeys(error, 0.5), norm.inner[1]: 0.1}}
    rows = tuple(
        SensitivityRow(name, "activation", "", score, dtype, 0)
        for dtype, found in scores.items()
        for name, score in found.items()
    )
    ranked = Precisions(made.graph, nash_m, SensitivityTable("L1", "sum", 1, True, rows), made.pricer)
    assert ranked.float16_order[0] == norm.name
    assert set(ranked.float16_order) == set(error)


@pytest.fixture(params=NAMES)
def made(request, nash_m):
    return precisions(request.param, replace(nash_m, fused_add_int8=False))


def test_times_and_mac_shares_are_sums_over_operators_that_are_read_together(made):
    problem = made.problem(QConfigSettings(), {"max_int16_mac_share": 0.5})
    share = problem.limits[0].cost
    for mix in drawn(problem):
        assert problem.time(mix) == pytest.approx(problem.price(mix), rel=1e-6)
        assert share(mix) == pytest.approx(share.exact(mix), abs=1e-6)


def test_every_letter_of_an_operator_of_the_problem_changes_what_runs(made):
    problem = made.problem(QConfigSettings())
    for mix in drawn(problem, 4):
        runs = made.resolve(QConfigSettings(assignment=mix))[1]
        outputs = [runs.ops[o.name].output.value for o in problem.operators]
        assert outputs == ["qint16" if mix[o.place] == "6" else "qint8" for o in problem.operators]


def test_operators_that_are_kept_are_no_part_of_the_problem(nash_m):
    made = precisions("vision_transformer", nash_m)
    name, other, *_ = made.promotable
    kept = QConfigSettings(modules={name: "qint16", other: "qint8"})
    problem = made.problem(kept)
    assert len(problem.operators) == len(made.problem(QConfigSettings()).operators) - 2
    assert {name, other}.isdisjoint(o.name for o in problem.operators)
    assert problem.letters == len(made.promotable)
    assert problem.all_int16[:2] == "88"
    assert made.problem(kept) is problem


def test_a_score_that_is_no_number_ranks_first(nash_m):
    plain = precisions("unet", nash_m)
    name = plain.promotable[1]
    made = precisions("unet", nash_m, **{name: math.nan})
    assert made.resolve(QConfigSettings(int16_ratio=1 / len(made.promotable)))[1].ops[name].output == QDtype.qint16
    problem = made.problem(QConfigSettings())
    assert max(problem.operators, key=lambda o: o.gain).name == name


def test_there_is_an_int16_ratio_for_each_promotion_within_the_budgets(made):
    settings = QConfigSettings()
    ratios = made.int16_ratios(settings)
    int16 = [made.resolve(replace(settings, int16_ratio=r))[1].names(QDtype.qint16) for r in ratios]
    assert len({frozenset(names) for names in int16}) == len(ratios) == len(made.promotable) + 1
    assert [sum(name in made.promotable for name in names) for names in int16] == list(range(len(ratios)))
    within = made.int16_ratios(settings, {"max_int16_mac_share": 0.5})
    qconfigs = {r: made.resolve(replace(settings, int16_ratio=r))[1] for r in ratios}
    shares = {r: made.pricer().report(qconfig).int16_mac_share for r, qconfig in qconfigs.items()}
    assert within == [r for r in ratios if shares[r] <= 0.5]
    assert 0.0 in within


def test_a_slowdown_bounds_the_latency_of_every_choice_by_that_of_all_int8(made):
    settings = QConfigSettings()
    int8, int16 = (made.pricer().report(made.template(d)[1]).latency_ms for d in (QDtype.qint8, QDtype.qint16))
    factor = 0.5 * (1.0 + int16 / int8)
    slow, ms = ({"max_slowdown": factor}, {"max_latency_ms": factor * int8})
    by_factor, by_ms = made.problem(settings, slow), made.problem(settings, ms)
    mixes = drawn(by_ms)
    assert [by_factor.within(mix) for mix in mixes] == [by_ms.within(mix) for mix in mixes]
    assert by_factor.within(by_factor.most_accurate()) and by_factor.most_accurate() != by_factor.all_int16
    assert by_factor.price(by_factor.most_accurate()) <= factor * int8 + 1e-9
    assert made.int16_ratios(settings, slow) == made.int16_ratios(settings, ms)
    assert 0.0 in made.int16_ratios(settings, {"max_slowdown": 1.0})  # all-int8 is never slower than itself


def test_there_is_no_int16_ratio_for_an_operator_with_a_fixed_dtype(nash_m):
    made = precisions("vision_transformer", nash_m)
    kept = QConfigSettings(modules={made.promotable[0]: "qint16", made.promotable[1]: "qint8"})
    assert len(made.int16_ratios(kept)) == len(made.promotable) - 1
