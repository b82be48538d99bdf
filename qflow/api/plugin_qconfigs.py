"""The plugin's `get_qconfig` and its default qconfigs (reference, sections 2.2 and 2.3)."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.op_spec import check_op, parse_observer
from qflow.core.qconfig import OpQConfig


def get_qconfig(
    observer: object = "minmax",
    in_dtype: object = None,
    weight_dtype: object = "qint8",
    out_dtype: object = "qint8",
    fix_scale: bool | float = False,
) -> OpQConfig:
    """Return a qconfig as the plugin's get_qconfig (2.2) does. Dtypes are names or torch dtypes.

    A list as `in_dtype` goes by input position. `out_dtype=None` asks for a high-precision output. `fix_scale=True` is
    the plugin's switch: QAT keeps the calibrated scale; the model check says `kept in QAT`. A float, as in
    `fix_scale=0.0625`, is the output's scale itself, for calibration and QAT; the check says `Fixed scale 0.0625`.
    Weights are observed with minmax per output channel whatever `observer` is. Raises ConfigError.
    """
    inputs = in_dtype if isinstance(in_dtype, (list, tuple)) else [in_dtype]
    asked = tuple(None if d is None else QDtype.parse(d, "in_dtype") for d in inputs)
    made = OpQConfig(
        output=None if out_dtype is None else QDtype.parse(out_dtype, "out_dtype"),
        weight=None if weight_dtype is None else QDtype.parse(weight_dtype, "weight_dtype"),
        input=asked if any(asked) else None,
        observer=None if observer is None else parse_observer(observer, "observer"),
        **_fixed(fix_scale),
    )
    check_op({"output": made.output, "observer": made.observer, "fixed_scale": made.fixed_scale}, "get_qconfig")
    return made


def _fixed(fix_scale: Any) -> dict[str, Any]:
    """Return the field that `fix_scale` sets. An integer is refused: 1 may mean True or a scale."""
    if isinstance(fix_scale, bool):
        return {"frozen": fix_scale}
    number = isinstance(fix_scale, Real) and not isinstance(fix_scale, Integral)
    if not number or not 0.0 < fix_scale < math.inf:
        raise ConfigError(
            "fix_scale is True (QAT keeps the calibrated scale), False, or a scale above 0 as a float, but got "
            f"{fix_scale!r}. Write fix_scale=True, or fix_scale=0.0625."
        )
    return {"fixed_scale": float(fix_scale)}


qint8, qint16, float16 = QDtype.qint8, QDtype.qint16, QDtype.float16

default_calib_8bit_fake_quant_qconfig = get_qconfig("mse")
default_qat_8bit_fake_quant_qconfig = get_qconfig("minmax")
default_qat_8bit_fixed_act_fake_quant_qconfig = get_qconfig("minmax", fix_scale=True)
default_calib_8bit_weight_16bit_act_fake_quant_qconfig = get_qconfig("mse", out_dtype=qint16)
default_qat_8bit_weight_16bit_act_fake_quant_qconfig = get_qconfig("minmax", out_dtype=qint16)
default_qat_8bit_weight_16bit_fixed_act_fake_quant_qconfig = get_qconfig("minmax", out_dtype=qint16, fix_scale=True)
default_calib_8bit_weight_32bit_out_fake_quant_qconfig = get_qconfig("mse", out_dtype=None)
default_qat_8bit_weight_32bit_out_fake_quant_qconfig = get_qconfig("minmax", out_dtype=None)
