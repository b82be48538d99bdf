"""QConfig: factories for the quantizers of a module. "activation" is its output."""

from collections import namedtuple
from functools import partial

import torch

from horizon_plugin_pytorch.dtype import qint8, qint16
from horizon_plugin_pytorch.quantization.fake_quantize import FakeCast, FakeQuantize
from horizon_plugin_pytorch.quantization.observer_v2 import MinMaxObserver, MSEObserver

_QConfig = namedtuple("_QConfig", "activation weight input")


class QConfig(_QConfig):
    def __new__(cls, activation=None, weight=None, input=None, output=None):
        if activation is not None and output is not None:
            raise ValueError("give only one of activation and output")
        return super().__new__(cls, output if activation is None else activation, weight, input)


def get_qconfig(observer=MinMaxObserver, in_dtype=None, weight_dtype=qint8, out_dtype=qint8, fix_scale=False):
    if observer not in (MinMaxObserver, MSEObserver):
        raise ValueError(f"an observer is MinMaxObserver or MSEObserver, got {observer}")
    frozen = {"averaging_constant": 0} if fix_scale else {}

    def factory(dtype, observer, **more):
        if dtype is None:
            return None
        if dtype in (torch.float16, torch.float32):
            return partial(FakeCast, dtype=dtype)
        return FakeQuantize.with_args(observer=observer, dtype=dtype, **more)

    inputs = [factory(d, observer, **frozen) for d in (in_dtype if isinstance(in_dtype, list) else [in_dtype])]
    return QConfig(
        activation=factory(out_dtype, observer, **frozen),
        weight=factory(weight_dtype, MinMaxObserver, ch_axis=0),
        input=inputs if isinstance(in_dtype, list) else inputs[0],
    )


def dtype_of(factory):
    """The dtype of what a factory makes; None for none."""
    return None if factory is None else factory.keywords["dtype"]


def replace_qconfig_dtype(qconfig, dtype):
    """The same qconfig with another output dtype."""
    changed = partial(qconfig.activation.func, **{**qconfig.activation.keywords, "dtype": dtype})
    return QConfig(activation=changed, weight=qconfig.weight, input=qconfig.input)


default_calib_8bit_fake_quant_qconfig = get_qconfig(MSEObserver)
default_qat_8bit_fake_quant_qconfig = get_qconfig()
default_qat_8bit_fixed_act_fake_quant_qconfig = get_qconfig(fix_scale=True)
default_calib_8bit_weight_16bit_act_fake_quant_qconfig = get_qconfig(MSEObserver, out_dtype=qint16)
default_qat_8bit_weight_16bit_act_fake_quant_qconfig = get_qconfig(out_dtype=qint16)
