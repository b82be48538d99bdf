"""What a user of the plugin writes works here under the same names: reference, sections 2.2 to 2.8."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.graphs import chain

from qflow.api import plugin_names as plugin
from qflow.api.plugin_names import ModuleNameQconfigSetter, get_qconfig
from qflow.core.device import apply_rules
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import OpKind
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, TemplateSetter

GRAPH = chain(OpKind.input, OpKind.conv, OpKind.lut, OpKind.conv, OpKind.layer_norm, OpKind.conv)
NAMES = [n.name for n in GRAPH.nodes]


@dataclass(frozen=True)
class Row:
    op_name: str
    sensitive_type: str
    quant_dtype: str


@dataclass(frozen=True)
class Table:
    rows: tuple


def table(*cells):
    return Table(tuple(Row(*cell) for cell in cells))


FLAT = [["op2", "activation", "SiLU", 0.9, "qint8"], ["op1", "weight", "Conv2d", 0.5, "qint8"]]
FLAT += [["op4", "activation", "LayerNorm", 0.4, "qint16"], ["op3", "activation", "Conv2d", 0.1, "qint8"]]


def test_get_qconfig_takes_torch_dtypes_names_and_observer_classes():
    class MSEObserver:
        pass

    class TorchDtype:
        def __str__(self):
            return "torch.float16"

    made = get_qconfig(MSEObserver, TorchDtype(), TorchDtype(), TorchDtype())
    assert (made.observer, made.input, made.weight, made.output) == ("mse", ("float16",), "float16", "float16")
    assert get_qconfig() == get_qconfig("MinMaxObserver", None, "qint8", QDtype.qint8, fix_scale=False)
    assert get_qconfig(fix_scale=True).frozen
    assert get_qconfig(out_dtype=None).output is None
    assert get_qconfig("HistogramObserver").observer is None  # the method is the trial's
    assert get_qconfig("mse", out_dtype="qint16").observer == "mse"  # no error: int16 takes minmax with a margin anyway
    with pytest.raises(ConfigError, match="kl is for qint8, but got qint16"):
        get_qconfig("kl", out_dtype="qint16")
    with pytest.raises(ConfigError, match="out_dtype is one of qint8, .*, but got 'qint4'"):
        get_qconfig(out_dtype="qint4")


def test_fix_scale_is_the_plugins_switch_or_a_scale():
    assert (get_qconfig(fix_scale=True).frozen, get_qconfig(fix_scale=True).fixed_scale) == (True, None)
    made = get_qconfig(fix_scale=8.0 / 128)
    assert (made.frozen, made.fixed_scale) == (False, 0.0625)
    assert get_qconfig(out_dtype="qint16", fix_scale=3.05e-05).pinned_scale() == 3.05e-05
    for odd in (1, 0, -0.5, 0.0, math.nan, math.inf, "0.5", None):
        with pytest.raises(ConfigError, match=r"fix_scale is True .*, but got .*Write fix_scale=True"):
            get_qconfig(fix_scale=odd)
    with pytest.raises(ConfigError, match="fixed_scale is for an integer output"):
        get_qconfig(out_dtype=None, fix_scale=0.5)


SETTERS = {  # name -> output of op2 (a look-up), output of op3 (a conv), observer, frozen
    "default_calibration_qconfig_setter": ("qint8", "qint8", "mse", False),
    "default_qat_qconfig_setter": ("qint8", "qint8", "minmax", False),
    "default_qat_fixed_act_qconfig_setter": ("qint8", "qint8", "minmax", True),
    "calibration_8bit_weight_16bit_act_qconfig_setter": ("qint16", "qint16", "mse", False),
    "qat_8bit_weight_16bit_act_qconfig_setter": ("qint16", "qint16", "minmax", False),
    "qat_8bit_weight_16bit_fixed_act_qconfig_setter": ("qint16", "qint16", "minmax", True),
    "gemm_int8_calibration_qconfig_setter": ("qint16", "qint8", "mse", False),
    "gemm_int8_qat_qconfig_setter": ("qint16", "qint8", "minmax", False),
}


@pytest.mark.parametrize("name", SETTERS)
def test_each_setter_has_the_plugins_effect(name):
    qconfig = resolve(GRAPH, getattr(plugin, name), "nash-m")
    lut, conv, observer, frozen = SETTERS[name]
    assert (qconfig.ops["op2"].output, qconfig.ops["op3"].output) == (lut, conv)
    assert {op.observer for op in qconfig.ops.values()} == {observer}
    assert {op.frozen for op in qconfig.ops.values()} == {frozen}
    assert qconfig.ops["op5"].output is None
    assert {op.weight for op in qconfig.ops.values()} == {None, QDtype.qint8}


def test_all_fp16_is_refused_where_gemms_have_no_float_path(nash_m):
    qconfig = resolve(GRAPH, plugin.all_fp16_qconfig_setter, "nash-m")
    assert {op.output for op in qconfig.ops.values()} == {QDtype.float16}
    with pytest.raises(ConfigError, match=r"fp16 output for op0 \(input\)"):
        apply_rules(GRAPH, qconfig, nash_m)


def test_the_guides_mixed_tuple_works_and_mixes_with_our_own_setters(nash_m):
    fp16 = get_qconfig(in_dtype="float16", weight_dtype="float16", out_dtype="float16")
    setters = (
        ModuleNameQconfigSetter({"op4": fp16}),
        plugin.sensitive_op_8bit_weight_16bit_act_calibration_setter(FLAT, ratio=0.25),
        HighPrecisionOutput(),
        plugin.default_calibration_qconfig_setter,
    )
    qconfig = apply_rules(GRAPH, resolve(GRAPH, setters, "nash-m"), nash_m)
    assert [str(qconfig.ops[n].output) for n in NAMES] == ["qint8", "qint8", "qint16", "qint8", "float16", "None"]
    assert qconfig.ops["op2"].rule == "sensitive 0.25: rank 1 of 4 rows"
    assert qconfig.ops["op5"].input == ("qint16",)  # cast: a conv cannot read fp16
    own = resolve(GRAPH, [*setters[:2], TemplateSetter(QDtype.qint8)], "nash-m")
    assert own.ops["op4"].output == "float16"


def promoted(made):
    return [row.op_name for row in made.chosen]


def test_rows_are_counted_before_they_are_filtered():
    setter = plugin.sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter
    assert promoted(setter(FLAT, topk=3)) == ["op2"]  # a weight row and an int16 row use up the quota
    assert promoted(setter(FLAT, ratio=1.0)) == ["op2", "op3"]
    assert promoted(setter(FLAT, topk=3, counting="operators")) == ["op2", "op3"]
    assert promoted(setter(list(reversed(FLAT)), topk=1)) == ["op3"]  # no re-sorting
    assert promoted(setter([row[:4] for row in FLAT], topk=3)) == ["op2", "op4"]  # no dtype column: type only
    assert promoted(setter([[*row, "12(3%)"] for row in FLAT], topk=3)) == ["op2"]
    assert promoted(setter(table(*[(r[0], r[1], r[4]) for r in FLAT]), topk=3)) == ["op2"]
    assert promoted(setter([["const[pos]", "activation", "", 9, "qint8"], *FLAT], topk=1)) == ["op2"]


@given(
    st.lists(st.tuples(st.sampled_from(["activation", "weight"]), st.sampled_from(["qint8", "qint16"]))),
    st.floats(0, 1),
)
def test_both_countings_against_their_rule_in_words(cells, ratio):
    rows = [[f"op{i}", kind, "T", 0.0, dtype] for i, (kind, dtype) in enumerate(cells)]
    fits = [row for row in rows if row[1] == "activation" and row[4] == "qint8"]
    make = plugin.sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter
    first = rows[: math.ceil(len(rows) * ratio)]
    assert promoted(make(rows, ratio=ratio)) == [row[0] for row in first if row in fits]
    ours = promoted(make(rows, ratio=ratio, counting="operators"))
    assert ours == [row[0] for row in fits][: len(ours)]
    assert ratio * len(fits) - 1e-6 <= len(ours) < ratio * len(fits) + 1


def test_the_general_factory_promotes_weights_with_the_users_qconfig():
    qconfig = get_qconfig("mse", weight_dtype="qint16")
    setter = plugin.get_sensitive_op_qconfig_setter("weight", "qint8", qconfig, FLAT, ratio=1.0)
    op = resolve(GRAPH, [setter, plugin.default_qat_qconfig_setter], "nash-m").ops["op1"]
    assert (op.weight, op.output, op.observer) == ("qint16", "qint8", "mse")
    both = plugin.get_sensitive_op_qconfig_setter("both", "qint8", qconfig, FLAT, ratio=1.0)
    assert promoted(both) == ["op2", "op1", "op3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "takes topk or ratio, but got topk None and ratio None"),
        ({"topk": 1, "ratio": 0.5}, "topk 1 and ratio 0.5"),
        ({"ratio": 1.5}, "between 0 and 1, but got 1.5"),
        ({"topk": 0}, "topk is at least 1, but got 0"),
        ({"ratio": 0.5, "counting": "names"}, "counting is one of operators, rows, but got 'names'"),
    ],
)
def test_a_wrong_amount_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        plugin.sensitive_op_qat_8bit_weight_16bit_fixed_act_qconfig_setter(FLAT, **arguments)


def test_wrong_tables_are_refused():
    with pytest.raises(ConfigError, match="4 to 6 columns, but got 3 in row 0"):
        plugin.sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter([FLAT[0][:3]], topk=1)
    with pytest.raises(ConfigError, match="activation or weight, but got 'SiLU' in row 0"):
        plugin.sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter([["op2", "SiLU", "activation", 1]], topk=1)
    other = plugin.sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter([["gone", "activation", "", 1]], topk=1)
    with pytest.raises(ConfigError, match="names operators of this model, but got gone"):
        resolve(GRAPH, [other, plugin.default_qat_qconfig_setter], "nash-m")


def test_a_name_inside_a_composite_operator_means_the_whole_of_it():
    setter = ModuleNameQconfigSetter({"op4.var_mean.pre_mean": get_qconfig(out_dtype="qint16")})
    qconfig = resolve(GRAPH, (setter, plugin.default_calibration_qconfig_setter), "nash-m")
    assert qconfig.names(QDtype.qint16) == ("op4",)
    with pytest.raises(ConfigError, match="but got gone.mul"):
        resolve(GRAPH, (ModuleNameQconfigSetter({"gone.mul": get_qconfig()}), TemplateSetter(QDtype.qint8)), "nash-m")


def test_a_ranking_exists_as_soon_as_a_name_setter_is_in_the_tuple():
    default = plugin.default_calibration_qconfig_setter
    names = ModuleNameQconfigSetter({"op3": get_qconfig(), "op1": get_qconfig()})
    sensitive = plugin.sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter(FLAT, ratio=1.0)
    assert plugin.plugin_ranking((default,), GRAPH) is None
    assert plugin.plugin_ranking(default, GRAPH) is None
    assert plugin.plugin_ranking((names, sensitive, default), GRAPH) == ["op3", "op1", "op2"]


def test_templates_under_their_own_names():
    templates = [
        plugin.HighPrecisionOutputTemplate(),
        plugin.GEMMInt8Template(),
        plugin.GEMMToLayerNormInt16Template(),
        plugin.GEMMToSoftmaxInt16Template(),
        plugin.GEMMToGridSampleGridInt16Template(),
        plugin.ConstTensorQuantTemplate(),
        plugin.DefaultTemplate(),
    ]
    qconfig = resolve(GRAPH, plugin.TemplateQconfigSetter(get_qconfig(out_dtype="qint16"), templates), "nash-m")
    assert [str(qconfig.ops[n].output) for n in NAMES] == ["qint16", "qint8", "qint16", "qint8", "qint16", "None"]
    for template, dtype in ((plugin.AllInt8Template(), "qint8"), (plugin.AllInt16Template(), "qint16")):
        made = resolve(GRAPH, plugin.TemplateQconfigSetter(get_qconfig("mse"), [template]), "nash-m")
        assert {op.output for op in made.ops.values()} == {dtype}
