"""Cuts bad cases into parts that fit into memory and caches, if a sample gives the same result in any batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from qflow.analysis.measures.distances import disagreement
from qflow.core.graph import ModelGraph, OpKind
from qflow.quant.trace.calling import batch_size, call_model, cut, named_tensors

CACHE_BYTES = 4e6  # average bytes of an operator's result in a chunk on a CPU; more exceeds its caches (docs/log.md)
AGREES = 1e-3  # relative difference of outputs that counts as equal: other batch sizes run other kernels


def sample_bytes(graph: ModelGraph, inputs: Any) -> float:
    """Bytes of the float values that a replay keeps for one sample; `graph` may be traced at another input size."""
    traced = sum(n.elements / max(n.shape[0], 1) for n in graph.nodes if n.kind == OpKind.input and n.shape)
    size = batch_size(inputs)
    given = sum(t.numel() / size for t in tree_leaves(inputs) if isinstance(t, Tensor))
    values = sum(n.elements / max(n.shape[0], 1) for n in graph.nodes if n.shape)
    return 4.0 * values * given / max(traced, 1.0)


def chunks_of(graph: ModelGraph, inputs: Any, memory: float, first: int = 0) -> list[Any]:
    """`inputs` in parts whose kept values take at most `memory` bytes; a part has at least one sample.

    On a CPU the first part has at most `first` samples, unless `first` is 0 or there are fewer than twice as many.
    """
    size = batch_size(inputs)
    most = max(1, min(size, int(memory / sample_bytes(graph, inputs))))
    if all(t.device.type == "cpu" for t in tree_leaves(inputs) if isinstance(t, Tensor)):
        values = sum(1 for n in graph.nodes if n.shape)
        most = min(most, max(1, int(CACHE_BYTES * values / sample_bytes(graph, inputs))))
        first = min(first, most) if size >= 2 * first else 0
    else:
        first = 0
    parts = math.ceil((size - first) / most)
    bounds = sorted({0, *(first + (size - first) * i // parts for i in range(parts + 1))})
    return [cut(inputs, size, a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def mixed(model: nn.Module, inputs: Any, parts: Sequence[Any]) -> str:
    """Why `inputs` may not be cut into `parts`, which it begins with, or "": compares them run together and apart."""
    few = [cut(inputs, batch_size(inputs), 0, sum(batch_size(part) for part in parts)), *parts]
    try:
        both, *alone = (dict(named_tensors(call_model(model, part))) for part in few)
    except Exception as error:  # whatever the model raises at another batch size
        return f"the model does not run on {batch_size(parts[0])} samples: {' '.join(str(error).split())}"
    for name, pair in both.items():
        apart = [part[name] for part in alone if name in part and part[name].ndim]
        fits = pair.ndim and len(apart) == len(parts) and all(t.shape[1:] == pair.shape[1:] for t in apart)
        joined = torch.cat(apart) if fits else pair.new_zeros(())
        gap = disagreement({name: joined}, {name: pair}, {name: torch.zeros_like(pair)})
        if joined.shape != pair.shape or gap > AGREES:
            return f"output {name} of a sample depends on the rest of its batch"
    return ""


def joined(batches: Sequence[Any]) -> Any | None:
    """All batches as one; None if they differ in anything but their samples and the values of these."""
    flat = [tree_flatten(inputs) for inputs in batches]
    sizes = [batch_size(inputs) for inputs in batches]
    if any(spec != flat[0][1] for _, spec in flat):
        return None
    leaves = []
    for parts in zip(*(own for own, _ in flat), strict=True):
        first = parts[0]
        if not all(type(part) is type(first) for part in parts):
            return None
        if not isinstance(first, Tensor):
            if any(part != first for part in parts):
                return None
            leaves.append(first)
        elif all(part.ndim and len(part) == size for part, size in zip(parts, sizes, strict=True)):
            if any(part.shape[1:] != first.shape[1:] or part.dtype != first.dtype for part in parts):
                return None
            leaves.append(torch.cat(parts))
        elif all(part.shape == first.shape and torch.equal(part, first) for part in parts):
            leaves.append(first)
        else:
            return None
    return tree_unflatten(leaves, flat[0][1])
