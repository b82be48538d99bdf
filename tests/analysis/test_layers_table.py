"""The layer table: every operator call, float against calibrated, in the guide's columns."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.replays import calibrated
from support.zoo import NAMES, build
from torch import nn

from qflow.analysis.layers.compare import _Walk, compare_layers, filtered
from qflow.analysis.layers.text import COLUMNS, layers_csv, layers_line, layers_text
from qflow.analysis.measures.kl_divergence import divergence
from qflow.analysis.measures.layer_metrics import compare
from qflow.analysis.measures.tables import LayerTable
from qflow.core.record import from_dict, plain
from qflow.quant.replay.capture import ReplayError, capture
from qflow.quant.trace.calling import call_model, named_tensors

GUIDE = [
    *("mod_name", "base_op_type", "analy_op_type", "shape", "quant_dtype", "qscale"),
    *("Cosine", "MSE", "L1", "KL", "SQNR", "Atol", "Rtol", "base_model_min", "analy_model_min", "base_model_max"),
    *("analy_model_max", "base_model_mean", "analy_model_mean", "base_model_var", "analy_model_var"),
    *("max_atol_diff", "max_qscale_diff"),
]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_both_models_end_where_their_own_forwards_end(name):
    model, inputs = build(name)
    prepared = calibrated(model, inputs)
    captured = capture(model, prepared.plan, inputs, float("inf"), inner=True)
    with prepared.recording_order() as order:
        plain_outputs = dict(named_tensors(call_model(prepared, inputs)))
    with prepared.quantized(), prepared.following(order):
        wanted = dict(named_tensors(call_model(prepared, inputs)))
    with prepared.quantized():
        walk = _Walk(model, prepared, captured)
        ends = {op.index: walk._values(op) for op in walk.ops.ops}
    for output, ref in captured.outputs:
        base, own, _ = ends[ref.op]
        assert torch.allclose(base[ref.position].float(), plain_outputs[output].float(), atol=1e-5)
        assert torch.equal(own[ref.position], wanted[output]), output


@pytest.mark.parametrize("memory_mb", [2048, 0.01], ids=["one pair of passes", "as many as the memory asks for"])
@pytest.mark.parametrize("name", ["resnet", "vision_transformer", "detr", "temporal"])
def test_full_forwards_give_the_same_columns_but_those_of_operators_alone(name, memory_mb, monkeypatch):
    model, inputs = build(name)
    prepared = calibrated(model, inputs)
    wanted = compare_layers(model, prepared, inputs)

    def refused(*_, **__):
        raise ReplayError("some reason")

    monkeypatch.setattr("qflow.analysis.layers.compare.capture", refused)
    table = compare_layers(model, prepared, inputs, memory_mb=memory_mb)
    rows = {row.mod_name: row for row in table.rows}
    left = [replace(row, index=0, single_error=None) for row in wanted.rows if row.mod_name in rows]
    assert [replace(row, index=0) for row in rows.values()] == left
    assert all(row.base_op_type == "torch.setitem" for row in wanted.rows if row.mod_name not in rows)
    assert table.start == ""
    (finding,) = (f for f in table.findings if f.op == "layers")
    assert finding.message.endswith("the error of each operator alone and where the error starts: some reason")
    assert finding.message in layers_line(table)
    assert "some reason" in layers_text(table).splitlines()[-1]
    assert not any(f.op == "layers" for f in wanted.findings)


class Branches(nn.Module):
    """The calibrated model takes another branch than float: 1.0 is no multiple of its scale."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        one = self.a(x)
        return self.b(one) if bool((one == 1.0).all()) else self.c(one)[:, :3]


def test_operators_that_only_one_of_the_models_runs_are_counted():
    torch.manual_seed(0)
    model, x = Branches().eval(), torch.randn(4, 6)
    with torch.no_grad():
        model.a.weight.zero_()
        model.a.bias.fill_(1.0)
    prepared = calibrated(model, x)
    prepared.outputs["a"].set_scale(0.3)
    table = compare_layers(model, prepared, x)
    rows = {row.mod_name: row for row in table.rows}
    assert rows["a"].L1 > 0.0
    assert rows["b"].L1 is None
    assert any(f.op == "b" and "1 operators have another shape" in f.message for f in table.findings)


def test_what_an_operator_raises_when_it_is_run_alone_is_no_refusal(monkeypatch):
    model, inputs = build("resnet")
    prepared = calibrated(model, inputs)

    def raises(*_):
        raise RuntimeError("view size is not compatible")

    monkeypatch.setattr(_Walk, "row", raises)
    table = compare_layers(model, prepared, inputs)
    assert any("RuntimeError: view size is not compatible" in f.message for f in table.findings)
    assert sum(row.Cosine is not None for row in table.rows) > 5


def test_every_call_has_a_row_and_groups_are_blank_but_at_their_end():
    model, inputs = build("resnet")
    prepared = calibrated(model, inputs)
    table = compare_layers(model, prepared, inputs)
    rows = {row.mod_name: row for row in table.rows}
    assert [row.index for row in table.rows] == list(range(len(table.rows)))
    group = next(node for node in prepared.graph.nodes if node.fused)
    names = [group.name, *group.fused]
    ends = [n for n in names if rows[n].Cosine is not None]
    assert len(ends) == 1
    assert rows[ends[0]].analy_op_type.startswith("qflow.")
    inner = rows[next(n for n in names if n != ends[0])]
    assert inner.Cosine is None and inner.analy_op_type.endswith("Identity")
    quantizers = {row.quantizer for row in table.rows} - {""}
    assert quantizers == {node.name for node in prepared.graph.nodes if node.quantizer}


def test_the_operator_that_makes_the_error_is_told_from_those_that_carry_it():
    model, inputs = build("mobilenet")
    prepared = calibrated(model, inputs)
    node = [n for n in prepared.graph.quantized if n.weight][2]
    prepared.outputs[node.quantizer].scale.mul_(20.0)
    table = compare_layers(model, prepared, inputs)
    assert table.start == node.name  # as its qconfig line has it, not as the last member of its group
    row = next(r for r in table.rows if r.quantizer == node.name)
    after = [r for r in table.rows if r.index > row.index and r.error is not None]
    assert max(r.single_error or 0 for r in after) < 0.2 * row.single_error
    assert max(r.error for r in after) > 3 * max(r.single_error or 0 for r in after)
    assert f"The error starts to grow at {node.name}." in layers_text(table)


def test_metrics_are_the_plugins_formulas():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 700, 211)  # several parts
    y = x + 0.1 * torch.randn_like(x)
    found = compare(x, y)
    a, b = x.double().flatten(), y.double().flatten()
    wanted = {
        "Cosine": F.cosine_similarity(a, b, dim=0),
        "MSE": F.mse_loss(b, a),
        "L1": F.l1_loss(b, a),
        "KL": F.kl_div(y.double().log_softmax(1), x.double().softmax(1), reduction="mean"),
        "SQNR": 20 * torch.log10(a.norm() / (a - b).norm()),
        "Atol": (a - b).abs().max(),
        "Rtol": torch.nan_to_num((a - b) / a).abs().max(),
        "base_model_var": a.var(),
        "analy_model_mean": b.mean(),
        "base_model_max": a.max(),
        "error": (a - b).norm() / a.norm(),
    }
    for name, value in wanted.items():
        assert found[name] == pytest.approx(float(value), rel=1e-6, abs=1e-9), name


def test_equal_tensors_have_no_distance():
    found = compare(torch.ones(2, 3), torch.ones(2, 3))
    assert (found["Cosine"], found["SQNR"], found["Atol"], found["error"]) == (1.0, math.inf, 0.0, 0.0)
    assert compare(torch.ones(2), torch.ones(3))["Cosine"] is None
    assert compare(torch.ones(2, dtype=torch.long), torch.ones(2, dtype=torch.long))["MSE"] is None


def test_the_same_mask_in_both_is_no_difference_and_a_lost_value_an_infinite_one():
    x = torch.tensor([1.0, 2.0, -math.inf, 4.0])
    found = compare(x, torch.tensor([1.0, 2.5, -math.inf, 4.0]))
    assert found["Atol"] == 0.5
    assert found["error"] == pytest.approx(0.5 / math.sqrt(21))
    lost = compare(x, torch.tensor([1.0, math.nan, -math.inf, 4.0]))
    assert lost["Atol"] == math.inf and lost["Cosine"] is None
    assert compare(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))["Rtol"] == pytest.approx(3.4028235e38)


class BestScore(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 9)

    def forward(self, x):
        return torch.relu(self.a(x).max(-1).values) * 2.0


def test_the_largest_of_some_values_passes_its_quantizer():
    torch.manual_seed(0)
    model, x = BestScore().eval(), torch.randn(8, 6)
    prepared = calibrated(model, x)
    assert "[max]" in prepared.outputs
    table = compare_layers(model, prepared, x)
    row = next(r for r in table.rows if r.mod_name == "[max]")
    assert row.analy_model_max / row.qscale == pytest.approx(round(row.analy_model_max / row.qscale), abs=1e-3)


def test_text_and_csv_have_the_guides_columns():
    model, inputs = build("two_inputs")
    table = compare_layers(model, calibrated(model, inputs), inputs)
    assert list(COLUMNS) == GUIDE
    header = layers_text(table).splitlines()[1]
    assert [cell.strip() for cell in header.strip("|").split("|")][1 : len(GUIDE) + 1] == GUIDE
    lines = layers_csv(table).splitlines()
    assert lines[0].split(", ")[1 : len(GUIDE) + 1] == GUIDE
    assert all(len(line.split(", ")) == len(lines[0].split(", ")) for line in lines)
    assert "torch.Size([2* " in lines[1]
    assert from_dict(LayerTable, plain(table)) == table


def test_filters_are_or_ed_as_in_the_plugin():
    model, inputs = build("resnet")
    table = compare_layers(model, calibrated(model, inputs), inputs)
    found = filtered(table, prefixes=["stem"], types=["Linear"]).rows
    assert {row.mod_name.split(".")[0] for row in found} >= {"stem"}
    assert any(row.base_op_type.endswith("Linear") for row in found)
    assert all(row.mod_name.startswith("stem") or row.base_op_type.endswith("Linear") for row in found)
    assert filtered(table).rows == table.rows


@pytest.mark.parametrize("noise", [1e-5, 1e-2, 3.0, 300.0])
def test_kl_keeps_its_digits_from_tiny_to_huge_differences(noise):
    torch.manual_seed(0)
    x = torch.randn(2, 9, 5, 7)
    y = x + noise * torch.randn_like(x)
    wanted = F.kl_div(y.double().log_softmax(1), x.double().softmax(1), reduction="sum") / x.numel()
    assert divergence(x, y) == pytest.approx(wanted.item(), rel=1e-3)


def test_nan_of_the_float_model_is_named_and_starts_no_error():
    class Log(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.b(torch.log(self.a(x) + 9.0))

    torch.manual_seed(0)
    model, inputs = Log().eval(), torch.randn(4, 6)
    prepared = calibrated(model, inputs)
    inputs[2] *= 1000.0
    table = compare_layers(model, prepared, inputs)
    assert [(f.op, f.level) for f in table.findings] == [("[log]", "error")]
    assert "the float model itself gives NaN here" in table.findings[0].message and table.start != "[log]"
    assert math.isfinite(next(r for r in table.rows if r.mod_name == "[log]").error)


class Fallback(nn.Module):
    """Reads its input or, where that is empty, a constant."""

    def __init__(self):
        super().__init__()
        self.own, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.default = nn.Parameter(torch.randn(4))

    def forward(self, x):
        memory = self.own(x) if float(x.abs().sum()) > 0 else self.default.expand_as(x)
        return self.head(self.other(memory) + x)


def test_operators_that_an_input_does_not_reach_are_named():
    torch.manual_seed(0)
    model, x = Fallback().eval(), torch.randn(2, 4)
    prepared = calibrated(model, x)
    said = [
        [f.op for f in compare_layers(model, prepared, given).findings if f.message.startswith("no row")]
        for given in (x, x * 0)
    ]
    assert said == [[], ["own"]]
