"""Finds the worst samples of a stream in bounded memory, from the metric values of one batch after the other.

Two rankings are kept. One holds the `top` worst samples of each output and metric; it needs no mean and is exact. The
other ranks samples over all outputs together, by

    total(sample) = sum over outputs of badness / mean badness of that output over all samples

(`metrics.badness`; that of a user's own metric is taken relative to the best value seen). The means are known only at
the end, so candidates are kept in a pool. Until the pool first overflows (2 x `pool` samples) no sample is dropped and
the ranking is exact. From then on samples are ranked by the means at that moment, and those with the smallest totals
are dropped. The final total of a dropped sample is at most `bound` = the largest total of a dropped sample x the
largest factor by which the mean of any output has shrunk since. Every sample whose final total exceeds the bound is
certainly ranked right; `fair` returns how many these are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qflow.analysis.measures.metrics import CUSTOM, Custom, badness, metric_names, worst_key

_TINY = 1e-30  # used as the mean of an output that has no error at all


class WorstSamples:
    """Means and worst samples of `outputs` under all metrics; a sample is identified by its place in the stream."""

    def __init__(self, outputs: list[str], custom: Custom | None = None, top: int = 1, pool: int = 1024) -> None:
        self.outputs = list(outputs)
        self.custom = custom
        self.metrics = metric_names(custom)
        self.top, self.pool = top, pool
        self.samples = 0
        size = (len(outputs), len(self.metrics))
        self.data = {
            "key": torch.empty(*size, 0, dtype=torch.float64),
            "value": torch.empty(*size, 0, dtype=torch.float64),
            "index": torch.empty(*size, 0, dtype=torch.int64),
            "sum": torch.zeros(size, dtype=torch.float64),
            "finite": torch.zeros(size, dtype=torch.int64),
            "best": torch.full(size, torch.inf, dtype=torch.float64),
            "first_not_finite": torch.full(size, -1, dtype=torch.int64),
            "pool": torch.empty(size[1], 0, size[0], dtype=torch.float64),
            "pool_index": torch.empty(size[1], 0, dtype=torch.int64),
            "weight": torch.zeros(size, dtype=torch.float64),
            "left": torch.full((size[1],), -torch.inf, dtype=torch.float64),
        }

    def update(self, values: Tensor) -> None:
        """Take in the next B samples: metric values, float64 [outputs, metrics, B], on the CPU."""
        bad = torch.stack([badness(m, values[:, i], self.custom) for i, m in enumerate(self.metrics)], 1)
        index = torch.arange(self.samples, self.samples + bad.shape[2])
        self._update_top(values, worst_key(bad), index)
        self._update_sums(bad, index)
        data, size = self.data, len(index)
        data["pool"] = torch.cat([data["pool"], bad.permute(1, 2, 0)], 1)
        data["pool_index"] = torch.cat([data["pool_index"], index.expand(len(self.metrics), size)], 1)
        self.samples += size
        if data["pool"].shape[1] > 2 * self.pool:
            self._shrink()

    def _update_top(self, values: Tensor, key: Tensor, index: Tensor) -> None:
        data = self.data
        new = {"key": key, "value": values, "index": index.expand(values.shape)}
        joined = {name: torch.cat([data[name], new[name]], 2) for name in new}
        # The sort is stable: of equal samples the earlier comes first, and kept samples precede those of this batch.
        order = joined["key"].sort(dim=2, descending=True, stable=True).indices[:, :, : self.top]
        data.update({name: column.gather(2, order) for name, column in joined.items()})

    def _update_sums(self, bad: Tensor, index: Tensor) -> None:
        data, finite = self.data, bad.isfinite()
        data["sum"] += bad.where(finite, 0.0).sum(2)
        data["finite"] += finite.sum(2)
        data["best"] = torch.minimum(data["best"], bad.where(finite, torch.inf).amin(2))
        first = index[(~finite).int().argmax(2)]
        unseen = (data["first_not_finite"] < 0) & ~finite.all(2)
        data["first_not_finite"] = torch.where(unseen, first, data["first_not_finite"])

    def _shrink(self) -> None:
        """Drop the samples with the smallest totals under the means at the first overflow."""
        data = self.data
        if not data["weight"].any():
            data["weight"] = self._weights()
        scores = worst_key(_totals(data["pool"], data["weight"].T[:, None]))
        order = scores.sort(dim=1, descending=True, stable=True).indices
        kept, gone = order[:, : self.pool].sort(1).values, order[:, self.pool :]
        data["left"] = torch.maximum(data["left"], scores.gather(1, gone).amax(1))
        data["pool_index"] = data["pool_index"].gather(1, kept)
        data["pool"] = data["pool"].gather(1, kept[:, :, None].expand(-1, -1, len(self.outputs)))

    def _zeros(self) -> Tensor:
        """Badness that counts as 0 [outputs, metrics]: for a user's own metric, which has no known 0, the best seen."""
        own = torch.tensor([metric == CUSTOM for metric in self.metrics])
        return self.data["best"].where(own & self.data["best"].isfinite(), 0.0)

    def _weights(self) -> Tensor:
        """1 / mean badness [outputs, metrics], over the samples where it is finite."""
        mean = self.data["sum"] / self.data["finite"].clamp_min(1) - self._zeros()
        return 1.0 / mean.clamp_min(_TINY)

    def leave_out(self, output: str) -> None:
        """Remove an output that turned out not to be comparable."""
        kept = torch.tensor([i for i, name in enumerate(self.outputs) if name != output], dtype=torch.int64)
        for name, tensor in self.data.items():
            if name == "pool":
                self.data[name] = tensor[:, :, kept]
            elif name == "left":  # totals that include the output give no bound for totals without it
                self.data[name] = torch.where(tensor.isneginf(), tensor, torch.inf)
            elif name != "pool_index":
                self.data[name] = tensor[kept]
        self.outputs.remove(output)

    def fair(self, metric: str, count: int) -> tuple[list[int], int]:
        """The `count` samples of largest total, and how many of them, from the worst on, are certainly right."""
        m, data = self.metrics.index(metric), self.data
        weight, zero = self._weights()[:, m], self._zeros()[:, m]
        total = worst_key(_totals(data["pool"][m] - zero, weight))
        order = total.sort(descending=True, stable=True).indices[:count]
        chosen: list[int] = data["pool_index"][m][order].tolist()
        left = data["left"][m]
        if left.isneginf() or len(self.outputs) == 1:  # with one output, the mean does not change the ranking
            return chosen, len(chosen)
        known = data["weight"][:, m]
        bound = (left - (zero * known).sum()) * (weight / known).max()
        return chosen, len(chosen) if bound <= 0 else int((total[order] > bound).sum())

    def raw(self, metric: str, count: int) -> list[int]:
        """The `count` samples of worst value in any output, as the plugin compares; `count` up to `top`."""
        m, worst = self.metrics.index(metric), dict[int, float]()
        keys, indices = self.data["key"][:, m].flatten(), self.data["index"][:, m].flatten()
        for key, index in zip(keys.tolist(), indices.tolist(), strict=True):
            worst[index] = max(key, worst.get(index, key))
        return sorted(worst, key=lambda i: (-worst[i], i))[:count]

    def tops(self, output: str, metric: str) -> list[tuple[int, float]]:
        """(sample, value) of the worst, worst first."""
        o, m = self.outputs.index(output), self.metrics.index(metric)
        return list(zip(self.data["index"][o, m].tolist(), self.data["value"][o, m].tolist(), strict=True))

    def not_finite(self, output: str) -> dict[str, tuple[int, int]]:
        """Metric -> (how many samples have no finite distance, the first of them), where there are any."""
        o = self.outputs.index(output)
        missing = (self.samples - self.data["finite"][o]).tolist()
        first = self.data["first_not_finite"][o].tolist()
        return {m: (missing[i], first[i]) for i, m in enumerate(self.metrics) if missing[i]}

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as builtins and tensors."""
        return {"outputs": list(self.outputs), "samples": self.samples, "data": dict(self.data)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of `state_dict`."""
        self.outputs, self.samples, self.data = list(state["outputs"]), int(state["samples"]), dict(state["data"])


def _totals(bad: Tensor, weight: Tensor) -> Tensor:
    """Sum over outputs (last dim) in a fixed order, so that equal samples get equal totals in any batch."""
    total = torch.zeros_like(bad[..., 0])
    for column, factor in zip(bad.unbind(-1), weight.unbind(-1), strict=True):
        total = total + column * factor
    return total
