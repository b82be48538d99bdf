"""The report of a study: every part of a study is on it, for many trials, for few, and for none."""

from dataclasses import replace

import pytest
from report.test_page import EVIL, charts_of
from support.study_records import GOAL, mix, network, record, trial
from support.synthetic import layers

from qflow.analysis.measures.tables import LayerTable
from qflow.core.dtype import QDtype
from qflow.core.qconfig import OpQConfig
from qflow.report import study_charts
from qflow.report.layer_rows import IDENTITY, by_operator
from qflow.report.network_picture import BREAK, HIGH, LANE, STEP, WIDE, network_picture
from qflow.report.study_page import study_page
from qflow.report.study_record import StudyRecord
from qflow.report.words import label_words


@pytest.fixture(scope="module")
def made():
    return record(24, 77, trained=True)


def with_trials(made: StudyRecord, trials, baselines=None):
    """The record with other trials, and nothing that depends on the old ones."""
    searched = replace(made.searched, trials=trials, baselines=baselines or {})
    return replace(made, searched=searched, mixes={}, training=None)


def points(drawn):
    """Texts of the points of a chart."""
    return [p[2] for series in drawn["series"] if series.get("mark") for p in series["points"]]


def test_the_page_has_every_part(made):
    page = study_page(made)
    for heading in (
        "Result", "Asked and decided", "Pareto front", "Path of the search", "Health of the study", "Cost", "Training",
        "Importance of the parameters", "The network", "What is not int8, and why", "What to do next", "Bad cases",
        "Error along the network", "Sensitivity", "Model check",
    ):  # fmt: skip
        assert f"<h2>{heading}</h2>" in page
    assert "<b>all-int16</b>: drop +0.0010 under mse meets 0.01" in page
    assert len(page) < 3_000_000 and len(charts_of(page)) == 9


def test_every_trial_is_on_the_front_and_opens_its_run(made):
    drawn = study_charts.front_chart(made)
    shown = [text.split("\n")[0].split()[1] for text in points(drawn)]
    assert sorted(map(int, shown)) == [t.number for t in made.searched.trials]
    links = [p[3] for s in drawn["series"] for p in s["points"]]
    assert links and all(link.startswith("http://127.0.0.1:5000/#/experiments/1/runs/0") for link in links)
    assert drawn["rules"][0] == {"axis": "y", "at": 0.01, "color": "c1", "text": "goal 0.01"}


def test_trials_by_hand_stand_under_their_name_and_are_no_result(made):
    """This one would be the best; the search has not found it."""
    mine = trial(-1, 0.0, 0.1, "by hand")
    other = replace(made, searched=replace(made.searched, by_hand=[mine]))
    assert other.searched.best == made.searched.best
    (series,) = [s for s in study_charts.front_chart(other)["series"] if s["name"] == "by hand 1"]
    assert [p[:2] for p in series["points"]] == [[0.1, 0.0]]
    assert study_charts.path_chart(other) == study_charts.path_chart(made)
    assert "1 by hand, no result of the search" in study_page(other)


def test_what_the_mix_follows_already_is_no_advice_and_words_are_plain(made):
    first = made.analysis.advice[0]
    ops = {**made.shown.qconfig.ops, "body": OpQConfig(QDtype.qint16, rule="assigned int16: 2 of 3")}
    shown = replace(made.shown, qconfig=replace(made.shown.qconfig, ops=ops))
    done = replace(first, op="body", target="body", spec="qint16", text="was done already")
    open_ = replace(first, op="head", target="head", spec="qint16", text="is still to do")
    other = replace(made, mixes={"best mix": shown}, analysis=replace(made.analysis, advice=[done, open_]))
    page = study_page(other)
    assert "was done already" not in page and "is still to do" in page and "Left out: 1 that trial" in page
    assert "the search chose it, as number 2 of 3" in page and "assigned int16: 2 of 3</" not in page
    assert page.count("at int8, from which the search began") == 3
    assert label_words("demoted 1") == "fewer int16 operators, attempt 1" and label_words("all-int8") == "all-int8"


def test_a_fused_group_is_one_row_under_the_name_of_its_qconfig():
    row = layers(3).rows[0]
    conv = replace(row, index=0, mod_name="stem.conv", analy_op_type=IDENTITY, error=None, quantizer="")
    norm = replace(row, index=1, mod_name="stem.norm", quantizer="stem.conv")
    act = replace(row, index=2, mod_name="stem.act", quantizer="stem.act")
    shown, members = by_operator(LayerTable(1, (conv, norm, act)))
    assert [r.mod_name for r in shown.rows] == ["stem.conv", "stem.act"]
    assert shown.rows[0].error == row.error and members == {1: "stem.norm"}


def test_diverged_trials_stand_at_the_edge_and_do_not_flatten_the_others(made):
    usual = study_charts.front_chart(made)["y"]
    wild = with_trials(made, [*made.searched.trials, trial(90, 7e5, 0.7)], made.searched.baselines)
    drawn = study_charts.front_chart(wild)
    assert drawn["y"]["high"] <= 1.3 * usual["high"] < 0.2
    (edge,) = [s for s in drawn["series"] if s["mark"] == "triangle"]
    assert any("trial 90" in p[2] and p[1] == drawn["y"]["high"] for p in edge["points"])


def test_the_best_so_far_never_gets_slower(made):
    drawn = study_charts.path_chart(made)
    (line,) = [s for s in drawn["series"] if s.get("line")]
    costs = [y for _, y, *_ in line["points"]]
    assert costs == sorted(costs, reverse=True) and costs[-1] == made.searched.best.outcome.metrics["cost/latency_ms"]


def test_what_is_raised_is_listed_with_sensitivity_and_added_time(made):
    page = study_page(made)
    part = page[page.index("<h2>What is not int8") : page.index("<h2>Cost")]
    assert part.count("<tr>") == 5 and "sensitive 0.05: rank 1 of 73" in part
    assert "raises 4 outputs and weights" in part


@pytest.mark.parametrize("trials", [[], [trial(0, 0.2, 0.8, "all-int16")]], ids=["none", "one that misses"])
def test_a_study_without_a_result_has_a_report_too(made, trials):
    page = study_page(replace(with_trials(made, trials), graph=None, decisions=(), verdict="", ended=False))
    assert f"Study report: {len(trials)} trials (the study has not ended)." in page
    assert "No decision is recorded." in page and "<h2>Model check</h2>" in page


def test_an_aim_without_latency_is_drawn_against_its_own_cost(made):
    goal = replace(GOAL, optimize={"accuracy/found": "maximize", "cost/weight_mb": "minimize"})
    runs = [trial(i, 0.002 * i, 0.7, goal=goal, **{"cost/weight_mb": 3.0 - 0.1 * i}) for i in range(6)]
    other = with_trials(made, runs)
    other = replace(other, searched=replace(other.searched, goal=goal))
    assert study_charts.front_chart(other)["x"]["title"] == "cost/weight_mb"
    assert len(points(study_charts.front_chart(other))) == 6


def test_texts_of_a_run_cannot_write_html(made):
    bad = trial(2, 0.001, 0.5, EVIL, params={"calibration.method": EVIL, "qconfig.int16_ratio": 0.1})
    evil = replace(
        with_trials(made, [bad], {EVIL: bad}), name=EVIL, decisions=[(EVIL, EVIL)], verdict=EVIL, asked=[(EVIL, EVIL)],
        address='javascript:alert(3)"', commands=[(EVIL, EVIL)],
    )  # fmt: skip
    page = study_page(evil)
    assert "<img" not in page and "alert(1)</script>" not in page and 'alert(3)">' not in page
    assert "javascript:" not in page


# ---- the network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [5, 77, 300])
def test_no_box_of_the_network_covers_another_and_all_lie_inside(count):
    graph = network(count)
    drawn = network_picture(graph, mix(graph, trial(0, 0.0, 0.7)), {})
    places = [(op["x"], op["y"]) for op in drawn["ops"]]
    assert len(places) == len(set(places)) == len(graph.nodes)
    assert all(x + WIDE <= drawn["width"] and y + HIGH <= drawn["height"] for x, y in places)
    assert all(abs(a[0] - b[0]) >= WIDE or abs(a[1] - b[1]) >= HIGH for a in places for b in places if a != b)
    assert LANE > HIGH and STEP > WIDE and BREAK > 0
    assert count < 77 or 1.0 < drawn["width"] / drawn["height"] < 4.0


def test_an_operator_stands_behind_its_inputs_and_branches_beside_each_other():
    graph = network(8)
    drawn = network_picture(graph, mix(graph, trial(0, 0.0, 0.7)), {})
    at = {node.name: op for node, op in zip(graph.nodes, drawn["ops"], strict=True)}
    left, right = (at[f"backbone.block2.{side}"] for side in ("left", "right"))
    assert left["x"] == right["x"] and left["y"] != right["y"]
    assert at["quant[image]"]["x"] < left["x"] < at["backbone.block2.join[add]"]["x"]
    assert len(drawn["edges"]) == sum(len(node.inputs) for node in graph.nodes)


def test_colours_are_the_dtypes_and_bars_the_sensitivity_and_time():
    graph = network(8)
    drawn = network_picture(
        graph, mix(graph, trial(0, 0.0, 0.7), ["quant[image]"]), {"quant[image]": 0.3, "head[add]": 1e-3}
    )
    at = {node.name: op for node, op in zip(graph.nodes, drawn["ops"], strict=True)}
    assert at["quant[image]"]["dtype"] == "qint16" and at["head[add]"]["dtype"] == "qint8"
    assert at["head[flatten]"]["dtype"] == "qint8"  # it passes on what it reads
    assert at["quant[image]"]["sensitive"] > at["head[add]"]["sensitive"] > 0 == at["backbone.block2.left"]["sensitive"]
    assert "int8 sensitivity 0.3" in at["quant[image]"]["text"]
