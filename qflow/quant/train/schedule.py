"""The learning rates that an optimizer and a scheduler will give, found before any step of the training is done.

The guide's QAT has no warm-up: it starts at its largest rate. A rate that rises later (a restart) is reported.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qflow.core.errors import ConfigError

FORESEEN = 10_000  # steps that are looked at; a warm-up is over by then
ROUNDING = 1e-6  # relative; a rate that rises by less has not risen


def check_schedule(
    groups: Sequence[Mapping[str, Any]],
    optimizer: Callable[..., torch.optim.Optimizer],
    scheduler: Callable[..., Any] | None,
    learning_rate: float,
    steps: int,
) -> tuple[str, ...]:
    """Return findings on the rates of `steps` steps of the groups of `parameter_groups`.

    Raises ConfigError if optimizer or scheduler cannot be made or stepped, or if a rate rises above its first value.
    """
    rates = foreseen_rates(groups, optimizer, scheduler, learning_rate, min(steps, FORESEEN))
    found: list[str] = []
    for series in zip(*rates, strict=True):
        top = max(range(len(series)), key=series.__getitem__)
        if series[top] > series[0] * (1 + ROUNDING):
            raise ConfigError(
                "A schedule starts at its largest rate, since QAT has no warm-up, but got a rate that rises from "
                f"{series[0]:.3g} at step 1 to {series[top]:.3g} at step {top + 1}. Take one that only decays, as "
                "torch.optim.lr_scheduler.CosineAnnealingLR, or none (qat.scheduler._target_=null)."
            )
        again = next((i for i in range(1, len(series)) if series[i] > series[i - 1] * (1 + ROUNDING)), None)
        if again is not None and not found:
            found.append(
                f"the rate rises again at step {again + 1}, from {series[again - 1]:.3g} to {series[again]:.3g}: in "
                "the guide it only decays"
            )
    return tuple(found)


def foreseen_rates(
    groups: Sequence[Mapping[str, Any]],
    optimizer: Callable[..., torch.optim.Optimizer],
    scheduler: Callable[..., Any] | None,
    learning_rate: float,
    steps: int,
) -> list[tuple[float, ...]]:
    """Return the rate of each group by step, from a training of one number a group that is always at its minimum."""
    like = [{**group, "params": [nn.Parameter(torch.zeros(1))]} for group in groups]
    part = "optimizer"
    found = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stepped = optimizer(like, lr=learning_rate)
            part = "scheduler"
            schedule = scheduler(stepped) if scheduler is not None else None
            for _ in range(max(steps, 1)):
                found.append(tuple(float(group["lr"]) for group in stepped.param_groups))
                for group in like:
                    group["params"][0].grad = torch.zeros(1)
                part = "optimizer"
                stepped.step()
                part = "scheduler"
                if schedule is not None:
                    schedule.step()
    except Exception as error:  # the user's class may raise anything
        text = " ".join(str(error).split())
        form = "(groups, lr=...)" if part == "optimizer" else "(optimizer)"
        raise ConfigError(
            f"qat.{part} is called with {form} and stepped without arguments, but got {type(error).__name__}: {text}. "
            f"Correct qat.{part}."
        ) from error
    return found
