"""What `QuantAnalysis` is given as data: whether the models take it, and which of the searched samples are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qflow.analysis.badcases.files import BadcaseInputs
from qflow.analysis.measures.tables import BadcaseTable, Finding
from qflow.api.model_pair import ModelPair, on
from qflow.core.errors import DataError, QflowError
from qflow.quant.trace.calling import call_model, input_tensors


class Items:
    """The items of `data` as the pair's models take them, on one device after the other."""

    def __init__(self, pair: ModelPair, data: Iterable[Any]) -> None:
        self.pair, self.data = pair, data
        self.count = 0
        self.at_hand: Any = None
        """The item that is worked on; None while the data make the next one."""

    def on(self, device: torch.device) -> Iterator[Any]:
        """Each in turn."""
        for item in self.data:
            self.at_hand = self.pair.inputs(item)
            self.count += 1
            yield on(device, self.at_hand)
            self.at_hand = None

    @contextmanager
    def explained(self, device: Any) -> Iterator[None]:
        """An error inside that comes of the item at hand becomes a DataError which says how that differs."""
        try:
            yield
        except (QflowError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self.at_hand is None:
                raise
            name = f"item {self.count - 1}"
            require_fit(self.pair, self.at_hand, name, device)
            if _kinds(self.pair, self.at_hand) != _kinds(self.pair, self.pair.prepared.sample):
                raise _misfit(self.pair, self.at_hand, name, error) from error
            raise


def not_items(data: Any) -> DataError:
    """What to do with data that give no items."""
    whole = isinstance(data, (Tensor, Mapping)) or not hasattr(data, "__getitem__")
    way = "Write [item]." if whole else "Put a DataLoader around it."
    return DataError(f"Data are items to run through, but got a {type(data).__name__}. {way}")


def require_fit(pair: ModelPair, inputs: Any, name: str, device: Any = None) -> None:
    """Raises DataError where one of the models raises on `inputs`, whatever it raises."""
    with pair.at_work(device) as target, torch.no_grad():
        try:
            for model in (pair.model, pair.prepared):
                call_model(model, on(target, inputs))
        except (QflowError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _misfit(pair, inputs, name, error) from error


def require_numbers(pair: ModelPair, inputs: Any) -> None:
    """Raises DataError for NaN; infinities are masks."""
    for name, tensor in input_tensors(pair.model, inputs):
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise DataError(f"Inputs are numbers or infinities, but got NaN in {name}. Clean the data.")


def _misfit(pair: ModelPair, inputs: Any, name: str, error: Exception) -> DataError:
    got, wanted = (_layout(pair, given) for given in (inputs, pair.prepared.sample))
    reason = " ".join(str(error).split()[:30])
    pairs = zip(_kinds(pair, inputs), _kinds(pair, pair.prepared.sample), strict=False)
    way = "Give it the form of the example inputs."
    if any(a[1] == b[1] - 1 for a, b in pairs):
        way = "Put the batch first: a DataLoader around the data set does."
    return DataError(
        f"Data are what the model takes, but got {name} with {got}, where the example inputs had {wanted} "
        f"({type(error).__name__}: {reason}). {way}"
    )


def _layout(pair: ModelPair, inputs: Any) -> str:
    found = [f"{n} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for n, t in _tensors(pair, inputs)]
    return ", ".join(found) or "no tensor"


def _kinds(pair: ModelPair, inputs: Any) -> list[tuple[torch.dtype, int]]:
    """What an item has in common with others: sizes may differ."""
    return [(t.dtype, t.ndim) for _, t in _tensors(pair, inputs)]


def _tensors(pair: ModelPair, inputs: Any) -> list[tuple[str, Tensor]]:
    return input_tensors(pair.model, inputs)


def kept_cases(table: BadcaseTable, inputs: BadcaseInputs, topk: int) -> BadcaseTable:
    """The table with those of the `topk` bad cases whose inputs are there. Raises DataError without the worst."""
    lost = [i for i in table.chosen[:topk] if i not in inputs.samples]
    if table.chosen[0] in lost:
        why = "it became the worst after they had passed"
        raise DataError(f"The worst sample's inputs are kept, but got none of {lost[0]}: {why}. Raise topk.")
    missing = [Finding("", "info", f"sample {i} is as bad, but its inputs had passed: not kept") for i in lost]
    chosen = tuple(i for i in table.chosen[:topk] if i not in lost)
    table = dataclasses.replace(table, chosen=chosen, findings=(*table.findings, *missing))
    inputs.finish(table)
    return table
