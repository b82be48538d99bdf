"""The page that all reports share, and the analysis on it: one file, nothing from outside, every text escaped."""

import base64
import dataclasses
import hashlib
import json
import re
import shlex
from html import escape
from importlib.resources import files

import pytest
from support.synthetic import advice, badcases, layer_row, layers, sensitivity

from qflow.analysis.measures.advice import Advice, Fidelity, FidelityRow
from qflow.analysis.measures.tables import BadcaseTable, Finding, LayerTable, SensitivityRow, SensitivityTable
from qflow.report.analysis_page import Analysis, analysis_page
from qflow.report.charts import BARS, network_chart, row_text, sensitivity_chart
from qflow.report.page import Section, chart, document
from qflow.report.pictures import error_along_network

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


def write(tmp_path, title="study", found=None, pictures=None):
    path = tmp_path / "page.html"
    analysis_page(path, title, found or Analysis(), pictures or {})
    return path.read_text(encoding="utf-8")


def charts_of(page):
    """The data of the charts of a page."""
    found = re.findall(r'<script type="application/json">(.*?)</script>', page)
    return [json.loads(text, parse_constant=pytest.fail) for text in found]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    error_along_network(layers(8), folder / "error.png")
    table, scores = layers(77), sensitivity(77, exact=False)
    found = Analysis(table, scores, badcases(), advice(), None, (*table.findings, *scores.findings))
    return write(folder, found=found, pictures={"Error <along>": folder / "error.png"})


def test_the_page_holds_everything_and_loads_nothing(full):
    assert not re.findall(r'(?:src|href)="(?!data:|#)', full) and '<link rel="icon" href="data:,"' in full
    assert [c["kind"] for c in charts_of(full)] == ["xy", "bars"] and full.count("data:image/png;base64,iVBOR") == 1
    assert "Error &lt;along&gt;" in full and "was not run" not in full
    assert len(full) < 500_000


def test_only_the_pages_own_style_and_script_may_run(full):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', full)[1]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for part in ("style", "script"):
        (text,) = re.findall(rf"<{part}>(.*?)</{part}>", full, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{part}-src 'sha256-{digest}'" in policy
    assert " style=" not in full and " onclick=" not in full


def test_the_assets_are_plain_ascii_so_that_no_guess_of_an_encoding_changes_their_hash():
    for asset in (files("qflow.report") / "assets").iterdir():
        assert asset.read_text(encoding="utf-8").isascii(), asset.name


def test_every_section_is_in_the_contents():
    page = document("t", "s", [Section("What to do", "<p>a</p>"), Section("Cost, in ms", "<p>b</p>")])
    for place, title in (("what-to-do", "What to do"), ("cost--in-ms", "Cost, in ms")):
        assert f'<a href="#{place}">{title}</a>' in page and f'<section id="{place}"><h2>{title}</h2>' in page


def test_sections_of_equal_headings_have_addresses_of_their_own():
    page = document("t", "s", [Section("Cost", "<p>a</p>"), Section("Cost", "<p>b</p>")])
    assert re.findall(r'<section id="([^"]*)"', page) == re.findall(r'<a href="#([^"]*)"', page) == ["cost", "cost-1"]


def test_advice_comes_first_with_its_line_and_a_button_that_copies_it(full):
    order = [full.index(f"<h2>{h}</h2>") for h in ("What to do", "Findings", "Error along the network", "Sensitivity")]
    assert order == sorted(order)
    for item in advice():
        line = escape(shlex.quote(item.line))
        assert item.op in full
        assert not item.line or f'<code>{line}</code><button type="button" data-copy="{line}">' in full
    assert "clipped 0.031" in full and "40.0%" in full and "<td>none</td>" in full


def test_what_following_the_advice_does_stands_behind_it(tmp_path):
    rows = (FidelityRow("backbone.conv1", "activation", "qint8", "qint16", 0.3, 0.0021),)
    done = Fidelity("L1", rows, 0.41, 0.052, "qconfig.modules={backbone.conv1: qint16}", ("neck[add]: int16 x int16",))
    page = write(tmp_path, found=Analysis(layers(8), advice=advice(), fidelity=done))
    assert page.index("What to do") < page.index("The effect of following it") < page.index("<h2>Findings")
    assert "The outputs&#x27; distance to float changes from 0.41 to 0.052 (L1, all quantizers on)." in page
    assert f"<code>{escape(shlex.quote(done.line))}</code>" in page and "neck[add]: int16 x int16" in page
    assert "qint8 to qint16" in page and "0.0021" in page
    assert "The effect of following it" not in write(tmp_path)


def test_every_operator_is_in_a_table_that_opens(full):
    assert "<details><summary>The 77 operators, in order;" in full
    table = full[full.index("<details>") : full.index("</details>")]
    assert table.count("<tr>") == 78 and all(f'<td class="name">{r.mod_name}</td>' in table for r in layers(77).rows)


def test_equal_findings_are_one_row_and_the_gravest_comes_first(tmp_path):
    found = [Finding(f"op{i}", "check", "above 10 in int8") for i in range(3)] + [Finding("a", "error", "not finite")]
    page = write(tmp_path, found=Analysis(layers(8), findings=found))
    assert page.count("above 10 in int8") == 1 and "above 10 in int8 (2 more: op1, op2)" in page
    assert page.index("not finite") < page.index("above 10 in int8")


def test_bad_cases_are_a_table(full):
    assert "the error grows from 0.004 to 0.15" in full and "60 % of the rows are estimated" in full
    assert "256 samples. Worst over all outputs: Cosine 17, L1 203. Analysed by Cosine: 17, 203." in full
    assert full.count("heads.boxes") == 2


def test_what_was_not_run_is_said(tmp_path):
    page = write(tmp_path)
    for sentence in ("The advisor", "The layer comparison", "Sensitivity", "The search for bad cases"):
        assert f"{sentence} was not run." in page
    assert "<h2>Pictures" not in page
    assert "The advisor was not run." in write(tmp_path, found=Analysis(layers(8), sensitivity(8)))
    assert "Nothing stands out" in write(tmp_path, found=Analysis(layers(8), sensitivity(8), advice=()))


def test_every_name_is_escaped(tmp_path):
    rows = (layer_row(0, EVIL, 0.1, 0.1), layer_row(1, f"x{EVIL}", 0.1, 0.1))
    table = LayerTable(1, rows, EVIL)
    scores = SensitivityTable(EVIL, EVIL, 1, True, (SensitivityRow(EVIL, EVIL, EVIL, 0.1, EVIL, 1),), EVIL)
    bad = BadcaseTable(1, {EVIL: {EVIL: 0}}, {EVIL: {EVIL: 0.0}}, {EVIL: 0}, EVIL, (0,))
    told = [Advice(EVIL, EVIL, EVIL, ((EVIL, 1.0),), EVIL, EVIL, 0.1)]
    page = write(tmp_path, EVIL, Analysis(table, scores, bad, told, None, (Finding(EVIL, EVIL, EVIL),)))
    assert "<img" not in page and "alert(1)</script>" not in page
    assert page.count("<script") == page.count("</script>") == 3
    assert charts_of(page)[1]["rows"][0]["name"] == EVIL  # the chart shows the name as it is


def test_the_text_of_a_point_has_the_name_and_all_values():
    table = layers(77)
    text = row_text(table.rows[1])
    assert table.rows[1].mod_name in text
    for field in ("Cosine: 0.99", "SQNR: 31.5", "Atol: 0.02", "shape: (1, 64, 56, 56)", "qscale: 0.031"):
        assert field in text
    assert "Rtol" not in text  # None
    assert "SQNR: inf" in row_text(dataclasses.replace(table.rows[1], SQNR=float("inf")))


def test_the_network_chart_marks_the_start_and_the_quantizers():
    table = layers(77)
    drawn = network_chart(table)
    (rule,) = drawn["rules"]
    assert rule["at"] == 25 and rule["text"].startswith("error starts to grow") and table.start[-20:] in rule["text"]
    for series in (s for s in drawn["series"] if s.get("mark")):
        assert all(bool(table.rows[x].quantizer) is not series.get("open", False) for x, *_ in series["points"])
    points = [p for s in drawn["series"] if s.get("mark") == "dot" for p in s["points"]]
    assert sorted(x for x, *_ in points) == [i for i, row in enumerate(table.rows) if row.error is not None]


def test_the_sensitivity_chart_has_a_bar_for_each_quantizer_and_names_all_its_dtypes():
    table = sensitivity(300, exact=False)
    drawn = sensitivity_chart(table)
    lowest = [row for row in table.by_quantizer() if row.quant_dtype == "qint8"]
    assert len(drawn["rows"]) == BARS and drawn["rows"][0]["value"] == max(row.score for row in table.rows)
    assert all(" qint8, " in bar["label"] and bar["label"].endswith("qint16") for bar in drawn["rows"][:5])
    assert {bar["name"] for bar in drawn["rows"]} <= {row.op_name for row in lowest}
    assert [entry["name"] for entry in drawn["legend"]] == ["activation", "weight"]
    guessed = dataclasses.replace(table, rows=tuple(dataclasses.replace(r, exact=False) for r in table.rows))
    assert sensitivity_chart(guessed)["legend"][-1]["name"] == "estimated"


@pytest.mark.parametrize("scores", [[], [0.0, 0.0], [float("inf"), float("nan"), 1.0]])
def test_odd_tables_make_valid_data(tmp_path, scores):
    rows = tuple(SensitivityRow(f"op{i}", "weight", "Conv2d", s, "qint8", 1) for i, s in enumerate(scores))
    errors = [None, 0.0, float("inf"), float("nan")][: len(scores)]
    table = LayerTable(1, tuple(layer_row(i, f"op{i}", e, e) for i, e in enumerate(errors)))
    page = write(tmp_path, found=Analysis(table, SensitivityTable("L1", "mean", 1, True, rows)))
    assert len(charts_of(page)) == 2
    assert charts_of(chart({"a": [float("nan"), 1 / 3]})) == [{"a": [None, 0.333333]}]
