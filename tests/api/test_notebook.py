"""Records in a notebook: one line as `repr`, a table as HTML in which nothing of the model can be markup."""

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import qflow
from qflow.core.shown import SHOWN, Shown, View


class Tables(HTMLParser):
    """The cells of all tables, by row."""

    def __init__(self):
        super().__init__()
        self.rows, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        if self.rows:
            self.rows[-1].append(data)


def read(html):
    found = Tables()
    found.feed(html)
    assert found.tags <= {"p", "table", "thead", "tbody", "tr", "th", "td"}
    return found.rows


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.SiLU()).eval()
    data = [torch.randn(8, 3, 8, 8) for _ in range(2)]
    prepared = qflow.prepare(model, data[0])
    before = repr(prepared)
    qflow.calibrate(prepared, data)
    qa = qflow.QuantAnalysis(model, prepared, out_dir=tmp_path_factory.mktemp("out"))
    badcases = qa.auto_find_bad_case(data)
    layers, sensitivity = qa.compare_per_layer(), qa.sensitivity()
    found = {
        "prepared": prepared, "qconfig": prepared.applied, "check": qflow.check(prepared), "cost": qflow.cost(prepared),
        "badcases": badcases, "layers": layers, "sensitivity": sensitivity, "advice": qa.advise(),
    }  # fmt: skip
    return before, found


def test_a_record_is_one_line_on_a_console_and_a_table_in_a_notebook(records):
    _, found = records
    for name, record in found.items():
        text = repr(record)
        assert name == "prepared" or ("\n" not in text and len(text) < 200), text
        header, *rows = read(record._repr_html_())
        assert len(header) > 2 and len(rows) == min(len(record.view().rows), SHOWN), name
    assert repr(found["qconfig"]).startswith("<QConfig: 4 operators on nash-m: ")
    names = [row[0] for row in read(found["qconfig"]._repr_html_())[1:]]
    assert names == list(found["qconfig"].ops)


def test_a_prepared_model_prints_its_operators(records):
    before, found = records
    assert "not calibrated" in before
    lines = repr(found["prepared"]).splitlines()
    assert lines[0] == "Prepared Sequential for nash-m: 4 operators (1 fused), calibrated"
    assert [line.split()[0] for line in lines[3:]] == list(found["prepared"].applied.ops)
    assert "Conv2d" in str(found["prepared"].model)  # the module tree


def test_names_cannot_be_markup_and_long_tables_end():
    class Record(Shown):
        def view(self):
            return View("<b>", ("a<b",), [("<script>alert(1)</script>",)] * (SHOWN + 3))

    rows = read(Record()._repr_html_().replace("<p>3 more rows</p>", ""))
    assert rows[1] == ["<script>alert(1)</script>"] and len(rows) == SHOWN + 1
    assert "<p>3 more rows</p>" in Record()._repr_html_()
