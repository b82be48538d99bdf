"""The tables of a report: units, order, sums."""

import csv
import json
import re

import pytest
from support.networks import MODEL, all_at, network

from qflow.core.dtype import QDtype
from qflow.cost_model.latency import predict
from qflow.cost_model.table import cost_csv, cost_json, cost_text, promotions_json


def headings(report):
    """Of the CSV, of the tables that the MLflow UI shows, and of the printed table, with what stands below."""
    yield from zip(*list(csv.reader(cost_csv(report).splitlines()))[:2], strict=True)
    for text in (cost_json(report), promotions_json({"a": 1.0}, "qint16")):
        table = json.loads(text)
        yield from zip(table["columns"], map(str, table["data"][0]), strict=True)
    lines = cost_text(report).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("operator"))
    names, cells = (re.split(r"  +", re.sub(r"(\])( )", r"\1 \2", line).strip()) for line in lines[at : at + 2])
    yield from zip(names, cells, strict=False)


def test_every_number_of_the_tables_has_its_unit():
    graph = network()
    units = (r"\((ms|share|%|count|elements|bytes|kB|10\^6|frames/s)\)", "10\\^6 MACs")
    for heading, cell in headings(predict(graph, all_at(graph, QDtype.qint8), MODEL)):
        number = re.fullmatch(r"[-+0-9.e]+", cell) is not None
        assert bool(re.search("|".join(units), heading)) == number or "interval (ms)" in heading, (heading, cell)


def test_the_tables_for_people_begin_with_the_costliest_and_add_up():
    graph = network()
    report = predict(graph, all_at(graph, QDtype.qint8), MODEL)
    times = [row[4] for row in json.loads(cost_json(report))["data"]]
    assert times == sorted(times, reverse=True)
    parts = re.findall(r"([0-9.]+) ms", cost_text(report, rows=1).splitlines()[-1])
    assert report.ops[0].ms + sum(map(float, parts)) + max(times) == pytest.approx(report.bpu_ms, abs=2e-4)
