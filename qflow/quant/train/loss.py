"""The user's loss: what it must return, and when its values say that a training has diverged."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from qflow.core.errors import ConfigError, QflowError
from qflow.core.settings import QatSettings

Loss = Callable[[Any, Any], Tensor]


def called(loss: Loss, outputs: Any, batch: Any) -> Any:
    """Return `loss(outputs, batch)`, whatever it is. Raises ConfigError if the user's code fails."""
    try:
        return loss(outputs, batch)
    except QflowError:
        raise
    except Exception as error:  # the user's code may raise anything
        text = " ".join(str(error).split())
        raise ConfigError(
            f"qat.loss must take (outputs, batch), but got {type(error).__name__}: {text}. See it with QFLOW_DEBUG=1."
        ) from error


def one_number(value: Any) -> Tensor:
    """Return what a loss has returned. Raises ConfigError unless it is one number."""
    if isinstance(value, Mapping):
        names = ", ".join(map(str, value))
        raise ConfigError(f"A loss is one number, but got a {type(value).__name__} of {names}. Return their sum.")
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"A loss is one number, but got {shape}. Return its mean.")
    found: Tensor = value
    return found


def loss_value(value: Any) -> Tensor:
    """Return what a loss has returned. Raises ConfigError unless it is one number that depends on the parameters."""
    number = one_number(value)
    if not number.requires_grad:
        raise ConfigError("QAT trains parameters, but got a loss that depends on none. Unfreeze some of the model.")
    return number


def runaway(losses: Sequence[float], number: float, settings: QatSettings) -> str:
    """Return the rule that `number`, the loss after `losses`, breaks; "" while the training has not diverged.

    A positive loss may grow to `settings.divergence` times the median of its first values. A loss that begins below
    zero (a similarity, a log-likelihood) may lose as much: it keeps one part in `settings.divergence` of its first
    values. Such a loss may also be noise around zero, so the median of as many last values decides, and it must lie
    above all first values.
    """
    count, first = settings.first_losses, losses[: settings.first_losses]
    usual = statistics.median(first) if len(first) == count else 0.0
    if usual > 0 and number > settings.divergence * usual:
        return f"A loss stays below {settings.divergence:g} times its first values (about {usual:g})"
    if usual < 0 and len(losses) + 1 >= 2 * count:
        last = statistics.median([*losses[len(losses) + 1 - count :], number])
        if last > max(usual / settings.divergence, *first):
            return f"A loss below zero stays below 1/{settings.divergence:g} of its first values (about {usual:g})"
    return ""
