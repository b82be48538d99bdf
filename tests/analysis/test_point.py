"""Gains at the point of a mix: exact where theory says so, and a planted cause upstream comes first."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qflow.analysis.measures.distances import Distances
from qflow.analysis.sensitivity.candidates import candidates
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.analysis.sensitivity.point import gains
from qflow.core.dtype import QDtype
from qflow.core.errors import DataError
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, ModuleNameSetter, TemplateSetter
from qflow.core.settings import COMPARISONS, CalibrationSettings, SensitivitySettings
from qflow.quant.model.calibrate import apply_scales, collect
from qflow.quant.model.prepare import prepare
from qflow.quant.trace.calling import named_tensors

SEEDS = 20


def mixed(model, x, int16=()):
    """The prepared model with these operators at int16, the others at int8; output layers stay high precision."""
    prepared = prepare(model, x)
    promoted = ModuleNameSetter({name: "qint16" for name in int16})
    qconfig = resolve(prepared.graph, [HighPrecisionOutput(), promoted, TemplateSetter(QDtype.qint8)], "nash-m")
    stats = collect(prepared, [(x, len(x))], sampling=1)
    apply_scales(prepared, stats, qconfig, CalibrationSettings(method="minmax"))
    return prepared


def distance(model, prepared, x, off=(), weights_off=(), metric="L1"):
    """Distance of the outputs to float with all quantizers on but these: the definition."""
    found = Distances(metric, 1)
    with torch.no_grad():
        found.reference(dict(named_tensors(model(x))), len(x))
        with prepared.quantized():
            for quantizer in [*(prepared.outputs[n] for n in off), *(prepared.weights[n] for n in weights_off)]:
                quantizer.enabled = False
            found.add(0, dict(named_tensors(prepared(x))))
    return found.result(0)[0]


def on_grid(shape, generator):
    """Weights that int8 holds exactly: whole numbers of 1/128, the largest of each channel -1."""
    weight = torch.randint(-100, 101, shape, generator=generator) / 128.0
    weight.view(shape[0], -1)[:, 0] = -1.0
    return weight


def linear(depth, width, seed):
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(width, width) for _ in range(depth)]
    for layer in layers:
        layer.weight.data = on_grid((width, width), generator)
    return nn.Sequential(*layers).eval(), torch.randn(16, width, generator=generator)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 10**6))
def test_on_a_linear_network_the_first_order_gains_add_up_to_the_distance(depth, width, seed):
    model, x = linear(depth, width, seed)
    prepared = mixed(model, x)
    for quantizer in prepared.outputs.values():
        if quantizer.dtype == QDtype.qint8:
            quantizer.set_scale(quantizer.scale * 1.05)  # nothing is clipped
    table = gains(prepared, [x])
    assert not table.exact and sum(row.score for row in table.rows) == pytest.approx(
        distance(model, prepared, x), rel=1e-4
    )


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10**6))
def test_under_mse_the_gain_of_the_last_quantizer_is_off_by_its_own_square(width, seed):
    """No activation is rounded after it, and D is quadratic: 2 e . de to first order, 2 e . de - |de|^2 in all."""
    model, x = linear(2, width, seed)
    prepared = mixed(model, x)
    first, measured = (
        {(r.op_name, r.sensitive_type): r.score for r in gains(prepared, [x], metric="MSE", exact=count).rows}[
            "0", "activation"
        ]
        for count in (0, 99)
    )
    error = distance(model, prepared, x, metric="MSE") - distance(model, prepared, x, off=["0"], metric="MSE")
    assert measured == pytest.approx(error, rel=1e-6, abs=1e-12)
    with torch.no_grad():
        plain = model(x)
        with prepared.quantized():
            mix = prepared(x)
            prepared.outputs["0"].enabled = False
            moved = mix - prepared(x)
    part = float(moved.square().mean() / plain.abs().mean() ** 2)
    assert first - part == pytest.approx(measured, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("metric", [m for m in COMPARISONS if m != "Atol"])
def test_measured_gains_are_what_full_forwards_give_and_first_order_is_close(metric):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    x = torch.randn(32, 3, 8, 8)
    prepared = mixed(model.eval(), x)
    whole = distance(model, prepared, x, metric=metric)
    table = gains(prepared, [x], metric=metric, exact=99)
    assert table.exact and all(row.exact for row in table.rows)
    for row in table.rows:
        off = {"weights_off" if row.sensitive_type == "weight" else "off": [row.op_name]}
        assert row.score == pytest.approx(
            whole - distance(model, prepared, x, metric=metric, **off), rel=1e-6, abs=1e-9
        )
    guess = gains(prepared, [x[:16], x[16:]], metric=metric)
    assert sum(r.score for r in guess.rows) == pytest.approx(sum(r.score for r in table.rows), abs=1.5 * whole)
    assert all(q.enabled is False for q in (*prepared.outputs.values(), *prepared.weights.values()))
    assert all(p.grad is None for p in model.parameters())


class Bev(nn.Module):
    """A position map with one large channel is added to the features, and a head scales and maps the sum.

    At int8 the sum has steps of the large channel, which the head does not read: the features are lost. Its own scaling
    has steps that are slightly larger, and finds values that are rounded already. A second head reads the features.
    """

    def __init__(self, far=100.0):
        super().__init__()
        self.stem, self.trunk = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bev, self.plan = nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(8, 4, 1)
        self.register_buffer("position", torch.zeros(1, 8, 1, 1))
        self.register_buffer("gain", torch.full((1, 8, 1, 1), 0.5))
        self.position[:, 0], self.gain[:, 0] = far, 0.5025
        with torch.no_grad():
            self.bev.weight[:, 0] = 0.0

    def forward(self, x):
        features = torch.relu(self.trunk(torch.relu(self.stem(x))))
        return self.bev((features + self.position) * self.gain), self.plan(features)


HEAD = {"off": ["[mul]", "bev"], "weights_off": ["bev"]}


def planted(seed):
    torch.manual_seed(seed)
    model = Bev().eval()
    return model, torch.randn(16, 3, 8, 8)


def test_a_cause_upstream_comes_first_where_promoting_the_head_recovers_nothing():
    """Alone in the float model, the head's own operator looks worse than the cause in most seeds."""
    by_point, alone, recovered = 0, 0, []
    for seed in range(SEEDS):
        model, x = planted(seed)
        prepared = mixed(model, x)
        whole = distance(model, prepared, x)
        recovered.append(1.0 - distance(model, prepared, x, **HEAD) / whole)
        by_point += gains(prepared, [x]).rows[0].op_name == "[add]"
        alone += sensitivity(model, prepared, [x]).rows[0].op_name == "[add]"
    assert max(recovered) < 0.01
    assert by_point == SEEDS and alone < SEEDS


def test_ranked_again_after_each_promotion_two_rounds_repair_it():
    model, x = planted(0)
    promoted, before = [], distance(model, mixed(model, x), x)
    for _ in range(2):
        prepared = mixed(model, x, promoted)
        promoted.append(next(r.op_name for r in gains(prepared, [x]).rows if r.sensitive_type == "activation"))
    assert promoted == ["[add]", "[mul]"]
    assert distance(model, mixed(model, x, promoted), x) < 0.05 * before
    one = distance(model, mixed(model, x, promoted[:1]), x)
    assert one > 0.9 * before  # the next operator rounds as coarsely: one promotion alone says nothing


def test_rows_of_other_dtypes_are_judged_at_the_same_point():
    model, x = planted(0)
    prepared = mixed(model, x, ["[add]"])
    coarse = candidates(mixed(model, x))
    at_int8 = {r.op_name: r.score for r in gains(prepared, [x], rows=coarse).rows if r.sensitive_type == "activation"}
    own = {r.op_name: r for r in gains(prepared, [x]).rows if r.sensitive_type == "activation"}
    assert own["[add]"].quant_dtype == "qint16" and abs(own["[add]"].score) < 0.01 * at_int8["[mul]"]
    assert own["[mul]"].score == pytest.approx(at_int8["[mul]"], rel=1e-5)
    measured = gains(prepared, [x], rows=coarse, exact=99)
    assert {r.op_name: r.score for r in measured.rows if r.sensitive_type == "activation"}["[add]"] == pytest.approx(
        distance(model, mixed(model, x), x) - distance(model, prepared, x, off=["[add]"]), abs=1e-6
    )


def test_the_method_point_ranks_by_gains_and_has_no_scores_below_zero():
    model, x = planted(3)
    prepared, done = mixed(model, x), []
    table = sensitivity(model, prepared, [x], settings=SensitivitySettings(method="point"), on_row=done.append)
    signed = {(r.op_name, r.sensitive_type): r.score for r in gains(prepared, [x]).rows}
    assert [r.score for r in table.rows] == [max(signed[r.op_name, r.sensitive_type], 0.0) for r in table.rows]
    assert min(signed.values()) < 0.0 and table.rows[0].op_name == "[add]"
    assert done == [len(table.rows)] and "all quantizers on" in table.method


def test_a_gain_needs_samples():
    model, x = planted(0)
    with pytest.raises(DataError, match="needs quantizers and bad cases"):
        gains(mixed(model, x), [])


class Root(nn.Module):
    """The gradient of a square root at 0 is infinite, and a ReLU gives zeros."""

    def __init__(self):
        super().__init__()
        self.inside, self.outside = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.outside(torch.relu(self.inside(x)).sqrt())


def test_rows_without_a_finite_gradient_are_measured():
    torch.manual_seed(0)
    model, x = Root().eval(), torch.randn(16, 4)
    prepared = mixed(model, x)
    table = gains(prepared, [x])
    measured = {r.op_name: r.score for r in table.rows if r.exact and r.sensitive_type == "activation"}
    whole = distance(model, prepared, x)
    assert measured == {name: pytest.approx(whole - distance(model, prepared, x, off=[name])) for name in measured}
    assert "inside" in measured
    assert all(math.isfinite(r.score) for r in table.rows)
