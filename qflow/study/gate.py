"""The gate of a promotion: the goal and rules that a version must keep, judged on samples and against the champion."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from qflow.core.errors import ConfigError
from qflow.search.objective import BUDGETS, Goal
from qflow.tasks.task import Task
from qflow.trial.frames import evaluate_from_start

HELD_OUT = "held_out"
"""Split of a task's data that neither calibration nor search sees; optional."""


@dataclass(frozen=True)
class Scores:
    """The metric of a model on a split, with the score of every sample where the metric gives one."""

    metric: float
    scores: tuple[float, ...] = ()
    classes: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Rules:
    """The rules of `gate` in the configuration (config/schema.py says what each means); None: no rule."""

    max_class_drop: float | None = None
    max_sample_drop: float | None = None
    max_worse_share: float | None = None
    max_worse_than_champion: float | None = None
    max_slower_than_champion_ms: float | None = None
    allow_dominated: bool = False

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"gate.{name} is a number of at least 0, but got {value}. null sets no rule.")
        if (self.max_worse_share or 0.0) > 1.0:
            raise ConfigError(
                f"gate.max_worse_share is a share of at most 1, but got {self.max_worse_share}. null sets no rule."
            )

    @property
    def of_samples(self) -> list[str]:
        """The names of the rules that are set on classes and samples."""
        names = ("max_class_drop", "max_sample_drop", "max_worse_share")
        return [name for name in names if getattr(self, name) is not None]


@dataclass(frozen=True)
class Judged:
    """What a version is known by when the next one is compared with it."""

    metric: float
    latency_ms: float
    data: str
    """Digest of calibration and evaluation data: metrics on other data say nothing."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.metric) and math.isfinite(self.latency_ms)):
            raise ConfigError(
                f"A version is judged by finite numbers, but got {self.metric}, {self.latency_ms} ms. Promote it again."
            )


@dataclass
class _Recorder:
    """A metric that also keeps the score and the class of every sample."""

    metric: Any
    data: Any
    scores: list[float] = field(default_factory=list)
    classes: list[Any] = field(default_factory=list)

    @property
    def against_float(self) -> bool:
        """True if the metric compares outputs with those of the float model."""
        return bool(getattr(self.metric, "against_float", False))

    def __call__(self, outputs: Any, batch: Any, *float_outputs: Any) -> Any:
        found = self.metric(outputs, batch, *float_outputs)
        self.scores += torch.as_tensor(found).double().flatten().tolist()
        if hasattr(self.data, "sample_classes"):
            self.classes += list(self.data.sample_classes(batch))
        return found


class _Split:
    """The data of a task with another split in the place of the evaluation data."""

    def __init__(self, data: Any, split: str) -> None:
        self._data, self.evaluation = data, getattr(data, split)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)


def has_held_out(task: Task) -> bool:
    """True if the data have samples that no stage of a study reads."""
    return bool(len(getattr(task.data, HELD_OUT, None) or ()))


def score(task: Task, model: nn.Module, split: str, batch_size: int) -> Scores:
    """Evaluate `model` on a split of the task's data."""
    metric: Any = task.metric
    if not (hasattr(metric, "update") and hasattr(metric, "compute")):
        metric = _Recorder(metric, task.data)
    data = task.data if split == "evaluation" else _Split(task.data, split)
    value = evaluate_from_start(replace(task, metric=metric, data=data), model, batch_size, lambda _: None).metric
    if isinstance(metric, _Recorder):
        return Scores(value, tuple(metric.scores), tuple(metric.classes))
    return Scores(value)


def check_goal(given: Mapping[str, float | None]) -> None:
    """Raise ConfigError for a number of the command that is no goal, before anything is read."""
    Goal(**{"max_drop": 0.0, **{key: value for key, value in given.items() if value is not None}})  # type: ignore[arg-type]


def stricter(study: Mapping[str, Any], given: Mapping[str, float | None]) -> Goal:
    """Return the goal of the study with the numbers of the command. Raises ConfigError for a laxer number."""
    found: dict[str, Any] = {key: study.get(key) for key in ("max_drop", *BUDGETS)}
    for key, value in given.items():
        if value is None:
            continue
        if found[key] is not None and value > found[key]:
            raise ConfigError(
                f"objective.{key} at promote is at most the study's, {found[key]:g}, but got {value:g}. Tune with that "
                "goal, or leave it out."
            )
        found[key] = value
    return Goal(**found)


def misses(goal: Goal, metrics: Mapping[str, float], where: str = "") -> list[str]:
    """Return in words by how much the goal is missed; empty if it is met."""
    return [
        f"the goal ({goal}) is missed{where}: {name} by {excess:.4g}"
        for name, excess in goal.constraints(metrics).items()
        if not excess <= 0
    ]


def broken_rules(rules: Rules, task: Task, before: Scores, after: Scores) -> list[str]:
    """Return in words which rules on classes and samples are broken, from float scores and quantized ones.

    Raises ConfigError for a rule that cannot be judged on this task.
    """
    drops = [task.drop(a, b) for a, b in zip(before.scores, after.scores, strict=True)]
    found = []
    for name in rules.of_samples if not drops else ():
        raise ConfigError(f"gate.{name} needs a metric that scores each sample, but got one of sums. Leave it out.")
    if (limit := rules.max_class_drop) is not None:
        if not after.classes:
            raise ConfigError(
                "gate.max_class_drop needs data.sample_classes(batch), a class for each sample, but got none. Add it."
            )
        worst, loss = max(_class_drops(drops, after.classes).items(), key=_worst)
        if not loss <= limit:
            found.append(f"class {worst} loses {loss:.4g}, more than gate.max_class_drop {limit:g}")
    if (limit := rules.max_sample_drop) is not None and not all(drop <= limit for drop in drops):
        at, most = max(enumerate(drops), key=_worst)
        found.append(f"sample {at} loses {most:.4g}, more than gate.max_sample_drop {limit:g}")
    share = sum(not drop <= 0 for drop in drops) / max(len(drops), 1)
    if (limit := rules.max_worse_share) is not None and share > limit:
        found.append(f"{share:.2%} of the samples are worse, more than gate.max_worse_share {limit:g}")
    return found


def _worst(pair: tuple[Any, float]) -> float:
    return math.inf if math.isnan(pair[1]) else pair[1]


def _class_drops(drops: Sequence[float], classes: Sequence[Any]) -> dict[Any, float]:
    groups: dict[Any, list[float]] = defaultdict(list)
    for drop, name in zip(drops, classes, strict=True):
        groups[name].append(drop)
    return {name: sum(group) / len(group) for name, group in groups.items()}


def against_champion(rules: Rules, task: Task, now: Judged, champion: Judged) -> list[str]:
    """Return in words why the champion should stay; empty if the new version may take its place."""
    worse, slower = task.drop(champion.metric, now.metric), now.latency_ms - champion.latency_ms
    found = []
    if (limit := rules.max_worse_than_champion) is not None and not worse <= limit:
        found.append(f"{task.metric_name} is {worse:.4g} worse than the champion's, more than {limit:g}")
    if (limit := rules.max_slower_than_champion_ms) is not None and not slower <= limit:
        found.append(f"predicted latency is {slower:.4g} ms above the champion's, more than {limit:g}")
    if not rules.allow_dominated and worse >= 0 and slower >= 0 and (worse > 0 or slower > 0):
        found.append(
            f"the champion is as good or better in both: {task.metric_name} {champion.metric:.4g} against "
            f"{now.metric:.4g}, {champion.latency_ms:.4g} ms against {now.latency_ms:.4g} (gate.allow_dominated=true)"
        )
    return found
