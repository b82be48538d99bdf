"""The plugin's templates as rules over the graph, and the setters of a trial."""

import pytest

from qflow.api.plugin_names import get_qconfig
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput
from qflow.core.settings import RULES, QConfigSettings
from qflow.core.table_setter import TableRow
from qflow.core.template import (
    GEMM_TO_GRID_INT16,
    GEMM_TO_LAYER_NORM_INT16,
    GEMM_TO_SOFTMAX_INT16,
    TEMPLATES,
    GemmInt8,
    TemplateQconfigSetter,
    trial_setters,
)


def node(name, kind, *inputs, op_type=None, quantized=True):
    weight = name if kind in (OpKind.conv, OpKind.linear) else None
    return OpNode(name, kind, op_type or kind.value, inputs, (1, 4), name if quantized else None, weight)


def warp():
    """Features through a conv; a grid that is made of two branches, one with a linear layer."""
    return ModelGraph(
        (
            node("feature", OpKind.input),
            node("points", OpKind.input),
            node("backbone", OpKind.conv, "feature"),
            node("before", OpKind.lut, "points"),
            node("project", OpKind.linear, "before"),
            node("[sub]", OpKind.arithmetic, "project"),
            node("[mul]", OpKind.mul, "points"),
            node("[cat]", OpKind.concat, "[sub]", "[mul]"),
            node("[permute]", OpKind.move, "[cat]", quantized=False),
            node("[grid_sample]", OpKind.grid_sample, "backbone", "[permute]"),
            node("norm", OpKind.layer_norm, "[grid_sample]"),
            node("q", OpKind.linear, "norm"),
            node("[scale]", OpKind.mul, "q"),
            node("[softmax]", OpKind.softmax, "[scale]"),
            node("head", OpKind.conv, "[softmax]"),
        ),
        (("0", "head"),),
    )


def int16(*templates, graph=None):
    setter = TemplateQconfigSetter(get_qconfig(), (HighPrecisionOutput(), *templates))
    return set(resolve(graph or warp(), setter, "nash-m").names(QDtype.qint16))


def test_from_the_grid_back_to_the_first_gemm_through_concat_int16():
    assert int16(GEMM_TO_GRID_INT16) == {"project", "[sub]", "[mul]", "[cat]", "points"}  # before: past the GEMM


def test_from_layer_norm_and_softmax_back_to_the_first_gemm_int16():
    assert int16(GEMM_TO_SOFTMAX_INT16) == {"q", "[scale]"}
    assert {"[grid_sample]", "backbone"} <= int16(GEMM_TO_LAYER_NORM_INT16)
    assert "feature" not in int16(GEMM_TO_LAYER_NORM_INT16)


def test_the_first_template_wins_and_the_default_qconfig_gives_the_rest():
    default = get_qconfig("mse", out_dtype="qint16", fix_scale=True)
    qconfig = resolve(warp(), TemplateQconfigSetter(default, (HighPrecisionOutput(), GemmInt8())), "nash-m")
    assert qconfig.ops["head"].output is None
    assert qconfig.ops["head"].rule == "high-precision output"
    assert qconfig.ops["q"].output == "qint8"
    assert qconfig.ops["q"].rule == "template GEMM int8"
    assert qconfig.ops["norm"].output == "qint16"
    assert all((op.observer, op.frozen) == ("mse", True) for op in qconfig.ops.values())
    assert qconfig.ops["norm"].weight is None


def test_the_names_of_the_settings_are_the_templates():
    assert set(RULES) == set(TEMPLATES)
    with pytest.raises(ConfigError, match="qconfig.rules is one of gemm_int8, .*, but got 'grid'"):
        QConfigSettings(rules=["grid"])


def trial(settings, rows=(), scores=None):
    names = [n.name for n in warp().quantized if n.name != "head"]
    return resolve(warp(), trial_setters(settings, names, scores or {}, rows), "nash-m")


def test_a_trial_asks_names_then_the_share_then_templates_then_the_rest():
    settings = QConfigSettings(int16_ratio=0.01, modules={"q": "qint8@0..6"}, rules=["gemm_to_softmax_int16"])
    ops = trial(settings, scores={"before": 1.0}).ops
    assert {n: op.rule for n, op in ops.items() if op.output == "qint16"} == {
        "before": "sensitive 0.01: rank 1 of 13",
        "[scale]": "template GEMM to softmax int16",
    }
    assert ops["q"].known_range == (0, 6)
    assert ops["head"].output is None
    assert trial(QConfigSettings(int16_ratio=1.0)).share(QDtype.qint16) == 1.0


def test_weights_are_promoted_by_table_rows_high_precision_outputs_included():
    rows = [TableRow("head", "weight", "qint8"), TableRow("q", "activation", "qint8"), TableRow("q", "weight", "qint8")]
    both = trial(QConfigSettings(int16_ratio=1.0, sensitive_type="both"), rows).ops
    assert (both["head"].output, both["head"].weight) == (None, "qint16")
    assert (both["q"].output, both["q"].weight) == ("qint16", "qint16")
    weights = trial(QConfigSettings(int16_ratio=0.5, sensitive_type="weight"), rows).ops
    assert [n for n, op in weights.items() if op.weight == "qint16"] == ["head"]
    assert weights["head"].rule == "high-precision output; sensitive 0.5: rank 1 of 2, weight"
    with pytest.raises(ConfigError, match="sensitive_type weight with counting operators needs a sensitivity table"):
        trial(QConfigSettings(int16_ratio=0.5, sensitive_type="weight"))
