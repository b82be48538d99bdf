"""The sensitivity table: exact by replay, estimated where that pays, and honest about which is which."""
# Long: exact, estimated and screened scores are compared with one naive loop on the same network.

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from support.models import WritesByStrides
from support.zoo import build
from torch import nn

from qflow.analysis.measures.distances import Distances
from qflow.analysis.measures.tables import SensitivityRow, SensitivityTable
from qflow.analysis.sensitivity.candidates import candidates
from qflow.analysis.sensitivity.chunks import joined
from qflow.analysis.sensitivity.health import health
from qflow.analysis.sensitivity.measure import Measure, sensitivity
from qflow.analysis.sensitivity.sensitive_ops import write_sensitive_ops
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError, DataError
from qflow.core.record import from_dict, plain
from qflow.core.resolve import resolve
from qflow.core.setter import TemplateSetter
from qflow.core.settings import COMPARISONS, CalibrationSettings, SensitivitySettings
from qflow.core.table_setter import table_rows
from qflow.quant.model.calibrate import apply_scales, collect
from qflow.quant.model.prepare import prepare
from qflow.quant.replay.replay import Replay, full_forward
from qflow.quant.trace.calling import batch_size, call_model, cut, named_tensors

torch.manual_seed(0)


def calibrated(model, inputs, dtype=QDtype.qint8):
    prepared = prepare(model, inputs)
    stats = collect(prepared, [(inputs, batch_size(inputs))])
    qconfig = resolve(prepared.graph, [TemplateSetter(dtype)], "nash-m")
    apply_scales(prepared, stats, qconfig, CalibrationSettings())
    return prepared


def scores(table):
    return pd.Series({(r.op_name, r.sensitive_type): r.score for r in table.rows})


def naive(model, prepared, inputs, metric):
    """One full forward a quantizer: the definition."""
    rows = candidates(prepared)
    distances = Distances(metric, len(rows))
    with torch.no_grad():
        distances.reference(dict(named_tensors(call_model(model, inputs))), batch_size(inputs))
        for i, row in enumerate(rows):
            distances.add(i, full_forward(prepared, inputs, row.variant))
    return pd.Series({(r.node.name, r.sensitive_type): distances.result(i)[0] for i, r in enumerate(rows)})


@pytest.fixture(scope="module")
def network():
    model, _ = build("resnet")
    torch.manual_seed(1)
    images = torch.randn(64, 3, 16, 16)
    return model, calibrated(model, images), images


@pytest.mark.parametrize("metric", COMPARISONS)
def test_exact_rows_are_what_full_forwards_give(network, metric):
    model, prepared, images = network
    table = sensitivity(model, prepared, [images[:20]], settings=SensitivitySettings(metric=metric))
    wanted = naive(model, prepared, images[:20], metric)
    assert table.exact and "replay" in table.method
    pd.testing.assert_series_equal(scores(table).sort_index(), wanted.sort_index(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("samples", [1, 3, 4])
def test_few_samples_run_several_quantizers_at_once_and_give_the_same(network, samples):
    model, prepared, images = network
    table = sensitivity(model, prepared, [images[:samples]])
    wanted = naive(model, prepared, images[:samples], "L1")
    pd.testing.assert_series_equal(scores(table).sort_index(), wanted.sort_index(), rtol=1e-3, atol=1e-6)


def test_little_memory_gives_the_same_table(network):
    model, prepared, images = network
    roomy = sensitivity(model, prepared, [images[:6]])
    tight = sensitivity(model, prepared, [images[:6]], settings=SensitivitySettings(memory_mb=1))
    pd.testing.assert_series_equal(scores(tight).sort_index(), scores(roomy).sort_index(), rtol=1e-3, atol=1e-6)


def test_an_estimate_ranks_as_the_exact_table_does(network):
    model, prepared, images = network
    exact = scores(sensitivity(model, prepared, [images]))
    found = []
    for seed in range(5):
        settings = SensitivitySettings(method="estimate", seed=seed)
        table = sensitivity(model, prepared, [images], settings=settings, rows=None)
        assert not table.exact and not any(r.exact for r in table.rows)
        assert "estimate" in table.text()
        found.append(exact.corr(scores(table), method="spearman"))
    assert sorted(found)[2] >= 0.95
    assert min(found) > 0.9


@pytest.mark.parametrize("metric", ["L1", "MSE", "SQNR", "Cosine", "KL"])
def test_an_estimate_has_the_units_of_its_metric(network, metric):
    model, prepared, images = network
    exact = scores(sensitivity(model, prepared, [images], settings=SensitivitySettings(metric=metric)))
    guess = scores(
        sensitivity(model, prepared, [images], settings=SensitivitySettings(metric=metric, method="estimate"))
    )
    ratio = (guess[exact.index] / exact)[exact > exact.median()]
    assert 0.5 < ratio.median() < 2.0


def test_screening_measures_the_top_and_says_how_far_the_estimate_was_off():
    model, _ = build("vision_transformer")
    torch.manual_seed(2)
    images = torch.randn(64, 3, 16, 16)
    prepared = calibrated(model, images)
    exact = sensitivity(model, prepared, [images])
    settings = SensitivitySettings(method="screened", screened_share=0.4)
    table = sensitivity(model, prepared, [images], settings=settings)
    assert not table.exact
    measured = {(r.op_name, r.sensitive_type) for r in table.rows if r.exact}
    assert len(table.rows) // 5 <= len(measured) < len(table.rows)
    assert {(r.op_name, r.sensitive_type) for r in exact.rows[: len(exact.rows) // 5]} <= measured
    assert any("off by a factor" in f.message for f in table.findings)
    both = scores(exact)[list(measured)], scores(table)[list(measured)]
    pd.testing.assert_series_equal(*both, rtol=1e-3, atol=1e-9)


def test_where_an_estimate_does_not_pay_every_row_is_measured_and_that_is_said(network):
    model, prepared, images = network
    table = sensitivity(model, prepared, [images[:2]], settings=SensitivitySettings(method="screened"))
    assert table.exact
    assert any("all were measured" in f.message for f in table.findings)
    table = sensitivity(model, prepared, [images], settings=SensitivitySettings(method="estimate", metric="Atol"))
    assert table.exact
    assert any("no second-order estimate" in f.message for f in table.findings)


def test_a_model_that_cannot_be_replayed_is_run_in_full_and_that_is_said():
    model, x = WritesByStrides().eval(), torch.randn(12, 3, 6, 6)
    prepared = calibrated(model, x)
    table = sensitivity(model, prepared, [x])
    assert any("replay was given up" in f.message for f in table.findings)
    wanted = naive(model, prepared, x, "L1")
    pd.testing.assert_series_equal(scores(table).sort_index(), wanted.sort_index(), rtol=1e-3, atol=1e-9)


def test_full_forwards_run_all_bad_cases_at_once():
    """At most 1.3 forwards a row, though each bad case comes alone."""
    model, x = WritesByStrides().eval(), torch.randn(6, 3, 6, 6)
    prepared = calibrated(model, x)
    calls = []
    prepared.model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    table = sensitivity(model, prepared, [x[:1], x[1:2], x[2:]])
    assert len(calls) <= 1.3 * len(table.rows)
    assert set(calls) == {6}
    wanted = naive(model, prepared, x, "L1")
    pd.testing.assert_series_equal(scores(table).sort_index(), wanted.sort_index(), rtol=1e-3, atol=1e-9)


def test_bad_cases_that_change_each_other_in_one_batch_are_run_apart():
    class Centred(WritesByStrides):
        def forward(self, x):
            return super().forward(x) - x.mean((0, 1, 2, 3))

    model, x = Centred().eval(), torch.randn(4, 3, 6, 6)
    prepared = calibrated(model, x)
    calls = []
    prepared.model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    sensitivity(model, prepared, [x[:2], x[2:]])
    assert set(calls) == {2}


def test_batches_are_joined_if_only_their_samples_differ():
    a, b = torch.ones(2, 3), torch.zeros(1, 3)
    both = joined([{"x": a, "scale": 2.0}, {"x": b, "scale": 2.0}])
    assert both["scale"] == 2.0
    assert torch.equal(both["x"], torch.cat([a, b]))
    assert torch.equal(joined([(a, a.new_ones(5)), (b, a.new_ones(5))])[1], a.new_ones(5))
    for other in ({"x": b, "scale": 3.0}, {"x": b[:, :2], "scale": 2.0}, {"x": b.double(), "scale": 2.0}, {"x": b}):
        assert joined([{"x": a, "scale": 2.0}, other]) is None


class ReadsNumber(nn.Module):
    """Divides by a Python number of its own values, after rounding: neither replay nor a derivative sees that."""

    def __init__(self, number, rounds):
        super().__init__()
        self.number, self.rounds = number, rounds
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.a(x)
        if self.rounds:
            x = (10.0 * x).round() / 10.0
        return self.b(x / float(x.abs().amax(1).mean()) if self.number else x)


def test_a_python_number_of_the_values_is_no_replay():
    torch.manual_seed(0)
    model, x = ReadsNumber(number=True, rounds=False).eval(), torch.randn(12, 6)
    prepared = calibrated(model, x)
    table = sensitivity(model, prepared, [x])
    assert any("a Python value is taken from" in f.message for f in table.findings)
    wanted = naive(model, prepared, x, "L1")
    pd.testing.assert_series_equal(scores(table).sort_index(), wanted.sort_index(), rtol=1e-3, atol=1e-9)


def test_what_a_derivative_cannot_see_is_measured():
    torch.manual_seed(0)
    model, x = ReadsNumber(number=False, rounds=True).eval(), torch.randn(64, 6)
    prepared = calibrated(model, x)
    rows = candidates(prepared) * 4  # enough for an estimate to pay
    table = sensitivity(model, prepared, [x], rows=rows, settings=SensitivitySettings(method="estimate"))
    measured = {r.op_name for r in table.rows if r.exact}
    assert {"quant[x]", "a"} <= measured
    assert "b" not in measured
    assert any("have no estimate" in f.message for f in table.findings)


class Branches(nn.Module):
    """Another path for longer inputs, with as many operators."""

    def __init__(self):
        super().__init__()
        self.e, self.o = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.e(x)
        x = x.reshape(x.shape[0], -1, 4) if x.shape[1] > 4 else x * 2
        x = torch.relu(x)
        return self.o(x.reshape(len(x), -1, 8)).mean(1)


def test_widths_of_one_path_are_not_used_on_another():
    torch.manual_seed(0)
    model = Branches().eval()
    cases = [torch.randn(1, 6, 8), torch.randn(1, 3, 8), torch.randn(1, 5, 8)]
    prepared = calibrated(model, cases[0])
    table = sensitivity(model, prepared, cases)
    rows = candidates(prepared)
    distances = Distances("L1", len(rows))
    for case in cases:
        with torch.no_grad():
            distances.reference(dict(named_tensors(call_model(model, case))), 1)
            for i, row in enumerate(rows):
                distances.add(i, full_forward(prepared, case, row.variant))
    wanted = pd.Series({(r.node.name, r.sensitive_type): distances.result(i)[0] for i, r in enumerate(rows)})
    pd.testing.assert_series_equal(scores(table).sort_index(), wanted.sort_index(), rtol=1e-3, atol=1e-6)


class Mixes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.a(x).abs()
        return self.b(x / x.amax(0))


def test_samples_that_depend_on_each_other_stay_together():
    torch.manual_seed(0)
    model, x = Mixes().eval(), torch.randn(40, 6)
    prepared = calibrated(model, x)
    table = sensitivity(model, prepared, [x])
    assert any("not cut into smaller batches" in f.message for f in table.findings)
    wanted = naive(model, prepared, x, "L1")
    pd.testing.assert_series_equal(scores(table).sort_index(), wanted.sort_index(), rtol=1e-3, atol=1e-9)


def one_percent_more(run):
    def wrong(self, variants, part):
        for i, got in run(self, variants, part):
            yield i, {name: 1.01 * tensor for name, tensor in got.items()}

    return wrong


def test_a_replay_that_is_wrong_is_found_out(network, monkeypatch):
    """The self-check is what stands between a wrong replay and the table."""
    model, prepared, images = network
    monkeypatch.setattr(Replay, "run", one_percent_more(Replay.run))
    table = sensitivity(model, prepared, [images[:16]])
    assert any("differ from full forwards by" in f.message for f in table.findings)
    wanted = naive(model, prepared, images[:16], "L1")
    pd.testing.assert_series_equal(scores(table).sort_index(), wanted.sort_index(), rtol=1e-3, atol=1e-9)


def test_int16_weights_are_candidates(network):
    model, prepared, images = network
    rows = [r for r in candidates(prepared, QDtype.qint16) if r.variant.weight]
    assert rows
    table = sensitivity(
        model, prepared, [images[:16]], rows=rows + [r for r in candidates(prepared) if r.variant.weight]
    )
    low, high = table.weight_scores("qint8"), table.weight_scores("qint16")
    assert all(high[name] < 0.05 * low[name] for name in low)


def test_every_candidate_dtype_has_its_rows(network):
    model, prepared, images = network
    rows = candidates(prepared) + candidates(prepared, QDtype.float16)
    wide = candidates(calibrated(model, images, QDtype.qint16), QDtype.qint16)
    table = sensitivity(model, prepared, [images[:16]], rows=[*rows, *wide])
    assert table.dtypes == ("qint8", "qint16", "float16")
    low, high = table.activation_scores("qint8"), table.activation_scores("qint16")
    assert all(high[name] < 0.1 * low[name] for name in low if low[name] > 1e-3)
    assert table.activation_scores() == low
    assert from_dict(SensitivityTable, plain(table)) == table


def test_spread_is_that_of_the_bad_cases(network):
    model, prepared, images = network
    table = sensitivity(model, prepared, [images[:12]])
    alone = [sensitivity(model, prepared, [images[i : i + 1]]) for i in range(12)]
    top = table.rows[0]
    each = [
        r.score for t in alone for r in t.rows if (r.op_name, r.sensitive_type) == (top.op_name, top.sensitive_type)
    ]
    assert top.spread > 0
    assert top.spread == pytest.approx(float(pd.Series(each).std()), rel=0.5)  # each alone has its own unit


def test_several_outputs_have_their_own_values_and_files(tmp_path):
    model, inputs = build("detr")
    prepared = calibrated(model, inputs)
    table = sensitivity(model, prepared, [inputs])
    assert {name for row in table.rows for name, _ in row.outputs} == {"boxes", "classes"}
    paths = write_sensitive_ops(table, tmp_path)
    assert tmp_path / "output_boxes_L1_sensitive_ops.pt" in paths
    rows = torch.load(tmp_path / "output_boxes_L1_sensitive_ops.pt", weights_only=True)
    assert [r[3] for r in rows] == sorted((r[3] for r in rows), reverse=True)
    assert {type(cell) for row in rows for cell in row} <= {str, float}
    assert [r.op_name for r in table_rows(rows)] == [r[0] for r in rows if not str(r[0]).startswith("const[")]


def made(values, dtype="qint8", spread=0.0):
    rows = [SensitivityRow(f"op{i}", "activation", "t", v, dtype, 0, spread) for i, v in enumerate(values)]
    return SensitivityTable("L1", "sum", 4, True, tuple(rows))


def test_a_healthy_table_has_a_tail_near_zero():
    assert health(made([1.0, 0.3, 0.1, 0.05, 0.02, 0.01, 0.005, 0.001])) == ()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1.0, 0.9, 0.9, 0.8, 0.8, 0.7, 0.7, 0.6], "the tail is large"),
        ([0.0] * 6, "every score is 0"),
        ([float("inf"), 0.1, 0.1, 0.0], "not finite"),
    ],
)
def test_an_unhealthy_table_names_the_likely_cause(values, says):
    assert says in health(made(values))[0].message


def test_settings_are_checked():
    with pytest.raises(
        ConfigError, match="sensitivity.method is one of exact, screened, estimate, point, but got 'fast'"
    ):
        SensitivitySettings(method="fast")
    with pytest.raises(ConfigError, match="sensitivity.dtypes is one of"):
        SensitivitySettings(dtypes=["int8"])


def test_parts_of_a_batch_leave_what_has_no_batch_axis_whole():
    grid = torch.zeros(3, 3)
    part = cut({"x": torch.arange(8.0), "grid": grid}, 8, 2, 5)
    assert part["x"].tolist() == [2.0, 3.0, 4.0]
    assert part["grid"] is grid


# ---- outputs without a distance


class Ends(nn.Module):
    """Four convolutions in a row, and what `end` makes of the last."""

    def __init__(self, end):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.head, self.end = nn.Linear(8, 4), end

    def forward(self, x):
        return self.end(self.head(self.body(x).mean((2, 3))))


def ranked(end, change=lambda x: x, **settings):
    model, images = Ends(end).eval(), torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    prepared = calibrated(model, images)
    return sensitivity(model, prepared, [change(images)], settings=SensitivitySettings(**settings))


@pytest.mark.parametrize("metric", COMPARISONS)
def test_an_output_without_values_is_left_out_and_said_so(metric):
    table = ranked(lambda y: (y, y[:, :0]), metric=metric)
    plain = ranked(lambda y: (y,), metric=metric)
    assert scores(table).equals(scores(plain)) and all(math.isfinite(r.score) for r in table.rows)
    assert [f.message for f in table.findings] == ["output 1 is not compared: it holds no values"]


@pytest.mark.parametrize(
    ("end", "reason"), [(lambda y: y[:, :0], "it holds no values"), (lambda y: y.argmax(1), "int64 values have no")]
)
@pytest.mark.parametrize("method", ["exact", "estimate"])
def test_without_an_output_to_compare_the_reason_is_one_line(end, reason, method):
    with pytest.raises(DataError, match=f"compared, but got none: output 0 is not compared: {reason}") as error:
        ranked(end, method=method)
    assert "\n" not in str(error.value)


def far(x):
    x = x.clone()
    x[1] *= 1000.0
    return x


def test_nan_of_the_float_model_is_not_laid_to_quantizers():
    table = ranked(lambda y: torch.log(y + 3.0), far)
    assert all(math.isfinite(r.score) for r in table.rows)
    assert any("output 0 is NaN in the float model already, in 1 samples" in f.message for f in table.findings)
    assert not any("mask" in f.message for f in table.findings)
    with pytest.raises(DataError, match="the float model itself gives only NaN"):
        ranked(lambda y: torch.log(y + 3.0), lambda x: x * torch.nan)


def test_infinities_of_the_float_model_are_told_from_those_of_quantizers():
    table = ranked(lambda y: y.masked_fill(y > 0.1, -torch.inf))
    said = [f.message for f in table.findings]
    assert said[0].startswith("output 0 is infinite in the float model already")
    assert "infinities of the float outputs become other values" in said[-1]
    assert not any("look for a mask" in text for text in said)


# ---- health of small tables


def test_a_small_healthy_network_has_no_large_tail():
    table = ranked(lambda y: y)
    assert len(table.rows) < 16 and table.findings == ()
    assert health(made([1.0, 0.67, 0.55, 0.42, 0.42, 0.29, 0.25, 0.24, 0.2])) == ()  # the digits task
    assert "large" in health(made([1.0] * 2 + [0.3] * 18))[0].message


@pytest.mark.parametrize("step", [1.0, 0.05])
def test_rounding_at_the_end_is_named(step):
    said = [f.message for f in ranked(lambda y: (y / step).round() * step).findings]
    assert any("rounded" in text for text in said), said


def in_parts(model, prepared, images, answers):
    """The table of `images`, with its rows measured in five parts."""

    def elsewhere(whole, on_share):
        measure = Measure(model, prepared, [images], candidates(prepared), SensitivitySettings())
        found = [measure.part(replace(whole, index=i, of=5)) for i in range(5)]
        answers.append(["gave_up" in answer for answer in found])
        return json.loads(json.dumps(found))

    return sensitivity(model, prepared, [images], elsewhere=elsewhere)


@pytest.mark.parametrize("samples", [4, 24])  # several quantizers at once, and one at a time
def test_rows_in_parts_are_those_of_one_table(network, samples):
    model, prepared, images = network
    table, answers = sensitivity(model, prepared, [images[:samples]]), []
    assert in_parts(model, prepared, images[:samples], answers) == table
    assert answers == [[False] * 5]


def test_parts_take_the_slower_ways_of_one_table(network, monkeypatch):
    model, prepared, images = network
    monkeypatch.setattr(Replay, "run", one_percent_more(Replay.run))
    answers = []
    table = sensitivity(model, prepared, [images[:4]])
    assert any("given up" in finding.message for finding in table.findings)
    assert in_parts(model, prepared, images[:4], answers) == table
    assert [any(gave_up) for gave_up in answers] == [True, True, False]
