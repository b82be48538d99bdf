"""QConfigs of the plugin for the operators of a requested qconfig (reference of the plugin: get_qconfig, QConfig)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.qconfig import OpQConfig, QConfig
from qflow.core.settings import CalibrationSettings
from qflow.plugin.public import Public


def plugin_dtype(public: Public, dtype: QDtype) -> Any:
    """Return the plugin's dtype: its own for integers, torch's for floats."""
    return public[dtype.value] if dtype.is_integer else getattr(torch, dtype.value)


def plugin_qconfig(public: Public, op: OpQConfig, calibration: CalibrationSettings) -> Any:
    """Return the plugin's QConfig of one operator."""
    if QDtype.float16 in (op.output, op.weight):
        half = torch.float16
        return public.call("get_qconfig", in_dtype=half, weight_dtype=half, out_dtype=half)
    weight = plugin_dtype(public, op.weight or QDtype.qint8)
    plain = public.call("get_qconfig", in_dtype=None, weight_dtype=weight, out_dtype=public["qint8"])
    inputs = [None if d is None else quantizer(public, d, "minmax", calibration) for d in op.input or ()]
    activation = None
    if op.output is not None and (scale := op.pinned_scale()) is not None:
        dtype = plugin_dtype(public, op.output)
        activation = public.call(
            "FakeQuantize.with_args", observer=public["FixedScaleObserver"], scale=scale, dtype=dtype
        )
    elif op.output is not None:
        # as with qflow's engine, a template's observer concerns int8 only: int16 suffers more from clipping
        method = op.observer or calibration.method
        if op.output == QDtype.qint16 and not op.own_observer:
            method = "minmax"
        activation = quantizer(public, op.output, method, calibration)
    return public.call("QConfig", activation=activation, weight=plain.weight, input=inputs if any(inputs) else None)


def quantizer(public: Public, dtype: QDtype, method: str, calibration: CalibrationSettings) -> Any:
    """Return the factory of a quantizer that is calibrated by `method`; of a cast for a float dtype."""
    own = plugin_dtype(public, dtype)
    if not dtype.is_integer:
        return public.call("get_qconfig", in_dtype=own, weight_dtype=None, out_dtype=None).input
    name, arguments = _observer(method, calibration)
    if calibration.averaging_constant is not None:
        arguments["averaging_constant"] = calibration.averaging_constant
    return public.call("FakeQuantize.with_args", observer=public[name], dtype=own, **arguments)


def _observer(method: str, calibration: CalibrationSettings) -> tuple[str, dict[str, Any]]:
    """Return the plugin's observer of a calibration method, with its own arguments."""
    of: Mapping[str, tuple[str, dict[str, Any]]] = {
        "minmax": ("MinMaxObserver", {}),
        "mse": ("MSEObserver", {}),
        "percentile": ("PercentileObserver", {"percentile": calibration.percentile}),
        "kl": ("KLObserver", {"update_interval": calibration.steps}),
        "mix": ("MixObserver", {}),
        "clip": ("ClipObserver", {"xmin": calibration.clip_min, "xmax": calibration.clip_max}),
        "clip_std": ("ClipStdObserver", {"std_scale": calibration.std_scale}),
    }
    return of[method]


def require_expressible(requested: QConfig) -> None:
    """Raise ConfigError for what no QConfig of the plugin says."""
    for name, op in requested.ops.items():
        if op.weight_axis is not None:
            raise ConfigError(
                f"The plugin scales a weight for each output channel, but got weight_axis={op.weight_axis} for {name}. "
                "Leave it out, or use engine=qflow."
            )
