"""The state in which a calibrated model trains, and how it is restored afterwards.

activations  Scales move with the data (quant/values/fake_quant.py). Exceptions: scales that the qconfig fixes, knows or
             freezes, scales below a frozen module, and all of them if `moving` is false (the plugin's fixed_act) or if
             scales are learned (learned_scales.py): those at int8 are trained then, the others stay as calibrated.
weights      Scales follow the current weights, unless `moving_weights` is false.
batch norms  They are in one of three modes (quant/model/weighted.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError, ModelError
from qflow.core.qconfig import QConfig
from qflow.core.settings import CalibrationSettings, QatSettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.weighted import WeightedLeaf, set_norm_mode
from qflow.quant.values.fake_quant import FakeQuant


@contextmanager
def qat_state(
    prepared: QuantizedModel,
    settings: QatSettings,
    *,
    qconfig: QConfig | None = None,
    calibration: CalibrationSettings | None = None,
    quantized: bool = True,
) -> Iterator[QuantizedModel]:
    """The plugin's QAT state: quantizers on, scales moving as set, batch norms in their mode, model in train mode.

    On leaving, the model is in eval mode, weight scales are computed from the last weights, and everything else but
    weights, statistics and scales is restored. `qconfig` is by default that of `qflow.prepare` (`prepared.applied`);
    scales that it fixes or freezes do not move. Raises ModelError if the model is not calibrated with `qconfig`.
    """
    qconfig = qconfig if qconfig is not None else getattr(prepared, "applied", None)
    _check_same(prepared, qconfig)
    fixed = _fixed(prepared, settings, qconfig)
    frozen_modules = [
        m for n, m in prepared.model.named_modules() if any(under(n, prefix) for prefix in settings.freeze)
    ]
    frozen = [p for m in frozen_modules for p in m.parameters(recurse=False) if p.requires_grad]
    quantizers = _quantizers(prepared)
    before = {q: (q.margin, q.half_step, q.averaging_constant) for q in quantizers}
    mode = next((m.qflow_mode for m in prepared.model.modules() if isinstance(m, WeightedLeaf)), settings.mode)
    try:
        set_norm_mode(prepared.model, settings.mode)
        for quantizer, role in quantizers.items():
            _set_moving(quantizer, role, settings, calibration or CalibrationSettings(), quantizer in fixed)
        for parameter in frozen:
            parameter.requires_grad_(False)
        require_trainable(prepared.model, settings.freeze)
        with prepared.quantized() if quantized else nullcontext():
            train_mode(prepared, settings)
            yield prepared
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        set_norm_mode(prepared.model, mode)
        prepared.eval()
        _set_weight_scales(prepared)
        for quantizer, kept in before.items():
            quantizer.margin, quantizer.half_step, quantizer.averaging_constant = kept
            quantizer.follows = True
        prepared.know_weights()


def require_trainable(model: nn.Module, freeze: Sequence[str] = ()) -> None:
    """Raise ConfigError if no parameter of `model` is trained because each is frozen or below a prefix of `freeze`."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if all(any(under(name, prefix) for prefix in freeze) for name in trained):
        what = (
            f"qat.freeze=[{','.join(freeze)}], which covers them all" if freeze else "a model in which all are frozen"
        )
        way = "Leave one out." if freeze else "Set requires_grad on some."
        raise ConfigError(f"QAT trains parameters, but got {what}. {way}")


def _quantizers(prepared: QuantizedModel) -> dict[FakeQuant, str]:
    requants = [q for q in getattr(prepared, "requants", ()) if isinstance(q, FakeQuant)]
    outputs = dict.fromkeys([*prepared.outputs.values(), *requants], "output")
    return {**outputs, **dict.fromkeys(prepared.weights.values(), "weight")}


def free_outputs(prepared: QuantizedModel, settings: QatSettings, qconfig: QConfig | None = None) -> list[FakeQuant]:
    """Quantizers of integer activations whose scale may change: neither the qconfig nor a frozen module keeps it."""
    qconfig = qconfig if qconfig is not None else getattr(prepared, "applied", None)
    fixed, found = _fixed(prepared, settings, qconfig), _quantizers(prepared)
    return [q for q, role in found.items() if role == "output" and q.dtype and q.dtype.is_integer and q not in fixed]


def train_mode(prepared: QuantizedModel, settings: QatSettings) -> None:
    """Put the model into train mode, and the modules that `settings.freeze` names into eval mode."""
    prepared.train()
    for name, module in prepared.model.named_modules():
        if any(under(name, prefix) for prefix in settings.freeze):
            module.eval()


def _check_same(prepared: QuantizedModel, qconfig: QConfig | None) -> None:
    if qconfig is None:
        return
    for node in prepared.graph.quantized:
        assert node.quantizer is not None
        op = qconfig.ops.get(node.name)
        has = prepared.outputs[node.quantizer].dtype
        if op is None or (op.output != has and has != QDtype.float32):  # float32: calibration found no range
            wanted = op.output if op else "nothing"
            raise ModelError(
                f"QAT starts from a calibration with the same qconfig, but got {has} at {node.name} where the "
                f"qconfig says {wanted}. Calibrate with this qconfig first."
            )


def _fixed(prepared: QuantizedModel, settings: QatSettings, qconfig: QConfig | None) -> set[FakeQuant]:
    """Quantizers that keep their scale, because of the qconfig or because they are below a frozen module."""
    unknown = [p for p in settings.freeze if not any(under(n, p) for n, _ in prepared.model.named_modules())]
    if unknown:
        raise ConfigError(f"qat.freeze names modules, but got {unknown[0]!r}. See the model check for their names.")
    found = set()
    for node in prepared.graph.quantized:
        assert node.quantizer is not None
        op = qconfig.ops.get(node.name) if qconfig is not None else None
        pinned = op is not None and (op.frozen or op.pinned_scale() is not None)
        place = node.name.partition("[")[0].partition("(")[0]
        if pinned or any(under(place, prefix) for prefix in settings.freeze):
            found |= {prepared.outputs[name] for name in (node.quantizer, *node.inner)}
    frozen = (w for w in prepared.weights if any(under(w, prefix) for prefix in settings.freeze))
    return found | {prepared.weights[w] for w in frozen}


def _set_moving(
    quantizer: FakeQuant, role: str, settings: QatSettings, calibration: CalibrationSettings, fixed: bool
) -> None:
    integer = quantizer.dtype is not None and quantizer.dtype.is_integer
    int16 = role == "output" and quantizer.dtype == QDtype.qint16
    quantizer.margin = calibration.int16_margin if int16 else 1.0
    quantizer.half_step = 0.5 if calibration.divisor == "plugin" else 0.0
    if role == "weight":
        quantizer.follows = False
        constant = 1.0 if settings.moving_weights else 0.0
    else:
        constant = settings.averaging_constant if settings.moving and not settings.learned_scales else 0.0
    quantizer.averaging_constant = constant if integer and not fixed else 0.0


@torch.no_grad()
def _set_weight_scales(prepared: QuantizedModel) -> None:
    """Set weight scales from the weights after the last step; for functionals, the last forward pass has set them."""
    for leaf in (m for m in prepared.model.modules() if isinstance(m, WeightedLeaf)):
        quantizer = prepared.weights.get(leaf.qflow_path)
        if quantizer is not None and quantizer.averaging_constant:
            quantizer.scale.copy_(quantizer.measured(leaf.folded()[0]))


def under(name: str, prefix: str) -> bool:
    """True if the dotted `name` is `prefix` or below it."""
    return name == prefix or name.startswith(f"{prefix}.")
