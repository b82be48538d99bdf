"""The inputs of a task at the shape at which its model is deployed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from qflow.core.errors import ConfigError
from qflow.tasks.task import Task


def deploy_inputs(task: Task, example: Any) -> Any:
    """Random inputs of `task.deploy_shape` in the structure of `example`; its first sample if there is no shape."""
    if task.deploy_shape is None:
        size = next((len(v) for v in tree_flatten(example)[0] if isinstance(v, Tensor) and v.ndim), 1)
        return tree_map(lambda v: v[:1] if isinstance(v, Tensor) and v.ndim and len(v) == size else v, example)
    generator = torch.Generator().manual_seed(0)

    def at(shape: Sequence[int], like: Tensor) -> Tensor:
        if len(shape) != like.ndim:
            raise ConfigError(
                f"task.deploy_shape has as many dimensions as the model's input, but got {list(shape)} for an input "
                f"of {list(like.shape)}."
            )
        drawn = torch.rand(tuple(shape), generator=generator) if like.is_floating_point() else torch.zeros(tuple(shape))
        return drawn.to(like)

    if isinstance(task.deploy_shape, Mapping):
        if not isinstance(example, Mapping):
            raise ConfigError(
                "task.deploy_shape by name needs dict batches, but got positional inputs. Give one shape."
            )
        unknown = sorted(set(task.deploy_shape) - set(example))
        if unknown:
            raise ConfigError(f"task.deploy_shape names inputs {sorted(example)}, but got {unknown}.")
        return {k: at(task.deploy_shape[k], v) if k in task.deploy_shape else v[:1] for k, v in example.items()}
    values = list(example.values()) if isinstance(example, Mapping) else list(example)
    if len([v for v in values if isinstance(v, Tensor)]) != 1:
        raise ConfigError("One task.deploy_shape is for one input, but the model takes several. Give shapes by name.")
    shape = tuple(task.deploy_shape)
    return tree_map(lambda v: at(shape, v) if isinstance(v, Tensor) else v, example)
