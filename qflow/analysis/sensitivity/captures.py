"""Cuts the bad cases of one ranking into chunks and captures a float pass of each, once if the memory allows it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from qflow.analysis.sensitivity.chunks import chunks_of, joined, mixed, sample_bytes
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.replay.capture import Captured, capture, without_inner
from qflow.quant.replay.fused import FoldedOps
from qflow.quant.replay.samples import MixesSamples, axes_by_running
from qflow.quant.trace.calling import batch_size


class Captures:
    """Captures of the chunks for a ranking by `method`; they are kept for later use within half of `memory` bytes."""

    def __init__(self, model: nn.Module, prepared: QuantizedModel, memory: float, method: str) -> None:
        self.model, self.prepared, self.memory, self.method = model, prepared, memory, method
        self.batches: Sequence[Any] = ()
        self.room = math.inf
        self.reason = ""
        """Why batches were not cut into chunks; "" if they were."""
        self.kept: dict[int, Captured] = {}
        self.held = 0.0
        self.ahead: Captured | None = None
        """Capture of the first chunk that `proven` made; its first use takes it from here."""

    def chunks(self, batches: Sequence[Any], room: float, first: int) -> list[Any]:
        """`batches` in parts of at most `room` bytes, the first with at most `first` samples; they stay whole if the
        result of a sample depends on the other samples of its batch.
        """
        self.batches, self.room = batches, room
        cuts = [chunks_of(self.prepared.graph, inputs, room, first) for inputs in batches]
        for i, (inputs, parts) in enumerate(zip(batches, cuts, strict=True)):
            if len(parts) > 1 and not (i == 0 and self.proven(parts[0])):
                self.reason = self.reason or mixed(self.model, inputs, parts[:2])
        if not self.reason:
            return [part for parts in cuts for part in parts]
        self.kept.clear()
        self.held = 0.0
        self.ahead = None
        return list(batches)

    def for_forwards(self) -> list[Any]:
        """The batches of `chunks` in as few parts as fit: joined, if that gives the same outputs, and cut anew."""
        batches = list(self.batches)
        if self.reason:
            return batches
        whole = joined(batches) if len(batches) > 1 else None
        if whole is not None and not mixed(self.model, whole, batches):
            batches = [whole]
        return [part for inputs in batches for part in chunks_of(self.prepared.graph, inputs, self.room)]

    def proven(self, first: Any) -> bool:
        """True if every operator of the first chunk computes its samples independently.

        An operator whose results depend on the batch becomes `reason`. One that only reorders samples does not, because
        a later operator may restore the order: then the outputs are compared instead (`mixed`).
        """
        try:
            self.ahead = self.captured(0, first) if self.method == "exact" else self.whole(0, first)
            if self.ahead.complete:
                ops = FoldedOps(self.model, self.prepared, self.ahead)
                axes_by_running(ops, self.ahead, batch_size(first))
                return True
        except MixesSamples as error:
            self.reason = error.reason
        except Exception:  # whatever an operator raises at another batch size: `mixed` runs the model itself
            return False
        return False

    def captured(self, n: int, inputs: Any) -> Captured:
        """Capture of the n-th chunk: its operators and float values."""
        if n in self.kept:
            return self.kept[n]
        return self._keep(n, inputs, self._ahead(n) or capture(self.model, self.prepared.plan, inputs, self.memory / 2))

    def whole(self, n: int, inputs: Any) -> Captured:
        """Capture of the n-th chunk with the values inside fused groups, which an estimate needs."""
        found = self._ahead(n)
        if found is None:
            found = capture(self.model, self.prepared.plan, inputs, math.inf, inner=True)  # the chunk's size fits
            if self.method == "screened":  # measuring rows afterwards needs it again
                self._keep(n, inputs, without_inner(found, self.prepared.plan))
        return found

    def _ahead(self, n: int) -> Captured | None:
        if n:
            return None
        found, self.ahead = self.ahead, None
        return found

    def _keep(self, n: int, inputs: Any, captured: Captured) -> Captured:
        size = batch_size(inputs) * sample_bytes(self.prepared.graph, inputs)
        if self.held + size <= self.memory / 2:
            self.kept[n] = captured
            self.held += size
        return captured
