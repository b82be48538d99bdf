"""Ranges of single channels, gathered in one float pass over the calibration batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import call_model
from qflow.repair.base.contract import Context
from qflow.repair.equalization.channel_weights import Read


@dataclass
class Ranges:
    """Largest |x| and mean square of each channel of a tensor, float64 with the sizes of its `Read`."""

    largest: Tensor
    power: Tensor
    count: int

    def add(self, other: Ranges) -> None:
        """Take in further values."""
        total = self.count + other.count
        self.largest = torch.maximum(self.largest, other.largest)
        self.power = self.power * (self.count / total) + other.power * (other.count / total)
        self.count = total


@torch.no_grad()
def channel_ranges(
    prepared: QuantizedModel, reads: Collection[Read], results: Mapping[str, int], context: Context
) -> dict[Read, Ranges]:
    """The ranges of these tensors over all calls; those that did not run, or have other sizes, are left out.

    `results` is the number of results of each operator.
    """
    wanted: dict[tuple[str, int], list[Read]] = {}
    for read in dict.fromkeys(reads):
        wanted.setdefault((read.name, read.position), []).append(read)
    names = {name for name, _ in wanted}
    seen: Counter[str] = Counter()
    found: dict[Read, Ranges] = {}

    def watch(call: str, value: Tensor) -> None:
        if call not in names:
            return
        position = seen[call] % results.get(call, 1)  # several results come one after the other
        seen[call] += 1
        for read in wanted.get((call, position), ()):
            rows = _rows(value, read)
            if rows is not None:
                here = Ranges(rows.abs().amax(-1), rows.square().mean(-1), rows.shape[-1])
                found.setdefault(read, Ranges(here.largest, here.power, 0)).add(here)

    before, prepared.watch = prepared.watch, watch
    try:
        with prepared.collecting():  # all quantizers off, every operator followed
            for inputs, size in context.batches:
                call_model(prepared, inputs)
                context.forwards += size
    finally:
        prepared.watch = before
    return {read: ranges for read, ranges in found.items() if bool(ranges.largest.isfinite().all())}


def _rows(value: Tensor, read: Read) -> Tensor | None:
    """The values of each channel in the last axis; None if the tensor has no such channels."""
    if not value.is_floating_point() or value.ndim != read.ndim or value.numel() == 0:
        return None
    value, places = value.detach().double().cpu(), dict.fromkeys(read.axes, 0)
    for axis, size in sorted(zip(read.axes, read.sizes, strict=True), reverse=True):
        if value.shape[axis] % size:
            return None
        value = value.reshape(
            *value.shape[:axis], -1, size, *value.shape[axis + 1 :]
        )  # batch and channels may share an axis, the batch first
        places = {key: place + (key > axis) for key, place in places.items()} | {axis: axis + 1}
    return value.movedim(list(places.values()), list(range(len(places)))).flatten(len(places))
