"""Ranges of single channels, gathered in one float pass over the calibration batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qflow.core.graph import OpNode
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import call_model
from qflow.repair.channel_rules import Labels
from qflow.repair.channels import Channels
from qflow.repair.contract import Context


@dataclass(frozen=True)
class Ranges:
    """Largest |x| and mean square of each channel of an operator's result, float64 [channels]."""

    largest: Tensor
    power: Tensor


@torch.no_grad()
def channel_ranges(prepared: QuantizedModel, channels: Channels, context: Context) -> dict[str, Ranges]:
    """Operator -> ranges along the axis of its labels, over all calls; operators that did not run are left out."""
    wanted = _wanted(prepared, channels)
    largest: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def watch(call: str, value: Tensor) -> None:
        if call not in wanted:
            return
        name, labels = wanted[call]
        if value.ndim <= labels.axis or value.shape[labels.axis] != len(labels.ids) or not value.is_floating_point():
            return
        rows = value.movedim(labels.axis, 0).flatten(1).double().cpu()
        top, squares = rows.abs().amax(1), rows.square().sum(1)
        largest[name] = torch.maximum(largest[name], top) if name in largest else top
        total[name] = total[name] + squares if name in total else squares
        count[name] = count.get(name, 0) + rows.shape[1]

    before, prepared.watch = prepared.watch, watch
    try:
        with prepared.collecting():  # all quantizers off, every operator followed
            for inputs, size in context.batches:
                call_model(prepared, inputs)
                context.forwards += size
    finally:
        prepared.watch = before
    return {
        name: Ranges(largest[name], total[name] / count[name]) for name in largest if largest[name].isfinite().all()
    }


def _wanted(prepared: QuantizedModel, channels: Channels) -> dict[str, tuple[str, Labels]]:
    """Call of the last operator of a group -> the group's name and labels, of what consumers read."""
    graph = prepared.graph
    read = {source for consumer in channels.consumers.values() for source in consumer.sources}
    read |= {source for name in read for source in graph.source(name)}
    found = {}
    for node in graph.nodes:
        labels = channels.labels[node.name]
        if node.name in read and labels is not None:
            found[_last(prepared, node)] = node.name, labels
    return found


def _last(prepared: QuantizedModel, node: OpNode) -> str:
    members = (node.name, *node.fused)
    return next((member for member in members if member in prepared.plan.output_at), node.name)
