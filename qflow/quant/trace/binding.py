"""Take the model's inputs from an item of a data loader: those that `forward` takes, or as many as an example has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qflow.core.errors import DataError
from qflow.core.signature import arguments, keywords


def example_of(model: nn.Module, item: Any) -> Any:
    """The example inputs in `item`, without what `forward` does not take: keys of a dict, targets after the inputs.

    `item` itself if it fits, or if nothing in it does.
    """
    needed = [p.name for p in arguments(model.forward) if p.default is p.empty]
    if isinstance(item, Mapping):
        return (keywords(model.forward, item) or (item,)) if set(needed) <= set(item) or len(needed) == 1 else item
    if not isinstance(item, (tuple, list)) or not item:
        return item
    if isinstance(item[0], Mapping) and needed and set(needed) <= set(item[0]):
        return example_of(model, item[0])
    try:
        inspect.signature(model.forward).bind(*item)
    except TypeError:  # more items than arguments
        first = item[0]
        if isinstance(first, (tuple, list)):
            return tuple(first) if len(needed) > 1 else (first,)
        return example_of(model, first) if isinstance(first, Mapping) else tuple(item[: max(len(needed), 1)])
    return item


def inputs_of(model: nn.Module, example: Any, item: Any) -> Any:
    """The inputs in `item` as `model` takes them: a tuple to splat, or a mapping of keywords.

    Parts that the example does not have (targets, more keys) are left out. The inputs may also be the first element of
    the item. Raises DataError if the inputs do not fit `forward`.
    """
    inputs = _chosen(model, example, item)
    keywords = isinstance(inputs, Mapping)
    try:
        signature = inspect.signature(model.forward)
    except ValueError:  # a builtin
        return inputs
    try:
        signature.bind(**inputs) if keywords else signature.bind(*inputs)
    except TypeError as error:
        held = ", ".join(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
        raise DataError(
            f"Data items are inputs of forward{signature}, but got {held} ({error}). Give them the form of the example "
            "inputs."
        ) from error
    return inputs


def _chosen(model: nn.Module, example: Any, item: Any) -> Any:
    if isinstance(example, Mapping):
        inner = item
        if isinstance(item, (tuple, list)):
            inner = next((part for part in item if isinstance(part, Mapping)), {})
        return {name: inner[name] for name in example if name in inner} if isinstance(inner, Mapping) else (item,)
    wanted = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    if isinstance(item, Mapping):
        if isinstance(wanted[0], Mapping):
            return (_of_keys(wanted[0], item),)
        names = [p.name for p in arguments(model.forward)][: len(wanted)]
        return {name: item[name] for name in names if name in item}
    if not isinstance(item, (tuple, list)):
        return (item,)
    if item and not _alike(wanted[0], item[0]):
        if _alike(wanted[0], item):
            return (item,)  # forward takes a list, and the item is a list
        return _chosen(model, example, item[0]) if isinstance(item[0], (tuple, list, Mapping)) else tuple(item[:1])
    count = next((i for i, pair in enumerate(zip(wanted, item, strict=False)) if not _alike(*pair)), len(wanted))
    return tuple(_of_keys(a, b) for a, b in zip(wanted, item[:count], strict=False))


def _of_keys(example: Any, item: Any) -> Any:
    """A plain dict reduced to the keys of the example; anything else unchanged."""
    if isinstance(example, Mapping) and type(item) is dict:
        return {key: item[key] for key in example if key in item}
    return item


def _alike(a: Any, b: Any) -> bool:
    """True if both are tensors, both are mappings, both are sequences, or both are none of these."""
    kinds = (Tensor, Mapping, (tuple, list), object)
    return next(k for k in kinds if isinstance(a, k)) == next(k for k in kinds if isinstance(b, k))
