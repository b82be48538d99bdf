"""The data that `QuantAnalysis` is given: the check that the models take it, and the choice of samples to keep."""

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
    """Iterates over the items of `data` in the form that the models of the pair take."""

    def __init__(self, pair: ModelPair, data: Iterable[Any]) -> None:
        self.pair, self.data = pair, data
        self.count = 0
        self.at_hand: Any = None
        """The item in use; None while `data` produces the next one."""

    def on(self, device: torch.device) -> Iterator[Any]:
        """Yield each item on `device`."""
        for item in self.data:
            self.at_hand = self.pair.inputs(item)
            self.count += 1
            yield on(device, self.at_hand)
            self.at_hand = None

    @contextmanager
    def explained(self, device: Any) -> Iterator[None]:
        """Turn an error that the present item causes inside the block into a DataError that explains it."""
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
    """Return the error for data that do not consist of items."""
    whole = isinstance(data, (Tensor, Mapping)) or not hasattr(data, "__getitem__")
    way = "Write [item]." if whole else "Put a DataLoader around it."
    return DataError(f"Data are items to run through, but got a {type(data).__name__}. {way}")


def require_fit(pair: ModelPair, inputs: Any, name: str, device: Any = None) -> None:
    """Raise DataError if one of the models raises any exception on `inputs`."""
    with pair.at_work(device) as target, torch.no_grad():
        try:
            for model in (pair.model, pair.prepared):
                call_model(model, on(target, inputs))
        except (QflowError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _misfit(pair, inputs, name, error) from error


def require_numbers(pair: ModelPair, inputs: Any) -> None:
    """Raise DataError for NaN. Infinity is allowed, because masks use it."""
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
    """Return dtype and rank of each tensor, which all items share; sizes may differ."""
    return [(t.dtype, t.ndim) for _, t in _tensors(pair, inputs)]


def _tensors(pair: ModelPair, inputs: Any) -> list[tuple[str, Tensor]]:
    return input_tensors(pair.model, inputs)


def kept_cases(table: BadcaseTable, inputs: BadcaseInputs, topk: int) -> BadcaseTable:
    """Return the table with those of the `topk` bad cases whose inputs were kept. The worst must be: DataError."""
    lost = [i for i in table.chosen[:topk] if i not in inputs.samples]
    if table.chosen[0] in lost:
        why = "it became the worst sample only after its inputs were dropped"
        raise DataError(f"The worst sample's inputs are kept, but got none of {lost[0]}: {why}. Raise topk.")
    missing = [Finding("", "info", f"sample {i} is a bad case too, but its inputs were not kept") for i in lost]
    chosen = tuple(i for i in table.chosen[:topk] if i not in lost)
    table = dataclasses.replace(table, chosen=chosen, findings=(*table.findings, *missing))
    inputs.finish(table)
    return table
