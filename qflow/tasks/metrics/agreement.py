"""Agreement with the float model as metric of any task (`metric=agreement`): no labels are needed.

It says how much quantization changes, and nothing about how right the float model is. The float model runs on each
evaluation batch beside the quantized one (tasks/task.py), so no outputs are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qflow.core.agreement import PREFIX
from qflow.core.errors import ConfigError


def _top1(ours: Tensor, reference: Tensor) -> Tensor:
    """Whether the same class has the highest score: [B, classes] -> [B]."""
    if ours.ndim != 2 or ours.shape[1] < 2:
        raise _unfit("top1 compares outputs of shape [samples, classes]", ours)
    return (ours.argmax(dim=1) == reference.argmax(dim=1)).double()


def _pixels(ours: Tensor, reference: Tensor) -> Tensor:
    """The share of positions at which the same class has the highest score: [B, classes, ...] -> [B]."""
    if ours.ndim < 3 or ours.shape[1] < 2:
        raise _unfit("pixels compares outputs of shape [samples, classes, height, width]", ours)
    return (ours.argmax(dim=1) == reference.argmax(dim=1)).double().flatten(1).mean(dim=1)


def _cosine(ours: Tensor, reference: Tensor) -> Tensor:
    """Cosine similarity of all values of a sample, 1 for equal ones, also zeros: [B, ...] -> [B]."""
    x, y = (t.double().reshape(len(t), -1) for t in (ours, reference))
    found = torch.nn.functional.cosine_similarity(x, y, dim=1).clamp(-1.0, 1.0)
    return torch.where((x == y).all(dim=1), torch.ones_like(found), found)


MEASURES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"top1": _top1, "pixels": _pixels, "cosine": _cosine}


class Agreement:
    """How far outputs agree with those of the float model, 1 if they are the same; one score a sample.

    `by` is top1, pixels or cosine. `outputs` are the names of outputs to compare, as Horizon's plugin names them (`0`,
    `1-0`, or the key); by default all of floating point. Of several outputs the mean counts.
    """

    direction: ClassVar[str] = "maximize"
    against_float: ClassVar[bool] = True

    def __init__(self, *, by: str = "top1", outputs: Sequence[str] = ()) -> None:
        if by not in MEASURES:
            raise ConfigError(f"metric.by is one of {', '.join(MEASURES)}, but got {by}. Take one of these.")
        self.by, self.outputs = by, tuple(map(str, outputs))
        self.name = f"{PREFIX}{by}"
        self.bounds = (-1.0 if by == "cosine" else 0.0, 1.0)

    def __call__(self, outputs: Any, batch: Any, float_outputs: Any) -> Tensor:
        """Scores float64 [B]. Raises ConfigError for outputs that cannot be compared so."""
        ours, reference = self._chosen(outputs), self._chosen(float_outputs)
        scores = [MEASURES[self.by](ours[name], reference[name]) for name in ours]
        return torch.stack(scores).mean(dim=0)

    def _chosen(self, outputs: Any) -> dict[str, Tensor]:
        found = {name: t for name, t in _named(outputs, "").items() if t.is_floating_point() and t.ndim}
        if unknown := [name for name in self.outputs if name not in found] or not found:
            raise ConfigError(
                f"metric.outputs are among the model's outputs of floating point, {', '.join(found) or 'none'}, but "
                f"got {unknown if isinstance(unknown, list) else 'a model without one'}. Name others."
            )
        return {name: found[name] for name in self.outputs} if self.outputs else found


def _named(outputs: Any, prefix: str) -> dict[str, Tensor]:
    if isinstance(outputs, Tensor):
        return {prefix or "0": outputs}
    items: Any = outputs.items() if isinstance(outputs, Mapping) else ()
    if isinstance(outputs, (tuple, list)):
        items = enumerate(outputs)
    found: dict[str, Tensor] = {}
    for key, value in items:
        found |= _named(value, f"{prefix}-{key}" if prefix else str(key))
    return found


def _unfit(rule: str, ours: Tensor) -> ConfigError:
    others = ", ".join(f"metric.by={name}" for name in MEASURES if not rule.startswith(name))
    return ConfigError(
        f"metric.by={rule}, but got an output of shape {list(ours.shape)}. Use {others}, or name the outputs to "
        "compare: 'metric.outputs=[<name>]'."
    )
