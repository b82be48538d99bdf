"""Temporal state in `QuantAnalysis`: frames instead of inputs for a model that was prepared with `cached_attrs`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from qflow.analysis.measures.tables import BadcaseTable
from qflow.api.model_pair import ModelPair
from qflow.core.errors import ConfigError, DataError
from qflow.quant.model.sequences import Along, in_order
from qflow.quant.trace.calling import batch_size, call_model, cut, named_tensors, next_state
from qflow.quant.trace.state import Frame

AGREES = 1e-3  # relative difference that counts as equal: other batch sizes run other kernels


class Frames:
    """The items of a search as the models take them, each with its number of samples; frames if they keep state.

    `cached_attrs` may repeat those of `qflow.prepare`. Raises ConfigError for others, or for sequences without state.
    """

    def __init__(self, pair: ModelPair, cached_attrs: Any, sequences: Sequence[int] | None) -> None:
        self.pair, self.lengths, cached = pair, sequences, pair.prepared.cached
        own = () if cached is None else cached.attrs
        given = (cached_attrs,) if isinstance(cached_attrs, str) else tuple(cached_attrs or own)
        if set(given) != set(own):
            raise ConfigError(
                f"cached_attrs are those that the model was prepared with, {list(own)}, but got {list(given)}. Give "
                "them to qflow.prepare."
            )
        if cached is None and sequences is not None:
            raise ConfigError("sequences are for a model with state, but got one without cached_attrs. Leave them out.")
        self.along = None if cached is None else Along(pair.model, cached)

    def of(self, items: Iterable[Any]) -> Iterator[tuple[Any, int]]:
        """Yield each of `items`. Raises DataError for items out of order, or that cannot be cut into samples."""
        if self.along is None:
            yield from ((item, batch_size(item)) for item in items)
            return
        for inputs in in_order(items, self.lengths, self.along.begin):
            frame = self.along.frame(inputs)
            self._require_cut(frame, batch_size(inputs))
            yield frame, batch_size(inputs)

    def named(self, table: BadcaseTable) -> BadcaseTable:
        """Return the table of the search with the sequences that came."""
        return table if self.along is None else replace(table, sequences=tuple(self.along.sequences))

    def _require_cut(self, frame: Frame, size: int) -> None:
        """A bad case is one sample, with its part of the state: that has to give its part of the outputs."""
        if size == 1:
            return
        with torch.no_grad():
            whole = named_tensors(call_model(self.pair.model, frame))
            try:
                alone = dict(named_tensors(call_model(self.pair.model, cut(frame, size, size - 1, size))))
            except Exception:  # whatever a state that does not fit its inputs causes
                alone = {}
        for name, tensor in whole:
            part = tensor[size - 1 :] if tensor.ndim and len(tensor) == size else tensor
            got = alone.get(name)
            if got is None or got.shape != part.shape or not torch.allclose(got, part, AGREES, AGREES):
                raise DataError(
                    f"A bad case is one sample with its part of the state, but got a state whose first axis does not "
                    f"hold the {size} samples of an item ({name} differs). Give items of one sequence."
                )


def with_state(pair: ModelPair, inputs: Any, baseline: Any = None, analysis: Any = None) -> Any:
    """Return `inputs` as a frame if the models keep state: with the given values, else those of a sequence's start.

    Both models run from one state: `analysis` is None, or equal to `baseline`. Raises ConfigError.
    """
    cached = pair.prepared.cached
    given = baseline if baseline is not None else analysis
    if cached is None:
        if given is not None:
            raise ConfigError(
                f"Cached attributes are those of qflow.prepare, but got {given!r:.40} for a model without. Give "
                "cached_attrs to qflow.prepare."
            )
        return inputs
    if given is not None and (not isinstance(given, Mapping) or not set(given) <= set(cached.attrs)):
        names = sorted(given) if isinstance(given, Mapping) else type(given).__name__
        raise ConfigError(f"Cached attributes are a dict with {', '.join(cached.attrs)}, but got {names}. Give one.")
    if baseline is not None and analysis is not None and not _same(baseline, analysis):
        raise ConfigError(
            "Both models run from one state, but got two that differ. Give baseline_model_cached_attr alone."
        )
    state = {**cached.start(pair.model), **(given or {})}
    try:
        return next_state(pair.model, inputs, cached.restored(state))[0]
    except Exception:  # the models do not take it: what runs them next says so
        return Frame(inputs, state, ())


def compared(case: Any, names: Sequence[str] | None) -> Any:
    """Return a frame with only those of its state tensors as outputs that `names` holds; anything else unchanged."""
    if names is None or not isinstance(case, Frame):
        return case
    return replace(case, outputs=tuple(pair for pair in case.outputs or () if pair[1] in names))


def _same(a: Any, b: Any) -> bool:
    (ours, form), (theirs, other) = tree_flatten(a), tree_flatten(b)
    return form == other and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else bool(x == y)
        for x, y in zip(ours, theirs, strict=True)
    )
