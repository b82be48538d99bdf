"""A task is what a user provides: the float model, its data, its metric, and the input shape for deployment.

    model    an nn.Module with its float weights (the result of `task.model._target_`)
    data     an object with map-style datasets `calibration` and `evaluation` (and `train` for QAT), whose samples have
             gone through the user's inference-time preprocessing. Optional: `collate(samples)`, `model_inputs(batch)`,
             and the splits `calibration_augmented`, `train_augmented` for `calibration.augment`, `qat.augment`;
             `for_model(model)`, which returns the data with the preprocessing of that model; `own_metric()`, for a task
             that names none; `workers`, processes that load batches; `notes`, lines that commands print; `unlabelled`,
             why there are no labels.
    metric   called with (model outputs, batch) it returns one score per sample; the task's metric is their mean.
             Or an object with update(outputs, batch), compute() and reset(). Either declares `direction`:
             "maximize" or "minimize" (`higher_is_better` of torchmetrics is understood). With `against_float = True`
             it gets the outputs of the float model as a third argument.

A batch is a tensor, a sequence (inputs, target, ...), or a dict. The model gets as many items of a sequence as its
forward takes, and the keys of a dict that are arguments of its forward; `data.model_inputs` replaces this rule.

The samples of a model with temporal state (`cached_attrs`) are frames: sequences.py says in which order they are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import DataLoader

from qflow.core.errors import ConfigError, DataError, ModelError, NotFiniteError, QflowError
from qflow.core.names import check_task_name
from qflow.core.signature import arguments, keywords, mismatch
from qflow.tasks.early_stop import bounds_of, out_of_reach, require_within
from qflow.tasks.loading import loaded
from qflow.tasks.sequences import in_batches, in_parallel, lengths_of

DIRECTIONS = ("maximize", "minimize")


@dataclass(frozen=True)
class Task:
    """The model, data and metric as built, with the settings of the task."""

    name: str
    model: nn.Module
    data: Any
    metric: Any
    metric_name: str = "accuracy"
    direction: str = "maximize"
    stated_metric: float | None = None
    tolerance: float = 0.002
    deploy_shape: tuple[int, ...] | Mapping[str, Sequence[int]] | None = None
    device: str = "cpu"
    cached_attrs: tuple[str, ...] = ()
    """Attributes in which the model keeps state from frame to frame."""
    notes: tuple[str, ...] = ()
    """What the data say of themselves, a line each: how they were split, which files cannot be read."""

    @property
    def against_float(self) -> bool:
        """True if the metric compares outputs with those of the float model."""
        return bool(getattr(self.metric, "against_float", False))

    def __post_init__(self) -> None:
        check_task_name(self.name)

    def drop(self, float_metric: float, metric: float) -> float:
        """Loss against float in units of the metric; positive means worse, for either direction."""
        return float_metric - metric if self.direction == "maximize" else metric - float_metric


def make_task(*, name: str, model: Any, data: Any, metric: Any = None, device: str = "cpu", **stated: Any) -> Task:
    """Check the three parts and build the task. Raises ConfigError, which names what a part lacks.

    Without a metric the data choose theirs (`own_metric`).
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"task.model gives a torch.nn.Module, but got {type(model).__name__}. Return the model.")
    if hasattr(data, "for_model"):
        data = data.for_model(model)
    for part in ("calibration", "evaluation"):
        if not hasattr(_split(data, part), "__getitem__"):
            raise ConfigError(
                f"task.data gives map-style datasets calibration and evaluation, but {type(data).__name__} has no "
                f"{part} that can be indexed. Add it."
            )
        if stated.get("cached_attrs"):
            lengths_of(_split(data, part), part)
    if metric is None:
        metric = _own_metric(data)
    elif (why := getattr(data, "unlabelled", "")) and getattr(metric, "needs_labels", False):
        raise ConfigError(f"{type(metric).__name__} compares with labels, but got none: {why}. Use metric=agreement.")
    direction = getattr(metric, "direction", None)
    if direction is None and getattr(metric, "higher_is_better", None) is not None:
        direction = "maximize" if metric.higher_is_better else "minimize"
    if direction not in DIRECTIONS:
        raise ConfigError(
            f"A metric declares direction maximize or minimize, but got {direction!r} for {type(metric).__name__}. "
            "Set the attribute `direction`."
        )
    metric_name = str(getattr(metric, "name", None) or getattr(metric, "__name__", type(metric).__name__)).lower()
    return Task(
        name=name,
        model=model.to(device).eval(),
        data=data,
        metric=metric,
        metric_name=metric_name,
        notes=tuple(getattr(data, "notes", ())),
        direction=direction,
        device=device,
        **stated,
    )


def _own_metric(data: Any) -> Any:
    if not hasattr(data, "own_metric"):
        raise ConfigError(
            "A task needs task.metric._target_, but got none. Name your class or function, or use metric=agreement."
        )
    return data.own_metric()


def _split(data: Any, part: str) -> Any:
    """The split `data.<part>`, or None. Raises DataError if a property of the user's class raises."""
    try:
        return getattr(data, part, None)
    except Exception as error:
        text = " ".join(str(error).split())
        raise DataError(f"task.data.{part} must load, but got {type(error).__name__}: {text}.") from error


def split_for(task: Task, part: str, augment: bool) -> str:
    """`part`, or the name of its augmented split. Raises ConfigError if the data has no such split."""
    name = f"{part}_augmented"
    if augment and _split(task.data, name) is None:
        key = "qat.augment" if part == "train" else f"{part}.augment"
        raise ConfigError(
            f"{key}=true reads task.data.{name}, but {type(task.data).__name__} has none. Add that split, or leave "
            "augment at false."
        )
    return name if augment else part


def model_inputs(task: Task, batch: Any) -> Any:
    """The part of a batch that goes to the model, as positional arguments or keywords (module docstring)."""
    if hasattr(task.data, "model_inputs"):
        return task.data.model_inputs(batch)
    forward = task.model.forward
    required = [p for p in arguments(forward) if p.default is p.empty]
    if isinstance(batch, Mapping):
        return keywords(forward, batch) or (dict(batch),)
    if isinstance(batch, (tuple, list)):
        if isinstance(batch[0], (tuple, list, Mapping)):
            first = batch[0]
            if isinstance(first, Mapping):
                return keywords(forward, first) or (first,)
            return tuple(first) if len(required) > 1 else (first,)
        return tuple(batch[: max(len(required), 1)])
    return (batch,)


def batches(
    task: Task,
    split: str,
    batch_size: int,
    limit: int | None = None,
    indices: Sequence[int] | None = None,
    begin: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Any, int]]:
    """At most `limit` pairs (batch, its size) of `split` in order, or of its samples `indices`, on the task's device.

    With `cached_attrs` these are frames in order, and `begin` is called before the first ones of sequences. Raises
    DataError for an empty split, values that are not finite, or samples that cannot be batched.
    """
    data = getattr(task.data, split)
    if len(data) == 0:
        raise DataError(f"task.data.{split} holds samples, but got none. Check paths and filters of task.data.")
    if task.cached_attrs and indices is None:
        steps = in_parallel(lengths_of(data, split), batch_size)[:limit]
    else:
        steps = in_batches(range(len(data)) if indices is None else indices, batch_size)[:limit]
    order: Any = [step.samples for step in steps]
    workers = min(getattr(task.data, "workers", 0), len(order) - 1)  # one batch is not worth a process
    loader = DataLoader(
        data, batch_sampler=order, collate_fn=getattr(task.data, "collate", None), num_workers=max(workers, 0)
    )
    for step, batch in zip(steps, loaded(loader, split), strict=True):
        if step.begins:
            begin()
        batch = _moved(batch, task.device)
        inputs = model_inputs(task, batch)
        tensors = [t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor)]
        if not tensors:
            raise DataError(f"A batch holds tensors, but got {type(batch).__name__} from {split}. Return tensors.")
        for tensor in tensors:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise DataError(f"Inputs are finite, but got NaN or inf in task.data.{split}. Clean the data.")
        yield batch, len(tensors[0])


def evaluate(
    task: Task,
    model: Callable[..., Any],
    batch_size: int,
    on_batch: Callable[[int], None] = lambda done: None,
    least: float | None = None,
    begin: Callable[[], None] = lambda: None,
    on_scores: Callable[[Tensor], None] = lambda scores: None,
) -> tuple[float, int]:
    """Metric of `model` over the evaluation data, and the number of samples.

    With `least` the evaluation ends as soon as the remaining samples cannot bring the metric to it, by the metric's
    bounds (early_stop.py). Samples that were not run then count as the worst, so that the metric is never better than
    in a full evaluation. `begin` begins sequences, as in `batches`. `on_scores` gets scores a sample, batch by batch.

    Raises NotFiniteError if an output is not finite, ConfigError if the metric alone is not, and ModelError or
    DataError for what cannot be run.
    """
    stateful = hasattr(task.metric, "update") and hasattr(task.metric, "compute")
    if stateful and hasattr(task.metric, "reset"):
        task.metric.reset()
    total, count, samples = 0.0, 0, len(task.data.evaluation)
    bounds = bounds_of(task.metric) if least is not None else None
    with torch.no_grad():
        for batch, size in batches(task, "evaluation", batch_size, begin=begin):
            inputs = model_inputs(task, batch)
            outputs = run(model, inputs)
            _require_finite(outputs)
            scored = outputs, batch, *_of_float(task, model, inputs, outputs)
            if stateful:
                _scored(task.metric.update, *scored)
            else:
                scores = torch.as_tensor(_scored(task.metric, *scored))
                if scores.ndim != 1 or len(scores) != size:
                    raise ConfigError(
                        f"A metric gives one score a sample, but got shape {tuple(scores.shape)} for {size} samples. "
                        "Return a vector, or give the metric update() and compute()."
                    )
                total += float(scores.double().sum())
                on_scores(scores)
            count += size
            on_batch(count)
            if bounds is not None and least is not None:
                require_within(bounds, scores)
                if (worst := out_of_reach(bounds, task.direction, total, count, samples, least)) is not None:
                    return worst, count
    value = float(task.metric.compute()) if stateful else total / count
    if not math.isfinite(value):
        raise ConfigError(f"A metric is finite where all outputs are finite, but got {value}. Look at task.metric.")
    return value, count


def _require_finite(outputs: Any) -> None:
    for tensor in tree_flatten(outputs)[0]:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NotFiniteError("Outputs of a model are finite, but got NaN or inf. Check weights and data.")


def _of_float(task: Task, model: Callable[..., Any], inputs: Any, outputs: Any) -> tuple[Any, ...]:
    """The float model's outputs of this very batch, as another batch size may round otherwise; () if not needed."""
    if not task.against_float:
        return ()
    return (outputs if model is task.model else run(task.model, inputs),)


def _scored(score: Callable[..., Any], *scored: Any) -> Any:
    try:
        return score(*scored)
    except QflowError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f"task.metric must score (outputs, batch), but got {type(error).__name__}: {' '.join(str(error).split())}. "
            "See it with QFLOW_DEBUG=1."
        ) from error


def run(model: Callable[..., Any], inputs: Any) -> Any:
    """Call `model` on `inputs`. Raises ModelError, in one line, if it cannot take them."""
    inputs = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)  # a model may write into them
    try:
        return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = [tuple(t.shape) for t in tree_flatten(inputs)[0] if isinstance(t, Tensor)]
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = mismatch(getattr(model, "forward", model), inputs)
        raise ModelError(
            f"The model must take the batches of its data, but got shapes {shapes}: {text}{hint}. "
            "Check task.data, or give it model_inputs(batch)."
        ) from error


def _moved(batch: Any, device: str) -> Any:
    if device == "cpu":
        return batch
    return tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, batch)
