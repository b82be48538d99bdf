"""The groups of an optimizer: which parameters are trained, at which learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from qflow.core.errors import ConfigError
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.train.learned_scales import LearnedScales
from qflow.quant.train.qat_state import require_trainable, under


def parameter_groups(
    prepared: nn.Module,
    rates: Mapping[str, float],
    learning_rate: float,
    weight_decay: float = 0.0,
    learned: LearnedScales | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters; each parameter has the rate of its longest prefix in `rates`.

    Prefixes are module or parameter paths of the user's model (`backbone`, `head.cls`). Parameters without a prefix
    have `learning_rate`. `learned` scales are the last group. Raises ConfigError for a prefix without a parameter, and
    if all parameters are frozen.
    """
    inner = getattr(prepared, "module", prepared)  # DistributedDataParallel
    inner = inner.model if isinstance(inner, QuantizedModel) else inner
    require_trainable(inner)
    named = list(inner.named_parameters())
    unknown = [prefix for prefix in rates if not any(under(name, prefix) for name, _ in named)]
    if unknown:
        known = ", ".join(dict.fromkeys(name.split(".")[0] for name, _ in named))
        raise ConfigError(f"qat.rates names modules, but got {unknown[0]!r}. At the top there are: {known}.")
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            owner = max((p for p in rates if under(name, p)), key=len, default="")
            groups.setdefault(owner, []).append(parameter)
    made: list[dict[str, Any]] = [
        {"params": parameters, "lr": rates.get(owner, learning_rate), "weight_decay": weight_decay, "name": owner}
        for owner, parameters in groups.items()
    ]
    return [*made, learned.group(learning_rate)] if learned is not None else made
