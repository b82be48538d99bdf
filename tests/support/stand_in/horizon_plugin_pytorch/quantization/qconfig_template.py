"""Setters and templates. A qconfig that a module has already stays: the first setter wins."""

import math
import warnings

from torch import nn

from horizon_plugin_pytorch.dtype import qint8
from horizon_plugin_pytorch.nn.quantized import FloatFunctional
from horizon_plugin_pytorch.quantization.qconfig import (
    QConfig,
    default_calib_8bit_fake_quant_qconfig,
    default_calib_8bit_weight_16bit_act_fake_quant_qconfig,
    default_qat_8bit_fake_quant_qconfig,
    default_qat_8bit_fixed_act_fake_quant_qconfig,
    default_qat_8bit_weight_16bit_act_fake_quant_qconfig,
    replace_qconfig_dtype,
)
from horizon_plugin_pytorch.quantization.stubs import DeQuantStub, QuantStub


def is_gemm(node):
    return node.is_a(nn.Conv2d, nn.Conv3d, nn.Linear) or (node.is_a(FloatFunctional) and node.method == "matmul")


def give(module, qconfig):
    """Set the qconfig of a module and of its children, where there is none."""
    if not hasattr(module, "qconfig"):
        module.qconfig = qconfig
    for child in module.children():
        give(child, qconfig)


class ModuleNameQconfigSetter:
    needs_example = False

    def __init__(self, module_name_to_qconfig):
        self.module_name_to_qconfig = dict(module_name_to_qconfig)

    def set_qconfig(self, model, nodes):
        modules = dict(model.named_modules())
        for name, qconfig in self.module_name_to_qconfig.items():
            part = name
            while part not in modules and "." in part:
                part = part.rpartition(".")[0]
            if part not in modules or (part != name and list(modules[part].children())):
                warnings.warn(f"{name} is no module and was skipped", stacklevel=2)
                continue
            give(modules[part], qconfig)


class DefaultTemplate:
    def set(self, default, model, nodes):
        for node in nodes:
            give(node.module, default)


class HighPrecisionOutputTemplate:
    def set(self, default, model, nodes):
        for stub in (node for node in nodes if node.is_a(DeQuantStub)):
            node = stub.inputs[0]
            while node is not None and node.is_a(nn.Identity) and len(node.users) == 1:
                node = node.inputs[0]
            if node is not None and is_gemm(node) and all(self._leaves(user) for user in node.users):
                give(node.module, QConfig(activation=None, weight=default.weight))

    def _leaves(self, user):
        return user.is_a(DeQuantStub) or (user.is_a(nn.Identity) and all(map(self._leaves, user.users)))


class GEMMInt8Template:
    def set(self, default, model, nodes):
        for node in filter(is_gemm, nodes):
            give(node.module, replace_qconfig_dtype(default, qint8))


class ConstTensorQuantTemplate:
    """The input at which a constant arrives gets the qconfig of the output."""

    def set(self, default, model, nodes):
        for node in nodes:
            if node.constants and not node.is_a(QuantStub):
                give(node.module, default)
                own = node.module.qconfig
                if own.input is not None:
                    warnings.warn(f"{node.name} has an input qconfig already", stacklevel=2)
                    continue
                inputs = [own.activation if i in node.constants else None for i in range(len(node.inputs))]
                node.module.qconfig = QConfig(activation=own.activation, weight=own.weight, input=inputs)


class TemplateQconfigSetter:
    needs_example = True

    def __init__(self, default_qconfig, templates):
        self.default_qconfig, self.templates = default_qconfig, [*templates, DefaultTemplate()]

    def set_qconfig(self, model, nodes):
        for template in self.templates:
            template.set(self.default_qconfig, model, nodes)


def get_sensitive_op_qconfig_setter(
    sensitive_type, origin_dtype, default_qconfig, sensitive_table, topk=None, ratio=None
):
    if (topk is None) == (ratio is None):
        raise ValueError("give one of topk and ratio")
    count = math.ceil(len(sensitive_table) * ratio) if topk is None else topk
    rows = [row for row in sensitive_table[:count] if row[1] == sensitive_type]
    column = {5: -1, 6: 4}
    kept = [row[0] for row in rows if len(row) == 4 or row[column[len(row)]] == origin_dtype]
    return ModuleNameQconfigSetter(dict.fromkeys(kept, default_qconfig))


def sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter(table, topk=None, ratio=None):
    qconfig = default_calib_8bit_weight_16bit_act_fake_quant_qconfig
    return get_sensitive_op_qconfig_setter("activation", qint8, qconfig, table, topk, ratio)


def sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter(table, topk=None, ratio=None):
    qconfig = default_qat_8bit_weight_16bit_act_fake_quant_qconfig
    return get_sensitive_op_qconfig_setter("activation", qint8, qconfig, table, topk, ratio)


def _default(qconfig):
    # The template for the grid of a grid_sample is left out: no model of the stand-in has one.
    return TemplateQconfigSetter(qconfig, [HighPrecisionOutputTemplate(), ConstTensorQuantTemplate()])


default_calibration_qconfig_setter = _default(default_calib_8bit_fake_quant_qconfig)
default_qat_qconfig_setter = _default(default_qat_8bit_fake_quant_qconfig)
default_qat_fixed_act_qconfig_setter = _default(default_qat_8bit_fixed_act_fake_quant_qconfig)
calibration_8bit_weight_16bit_act_qconfig_setter = _default(default_calib_8bit_weight_16bit_act_fake_quant_qconfig)
qat_8bit_weight_16bit_act_qconfig_setter = _default(default_qat_8bit_weight_16bit_act_fake_quant_qconfig)
