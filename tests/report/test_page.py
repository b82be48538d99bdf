"""The page: one file that needs no network, escapes what it is given, and says what was not run."""

import dataclasses
import json
import re
import shlex
from html import escape

import pytest
from plotly.offline import get_plotlyjs
from support.synthetic import advice, badcases, layer_row, layers, sensitivity

from qflow.analysis.measures.advice import Advice, Fidelity, FidelityRow
from qflow.analysis.measures.tables import BadcaseTable, Finding, LayerTable, SensitivityRow, SensitivityTable
from qflow.report.charts import hover_text, network_chart, sensitivity_chart
from qflow.report.page import analysis_page
from qflow.report.pictures import error_along_network

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


def write(tmp_path, title="study", tables=(None, None, None), said=None, pictures=None, fidelity=None):
    path = tmp_path / "page.html"
    analysis_page(path, title, *tables, said, pictures or {}, fidelity=fidelity)
    return path.read_text(encoding="utf-8")


def own(page):
    """The page without plotly.js, whose text names addresses that are never called."""
    return page.replace(get_plotlyjs(), "PLOTLY")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    error_along_network(layers(8), folder / "error.png")
    tables = (layers(77), sensitivity(77, exact=False), badcases())
    return write(folder, tables=tables, said=advice(), pictures={"Error <along>": folder / "error.png"})


def test_the_page_holds_everything_and_loads_nothing(full):
    assert full.count(get_plotlyjs()) == 1
    page = own(full)
    assert "http" not in page.replace('<meta http-equiv="Content-Security-Policy"', "")
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page)
    assert "<link" not in page and "default-src 'none'" in page
    assert page.count("Plotly.newPlot(") == 2 and page.count("data:image/png;base64,iVBOR") == 1
    assert "Error &lt;along&gt;" in page and "was not run" not in page


def test_advice_comes_first_with_its_line(full):
    page = own(full)
    order = [page.index(f"<h2>{h}</h2>") for h in ("What to do", "Findings", "Error along the network", "Sensitivity")]
    assert order == sorted(order)
    for item in advice():
        assert item.op in page and (not item.line or f"<code>{escape(shlex.quote(item.line))}</code>" in page)
    assert "clipped 0.031" in page and "40.0%" in page and '<td class="">none</td>' in page


def test_what_following_the_advice_does_stands_behind_it(tmp_path):
    rows = (FidelityRow("backbone.conv1", "activation", "qint8", "qint16", 0.3, 0.0021),)
    done = Fidelity("L1", rows, 0.41, 0.052, "qconfig.modules={backbone.conv1: qint16}", ("neck[add]: int16 x int16",))
    page = own(write(tmp_path, tables=(layers(8), None, None), said=advice(), fidelity=done))
    assert page.index("What to do") < page.index("The effect of following it") < page.index("Findings")
    assert "The outputs' distance to float changes from 0.41 to 0.052 (L1, all quantizers on)." in page
    assert f"<code>{escape(shlex.quote(done.line))}</code>" in page and "neck[add]: int16 x int16" in page
    assert "qint8 to qint16" in page and "0.0021" in page
    assert "The effect of following it" not in write(tmp_path)


def test_every_operator_is_in_a_table_that_opens(full):
    page = own(full)
    assert "<details><summary>The 77 operator calls of the float model, in order;" in page
    table = page[page.index("<details>") : page.index("</details>")]
    assert table.count("<tr>") == 78 and all(f'<td class="name">{r.mod_name}</td>' in table for r in layers(77).rows)


def test_findings_and_bad_cases_are_tables(full):
    page = own(full)
    assert "the error grows from 0.004 to 0.15" in page and "60 % of the rows are estimated" in page
    assert "256 samples. Worst over all outputs: Cosine 17, L1 203. Analysed by Cosine: 17, 203." in page
    assert page.count("heads.boxes") == 2


def test_what_was_not_run_is_said(tmp_path):
    page = write(tmp_path)
    for sentence in ("The advisor", "The layer comparison", "Sensitivity", "The search for bad cases"):
        assert f"{sentence} was not run." in page
    assert "Pictures" not in page and len(page) < 5000
    assert "The advisor was not run." in write(tmp_path, tables=(layers(8), sensitivity(8), None))
    assert "Nothing stands out" in write(tmp_path, tables=(layers(8), sensitivity(8), None), said=())


def test_every_name_is_escaped(tmp_path):
    table = LayerTable(
        1, (layer_row(0, EVIL, 0.1, 0.1), layer_row(1, f"x{EVIL}", 0.1, 0.1)), EVIL, (Finding(EVIL, EVIL, EVIL),)
    )
    scores = SensitivityTable(EVIL, EVIL, 1, True, (SensitivityRow(EVIL, EVIL, EVIL, 0.1, EVIL, 1),), EVIL)
    bad = BadcaseTable(1, {EVIL: {EVIL: 0}}, {EVIL: {EVIL: 0.0}}, {EVIL: 0}, EVIL, (0,))
    told = [Advice(EVIL, EVIL, EVIL, ((EVIL, 1.0),), EVIL, EVIL, 0.1)]
    page = own(write(tmp_path, EVIL, (table, scores, bad), told))
    assert "<img" not in page and "alert(1)</script>" not in page
    assert page.count("<script>") == page.count("</script>") == 3


def test_hover_shows_the_name_and_all_values():
    table = layers(77)
    text = hover_text(table.rows[1])
    assert table.rows[1].mod_name in text
    for field in ("Cosine: 0.99", "SQNR: 31.5", "Atol: 0.02", "shape: (1, 64, 56, 56)", "qscale: 0.031"):
        assert field in text
    assert "Rtol" not in text  # None
    assert "SQNR: inf" in hover_text(dataclasses.replace(table.rows[1], SQNR=float("inf")))
    hover = network_chart(table).data[0].text
    assert [t.split("<br>")[1] for t in hover] == [f"mod_name: {r.mod_name}" for r in table.rows if r.error is not None]


def test_network_chart_marks_the_start_and_the_quantizers():
    table = layers(77)
    chart = network_chart(table)
    assert (
        chart.layout.shapes[0].x0 == 25 and chart.layout.annotations[0].text == f"error starts to grow: {table.start}"
    )
    symbols = dict(zip(chart.data[0].x, chart.data[0].marker.symbol, strict=True))
    assert all(symbols[x] == ("circle" if table.rows[x].quantizer else "circle-open") for x in symbols)
    assert len(chart.layout.xaxis.tickvals) <= 40


def test_sensitivity_chart_draws_each_row_once():
    table = sensitivity(300, exact=False)
    chart = sensitivity_chart(table)
    drawn = sorted((y, x) for trace in chart.data for y, x in zip(trace.y, trace.x, strict=True))
    assert drawn == [(i, row.score) for i, row in enumerate(table.by_quantizer()[:200])]
    assert f"not shown: {len(table.rows) - 200} of {len(table.rows)} rows" in chart.layout.xaxis.title.text
    assert {trace.width for trace in chart.data} == {0.75}  # bars of one trace may be far apart
    assert {trace.name for trace in chart.data} >= {"activation qint8", "weight qint8"}
    assert any(trace.name.endswith(", estimated") for trace in chart.data)


@pytest.mark.parametrize("scores", [[], [0.0, 0.0], [float("inf"), float("nan"), 1.0]])
def test_odd_tables_make_valid_data(tmp_path, scores):
    rows = tuple(SensitivityRow(f"op{i}", "weight", "Conv2d", s, "qint8", 1) for i, s in enumerate(scores))
    errors = [None, 0.0, float("inf"), float("nan")][: len(scores)]
    table = LayerTable(1, tuple(layer_row(i, f"op{i}", e, e) for i, e in enumerate(errors)))
    page = own(write(tmp_path, tables=(table, SensitivityTable("L1", "mean", 1, True, rows), None)))
    for data in re.findall(r"const f = (.*?); Plotly\.newPlot", page):
        json.loads(data, parse_constant=pytest.fail)
