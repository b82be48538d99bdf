"""The plugin's setters, templates and qconfigs under its own names (3.0.x; reference, sections 2.2 to 2.7).

The names are thin aliases of qflow's setters: a tuple of setters that was written for the plugin works in `resolve`,
also together with qflow's own. Calibration setters set the observer mse, QAT setters minmax, and those with fixed_act
keep the scale (`frozen`). These differences from the plugin are on purpose:

    constants    follow the operator that reads them under every setter (in the plugin only with its const template)
    names        that match no operator are refused; trailing parts are cut first, as in the plugin
    int16        is calibrated with minmax times a margin under any observer, because int16 suffers more from clipping
                 than from rounding
    all fp16     is refused by apply_rules on a march whose GEMMs have no float path (nash-e, nash-m)

Sensitivity setters count table rows as the plugin does; counting="operators" selects qflow's count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qflow.api.plugin_qconfigs import (
    default_calib_8bit_fake_quant_qconfig,
    default_calib_8bit_weight_16bit_act_fake_quant_qconfig,
    default_calib_8bit_weight_32bit_out_fake_quant_qconfig,
    default_qat_8bit_fake_quant_qconfig,
    default_qat_8bit_fixed_act_fake_quant_qconfig,
    default_qat_8bit_weight_16bit_act_fake_quant_qconfig,
    default_qat_8bit_weight_16bit_fixed_act_fake_quant_qconfig,
    default_qat_8bit_weight_32bit_out_fake_quant_qconfig,
    float16,
    get_qconfig,
    qint8,
    qint16,
)
from qflow.core.dtype import QDtype
from qflow.core.graph import ModelGraph, OpNode
from qflow.core.qconfig import OpQConfig
from qflow.core.setter import HighPrecisionOutput, ModuleNameSetter, Setter, TemplateSetter, covers, holds, stands_for
from qflow.core.table_setter import TableSetter, table_rows
from qflow.core.template import (
    GEMM_TO_GRID_INT16,
    GEMM_TO_LAYER_NORM_INT16,
    GEMM_TO_SOFTMAX_INT16,
    GemmInt8,
    TemplateQconfigSetter,
    UpToGemm,
)

__all__ = [
    "AllInt8Template",
    "AllInt16Template",
    "ConstTensorQuantTemplate",
    "DefaultTemplate",
    "GEMMInt8Template",
    "GEMMToGridSampleGridInt16Template",
    "GEMMToLayerNormInt16Template",
    "GEMMToSoftmaxInt16Template",
    "HighPrecisionOutputTemplate",
    "ModuleNameQconfigSetter",
    "TemplateQconfigSetter",
    "all_fp16_qconfig_setter",
    "calibration_8bit_weight_16bit_act_qconfig_setter",
    "default_calib_8bit_fake_quant_qconfig",
    "default_calib_8bit_weight_16bit_act_fake_quant_qconfig",
    "default_calib_8bit_weight_32bit_out_fake_quant_qconfig",
    "default_calibration_qconfig_setter",
    "default_qat_8bit_fake_quant_qconfig",
    "default_qat_8bit_fixed_act_fake_quant_qconfig",
    "default_qat_8bit_weight_16bit_act_fake_quant_qconfig",
    "default_qat_8bit_weight_16bit_fixed_act_fake_quant_qconfig",
    "default_qat_8bit_weight_32bit_out_fake_quant_qconfig",
    "default_qat_fixed_act_qconfig_setter",
    "default_qat_qconfig_setter",
    "gemm_int8_calibration_qconfig_setter",
    "gemm_int8_qat_qconfig_setter",
    "get_qconfig",
    "get_sensitive_op_qconfig_setter",
    "plugin_ranking",
    "qat_8bit_weight_16bit_act_qconfig_setter",
    "qat_8bit_weight_16bit_fixed_act_qconfig_setter",
    "qint8",
    "qint16",
    "sensitive_op_8bit_weight_16bit_act_calibration_setter",
    "sensitive_op_8bit_weight_16bit_act_qat_setter",
    "sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter",
    "sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter",
    "sensitive_op_qat_8bit_weight_16bit_fixed_act_qconfig_setter",
]


# 2.5: templates
@dataclass(frozen=True)
class DefaultTemplate:
    """Returns None, because TemplateQconfigSetter returns its default qconfig last anyway."""

    def __call__(self, node: OpNode, graph: ModelGraph) -> OpQConfig | None:
        return None


class ConstTensorQuantTemplate(DefaultTemplate):
    """Returns None, because `resolve` gives every constant the dtype of the operator that reads it."""


def AllInt8Template() -> TemplateSetter:
    """Set every output to int8."""
    return TemplateSetter(qint8)


def AllInt16Template() -> TemplateSetter:
    """Set every output to int16."""
    return TemplateSetter(qint16)


def GEMMToLayerNormInt16Template() -> UpToGemm:
    """Set all operators upstream of every layer norm, up to the first GEMM, to int16."""
    return GEMM_TO_LAYER_NORM_INT16


def GEMMToSoftmaxInt16Template() -> UpToGemm:
    """Set all operators upstream of every softmax, up to the first GEMM, to int16."""
    return GEMM_TO_SOFTMAX_INT16


def GEMMToGridSampleGridInt16Template() -> UpToGemm:
    """Set all operators upstream of the grid of every grid_sample, up to the first GEMM, to int16."""
    return GEMM_TO_GRID_INT16


HighPrecisionOutputTemplate = HighPrecisionOutput
GEMMInt8Template = GemmInt8


# 2.4: setters
def _default(qconfig: OpQConfig) -> TemplateQconfigSetter:
    return TemplateQconfigSetter(qconfig, (HighPrecisionOutput(), GEMM_TO_GRID_INT16, ConstTensorQuantTemplate()))


def _all_int16(qconfig: OpQConfig) -> TemplateQconfigSetter:
    return TemplateQconfigSetter(qconfig, (HighPrecisionOutput(), ConstTensorQuantTemplate()))


def _gemm_int8(qconfig: OpQConfig) -> TemplateQconfigSetter:
    return TemplateQconfigSetter(qconfig, (HighPrecisionOutput(), GemmInt8()))


default_calibration_qconfig_setter = _default(default_calib_8bit_fake_quant_qconfig)
default_qat_qconfig_setter = _default(default_qat_8bit_fake_quant_qconfig)
default_qat_fixed_act_qconfig_setter = _default(default_qat_8bit_fixed_act_fake_quant_qconfig)
calibration_8bit_weight_16bit_act_qconfig_setter = _all_int16(default_calib_8bit_weight_16bit_act_fake_quant_qconfig)
qat_8bit_weight_16bit_act_qconfig_setter = _all_int16(default_qat_8bit_weight_16bit_act_fake_quant_qconfig)
qat_8bit_weight_16bit_fixed_act_qconfig_setter = _all_int16(default_qat_8bit_weight_16bit_fixed_act_fake_quant_qconfig)
gemm_int8_calibration_qconfig_setter = _gemm_int8(default_calib_8bit_weight_16bit_act_fake_quant_qconfig)
gemm_int8_qat_qconfig_setter = _gemm_int8(default_qat_8bit_weight_16bit_act_fake_quant_qconfig)
all_fp16_qconfig_setter = TemplateQconfigSetter(get_qconfig(None, float16, float16, float16))


class ModuleNameQconfigSetter(ModuleNameSetter):
    """Maps operator or module names to get_qconfig(...), or to any form that ModuleNameSetter takes.

    A name inside a composite operator (`norm3.var_mean.pre_mean`) means the whole operator: trailing parts are cut
    until the name matches an operator. A name that matches none is refused.
    """

    def __init__(self, module_name_to_qconfig: Mapping[str, str | Mapping[str, Any] | OpQConfig]) -> None:
        super().__init__(module_name_to_qconfig)

    def __call__(self, node: OpNode, graph: ModelGraph) -> Any:
        return self._cut(graph).__call__(node, graph)

    def check(self, graph: ModelGraph) -> None:
        """Raise ConfigError for a name that matches no operator, whatever is cut off."""
        self._cut(graph).check(graph)

    def _cut(self, graph: ModelGraph) -> ModuleNameSetter:
        """Return the same settings under the operators' own names; the result for the last graph is cached."""
        graph_before, setter = self.__dict__.get("last", (None, self))
        if graph_before is graph:
            return setter  # type: ignore[no-any-return]
        names = [node.name for node in graph.quantized]
        found: dict[str, str | Mapping[str, Any] | OpQConfig] = {}
        for name, value in self.dtypes.items():
            found.setdefault(_shortened(name, names), value)
        setter = ModuleNameSetter(found)
        self.__dict__["last"] = graph, setter
        return setter


def _shortened(name: str, operators: Sequence[str]) -> str:
    """Return `name` with trailing parts cut until it is an operator, or unchanged if that never happens."""
    if any(covers(name, op) or holds(name, op) for op in operators):
        return name
    part = name
    while "." in part:
        part = part.rpartition(".")[0]
        if part in operators:
            return part
    return name


def get_sensitive_op_qconfig_setter(
    sensitive_type: str,
    origin_dtype: object,
    default_qconfig: OpQConfig,
    sensitive_table: Any,
    topk: int | None = None,
    ratio: float | None = None,
    counting: str = "rows",
) -> TableSetter:
    """Set `default_qconfig` for the top rows of `sensitive_type` and `origin_dtype` in a sensitivity table.

    `sensitive_type` is activation, weight or both. Give exactly one of `topk` and `ratio`. Raises ConfigError.
    """
    return TableSetter(
        table_rows(sensitive_table),
        topk=topk,
        ratio=ratio,
        sensitive_type=sensitive_type,
        counting=counting,
        origin=QDtype.parse(origin_dtype, "origin_dtype"),
        qconfig=default_qconfig,
    )


def sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter(
    table: Any, topk: int | None = None, ratio: float | None = None, counting: str = "rows"
) -> TableSetter:
    """Set the operators of the top activation rows to int16, for calibration."""
    qconfig = default_calib_8bit_weight_16bit_act_fake_quant_qconfig
    return get_sensitive_op_qconfig_setter("activation", qint8, qconfig, table, topk, ratio, counting)


def sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter(
    table: Any, topk: int | None = None, ratio: float | None = None, counting: str = "rows"
) -> TableSetter:
    """Set the operators of the top activation rows to int16, for QAT."""
    qconfig = default_qat_8bit_weight_16bit_act_fake_quant_qconfig
    return get_sensitive_op_qconfig_setter("activation", qint8, qconfig, table, topk, ratio, counting)


def sensitive_op_qat_8bit_weight_16bit_fixed_act_qconfig_setter(
    table: Any, topk: int | None = None, ratio: float | None = None, counting: str = "rows"
) -> TableSetter:
    """Set the operators of the top activation rows to int16, for QAT with the calibrated activation scales."""
    qconfig = default_qat_8bit_weight_16bit_fixed_act_fake_quant_qconfig
    return get_sensitive_op_qconfig_setter("activation", qint8, qconfig, table, topk, ratio, counting)


# These names are those of the last example in the plugin's manual.
sensitive_op_8bit_weight_16bit_act_calibration_setter = sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter
sensitive_op_8bit_weight_16bit_act_qat_setter = sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter


def plugin_ranking(setters: Setter | Sequence[Setter], graph: ModelGraph) -> list[str] | None:
    """Return the order by which the plugin's canonicaliser ranks the inputs of a matmul (2.8), for `apply_rules`.

    It holds the operators in the order of the keys of all name setters, sensitivity setters included. It is None if
    `setters` has no such setter; then the producer that comes first keeps int16.
    """
    rules = setters if isinstance(setters, Sequence) else (setters,)
    keys: list[str] = []
    for setter in rules:
        if isinstance(setter, ModuleNameSetter):
            keys += setter.dtypes
        elif isinstance(setter, TableSetter):
            keys += [row.op_name for row in setter.chosen]
    if not any(isinstance(setter, (ModuleNameSetter, TableSetter)) for setter in rules):
        return None
    names = [node.name for node in graph.quantized]
    short = dict.fromkeys(_shortened(key, names) for key in keys)
    return list(dict.fromkeys(op for key in short for op in names if stands_for(key, op, graph)))
