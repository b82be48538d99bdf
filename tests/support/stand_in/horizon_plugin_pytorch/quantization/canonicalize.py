"""The changes of qconfigs after all setters: int16 that the device does not take becomes int8."""

import logging

from torch import nn

from horizon_plugin_pytorch import MissingFact
from horizon_plugin_pytorch.dtype import qint8, qint16
from horizon_plugin_pytorch.march import March, get_march
from horizon_plugin_pytorch.nn.quantized import FloatFunctional
from horizon_plugin_pytorch.quantization.qat_modules import GEMMS, PASSING, POOLS
from horizon_plugin_pytorch.quantization.qconfig import QConfig, dtype_of, replace_qconfig_dtype
from horizon_plugin_pytorch.quantization.qconfig_template import ModuleNameQconfigSetter

_log = logging.getLogger(__name__)
RESIZES = (nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d)
INPUT_INT8 = (*RESIZES, *POOLS, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
OUTPUT_INT8 = (*RESIZES, *POOLS)
ONE_INT16 = (March.NASH_E, March.NASH_M, March.NASH_P)


def canonicalize(nodes, setters):
    """Lower and tidy the qconfigs of `nodes`, in the order of their calls."""
    ranks = _ranks(setters)
    for node in nodes:
        if type(node.module) in OUTPUT_INT8:
            _lower(node)
        if type(node.module) in INPUT_INT8:
            _lower(_owner(node.inputs[0]))
        if node.is_a(*GEMMS) and node.module.fused_add is not None:
            for producer in node.inputs:
                _lower(_owner(producer))
        if node.is_a(FloatFunctional) and node.method == "matmul":
            _one_int16(node, ranks, nodes)
    for node in nodes:
        _drop_equal_inputs(node)


def _ranks(setters):
    names = [n for s in setters if isinstance(s, ModuleNameQconfigSetter) for n in s.module_name_to_qconfig]
    return {name: rank for rank, name in reversed(list(enumerate(names)))} if names else None


def _owner(node):
    """The module whose qconfig the output of `node` follows; what passes values on is looked through."""
    while node is not None and (node.module is None or isinstance(node.module, (*PASSING, *POOLS))):
        node = node.inputs[0] if node.inputs else None
    return node


def _is_int16(node):
    return node is not None and dtype_of(node.module.qconfig.activation) == qint16


def _lower(node):
    if _is_int16(node):
        _log.info("%s falls back to qint8", node.name)
        node.module.qconfig = replace_qconfig_dtype(node.module.qconfig, qint8)


def _one_int16(node, ranks, nodes):
    pair = [_owner(producer) for producer in node.inputs]
    if get_march() not in ONE_INT16:
        for producer in pair:
            _lower(producer)
        return
    if not all(map(_is_int16, pair)):
        return
    first, second = sorted(pair, key=nodes.index)
    if ranks is None:
        _lower(second)
    elif first.name not in ranks:
        _lower(first)
    elif second.name not in ranks:
        _lower(second)
    else:
        _lower(max(pair, key=lambda n: ranks[n.name]))


def _drop_equal_inputs(node):
    own = getattr(node.module, "qconfig", None)
    if own is None or own.input is None:
        return
    if not isinstance(own.input, list):
        if len(node.inputs) > 1:
            raise MissingFact("one input qconfig for a module with several inputs")
        own = QConfig(own.activation, own.weight, [own.input])
    kept = []
    for factory, producer in zip(own.input, node.inputs, strict=False):
        source = _owner(producer)
        given = dtype_of(source.module.qconfig.activation) if source is not None else None
        kept.append(None if given is not None and given == dtype_of(factory) else factory)
    node.module.qconfig = QConfig(own.activation, own.weight, kept if any(kept) else None)
