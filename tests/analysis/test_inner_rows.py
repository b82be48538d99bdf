"""Values inside norms and softmaxes in settings, tables, replays and advice."""

import pytest
import torch
from support.norms import INT8, INT16, Tokens, calibrated, inner_of, norms, unlike_tokens
from support.replays import full

import qflow
from qflow.analysis.advice.advisor import advise
from qflow.analysis.layers.compare import compare_layers
from qflow.analysis.measures.distances import disagreement
from qflow.analysis.sensitivity.candidates import candidates
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.setter import ModuleNameSetter
from qflow.core.settings import SensitivitySettings
from qflow.quant.replay.capture import capture
from qflow.quant.replay.replay import Replay
from qflow.quant.replay.widen import widen


def test_a_name_inside_a_norm_sets_the_whole_norm():
    x = unlike_tokens()
    for setter in (ModuleNameSetter, qflow.ModuleNameQconfigSetter):
        prepared = calibrated(norms(), x, (setter({"norm.var_mean.pre_mean": "qint16"}), INT8))
        assert prepared.applied.ops["norm"].output == QDtype.qint16
    with pytest.raises(ConfigError, match="head.weight"):
        calibrated(norms(), x, (ModuleNameSetter({"head.weight": "qint16"}), INT8))
    table = [["norm.weight_mul", "activation", "", 1.0, "qint8"], ["head", "activation", "", 0.5, "qint8"]]
    setter = qflow.sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter(table, topk=1)
    prepared = calibrated(norms(), x, (setter, INT8))
    assert prepared.applied.ops["norm"].output == QDtype.qint16
    assert prepared.applied.ops["head"].output == QDtype.qint8


@torch.no_grad()
def test_inner_values_have_rows_of_their_own_that_no_ratio_promotes():
    x, model = unlike_tokens(), norms()
    prepared = calibrated(model, x)
    table = sensitivity(model, prepared, [x[:16]])
    assert not table.findings
    rows = {r.op_name: r for r in table.rows if r.sensitive_type == "activation"}
    assert {rows[name].quant_dtype for name in inner_of(prepared)} == {"qint16"}
    assert rows["norm.var_mean.var"].op_type == rows["norm"].op_type
    assert rows["norm.var_mean.var"].score > rows["norm"].score > 0.0
    estimate = sensitivity(model, prepared, [x[:16]], settings=SensitivitySettings(method="estimate", draws=256))
    guessed = {r.op_name: r.score for r in estimate.rows if r.sensitive_type == "activation"}
    assert guessed["norm.mul"] == pytest.approx(rows["norm.mul"].score, rel=0.5)
    whole = qflow.sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter(table, ratio=1.0)
    promoted = calibrated(model, x, (whole, INT8)).applied
    assert set(promoted.names(QDtype.qint16)) == {"quant[x]", "first", "norm", "head"}


@pytest.mark.parametrize("wide", [False, True])
@torch.no_grad()
def test_a_replayed_inner_quantizer_gives_what_a_full_forward_gives(wide):
    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randn(4, 6, 8) * torch.exp(torch.randn(4, 6, 1))
    prepared = calibrated(model, x)
    variants = [row.variant for row in candidates(prepared)]
    assert sum(row.inside for row in candidates(prepared)) == len(inner_of(prepared)) == 5 + 4 + 3 + 3 + 4
    captured = capture(model, prepared.plan, x, float("inf"))
    replay = Replay(model, prepared, captured)
    if wide:
        replay.widths = widen(model, prepared, replay.ops, x, captured, 4, 7)
    plain, wanted = {"out": model(x)}, full(prepared, x, variants)
    for i, got in replay.run(variants):
        (name,) = got
        assert disagreement({"out": got[name]}, {"out": wanted[i][name]}, plain, 1e-2) < 1e-3, variants[i].name


@torch.no_grad()
def test_the_layer_table_shows_the_error_of_inner_values_at_the_row_of_the_norm():
    x, model = unlike_tokens(), norms()
    prepared = calibrated(model, x, INT16)
    rows = {r.mod_name: r for r in compare_layers(model, prepared, x).rows}
    y = model.first(x)
    with prepared.only(outputs=["norm", *inner_of(prepared)]):
        alone = prepared.model.norm  # called outside a forward pass it is the float module
        assert torch.equal(alone(y), model.norm(y))
    assert rows["norm"].single_error > 20 * rows["first"].single_error
    for name in inner_of(prepared):
        prepared.outputs[name].dtype = None
    assert compare_layers(model, prepared, x).rows[2].single_error < 0.05 * rows["norm"].single_error


def test_the_advice_for_coarse_inner_values_is_fp16_if_that_was_measured():
    x, model = unlike_tokens(), norms()
    prepared = calibrated(model, x, INT16)
    own, fp16 = candidates(prepared), candidates(prepared, QDtype.float16)
    for known, spec, text in (([*own, *fp16], "float16", "at fp16 they lose"), (own, "", "may help")):
        table = sensitivity(model, prepared, [x[:16]], rows=known)
        found = advise(prepared, prepared.stats, table, None, lambda name, spec: "")
        advice = next(a for a in found if a.cause == "values inside")
        assert (advice.op, advice.spec) == ("norm", spec)
        assert "qint16 whatever its dtype, and norm.var_mean.var is too coarse" in advice.text
        assert text in advice.text
